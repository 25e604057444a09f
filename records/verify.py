"""Recomputes every number of a record from its logs, and checks that the record keeps the rules (records/README.md).

    python records/verify.py                            every record of the repository
    python records/verify.py records/TRACK/DATE_NAME    these alone

Prints what is wrong, one line each with file and line, and exits with 1; or says what it checked, and exits with 0.

A record's folder: record.json (who and what, and `measured`, all that follows from the logs), logs/ (one for each
declared run), finetuned/ (logs of finetuner.py on these runs' models, if the track asks for them; the first log of both
folders keeps the code that ran), paired/ and paired_finetuned/ (those of the record before on this record's machine,
unless its own were made there), README.md and curve.png.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import math
import os
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from scipy.stats import ttest_1samp, ttest_ind

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, read_json
from model import KBERTConfig
from records.log import GENERATOR_AND_DETECTOR, MASKED_LAST_LAYER, WHOLE_LAST_LAYER, Log, Work, read_log

RECORDS = Path(__file__).resolve().parent
SIGNIFICANCE = 0.01  # of both tests: loss below target, time below the record before
MOST_BYTES = 2_000_000  # of a record
MOST_MFU = 1.5  # a CPU's peak is measured, perhaps while something else ran
SAME_EVERYWHERE = ("device", "threads", "torch", "cuda", "driver", "world_size")
FREE_BETWEEN_RUNS = ("seed", "run_name", "out", "hf_model_name", "wandb_project", "resume")
FREE_BETWEEN_MACHINES = (*FREE_BETWEEN_RUNS, "dir", "declared_runs")
FREE_OF_SYSTEMS = (  # what changes no loss, or how the end is given: a systems-only record is shown as many tokens
    *FREE_BETWEEN_MACHINES, "preset", "device", "compile", "deterministic", "timeout_minutes", "hub_minutes",
    "valid_every", "log_every", "save_every", "keep_checkpoints", "save_words", "start_afresh",
    "steps", "max_minutes", "row_tokens", "grad_accum",
    "generator_layers", "detection_weight", "replace_rate",  # of rtd, which no such track takes
)  # fmt: skip
FINETUNED_BY = (  # what a record says of its finetunings
    "protocol", "optimizer", "lr", "weight_decay", "epochs", "batch_size", "lr_schedule", "lr_warmup", "clip",
    "trainable", "pooling", "patience", "max_train_examples", "seeds",
)  # fmt: skip
METRICS = {  # what finetuner.py measures of a run's model: task and split, whose accuracy counts
    "mnli_matched": ("mnli", "validation_matched"),
    "mnli_mismatched": ("mnli", "validation_mismatched"),
    "blimp": ("blimp", "test"),
    "pairs": ("pairs", "validation"),
}
FOLDERS = ("logs", "finetuned", "paired", "paired_finetuned")  # of a record
KEEP_CODE = FOLDERS[:2]
FILES = re.compile(rf"record\.json|README\.md|curve\.png|({'|'.join(FOLDERS)})/\d+\.txt")
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
# What reading a value that is missing, or of another kind than a run writes, may raise
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, SyntaxError)


class Race(NamedTuple):
    """What a track's records are compared by."""

    gain: str  # over the record before, by its name in record.json
    p: str  # of Welch's test, likewise
    better: str
    by: str


RACES = {
    "seconds": Race("speedup", "p_faster", "faster", "times as fast as"),
    "flops": Race("gain", "p_gain", "cheaper", "times as cheap as"),
    "score": Race("gain", "p_gain", "better", "points above"),
}

PAGE = """# {name}

{what}

| runs | parameters | training time | model FLOPs | validation loss | target | p |
|---|---|---|---|---|---|---|
| {n} | {millions:.1f}M | {seconds:.1f} s ± {seconds_std:.1f} | {flops:.3e} | {val_loss:.4f} ± {val_loss_std:.4f} \
| {target} | {p} |

{hardware}, track [{track}](../../README.md). {score}{against}

![Loss against seconds](curve.png)

Logs: {links}. The first holds the code that ran. Command of the first run:

```bash
{command}
```
"""


def read_tracks(root: Path) -> dict[str, dict]:
    return read_json(root / "tracks.json")


def at(log: Log, section: str) -> str:
    return f"{log.path}:{log.at[section]}"


def each(logs: Sequence[Log], *keys: str) -> list:
    """What every log says under these names."""
    return [log.named(*keys) for log in logs]


def differing(ours: dict, theirs: dict, in_both: bool = False) -> str:
    """The names under which two mappings differ. in_both: of those that both have."""
    names = ours.keys() & theirs if in_both else ours.keys() | theirs
    return ", ".join(sorted(name for name in names if ours.get(name) != theirs.get(name)))


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
    result = log.named("result")
    # log_sha256: of logs from before the result was sealed as well
    holds = result["sha256"] == log.sealed if "sha256" in result else result.get("log_sha256") == log.digest
    if not holds:
        yield f"{at(log, 'result')}: its hash does not follow from the lines above and the result: one was changed"
    if log.after:
        yield f"{log.path}:{log.after}: a line after the result, which is a log's last"


