"""Pretrains KBERT on packed rows of whole documents, by masked language modelling or replaced-token detection.

    laptop, no data   torchrun --standalone --nproc_per_node=1 trainer.py --preset micro
    one GPU           python data/download_fineweb_edu.py --num_chunks 120
                      torchrun --standalone --nproc_per_node=1 trainer.py
    eight GPUs        torchrun --standalone --nproc_per_node=8 trainer.py

`--help` lists every setting with its unit. A run leaves logs/RUN/ with log.txt, metrics.jsonl, config.yaml (`--config`
repeats the run), curves.png, checkpoints/ and model/, the finished model in Hugging Face form. The same rows make up
the same steps on any number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, set_loader
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from dataloading import (
    InputError,
    Loader,
    Row,
    count_text,
    data_hash,
    describe_validation,
    first_line,
    read_manifest,
    sha256_of,
    usable_cores,
)
from model import PRESETS as MODEL_PRESETS
from model import KBERTConfig, KBERTForMaskedLM, compiled_backend, option
from objectives import MaskedLM, ReplacedTokenDetection, mask_count
from optimizer import POLAR_EXPRESS, Optimizer, all_gather, reduce_scatter
from records.log import Clock, RunLog, Work, cut_log, environment, log_line, peak_flops, read_code
from records.plot import draw_curves

ROOT = Path(__file__).resolve().parent
SAMPLE = "data/sample"  # built from the documentation of the installed packages where it is missing
# What a log carries, and --extract lays out to run again: this file and all that it imports from here
MODULES = (
    "trainer.py",
    "objectives.py",
    "model.py",
    "optimizer.py",
    "dataloading.py",
    "records/log.py",
    "records/plot.py",
)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

MaskRate = restricted_number_type("MaskRate", float, [(">", 0), ("<=", 1)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**24)])  # random_of packs it into 64 bits
PolarSteps = restricted_number_type("PolarSteps", int, [(">=", 1), ("<=", len(POLAR_EXPRESS))])


@dataclass
class DataConfig:
    dir: str = option("data/fineweb_edu", "folder of shards with their manifest.json and tokenizer/")
    max_length: PositiveInt = option(1024, "tokens in a document, [CLS] and [SEP] included; longer ones are cut")
    valid_tokens: PositiveInt = option(10_000_000, "tokens of text in the validation set, and in the final test set")
    verify: bool = option(True, "check each shard against its hash in the manifest when it is first opened")


@dataclass
class TrainConfig:
    """What is learned, how long, how much at once, how fast, and what is kept."""

    objective: Literal["mlm", "rtd"] = option(
        "mlm", "mlm: find masked words; rtd: tell words that a generator replaced"
    )
    # As published: half the layers (DeBERTaV3, He et al. 2021), weight 50 and 15% replaced (ELECTRA, Clark et al. 2020)
    generator_layers: PositiveInt | None = option(None, "layers of rtd's generator; none: half the model's")
    detection_weight: PositiveFloat = option(50.0, "detector's loss weight; the generator's is 1")
    steps: PositiveInt = option(10_000, "optimizer steps")
    max_minutes: PositiveFloat | None = option(None, "minutes of training time; replaces steps in the schedules")
    epochs: PositiveFloat | None = option(None, "passes over the training text, at most; replaces steps likewise")
    max_words: PositiveFloat | None = option(None, "words of text to show, at most; replaces steps likewise")
    batch_tokens: PositiveInt = option(1_048_576, "tokens in an optimizer step, over all ranks, padding included")
    row_tokens: PositiveInt | None = option(None, "tokens in one forward; none: 8192 on a CPU, what fits on a GPU")
    grad_accum: PositiveInt | None = option(None, "rows of each rank in a step; none: as batch_tokens asks")
    batch_start: ClosedUnitInterval = option(
        1.0, "fraction of batch_tokens in the first steps, in whole rows of each rank"
    )
    batch_ramp: ClosedUnitInterval = option(
        0.0, "fraction of the run in which the batch grows, in quarters, to the full"
    )

    muon_lr: float = option(0.03, "learning rate of the blocks' matrices, in spectral norm")
    muon_weight_decay: float = option(1.0, "cautious weight decay of the matrices; times lr^2 at each step")
    muon_momentum: ClosedUnitInterval = option(0.95, "Muon's momentum, per step, between its warm-up and the end")
    muon_beta2: ClosedUnitInterval = option(0.95, "decay of NorMuon's second moment, per step")
    muon_polar_steps: PolarSteps = option(5, "steps of the iteration that orthogonalises an update, 1 to 5")
    embed_lr: float = option(0.008, "learning rate of the embedding and tied head")
    embed_betas: tuple[float, float] = option((0.7, 0.95), "Adam's betas for the embedding, per step")
    scalar_lr: float = option(0.01, "learning rate of everything else")
    scalar_betas: tuple[float, float] = option((0.9, 0.95), "Adam's betas for everything else, per step")
    adam_eps: float = option(1e-10, "Adam's epsilon")

    lr_schedule: Literal["trapezoid", "one_cycle", "cosine"] = option("trapezoid", "shape of the learning rate")
    lr_warmup: ClosedUnitInterval = option(0.02, "fraction of the run in which the learning rate rises from 0")
    lr_decay: ClosedUnitInterval = option(0.5, "fraction of the run in which a trapezoid falls to the floor")
    lr_decay_shape: Literal["linear", "sqrt"] = option("linear", "how a trapezoid falls: linear, or 1 - sqrt")
    lr_floor: ClosedUnitInterval = option(0.05, "fraction of the learning rate at the end")
    momentum_warmup: ClosedUnitInterval = option(0.1, "fraction of the run in which Muon's momentum leaves 0.85")
    mask_rate_start: MaskRate = option(0.30, "fraction of a row that is masked at the start (mlm)")
    mask_rate_end: MaskRate = option(0.15, "fraction of a row that is masked at the end (mlm)")
    replace_rate: MaskRate = option(0.15, "fraction of a row that the generator fills (rtd)")
    window_start: PositiveInt | None = option(None, "tokens in the first local window, grown by 64s; none: the model's")

    valid_every: NonNegativeInt = option(250, "steps between validations; 0: only at the end")
    log_every: PositiveInt = option(10, "steps between log lines; each waits for the GPU")
    save_every: NonNegativeInt = option(0, "steps between checkpoints; 0: none but that of an interruption")
    keep_checkpoints: PositiveInt = option(2, "checkpoints that stay on disk")
    save_words: tuple[float, ...] | float | None = option(
        (), "words shown at which to keep, and push, the model: 1e6, or 1e6,2e6, or none"
    )
    resume: str | None = option(None, "a checkpoint's folder, or auto: the newest of run_name or of any unfinished run")
    start_afresh: bool = option(False, "with resume auto: if every checkpoint of the run is damaged, start it again")
    out: str = option("logs", "folder of runs")
    run_name: str | None = option(None, "folder of this run within out; none: date and time")
    declared_runs: PositiveInt | None = option(
        None, "runs declared for a record (records/README.md), of seeds 1, 2, ..."
    )
    seed: Seed = option(1, "of initial weights, order of data and masks")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train; auto: on GPUs where there are any")
    compile: bool = option(True, "torch.compile; where that cannot work, a run says so and is eager")
    deterministic: bool = option(False, "on a GPU, kernels that give the same bits each time, or an error")
    timeout_minutes: PositiveFloat = option(10.0, "minutes that ranks wait for each other before they give up")
    hf_model_name: str | None = option(
        None, "USER/NAME on the Hub: checkpoints, or models at save_words, as branches, the model as main"
    )
    hub_minutes: PositiveFloat = option(2.0, "minutes that the Hub may be silent before an upload is given up")
    wandb_project: str | None = option(None, "Weights & Biases project to report to (needs `pip install wandb`)")

    def __post_init__(self):
        if not isinstance(self.save_words, tuple):
            self.save_words = () if self.save_words is None else (self.save_words,)
        if self.declared_runs is not None and not 1 <= self.seed <= self.declared_runs:
            raise InputError(
                f"--train.seed {self.seed} is not one of the {self.declared_runs} declared runs: "
                f"their seeds are 1 to {self.declared_runs}"
            )
        if (self.batch_start < 1) != (self.batch_ramp > 0):
            raise InputError("--train.batch_start and --train.batch_ramp need each other: from where, and for how long")
        if self.row_tokens is not None and self.row_tokens % 128:
            nearest = max(128, self.row_tokens // 128 * 128)
            raise InputError(f"--train.row_tokens {self.row_tokens} is not a multiple of 128: try {nearest}")


def shape(preset: str) -> dict:
    return {f"model.{name}": value for name, value in MODEL_PRESETS[preset].items()}


PRESETS = {
    "micro": {  # minutes on a CPU: small steps, a long decay, many masks, a short memory (records/notebook.md)
        **shape("micro"),
        "data.dir": SAMPLE,
        "data.max_length": 256,
        "data.valid_tokens": 100_000,
        "train.steps": 400,
        "train.row_tokens": 4096,
        "train.batch_tokens": 4096,
        "train.lr_decay": 0.9,
        "train.lr_warmup": 0.0,  # its first step would be one of rate zero
        "train.mask_rate_start": 0.40,
        "train.mask_rate_end": 0.30,
        "train.detection_weight": 10.0,
        "train.generator_layers": 1,
        "train.replace_rate": 0.40,
        # With 1,400 words to guess in a step, a rare word's gradient is noise: one occurrence gives 7e-4
        "train.adam_eps": 1e-4,
        "train.muon_momentum": 0.85,
        "train.muon_polar_steps": 3,
        "train.valid_every": 100,
        "train.log_every": 1,
    },
    "small": shape("small"),
    "base": shape("base"),
    "large": {**shape("large"), "train.muon_lr": 0.02, "train.embed_lr": 0.006},
}
PRESETS["babylm"] = {  # micro's model and rates, found on runs a hundredth as long; run here to 30M words
    **PRESETS["micro"],
    "data.dir": "data/babylm",
    # The rules of the strict-small track: at most ten passes and 100M words, and a model after each of these
    "train.epochs": 10,
    "train.max_words": 100e6,
    # The strict track, of up to 1,000M, asks for those after 100M too
    "train.save_words": tuple(n * 1e6 for n in (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))),
    "train.valid_every": 1000,
    "train.save_every": 1000,
    "train.log_every": 50,  # three logs of ten passes fit into a record's 2 MB
}

# ---------------------------------------------------------------------------------------------------------------------
# Flags: dotted names for the documented fields of dataclasses


class Parser(ArgumentParser):
    """Says what is wrong with a flag in one line, and exits with 2."""

    never_none: tuple[str, ...] = ()  # dotted names of settings that always have a value

    def error(self, message: str, ex: Exception | None = None) -> None:
        said = re.sub(r'^Parser key "(.+?)":', r"--\1:", " ".join(str(message).split()))
        self.exit(2, f"error: {said} (--help lists every setting)\n")


def read_value(text: str) -> object:
    """A flag's value, or a whole config file: YAML, where `none` is None too, and `0.7,0.95` a list."""
    if text.lower() == "none":
        return None
    return yaml.safe_load(f"[{text}]" if re.fullmatch(r"[\d.e+-]+(,[\d.e+-]+)+", text) else text)


