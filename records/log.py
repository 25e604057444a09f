"""The log of a run, written and read: its sections, its lines, the clock and the counted work they speak of.

A log opens with sections (`=== command`, config, environment, data, code), continues with lines of numbers, and closes
with a result that carries a hash of everything before it. trainer.py, finetuner.py and records/baseline/ write
logs; verify.py, leaderboard.py and plot.py read them. This file imports none of these.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch
from tqdm import tqdm

from dataloading import InputError

if TYPE_CHECKING:
    from model import KBERTConfig

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# What is counted: seconds of training, and the work that model FLOPs follow from


class Clock:
    """Seconds of training: it stands still while the run validates, saves and writes."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.started = device, 0.0, None

    def start(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds, self.started = self.now(), None

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)


# How FLOPs are counted, by the name that a log gives: another way to count gets another name, and old logs stay valid.
MASKED_LAST_LAYER = "masked-last-layer"  # after its attention, the last layer computes masked positions alone
WHOLE_LAST_LAYER = "whole-last-layer"
GENERATOR_AND_DETECTOR = "generator-and-detector"  # a masked LM of generator_layers, and a head of d x d on every token


@dataclass
class Work:
    """What FLOPs follow from, summed over all ranks: a log gives these sums, so that anyone can check its FLOPs."""

    tokens: int = 0  # real ones: padding is not work
    global_pairs: int = 0  # pairs of tokens that see each other in a global layer
    local_pairs: int = 0  # and in a local layer
    masked: int = 0  # positions predicted
    text: int = 0  # tokens without [CLS] and [SEP]

    def add(self, lengths: np.ndarray, masked: int, window: int) -> None:
        """One forward over documents of these lengths [documents], with a local window of so many tokens."""
        lengths, side = lengths.astype(np.int64), window // 2
        inside = lengths * (2 * side + 1) - side * (side + 1)
        self.tokens += int(lengths.sum())
        self.text += int(lengths.sum()) - 2 * len(lengths)
        self.global_pairs += int((lengths**2).sum())
        self.local_pairs += int(np.where(lengths > side, inside, lengths**2).sum())
        self.masked += masked

    def training_flops(self, config: KBERTConfig, counted_by: str, generator_layers: int | None = None) -> float:
        """Those of matrix products, forward and backward; the backward costs twice the forward."""
        d, f = config.hidden_size, config.intermediate_size
        layers = self.layer_flops(config, config.num_hidden_layers)
        head = 2 * self.masked * d * config.vocab_size
        left_out = 2 * (self.tokens - self.masked) * (d * d + 3 * d * f)  # by a last layer of masked positions alone
        if counted_by == WHOLE_LAST_LAYER:
            return 3.0 * (layers + head)
        if counted_by == MASKED_LAST_LAYER:
            return 3.0 * (layers + head - left_out)
        generator = self.layer_flops(config, generator_layers) + head - left_out
        return 3.0 * (generator + layers + 2 * self.tokens * d * (d + 1))

    def layer_flops(self, config: KBERTConfig, layers: int) -> float:
        """Of the forward through so many layers."""
        d, f = config.hidden_size, config.intermediate_size
        global_layers = sum(config.is_global(layer) for layer in range(layers))
        matrices = 2 * self.tokens * layers * (4 * d * d + 3 * d * f)
        return matrices + 4 * d * (global_layers * self.global_pairs + (layers - global_layers) * self.local_pairs)


# Dense bf16 FLOP/s of the data sheets, the first name that fits
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s: the data sheet's where we know it, else what a large product reaches here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(known, None) or measured_flops(device)