def expected_steps(train: dict, last: int) -> tuple[set[int], set[int]]:
    """Steps after which a whole log has a training loss, and a validation loss."""

    def every(steps: int) -> set[int]:
        return set(range(0, last + 1, steps)) if steps else set()

    valid = every(train["valid_every"]) | {last}
    return (valid | every(train["log_every"]) | every(train["save_every"])) - {0}, valid


def check_lines(log: Log) -> Iterator[str]:
    """Every line is there, once, and in order."""
    with_train, with_valid = expected_steps(log.named("config", "train"), log.named("result", "step"))
    for kind, expected in (("train_loss", with_train), ("val_loss", with_valid)):
        found = Counter(line.step for line in log.lines if getattr(line, kind) is not None)
        if missing := sorted(expected - set(found)):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            yield f"{log.path}: no {kind} after step {missing[0]}{others}"
        if extra := sorted(step for step, times in found.items() if times > 1 or step not in expected):
            yield f"{log.path}: a {kind} too many, after step {extra[0]}"
    planned = log.named("config", "train", "max_minutes") is None and math.isinf(most_text(log))
    steps = log.named("config", "train", "steps") if planned else None
    if other := next((line for line in log.lines if line.steps != steps), None):
        said, asked = other.steps or "-", steps or "-"
        yield f"{log.path}:{other.number}: a run of {said} steps, its configuration asks for {asked}"
    unigram = log.named("data", "validation", "unigram_loss")
    start = next((line for line in log.lines if line.step == 0 and line.val_loss is not None), None)
    if start is None:
        yield f"{log.path}: no val_loss before the first step: run it without --train.valid_every 0"
    elif start.val_loss < unigram - 0.1:
        yield f"{log.path}:{start.number}: a loss of {start.val_loss} before any step, below {unigram:.4f} of unigrams"
    growing = ["step", "seconds", "tokens", "flops"] + ["words"] * (log.lines[-1].words is not None)
    for before, line in itertools.pairwise(log.lines):
        for name in growing:
            earlier, later = getattr(before, name), getattr(line, name)
            if earlier is None or later is None or later < earlier:
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
        elif line.mfu > MOST_MFU:
            yield f"{log.path}:{line.number}: mfu is {line.mfu}: no machine does more than its peak"


def step_tokens(log: Log) -> int:
    """Tokens that a step has at most, padding included."""
    train = log.named("config", "train")
    if train["grad_accum"] is None:
        return train["batch_tokens"]
    return train["grad_accum"] * train["row_tokens"] * log.named("environment", "world_size")


def most_text(log: Log) -> float:
    """Tokens of text that --train.epochs and --train.max_words allow, counted as trainer.py does."""
    train = log.named("config", "train")
    epochs, words = train.get("epochs"), train.get("max_words")  # logs from before there were such ends have neither
    most = math.inf if epochs is None else epochs * log.named("data", "text", "tokens")
    return most if words is None else min(most, words / log.named("data", "text", "words_per_token"))


def check_end(log: Log) -> Iterator[str]:
    """It ended as configured, with the numbers of its last line."""
    train, result, end = log.named("config", "train"), log.named("result"), log.lines[-1]
    steps, seconds, text = result["step"], result["seconds"], result["work"].get("text", 0)
    # The clock is read before a step; a machine may stall, and a GPU has steps queued
    minutes, longest_step = train["max_minutes"], max(1.0, 3 * seconds / max(1, steps))
    place, most = at(log, "result"), most_text(log)
    by_clock = minutes is not None and seconds >= 60 * minutes
    by_text = most - step_tokens(log) <= text
    if minutes is None and math.isinf(most) and steps != train["steps"]:
        yield f"{place}: {steps} steps of the {train['steps']} configured"
    if minutes is not None and (seconds > 60 * minutes + longest_step or not (by_clock or by_text)):
        yield f"{place}: it ended after {seconds:.1f} s, not with its {minutes} minutes"
    if text > most or not (math.isinf(most) or by_clock or by_text):
        yield f"{place}: it ended after {text} tokens of text; its epochs and words allow {most:.0f}, less one step"
    said = {  # and how far the line is rounded
        "step": (steps, 0),
        "seconds": (seconds, 6e-4),
        "val_loss": (result["val_loss"], 6e-5),
        "tokens": (result["work"]["tokens"], 0),
        "flops": (result["flops"], 1e-6 * result["flops"]),
    }
    if end.words is not None and "text" in log.named("data"):  # which the first logs with words lack
        said["words"] = (text * log.named("data", "text", "words_per_token"), 0.51)
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

    most_tokens = result["step"] * step_tokens(log)
    rounding = 16 * most_tokens / train["row_tokens"]  # a row's masks are a multiple of 16
    rates = [train[name] for name in (("replace_rate",) if detection else ("mask_rate_start", "mask_rate_end"))]
    longest, window = config["data"]["max_length"], shape.local_attention_window
    bounds = {
        "tokens": (0.5 * most_tokens * min(1.0, train["batch_start"]), most_tokens),
        "global_pairs": (work.tokens, work.tokens * longest),
        "local_pairs": (work.tokens, min(work.global_pairs, work.tokens * (window + 1))),
        "masked": (0.9 * min(rates) * work.tokens - rounding, max(rates) * most_tokens + rounding),
    }
    if "text" in result["work"]:  # every window has two special tokens, and one of text at least
        bounds["text"] = (work.tokens / 3, work.tokens - 2 * work.tokens / longest)
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
    paired_finetuned: list[Log]