def make_parser(description: str, groups: dict[str, type]) -> Parser:
    """groups: {"train": TrainConfig} makes a flag --train.NAME of each field that has a help text."""
    set_loader("kbert", read_value, exceptions=(yaml.YAMLError,))
    parser = Parser(
        description=description,
        usage="%(prog)s [--preset NAME] [--GROUP.NAME VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parser_mode="kbert",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="settings in YAML, such as a run's config.yaml"
    )
    for group, cls in groups.items():
        box = parser.add_argument_group(f"--{group}.*")
        annotations = inspect.get_annotations(cls, eval_str=True)  # get_type_hints fails on transformers' own classes
        for field in option_fields(cls):
            kind = annotations[field.name]
            switch = {"nargs": "?", "const": True} if kind is bool else {}
            said = f"{field.metadata['help']} [{field.default}]".replace("%", "%%")
            name = f"{group}.{field.name}"
            if type(None) not in get_args(kind):
                parser.never_none += (name,)
            box.add_argument(f"--{name}", type=kind, default=field.default, metavar="X", help=said, **switch)
    return parser


def config_first(argv: list[str]) -> list[str]:
    """With --config FILE before all other flags, which override it wherever it stands."""
    files, others, rest = [], [], iter(argv)
    for text in rest:
        part = files if text.split("=")[0] == "--config" else others
        part += [text, *islice(rest, text == "--config")]
    return files + others


def option_fields(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


def parse_flags(parser: Parser, argv: list[str], named: dict[str, dict[str, dict]]) -> tuple[dict, set[str]]:
    """The settings, {"train": {"steps": 400, ...}, ...}, and the dotted names of those that argv or a --config gives.

    named: {"preset": PRESETS} has --preset micro set what PRESETS["micro"] says, {"train.steps": 400, ...}; later flags
    of `named` override earlier ones, and single settings override both. Unknown flags and values end the program.
    """
    argv = config_first(argv)
    try:
        given = parser.parse_args([text for text in argv if not text.startswith("--print_config")], defaults=False)
    except UnicodeDecodeError as error:
        parser.error(f"--config: {error}")
    for flag, choices in named.items():
        parser.set_defaults(choices[given.get(flag) or parser.get_default(flag)])
    parsed = parser.parse_args(argv)
    if empty := [name for name in parser.never_none if parsed[name] is None]:  # which YAML may leave
        parser.error(f"--{empty[0]} has no value")
    settings = plain(parsed.as_dict())
    del settings["config"]
    return settings, {name for name, _ in given.items()}


def plain(value: object) -> object:
    """Without the parser's number types, which the compiler and YAML do not know."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return value._type(value) if hasattr(value, "_type") else value


def write_settings(folder: Path, settings: dict) -> None:
    """config.yaml: what --config takes to repeat a run, and what says which run a folder holds."""
    text = yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False, width=120)  # tuples become lists
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def read_settings(folder: Path) -> dict:
    """What a run's config.yaml says; {} where it is missing or damaged."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress, which goes from 0 to 1 with the steps, the minutes or the text of the run


def lr_factor(progress: float, c: TrainConfig) -> float:
    warm = min(1.0, progress / c.lr_warmup) if c.lr_warmup else 1.0
    if c.lr_schedule == "trapezoid":  # where rise and fall overlap, the lower of them
        fallen = 1 - (1 - progress) / c.lr_decay if progress > 1 - c.lr_decay else 0.0
        fallen = math.sqrt(fallen) if c.lr_decay_shape == "sqrt" else fallen
        return min(warm, c.lr_floor + (1 - c.lr_floor) * (1 - fallen))
    if warm < 1:
        return warm
    left = (1 - progress) / max(1e-9, 1 - c.lr_warmup)  # of what follows the warm-up
    if c.lr_schedule == "one_cycle":  # up, then down, without a flat part
        return c.lr_floor + (1 - c.lr_floor) * left
    return c.lr_floor + (1 - c.lr_floor) * 0.5 * (1 + math.cos(math.pi * (1 - left)))


def muon_momentum(progress: float, c: TrainConfig) -> float:
    """0.85, up to muon_momentum over the warm-up, and back in the last 2% of the run."""
    warm = min(1.0, progress / c.momentum_warmup) if c.momentum_warmup else 1.0
    return 0.85 + (c.muon_momentum - 0.85) * min(warm, (1 - progress) / 0.02)


def mask_rate(progress: float, c: TrainConfig) -> float:
    if c.objective == "rtd":
        return c.replace_rate
    return c.mask_rate_start + (c.mask_rate_end - c.mask_rate_start) * progress


def batch_factor(progress: float, c: TrainConfig) -> float:
    """Fraction of batch_tokens: batch_start, then in quarters of the way up to 1."""
    if progress >= c.batch_ramp:
        return 1.0
    return c.batch_start + (1 - c.batch_start) * math.floor(4 * progress / c.batch_ramp) / 4


def local_window(progress: float, c: TrainConfig, full: int) -> int:
    """Tokens in the local attention window, half of them to each side; full in the last third of the run."""
    start = full if c.window_start is None else c.window_start
    return min(full, math.ceil((start + (full - start) * progress * 1.5) / 64) * 64)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class Process:
    """One of the processes that train together, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], object]) -> object:
        """Runs `work` on rank 0 alone and hands its result to all; what it raises, every rank raises."""
        result, error, defect = None, None, None
        if self.is_main:
            try:
                result = work()
            except InputError as found:
                error = found
            except (OSError, SafetensorError) as found:  # a full disk is either
                error = InputError(str(found))
            except Exception as found:  # a defect of ours: the others must not wait for rank 0
                defect, error = found, InputError(f"rank 0 failed: {type(found).__name__}: {first_line(found)}")
        if self.world_size > 1:
            shared = [result, error]
            dist.broadcast_object_list(shared, src=0)
            result, error = shared
        if error:
            raise defect or error
        return result

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over ranks, in fp64."""
        return self.reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """The largest of each over ranks."""
        return self.reduce(values, dist.ReduceOp.MAX)

    def reduce(self, values: tuple[float, ...], operation: dist.ReduceOp) -> list[float]:
        if self.world_size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, operation)
        return together.tolist()


