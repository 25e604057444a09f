"""Recomputes every number of a record from its logs, and checks that the record keeps the rules (records/README.md).

    python records/verify.py                            every record of the repository
    python records/verify.py records/TRACK/DATE_NAME    these alone

Prints what is wrong, one line each with file and line, and exits with 1; or says what it checked, and exits with 0.

A record's folder: record.json (who and what, and `measured`, all that follows from the logs), logs/ (one for each
declared run; the first keeps the code that ran), finetuned/ (logs of finetunings of these runs, if any), paired/ (runs
of the record before on this record's machine, unless its own logs were made there), README.md and curve.png.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import ttest_1samp, ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, read_json
from model import KBERTConfig
from records.log import GENERATOR_AND_DETECTOR, MASKED_LAST_LAYER, WHOLE_LAST_LAYER, Log, Work, read_log

RECORDS = Path(__file__).resolve().parent
SIGNIFICANCE = 0.01  # of both tests: loss below target, time below the record before
MOST_BYTES = 2_000_000  # of a record
SAME_EVERYWHERE = ("device", "threads", "torch", "cuda", "driver", "world_size")
FREE_BETWEEN_RUNS = ("seed", "run_name", "out", "hf_model_name", "wandb_project", "resume")
FREE_BETWEEN_MACHINES = (*FREE_BETWEEN_RUNS, "dir", "declared_runs")
# What reading a value that is missing, or of another kind than a run writes, may raise
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
FINETUNED_BY = ("protocol", "optimizer", "lr", "weight_decay", "epochs", "batch_size", "lr_schedule", "seeds")


def read_tracks(root: Path) -> dict[str, dict]:
    return read_json(root / "tracks.json")


def at(log: Log, section: str) -> str:
    return f"{log.path}:{log.at[section]}"


def differing(ours: dict, theirs: dict) -> str:
    """The names under which two mappings differ."""
    return ", ".join(sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)))


# ---------------------------------------------------------------------------------------------------------------------
# One run: does its log hang together?


def check_run(log: Log) -> Iterator[str]:
    """What is wrong within a pretraining's log, by itself."""
    yield from check_seal(log)
    yield from check_lines(log)
    yield from check_averages(log)
    yield from check_end(log)
    yield from check_work(log)


def check_seal(log: Log) -> Iterator[str]:
    """Ended, in one go, and unchanged since."""
    if "resumed" in log.sections:
        yield f"{at(log, 'resumed')}: a resumed run: a record's runs go through without a break"
    if not log.named("result", "finished"):
        yield f"{at(log, 'result')}: the run did not finish"
    if log.named("result", "log_sha256") != log.digest:
        yield f"{at(log, 'result')}: log_sha256 does not follow from the lines above: one was changed after the run"


def expected_steps(train: dict, last: int) -> tuple[set[int], set[int]]:
    """Steps after which a whole log has a training loss, and a validation loss."""

    def every(steps: int) -> set[int]:
        return set(range(0, last + 1, steps)) if steps else set()

    valid = every(train["valid_every"]) | {last}
    return every(train["log_every"]) - {0} | every(train["save_every"]) - {0} | valid, valid


def check_lines(log: Log) -> Iterator[str]:
    """Every line is there, once, and in order."""
    with_train, with_valid = expected_steps(log.named("config", "train"), log.named("result", "step"))
    for kind, expected in (("train_loss", with_train - {0}), ("val_loss", with_valid)):
        found = Counter(line.step for line in log.lines if getattr(line, kind) is not None)
        if missing := sorted(expected - set(found)):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            yield f"{log.path}: no {kind} after step {missing[0]}{others}"
        if extra := sorted(step for step, times in found.items() if times > 1 or step not in expected):
            yield f"{log.path}: a {kind} too many, after step {extra[0]}"
    for before, line in itertools.pairwise(log.lines):
        for name in ("step", "seconds", "tokens", "flops"):
            if getattr(line, name) is None or getattr(line, name) < getattr(before, name):
                yield f"{log.path}:{line.number}: {name} does not grow"


def check_averages(log: Log) -> Iterator[str]:
    """Each line's averages follow from its own numbers, as far as these are rounded."""
    peak = log.named("environment", "peak_flops")
    for line in log.lines:
        steps = max(1, line.step)
        if line.step_avg is None or abs(line.step_avg - line.seconds / steps) > 6e-6 + 6e-4 / steps:
            yield f"{log.path}:{line.number}: step_avg is not train_time / step"
        elif line.seconds and abs(line.mfu - line.flops / line.seconds / peak) > 6e-5 + line.mfu * 6e-4 / line.seconds:
            yield f"{log.path}:{line.number}: mfu is not flops / train_time / peak_flops"