def read_record(path: Path) -> Record:
    said = read_json(path / "record.json")
    missing = [key for key in ("track", "name", "date", "contributors", "declared_runs", "measured") if key not in said]
    if missing:
        raise InputError(f"{path / 'record.json'}: no {', '.join(missing)}")
    name, date, contributors = said["name"], said["date"], said["contributors"]
    if not NAME.fullmatch(str(name)) or path.name != f"{date}_{name}":
        raise InputError(f"{path / 'record.json'}: the folder of {name!r} of {date} is not DATE_NAME in small letters")
    check_names(contributors, f"{path / 'record.json'}: contributors")
    return with_logs(path, said)


def check_names(names: object, what: str) -> None:
    if not (isinstance(names, list) and names and all(map(is_plain, names))):
        raise InputError(f"{what} is not a list of names without | < > [ ] and line ends")


def is_plain(text: object) -> bool:
    """Whether it can stand in a table as it is."""
    return isinstance(text, str) and text.strip() != "" and not re.search(r"[|<>\[\]\r\n]", text)


def with_logs(path: Path, said: dict) -> Record:
    for file in (path, *path.rglob("*")):
        if file.is_symlink():
            raise InputError(f"{file}: a link: a record holds its own files")

    def read(folder: str) -> list[Log]:
        return [read_log(log) for log in sorted((path / folder).glob("*.txt"), key=lambda log: (len(log.name), log))]

    return Record(path, said, *map(read, FOLDERS))


def read_records(folder: Path) -> list[Record]:
    """A track's records, each after the one that it beats. Raises InputError where they are no such chain."""
    found = (path.parent for path in folder.glob("*/record.json") if path.parent.suffix != ".tmp")
    records = sorted(map(read_record, found), key=lambda record: record.path.name)
    chain, beaten = [], None
    while following := [record for record in records if record.said.get("beats") == beaten]:
        if len(following) > 1:
            names = " and ".join(record.path.name for record in following)
            said = f"beat {beaten}" if beaten else "say of no record that they beat it"
            raise InputError(f"{folder}: {names} {said}: run the later against the other, and submit it again")
        chain += following
        beaten = following[0].path.name
    if lost := {record.path.name for record in records} - {record.path.name for record in chain}:
        raise InputError(f"{folder}: {', '.join(sorted(lost))} beats a record that is not there")
    return chain


def accuracy(log: Log, metric: str) -> float:
    """In percent, the median over a finetuning's seeds; for BLiMP the mean over paradigms."""
    task, split = METRICS[metric]
    return 100 * log.named("result", "results", task, "pretrained", split, "accuracy", "median")


def judged(logs: Sequence[Log], finetuned: Sequence[Log], metric: str) -> list[float]:
    """Accuracy of each run's model that was judged by it."""
    task, split = METRICS[metric]
    found = [log for log in finetuned if split in log.named("result", "results").get(task, {}).get("pretrained", {})]
    scores = {log.named("data", "base_sha256"): accuracy(log, metric) for log in found}
    return [scores[model] for model in each(logs, "result", "model_sha256") if model in scores]


def raced(logs: Sequence[Log], finetuned: Sequence[Log], track: dict) -> list[float]:
    """What the track's records are compared by, of each run."""
    if track["race"] == "score":
        return judged(logs, finetuned, track["target"]["metric"])
    return each(logs, "result", track["race"])


def seconds_in_all(logs: Sequence[Log], finetuned: Sequence[Log]) -> list[float]:
    """Of each run, pretraining and finetuning together, by both logs' clocks; a finetuning counts all that it ran."""
    tuning = {log.named("data", "base_sha256"): seconds_of(log) for log in finetuned}
    return [seconds_of(log) + tuning.get(log.named("result", "model_sha256"), 0.0) for log in logs]