@contextlib.contextmanager
def join_processes(device: str = "auto", timeout_minutes: float = 10) -> Iterator[Process]:
    """Joins torchrun's process group, if there is one: NCCL between GPUs, gloo between CPUs and for small messages.

    The group is left after a clean end only: a rank that fails exits at once, and torchrun ends those that wait for it.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(name, names[name])) for name in names)
    if choose_cuda(device):
        gpus = torch.cuda.device_count()
        if local_world_size > gpus:
            raise InputError(
                f"--nproc_per_node={local_world_size} asks for more GPUs than the {gpus} of this machine: "
                f"start again with --nproc_per_node={gpus}"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
        # torchrun sets OMP_NUM_THREADS=1 for several processes; for one it is the user's
        if local_world_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // local_world_size))
        keep_freed_memory()
    try:
        if world_size > 1:
            join_group(place, rank, world_size, timedelta(minutes=timeout_minutes))
        yield Process(rank, world_size, place)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise InputError(
            f"rank {rank} waits in vain for the others ({first_line(error)}): one is gone, or has not answered for the "
            f"{timeout_minutes:g} minutes of --train.timeout_minutes; resume the run"
        ) from error
    if world_size > 1:
        dist.destroy_process_group()


def join_group(place: torch.device, rank: int, world_size: int, timeout: timedelta) -> None:
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart: without a prefix, ranks may wait at addresses of those gone (pytorch#135712)
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # NCCL connects, and takes its memory, at the first call of each kind: now, before a row is tried for size
    whole = torch.zeros(world_size << 20, device=place)
    share = whole[: 1 << 20].clone()
    try:
        dist.all_reduce(share)
        reduce_scatter(share, whole)
        all_gather(whole, share)
    except dist.DistBackendError as error:
        raise InputError(
            f"NCCL cannot connect rank {rank} with the others ({' '.join(str(error).split())}): try again with "
            "`export NCCL_DEBUG=WARN`; a container needs shared memory, by --ipc=host or --shm-size=1g"
        ) from error


def choose_cuda(device: str) -> bool:
    """Whether to run on GPUs. Raises InputError where there is one that this torch cannot use."""
    if device == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    driver = Path("/proc/driver/nvidia/version")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if device == "cuda" or (driver.exists() and not hidden):
        known = driver.read_text().splitlines()[0] if driver.exists() else "no NVIDIA driver"
        raise InputError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use ({known}): update "
            "the driver, install a torch built for it (pytorch.org/get-started), or train with --train.device cpu"
        )
    return False


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C ask the run to stop: their numbers, as they come. A second Ctrl-C ends it at once."""
    signals: list[int] = []

    def note(number: int, _) -> None:
        signals.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees: returning it and faulting it in again costs much of a CPU's step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def why_eager(device: torch.device) -> str | None:
    """What keeps torch.compile from working on this device, and how to fix it; None where nothing does."""
    cuda = device.type == "cuda"
    if cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "GPUs before Ampere have no bf16, so that all runs in fp32"
    usual = ["cl"] if sys.platform == "win32" else ["gcc", "clang", "cc"] if cuda else ["g++", "clang++", "c++"]
    chosen = os.environ.get("CC" if cuda else "CXX")
    if not any(shutil.which(name) for name in [chosen, *usual] if name):
        return f"no C{'' if cuda else '++'} compiler found: install {'gcc' if cuda else 'g++'}"
    if cuda and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h found, which Triton needs: install python3-dev"
    return None


def compute_dtype(device: torch.device) -> torch.dtype:
    """Of activations in training."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float32 if old else torch.bfloat16


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
            path.chmod(0o644)  # safetensors writes for the owner alone
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_model(folder: Path, model: PreTrainedModel, tokenizer, weights: dict[str, Tensor] | None = None) -> None:
    """In the form that from_pretrained reads, with the tokenizer if there is one.

    weights: where the model's own are not what is to be saved.
    """
    model.save_pretrained(folder, state_dict=weights)
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # of this machine, not of the model
        settings.pop(name, None)
    settings["model_max_length"] = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints_of(run: Path) -> list[Path]:
    """step-NNNNNN folders of a run, the earliest first."""
    found = (path for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=checkpoint_step)


def write_hashes(folder: Path) -> None:
    """SHA256SUMS, of all files in a folder; `sha256sum -c` reads it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(hashes), encoding="utf-8")


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by the hashes that it carries; None where nothing is."""
    try:
        text = (checkpoint / "SHA256SUMS").read_text(encoding="utf-8")
        hashes = {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}
        for name in {"state.json", "model.safetensors", "optimizer.safetensors", *hashes}:
            if sha256_of(checkpoint / name) != hashes[name]:
                return f"{name} is not as it was written"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read: {error.strerror}"
    except (KeyError, ValueError):
        return "SHA256SUMS is not as it was written"
    return None


def is_finished(run: Path, product: str = "model") -> bool:
    """Whether it has what it makes, and its log the result, which is written last."""
    log = run / "log.txt"
    return (run / product).exists() and log.exists() and b"\n=== result\n" in log.read_bytes()


def find_checkpoint(resume: str, out: Path, run_name: str | None, start_afresh: bool = False) -> Path | None:
    """The folder to resume from. auto: the newest that is whole, None when there is nothing to resume."""
    if resume != "auto":
        if wrong := damage_of(Path(resume)):
            raise InputError(
                f"--train.resume {resume} is not a checkpoint that is whole ({wrong}): "
                "give another folder logs/RUN/checkpoints/step-NNNNNN, or auto"
            )
        return Path(resume)
    runs = [out / run_name] if run_name else [run for run in out.glob("*") if not is_finished(run)]
    saved = [found for run in runs if (found := checkpoints_of(run))]
    newest = max(saved, key=lambda checkpoints: checkpoints[-1].stat().st_mtime, default=[])
    for checkpoint in reversed(newest):
        wrong = damage_of(checkpoint)
        if not wrong:
            return checkpoint
        print(f"{checkpoint} is damaged: {wrong}")
    if newest and not start_afresh:
        raise InputError(
            f"no checkpoint of {newest[0].parent.parent} is whole: "
            "--train.start_afresh true sets them aside and starts the run again"
        )
    return None


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Moves the checkpoints after `step` to abandoned/, where nothing resumes or deletes them."""
    aside, moved = run / "abandoned", []
    for path in checkpoints_of(run):
        if checkpoint_step(path) > step:
            aside.mkdir(exist_ok=True)
            taken = len(list(aside.glob(f"{path.name}*")))
            moved.append(path.rename(aside / (f"{path.name}-{taken}" if taken else path.name)))
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face Hub: in the background; no failure ends a run


TO_PUSH = "to_push"  # in a run's folder: what the Hub lacks, one folder per branch


def unpushed(run: Path) -> list[Path]:
    return sorted(path for path in (run / TO_PUSH).glob("*") if path.suffix != ".tmp")