def check_end(log: Log) -> Iterator[str]:
    """It ended as configured, with the numbers of its last line."""
    train, result, end = log.named("config", "train"), log.named("result"), log.lines[-1]
    steps, seconds = result["step"], result["seconds"]
    minutes, longest_step = train["max_minutes"], 3 * seconds / max(1, steps)
    if minutes is None and steps != train["steps"]:
        yield f"{at(log, 'result')}: {steps} steps of the {train['steps']} configured"
    if minutes is not None and not 0 <= seconds - 60 * minutes <= longest_step:
        yield f"{at(log, 'result')}: it ended after {seconds:.1f} s, not with its {minutes} minutes"
    said = {  # and how far the line is rounded
        "step": (steps, 0),
        "seconds": (seconds, 6e-4),
        "val_loss": (result["val_loss"], 6e-5),
        "tokens": (result["work"]["tokens"], 0),
        "flops": (result["flops"], 1e-6 * result["flops"]),
    }
    for name, (value, tolerance) in said.items():
        if getattr(end, name) is None or abs(getattr(end, name) - value) > tolerance:
            yield f"{log.path}:{end.number}: the last line's {name} is not that of the result"


def check_work(log: Log) -> Iterator[str]:
    """FLOPs follow from the configuration and from what was counted, which lies within what can be."""
    config, train, result = log.named("config"), log.named("config", "train"), log.named("result")
    place = at(log, "result")
    known = {name: value for name, value in config["model"].items() if name in KBERTConfig.__dataclass_fields__}
    shape, work = KBERTConfig(vocab_size=log.named("data", "vocab_size"), **known), Work(**result["work"])

    # Logs from before ways to count had names: the baseline's have a recipe, and its layers are all alike
    unnamed = WHOLE_LAST_LAYER if "recipe" in config else MASKED_LAST_LAYER
    counted_by = result.get("flops_counted_by", unnamed)
    ways = (MASKED_LAST_LAYER, WHOLE_LAST_LAYER, GENERATOR_AND_DETECTOR)
    detection = train.get("objective") == "rtd"
    if counted_by not in ways:
        yield f"{place}: FLOPs counted by {counted_by!r}: the ways known here are {' and '.join(ways)}"
    elif (counted_by == GENERATOR_AND_DETECTOR) != detection:
        yield f"{place}: FLOPs counted by {counted_by!r}, which is not the way of its objective"
    else:
        flops = work.training_flops(shape, counted_by, train.get("generator_layers"))
        if not math.isclose(flops, result["flops"], rel_tol=1e-9):
            yield f"{place}: FLOPs {result['flops']:.6e} do not follow from the configuration, which gives {flops:.6e}"

    if train["grad_accum"] is None:
        step_tokens = train["batch_tokens"]
    else:
        step_tokens = train["grad_accum"] * train["row_tokens"] * log.named("environment", "world_size")
    most_tokens = result["step"] * step_tokens
    rounding = 16 * most_tokens / train["row_tokens"]  # a row's masks are a multiple of 16
    rates = ("replace_rate",) if detection else ("mask_rate_start", "mask_rate_end")
    low_rate, *_, high_rate = sorted([train[name] for name in rates] * 2)
    longest, window = config["data"]["max_length"], shape.local_attention_window
    bounds = {
        "tokens": (0.5 * most_tokens * min(1.0, train["batch_start"]), most_tokens),
        "global_pairs": (work.tokens, work.tokens * longest),
        "local_pairs": (work.tokens, min(work.global_pairs, work.tokens * (window + 1))),
        "masked": (0.9 * low_rate * work.tokens - rounding, high_rate * most_tokens + rounding),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(work, name) <= high:
            yield f"{place}: work.{name} is {getattr(work, name)}, outside {low:.0f} to {high:.0f}"


# ---------------------------------------------------------------------------------------------------------------------
# A record: what its logs give


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
    said = read_json(path / "record.json")
    missing = [key for key in ("track", "name", "date", "contributors", "declared_runs", "measured") if key not in said]
    if missing:
        raise InputError(f"{path / 'record.json'}: no {', '.join(missing)}")
    return with_logs(path, said)


def with_logs(path: Path, said: dict) -> Record:
    def read(folder: str) -> list[Log]:
        return [read_log(log) for log in sorted((path / folder).glob("*.txt"), key=lambda log: (len(log.name), log))]

    return Record(path, said, read("logs"), read("finetuned"), read("paired"))


def read_records(folder: Path) -> list[Record]:
    """A track's records, the oldest first."""
    return sorted((read_record(path.parent) for path in folder.glob("*/record.json")), key=lambda record: record.order)


def mnli_scores(log: Log) -> dict[str, float]:
    """Accuracy on both parts, in percent, median over the finetuning's seeds."""
    splits = log.named("result", "results", "mnli", "pretrained")
    return {part: 100 * splits[f"validation_{part}"]["accuracy"]["median"] for part in ("matched", "mismatched")}


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure(record: Record, target: dict, before: list[Log] | None) -> dict:
    """All of record.json's `measured`. before: runs of the record before, on the same machine."""
    results = [log.named("result") for log in record.logs]
    tuned = {log.named("data", "base_sha256"): mnli_scores(log) for log in record.finetuned}
    mnli = [tuned[result["model_sha256"]] for result in results if result["model_sha256"] in tuned]
    seconds, losses = [result["seconds"] for result in results], [result["val_loss"] for result in results]
    matched = [score["matched"] for score in mnli]
    environment = record.logs[0].named("environment")
    threads = f", {environment['threads']} threads" if "threads" in environment else ""
    measured = {
        "n": len(results),
        "parameters": results[0]["parameters"],
        "hardware": f"{environment['world_size']} x {environment['device']}{threads}",
        "seconds": mean(seconds),
        "seconds_std": spread(seconds),
        "flops": mean([result["flops"] for result in results]),
        "tokens": mean([result["work"]["tokens"] for result in results]),
        "val_loss": mean(losses),
        "val_loss_std": spread(losses),
        "test_loss": mean([result["test_loss"] for result in results if result["test_loss"] is not None]),
        "mnli_matched": mean(matched),
        "mnli_mismatched": mean([score["mismatched"] for score in mnli]),
        "p_target": None,
    }
    if record.finetuned:
        settings = settings_of(record.finetuned[0])
        measured["finetuned_by"] = {name: settings.get(name) for name in FINETUNED_BY}
    scores, better = (losses, "less") if target["metric"] == "val_loss" else (matched, "greater")
    if len(scores) > 1:
        measured["p_target"] = float(ttest_1samp(scores, target["value"], alternative=better).pvalue)
    if before:
        theirs = [log.named("result", "seconds") for log in before]
        measured["speedup"] = mean(theirs) / mean(seconds)
        measured["p_faster"] = float(ttest_ind(seconds, theirs, equal_var=False, alternative="less").pvalue)
    return measured


def paired_logs(record: Record, before: Record | None) -> list[Log] | None:
    return (record.paired or before.logs) if before else None


# ---------------------------------------------------------------------------------------------------------------------
# A record: whether its logs belong together, to its track, and before the record it beats


def check_code(log: Log) -> Iterator[str]:
    """The code that a log keeps is what its headers name by hash, and other logs by the same."""
    ran = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in log.code.items()}
    if not ran:
        yield f"{log.path}: no code in it: the first log of a record keeps its code, as the run wrote it"
    elif different := differing(ran, log.hashes):
        yield f"{log.path}: not the code that ran: {different}"