def seconds_of(log: Log) -> float:
    """By its clock, which every run of a finetuning starts anew."""
    last = {line.run: line.seconds for line in log.lines}
    return sum(last.values()) if log.finetuning else log.named("result", "seconds")


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measure(record: Record, track: dict, before: Record | None) -> dict:
    """All of record.json's `measured`. before: the record before."""
    target = track["target"]
    seconds, losses = each(record.logs, "result", "seconds"), each(record.logs, "result", "val_loss")
    test_losses = each(record.logs, "result", "test_loss")
    scores = {metric: judged(record.logs, record.finetuned, metric) for metric in METRICS}
    environment = record.logs[0].named("environment")
    threads = f", {environment['threads']} threads" if "threads" in environment else ""
    measured = {
        "n": len(record.logs),
        "parameters": record.logs[0].named("result", "parameters"),
        "hardware": f"{environment['world_size']} x {environment['device']}{threads}",
        "seconds": mean(seconds),
        "seconds_std": spread(seconds),
        "flops": mean(each(record.logs, "result", "flops")),
        "tokens": mean(each(record.logs, "result", "work", "tokens")),
        "val_loss": mean(losses),
        "val_loss_std": spread(losses),
        "test_loss": mean([loss for loss in test_losses if loss is not None]),
        **{metric: mean(values) for metric, values in scores.items()},
        "p_target": None,
    }
    if any(line.train_loss for log in record.finetuned for line in log.lines):
        settings = settings_of(record.finetuned[0])
        measured["finetuned_by"] = {name: settings.get(name) for name in FINETUNED_BY}
    by, better = (losses, "less") if target["metric"] == "val_loss" else (scores[target["metric"]], "greater")
    if len(by) > 1:
        measured["p_target"] = float(ttest_1samp(by, target["value"], alternative=better).pvalue)
    if "minutes" in track.get("limits", {}):
        measured["seconds_in_all"] = mean(seconds_in_all(record.logs, record.finetuned))
    if before:
        ours, theirs = raced(record.logs, record.finetuned, track), raced(*rivals(record, before, track), track)
        if record.paired and track["race"] == "seconds":
            theirs = [value * slowdown(log, before) for value, log in zip(theirs, record.paired)]
        race, by_score = RACES[track["race"]], track["race"] == "score"
        measured[race.gain] = mean(ours) - mean(theirs) if by_score else mean(theirs) / mean(ours)
        better = "greater" if by_score else "less"
        measured[race.p] = float(ttest_ind(ours, theirs, equal_var=False, alternative=better).pvalue)
    return measured


def slowdown(log: Log, before: Record) -> float:
    """Of a paired run that the clock ended: as many steps as the record before made take this times its seconds."""
    if log.named("config", "train", "max_minutes") is None:
        return 1.0
    return mean(each(before.logs, "result", "step")) / log.named("result", "step")


def rivals(record: Record, before: Record, track: dict) -> tuple[list[Log], list[Log]]:
    """Runs of the record before to compare with, and their finetunings: those made on this record's machine, if any.

    FLOPs are the same everywhere, but for a run by the clock, which has more of them on a faster machine.
    """
    again = record.paired and track["race"] != "flops"
    return (record.paired, record.paired_finetuned) if again else (before.logs, before.finetuned)


# ---------------------------------------------------------------------------------------------------------------------
# A record: whether its logs belong together, to its track, and before the record it beats


def check_code(log: Log) -> Iterator[str]:
    """The code that a log keeps is what its headers name by hash, and other logs by the same."""
    ran = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in log.code.items()}
    if not ran:
        yield f"{log.path}: no code in it: the first log of a record keeps its code, as the run wrote it"
    elif different := differing(ran, log.hashes):
        yield f"{log.path}: not the code that ran: {different}"
    elif lacking := lacking_code(log):
        said = f"it lacks {', '.join(lacking)}, which its command or its other modules name"
        yield f"{log.path}: {said}: add that to the program's MODULES before a run"