class HubPusher:
    """Uploads folders of a run. What could not be uploaded stays on disk, with the command that uploads it later."""

    def __init__(self, name: str, minutes: float):
        """minutes: that the Hub may be silent."""
        self.name, self.minutes, self.api = name, minutes, huggingface_hub.HfApi()
        self.pending: list[tuple[Path, str, Future]] = []

    def check(self) -> None:
        """Checks token and name before training starts, and which branches there are. Raises InputError."""
        try:
            self.set_timeout()
            self.api.whoami()
            self.api.create_repo(self.name, exist_ok=True)
            self.branches = {branch.name for branch in self.api.list_repo_refs(self.name).branches}
        except Exception as error:  # whatever the Hub or the network has to say
            raise InputError(
                f"cannot push to {self.name} on the Hugging Face Hub ({type(error).__name__}: {self.why(error)}): "
                "run `hf auth login` with a token that may write there, or drop --train.hf_model_name"
            ) from error

    def set_timeout(self) -> None:
        """By default, the client waits forever for an answer."""
        huggingface_hub.get_session().timeout = 60 * self.minutes

    def push(self, folder: Path, revision: str) -> None:
        """Starts uploading; the folder is the pusher's from now on."""
        self.pending.append((folder, revision, self.api.run_as_future(self.upload, folder, revision)))

    def upload(self, folder: Path, revision: str) -> None:
        self.set_timeout()
        if revision != "main":
            self.api.create_branch(self.name, branch=revision, exist_ok=True)
        is_copy = folder.parent.name == TO_PUSH
        if is_copy and not folder.exists():  # it went already: a resumed run may push a folder twice
            return
        said = f"KBERT {revision}"
        self.api.upload_folder(repo_id=self.name, folder_path=folder, revision=revision, commit_message=said)
        if is_copy:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Waits for the uploads, and prints a command for each that failed."""
        for folder, revision, future in self.pending:
            try:
                future.result()
            except Exception as error:
                said = f"warning: pushing {folder} to {self.name} failed ({self.why(error)})"
                print(f"{said}\n{self.how_to_push(folder, revision)}")
        self.pending.clear()

    def why(self, error: Exception) -> str:
        silent = "Timeout" in type(error).__name__
        return f"no answer for the {self.minutes:g} minutes of --train.hub_minutes" if silent else first_line(error)

    def how_to_push(self, folder: Path, revision: str) -> str:
        command = shlex.join(["hf", "upload", self.name, str(folder), ".", "--revision", revision])
        return f"not pushed, kept on disk; push it later with:  {command}"


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer, compiled


def model_config(specials: dict, max_length: int, values: dict) -> KBERTConfig:
    """A model for the tokenizer of a manifest. Raises InputError for a shape that cannot be."""
    ids = {f"{name}_token_id": specials[name] for name in ("pad", "cls", "sep", "mask")}
    try:
        return KBERTConfig(vocab_size=specials["vocab_size"], max_position_embeddings=max_length, **ids, **values)
    except ValueError as error:
        raise InputError(str(error)) from error


def make_objective(config: KBERTConfig, train: TrainConfig, max_length: int) -> MaskedLM | ReplacedTokenDetection:
    if train.objective == "mlm":
        return MaskedLM(config, train.seed, max_length)
    if train.generator_layers is None:  # settled in the settings, so that log, config.yaml and checkpoints say it
        train.generator_layers = -(-config.num_hidden_layers // 2)
    return ReplacedTokenDetection(config, train.seed, max_length, train.generator_layers, train.detection_weight)


def make_optimizer(
    network: nn.Module, config: KBERTConfig, train: TrainConfig, process: Process, compiled: bool
) -> Optimizer:
    theirs = inspect.signature(Optimizer).parameters  # its settings have the names of ours
    settings = {name: value for name, value in vars(train).items() if name in theirs}
    settings |= {"weight_multiplier": config.weight_multiplier, "compiled": compiled}
    return Optimizer(network, rank=process.rank, world_size=process.world_size, **settings)


def warm_up(objective: MaskedLM | ReplacedTokenDetection, train: TrainConfig, row_tokens: int, max_length: int) -> None:
    """Compiles forward and backward for every window of the run, on made-up documents; leaves gradients behind.

    With as many masked positions as the run will ever have, so that a row which fits here fits throughout.
    """
    config = objective.model.config
    token = torch.arange(row_tokens, device=objective.model.device, dtype=torch.int32)
    row = Row(
        index=0,
        input_ids=token * 31 % config.vocab_size,
        document_ids=token // max_length,
        positions=token % max_length,
        text=torch.ones_like(token, dtype=torch.bool),
        **dict.fromkeys(("offsets", "round_text", "round_lengths", "state")),  # no loss reads them
    )
    most = mask_count(max(mask_rate(0, train), mask_rate(1, train)), row_tokens)
    windows = sorted({local_window(permille / 1000, train, config.local_attention_window) for permille in range(1001)})
    for window in [*windows, windows[-1]]:  # twice at least: from the second row on, gradients take memory already
        objective.loss(row, most, window, targets=1, text=1)[0].backward()


def candidate_rows(train: TrainConfig, process: Process) -> list[int]:
    """Tokens that a row may have, the largest first: those that divide the batch. Raises InputError if none does."""
    sizes = [65536, 49152, 32768, 16384, 8192] if process.device.type == "cuda" else [8192]
    sizes = [train.row_tokens] if train.row_tokens is not None else sizes
    if train.grad_accum is not None:
        return sizes
    if fitting := [size for size in sizes if train.batch_tokens % (size * process.world_size) == 0]:
        return fitting
    step = sizes[-1] * process.world_size
    raise InputError(
        f"--train.batch_tokens {train.batch_tokens} is not a multiple of row_tokens x ranks = {sizes[-1]} x "
        f"{process.world_size}: use --train.batch_tokens {max(1, round(train.batch_tokens / step)) * step} "
        "or set --train.grad_accum"
    )


def fit_row_tokens(sizes: list[int], process: Process, attempt: Callable[[int], None]) -> int:
    """The first of `sizes` that fits on every rank. attempt: a forward and backward, without communication."""
    margin = 2**31 if len(sizes) > 1 and process.device.type == "cuda" else 0  # bytes: memory fragments in a long run
    for size in sizes:
        failed, _spare = 0.0, None
        try:
            _spare = torch.empty(margin, dtype=torch.uint8, device=process.device)
            attempt(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the compiler, NCCL and cuBLAS raise others
            if not re.search("out of memory|alloc_failed", str(error), re.IGNORECASE):
                raise
            failed = 1.0
        if not process.sum(failed)[0]:
            return size
        gc.collect()
        torch.cuda.empty_cache()
    raise InputError(f"rows of {sizes[-1]} tokens do not fit into this GPU's memory: lower --train.row_tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The run


class RunFinished(InputError):
    """There is nothing left to do."""


def locate_data(name: str, process: Process) -> Path:
    """The folder as named; data/sample is the checkout's wherever the command runs, and is built if missing."""
    sample = ROOT / SAMPLE

    def locate() -> Path:
        if name != SAMPLE or (Path(name) / "manifest.json").exists():
            return Path(name)
        if not (sample / "manifest.json").exists():
            from data.make_sample import make_sample

            print(f"no {SAMPLE}: building it from the documentation of the installed packages")
            make_sample(sample)
        return sample

    return process.on_main(locate)


def is_due(step: int, every: int) -> bool:
    """Whether something is to be done after this step; never where `every` is 0."""
    return every > 0 and step % every == 0