def settings_of(log: Log, free: Sequence[str] = ()) -> dict:
    """A log's configuration, flat and without what is free."""
    flat = {}
    for name, value in log.named("config").items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in free}


def check_together(logs: Sequence[Log], what: str, free: Sequence[str] = FREE_BETWEEN_RUNS) -> Iterator[str]:
    """Runs to be averaged: one code, one configuration but for `free`, one kind of machine, and no run twice."""
    first = logs[0]
    for log in logs[1:]:
        if different := differing(log.hashes, first.hashes):
            yield f"{log.path}: {what}: other code than {first.path.name} ({different})"
        here, there = log.named("environment"), first.named("environment")
        for name in SAME_EVERYWHERE:
            if here.get(name) != there.get(name):
                yield (
                    f"{at(log, 'environment')}: {what}: {name} is {here.get(name)!r}, "
                    f"in {first.path.name} {there.get(name)!r}"
                )
        if different := differing(settings_of(log, free), settings_of(first, free)):
            yield f"{at(log, 'config')}: {what}: other settings than {first.path.name}: {different}"
    seen: dict[tuple, Log] = {}
    for log in logs:
        losses = tuple(line.train_loss for line in log.lines if line.train_loss is not None)
        if losses in seen:
            yield f"{log.path}: {what}: the same run as {seen[losses].path.name}"
        seen.setdefault(losses, log)