def imports(text: str) -> Iterator[str]:
    """Names of modules, with dots, that a module imports when it is imported, and of what it takes from them."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def lacking_code(log: Log) -> list[str]:
    """The program, and what kept modules import from this repository, as far as the log does not keep it."""
    named = {f"{name.replace('.', '/')}.py" for text in log.code.values() for name in imports(text)}
    named = {name for name in named if (RECORDS.parent / name).exists()} | {program_of(log)}
    if "recipe" in log.named("config"):  # the first baselines' logs, whose trainer.py does not use it there
        named.discard("optimizer.py")
    return sorted(named - log.code.keys())


def program_of(log: Log) -> str:
    """What its command runs."""
    return shlex.split(str(log.named("command")))[0]


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
        if different := differing(settings_of(log, free), settings_of(first, free)):
            yield f"{at(log, 'config')}: {what}: other settings than {first.path.name}: {different}"
        if program_of(log) != program_of(first):
            yield f"{at(log, 'command')}: {what}: {program_of(log)} ran, in {first.path.name} {program_of(first)}"
    yield from check_environment(logs, SAME_EVERYWHERE, what)
    for one, log in itertools.combinations(logs, 2):
        if repeats(log, one, "train_loss"):
            yield f"{log.path}: {what}: the same run as {one.path.name}"


def check_environment(logs: Sequence[Log], names: Sequence[str], what: str) -> Iterator[str]:
    """By these names, it is that of the first log."""
    for log, name in itertools.product(logs, names):
        ours, theirs = (one.named("environment").get(name) for one in (log, logs[0]))
        if ours != theirs:
            yield f"{at(log, 'environment')}: {what}: {name} is {ours!r}, in {logs[0].path} {theirs!r}"


def repeats(log: Log, other: Log, name: str, least: int = 1) -> bool:
    """Whether another log has most of its losses, or times, after the same steps; least: how many there must be.

    Of a finetuning the first run counts: those from random weights are the same whatever the model.
    """

    def said(log: Log) -> set[tuple]:
        lines = [line for line in log.lines if line.step and line.run in (None, 1)]
        return {(line.step, getattr(line, name)) for line in lines if getattr(line, name) is not None}

    ours = said(log)
    return len(ours & said(other)) > max(least, len(ours)) / 2


def check_files(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """Files, logs and links: those that are named, no others."""
    place, named = record.path / "record.json", record.said.get("logs", [])
    there = {log.path.relative_to(record.path).as_posix() for log in record.logs}
    for name in sorted(set(named) - there):
        yield f"{place}: {name} is not there"
    if extra := there - set(named):
        yield f"{place}: {', '.join(sorted(extra))} is there, but not named"
    files = {path.relative_to(record.path).as_posix(): path for path in record.path.rglob("*") if not path.is_dir()}
    if others := sorted(name for name in files if not FILES.fullmatch(name)):
        yield f"{record.path}: {', '.join(others)}: not a file of a record"
    if record.paired and before is None:
        yield f"{record.path / 'paired'}: runs of a record before, but this one beats none"
    if record.paired_finetuned and not (record.paired and track["race"] == "score"):
        yield f"{record.path / 'paired_finetuned'}: finetunings of no runs whose score is compared"
    size = sum(path.stat().st_size for path in files.values())
    if size > MOST_BYTES:
        yield f"{record.path}: {size:,} bytes, more than {MOST_BYTES:,}: log every few steps (--train.log_every)"
    for page in record.path.glob("*.md"):
        for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
            for link in re.findall(r"\]\(([^)#\s]+)", line):
                if not re.match(r"\w+:", link) and not (page.parent / link).exists():
                    yield f"{page}:{number}: a link to {link}, which is not there"


def check_declared(record: Record, track: dict) -> Iterator[str]:
    """As many runs as were declared before the first, dated when they ran."""
    place, said, logs = record.path / "record.json", record.said, record.path / "logs"
    started = max(map(str, each(record.logs, "environment", "started")))
    if said["date"] != started[:10]:
        yield f"{place}: the date is {said['date']}, the last run started {started}"
    if started[:10] > datetime.now(UTC).date().isoformat():
        yield f"{place}: the last run started {started}, which is yet to come"
    promised = said["declared_runs"]
    for log in record.logs:
        declared = log.named("config", "train", "declared_runs")
        if declared is None:
            yield f"{at(log, 'config')}: no number of runs was declared: run them all with --train.declared_runs"
        elif declared != promised:
            yield f"{at(log, 'config')}: {declared} runs were declared when it started, {promised} in record.json"
    seeds = sorted(each(record.logs, "config", "train", "seed"))
    if len(seeds) != promised or seeds != list(range(1, len(seeds) + 1)):
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
    if "text" in data:  # what the limits are counted by
        expected["data", "text"] = data["text"]
    for keys, value in expected.items():
        if log.named(*keys) != value:
            yield f"{at(log, keys[0])}: {'.'.join(keys)} is {log.named(*keys)!r}, the track's is {value!r}"
    # Of the training text: the hash names shards, not which of them are trained on
    if asked := data["validation"].get("unigram_loss"):
        found = log.named("data", "validation", "unigram_loss")
        if not math.isclose(found, asked, rel_tol=1e-9):
            yield f"{at(log, 'data')}: data.validation.unigram_loss is {found!r}, the track's is {asked!r}"
    if log.named("config", "data").get("verify") is False:
        yield f"{at(log, 'config')}: --data.verify false: nobody looked whether the shards are those of the hash"
    objective = log.named("config", "train").get("objective", "mlm")
    if track["target"]["metric"] == "val_loss" and objective != "mlm":
        yield f"{at(log, 'config')}: the track's target is the val_loss of mlm; that of {objective} is its generator's"
    if track["target"]["metric"] == "blimp" and objective != "mlm":
        yield f"{at(log, 'config')}: the track's target is the BLiMP score of a masked LM; {objective} makes none"
    if not is_plain(device := log.named("environment", "device")):
        yield f"{at(log, 'environment')}: device is {device!r}, which has | < > [ ] or line ends, as no table can"
    for name, value in track["hardware"].items():
        found = log.named("environment").get(name)
        if found != value and not (name == "device" and names_device(str(found), value)):
            yield f"{at(log, 'environment')}: {name} is {found!r}, the track's is {value!r}"


def names_device(found: str, device: str) -> bool:
    """Whether a name such as NVIDIA A100-SXM4-80GB is that of an A100; RTX A1000 is not."""
    return re.search(rf"\b{re.escape(device)}\b", found) is not None


def check_limits(record: Record, track: dict) -> Iterator[str]:
    """No run was shown more text, or took more time on its machine, than the track allows."""
    limits = track.get("limits", {})
    if "minutes" in limits:
        yield from check_machine([*record.logs, *record.finetuned])
    for log, seconds in zip(record.logs, seconds_in_all(record.logs, record.finetuned)):
        spent = {"minutes": seconds / 60}
        if "text" in track["data"]:
            text, epoch = log.named("result", "work", "text"), log.named("data", "text")
            spent |= {"epochs": text / epoch["tokens"], "words": text * epoch["words_per_token"]}
        for name, most in limits.items():
            if spent[name] > most:
                yield f"{at(log, 'result')}: {spent[name]:.6g} {name}, the track allows {most:.6g}"


def check_finetuned(logs: Sequence[Log], finetuned: Sequence[Log], track: dict) -> Iterator[str]:
    """Finetunings, or judgements without training, are of these runs' models, one of each, as the track asks."""
    models, started_from = each(logs, "result", "model_sha256"), each(finetuned, "data", "base_sha256")
    if "judged_by" not in track:
        if finetuned:
            yield f"{finetuned[0].path.parent}: the track takes no finetunings"
        return
    task, _ = METRICS[track["target"]["metric"]]
    if len(set(models)) < len(models):
        yield f"{logs[0].path.parent}: two of these runs have one model_sha256: each is judged by its own model"
    for log, model in zip(logs, models):
        if (number := started_from.count(model)) != 1:
            yield f"{log.path}: {number} runs of finetuner.py --task {task} on its model: give one (--finetuned)"
    for log, base in zip(finetuned, started_from):
        if base not in models:
            yield f"{at(log, 'data')}: it started from another model than these runs'"
        yield from check_seal(log)
        yield from check_judged_by(log, track)
        yield from check_tuning(log, task)
    if finetuned:
        yield from check_together(finetuned, "a finetuning", (*FREE_BETWEEN_RUNS, "base_model"))


