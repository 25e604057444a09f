"""Pretrains KBERT by masked language modelling on packed rows of whole documents.

    laptop, no data       torchrun --standalone --nproc_per_node=1 trainer.py --preset micro
    one GPU               torchrun --standalone --nproc_per_node=1 trainer.py --data.dir data/fineweb_edu
    eight GPUs            torchrun --standalone --nproc_per_node=8 trainer.py --data.dir data/fineweb_edu --train.hf_model_name USER/NAME

`--help` lists every setting with its unit. A run leaves logs/RUN/ with log.txt, metrics.jsonl, config.json, curves.png, checkpoints/
and model/, the finished model in Hugging Face form. The same rows make up the same steps on any number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataloading import SCAN_TOKENS, InputError, Loader, Row, read_manifest, read_shard, sha256_of
from model import PRESETS as MODEL_PRESETS
from model import KBERTConfig, KBERTForMaskedLM, compiled_backend, option, pack_slots
from optimizer import POLAR_EXPRESS, Optimizer

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class DataConfig:
    dir: str = option("data/fineweb_edu", "folder of shards with their manifest.json and tokenizer/")
    max_length: int = option(
        1024, "tokens in a window, [CLS] and [SEP] included; longer documents are cut into windows"
    )
    valid_tokens: int = option(
        10_000_000,
        "tokens of text in the validation set, the first ones of the valid shards; at the end as many of test",
    )


@dataclass
class TrainConfig:
    """How long, how much at once, how fast, and what is kept."""

    steps: int = option(10_000, "optimizer steps")
    max_minutes: float | None = option(None, "minutes of training time; replaces steps as what the schedules follow")
    batch_tokens: int = option(1_048_576, "tokens in an optimizer step, over all ranks, padding included")
    row_tokens: int | None = option(
        None, "tokens in one forward; none: 8192 on a CPU, the largest that fits on a GPU"
    )
    grad_accum: int | None = option(None, "rows of each rank in a step; none: batch_tokens / (row_tokens x ranks)")
    batch_start: float = option(1.0, "fraction of batch_tokens in the first steps")
    batch_ramp: float = option(
        0.0, "fraction of the run in which the batch grows from batch_start, in quarters, to batch_tokens"
    )

    muon_lr: float = option(0.03, "learning rate of the blocks' matrices, in spectral norm")
    muon_weight_decay: float = option(1.0, "cautious weight decay of the matrices; a step shrinks by lr^2 times this")
    muon_momentum: float = option(0.95, "Muon's momentum between its warm-up and the end, a step")
    muon_beta2: float = option(0.95, "decay of NorMuon's second moment, a step")
    muon_polar_steps: int = option(5, "steps of the iteration that orthogonalises an update, 1 to 5")
    embed_lr: float = option(0.008, "learning rate of the embedding and tied head")
    embed_betas: tuple[float, float] = option((0.7, 0.95), "Adam's decays for the embedding, a step")
    scalar_lr: float = option(0.01, "learning rate of everything else")
    scalar_betas: tuple[float, float] = option((0.9, 0.95), "Adam's decays for everything else, a step")
    adam_eps: float = option(1e-10, "Adam's epsilon")

    lr_schedule: Literal["trapezoid", "one_cycle", "cosine"] = option(
        "trapezoid", "shape of the learning rate over the run"
    )
    lr_warmup: float = option(0.02, "fraction of the run in which the learning rate rises from 0")
    lr_decay: float = option(0.5, "fraction of the run in which a trapezoid falls to the floor")
    lr_decay_shape: Literal["linear", "sqrt"] = option("linear", "how a trapezoid falls: linear, or 1 - sqrt")
    lr_floor: float = option(0.05, "fraction of the learning rate at the end")
    momentum_warmup: float = option(
        0.1,
        "fraction of the run in which Muon's momentum goes from 0.85 to muon_momentum; at the end it goes back in 0.02",
    )
    mask_rate_start: float = option(0.30, "fraction of a row that is masked at the start")
    mask_rate_end: float = option(0.15, "fraction of a row that is masked at the end")
    window_start: int | None = option(
        None, "tokens in the local attention window at the start, grown in steps of 64; none: the model's"
    )

    valid_every: int = option(250, "steps between validations; 0: only at the end")
    log_every: int = option(10, "steps between lines of the log; the GPU is waited for at each")
    save_every: int = option(0, "steps between checkpoints; 0: none but that of an interruption")
    keep_checkpoints: int = option(2, "checkpoints that stay on disk")
    resume: str | None = option(
        None, "auto: the newest checkpoint of run_name, or of the newest unfinished run; or a checkpoint's folder"
    )
    out: str = option("logs", "folder of runs")
    run_name: str | None = option(None, "folder of this run within out; none: date and time")
    declared_runs: int | None = option(
        None, "runs declared for a record, with the seeds 1, 2, ...: it must hold them all (records/README.md)"
    )
    seed: int = option(1, "of initial weights, order of data and masks")
    compile: bool = option(True, "torch.compile; without a C++ compiler a CPU run falls back to eager")
    hf_model_name: str | None = option(
        None, "USER/NAME on the Hugging Face Hub to push to: checkpoints as branches, the model as main"
    )
    wandb_project: str | None = option(None, "Weights & Biases project to report to (needs `pip install wandb`)")

    def __post_init__(self):
        fractions = (
            "batch_start",
            "batch_ramp",
            "muon_momentum",
            "lr_warmup",
            "lr_decay",
            "lr_floor",
            "momentum_warmup",
            "mask_rate_start",
            "mask_rate_end",
        )
        for name in fractions:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--train.{name} is {getattr(self, name)}: give a fraction between 0 and 1")
        for name in ("steps", "batch_tokens", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"--train.{name} is {getattr(self, name)}: give a positive number")
        if not 1 <= self.muon_polar_steps <= len(POLAR_EXPRESS):
            raise InputError(
                f"--train.muon_polar_steps is {self.muon_polar_steps}: give a number between 1 and {len(POLAR_EXPRESS)}"
            )
        if self.declared_runs is not None and not 1 <= self.seed <= self.declared_runs:
            raise InputError(
                f"--train.seed {self.seed} is not one of the {self.declared_runs} declared runs: their seeds are 1 to {self.declared_runs}"
            )
        if min(self.mask_rate_start, self.mask_rate_end) == 0:
            raise InputError(
                "a masking rate of 0 leaves nothing to predict: raise --train.mask_rate_start or --train.mask_rate_end"
            )
        if self.row_tokens is not None and (self.row_tokens < 128 or self.row_tokens % 128):
            raise InputError(
                f"--train.row_tokens {self.row_tokens} is not a multiple of 128: try {max(128, self.row_tokens // 128 * 128)}"
            )


def _shape(preset: str) -> dict:
    return {f"model.{field}": value for field, value in MODEL_PRESETS[preset].items()}


PRESETS = {
    "micro": _shape("micro")
    | {
        "data.dir": "data/sample",
        "data.max_length": 256,
        "data.valid_tokens": 100_000,
        # Small steps and a long decay: after the same tokens a loss of 3.46, where 200 steps of 8,192 and a decay of 0.5 gave 3.63
        "train.steps": 400,
        "train.row_tokens": 4096,
        "train.batch_tokens": 4096,
        "train.lr_decay": 0.9,
        "train.valid_every": 100,
        "train.log_every": 1,
        # A run of minutes learns from every word it has to guess: 3.25 where 30% to 15% gave 3.49
        "train.mask_rate_start": 0.40,
        "train.mask_rate_end": 0.30,
        # With 1,400 words to guess in a step, a rare word's gradient is noise, which Adam would blow up to full size: 400 steps of a
        # longer run gave 4.65 with this epsilon, a seventh of what one occurrence gives, where 1e-10 gave 4.71
        "train.adam_eps": 1e-4,
        # Short runs want a short memory: 400 steps on the corpus gave 4.455, with 0.95 4.654; 2,321 steps 3.418, with 0.95 3.450
        "train.muon_momentum": 0.85,
        "train.lr_warmup": 0.0,  # its first step would be one of rate zero
        "train.muon_polar_steps": 3,  # no worse at these sizes (4.70 for 4.71), and 5% of a step less at 6 x 384 on 2 cores
    },
    "small": _shape("small"),
    "base": _shape("base"),
    "large": _shape("large") | {"train.muon_lr": 0.02, "train.embed_lr": 0.006},
}


def _converter(annotation) -> Callable[[str], object]:
    """What turns a flag's text into a value of the annotated type."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = _converter(next(a for a in arguments if a is not type(None)))
        return lambda text: None if text.lower() == "none" else inner(text)
    if typing.get_origin(annotation) is tuple:

        def numbers(text: str) -> tuple:
            parts = text.split(",")
            if len(parts) != len(arguments):
                raise argparse.ArgumentTypeError(f"expected {len(arguments)} values with commas between, got {text!r}")
            return tuple(_converter(a)(part) for a, part in zip(arguments, parts))

        return numbers
    if typing.get_origin(annotation) is typing.Literal:

        def choice(text: str) -> str:
            if text not in arguments:
                raise argparse.ArgumentTypeError(f"choose from {', '.join(arguments)}")
            return text

        return choice
    if annotation is bool:

        def boolean(text: str) -> bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
            return text.lower() == "true"

        return boolean
    if annotation is int:

        def integer(text: str) -> int:
            return int(text.replace("_", ""))

        return integer
    return annotation


