"""Recomputes every number of a record from its logs, and checks that the record keeps the rules (records/README.md).

    python records/verify.py                            every record of the repository
    python records/verify.py records/TRACK/DATE_NAME    these alone

Prints what is wrong, one line each with file and line, and exits with 1; or says what it checked, and exits with 0.

A record's folder: record.json (who and what, and `measured`, all that follows from the logs), code/ (the modules that ran), logs/ (one
for each declared run, without the code), finetuned/ (logs of finetunings of these runs, if any), paired/ (runs of the record before on
this record's machine, unless its own logs were made there), README.md and curve.png.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import ttest_1samp, ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from records.logs import Log, read_log

from dataloading import InputError, sha256_of
from model import KBERTConfig
from trainer import Work

RECORDS = Path(__file__).resolve().parent
SIGNIFICANCE = 0.01  # of both tests: loss below target, time below the record before
MOST_BYTES = 2_000_000  # of a record
SAME_EVERYWHERE = ("device", "threads", "torch", "cuda", "driver", "world_size")
FREE_BETWEEN_RUNS = ("seed", "run_name", "out", "hf_model_name", "wandb_project", "resume")


def read_tracks(root: Path) -> dict[str, dict]:
    return json.loads((root / "tracks.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# One run: does its log hang together?


def expected_steps(train: dict, last: int) -> tuple[set[int], set[int]]:
    """Steps after which a whole log has a training loss, and a validation loss."""
    valid = {step for step in range(0, last + 1) if train["valid_every"] and step % train["valid_every"] == 0} | {last}
    saved = {step for step in range(1, last + 1) if train["save_every"] and step % train["save_every"] == 0}
    return {step for step in range(1, last + 1) if step % train["log_every"] == 0} | valid | saved, valid


def check_seal(log: Log) -> Iterator[str]:
    """Ended, in one go, and unchanged since."""
    if "resumed" in log.sections:
        yield f"{log.path}:{log.at['resumed']}: a resumed run: a record's runs go through without a break"
    if not log.named("result", "finished"):
        yield f"{log.path}:{log.at['result']}: the run did not finish"
    if log.named("result", "log_sha256") != log.digest:
        yield f"{log.path}:{log.at['result']}: log_sha256 does not follow from the lines above: one of them was changed after the run"


def check_run(log: Log) -> Iterator[str]:
    """What is wrong within a pretraining's log, by itself."""
    config, train, result = log.named("config"), log.named("config", "train"), log.named("result")
    last, end = result["step"], log.lines[-1]

    yield from check_seal(log)

    # --- every line there, and in order
    with_train, with_valid = expected_steps(train, last)
    for kind, expected in (("train_loss", with_train - {0}), ("val_loss", with_valid)):
        steps = [line.step for line in log.lines if getattr(line, kind) is not None]
        missing, extra = sorted(expected - set(steps)), sorted(set(steps) - expected)
        if missing:
            yield f"{log.path}: no {kind} after step {missing[0]}" + (
                f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            )
        if extra or len(steps) != len(set(steps)):
            yield f"{log.path}: a {kind} too many, after step {(extra or [s for s in steps if steps.count(s) > 1])[0]}"
    for before, line in zip(log.lines, log.lines[1:]):
        for name in ("step", "seconds", "tokens", "flops"):
            if getattr(line, name) is None or getattr(line, name) < getattr(before, name):
                yield f"{log.path}:{line.number}: {name} does not grow"

    # --- every line by itself
    peak = log.named("environment", "peak_flops")
    for line in log.lines:
        if line.step_avg is None or abs(line.step_avg - line.seconds / max(1, line.step)) > 6e-6 + 6e-4 / max(
            1, line.step
        ):
            yield f"{log.path}:{line.number}: step_avg is not train_time / step"
        elif line.seconds and abs(line.mfu - line.flops / line.seconds / peak) > 6e-5 + line.mfu * 6e-4 / line.seconds:
            yield f"{log.path}:{line.number}: mfu is not flops / train_time / peak_flops"

    # --- the end
    if train["max_minutes"] is None and last != train["steps"]:
        yield f"{log.path}:{log.at['result']}: {last} steps of the {train['steps']} configured"
    if train["max_minutes"] is not None and not 0 <= result["seconds"] - 60 * train["max_minutes"] <= 3 * result[
        "seconds"
    ] / max(1, last):
        yield f"{log.path}:{log.at['result']}: it ended after {result['seconds']:.1f} s, not with its {train['max_minutes']} minutes"
    said = {
        "step": (last, 0),
        "seconds": (result["seconds"], 6e-4),
        "val_loss": (result["val_loss"], 6e-5),
        "tokens": (result["work"]["tokens"], 0),
        "flops": (result["flops"], 1e-6 * result["flops"]),
    }
    for name, (value, tolerance) in said.items():
        if getattr(end, name) is None or abs(getattr(end, name) - value) > tolerance:
            yield f"{log.path}:{end.number}: the last line's {name} is not that of the result"

    # --- FLOPs follow from the configuration and from what was counted
    known = {name: value for name, value in config["model"].items() if name in KBERTConfig.__dataclass_fields__}
    shape, work = KBERTConfig(vocab_size=log.named("data", "vocab_size"), **known), Work(**result["work"])
    flops = work.training_flops(shape, whole_last_layer="recipe" in config)  # the baseline's layers are all alike
    if not math.isclose(flops, result["flops"], rel_tol=1e-9):
        yield f"{log.path}:{log.at['result']}: FLOPs {result['flops']:.6e} do not follow from the configuration, which gives {flops:.6e}"
    longest, window = config["data"]["max_length"], shape.local_attention_window
    rates = sorted((train["mask_rate_start"], train["mask_rate_end"]))
    bounds = {
        "tokens": (0.5 * last * train["batch_tokens"] * min(1.0, train["batch_start"]), last * train["batch_tokens"]),
        "global_pairs": (work.tokens, work.tokens * longest),
        "local_pairs": (work.tokens, min(work.global_pairs, work.tokens * (window + 1))),
        "masked": (0.9 * rates[0] * work.tokens, 1.01 * rates[1] * last * train["batch_tokens"] + 16 * last),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(work, name) <= high:
            yield f"{log.path}:{log.at['result']}: work.{name} is {getattr(work, name)}, outside {low:.0f} to {high:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# A record: what its logs give, and whether they belong together


@dataclass
class Record:
    path: Path
    said: dict  # record.json
    logs: list[Log]
    finetuned: list[Log]
    paired: list[Log]

    @property
    def order(self) -> tuple[str, float]:
        """By date; of one day the slower first."""
        return self.said["date"], -self.said["measured"]["seconds"]


def read_record(path: Path) -> Record:
    try:
        said = json.loads((path / "record.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path / 'record.json'}: missing or not JSON ({error})") from error
    missing = [key for key in ("track", "name", "date", "contributors", "declared_runs", "measured") if key not in said]
    if missing:
        raise InputError(f"{path / 'record.json'}: no {', '.join(missing)}")
    logs, finetuned, paired = (
        [read_log(log) for log in sorted((path / folder).glob("*.txt"))] for folder in ("logs", "finetuned", "paired")
    )
    return Record(path, said, logs, finetuned, paired)


def read_records(folder: Path) -> list[Record]:
    """A track's records, the oldest first."""
    return sorted((read_record(path.parent) for path in folder.glob("*/record.json")), key=lambda record: record.order)


def mnli_scores(log: Log) -> dict[str, float]:
    """Accuracy on both parts, in percent, median over the finetuning's seeds."""
    splits = log.named("result", "results", "mnli", "pretrained")
    return {part: 100 * splits[f"validation_{part}"]["accuracy"]["median"] for part in ("matched", "mismatched")}


def measure(record: Record, target: dict, before: list[Log] | None) -> dict:
    """All of record.json's `measured`. before: runs of the record before, on the same machine."""
    results = [log.named("result") for log in record.logs]
    tuned = {log.named("data", "base_sha256"): mnli_scores(log) for log in record.finetuned}
    mnli = [tuned[result["model_sha256"]] for result in results if result["model_sha256"] in tuned]
    seconds, losses = [result["seconds"] for result in results], [result["val_loss"] for result in results]
    tests = [result["test_loss"] for result in results if result["test_loss"] is not None]
    environment = record.logs[0].named("environment")
    measured = {
        "n": len(results),
        "parameters": results[0]["parameters"],
        "hardware": f"{environment['world_size']} x {environment['device']}"
        + (f", {environment['threads']} threads" if "threads" in environment else ""),
        "seconds": statistics.fmean(seconds),
        "seconds_std": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
        "flops": statistics.fmean(result["flops"] for result in results),
        "tokens": statistics.fmean(result["work"]["tokens"] for result in results),
        "val_loss": statistics.fmean(losses),
        "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "test_loss": statistics.fmean(tests) if tests else None,
        "mnli_matched": statistics.fmean(score["matched"] for score in mnli) if mnli else None,
        "mnli_mismatched": statistics.fmean(score["mismatched"] for score in mnli) if mnli else None,
    }
    if target["metric"] == "val_loss":
        measured["p_target"] = (
            float(ttest_1samp(losses, target["value"], alternative="less").pvalue) if len(losses) > 1 else None
        )
    else:
        scores = [score["matched"] for score in mnli]
        measured["p_target"] = (
            float(ttest_1samp(scores, target["value"], alternative="greater").pvalue) if len(scores) > 1 else None
        )
    if before:
        theirs = [log.named("result", "seconds") for log in before]
        measured["speedup"] = statistics.fmean(theirs) / statistics.fmean(seconds)
        measured["p_faster"] = float(ttest_ind(seconds, theirs, equal_var=False, alternative="less").pvalue)
    return measured


def paired_logs(record: Record, before: Record | None) -> list[Log] | None:
    return (record.paired or before.logs) if before else None


def check_together(logs: Sequence[Log], what: str, free: Sequence[str] = FREE_BETWEEN_RUNS) -> Iterator[str]:
    """Runs that are to be averaged: one code, one configuration but for `free`, one kind of machine, and no run twice."""
    first = logs[0]
    for log in logs[1:]:
        if log.hashes != first.hashes:
            yield f"{log.path}: {what}: other code than {first.path.name} ({', '.join(n for n in log.hashes | first.hashes if log.hashes.get(n) != first.hashes.get(n))})"
        for name in SAME_EVERYWHERE:
            if log.named("environment").get(name) != first.named("environment").get(name):
                yield f"{log.path}:{log.at['environment']}: {what}: {name} is {log.named('environment').get(name)!r}, in {first.path.name} {first.named('environment').get(name)!r}"
        for group in ("data", "train", "model"):
            ours, theirs = log.named("config").get(group, {}), first.named("config").get(group, {})
            different = [name for name in {**ours, **theirs} if name not in free and ours.get(name) != theirs.get(name)]
            if different:
                yield f"{log.path}:{log.at['config']}: {what}: other settings than {first.path.name}: {', '.join(different)}"
    seen: dict[tuple, Log] = {}
    for log in logs:
        losses = tuple(line.train_loss for line in log.lines if line.train_loss is not None)
        if losses in seen:
            yield f"{log.path}: {what}: the same run as {seen[losses].path.name}"
        seen.setdefault(losses, log)


def check_files(record: Record) -> Iterator[str]:
    """Logs, code and links: those that are named, no others."""
    at, said = record.path / "record.json", record.said
    for name in said.get("logs", []):
        if not (record.path / name).exists():
            yield f"{at}: {name} is not there"
    if extra := {log.path.relative_to(record.path).as_posix() for log in record.logs} - set(said.get("logs", [])):
        yield f"{at}: {', '.join(sorted(extra))} is there, but not named"
    size = sum(path.stat().st_size for path in record.path.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        yield f"{record.path}: {size:,} bytes, more than {MOST_BYTES:,}: log every few steps (--train.log_every)"
    for page in record.path.glob("*.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
            for link in re.findall(r"\]\(([^)#\s]+)\)", line):
                if "://" not in link and not (page.parent / link).exists():
                    yield f"{page}:{number}: a link to {link}, which is not there"
    code = {
        path.relative_to(record.path / "code").as_posix(): sha256_of(path)
        for path in sorted((record.path / "code").rglob("*.py"))
    }
    if code != record.logs[0].hashes:
        different = sorted(
            name for name in code | record.logs[0].hashes if code.get(name) != record.logs[0].hashes.get(name)
        )
        yield f"{record.path / 'code'}: not the code that ran: {', '.join(different)}"


def check_declared(record: Record, track: dict) -> Iterator[str]:
    """As many runs as were declared before the first, dated when they ran."""
    at, said = record.path / "record.json", record.said
    started = max(str(log.named("environment", "started")) for log in record.logs)
    if said["date"] != started[:10]:
        yield f"{at}: the date is {said['date']}, the last run started {started}"
    for log in record.logs:
        declared = log.named("config", "train", "declared_runs")
        if declared != said["declared_runs"]:
            yield f"{log.path}:{log.at['config']}: {declared} runs were declared when it started, {said['declared_runs']} in record.json"
    seeds = sorted(log.named("config", "train", "seed") for log in record.logs)
    if seeds != list(range(1, said["declared_runs"] + 1)):
        yield f"{record.path / 'logs'}: {said['declared_runs']} runs were declared, with seeds from 1; there are those with seeds {', '.join(map(str, seeds))}"
    if len(seeds) < track["min_runs"]:
        yield f"{record.path / 'logs'}: {len(seeds)} runs; the track asks for {track['min_runs']}"


def check_track(log: Log, track: dict) -> Iterator[str]:
    """The track's data, validation and hardware."""
    expected = {
        ("data", "hash"): track["data"]["hash"],
        ("data", "tokenizer"): track["data"]["tokenizer_sha256"],
        ("config", "data", "max_length"): track["max_length"],
        **{
            ("data", "validation", name): track["data"]["validation"][name]
            for name in ("tokens", "masked_tokens", "fingerprint")
        },
    }
    for keys, value in expected.items():
        if log.named(*keys) != value:
            yield f"{log.path}:{log.at[keys[0]]}: {'.'.join(keys)} is {log.named(*keys)!r}, the track's is {value!r}"
    for name, value in track["hardware"].items():
        found = log.named("environment").get(name)
        if found != value and not (name == "device" and isinstance(found, str) and value in found):
            yield f"{log.path}:{log.at['environment']}: {name} is {found!r}, the track's is {value!r}"


def check_finetuned(record: Record, track: dict) -> Iterator[str]:
    """Finetunings are of these runs' models, one of each, by the track's protocol, judged by the whole of MNLI's dev-matched."""
    models = [log.named("result", "model_sha256") for log in record.logs]
    started_from = [log.named("data", "base_sha256") for log in record.finetuned]
    if record.finetuned and "finetuning" not in track:
        yield f"{record.path / 'finetuned'}: the track takes no finetunings"
        return
    if track["target"]["metric"] != "val_loss" or record.finetuned:
        for log, model in zip(record.logs, models):
            if started_from.count(model) != 1:
                yield f"{log.path}: {started_from.count(model)} MNLI finetunings of this run: give one of each (--finetuned)"
    for log, base in zip(record.finetuned, started_from):
        if base not in models:
            yield f"{log.path}:{log.at['data']}: it started from another model than these runs'"
        yield from check_seal(log)
        if log.named("config", "protocol") != track["finetuning"]["protocol"]:
            yield f"{log.path}:{log.at['config']}: the protocol is {log.named('config', 'protocol')}, the track's is {track['finetuning']['protocol']}"
        if (judged_by := log.named("result", "splits", "mnli", "validation_matched")) != track["finetuning"][
            "validation_matched"
        ]:
            yield f"{log.path}:{log.at['result']}: validation_matched is {judged_by}, the track's is {track['finetuning']['validation_matched']}"
        last = {line.run: line.dev_score for line in log.lines if line.dev_score is not None}
        if abs(100 * statistics.median(last.values()) - mnli_scores(log)["matched"]) > 0.006:
            yield f"{log.path}:{log.at['result']}: the result is not the median of the runs' last dev_score"
    if record.finetuned:
        yield from check_together(record.finetuned, "a finetuning of this record", (*FREE_BETWEEN_RUNS, "base_model"))


def check_claim(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """Target met, and faster than the record before on one machine; record.json says what the logs give."""
    at, said, logs_before = record.path / "record.json", record.said, paired_logs(record, before)
    measured = measure(record, track["target"], logs_before)
    for name in {**measured, **said["measured"]}:
        ours, theirs = measured.get(name), said["measured"].get(name)
        same = (
            math.isclose(ours, theirs, rel_tol=1e-9)
            if isinstance(ours, float) and isinstance(theirs, (int, float))
            else ours == theirs
        )
        if not same:
            yield f"{at}: measured.{name} is {theirs!r}, the logs give {ours!r}"
    p = measured["p_target"]
    if said.get("systems_only"):
        if before is None or not measured["val_loss"] <= track["target"]["value"]:
            yield f"{at}: systems_only needs a record before it, and a mean loss that meets the target"
    elif p is None or not p < SIGNIFICANCE:
        yield f"{at}: {track['target']['metric']} does not meet the target {track['target']['value']} (p = {p}, asked for: below {SIGNIFICANCE})"
    if before is None:
        return
    if said.get("beats") != before.path.name:
        yield f"{at}: beats is {said.get('beats')!r}; the record before is {before.path.name}"
    yield from check_together(logs_before, "a run of the record before")
    for log in record.paired:
        yield from check_run(log)
    if record.paired and logs_before[0].hashes != before.logs[0].hashes:
        yield f"{logs_before[0].path}: not the code of {before.path.name}"
    here = record.logs[0].named("environment")
    for log in [*logs_before, *record.logs]:
        there = log.named("environment")
        for name in (*SAME_EVERYWHERE, "machine"):
            if there.get(name) != here.get(name):
                yield f"{log.path}:{log.at['environment']}: {name} is {there.get(name)!r}, not {here.get(name)!r}: compared runs are made on one machine (paired/)"
    if len(logs_before) < track["min_runs"]:
        yield f"{record.path}: {len(logs_before)} runs of the record before; the track asks for {track['min_runs']}"
    elif not measured["p_faster"] < SIGNIFICANCE:
        yield f"{at}: not faster than {before.path.name} ({measured['speedup']:.3f} times, p = {measured['p_faster']:.4f}, asked for: below {SIGNIFICANCE})"


def check_record(record: Record, tracks: dict[str, dict], before: Record | None) -> Iterator[str]:
    """before: the track's record up to then, if there was one."""
    at, name = record.path / "record.json", record.said["track"]
    track = tracks.get(name)
    if track is None or record.path.parent.name != name:
        yield f"{at}: track {name!r} is not declared in tracks.json, or not the folder's"
    elif track["target"] is None or track["data"]["hash"] is None:
        yield f"{at}: track {name} is not open yet: {track['why']}"
    elif not record.logs:
        yield f"{record.path / 'logs'}: no logs"
    else:
        yield from check_files(record)
        yield from check_declared(record, track)
        for log in record.logs:
            yield from check_run(log)
            yield from check_track(log, track)
        yield from check_together(record.logs, "a run of this record")
        yield from check_finetuned(record, track)
        yield from check_claim(record, track, before)


def verify(path: Path) -> list[str]:
    """What is wrong with a record."""
    try:
        record, path = read_record(path), path.resolve()
        earlier = [other for other in read_records(path.parent) if other.path != path and other.order < record.order]
        return list(dict.fromkeys(check_record(record, read_tracks(path.parents[1]), earlier[-1] if earlier else None)))
    except (InputError, KeyError, TypeError) as error:
        return [
            str(error)
            if isinstance(error, InputError)
            else f"{path}: a value is missing or of the wrong kind ({error!r})"
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", metavar="DIR", help="folders of records [all]")
    found = parser.parse_args().records or sorted(path.parent for path in RECORDS.glob("*/*/record.json"))
    problems = [problem for path in found for problem in verify(path)]
    print(
        "\n".join(problems)
        or f"{len(found)} records verified: " + ", ".join(f"{path.parent.name}/{path.name}" for path in found)
    )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