def measured_flops(device: torch.device) -> float:
    """The best of three; on a GPU ten products each, so that waiting for it hardly counts."""
    size, products = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, seconds = torch.randn(size, size, device=device, dtype=torch.bfloat16), []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(products):
            product = a @ a
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return products * 2 * size**3 / min(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Writing: one format, one regular expression

LOG_LINE = re.compile(
    r"^(?:task:(?P<task>\w+) run:(?P<run>\d+)/(?P<runs>\d+) )?"  # of finetuner.py
    r"step:(?P<step>\d+)/(?P<steps>\d+|-)"  # "-": a run by the clock has no planned number of steps
    r"(?: epoch:(?P<epoch>\d+\.\d+))?"
    r"(?: train_loss:(?P<train_loss>\d+\.\d+))?(?: lr:(?P<lr>\d\.\d+e[+-]\d+))?"
    r"(?: val_loss:(?P<val_loss>\d+\.\d+))?"
    r"(?: val_accuracy:(?P<val_accuracy>\d\.\d+) val_f1:(?P<val_f1>\d\.\d+) val_auc:(?P<val_auc>\d\.\d+))?"
    r"(?: dev_score:(?P<dev_score>-?\d+\.\d+))?"
    r" train_time:(?P<train_time>\d+)ms"
    r"(?: step_avg:(?P<step_avg>\d+\.\d+)ms tokens:(?P<tokens>\d+)"
    r" flops:(?P<flops>\d\.\d+e[+-]\d+) mfu:(?P<mfu>\d\.\d+)(?: words:(?P<words>\d+))?)?$"
)
LINE_FORMATS = {
    "epoch": ".3f",
    "train_loss": ".4f",
    "lr": ".3e",
    "val_loss": ".4f",
    "val_accuracy": ".4f",  # of a detector of replaced tokens, like the two below
    "val_f1": ".4f",
    "val_auc": ".4f",
    "dev_score": ".4f",
    "train_time": ".0f",  # milliseconds, like step_avg
    "step_avg": ".2f",
    "tokens": "d",
    "flops": ".6e",
    "mfu": ".4f",
    "words": ".0f",  # shown so far, where the manifest counts them
}


LOG_FILES = ("log.txt", "metrics.jsonl")


def log_line(step: int, steps: int | None, seconds: float, task: str = "", **numbers: float) -> str:
    """One line of numbers, those of LINE_FORMATS in its order. task: `task:mnli run:1/5 `, of finetuner.py."""
    numbers["train_time"] = 1000 * seconds
    if "tokens" in numbers:
        numbers["step_avg"] = 1000 * seconds / max(1, step)
    line = f"{task}step:{step}/{'-' if steps is None else steps}"
    for name, form in LINE_FORMATS.items():
        if name in numbers:
            line += f" {name}:{numbers[name]:{form}}{'ms' if name in ('train_time', 'step_avg') else ''}"
    assert LOG_LINE.match(line), line
    return line


class RunLog:
    """log.txt, metrics.jsonl and the terminal. Only rank 0 holds one; the others write nothing."""

    def __init__(self, directory: Path, steps: int | None = None, initial: int = 0, wandb_run=None):
        """steps: of the whole run, None where the clock ends it or where a run has several parts."""
        self.directory = directory
        self.file, self.metrics = (open(directory / name, "a", encoding="utf-8") for name in LOG_FILES)
        self.bar = tqdm(total=steps, initial=initial, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.wandb_run = wandb_run

    def write(self, text: str, echo: bool = True) -> None:
        self.append(self.file, text + "\n")
        if echo:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def append(self, file: TextIO, text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            raise InputError(f"{file.name} cannot be written ({error}): make room, and resume the run") from error

    def section(self, title: str, text: str, echo: bool = False) -> None:
        self.write(f"=== {title}\n{text}", echo)

    def open(self, argv: Sequence[str], config: dict, environment: dict, data: dict, code: dict[str, str]) -> None:
        """What a run is, before its first line. code: read_code(), taken when the program started."""
        self.section("command", shlex.join(argv))
        self.section("config", json.dumps(config))
        self.section("environment", json.dumps(environment))
        self.section("data", json.dumps(data))
        self.section("code", "\n".join(with_header(name, text) for name, text in code.items()))

    def step(self, line: str, echo: bool, **metrics: object) -> None:
        """A line of numbers, and what metrics.jsonl says at that step."""
        self.write(line, echo or self.bar.disable)
        self.append(self.metrics, json.dumps(metrics) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    def ends(self) -> dict[str, list]:
        """Length and hash of each file, to which cut_log can cut it back. Flushes both to disk, like a checkpoint."""
        for file in (self.file, self.metrics):
            os.fsync(file.fileno())
        return {name: end_of(self.directory.joinpath(name).read_bytes()) for name in LOG_FILES}

    def close(self, result: dict) -> None:
        """Writes the result, with a hash of it and all before it, where hashes stand in for the code."""
        text, _ = split_code(Path(self.file.name).read_text(encoding="utf-8"))
        self.section("result", json.dumps({**result, "sha256": seal(text, result)}))


def seal(text: str, result: dict) -> str:
    """A hash that reveals edits of a log. text: all before the result, without code."""
    return hashlib.sha256((text + json.dumps(result)).encode()).hexdigest()


def cut_log(run: Path, ends: dict[str, list]) -> bool:
    """Cuts a run's log back to where it stood at `ends`; what follows is appended to the files in abandoned/.

    ends: from RunLog.ends(). Where they are {} or do not match, all is cut. Returns whether they matched.
    """
    found = {name: path.read_bytes() if (path := run / name).exists() else b"" for name in LOG_FILES}
    begins = bool(ends) and all(ends[name] == end_of(found[name][: ends[name][0]]) for name in LOG_FILES)
    for name, content in found.items():
        kept = ends[name][0] if begins else 0
        if len(content) > kept:
            (run / "abandoned").mkdir(exist_ok=True)
            with open(run / "abandoned" / name, "ab") as file:
                file.write(content[kept:])
                file.flush()
                os.fsync(file.fileno())
            os.truncate(run / name, kept)
    return begins


def end_of(content: bytes) -> list:
    return [len(content), hashlib.sha256(content).hexdigest()]


def environment(device: torch.device, world_size: int) -> dict:
    """Versions and hardware, a hash that tells machines (and their starts) apart, and when the run started."""
    import huggingface_hub
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"huggingface_hub": huggingface_hub.__version__, "numpy": np.__version__}
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")  # torch has no call for it
        name = torch.cuda.get_device_name(device)  # of some older ones without the maker's, such as Tesla T4
        name = name if "NVIDIA" in name or torch.version.cuda is None else f"NVIDIA {name}"
        found |= {"device": name, "cuda": torch.version.cuda}
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    else:
        info = Path("/proc/cpuinfo")
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
        found["device"] = names[0] if names else platform.processor() or platform.machine()
        found["threads"] = torch.get_num_threads()
    # A machine's name and number may come with its image: the number of its start does not
    files = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")
    machine = platform.node() + "".join(file.read_text() for file in files if file.exists())
    found |= {"system": platform.platform(), "world_size": world_size}
    found["machine"] = hashlib.sha256(machine.encode()).hexdigest()[:12]
    speed = re.compile(r"(OMP|GOMP|KMP|MKL|MALLOC|PYTORCH|TORCHINDUCTOR|TRITON)_(?!CACHE_DIR|REDIS)|LD_PRELOAD$")
    sklearns = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")  # which it sets, and only the finetuner imports it
    variables = {name: value for name, value in sorted(os.environ.items()) if speed.match(name)}
    found["variables"] = {name: value for name, value in variables.items() if name not in sklearns}
    return {**found, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


# ---------------------------------------------------------------------------------------------------------------------
# The code that ran, byte for byte: every module under a header with its sha256 and number of lines

CODE_HEADER = re.compile(r"^--- (?P<name>\S+) sha256:(?P<sha256>[0-9a-f]{64})(?: lines:(?P<lines>\d{1,9}))?$")


def read_code(names: Sequence[str]) -> dict[str, str]:
    """Text of modules, by path in the repository, each ending with a newline.

    Call this first of all: what is edited later did not run.
    """
    return {name: (ROOT / name).read_bytes().decode().removesuffix("\n") + "\n" for name in names}


def with_header(name: str, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"--- {name} sha256:{digest} lines:{text.count(chr(10))}\n{text[:-1]}"


def split_code(text: str) -> tuple[str, dict[str, str]]:
    """A log without code, but with the headers' names and hashes, and the code: module -> text. Idempotent."""
    kept, code, lines = [], {}, iter(text.split("\n"))
    for line in lines:
        if (header := CODE_HEADER.match(line)) and header["lines"]:
            line = line.removesuffix(f" lines:{header['lines']}")
            code[header["name"]] = "".join(f"{line}\n" for line in itertools.islice(lines, int(header["lines"])))
        kept.append(line)
    return "\n".join(kept), code


# ---------------------------------------------------------------------------------------------------------------------
# Reading

JSON_SECTIONS = ("config", "environment", "data", "result")


@dataclass
class Line:
    """One line of numbers; what it does not say is None."""

    number: int  # in the file
    step: int
    seconds: float
    steps: int | None = None  # planned; None: the clock or the text ends the run
    train_loss: float | None = None
    val_loss: float | None = None
    dev_score: float | None = None
    step_avg: float | None = None  # seconds
    tokens: int | None = None
    words: int | None = None
    flops: float | None = None
    mfu: float | None = None
    lr: float | None = None
    task: str | None = None  # of a finetuning
    run: int | None = None  # of its several


@dataclass
class Log:
    path: Path
    text: str  # without code
    code: dict[str, str]  # module -> text; empty when the log has been stripped
    hashes: dict[str, str] = field(default_factory=dict)  # module -> sha256
    sections: dict[str, object] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)  # section -> number of its line in the file
    lines: list[Line] = field(default_factory=list)
    digest: str = ""  # of what stands before the result
    sealed: str = ""  # and of the result with it
    after: int = 0  # number of the first line after the result, of which there is none

    @property
    def finetuning(self) -> bool:
        return any(line.run is not None for line in self.lines)

    def named(self, *keys: str) -> object:
        """A value of the log's JSON: named("data", "validation", "tokens"). InputError when it is not there."""
        value: object = self.sections
        for depth, key in enumerate(keys):
            if not isinstance(value, dict) or key not in value:
                path = ".".join(keys[: depth + 1])
                raise InputError(f"{self.path}: no {path}: this is not the log of a finished run of this version")
            value = value[key]
        return value


def read_line(number: int, match: re.Match) -> Line:
    said = {name: value for name, value in match.groupdict().items() if value is not None}
    task = said.pop("task", None)
    if said["steps"] == "-":
        del said["steps"]
    numbers = {name: float(said[name]) for name in Line.__dataclass_fields__ if name in said}
    numbers |= {name: int(said[name]) for name in ("step", "steps", "tokens", "words", "run") if name in said}
    if "step_avg" in said:
        numbers["step_avg"] /= 1000
    return Line(number, seconds=float(said["train_time"]) / 1000, task=task, **numbers)


def read_log(path: Path) -> Log:
    """path: a log, or the folder of a run. Raises InputError with file and line for what is not a log's."""
    path = path / "log.txt" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path} is not there: give the folder of a run, such as logs/RUN")
    try:
        text, code = split_code(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text ({error}): it is damaged, or not a log") from error
    log = Log(path, text, code)
    title, lines, lines_of_code = None, text.split("\n"), 0
    for index, line in enumerate(lines):
        number = index + 1 + lines_of_code
        if line and isinstance(log.sections.get("result"), dict):
            log.after = log.after or number
        if match := re.fullmatch(r"=== (.+)", line):
            title = match[1]
            if title in JSON_SECTIONS and title in log.sections:  # a finetuning that was resumed opens its log again
                log.sections["resumed"], log.at["resumed"] = "", number
            log.sections.setdefault(title, "")
            log.at[title] = number
            if title == "result":
                before = "\n".join([*lines[:index], ""])
                log.digest = hashlib.sha256(before.encode()).hexdigest()
        elif header := CODE_HEADER.match(line):
            log.hashes[header["name"]] = header["sha256"]
            lines_of_code += code.get(header["name"], "").count("\n")
        elif line.startswith(("step:", "task:")):
            if not (match := LOG_LINE.match(line)):
                raise InputError(f"{path}:{number}: not a line of a log: {line[:80]!r}")
            try:
                log.lines.append(read_line(number, match))
            except ValueError as error:  # thousands of digits
                raise InputError(f"{path}:{number}: not a line of a log ({error})") from error
        elif title in JSON_SECTIONS and line:
            try:
                value = log.sections[title] = json.loads(line)
                if title == "result" and isinstance(value, dict):
                    log.sealed = seal(before, {name: said for name, said in value.items() if name != "sha256"})
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: section {title!r} is not JSON ({error})") from error
        elif title is not None and line and isinstance(log.sections[title], str):
            log.sections[title] += line + "\n"
    if not log.lines:
        raise InputError(f"{path} has no line of a run: give a log of trainer.py or finetuner.py")
    return log