def parse_flags(
    groups: dict[str, type],
    presets: dict[str, dict],
    argv: list[str] | None,
    description: str,
    default_preset: str,
    extra: dict[str, dict] | None = None,
) -> tuple[str, dict[str, dict]]:
    """Dotted flags for the documented fields of each dataclass. Flags override the preset, the preset the defaults.

    Returns the preset's name and, for each group, the values that are not defaults. Unknown flags end the program.
    extra: plain flags beside these, name -> argparse's arguments; their values are returned with the groups'.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        choices=list(presets),
        default=default_preset,
        help=f"named settings that flags override [{default_preset}]",
    )
    for name, arguments in (extra or {}).items():
        parser.add_argument(f"--{name}", **arguments)
    for group, cls in groups.items():
        box = parser.add_argument_group(f"--{group}.*")
        annotations = inspect.get_annotations(
            cls, eval_str=True
        )  # typing.get_type_hints would fail on transformers' own classes
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                annotation = annotations[field.name]
                switch = {"nargs": "?", "const": True} if annotation is bool else {}
                box.add_argument(
                    f"--{group}.{field.name}",
                    type=_converter(annotation),
                    default=argparse.SUPPRESS,
                    metavar="X",
                    help=f"{field.metadata['help']} [{field.default}]".replace("%", "%%"),
                    **switch,
                )
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    plain = {name: given.pop(name) for name in extra or {}}
    values: dict[str, dict] = {group: {} for group in groups}
    for name, value in (presets[preset] | given).items():
        group, field = name.split(".", 1)
        values[group][field] = value
    return preset, values | plain


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress, which runs from 0 to 1 over the run (steps done, or seconds spent)


def lr_factor(progress: float, c: TrainConfig) -> float:
    if c.lr_schedule == "one_cycle":  # up, then down, without a flat part
        return (
            progress / c.lr_warmup
            if progress < c.lr_warmup
            else c.lr_floor + (1 - c.lr_floor) * (1 - progress) / (1 - c.lr_warmup)
        )
    if progress < c.lr_warmup:
        return progress / c.lr_warmup
    if c.lr_schedule == "cosine":
        done = (progress - c.lr_warmup) / (1 - c.lr_warmup)
        return c.lr_floor + (1 - c.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))
    done = 1 - (1 - progress) / c.lr_decay if progress > 1 - c.lr_decay else 0.0
    return c.lr_floor + (1 - c.lr_floor) * (1 - (math.sqrt(done) if c.lr_decay_shape == "sqrt" else done))


def muon_momentum(progress: float, c: TrainConfig) -> float:
    warm = min(1.0, progress / c.momentum_warmup) if c.momentum_warmup else 1.0
    return 0.85 + (c.muon_momentum - 0.85) * min(warm, (1 - progress) / 0.02)


def mask_rate(progress: float, c: TrainConfig) -> float:
    return c.mask_rate_start + (c.mask_rate_end - c.mask_rate_start) * progress


def batch_factor(progress: float, c: TrainConfig) -> float:
    """Fraction of batch_tokens: batch_start, then in quarters of the way up to 1."""
    if progress >= c.batch_ramp:
        return 1.0
    return c.batch_start + (1 - c.batch_start) * math.floor(4 * progress / c.batch_ramp) / 4


def local_window(progress: float, c: TrainConfig, full: int) -> int:
    """Tokens in the local attention window, half of them to each side."""
    start = full if c.window_start is None else c.window_start
    return min(full, math.ceil((start + (full - start) * progress * 1.5) / 64) * 64)


# ---------------------------------------------------------------------------------------------------------------------
# Model FLOPs: matrix products of the model alone, attention as really masked, the head at masked positions


@dataclass
class Work:
    """What FLOPs follow from, counted over all ranks: a log gives these sums, so that anyone can check its FLOPs."""

    tokens: int = 0  # real ones: padding is not work
    global_pairs: int = 0  # pairs of tokens that see each other in a global layer
    local_pairs: int = 0  # and in a local layer
    masked: int = 0  # positions predicted

    def add(self, lengths: np.ndarray, masked: int, window: int) -> None:
        """One forward over documents of these lengths [documents]."""
        lengths, side = lengths.astype(np.int64), window // 2
        self.tokens += int(lengths.sum())
        self.global_pairs += int((lengths**2).sum())
        self.local_pairs += int(
            np.where(lengths > side, lengths * (2 * side + 1) - side * (side + 1), lengths**2).sum()
        )
        self.masked += masked

    def training_flops(self, config: KBERTConfig, whole_last_layer: bool = False) -> float:
        """Of forward and backward, which costs twice the forward. Behind its attention, our last layer computes masked positions alone."""
        d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        global_layers = sum(config.is_global(layer) for layer in range(layers))
        matrices = 2 * self.tokens * layers * (4 * d * d + 3 * d * f)
        if not whole_last_layer:
            matrices -= 2 * (self.tokens - self.masked) * (d * d + 3 * d * f)
        attention = 4 * d * (global_layers * self.global_pairs + (layers - global_layers) * self.local_pairs)
        return 3.0 * (matrices + attention + 2 * self.masked * d * config.vocab_size)


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s: the data sheet's where we know it, else the best of three large products measured here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in (
            ("H100", 989e12),
            ("H200", 989e12),
            ("GH200", 989e12),
            ("A100", 312e12),
            ("4090", 165e12),
            ("L40S", 362e12),
            ("B200", 2250e12),
        ):
            if part in name:
                return peak
    a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class Place:
    """Where this process stands among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, work: Callable[[], object]) -> object:
        """Runs `work` on rank 0 alone and hands its result to all; what it raises, every rank raises."""
        outcome: list = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except (InputError, OSError) as error:
                outcome[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


@contextlib.contextmanager
def processes():
    """Joins torchrun's process group, if there is one: NCCL between GPUs, gloo between CPUs and for small talk."""
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node={local_world_size} asks for more GPUs than the {torch.cuda.device_count()} of this machine: "
                f"start again with --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(
            max(1, cores // local_world_size)
        )  # torchrun sets OMP_NUM_THREADS=1 for several processes
        with contextlib.suppress(AttributeError, OSError, TypeError):  # a C library other than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, and
            mallopt(
                -1, 2**31 - 1
            )  # M_TRIM_THRESHOLD: to give memory back and fetch it anew, page by page, took 5 to 9% of a step
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(rank, world_size, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler on a CPU."""
    compilers = (
        [os.environ.get("CXX"), "cl"] if sys.platform == "win32" else [os.environ.get("CXX"), "g++", "clang++", "c++"]
    )
    return device.type == "cuda" or any(shutil.which(name) for name in compilers if name)


# ---------------------------------------------------------------------------------------------------------------------
# Log: one format, one regular expression

LOG_LINE = re.compile(
    r"^(?:task:(?P<task>\w+) run:(?P<run>\d+)/(?P<runs>\d+) )?"  # of finetuner.py
    r"step:(?P<step>\d+)/(?P<steps>\d+|-)"  # "-": a run by the clock has no planned number of steps
    r"(?: epoch:(?P<epoch>\d+\.\d+))?"
    r"(?: train_loss:(?P<train_loss>\d+\.\d+))?(?: lr:(?P<lr>\d\.\d+e[+-]\d+))?"
    r"(?: val_loss:(?P<val_loss>\d+\.\d+))?(?: dev_score:(?P<dev_score>-?\d+\.\d+))?"
    r" train_time:(?P<train_time>\d+)ms"
    r"(?: step_avg:(?P<step_avg>\d+\.\d+)ms tokens:(?P<tokens>\d+) flops:(?P<flops>\d\.\d+e[+-]\d+) mfu:(?P<mfu>\d\.\d+))?$"
)
MODULES = ("trainer.py", "model.py", "optimizer.py", "dataloading.py")


class RunLog:
    """log.txt, metrics.jsonl and the terminal. Only rank 0 holds one; the others write nothing."""

    def __init__(self, directory: Path, steps: int | None, initial: int, wandb_run=None):
        self.steps = steps
        self.file = open(directory / "log.txt", "a", encoding="utf-8")
        self.metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=initial, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.wandb_run = wandb_run

    def write(self, text: str, echo: bool = True) -> None:
        self.file.write(text + "\n")
        self.file.flush()
        if echo:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def section(self, title: str, text: str, echo: bool = False) -> None:
        self.write(f"=== {title}\n{text}", echo)

    def step(
        self, step: int, seconds: float, tokens: int, flops: float, peak: float, loss: dict[str, float], **more
    ) -> None:
        """A line of the log: train_loss or val_loss after `step` steps. peak: FLOP/s of all devices; more: for metrics.jsonl alone."""
        mfu = flops / max(seconds, 1e-9) / peak
        line = log_line(step, self.steps, seconds, tokens, flops, mfu, **loss)
        assert LOG_LINE.match(line), line
        self.write(line, echo="val_loss" in loss or self.bar.disable)
        values = {**loss, "seconds": seconds, "tokens": tokens, "flops": flops, "mfu": mfu, **more}
        self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        self.metrics.flush()
        self.bar.update(step - self.bar.n)
        if self.wandb_run is not None:
            self.wandb_run.log(values, step=step)


def log_line(
    step: int,
    steps: int | None,
    seconds: float,
    tokens: int,
    flops: float,
    mfu: float,
    train_loss: float | None = None,
    val_loss: float | None = None,
) -> str:
    losses = "".join(
        f" {name}:{value:.4f}"
        for name, value in (("train_loss", train_loss), ("val_loss", val_loss))
        if value is not None
    )
    return (
        f"step:{step}/{'-' if steps is None else steps}{losses} train_time:{1000 * seconds:.0f}ms "
        f"step_avg:{1000 * seconds / max(1, step):.2f}ms tokens:{tokens} flops:{flops:.6e} mfu:{mfu:.4f}"
    )


def environment(place: Place) -> dict:
    import huggingface_hub
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "numpy": np.__version__,
    }
    if place.device.type == "cuda":
        # The driver has no torch call of its own; its version is the first line of this file on Linux.
        driver = Path("/proc/driver/nvidia/version")
        hardware = {
            "device": torch.cuda.get_device_name(place.device),
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
        }
    else:
        info = Path("/proc/cpuinfo")
        names = (
            [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
            if info.exists()
            else []
        )
        hardware = {
            "device": (names or [platform.processor() or platform.machine()])[0],
            "threads": torch.get_num_threads(),
        }
    identity = Path("/etc/machine-id")
    said = platform.node() + (identity.read_text() if identity.exists() else "")
    machine = hashlib.sha256(said.encode()).hexdigest()[:12]  # tells machines apart, names none
    return {
        **versions,
        **hardware,
        "system": platform.platform(),
        "world_size": place.world_size,
        "machine": machine,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


CODE_HEADER = re.compile(r"^--- (?P<name>\S+) sha256:(?P<sha256>[0-9a-f]{64})(?: lines:(?P<lines>\d+))?$")


def module_code(names: Sequence[str] = MODULES) -> str:
    """What ran, byte for byte: every module under a header with its sha256 and number of lines."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    return "\n".join(
        f"--- {name} sha256:{sha256_of(ROOT / name)} lines:{text.count(chr(10))}\n{text[:-1]}"
        for name, text in texts.items()
    )


def split_code(text: str) -> tuple[str, dict[str, str]]:
    """A log without the modules' code, of whose headers name and hash stay, and the code: module -> text. Splitting twice changes nothing."""
    kept, code, lines = [], {}, iter(text.split("\n"))
    for line in lines:
        if (header := CODE_HEADER.match(line)) and header["lines"]:
            line = line.removesuffix(f" lines:{header['lines']}")
            code[header["name"]] = "".join(f"{next(lines, '')}\n" for _ in range(int(header["lines"])))
        kept.append(line)
    return "\n".join(kept), code


def open_log(
    log: RunLog,
    argv: Sequence[str],
    resolved: dict,
    place: Place,
    measured: dict,
    data: dict,
    modules: Sequence[str] = MODULES,
) -> None:
    """What a run is, before its first line. measured: what belongs to the machine and was found at the start, such as peak_flops."""
    log.section("command", shlex.join(argv))
    log.section("config", json.dumps(resolved))
    log.section("environment", json.dumps({**environment(place), **measured}))
    log.section("data", json.dumps(data))
    log.section("code", module_code(modules))


def draw_curves(run: Path) -> None:
    """curves.png beside the log, when matplotlib is there."""
    try:
        from records.plot import draw

        draw([run], run / "curves.png")
    except ImportError:
        pass
    except InputError as error:  # a line cut in half by a kill, in a run that was resumed
        print(f"no curves.png: {error}")


def close_log(log: RunLog, result: dict) -> None:
    """The result, with a hash over all that stands before it but the code, whose hashes do stand there: an edited line shows."""
    said, _ = split_code(Path(log.file.name).read_text(encoding="utf-8"))
    digest = hashlib.sha256(said.encode()).hexdigest()
    log.section("result", json.dumps({**result, "log_sha256": digest}))


# ---------------------------------------------------------------------------------------------------------------------
# Objective: masks for training and for validation

FROZEN_MASK_RATE = 0.15


def mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: uint64 in, well-stirred uint64 out."""
    x = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_masks(row: Row, count: int, seed: int, mask_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Corrupted input_ids [T], masked positions [count] ascending, targets [count] with -100 where the row has too little text.

    Drawn on the row's device from (seed, number of the row), which no two steps share, so whatever the number of ranks.
    """
    # Stirred into 32 bits: the CPU's generator ignores what lies above.
    (stirred,) = mixed(np.array([(seed << 40) + row.index])) >> np.uint64(32)
    generator = torch.Generator(row.input_ids.device).manual_seed(int(stirred))
    score = torch.rand(row.text.size(0), generator=generator, device=row.text.device).masked_fill(~row.text, -1)
    masked = score.topk(count, sorted=False).indices.sort().values
    return corrupt(row, masked, mask_id)


def corrupt(row: Row, masked: torch.Tensor, mask_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text, original = row.text[masked], row.input_ids[masked]
    input_ids = row.input_ids.index_put((masked,), torch.where(text, mask_id, original))
    return input_ids, masked, torch.where(text, original, -100).long()


def frozen_mask(offsets: np.ndarray) -> np.ndarray:
    """[T] bool: 15% of the text, decided for each token by where it lies in the shards alone.

    So the same tokens are masked whatever the world size, the row size and the way documents are packed or cut.
    """
    return (offsets >= 0) & (mixed(offsets + 1) < np.uint64(FROZEN_MASK_RATE * 2**64))


def validation_loader(
    directory: Path, manifest: dict, data: DataConfig, row_tokens: int, place: Place, split: str = "valid"
) -> Loader:
    return Loader(
        directory,
        manifest,
        split,
        row_tokens,
        data.max_length,
        seed=None,
        max_tokens=data.valid_tokens,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
    )


def validate(loss_of, loader: Loader, mask_id: int, window: int, max_length: int, place: Place) -> float:
    """Cross-entropy summed over the frozen masks of the whole validation set, over their number."""
    total, count = torch.zeros((), dtype=torch.float64, device=place.device), 0
    for row in loader:
        masked = np.flatnonzero(frozen_mask(row.offsets))
        count += len(masked)
        # At least one position, and a multiple of 64: the filling points at [CLS] or padding, which has no target.
        masked = torch.from_numpy(np.pad(masked, (0, -len(masked) % 64 or 64))).to(place.device)
        input_ids, masked, targets = corrupt(row, masked, mask_id)
        # With gradients enabled, though unused: the graph that training compiled serves here too.
        total += loss_of(
            input_ids, row.document_ids, row.positions, masked, targets, max_seqlen=max_length, window=window
        ).detach()
    loss, count = place.sum(total.item(), count)
    if not count:
        raise InputError("the validation set holds no text to mask: raise --data.valid_tokens or pack more text")
    return loss / count


def data_hash(manifest: dict) -> str:
    """Of tokenizer and shards: two runs with the same one read the same tokens."""
    said = [
        manifest["tokenizer"]["sha256"],
        sorted((name, entry["sha256"]) for name, entry in manifest["shards"].items()),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def describe_validation(loader: Loader, train_shards: list[Path], vocab_size: int) -> dict:
    """Size and fingerprint of the validation set with its masks, and the loss that unigram frequencies alone would give.

    The fingerprint sums a hash of (place, token, masked) over the text, so it does not depend on how rows are packed.
    """
    counts, budget = np.ones(vocab_size), 100_000_000  # tokens: enough to know frequencies, quick to read
    for path in train_shards:
        tokens = read_shard(path)[:budget]
        budget -= len(tokens)
        for low in range(0, len(tokens), SCAN_TOKENS):
            counts += np.bincount(tokens[low : low + SCAN_TOKENS], minlength=vocab_size)[:vocab_size]
    counts[[loader.specials[name] for name in ("cls", "sep", "pad", "mask")]] = 0
    with np.errstate(divide="ignore"):
        surprise = -np.log(counts / counts.sum())
    fingerprint, tokens, masked_tokens, unigram = 0, 0, 0, 0.0
    for row in loader:
        ids, text, masked = row.input_ids.cpu().numpy(), row.offsets >= 0, frozen_mask(row.offsets)
        code = mixed(row.offsets[text] + 1) + (ids[text].astype(np.uint64) * np.uint64(2) + masked[text])
        fingerprint = (fingerprint + int(mixed(code).sum(dtype=np.uint64))) % 2**64
        tokens, masked_tokens, unigram = (
            tokens + int(text.sum()),
            masked_tokens + int(masked.sum()),
            unigram + surprise[ids[masked]].sum(),
        )
    return {
        "tokens": tokens,
        "masked_tokens": masked_tokens,
        "fingerprint": f"{fingerprint:016x}",
        "unigram_loss": unigram / max(1, masked_tokens),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder under a temporary name, flushes it to disk and renames it: a folder that exists is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_checkpoint(
    folder: Path, model: KBERTForMaskedLM, tokenizer, optimizer_state: dict, state: dict, keep: int
) -> None:
    """Model in Hugging Face form, optimizer.safetensors and state.json. There is no random state: masks follow from the row's number."""
    from safetensors.torch import save_file

    def write(into: Path) -> None:
        save_model(into, model, tokenizer)
        save_file(optimizer_state, into / "optimizer.safetensors")
        (into / "state.json").write_text(json.dumps(state))

    save_folder(folder, write)
    for old in sorted(folder.parent.glob("step-*[0-9]"))[:-keep]:
        shutil.rmtree(old)


def save_model(folder: Path, model: KBERTForMaskedLM, tokenizer) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def find_checkpoint(resume: str, out: Path, run_name: str | None) -> Path | None:
    """The folder to resume from. auto: None when there is nothing to resume."""
    if resume != "auto":
        if not (Path(resume) / "state.json").exists():
            raise InputError(
                f"--train.resume {resume} is not a checkpoint: give a folder logs/RUN/checkpoints/step-NNNNNN, or auto"
            )
        return Path(resume)
    runs = [out / run_name] if run_name else [run for run in out.glob("*") if not (run / "model").exists()]
    checkpoints = [path for run in runs for path in run.glob("checkpoints/step-*[0-9]")]
    return max(checkpoints, key=lambda path: (path.parent.parent.stat().st_mtime, path.name), default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face Hub: in the background, and never the end of a run


class HubPusher:
    """Uploads folders of a run. What could not be uploaded stays on disk, with the command that uploads it later."""

    def __init__(self, name: str):
        """Checks token and name before training starts, not after. Raises InputError."""
        from huggingface_hub import HfApi

        self.api, self.name = HfApi(), name
        self.pending: list[tuple[Path, str, Future | None]] = []
        try:
            self.api.whoami()
            self.api.create_repo(name, exist_ok=True)
        except Exception as error:  # whatever the Hub or the network has to say
            raise InputError(
                f"cannot push to {name} on the Hugging Face Hub ({type(error).__name__}: {first_line(error)}): "
                "run `hf auth login` with a token that may write there, or drop --train.hf_model_name"
            ) from error

    def push(self, folder: Path, revision: str) -> None:
        """Starts uploading; the folder is the pusher's from now on."""
        future = None
        try:
            if revision != "main":
                self.api.create_branch(self.name, branch=revision, exist_ok=True)
            future = self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                revision=revision,
                run_as_future=True,
                commit_message=f"KBERT {revision}",
            )
        except Exception as error:
            print(f"warning: pushing {folder} to {self.name} failed ({first_line(error)})", file=sys.stderr)
        self.pending.append((folder, revision, future))

    def finish(self) -> list[str]:
        """Waits for the uploads. Returns a command for each that failed."""
        commands = []
        for folder, revision, future in self.pending:
            try:
                if future is None:
                    raise ConnectionError("the upload never started")
                future.result()
                if folder.parent.name == "to_push":
                    shutil.rmtree(folder)
            except Exception as error:
                print(f"warning: pushing {folder} to {self.name} failed ({first_line(error)})", file=sys.stderr)
                commands.append(
                    f"hf upload {shlex.quote(self.name)} {shlex.quote(str(folder))} . --revision {revision}"
                )
        return commands


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


MODEL_CARD = """---
library_name: transformers
pipeline_tag: fill-mask
license: mit
tags: [kbert, encoder, masked-lm]
---
# {name}

A KBERT encoder: {layers} layers x {hidden}, {parameters:.1f}M parameters, pretrained by masked language modelling.

| validation loss | tokens seen | model FLOPs | training time | hardware |
|---|---|---|---|---|
| {val_loss:.4f} | {tokens:,} | {flops:.3e} | {minutes:.1f} min | {world_size} x {device} |

```python
from transformers import pipeline
pipeline("fill-mask", "{name}", trust_remote_code=True)("The capital of France is {mask}.")
```

Trained on: {source}
"""

# ---------------------------------------------------------------------------------------------------------------------
# The run


class Clock:
    """Seconds of training: it stands still while the run validates, saves and writes."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds, self.started = device, seconds, None

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


def mask_count(rate: float, row_tokens: int) -> int:
    """Masked positions in a row, a multiple of 16."""
    return max(16, round(rate * row_tokens / 16) * 16)


def model_config(specials: dict, max_length: int, values: dict) -> KBERTConfig:
    """A model for the tokenizer of a manifest. Raises InputError for a shape that cannot be."""
    try:
        return KBERTConfig(
            vocab_size=specials["vocab_size"],
            max_position_embeddings=max_length,
            pad_token_id=specials["pad"],
            cls_token_id=specials["cls"],
            sep_token_id=specials["sep"],
            mask_token_id=specials["mask"],
            **values,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def make_optimizer(
    model: KBERTForMaskedLM, train: TrainConfig, rank: int, world_size: int, compiled: bool
) -> Optimizer:
    return Optimizer(
        model,
        rank=rank,
        world_size=world_size,
        compiled=compiled,
        muon_lr=train.muon_lr,
        muon_weight_decay=train.muon_weight_decay,
        muon_beta2=train.muon_beta2,
        muon_polar_steps=train.muon_polar_steps,
        embed_lr=train.embed_lr,
        embed_betas=train.embed_betas,
        scalar_lr=train.scalar_lr,
        scalar_betas=train.scalar_betas,
        adam_eps=train.adam_eps,
    )


def make_loss(model: KBERTForMaskedLM, compiled: bool):
    """model.loss with the window in tokens of both sides, compiled once for each window whatever the number of masked positions."""
    if not compiled:
        return lambda *row, max_seqlen, window: model.loss(*row, max_seqlen, window // 2)
    backend = model.encoder.attention_backend = compiled_backend(model.device)
    compiled_loss = torch.compile(model.loss, dynamic=False)

    def loss_of(input_ids, document_ids, positions, masked, targets, *, max_seqlen, window):
        slots = pack_slots(document_ids, max_seqlen) if backend == "blockwise" else None
        for tensor in (masked, targets) if slots is None else (masked, targets, slots):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled_loss(input_ids, document_ids, positions, masked, targets, max_seqlen, window // 2, slots)

    return loss_of


def warm_up(
    model, loss_of, optimizer: Optimizer, train: TrainConfig, row_tokens: int, max_length: int, device: torch.device
) -> None:
    """Compiles every kernel on random documents, takes a step of length 0, and leaves model and optimizer as they were.

    With as many masked positions as the run will ever have, so that a row which fits here fits throughout.
    """
    token = torch.arange(row_tokens, device=device, dtype=torch.int32)
    input_ids = token * 31 % model.config.vocab_size
    masked = torch.arange(mask_count(max(train.mask_rate_start, train.mask_rate_end), row_tokens), device=device)
    for window in sorted({local_window(p / 1000, train, model.config.local_attention_window) for p in range(1001)}):
        loss_of(
            input_ids,
            token // max_length,
            token % max_length,
            masked,
            input_ids[masked].long(),
            max_seqlen=max_length,
            window=window,
        ).backward()
    optimizer.step(lr_factor=0.0, momentum=0.0)
    optimizer.reset()


def fit_row_tokens(train: TrainConfig, place: Place, attempt: Callable[[int], None]) -> int:
    """The largest row that divides the batch and, tried out by `attempt`, fits into the GPU's memory."""
    if train.row_tokens is not None or place.device.type == "cpu":
        candidates = [train.row_tokens or 8192]
    elif train.grad_accum is not None:
        candidates = [65536, 49152, 32768, 16384, 8192]
    else:
        candidates = [
            size for size in (65536, 49152, 32768, 16384, 8192) if train.batch_tokens % (size * place.world_size) == 0
        ]
    for size in candidates:
        if train.grad_accum is None and train.batch_tokens % (size * place.world_size):
            break
        failed = 0.0
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            failed = 1.0
        if not place.sum(failed)[0]:
            return size
        torch.cuda.empty_cache()
    else:
        if candidates:
            raise InputError(
                f"rows of {candidates[-1]} tokens do not fit into this GPU's memory: lower --train.row_tokens"
            )
    size = candidates[0] if candidates else 8192
    fitting = max(1, round(train.batch_tokens / (size * place.world_size))) * size * place.world_size
    raise InputError(
        f"--train.batch_tokens {train.batch_tokens} is not a multiple of row_tokens x ranks = {size} x {place.world_size}: "
        f"use --train.batch_tokens {fitting} or set --train.grad_accum"
    )


PROMPTS = (
    "The capital of France is {mask}.",
    "Returns the {mask} of the list.",
    "If the file does not {mask}, an error is raised.",
)


def answers(model: KBERTForMaskedLM, tokenizer, device: torch.device) -> list[str]:
    """The model's three likeliest words for the gap of each prompt."""
    lines = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt.format(mask=tokenizer.mask_token), return_tensors="pt").to(device)
        with torch.no_grad():
            logits = model(inputs["input_ids"]).logits[
                0, (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
            ]
        top = logits.softmax(-1).topk(3)
        words = ", ".join(
            f"{tokenizer.decode([token]).strip()!r} {p:.0%}"
            for p, token in zip(top.values.tolist(), top.indices.tolist())
        )
        lines.append(f"{prompt.format(mask='____')}  ->  {words}")
    return lines


def train_model(
    place: Place, preset: str, data: DataConfig, train: TrainConfig, model_values: dict, argv: list[str]
) -> dict:
    """The whole run. Returns what it prints at the end."""
    device, steps = place.device, None if train.max_minutes is not None else train.steps

    # --- data
    directory, sample = Path(data.dir), Path(PRESETS["micro"]["data.dir"])
    if directory == sample and not (sample / "manifest.json").exists():
        from data.make_sample import make_sample

        if place.first:
            print(f"no {sample}: building it from the documentation of the installed packages")
        place.on_first(lambda: make_sample(sample))
    manifest = place.on_first(lambda: read_manifest(directory))
    specials = manifest["tokenizer"]
    tokenizer = None
    if (directory / "tokenizer").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")

    # --- where the run lives, and what it continues
    out = Path(train.out)
    checkpoint = place.on_first(lambda: find_checkpoint(train.resume, out, train.run_name) if train.resume else None)
    name = train.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{preset}"
    run = place.on_first(lambda: checkpoint.parent.parent if checkpoint else out / name)
    if checkpoint is None and place.on_first(
        lambda: (run / "log.txt").exists() and (run / "log.txt").stat().st_size > 0
    ):
        raise InputError(
            f"{run} holds a run already: choose another --train.run_name, or continue it with --train.resume auto"
        )
    place.on_first(lambda: run.mkdir(parents=True, exist_ok=True))
    place.on_first(lambda: (run / "log.txt").touch())  # says now, not in an hour, that this place cannot be written
    if train.wandb_project:
        try:
            import wandb
        except ImportError as error:
            raise InputError("--train.wandb_project needs the package wandb: run `pip install wandb`") from error
    hub = None
    if train.hf_model_name:
        ok: list = []
        place.on_first(lambda: ok.append(HubPusher(train.hf_model_name)))
        hub = ok[0] if place.first else None

    # --- model and optimizer
    torch.manual_seed(train.seed)
    torch.set_float32_matmul_precision("high")
    config = model_config(specials, data.max_length, model_values)
    model = KBERTForMaskedLM(config).to(device)
    model.encoder.compute_dtype = torch.bfloat16
    compiled = train.compile and can_compile(device)
    if train.compile and not compiled and place.first:
        print("no C++ compiler found: running eagerly, several times slower (install g++ or clang to compile)")
    optimizer = make_optimizer(model, train, place.rank, place.world_size, compiled)
    loss_of = make_loss(model, compiled)

    # --- compile, measure what fits, and put everything back
    started = time.perf_counter()
    row_tokens = fit_row_tokens(
        train, place, lambda size: warm_up(model, loss_of, optimizer, train, size, data.max_length, device)
    )
    rows_per_rank = train.grad_accum or train.batch_tokens // (row_tokens * place.world_size)
    compile_seconds = time.perf_counter() - started

    state = {"step": 0, "seconds": 0.0, "work": dataclasses.asdict(Work()), "loader": None}
    identity = {
        "model": {k: v for k, v in config.to_dict().items() if k != "transformers_version"},
        "data": data_hash(manifest),
        "seed": train.seed,
        "row_tokens": row_tokens,
        "max_length": data.max_length,
    }
    if checkpoint:
        from safetensors.torch import load_file

        state = json.loads((checkpoint / "state.json").read_text())
        different = [key for key in identity if state["identity"][key] != json.loads(json.dumps(identity[key]))]
        if different:
            raise InputError(
                f"{checkpoint} was made with other settings ({', '.join(different)}): resume with those, or start a new --train.run_name"
            )
        weights = load_file(checkpoint / "model.safetensors", device=str(device))
        missing = model.load_state_dict(weights, strict=False)
        assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys, missing
        optimizer.load_state_dict(load_file(checkpoint / "optimizer.safetensors"))
    loader = Loader(
        directory,
        manifest,
        "train",
        row_tokens,
        data.max_length,
        seed=train.seed,
        rank=place.rank,
        world_size=place.world_size,
        device=device,
        state=state["loader"],
    )
    valid_loader = validation_loader(directory, manifest, data, row_tokens, place)

    # --- the log's opening
    resolved = {
        "preset": preset,
        "data": dataclasses.asdict(data),
        "train": {**dataclasses.asdict(train), "row_tokens": row_tokens},
        "model": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(KBERTConfig)
            if "help" in field.metadata
        },
    }
    parameters = sum(p.numel() for p in model.parameters())
    log, wandb_run, peak = None, None, peak_flops(device) * place.world_size
    if place.first:
        if train.wandb_project:
            wandb_run = wandb.init(project=train.wandb_project, name=run.name, config=resolved)
        alone = Place(0, 1, torch.device("cpu"))
        validation = describe_validation(
            validation_loader(directory, manifest, data, row_tokens, alone),
            [directory / n for n, e in manifest["shards"].items() if e["split"] == "train"],
            config.vocab_size,
        )
        log = RunLog(run, steps, state["step"], wandb_run)
        if checkpoint:
            log.section("resumed", f"{checkpoint.name}", echo=True)
        else:
            (run / "config.json").write_text(json.dumps(resolved, indent=1))
            open_log(
                log,
                argv,
                resolved,
                place,
                {"peak_flops": peak, "compiled": compiled, "compile_seconds": round(compile_seconds, 2)},
                {
                    "hash": data_hash(manifest),
                    "tokenizer": specials["sha256"],
                    "vocab_size": config.vocab_size,
                    "validation": validation,
                },
            )
            log.section(
                "run",
                f"{run}: {parameters / 1e6:.1f}M parameters ({(parameters - model.encoder.embed.weight.numel()) / 1e6:.1f}M without the "
                f"embedding), {place.world_size} x {rows_per_rank} rows of {row_tokens} tokens a step, compiled in {compile_seconds:.0f} s",
                echo=True,
            )
            log.write(
                f"loss of a uniform guess {math.log(config.vocab_size):.4f}, of unigram frequencies {validation['unigram_loss']:.4f}"
            )

    # --- the loop
    interrupted = False

    def on_sigterm(*_):
        nonlocal interrupted
        interrupted = True

    previous_handler = signal.signal(signal.SIGTERM, on_sigterm)
    step, work, clock = state["step"], Work(**state["work"]), Clock(device, state["seconds"])
    loader_state, rows, waited = state["loader"], iter(loader), 0.0
    unread: list[tuple[int, torch.Tensor, dict]] = []  # step, its loss, still on the device, and what to say of it
    val_loss = None

    def save(push: bool) -> None:
        if not all(
            bool(torch.isfinite(p).all()) for p in model.parameters()
        ):  # the loss would tell only at the next step
            raise InputError(
                f"the weights after step {step} are not finite: no checkpoint was overwritten; lower the learning rates and use --train.resume auto"
            )
        optimizer_state = optimizer.state_dict()
        state = {
            "step": step,
            "seconds": clock.seconds,
            "work": dataclasses.asdict(work),
            "loader": loader_state,
            "identity": identity,
            "config": resolved,
        }

        def write():
            folder = run / "checkpoints" / f"step-{step:06d}"
            save_checkpoint(folder, model, tokenizer, optimizer_state, state, train.keep_checkpoints)
            if hub and push:
                save_folder(run / "to_push" / folder.name, lambda into: save_model(into, model, tokenizer))
                hub.push(run / "to_push" / folder.name, folder.name)
            log.section("saved", str(folder), echo=True)

        place.on_first(write)

    def write_line(loss: dict[str, float], **more) -> None:
        log.step(step, clock.seconds, work.tokens, work.training_flops(config), peak, loss, **more)

    def write_losses() -> None:
        """Fetches the losses since the last line, stops at one that is not finite, writes the last."""
        if not unread:
            return
        losses = place.sum(*torch.stack([loss for _, loss, _ in unread]).tolist())
        for loss, (at, _, said) in zip(losses, unread):
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of step {at} is {loss}, at learning-rate factor {said['lr_factor']:.4g} (muon {train.muon_lr * said['lr_factor']:.4g}, "
                    f"embedding {train.embed_lr * said['lr_factor']:.4g}), rows {said['rows']}: no checkpoint was overwritten; lower the rates and use --train.resume auto"
                )
        if place.first:
            write_line({"train_loss": losses[-1]}, **unread[-1][2], data_wait_seconds=waited)
        unread.clear()

    while True:
        now, stop = clock.now(), float(interrupted)
        if place.world_size > 1:  # one clock and one decision for all ranks
            agreed = torch.tensor([now, stop], dtype=torch.float64)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            now, stop = agreed.tolist()
        progress = min(1.0, now / (60 * train.max_minutes) if train.max_minutes is not None else step / train.steps)
        window = local_window(progress, train, config.local_attention_window)
        done = progress >= 1

        if (
            done
            or stop
            or (train.valid_every and step % train.valid_every == 0)
            or (train.save_every and step and step % train.save_every == 0)
        ):
            clock.stop()
            write_losses()
        if done or (train.valid_every and step % train.valid_every == 0 and not stop):
            val_loss = validate(loss_of, valid_loader, config.mask_token_id, window, data.max_length, place)
            if place.first:
                write_line({"val_loss": val_loss})
        if stop or (train.save_every and step and step % train.save_every == 0 and step != state["step"]):
            save(push=bool(train.save_every) and not stop)
        if done or stop:
            break

        clock.start()
        count = mask_count(mask_rate(progress, train), row_tokens)
        accum = max(1, round(rows_per_rank * batch_factor(progress, train)))
        factor = (
            lr_factor(progress, train) * (accum / rows_per_rank) ** 0.5
        )  # a smaller batch takes smaller steps (Malladi et al. 2022)
        before = time.perf_counter()
        batch = [next(rows) for _ in range(accum)]
        waited += time.perf_counter() - before
        masked_tokens = sum(
            min(count, text) for row in batch for text in row.round_text
        )  # over all ranks: the loss is a mean over these
        loss = torch.zeros((), device=device)
        for row in batch:
            input_ids, masked, targets = draw_masks(row, count, train.seed, config.mask_token_id)
            row_loss = (
                loss_of(
                    input_ids,
                    row.document_ids,
                    row.positions,
                    masked,
                    targets,
                    max_seqlen=data.max_length,
                    window=window,
                )
                / masked_tokens
            )
            row_loss.backward()
            loss += row_loss.detach()
        optimizer.step(factor, muon_momentum(progress, train))

        step += 1
        loader_state = batch[-1].state
        work.add(np.concatenate([row.round_lengths for row in batch]), masked_tokens, window)
        unread.append(
            (
                step,
                loss,
                {
                    "lr_factor": factor,
                    "mask_rate": count / row_tokens,
                    "window": window,
                    "batch_tokens": accum * place.world_size * row_tokens,
                    "rows": [row.index for row in batch],
                },
            )
        )
        if step % train.log_every == 0:
            if device.type == "cuda":
                loss.item()  # the clock must not run ahead of the GPU
            clock.stop()
            write_losses()
    rows.close()
    signal.signal(signal.SIGTERM, previous_handler)
    if not done:
        if place.first:
            print(f"stopped at step {step}; continue with --train.resume auto")
        return {"run": str(run), "step": step, "finished": False}

    # --- the end
    has_test = any(entry["split"] == "test" and entry["tokens"] for entry in manifest["shards"].values())
    test_loss = (
        validate(
            loss_of,
            validation_loader(directory, manifest, data, row_tokens, place, "test"),
            config.mask_token_id,
            window,
            data.max_length,
            place,
        )
        if has_test
        else None
    )
    flops = work.training_flops(config)
    result = {
        "run": str(run),
        "step": step,
        "finished": True,
        "val_loss": val_loss,
        "test_loss": test_loss,
        "seconds": clock.seconds,
        "flops": flops,
        "work": dataclasses.asdict(work),
        "parameters": parameters,
    }

    def finish() -> None:
        def write(into: Path) -> None:
            save_model(into, model, tokenizer)
            (into / "README.md").write_text(
                MODEL_CARD.format(
                    name=train.hf_model_name or run.name,
                    layers=config.num_hidden_layers,
                    hidden=config.hidden_size,
                    parameters=parameters / 1e6,
                    val_loss=val_loss,
                    tokens=work.tokens,
                    flops=flops,
                    minutes=clock.seconds / 60,
                    world_size=place.world_size,
                    device=environment(place)["device"],
                    source=json.dumps(manifest["source"]),
                    mask=getattr(tokenizer, "mask_token", "[MASK]"),
                ),
                encoding="utf-8",
            )

        save_folder(run / "model", write)
        close_log(log, {**result, "model_sha256": sha256_of(run / "model" / "model.safetensors")})
        draw_curves(run)
        log.bar.close()
        print(
            f"\nvalidation loss  {val_loss:.4f}   (unigram frequencies alone: {validation['unigram_loss']:.4f}; below that, the model uses context)"
        )
        if test_loss is not None:
            print(f"test loss        {test_loss:.4f}")
        print(
            f"tokens           {work.tokens:,}\nmodel FLOPs      {flops:.3e}\ntraining time    {clock.seconds:.1f} s"
            f"\nlog              {run / 'log.txt'}\nmodel            {run / 'model'}"
        )
        if tokenizer is not None:
            print("\n".join(answers(model, tokenizer, device)))
        if hub:
            hub.push(run / "model", "main")
            for command in hub.finish():
                print(f"not pushed, kept on disk; push it later with:  {command}")
        if wandb_run is not None:
            wandb_run.finish()

    place.on_first(finish)
    return result


def main(argv: list[str] | None = None) -> None:
    preset, values = parse_flags(
        {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig}, PRESETS, argv, __doc__, default_preset="base"
    )
    data, train = DataConfig(**values["data"]), TrainConfig(**values["train"])
    with processes() as place:
        train_model(place, preset, data, train, values["model"], sys.argv if argv is None else ["trainer.py", *argv])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