def check_tuning(log: Log, task: str) -> Iterator[str]:
    """Every run of a finetuning is there, and of each every line, in order, up to its last step."""
    settings = settings_of(log)
    examples = log.named("result", "splits", task).get("train", {}).get("examples", 0)  # none: judged as it is
    steps = max(1, round(settings["epochs"] * -(-examples // settings["batch_size"])))
    runs, asked = {line.run for line in log.lines}, settings["seeds"] * (1 + settings["compare_random"])
    if examples and (runs != set(range(1, len(runs) + 1)) or len(runs) != asked):
        yield f"{log.path}: there are the runs {', '.join(map(str, sorted(runs)))}; its seeds ask for {asked}"
    for run, lines in itertools.groupby(log.lines, lambda line: line.run):
        lines = list(lines)
        for before, line in itertools.pairwise(lines):
            if line.step < before.step or line.seconds < before.seconds:
                yield f"{log.path}:{line.number}: step or train_time does not grow"
        if not examples:
            continue
        last, found = lines[-1].step, {line.step for line in lines if line.train_loss is not None}
        if last != steps:
            yield f"{log.path}:{lines[-1].number}: run {run} ended after {last} steps of {steps}"
        if (scored := [line.step for line in lines if line.dev_score is not None][-1:]) != [steps]:
            yield f"{log.path}: run {run} has its last dev_score after step {scored}, not after its last, {steps}"
        if missing := sorted({*range(settings["log_every"], last + 1, settings["log_every"]), last} - found):
            yield f"{log.path}: no train_loss after step {missing[0]} of run {run}"


def check_tuning_code(record: Record) -> Iterator[str]:
    """The finetuning's code is kept; modules that the runs also used are the same."""
    for log in record.finetuned[:1]:
        yield from check_code(log)
        if different := differing(log.hashes, record.logs[0].hashes, in_both=True):
            yield f"{log.path}: other code than {record.logs[0].path.name} of logs/ ({different})"


def check_judged_by(log: Log, track: dict) -> Iterator[str]:
    """The track's settings and, of each optimizer, its rate; its examples; the result is that of the lines."""
    metric, asked, found = track["target"]["metric"], track["judged_by"], settings_of(log)
    expected = dict(asked["settings"])
    if "lr" in asked:
        expected["lr"] = asked["lr"].get(found["optimizer"])
    different = [
        f"{name} {found.get(name)} in place of {value}" for name, value in expected.items() if found.get(name) != value
    ]
    if different:
        yield f"{at(log, 'config')}: not the track's finetuning, but with {', '.join(different)}"
    for split, examples in asked["splits"].items():
        if (judged_by := log.named("result", "splits", METRICS[metric][0], split)) != examples:
            yield f"{at(log, 'result')}: {split} is {judged_by}, the track's is {examples}"
    starts = 2 if found["compare_random"] else 1  # of which the second is from random weights
    last = {line.run: line.dev_score for line in log.lines if line.dev_score is not None}
    scores = [score for run, score in last.items() if (run - 1) % starts == 0]
    if not scores or abs(100 * statistics.median(scores) - accuracy(log, metric)) > 0.006:
        yield f"{at(log, 'result')}: the result is not the median of the runs' last dev_score"


def check_claim(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """Target met, and better than the record before; record.json says what the logs give."""
    place, said, target = record.path / "record.json", record.said, track["target"]
    measured = measure(record, track, before)
    for name in {**measured, **said["measured"]}:
        ours, theirs = measured.get(name), said["measured"].get(name)
        numbers = isinstance(ours, float) and isinstance(theirs, int | float)
        if not (math.isclose(ours, theirs, rel_tol=1e-9) if numbers else ours == theirs):
            yield f"{place}: measured.{name} is {theirs!r}, the logs give {ours!r}"
    p = measured["p_target"]
    if said.get("systems_only"):
        met = target["metric"] == "val_loss" and measured["val_loss"] <= target["value"]
        if before is None or track["race"] != "seconds" or not met:
            yield f"{place}: systems_only needs a record to be faster than, and a mean loss that meets the target"
        else:
            yield from check_systems_only(record, before)
    elif p is None or not p < SIGNIFICANCE:
        yield (
            f"{place}: {target['metric']} does not meet the target {target['value']} "
            f"(p = {p}, asked for: below {SIGNIFICANCE})"
        )
    if before:
        yield from check_better(record, track, before, measured)


def check_systems_only(record: Record, before: Record) -> Iterator[str]:
    """The same mathematics: the settings of the record before, as far as its code has them, and as much shown."""
    ours, theirs = (settings_of(logs[0], FREE_OF_SYSTEMS) for logs in (record.logs, before.logs))
    if different := differing(ours, theirs, in_both=True):
        yield f"{at(record.logs[0], 'config')}: systems_only, but other settings than {before.path.name}: {different}"
    tokens, asked = (mean(each(one.logs, "result", "work", "tokens")) for one in (record, before))
    steps, in_steps = (mean(each(one.logs, "result", "step")) for one in (record, before))
    if tokens < 0.99 * asked or not math.isclose(tokens / steps, asked / in_steps, rel_tol=0.01):
        shown, before_it = f"{tokens:.0f} tokens in {steps:.0f} steps", f"{asked:.0f} in {in_steps:.0f}"
        yield f"{record.path}: systems_only, but shown {shown}, {before.path.name} {before_it}"


def check_better(record: Record, track: dict, before: Record, measured: dict) -> Iterator[str]:
    """Better than the record before, run with its own code and, unless raced by FLOPs, on the same machine."""
    place, beaten = record.path / "record.json", before.path.name
    theirs, their_finetuned = rivals(record, before, track)
    yield from check_together(theirs, "a run of the record before")
    yield from check_paired(record, track, before)
    if theirs[0].hashes != before.logs[0].hashes:
        yield f"{theirs[0].path}: not the code of {beaten}"
    ran, ran_before = (settings_of(log, FREE_BETWEEN_MACHINES) for log in (theirs[0], before.logs[0]))
    if different := differing(ran, ran_before):
        yield f"{at(theirs[0], 'config')}: not the settings of {beaten}: {different}"
    finetuned = [*their_finetuned, *record.finetuned] if track["race"] == "score" else []
    if track["race"] != "flops":
        yield from check_machine([*record.logs, *theirs, *finetuned])
    race = RACES[track["race"]]
    if len(theirs) < track["min_runs"]:
        yield f"{record.path}: {len(theirs)} runs of the record before; the track asks for {track['min_runs']}"
    elif not measured[race.p] < SIGNIFICANCE:
        gained = f"{measured[race.gain]:.3f} {race.by} it, p = {measured[race.p]:.4f}"
        yield f"{place}: not {race.better} than {beaten} ({gained}, asked for: below {SIGNIFICANCE})"


def check_paired(record: Record, track: dict, before: Record) -> Iterator[str]:
    """Whole runs on the track's data, as many as the record's own, compiled where the record before was."""
    compiled = before.logs[0].named("environment").get("compiled")
    for log, other in itertools.product(record.paired, before.logs):
        if repeats(log, other, "seconds", least=4):  # a few may agree by chance
            yield f"{log.path}: a copy of {other.path}: run the record before again, or leave its runs out (--paired)"
    for log in record.paired:
        yield from check_run(log)
        yield from check_track(log, track)
        if (found := log.named("environment").get("compiled")) != compiled:
            yield f"{at(log, 'environment')}: compiled is {found}, that of {before.path.name} {compiled}"
    seeds = sorted(each(record.paired, "config", "train", "seed"))
    if seeds and (seeds != list(range(1, len(seeds) + 1)) or len(seeds) < len(record.logs)):
        there, asked = ", ".join(map(str, seeds)), len(record.logs)
        yield f"{record.path / 'paired'}: runs with seeds {there}; asked for: at least {asked}, with seeds from 1"


def check_paired_finetuned(record: Record, track: dict, before: Record) -> Iterator[str]:
    """The record before, finetuned again as it was."""
    yield from check_finetuned(record.paired, record.paired_finetuned, track)
    free = (*FREE_BETWEEN_MACHINES, "base_model", "dataset")
    for log, other in zip(record.paired_finetuned, before.finetuned):
        if log.hashes != other.hashes or settings_of(log, free) != settings_of(other, free):
            yield f"{log.path}: not the code, or not the settings, of the finetunings of {before.path.name}"


def check_machine(logs: Sequence[Log]) -> Iterator[str]:
    what = "timed or compared runs are made on one machine (paired/)"
    yield from check_environment(logs, (*SAME_EVERYWHERE, "machine"), what)
    every = [log.named("environment").get("variables") for log in logs]  # which older logs do not have
    ours = next((variables for variables in every if variables is not None), None)
    for log in logs:
        theirs = log.named("environment").get("variables")
        if None not in (ours, theirs) and ours != theirs:
            yield f"{at(log, 'environment')}: the environment variables are {theirs}, not {ours}: run all in one shell"
    yield from check_apart(logs)


def check_apart(logs: Sequence[Log]) -> Iterator[str]:
    """Runs that are timed are made one after the other: beside each other, they slow each other down."""

    def start(log: Log) -> float:
        return datetime.fromisoformat(log.named("environment", "started")).timestamp()

    runs = {log.digest: log for log in logs}.values()  # two records may share the runs that they finetune
    for one, following in itertools.pairwise(sorted(runs, key=start)):
        beside = start(one) + seconds_of(one) - start(following)
        if beside > 1:  # starts are whole seconds
            yield f"{following.path}: began {beside:.0f} s before {one.path} had ended: run one after the other"


def refusal(track: dict, date: str) -> str | None:
    """Why a track takes no record of that day, None where it takes one."""
    if "closed" in track and date >= track["closed"]["on"]:
        return f"is closed since {track['closed']['on']}: {track['closed']['why']}"
    splits = track.get("judged_by", {}).get("splits", {})
    known = [track["target"], *track["data"].values(), *(split["fingerprint"] for split in splits.values())]
    return f"is not open yet: {track['why']}" if None in known else None


def page(record: Record, track: dict, before: Record | None) -> str:
    """README.md, as it is written."""
    said, measured = record.said, record.said["measured"]
    metric, against = track["target"]["metric"], "The first of its track."
    if before:
        link = f"[{before.said['name']}](../{before.path.name})"
        race, where = RACES[track["race"]], "" if track["race"] == "flops" else " on the same machine"
        test = f"(Welch's t-test, p = {measured[race.p]:.1e})"
        against = f"{measured[race.gain]:.2f} {race.by} {link}{where} {test}."
    in_all = ""
    if "seconds_in_all" in measured:
        in_all = f", after {measured['seconds_in_all'] / 60:.1f} minutes with the finetuning"
    return PAGE.format(
        **said,
        **measured,
        millions=measured["parameters"] / 1e6,
        against=against,
        command=record.logs[0].sections["command"].strip(),
        target=f"{metric} {track['target']['value']}",
        score="" if metric == "val_loss" else f"Score ({metric}): {measured[metric]:.2f}{in_all}. ",
        p="waived" if said.get("systems_only") else f"{measured['p_target']:.1e}",
        links=", ".join(f"[{number}]({name})" for number, name in enumerate(said["logs"], 1)),
    )


def check_page(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """README.md may say more than was written, not other than that."""
    place = record.path / "README.md"
    found = place.read_text(encoding="utf-8").split("\n") if place.exists() else []
    if missing := [line for line in page(record, track, before).split("\n") if line not in found]:
        yield f"{place}: lacks the line {missing[0]!r}, which record.json and the logs give"


def check_record(record: Record, tracks: dict[str, dict], before: Record | None) -> Iterator[str]:
    """before: the track's record up to then, if there was one."""
    place, name = record.path / "record.json", record.said["track"]
    track = tracks.get(name)
    if track is None or record.path.parent.name != name:
        yield f"{place}: track {name!r} is not declared in tracks.json, or not the folder's"
    elif why := refusal(track, record.said["date"]):
        yield f"{place}: track {name} {why}"
    elif not record.logs:
        yield f"{record.path / 'logs'}: no logs"
    else:
        yield from check_files(record, track, before)
        yield from (lacking := list(check_complete(record, track, before)))
        yield from check_code(record.logs[0])
        yield from check_tuning_code(record)
        for log in record.logs:
            yield from check_run(log)
            yield from check_track(log, track)
        yield from check_together(record.logs, "a run of this record")
        yield from check_limits(record, track)
        if track["race"] != "flops":
            yield from check_apart(record.logs)
        if not lacking:
            yield from check_claim(record, track, before)
            yield from check_page(record, track, before)


def check_complete(record: Record, track: dict, before: Record | None) -> Iterator[str]:
    """All is there that `measure` counts."""
    yield from check_declared(record, track)
    yield from check_finetuned(record.logs, record.finetuned, track)
    if before and record.paired and track["race"] == "score":
        yield from check_paired_finetuned(record, track, before)


def verify(path: Path) -> list[str]:
    """What is wrong with a record, of an absolute path: RECORDS/TRACK/DATE_NAME, whatever links say."""
    try:
        record, tracks = read_record(path), read_tracks(path.parents[1])
        others = read_records(path.parent) if path.parent.name in tracks else []
        before = next((other for other in others if other.path.name == record.said.get("beats")), None)
        return list(dict.fromkeys(check_record(record, tracks, before)))
    except (InputError, OSError) as error:
        return [str(error)]
    except MALFORMED as error:
        return [f"{path}: a value is missing or of the wrong kind ({error!r})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=os.path.abspath, nargs="*", metavar="DIR", help="folders of records [all]")
    found = [Path(path) for path in parser.parse_args().records]
    everything = {path.parent for path in RECORDS.glob("*/*/record.json")} | {*RECORDS.glob("*/2*")}
    found = found or sorted(path for path in everything if path.is_dir() and path.suffix != ".tmp")
    problems = [problem for path in found for problem in verify(path)]
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
    print("\n".join(problems) or f"{len(found)} records verified: {names}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