class Run:
    """One pretraining: set up, trained, and finished by the methods below, in this order."""

    def __init__(self, process: Process, settings: dict, argv: list[str], code: dict[str, str]):
        """settings: as parse_flags gives them. code: read_code() of when the program started."""
        self.process, self.argv, self.code = process, argv, code
        self.preset, self.model_values = settings["preset"], settings["model"]
        self.data, self.train = DataConfig(**settings["data"]), TrainConfig(**settings["train"])
        self.open_data()
        self.open_folder()
        self.build_model()
        self.restore()
        self.text_limit, self.log = self.limit_of_text(), None
        planned = self.train.max_minutes is None and math.isinf(self.text_limit)
        self.steps = self.train.steps if planned else None
        if not process.on_main(self.open_log):
            self.validated_step = -1  # a new log lacks the validation of this step: repeat it, if one is due

    # --- set-up

    def open_data(self) -> None:
        self.directory = locate_data(self.data.dir, self.process)
        self.manifest = self.process.on_main(lambda: read_manifest(self.directory))
        self.epoch_text, self.words_per_token = count_text(self.manifest)
        if self.words_per_token is None and (self.train.max_words or self.train.save_words):
            raise InputError(
                f"{self.directory / 'manifest.json'} does not count the words of its shards, which --train.max_words "
                "and --train.save_words need: pack the text again with data/pack_fineweb_edu.py"
            )
        self.tokenizer = None
        if (self.directory / "tokenizer").exists():
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.directory / "tokenizer")
            except Exception as error:  # whatever transformers makes of a file that is damaged
                said = f"{type(error).__name__}: {first_line(error)}"
                raise InputError(
                    f"{self.directory / 'tokenizer'} is not a tokenizer ({said}): build or download the data again"
                ) from error

    def open_folder(self) -> None:
        """Where the run lives, which checkpoint it continues, and where else it reports to."""
        self.hub = HubPusher(self.train.hf_model_name, self.train.hub_minutes) if self.train.hf_model_name else None
        self.checkpoint, self.folder, self.saved = self.process.on_main(self.claim_folder)
        if self.saved and self.train.row_tokens is None:  # what fits may differ here: the rows must not
            self.train.row_tokens = self.saved["identity"]["row_tokens"]
        self.wandb = None
        if self.train.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise InputError("--train.wandb_project needs the package wandb: run `pip install wandb`") from error
            self.wandb = wandb
        if self.hub:
            self.process.on_main(self.open_hub)

    def claim_folder(self) -> tuple[Path | None, Path, dict | None]:
        """The checkpoint to resume, the run's folder, and what the checkpoint's state.json says."""
        train, out = self.train, Path(self.train.out)
        folder = out / (train.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{self.preset}")
        if train.resume == "auto" and is_finished(folder):
            resume = "give --train.resume one of its checkpoints" if checkpoints_of(folder) else "start another run"
            said = [f"{folder} is finished: to train on, {resume}"]
            if self.hub:
                said += [self.hub.how_to_push(path, path.name) for path in unpushed(folder)]
            raise RunFinished("\n".join(said))
        checkpoint = find_checkpoint(train.resume, out, train.run_name, train.start_afresh) if train.resume else None
        if checkpoint:
            checkpoint = Path(os.path.abspath(checkpoint))
            run = checkpoint.parent.parent
            if checkpoint.parent.name not in ("checkpoints", "abandoned"):
                raise InputError(f"{checkpoint} is in no run's folder: copy it to logs/RUN/checkpoints of its run")
            if train.run_name and folder.resolve() != run.resolve():
                raise InputError(
                    f"{checkpoint} is of the run {run.name}, not of {train.run_name}: leave out --train.run_name, "
                    f"or copy {run} to {folder} and resume from there"
                )
            folder = run
        elif (folder / "log.txt").exists() and (folder / "log.txt").stat().st_size > 0:
            if train.resume != "auto":
                raise InputError(
                    f"{folder} holds a run already: choose another --train.run_name, "
                    "or continue it with --train.resume auto"
                )
            print(f"{folder} has no checkpoint to resume: starting afresh; its log goes to {folder / 'abandoned'}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()  # says now, not in an hour, that this place cannot be written
        saved = json.loads((checkpoint / "state.json").read_text()) if checkpoint else None
        return checkpoint, folder, saved

    def open_hub(self) -> None:
        """Also pushes what a killed run left, and models of save_words from before it had a repository."""
        self.hub.check()
        for path in self.folder.glob("words/chck_*M"):
            if path.name not in self.hub.branches:
                self.to_push(path.name, partial(shutil.copytree, path, dirs_exist_ok=True))
        for path in unpushed(self.folder):
            self.hub.push(path, path.name)

    def build_model(self) -> None:
        """Compiles, and measures what fits."""
        train, process = self.train, self.process
        torch.manual_seed(train.seed)
        torch.set_float32_matmul_precision("high")
        if train.deterministic and process.device.type == "cuda" and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
            raise InputError("--train.deterministic true needs `export CUBLAS_WORKSPACE_CONFIG=:4096:8`")
        torch.use_deterministic_algorithms(train.deterministic)
        self.config = model_config(self.manifest["tokenizer"], self.data.max_length, self.model_values)
        self.objective = make_objective(self.config, train, self.data.max_length)
        self.parameters = self.objective.model.num_parameters()  # of what is kept: a generator is not
        obstacle = why_eager(process.device)
        self.compiled = train.compile and obstacle is None
        if self.compiled and compiled_backend(process.device) == "flex" and self.config.head_dim < 16:
            raise InputError(
                f"heads are {self.config.head_dim} wide, and a GPU's attention needs 16: lower "
                f"--model.num_attention_heads to {self.config.hidden_size // 16} at most"
            )
        if train.compile and obstacle and process.is_main:
            print(f"running eagerly, several times slower: {obstacle}")
        self.objective.prepare(process.device, compute_dtype(process.device), self.compiled)
        self.optimizer = make_optimizer(self.objective.network, self.config, train, process, self.compiled)

        def attempt(row_tokens: int) -> None:
            self.objective.network.zero_grad(set_to_none=True)
            warm_up(self.objective, train, row_tokens, self.data.max_length)

        started = time.perf_counter()
        self.row_tokens = fit_row_tokens(candidate_rows(train, process), process, attempt)
        self.optimizer.step(lr_factor=0.0, momentum=0.0)  # compiles the rest, and moves nothing
        self.optimizer.reset()
        self.compile_seconds = time.perf_counter() - started
        self.rows_per_rank = train.grad_accum or train.batch_tokens // (self.row_tokens * process.world_size)

    def restore(self) -> None:
        """Restores progress, from the checkpoint if any, and the loader that continues there."""
        process = self.process
        self.step, self.clock, self.work, self.loader_state = 0, Clock(process.device), Work(), None
        self.validated, self.validated_step = {}, -1  # val_loss and its kin, and when
        self.identity = self.identity_of_run()
        if self.checkpoint:
            self.load_checkpoint()
        self.resumed_step = self.step
        self.loader = self.loader_of("train", process, seed=self.train.seed, state=self.loader_state)
        self.valid_loader = self.validation_loader("valid", process)

    def identity_of_run(self) -> dict:
        """What a run has to share with the checkpoint that it continues."""
        return {
            "objective": self.train.objective,
            "generator_layers": self.train.generator_layers if self.train.objective == "rtd" else None,
            "model": {name: value for name, value in self.config.to_dict().items() if name != "transformers_version"},
            "data": data_hash(self.manifest),
            "seed": self.train.seed,
            "row_tokens": self.row_tokens,
            "max_length": self.data.max_length,
        }

    def load_checkpoint(self) -> None:
        state = self.saved
        here = json.loads(json.dumps(self.identity))
        if different := [name for name in here if state["identity"].get(name) != here[name]]:
            raise InputError(
                f"{self.checkpoint} was made with other settings ({', '.join(different)}): "
                "resume with those, or start a new --train.run_name"
            )
        self.objective.load(self.checkpoint)
        self.optimizer.load_state_dict(load_file(self.checkpoint / "optimizer.safetensors"))
        self.step, self.clock.seconds, self.loader_state = state["step"], state["seconds"], state["loader"]
        self.work = Work(**state["work"])
        self.validated, self.validated_step = state["validated"], state["validated_step"]

    def loader_of(self, split: str, process: Process, **more) -> Loader:
        """process: whose rows, and to which device. more: as Loader takes it."""
        sizes = self.row_tokens, self.data.max_length
        return Loader(self.directory, self.manifest, split, *sizes, verify=self.data.verify, **vars(process), **more)

    def validation_loader(self, split: str, process: Process) -> Loader:
        """The first valid_tokens of a split, in the order on disk."""
        return self.loader_of(split, process, seed=None, max_tokens=self.data.valid_tokens)

    def limit_of_text(self) -> float:
        """Tokens of text after which no step begins, so that none goes beyond epochs and max_words."""
        epochs, words = self.train.epochs, self.train.max_words
        most = math.inf if epochs is None else epochs * self.epoch_text
        most = most if words is None else min(most, words / self.words_per_token)
        step = self.rows_per_rank * self.row_tokens * self.process.world_size
        if most <= step:
            raise InputError(
                f"--train.epochs and --train.max_words leave {most:,.0f} tokens of text, less than the {step:,} that a "
                "step may have: lower --train.batch_tokens, --train.row_tokens or --train.grad_accum"
            )
        if self.work.text > most:
            raise InputError(
                f"{self.checkpoint} has been shown {self.work.text:,} tokens of text, more than the {most:,.0f} that "
                "--train.epochs and --train.max_words allow: resume with larger ones, or an earlier checkpoint"
            )
        return most - step

    def resolved(self) -> dict:
        """Every setting as this run has it."""
        return {
            "preset": self.preset,
            "data": dataclasses.asdict(self.data),
            "train": {**dataclasses.asdict(self.train), "row_tokens": self.row_tokens},
            "model": {field.name: getattr(self.config, field.name) for field in option_fields(KBERTConfig)},
        }

    def open_log(self) -> bool:
        """On rank 0 alone; returns whether it continues a log. What is newer than the checkpoint is set aside."""
        train, process = self.train, self.process
        for path in set_aside_later(self.folder, self.step if self.checkpoint else -1):
            print(f"going on from step {self.step}: a later checkpoint is set aside as {path}")
        continues = cut_log(self.folder, self.saved["log"] if self.checkpoint else {})
        if self.checkpoint and not continues:
            print(f"the log does not match {self.checkpoint}: set aside in {self.folder / 'abandoned'}")
        # As in the log's head, if that is kept: a second measurement would differ
        self.peak = self.saved["peak_flops"] if continues else peak_flops(process.device) * process.world_size
        run = self.wandb and self.wandb.init(project=train.wandb_project, name=self.folder.name, config=self.resolved())
        self.log = RunLog(self.folder, self.steps, self.step, run)
        alone = Process(0, 1, torch.device("cpu"))
        self.validation = describe_validation(self.directory, self.manifest, self.validation_loader("valid", alone))
        if not self.validation["masked_tokens"]:  # now, not when the run ends
            raise InputError("the validation set holds no text to mask: raise --data.valid_tokens or pack more text")
        if not continues:
            self.write_head()
        elif is_due(self.step, train.save_every):  # what the checkpoint's own line was, before it was cut
            self.log.section("saved", str(self.checkpoint))
        if self.checkpoint:
            self.log.section("resumed", "\n".join([self.checkpoint.name, *self.changes()]), echo=True)
            for count in train.save_words:
                if count <= self.words and not self.words_folder(count).exists():
                    self.log.write(f"note: {self.words:,.0f} words were shown before: none is kept after {count:,.0f}")
        return continues

    def changes(self) -> list[str]:
        """Settings that are not those that the checkpoint was written with."""
        before, now = self.saved["config"], json.loads(json.dumps(self.resolved()))
        of_this_start = ("resume", "start_afresh", "out", "run_name")
        ranks, saved_by = self.process.world_size, self.saved.get("world_size", self.process.world_size)
        changed = [] if ranks == saved_by else [f"ranks: {ranks}, before: {saved_by}"]
        for group in ("data", "train"):
            for name, value in now[group].items():
                if name not in of_this_start and value != before[group].get(name):
                    changed.append(f"{group}.{name}: {value}, before: {before[group].get(name)}")
        return changed

    def write_head(self) -> None:
        """config.yaml, and what the log says before its first line."""
        process = self.process
        repeat = self.resolved()
        for name in ("run_name", "resume", "start_afresh"):
            del repeat["train"][name]
        write_settings(self.folder, repeat)
        machine = environment(process.device, process.world_size)
        machine |= {"peak_flops": self.peak, "compiled": self.compiled}
        machine["compile_seconds"] = round(self.compile_seconds, 2)
        data = {
            "hash": data_hash(self.manifest),
            "tokenizer": self.manifest["tokenizer"]["sha256"],
            "vocab_size": self.config.vocab_size,
            "validation": self.validation,
            "text": {"tokens": self.epoch_text, "words_per_token": self.words_per_token},  # of an epoch
        }
        self.log.open(self.argv, self.resolved(), machine, data, self.code)
        embedding = sum(m.weight.numel() for m in self.objective.model.modules() if isinstance(m, nn.Embedding))
        self.log.section(
            "run",
            f"{self.folder}: {self.parameters / 1e6:.1f}M parameters "
            f"({(self.parameters - embedding) / 1e6:.1f}M without the embedding), {process.world_size} x "
            f"{self.rows_per_rank} rows of {self.row_tokens} tokens a step, compiled in {self.compile_seconds:.0f} s",
            echo=True,
        )
        uniform, unigram = math.log(self.config.vocab_size), self.validation["unigram_loss"]
        self.log.write(f"loss of a uniform guess {uniform:.4f}, of unigram frequencies {unigram:.4f}")

    # --- training

    def train_loop(self, signals: list[int]) -> bool:
        """Trains to the end, or until a signal, upon which it saves first. Returns whether it came to the end.

        signals: those that ask the run to stop, as they come.
        """
        train = self.train
        gc.collect()
        gc.freeze()  # what exists by now stays: the collector need not scan it every time
        self.rows = iter(self.loader)
        self.data_wait = 0.0  # seconds in which steps waited for rows
        self.unread: list[tuple] = []  # steps whose losses are still on the device: number, measures, metrics
        self.agree_every = 1  # steps from one agreement of the ranks to the next
        while True:
            seconds, stopped = self.agree(signals)
            progress = self.progress(seconds)
            self.window = local_window(progress, train, self.config.local_attention_window)
            finished = progress >= 1
            validation_due = finished or is_due(self.step, train.valid_every)
            save_due = is_due(self.step, train.save_every)
            if validation_due or save_due:
                self.clock.stop()
                self.write_losses()
            if validation_due and self.step > self.validated_step and (finished or not stopped):
                self.validated, self.validated_step = self.validate(self.valid_loader), self.step
                self.write_line(**self.validated)
            if (save_due or stopped) and self.step > self.resumed_step:
                self.clock.stop()
                self.save(push=not stopped and not train.save_words)
            # The limit leaves room for one more step: a run that it ends may stay just short of the last of save_words
            if finished and self.work.text >= self.text_limit:
                self.save_at_words(self.words, self.words / 0.95)
            if finished or stopped:
                break
            self.clock.start()
            words = self.words
            self.train_step(progress)
            if self.step % train.log_every == 0:
                self.clock.stop()
                self.write_losses()
            self.save_at_words(words, self.words)
        gc.unfreeze()
        self.rows.close()
        self.stopped_by = stopped
        return finished

    def agree(self, signals: list[int]) -> tuple[float, float]:
        """Seconds of training and the stop signal, agreed on by all ranks if either may matter now.

        At every step if the clock ends the run, else every agree_every steps.
        """
        if self.process.world_size > 1 and self.train.max_minutes is None and self.step % self.agree_every:
            return self.clock.now(), 0
        seconds, stopped = self.process.max(self.clock.now(), max(signals, default=0))
        # At least every ten seconds: thirty seconds after SIGTERM, torchrun kills its ranks, saved or not
        self.agree_every = min(self.train.log_every, max(1, int(10 * self.step / max(seconds, 1e-9))))
        return seconds, stopped

    def progress(self, seconds: float) -> float:
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        minutes = math.inf if self.train.max_minutes is None else self.train.max_minutes
        return min(1.0, max(seconds / (60 * minutes), self.work.text / self.text_limit))

    @property
    def words(self) -> float:
        """Shown so far, from the train shards' mean words per token; 0 where words were not counted."""
        return self.work.text * (self.words_per_token or 0.0)

    def train_step(self, progress: float) -> None:
        """One optimizer step over the rows of all ranks; its loss stays on the device until write_losses."""
        train = self.train
        rate = mask_rate(progress, train)
        accum = max(1, round(self.rows_per_rank * batch_factor(progress, train)))
        # A smaller batch takes smaller steps (Malladi et al. 2022)
        factor = lr_factor(progress, train) * (accum / self.rows_per_rank) ** 0.5
        waiting = time.perf_counter()
        batch = [next(self.rows) for _ in range(accum)]
        self.data_wait += time.perf_counter() - waiting
        texts = [text for row in batch for text in row.round_text]  # tokens of each row, of all ranks
        targets_in_step = sum(min(mask_count(rate, self.row_tokens, text), text) for text in texts)
        measured = torch.zeros(len(self.objective.measures), device=self.process.device)
        for row in batch:
            masks = mask_count(rate, self.row_tokens, row.round_text[self.process.rank])
            loss, measures = self.objective.loss(row, masks, self.window, targets_in_step, sum(texts))
            loss.backward()
            measured += measures
        self.optimizer.step(factor, muon_momentum(progress, train))
        self.step += 1
        self.loader_state = batch[-1].state
        self.work.add(np.concatenate([row.round_lengths for row in batch]), targets_in_step, self.window)
        metrics = {
            "lr": train.muon_lr * factor,
            "lr_factor": factor,
            "mask_rate": rate,
            "window": self.window,
            "batch_tokens": accum * self.process.world_size * self.row_tokens,
            "rows": [row.index for row in batch],
        }
        self.unread.append((self.step, measured, metrics))

    def write_losses(self) -> None:
        """Fetches the losses since the last line, stops at one that is not finite, writes the last."""
        if not self.unread:
            return
        parts = torch.stack([measures for _, measures, _ in self.unread])  # [steps, measures]: this rank's
        measured = np.reshape(self.process.sum(*parts.flatten().tolist()), parts.shape).tolist()
        for (loss, *_), (step, _, metrics) in zip(measured, self.unread):
            if not math.isfinite(loss):
                muon, embedding = metrics["lr"], self.train.embed_lr * metrics["lr_factor"]
                rates = f"learning rates {muon:.4g} (muon) and {embedding:.4g} (embedding)"
                raise self.not_finite(f"the loss of step {step} is {loss}, at {rates}, rows {metrics['rows']}")
        measures = dict(zip(self.objective.measures, measured[-1]))
        self.write_line(**measures, **self.unread[-1][2], data_wait_seconds=self.data_wait)
        self.unread.clear()

    def write_line(self, **values: object) -> None:
        """values: train_loss or val_loss and its kin, and what metrics.jsonl alone says."""
        if not self.log:
            return
        seconds, flops = self.clock.seconds, self.flops()
        said = {"tokens": self.work.tokens, "flops": flops, "mfu": flops / max(seconds, 1e-9) / self.peak}
        if self.words_per_token:
            said["words"] = self.words
        losses = {name: value for name, value in values.items() if name == "train_loss" or name.startswith("val_")}
        line = log_line(self.step, self.steps, seconds, **losses, **said)
        self.log.step(line, "val_loss" in values, step=self.step, **values, seconds=seconds, **said)
        self.log.bar.update(self.step - self.log.bar.n)

    def flops(self) -> float:
        return self.work.training_flops(self.config, self.objective.flops_counted_by, self.train.generator_layers)

    def validate(self, loader: Loader) -> dict[str, float]:
        found = self.objective.validate(loader, self.window, self.process.sum)
        if not all(math.isfinite(value) for value in found.values()):
            raise self.not_finite(f"the validation loss after step {self.step} is {found['val_loss']}")
        return found

    def not_finite(self, what: str) -> InputError:
        if saved := checkpoints_of(self.folder):
            return InputError(f"{what}: lower the learning rates and go on from {saved[-1]}, by --train.resume auto")
        return InputError(
            f"{what}, and nothing was saved (--train.save_every): lower the learning rates and start again"
        )

    # --- saving

    def check_weights(self) -> None:
        finite = all(bool(torch.isfinite(p).all()) for p in self.objective.network.parameters())
        if not finite:  # the loss would tell only at the next step
            raise self.not_finite(f"the weights after step {self.step} are not finite")

    def save_at_words(self, above: float, upto: float) -> None:
        """Keeps the model for each of save_words in this range: words/chck_1M, and a branch of that name."""
        for count in self.train.save_words:
            if above < count <= upto:
                self.clock.stop()
                self.check_weights()
                self.process.on_main(partial(self.keep_model, self.words_folder(count)))

    def words_folder(self, count: float) -> Path:
        return self.folder / "words" / f"chck_{count / 1e6:g}M"

    def keep_model(self, folder: Path) -> None:
        save_folder(folder, self.write_parts)
        if self.hub and (copy := self.to_push(folder.name, self.write_parts)):
            self.hub.push(copy, folder.name)
        self.log.section("saved", str(folder), echo=True)

    def to_push(self, revision: str, write: Callable[[Path], None]) -> Path | None:
        """A copy, which is there until the Hub has it; None, with a warning, where the disk has no room for it."""
        copy = self.folder / TO_PUSH / revision
        try:
            save_folder(copy, write)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(copy.with_name(f"{revision}.tmp"), ignore_errors=True)
            print(f"warning: {copy} cannot be written ({first_line(error)}), so it is not pushed", file=sys.stderr)
            return None
        return copy

    def write_parts(self, into: Path) -> None:
        for name, (model, weights) in self.objective.parts().items():
            save_model(into / name, model, self.tokenizer, weights)

    def save(self, push: bool) -> None:
        self.check_weights()
        optimizer_state = self.optimizer.state_dict()  # every rank holds a part
        self.process.on_main(lambda: self.write_checkpoint(optimizer_state, push))

    def write_checkpoint(self, optimizer_state: dict[str, Tensor], push: bool) -> None:
        """Model in Hugging Face form, optimizer.safetensors, state.json. Masks follow from rows: no random state.

        If writing fails, the run goes on if there is another checkpoint.
        """
        state = {
            "world_size": self.process.world_size,
            "step": self.step,
            "seconds": self.clock.seconds,
            "work": dataclasses.asdict(self.work),
            "loader": self.loader_state,
            "validated": self.validated,
            "validated_step": self.validated_step,
            "log": self.log.ends(),
            "peak_flops": self.peak,
            "identity": self.identity,
            "config": self.resolved(),
        }

        def write(into: Path) -> None:
            self.write_parts(into)
            save_file(optimizer_state, into / "optimizer.safetensors")
            if extra := self.objective.extra_state():
                save_file(extra, into / "extra.safetensors")
            (into / "state.json").write_text(json.dumps(state))
            write_hashes(into)

        folder = self.folder / "checkpoints" / f"step-{self.step:06d}"
        try:
            save_folder(folder, write)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
            said = f"{folder} cannot be written ({first_line(error)}): make room on that disk"
            if not (saved := checkpoints_of(self.folder)):
                raise InputError(said) from error
            print(f"warning: {said}; {saved[-1]} stands", file=sys.stderr)
            return
        for old in checkpoints_of(self.folder)[: -self.train.keep_checkpoints]:
            shutil.rmtree(old)
        if self.hub and push:
            model, weights = self.objective.parts()[""]
            if copy := self.to_push(folder.name, lambda into: save_model(into, model, self.tokenizer, weights)):
                self.hub.push(copy, folder.name)
        self.log.section("saved", str(folder), echo=True)

    # --- the end

    def finish(self) -> None:
        """The model in Hugging Face form, then what may still fail: test loss and result."""
        self.process.on_main(self.write_models)
        text = min(count_text(self.manifest, "test")[0], self.data.valid_tokens)
        has_test = text >= 200  # fewer tokens might have none masked
        self.test_loss = self.validate(self.validation_loader("test", self.process))["val_loss"] if has_test else None
        self.process.on_main(self.write_result)

    def write_models(self) -> None:
        for part, (model, weights) in self.objective.parts().items():
            folder = self.folder / (part or "model")
            write = partial(self.write_model, part, model, weights)
            save_folder(folder, write)
            if self.hub:
                self.to_push(part or "main", write)

    def write_result(self) -> None:
        result = {
            "run": str(self.folder),
            "step": self.step,
            "finished": True,
            **self.validated,
            "test_loss": self.test_loss,
            "seconds": self.clock.seconds,
            "flops": self.flops(),
            "flops_counted_by": self.objective.flops_counted_by,
            "work": dataclasses.asdict(self.work),
            "parameters": self.parameters,
            "model_sha256": sha256_of(self.folder / "model" / "model.safetensors"),
        }
        self.log.close(result)

    def write_model(self, part: str, model: PreTrainedModel, weights: dict | None, into: Path) -> None:
        """With its card, whose code loads it from the Hub if it goes there, else from where it is now."""
        save_model(into, model, self.tokenizer, weights)
        masked = isinstance(model, KBERTForMaskedLM)
        shown = ("val_loss",) if masked else ("val_accuracy", "val_f1", "val_auc")
        numbers = {name.replace("val_", "validation "): f"{self.validated[name]:.4f}" for name in shown}
        numbers |= {"tokens seen": f"{self.work.tokens:,}", "model FLOPs": f"{self.flops():.3e}"}
        numbers["training time"] = f"{self.clock.seconds / 60:.1f} min"
        device = environment(self.process.device, self.process.world_size)["device"]
        numbers["hardware"] = f"{self.process.world_size} x {device}"
        tags = ["kbert", "encoder", "masked-lm" if masked else "replaced-token-detection"]
        task = "fill-mask" if masked else "feature-extraction"
        data = huggingface_hub.ModelCardData(library_name="transformers", pipeline_tag=task, license="mit", tags=tags)
        card = huggingface_hub.ModelCard.from_template(
            data,
            template_str=MODEL_CARD,
            manifest=self.manifest,
            config=model.config,
            parameters=model.num_parameters(),
            masked=masked,
            ref=f', revision="{part}"' if part and self.hub else "",
            numbers=numbers,
            title=self.train.hf_model_name or self.folder.name,
            name=self.train.hf_model_name or (self.folder / (part or "model")).as_posix(),
            mask=getattr(self.tokenizer, "mask_token", "[MASK]"),
        )
        (into / "README.md").write_text(str(card), encoding="utf-8")

    def report(self, finished: bool) -> None:
        """What rank 0 does when the other ranks are gone: uploads may take long, and keep nobody waiting."""
        if not self.process.is_main:
            return
        self.log.bar.close()
        if finished:
            for part in self.objective.parts() if self.hub else ():
                copy = self.folder / TO_PUSH / (part or "main")
                self.hub.push(copy if copy.exists() else self.folder / (part or "model"), part or "main")
            self.print_summary()
        else:
            print(f"stopped at step {self.step}; continue with --train.resume auto")
        if self.hub:
            self.hub.finish()
        draw_curves(self.folder)
        if self.log.wandb_run is not None:
            self.log.wandb_run.finish()

    def print_summary(self) -> None:
        unigram = self.validation["unigram_loss"]
        loss, *detection = self.validated.values()
        print(f"\nvalidation loss  {loss:.4f}   (unigram frequencies alone: {unigram:.4f}; below: context)")
        if detection:
            print("detection        {:.4f} right, F1 {:.4f}, area under the ROC {:.4f}".format(*detection))
        if self.test_loss is not None:
            print(f"test loss        {self.test_loss:.4f}")
        print(f"tokens           {self.work.tokens:,}")
        print(f"model FLOPs      {self.flops():.3e}")
        print(f"training time    {self.clock.seconds:.1f} s")
        print(f"log              {self.folder / 'log.txt'}")
        print(f"model            {self.folder / 'model'}")
        if self.tokenizer is not None:
            print("\n".join(answers(self.objective.masked_lm, self.tokenizer)))


# ---------------------------------------------------------------------------------------------------------------------
# What a finished run shows of its model: the card beside it, and words for gaps

MODEL_CARD = """---
{{ card_data }}
---
# {{ title }}

A KBERT encoder: {{ config.num_hidden_layers }} layers x {{ config.hidden_size }},
{{ "%.1f" % (parameters / 1e6) }}M parameters, pretrained by
{{ "masked language modelling" if masked else "replaced-token detection" }}.

| {{ numbers | join(" | ") }} |
|{{ "---|" * (numbers | length) }}
| {{ numbers.values() | join(" | ") }} |

```python
{% if masked -%}
from transformers import pipeline
pipeline("fill-mask", "{{ name }}"{{ ref }}, trust_remote_code=True)("The capital of France is {{ mask }}.")
{%- else -%}
from transformers import AutoModel
encoder = AutoModel.from_pretrained("{{ name }}", trust_remote_code=True)
{%- endif %}
```

{% if masked -%}
AdamW's usual 5e-5 finetunes it; Muon for the layers' matrices, beside AdamW for all else, does a little better.
{%- else -%}
Finetune it with Muon for the layers' matrices, beside AdamW for all else: AdamW alone, at its usual 5e-5, loses points.
{%- endif %} With its `tokenizer`, and your `train` set tokenized:

```python
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

model = AutoModelForSequenceClassification.from_pretrained("{{ name }}"{{ ref }}, num_labels=3, trust_remote_code=True)
matrices = [p for p in model.encoder.blocks.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
muon = torch.optim.Muon(matrices, lr=0.01 / model.config.weight_multiplier, weight_decay=0.01)
adamw = torch.optim.AdamW(others, lr=5e-5)
ratio = muon.param_groups[0]["lr"] / adamw.param_groups[0]["lr"]


def step_muon(*_):  # with AdamW, whose rate the Trainer's schedule changes
    muon.param_groups[0]["lr"] = ratio * adamw.param_groups[0]["lr"]
    muon.step()


adamw.register_step_pre_hook(step_muon)
args = TrainingArguments("logs/trainer", num_train_epochs=3, per_device_train_batch_size=32, warmup_steps=0.06)
trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer, optimizers=(adamw, None))
trainer.train()
```

Trained on: {{ manifest["source"] | tojson }}
"""

PROMPTS = (
    "The capital of France is {mask}.",
    "Returns the {mask} of the list.",
    "If the file does not {mask}, an error is raised.",
)


def answers(model: KBERTForMaskedLM, tokenizer) -> list[str]:
    """The model's three likeliest words for the gap of each prompt."""
    lines = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt.format(mask=tokenizer.mask_token), return_tensors="pt").to(model.device)
        (gap,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0]
        with torch.no_grad():
            top = model(inputs["input_ids"]).logits[0, gap].softmax(-1).topk(3)
        words = [
            f"{tokenizer.decode([i]).strip()!r} {p:.0%}" for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        lines.append(f"{prompt.format(mask='____')}  ->  {', '.join(words)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main(argv: list[str] | None = None) -> None:
    code = read_code(MODULES)
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__, {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig})
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="base", help="named settings that flags override [base]"
    )
    settings, _ = parse_flags(parser, argv, {"preset": PRESETS})
    train_to_the_end(Run, settings, ["trainer.py", *argv], code)


def train_to_the_end(run_class: type[Run], settings: dict, argv: list[str], code: dict[str, str]) -> None:
    """Arguments as for Run. Ctrl-C saves, then exits with 130."""
    train = settings["train"]
    given = {text.split("=")[0] for text in argv}
    ends = [f"--train.{name}" for name in ("max_minutes", "epochs", "max_words") if train[name] is not None]
    if "--train.steps" in given and ends and not given & set(ends):  # a preset's
        nones = " ".join(f"{name} none" for name in ends)
        raise InputError(f"--train.steps has no effect beside {' and '.join(ends)}: leave it out, or add {nones}")
    with join_processes(train["device"], train["timeout_minutes"]) as process:
        try:
            run = run_class(process, settings, argv, code)
        except RunFinished as said:
            if process.is_main:
                print(said)
            return
        with stop_signals() as signals:
            finished = run.train_loop(signals)
            if finished:  # a signal that comes now must not cost the run its end
                run.finish()
    run.report(finished)
    if run.stopped_by == signal.SIGINT:
        sys.exit(130)


def run_program(main: Callable[[], None], again: str) -> None:
    """Ends with one line on bad input or Ctrl-C. again: the flag to start it with."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # in training, `stop_signals` has them and saves
        print(f"stopped; start again with {again}", file=sys.stderr, flush=True)
        os._exit(130)  # uploads and loaders would keep it waiting


if __name__ == "__main__":
    run_program(main, "--train.resume auto")