def check_files(record: Record) -> Iterator[str]:
    """Logs and links: those that are named, no others."""
    place, named = record.path / "record.json", record.said.get("logs", [])
    for name in named:
        if not (record.path / name).exists():
            yield f"{place}: {name} is not there"
    if extra := {log.path.relative_to(record.path).as_posix() for log in record.logs} - set(named):
        yield f"{place}: {', '.join(sorted(extra))} is there, but not named"
    size = sum(path.stat().st_size for path in record.path.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        yield f"{record.path}: {size:,} bytes, more than {MOST_BYTES:,}: log every few steps (--train.log_every)"
    for page in record.path.glob("*.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
            for link in re.findall(r"\]\(([^)#\s]+)\)", line):
                if "://" not in link and not (page.parent / link).exists():
                    yield f"{page}:{number}: a link to {link}, which is not there"


def check_declared(record: Record, track: dict) -> Iterator[str]:
    """As many runs as were declared before the first, dated when they ran."""
    place, said, logs = record.path / "record.json", record.said, record.path / "logs"
    started = max(str(log.named("environment", "started")) for log in record.logs)
    if said["date"] != started[:10]:
        yield f"{place}: the date is {said['date']}, the last run started {started}"
    promised = said["declared_runs"]
    for log in record.logs:
        declared = log.named("config", "train", "declared_runs")
        if declared != promised:
            yield f"{at(log, 'config')}: {declared} runs were declared when it started, {promised} in record.json"
    seeds = sorted(log.named("config", "train", "seed") for log in record.logs)
    if seeds != list(range(1, promised + 1)):
        there = ", ".join(map(str, seeds))
        yield f"{logs}: {promised} runs were declared, with seeds from 1; there are those with seeds {there}"
    if len(seeds) < track["min_runs"]:
        yield f"{logs}: {len(seeds)} runs; the track asks for {track['min_runs']}"


def check_track(log: Log, track: dict) -> Iterator[str]:
    """The track's data, validation and hardware."""
    data = track["data"]
    expected = {
        ("data", "hash"): data["hash"],
        ("data", "tokenizer"): data["tokenizer_sha256"],
        ("config", "data", "max_length"): track["max_length"],
    }
    for name in ("tokens", "masked_tokens", "fingerprint"):
        expected["data", "validation", name] = data["validation"][name]
    for keys, value in expected.items():
        if log.named(*keys) != value:
            yield f"{at(log, keys[0])}: {'.'.join(keys)} is {log.named(*keys)!r}, the track's is {value!r}"
    objective = log.named("config", "train").get("objective", "mlm")
    if track["target"]["metric"] == "val_loss" and objective != "mlm":
        yield f"{at(log, 'config')}: the track's target is the val_loss of mlm; that of {objective} is its generator's"
    for name, value in track["hardware"].items():
        found = log.named("environment").get(name)
        if found != value and not (name == "device" and names_device(str(found), value)):
            yield f"{at(log, 'environment')}: {name} is {found!r}, the track's is {value!r}"


def names_device(found: str, device: str) -> bool:
    """Whether a name such as NVIDIA A100-SXM4-80GB is that of an A100; RTX A1000 is not."""
    return re.search(rf"\b{re.escape(device)}\b", found) is not None


def check_finetuned(record: Record, track: dict) -> Iterator[str]:
    """Finetunings are of these runs' models, one of each, by the track's protocol, judged by all of dev-matched."""
    models = [log.named("result", "model_sha256") for log in record.logs]
    started_from = [log.named("data", "base_sha256") for log in record.finetuned]
    if record.finetuned and "finetuning" not in track:
        yield f"{record.path / 'finetuned'}: the track takes no finetunings"
        return
    if track["target"]["metric"] != "val_loss" or record.finetuned:
        for log, model in zip(record.logs, models):
            if (number := started_from.count(model)) != 1:
                yield f"{log.path}: {number} MNLI finetunings of this run: give one of each (--finetuned)"
    for log, base in zip(record.finetuned, started_from):
        if base not in models:
            yield f"{at(log, 'data')}: it started from another model than these runs'"
        yield from check_seal(log)
        asked = track["finetuning"]
        yield from check_protocol(log, asked)
        if (judged_by := log.named("result", "splits", "mnli", "validation_matched")) != asked["validation_matched"]:
            yield (
                f"{at(log, 'result')}: validation_matched is {judged_by}, the track's is {asked['validation_matched']}"
            )
        last = {line.run: line.dev_score for line in log.lines if line.dev_score is not None}
        if abs(100 * statistics.median(last.values()) - mnli_scores(log)["matched"]) > 0.006:
            yield f"{at(log, 'result')}: the result is not the median of the runs' last dev_score"
    if record.finetuned:
        yield from check_together(record.finetuned, "a finetuning of this record", (*FREE_BETWEEN_RUNS, "base_model"))


def check_protocol(log: Log, asked: dict) -> Iterator[str]:
    """The track's settings, and the rate that it has for the optimizer; what it does not name is free."""
    found = settings_of(log)
    expected = {"protocol": asked["protocol"], **asked["settings"], "lr": asked["lr"].get(found["optimizer"])}
    different = [
        f"{name} {found.get(name)} in place of {value}" for name, value in expected.items() if found.get(name) != value
    ]
    if different:
        yield f"{at(log, 'config')}: not the track's finetuning, but with {', '.join(different)}"


def check_claim(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """Target met, and faster than the record before on one machine; record.json says what the logs give."""
    place, said, target = record.path / "record.json", record.said, track["target"]
    measured = measure(record, target, paired_logs(record, before))
    for name in {**measured, **said["measured"]}:
        ours, theirs = measured.get(name), said["measured"].get(name)
        numbers = isinstance(ours, float) and isinstance(theirs, int | float)
        if not (math.isclose(ours, theirs, rel_tol=1e-9) if numbers else ours == theirs):
            yield f"{place}: measured.{name} is {theirs!r}, the logs give {ours!r}"
    p = measured["p_target"]
    if said.get("systems_only"):
        if before is None or not measured["val_loss"] <= target["value"]:
            yield f"{place}: systems_only needs a record before it, and a mean loss that meets the target"
    elif p is None or not p < SIGNIFICANCE:
        yield (
            f"{place}: {target['metric']} does not meet the target {target['value']} "
            f"(p = {p}, asked for: below {SIGNIFICANCE})"
        )
    if before:
        yield from check_faster(record, track, before, measured)


def check_faster(record: Record, track: dict, before: Record, measured: dict) -> Iterator[str]:
    """Than the record before, run by its own code on the same machine."""
    place, beaten, theirs = record.path / "record.json", before.path.name, paired_logs(record, before)
    if record.said.get("beats") != beaten:
        yield f"{place}: beats is {record.said.get('beats')!r}; the record before is {beaten}"
    yield from check_together(theirs, "a run of the record before")
    for log in record.paired:
        yield from check_run(log)
    if theirs[0].hashes != before.logs[0].hashes:
        yield f"{theirs[0].path}: not the code of {beaten}"
    ran, ran_before = (settings_of(log, FREE_BETWEEN_MACHINES) for log in (theirs[0], before.logs[0]))
    if different := differing(ran, ran_before):
        yield f"{at(theirs[0], 'config')}: not the settings of {beaten}: {different}"
    here = record.logs[0].named("environment")
    for log in [*theirs, *record.logs]:
        there = log.named("environment")
        for name in (*SAME_EVERYWHERE, "machine"):
            if there.get(name) != here.get(name):
                yield (
                    f"{at(log, 'environment')}: {name} is {there.get(name)!r}, not {here.get(name)!r}: "
                    "compared runs are made on one machine (paired/)"
                )
    if len(theirs) < track["min_runs"]:
        yield f"{record.path}: {len(theirs)} runs of the record before; the track asks for {track['min_runs']}"
    elif not measured["p_faster"] < SIGNIFICANCE:
        yield (
            f"{place}: not faster than {beaten} ({measured['speedup']:.3f} times, p = {measured['p_faster']:.4f}, "
            f"asked for: below {SIGNIFICANCE})"
        )


def check_record(record: Record, tracks: dict[str, dict], before: Record | None) -> Iterator[str]:
    """before: the track's record up to then, if there was one."""
    place, name = record.path / "record.json", record.said["track"]
    track = tracks.get(name)
    if track is None or record.path.parent.name != name:
        yield f"{place}: track {name!r} is not declared in tracks.json, or not the folder's"
    elif track["target"] is None or track["data"]["hash"] is None:
        yield f"{place}: track {name} is not open yet: {track['why']}"
    elif not record.logs:
        yield f"{record.path / 'logs'}: no logs"
    else:
        yield from check_files(record)
        yield from check_declared(record, track)
        yield from check_code(record.logs[0])
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
        before = earlier[-1] if earlier else None
        return list(dict.fromkeys(check_record(record, read_tracks(path.parents[1]), before)))
    except InputError as error:
        return [str(error)]
    except MALFORMED as error:
        return [f"{path}: a value is missing or of the wrong kind ({error!r})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", metavar="DIR", help="folders of records [all]")
    found = parser.parse_args().records or sorted(path.parent for path in RECORDS.glob("*/*/record.json"))
    problems = [problem for path in found for problem in verify(path)]
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
    print("\n".join(problems) or f"{len(found)} records verified: {names}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
