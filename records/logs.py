"""Reads the logs of trainer.py, finetuner.py and records/baseline/: whole, or without the code they repeat."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from dataloading import InputError
from trainer import CODE_HEADER, LOG_LINE, split_code

JSON_SECTIONS = ("config", "environment", "data", "result")


@dataclass
class Line:
    """One line of numbers; what it does not say is None."""

    number: int  # in the log without code
    step: int
    seconds: float
    train_loss: float | None = None
    val_loss: float | None = None
    dev_score: float | None = None
    step_avg: float | None = None  # seconds
    tokens: int | None = None
    flops: float | None = None
    mfu: float | None = None
    lr: float | None = None
    run: int | None = None  # of a finetuning with several


@dataclass
class Log:
    path: Path
    text: str  # without code
    code: dict[str, str]  # module -> text; empty when the log has been stripped
    hashes: dict[str, str] = field(default_factory=dict)  # module -> sha256
    sections: dict[str, object] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)  # section -> number of its line
    lines: list[Line] = field(default_factory=list)
    digest: str = ""  # of what stands before the result

    @property
    def finetuning(self) -> bool:
        return any(line.run is not None for line in self.lines)

    def named(self, *keys: str) -> object:
        """A value of the log's JSON: named("data", "validation", "tokens"). InputError when it is not there."""
        value: object = self.sections
        for depth, key in enumerate(keys):
            if not isinstance(value, dict) or key not in value:
                raise InputError(
                    f"{self.path}: no {'.'.join(keys[: depth + 1])}: this is not the log of a finished run of this version"
                )
            value = value[key]
        return value


def _number(name: str, text: str) -> float | int:
    if name in ("step", "tokens", "run"):
        return int(text)
    return float(text) / (1000 if name in ("train_time", "step_avg") else 1)


def read_log(path: Path) -> Log:
    """path: a log, or the folder of a run. Raises InputError with file and line for what is not a log's."""
    path = path / "log.txt" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path} is not there: give the folder of a run, such as logs/RUN")
    text, code = split_code(path.read_text(encoding="utf-8"))
    log = Log(path, text, code)
    title, lines = None, text.split("\n")
    for number, line in enumerate(lines, 1):
        if match := re.fullmatch(r"=== (.+)", line):
            title = match[1]
            if title in JSON_SECTIONS and title in log.sections:  # a finetuning that was resumed opens its log again
                log.sections["resumed"], log.at["resumed"] = "", number
            log.sections.setdefault(title, "")
            log.at[title] = number
            if title == "result":
                log.digest = hashlib.sha256("\n".join([*lines[: number - 1], ""]).encode()).hexdigest()
        elif header := CODE_HEADER.match(line):
            log.hashes[header["name"]] = header["sha256"]
        elif line.startswith(("step:", "task:")):
            if not (match := LOG_LINE.match(line)):
                raise InputError(f"{path}:{number}: not a line of a log: {line[:80]!r}")
            said = {
                name: _number(name, value)
                for name, value in match.groupdict().items()
                if value is not None and name in (*Line.__dataclass_fields__, "train_time")
            }
            log.lines.append(Line(number, seconds=said.pop("train_time"), **said))
        elif title in JSON_SECTIONS and line:
            try:
                log.sections[title] = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: section {title!r} is not JSON ({error})") from error
        elif title is not None and line and isinstance(log.sections[title], str):
            log.sections[title] += line + "\n"
    if not log.lines:
        raise InputError(f"{path} has no line of a run: give a log of trainer.py or finetuner.py")
    return log
