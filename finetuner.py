"""Finetunes an encoder on a task and reports its scores: MNLI by default, or GLUE, IMDB, SQuAD, your own file.

    laptop, no data    torchrun --standalone --nproc_per_node=1 finetuner.py --preset micro
    one GPU            torchrun --standalone --nproc_per_node=1 finetuner.py --train.base_model USER/NAME
    eight GPUs, GLUE   torchrun --standalone --nproc_per_node=8 finetuner.py --task glue --protocol modernbert
    your own file      torchrun --standalone --nproc_per_node=1 finetuner.py --task custom --data.dataset reviews.csv
    no training        torchrun --standalone --nproc_per_node=1 finetuner.py --task blimp --train.base_model DIR

`--help` lists every setting with its unit. Without --train.base_model it starts from the newest pretraining run under
logs/; any other encoder of `transformers` is measured the same way. A run leaves logs/RUN/ with model/ in Hugging Face
form and a card that carries the results, metrics.json, predictions/ as gluebenchmark.com takes them, log.txt and
config.yaml (`--config` repeats the run). The same examples make up the same steps, with the same dropout, on any number
of ranks and however they are packed.

Shapes: n examples of a row, T tokens of a row, S tokens of its longest example, B examples of a step, C classes,
d hidden_size, V vocabulary; [tokens]: those of a row without its padding.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import transformers
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

import model as kbert_models
from data.blimp import Pairs
from data.examples import MissingData, Split
from data.tasks import GLUE, HELD_OUT, TASKS, Data, Kind, read_data
from dataloading import InputError, first_line, read_json, sha256_of, to_device, write_json
from model import BLOCK, KBERTConfig, compiled_backend, option
from objectives import compile_rows
from optimizer import Optimizer
from records.log import Clock, RunLog, environment, log_line, read_code
from records.plot import draw_curves
from trainer import MODULES as TRAINER_MODULES
from trainer import (
    SAMPLE,
    HubPusher,
    Process,
    is_finished,
    join_processes,
    locate_data,
    lr_factor,
    make_parser,
    parse_flags,
    read_settings,
    run_program,
    save_folder,
    save_model,
    why_eager,
    write_settings,
)

# Whose code a log carries
MODULES = (*TRAINER_MODULES, "finetuner.py", "data/examples.py", "data/squad.py", "data/blimp.py", "data/tasks.py")

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class DataConfig:
    dataset: str | None = option(None, "file (csv, tsv, json, parquet), folder, shards or Hub id; none: the task's")
    text: str | None = option(None, "column of the text; none: the task's")
    text_pair: str | None = option(None, "column of the second text; none: the task's")
    label: str = option("label", "column of the label")
    validation: str | None = option(None, "split to choose models by; none: validation, or a tenth of train held out")
    max_length: PositiveInt | None = option(
        None, "tokens of an example, longer are cut; none: the model's, 512 at most"
    )
    max_train_examples: PositiveInt | None = option(None, "examples of train that are used, shuffled first; none: all")
    stride: NonNegativeInt = option(128, "tokens that neighbouring windows of a long context share (SQuAD)")
    max_answer: PositiveInt = option(30, "tokens of an answer at most (SQuAD)")


@dataclass
class FinetuneConfig:
    """What is trained, for how long, how fast, and what is kept."""

    base_model: str | None = option(None, "folder or Hub id of an encoder; none: the newest finished pretraining run")
    trust_remote_code: bool = option(False, "run the code that a base model brings along, if it is not a KBERT")
    epochs: PositiveFloat = option(3.0, "passes over train, at most")
    batch_size: PositiveInt = option(32, "examples in an optimizer step, over all ranks")
    optimizer: Literal["auto", "muon", "adamw"] = option("auto", "auto: muon for a KBERT, adamw for other encoders")
    lr: PositiveFloat | None = option(
        None, "peak learning rate; none: 5e-5 (adamw), or in spectral norm 0.01 (muon), 0.003 for other encoders"
    )
    weight_decay: NonNegativeFloat = option(0.01, "of matrices: a step shrinks them by lr times this")
    lr_schedule: Literal["one_cycle", "cosine"] = option(
        "one_cycle", "fall after warm-up: linear (one_cycle) or cosine"
    )
    lr_warmup: ClosedUnitInterval = option(0.06, "fraction of the run in which the learning rate rises from 0")
    lr_floor: ClosedUnitInterval = option(0.0, "fraction of the learning rate at the end")
    clip: PositiveFloat = option(
        1.0, "norm that gradients are clipped to (adamw; muon's steps have a size of their own)"
    )
    pooling: Literal["mean", "cls"] = option(
        "mean", "state to classify: the mean over tokens, or [CLS]'s (KBERT, ModernBERT)"
    )
    trainable: Literal["all", "classifier", "last_2", "last_3"] = option(
        "all", "what is trained: all, the classifier alone, or also the last 2 or 3 layers"
    )
    evals_per_epoch: PositiveInt = option(1, "evaluations on the validation split in an epoch")
    patience: PositiveInt | None = option(
        None, "evaluations without improvement that end a run, which keeps its best weights; none: its last"
    )
    seeds: PositiveInt = option(1, "runs with seeds seed, seed + 1, ...; the median counts")
    seed: NonNegativeInt = option(1, "of the classifier's weights, dropout and order of examples")
    compare_random: bool = option(False, "also finetune the same shape from random weights")
    row_tokens: PositiveInt | None = option(None, "tokens in one forward; none: 4096 on a CPU, 16384 on a GPU")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train; auto: on GPUs where there are any")
    timeout_minutes: PositiveFloat = option(10.0, "minutes that ranks wait for each other before they give up")
    compile: bool = option(True, "torch.compile: on a GPU, and on a CPU that trains on 3 million tokens or more")
    log_every: PositiveInt = option(20, "steps between lines of the log")
    resume: bool = option(False, "continue the newest unfinished run of the same settings, or --train.run_name")
    out: str = option("logs", "folder of runs")
    run_name: str | None = option(None, "folder of this run within out; none: date, time and task")
    hf_model_name: str | None = option(None, "USER/NAME on the Hub to push to; with --task glue, a branch per task")
    hub_minutes: PositiveFloat = option(2.0, "minutes that the Hub may be silent before an upload is given up")


PRESETS = {
    "base": {"task": "mnli"},
    "micro": {
        "task": "pairs",
        "data.max_train_examples": 5000,
        "train.epochs": 2.0,
        "train.batch_size": 16,
        "train.compare_random": True,
    },
}


@dataclass(frozen=True)
class Protocol:
    """Settings that flags override, and a grid over those that no flag fixes. Rates are AdamW's."""

    settings: dict = field(default_factory=dict)
    adamw_lr: float = 5e-5  # where neither flag nor grid says a rate
    grid: dict = field(default_factory=dict)
    long_epochs: tuple[float, ...] = ()  # the grid's epochs for tasks not in `short`
    short: tuple[str, ...] = ()
    from_mnli: tuple[str, ...] = ()  # tasks that start from the MNLI model


PROTOCOLS = {
    "default": Protocol(),
    # Geiping and Goldstein 2022, "Cramming": one setting for all tasks
    "sane": Protocol(
        {
            "train.batch_size": 16,
            "train.epochs": 5.0,
            "train.seeds": 5,
            "train.lr_schedule": "cosine",
            "train.log_every": 200,  # MNLI's logs of three runs then take half of a record's 2 MB
        },
        adamw_lr=4e-5,
    ),
    # Warner et al. 2024, "Smarter, better, faster, longer", table of GLUE hyperparameters
    "modernbert": Protocol(
        {"train.batch_size": 64, "train.patience": 5, "train.evals_per_epoch": 4},
        grid={"lr": (1e-5, 3e-5, 5e-5, 8e-5), "weight_decay": (1e-6, 5e-6, 8e-6, 1e-5), "epochs": (1.0, 2.0, 3.0)},
        long_epochs=(2.0, 5.0, 10.0),
        short=("sst2", "mnli", "rte"),
        from_mnli=("rte", "mrpc", "stsb"),
    ),
}


def free_names(protocol: Protocol, given: set[str]) -> list[str]:
    """Names of the settings that the grid ranges over: those that no flag fixes. given: from parse_flags."""
    return [name for name in protocol.grid if f"train.{name}" not in given]


# In spectral norm: where AdamW's customary rate is 5e-5. AdamW leaves matrices a third to a half as large as Muon does.
MUON_LR, MUON_LR_OTHERS = 0.01, 0.003


def choose_rates(train: FinetuneConfig, protocol: Protocol, kbert: bool) -> FinetuneConfig:
    """Fills in optimizer and peak rate where no flag sets them: Muon for what Muon pretrained."""
    optimizer = train.optimizer if train.optimizer != "auto" else "muon" if kbert else "adamw"
    lr = train.lr or {"muon": MUON_LR if kbert else MUON_LR_OTHERS, "adamw": protocol.adamw_lr}[optimizer]
    return dataclasses.replace(train, optimizer=optimizer, lr=lr)


def grid_of(protocol: Protocol, task: str, given: set[str], train: FinetuneConfig) -> list[FinetuneConfig]:
    """The settings of every run: the protocol's grid, times the seeds. train: as choose_rates gives it."""
    grid = {name: protocol.grid[name] for name in free_names(protocol, given)}
    if "lr" in grid and train.optimizer == "muon":  # as far apart as AdamW's
        grid["lr"] = [lr / 5e-5 * train.lr for lr in grid["lr"]]
    if "epochs" in grid and task not in protocol.short:
        grid["epochs"] = protocol.long_epochs
    cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    seeds = range(train.seed, train.seed + train.seeds)
    return [dataclasses.replace(train, **cell, seed=seed) for cell in cells for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------------
# Where it starts from


@dataclass
class Base:
    """An encoder to start from, its tokenizer, and whether it is one of ours."""

    name: str
    kbert: bool
    config: dict
    tokenizer: PreTrainedTokenizerFast
    max_length: int  # tokens that an example may have
    trusted: bool = False  # whether its own code may be run

    @cached_property
    def sha256(self) -> str | None:
        """Of its weights; None where they are not in a folder."""
        weights = Path(self.name) / "model.safetensors"
        return sha256_of(weights) if weights.exists() else None

    @property
    def pools(self) -> bool:
        """Whether --train.pooling chooses the state to classify, as a KBERT's and a ModernBERT's head lets it."""
        return self.kbert or "classifier_pooling" in self.config

    @property
    def title(self) -> str:
        """The Hub id, or the folder's name; for logs/RUN/model, RUN."""
        path = Path(self.name).resolve()
        if not path.exists():
            return self.name
        return path.parent.name if path.name in ("model", "generator") else path.name


def newest_run(out: Path, preset: str) -> Path:
    """model/ of the newest finished pretraining run; with preset micro, of micro runs only."""
    found, pretrained = [], {"KBERTForMaskedLM", "KBERTForReplacedTokenDetection"}
    for path in out.glob("*/model/config.json"):
        ours = pretrained & set(read_json(path).get("architectures") or [])
        if ours and preset in ("base", read_settings(path.parents[1]).get("preset")):
            found.append(path)
    if not found:
        raise InputError(
            f"no finished {'micro ' if preset == 'micro' else ''}pretraining run under {out}/: pretrain with "
            f"`torchrun --standalone --nproc_per_node=1 trainer.py --preset {preset}`, or give --train.base_model"
        )
    return max(found, key=os.path.getmtime).parent


def mnli_model(out: Path, base: str) -> str:
    """model/ of the newest finished MNLI run from the same base model."""
    reports = [*out.glob("*/metrics.json"), *out.glob("*/mnli/metrics.json")]
    wanted = "mnli", os.path.normpath(base)
    read = {path: read_json(path) for path in reports}
    found = [path for path, x in read.items() if (x.get("task"), os.path.normpath(x.get("base_model", ""))) == wanted]
    if not found:
        raise InputError(
            f"this protocol starts from the MNLI model of {base}, and {out}/ has none: "
            "run finetuner.py --task mnli first, with the same --train.base_model"
        )
    return str(max(found, key=os.path.getmtime).parent / "model")


def open_base(name: str, max_length: int | None, trusted: bool = False) -> Base:
    """Without its weights. max_length: tokens of an example, within what the model takes; None: 512 at most."""
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
        if not config:
            raise OSError("it has no config.json")
        kbert = config.get("model_type") == "kbert"
        if kbert:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
        else:
            AutoConfig.from_pretrained(name, trust_remote_code=trusted)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:  # whatever transformers makes of files that are damaged
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name} brings code of its own, which is not run: read it, then give --train.trust_remote_code true"
            ) from error
        a_hub_id = name.count("/") < 2
        said = first_line(error) if a_hub_id or Path(name).exists() else "there is no such folder"
        raise InputError(
            f"cannot open the base model {name} ({said}): "
            "give --train.base_model a folder with config.json, weights and tokenizer, or a Hub id"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {name} has no tokenizer.json: save it as a fast tokenizer first")
    # RoBERTa's positions start at 2, which its tokenizer knows
    limit = min(config.get("max_position_embeddings") or 512, tokenizer.model_max_length)
    tokenizer.model_max_length = min(max_length or 512, limit)
    return Base(name, kbert, config, tokenizer, tokenizer.model_max_length, trusted)


def build_model(base: Base, kind: Kind, seed: int, random: bool = False, pooling: str | None = None) -> nn.Module:
    """The encoder under a new head; from random weights, its shape alone is kept."""
    torch.manual_seed(seed)
    settings = kind.model_settings() | ({"classifier_pooling": pooling} if pooling and base.pools else {})
    if base.kbert:
        # The new head has labels of its own; auto_map may name the Hub repository that the base was loaded from
        dropped = ("auto_map", "architectures", "id2label", "label2id")
        kept = {name: value for name, value in base.config.items() if name not in dropped}
        config, cls = KBERTConfig.from_dict(kept | settings), getattr(kbert_models, f"KBERTFor{kind.head}")
        fresh = cls
    else:
        config = AutoConfig.from_pretrained(base.name, trust_remote_code=base.trusted, **settings)
        cls = getattr(transformers, f"AutoModelFor{kind.head}")
        fresh = partial(cls.from_config, trust_remote_code=base.trusted, dtype=torch.float32)
    if random:
        return fresh(config)
    model = load_pretrained(cls, base, config, whole=not kind.trains)
    if kind.problem_type and base.config.get("problem_type") == kind.problem_type:
        kind.resume(model)
    return model


def load_pretrained(cls: type, base: Base, config: PretrainedConfig, whole: bool) -> nn.Module:
    """Raises InputError where part of the encoder would silently be random.

    whole: the head must be there too.
    """
    how = {"config": config, "trust_remote_code": base.trusted, "dtype": torch.float32}
    try:
        model, loading = cls.from_pretrained(base.name, **how, ignore_mismatched_sizes=True, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"cannot load the weights of {base.name} ({first_line(error)}): give --train.base_model a finished model"
        ) from error
    missing = sorted(loading["missing_keys"])
    fresh = [*missing, *(key for key, *_ in loading["mismatched_keys"])]  # random, as nothing was loaded into them
    others = [*fresh, *loading["unexpected_keys"]]
    if base.kbert and (others := sorted(key for key in others if re.match(r"(encoder\.)?(blocks|embed)\.", key))):
        raise InputError(
            f"{base.name} and this checkout differ in {others[0]}: it was trained by another model.py; "
            "finetune it with the checkout that trained it"
        )
    own = {key for key in model.state_dict() if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key}
    if own and own <= set(missing):
        raise InputError(
            f"none of the weights of {base.name} has the name of one of {type(model).__name__}'s, such as {min(own)}: "
            "save it with save_pretrained, not as it was wrapped for training"
        )
    if whole and fresh:
        raise InputError(
            f"{base.name} has no {fresh[0]}, which {cls.__name__} needs, and this task trains nothing: "
            "give --train.base_model a model that was pretrained with that head"
        )
    return model


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Freezes the encoder but for its last layers; a head, and the pooler that some encoders own, always trains."""
    if trainable == "all":
        return
    encoder, depth = model.base_model, model.config.num_hidden_layers
    layers = next((m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    trained = 0 if trainable == "classifier" else int(trainable[-1])
    if trained and layers is None:
        raise InputError(
            f"--train.trainable {trainable}: this encoder's layers are one and the same; use all or classifier"
        )
    encoder.requires_grad_(False)
    for layer in layers[-trained:] if trained else ():
        layer.requires_grad_(True)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# From examples to logits, and to scores


def row_size(tokens: int | np.ndarray) -> int | np.ndarray:
    """Of a row of so many tokens, padded to whole blocks of attention."""
    return -(-tokens // BLOCK) * BLOCK


class Network:
    """A model and the way examples go through it: rows without padding for KBERT, padded batches for other encoders.

    It trains in bf16 and predicts in fp32, as from_pretrained will.
    """

    def __init__(self, model: nn.Module, base: Base, kind: Kind, train: FinetuneConfig, device: torch.device):
        self.model, self.kbert, self.kind, self.device = model.to(device), base.kbert, kind, device
        self.max_length, self.pad = base.max_length, base.tokenizer.pad_token_id
        usual = 16384 if device.type == "cuda" else 4096
        self.row_tokens = max(train.row_tokens or usual, row_size(base.max_length))
        # Each masked token has a logit per vocabulary entry: with more tokens, a CPU's memory is the bottleneck
        most = 128 if device.type == "cpu" else 2048
        self.row_examples = most if kind.head == "MaskedLM" else math.inf
        self.compiled_sizes: list[int] = []
        self.flex = compiled_backend(device) == "flex"
        logits = {"SequenceClassification": self.text_logits, "QuestionAnswering": self.span_logits}
        logits |= {"MaskedLM": self.token_logits, "ReplacedTokenDetection": self.detector_logits}
        self.packed_logits = logits[kind.head]

    def compile(self, lengths: np.ndarray, batch: int, longest: int) -> None:
        """Picks two sizes to pad rows to, with a graph for each, to suit batches of `batch` examples of these lengths.

        longest: tokens that an example of any split has at most.
        """
        self.max_length = longest
        rng, tries = np.random.default_rng(0), 200 if batch < len(lengths) else 1
        batches = [rng.permutation(len(lengths))[:batch] for _ in range(tries)]
        rows = [row for chosen in batches for row in self.rows(lengths, chosen)]
        tokens = row_size(np.array([lengths[row].sum() for row in rows]))
        # A GPU predicts in full rows; a batch that exceeds every row tried is split
        largest = row_size(self.row_tokens if self.flex else max(int(tokens.max()), longest))
        small = min(set(tokens.tolist()), key=lambda size: np.where(tokens <= size, size, largest).sum())
        self.compiled_sizes = sorted({small, largest})
        self.encode = compile_rows(self.model.encoder.encode, self.model.encoder, compiled=True)

    def warm_up(self, training: bool) -> None:
        """Compiles before the clock starts, on made-up rows."""
        for mode in (True, False) if training else (False,):
            self.train(mode)
            for size in self.sizes:
                token = torch.arange(size, dtype=torch.int32, device=self.device)
                row = (token % 4, token // self.max_length, token % self.max_length)
                with torch.set_grad_enabled(mode):
                    hidden = self.states(*row, self.max_length)
                if hidden.requires_grad:
                    hidden.sum().backward()
        self.model.zero_grad(set_to_none=True)

    @property
    def sizes(self) -> list[int]:
        """Of compiled rows. A CPU predicts eagerly: in fp32 a graph hardly gains what it costs."""
        return self.compiled_sizes if self.model.training or self.flex else []

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        if self.kbert:
            self.model.encoder.compute_dtype = torch.bfloat16 if mode else None

    def rows(self, lengths: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
        """Divides the examples `chosen` into rows of at most row_tokens and row_examples, short ones together."""
        rows, size, most = [[]], 0, self.sizes[-1] if self.sizes else self.row_tokens
        for i in sorted(chosen, key=lambda i: (lengths[i], i)):
            # Padded, all are as long as the longest, which is this one
            size = size + lengths[i] if self.kbert else (len(rows[-1]) + 1) * lengths[i]
            if rows[-1] and (size > most or len(rows[-1]) == self.row_examples):
                rows.append([])
                size = lengths[i]
            rows[-1].append(i)
        return [np.array(row) for row in rows if row]

    def outputs(self, split: Split, row: np.ndarray, batch_index: np.ndarray, batch: int) -> Tensor:
        """Logits of a row's examples: [n, C]; for spans, start and end [n, 2, S], -inf beyond an example's end; of
        a masked token [n, V]; of a detector [n, S].

        batch_index [n]: where the row's examples stand among the B = `batch` of a step.
        """
        return self.packed(split, row, batch_index, batch) if self.kbert else self.padded(split, row)

    def packed(self, split: Split, row: np.ndarray, batch_index: np.ndarray, batch: int) -> Tensor:
        lengths = split.lengths[row]
        total, longest = int(lengths.sum()), int(lengths.max())
        T = next(size for size in self.sizes if size >= total) if self.sizes else row_size(total)
        input_ids = np.full(T, self.pad, dtype=np.int32)
        input_ids[:total] = split.of_all(split.tokens, row)
        documents = [*lengths, T - total]  # the padding is one of its own
        document_ids = np.repeat(np.arange(len(documents), dtype=np.int32), documents)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in documents])
        input_ids, document_ids, positions = (to_device(x, self.device) for x in (input_ids, document_ids, positions))
        if (wanted := self.kind.wanted(split, row)) is not None:
            wanted = to_device(np.cumsum(lengths) - lengths + wanted, self.device)  # [n] from the row's start
        hidden = self.states(input_ids, document_ids, positions, longest, wanted)[:total]  # [tokens, d] or [n, d]
        places = (document_ids[:total].long(), positions[:total].long())
        return self.packed_logits(hidden, places, lengths, batch_index, batch)

    def states(
        self, input_ids: Tensor, document_ids: Tensor, positions: Tensor, longest: int, wanted: Tensor | None = None
    ) -> Tensor:
        """Like KBERTModel.encode. A compiled graph returns all states: it would recompile for each number wanted."""
        row = (input_ids, document_ids, positions)
        if not self.sizes:
            return self.model.encoder.encode(*row, longest, wanted=wanted)
        window = self.model.config.local_attention_window
        hidden = self.encode(*row, max_seqlen=self.max_length, window=window)
        return hidden if wanted is None else hidden[wanted]

    def text_logits(
        self, hidden: Tensor, places: tuple, lengths: np.ndarray, batch_index: np.ndarray, batch: int
    ) -> Tensor:
        """hidden [tokens, d], places: example and position of each token that is not padding -> [n, C].

        The classifier sees the whole batch, with zeros for examples of other rows or ranks: an example's dropout, drawn
        from the step's seed, is the same wherever it lies.
        """
        if self.model.config.classifier_pooling == "cls":
            pooled = hidden[to_device(np.cumsum(lengths) - lengths, self.device)]  # [n, d]
        else:
            zeros = hidden.new_zeros(len(lengths), hidden.size(-1), dtype=torch.float32)
            sums = zeros.index_add(0, places[0], hidden.float())
            pooled = (sums / to_device(lengths, self.device)[:, None]).to(hidden.dtype)
        index = to_device(batch_index, self.device)
        whole = hidden.new_zeros(batch, hidden.size(-1)).index_copy(0, index, pooled)  # [B, d]
        return self.model.classify(whole)[index]

    def span_logits(self, hidden: Tensor, places: tuple, lengths: np.ndarray, *_) -> Tensor:
        """hidden [tokens, d] -> [n, 2, S]."""
        both = torch.stack(self.model.span_logits(hidden), dim=-1)  # [tokens, 2]
        logits = hidden.new_full((len(lengths), int(lengths.max()), 2), -torch.inf, dtype=torch.float32)
        return logits.index_put(places, both).transpose(1, 2)

    def token_logits(self, hidden: Tensor, *_) -> Tensor:
        """The states of masked tokens [n, d] -> [n, V]."""
        return self.model.logits(hidden)

    def detector_logits(self, hidden: Tensor, places: tuple, lengths: np.ndarray, *_) -> Tensor:
        """hidden [tokens, d] -> [n, S]."""
        logits = hidden.new_zeros((len(lengths), int(lengths.max())), dtype=torch.float32)
        return logits.index_put(places, self.model.logits(hidden))

    def padded(self, split: Split, row: np.ndarray) -> Tensor:
        lengths = split.lengths[row]
        mask = np.arange(lengths.max()) < lengths[:, None]  # [n, S]
        inputs = {"input_ids": np.full(mask.shape, self.pad), "attention_mask": mask.astype(np.int64)}
        inputs["input_ids"][mask] = split.of_all(split.tokens, row)
        if split.segments is not None:
            inputs["token_type_ids"] = np.zeros(mask.shape, dtype=np.int64)
            inputs["token_type_ids"][mask] = split.of_all(split.segments, row)
        inputs = {name: to_device(value, self.device) for name, value in inputs.items()}
        wanted = self.kind.wanted(split, row)
        if wanted is not None:
            return self.wanted_logits(inputs, to_device(wanted, self.device))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.model.training):
            out = self.model(**inputs)
        if "logits" in out:
            return out.logits.float()
        outside = to_device(~mask, self.device)
        return torch.stack([out.start_logits, out.end_logits], dim=1).float().masked_fill(outside[:, None], -torch.inf)

    def wanted_logits(self, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """inputs [n, S], one token wanted of each [n] -> [n, V]. The head, which may cost most, sees no other state."""

        def pick(encoder: nn.Module, arguments: tuple, output: ModelOutput) -> ModelOutput:
            hidden = output["last_hidden_state"]  # [n, S, d]
            output["last_hidden_state"] = hidden[torch.arange(len(wanted), device=hidden.device), wanted][:, None]
            return output

        with self.model.base_model.register_forward_hook(pick):
            return self.model(**inputs).logits[:, 0].float()

    def loss(self, split: Split, row: np.ndarray, batch_index: np.ndarray, batch: int) -> Tensor:
        """A row's loss, as its share of the mean over the step's batch."""
        labels = to_device(split.labels[row], self.device)
        return self.kind.loss(self.outputs(split, row, batch_index, batch), labels) / batch


@torch.no_grad()
def predict(
    net: Network, split: Split, process: Process, chosen: np.ndarray | None = None, dtype: torch.dtype | None = None
) -> list:
    """What kind.keep makes of the logits of the examples `chosen` (None: all), in their order in the split. Ranks share
    the rows, and each gets all results. dtype: of a KBERT's activations; None: fp32.
    """
    net.train(False)
    if dtype is not None:
        net.model.encoder.compute_dtype = dtype
    found, chosen = [], np.arange(len(split.ends)) if chosen is None else chosen
    for row in net.rows(split.lengths, chosen)[process.rank :: process.world_size]:
        logits = net.outputs(split, row, np.arange(len(row)), len(row))
        found += zip(row.tolist(), net.kind.keep(logits, split, row))
    if process.world_size > 1:
        every: list = [None] * process.world_size
        dist.all_gather_object(every, found)
        found = [pair for part in every for pair in part]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def score_pairs(net: Network, pairs: Pairs, process: Process) -> list:
    """Like predict, but in fp32 only where rounding might decide a pair: within four times the largest bf16 error."""
    scores = np.array(predict(net, pairs, process, dtype=torch.bfloat16))
    exact, band = np.zeros(len(scores), dtype=bool), 0.5
    while (todo := np.flatnonzero(pairs.closer_than(band, scores) & ~exact)).size:
        before, scores[todo], exact[todo] = scores[todo], predict(net, pairs, process, todo), True
        error = np.abs(np.bincount(pairs.sentence[todo], weights=scores[todo] - before)).max()
        band = max(band, 4 * error)
    return scores.tolist()


def evaluate(
    net: Network, data: Data, splits: list[str], process: Process, dev: dict[str, float] | None = None
) -> tuple[dict, dict]:
    """{split: metrics} of those with labels, {split: predictions}. The dev split comes first: thresholds follow it.

    dev: its metrics, where it is not among the splits.
    """
    metrics, predictions = {}, {}
    for name in sorted(splits, key=lambda name: name != data.dev):
        split = data.splits[name]
        # Pays off for eager forwards, as on a CPU, not for another graph
        quick = isinstance(split, Pairs) and net.kbert and not net.sizes
        kept = (score_pairs if quick else predict)(net, split, process)
        found, predictions[name] = net.kind.measure(kept, split, metrics.get(data.dev, dev or {}))
        if found:
            metrics[name] = found
    return metrics, predictions


def dev_score(metrics: dict[str, dict], data: Data) -> float:
    """What runs are chosen by: the mean of the task's metrics on dev."""
    return statistics.fmean(metrics[data.dev][name] for name in data.kind.metrics)


# ---------------------------------------------------------------------------------------------------------------------
# One run


def muon_step(model: nn.Module, train: FinetuneConfig, process: Process, compiled: bool) -> Callable[[float], None]:
    """The optimizer of pretraining: Muon for the layers' matrices, Adam at a twentieth of its rate for all else.

    A model adapts best with the optimizer that trained it (arXiv 2605.10468, 2606.09658). The rate was chosen on micro
    encoders of both objectives and 2,500 to 45,000 examples, and checked at 6 x 384, 4 x 512 and 12 x 256; no `base`
    has been tried (records/notebook.md, "Rates, optimizers and the number of examples"). Of other encoders Muon gets
    every linear layer but the classifier; ModernBERT's `Wqkv`, like ours, by head.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features != model.config.num_labels:
            stacked = 3 * model.config.num_attention_heads if name.endswith("qkv") else 1
            layer.stacked = getattr(layer, "stacked", stacked)  # by which Optimizer knows a matrix
    optimizer = Optimizer(
        model,
        rank=process.rank,
        world_size=process.world_size,
        muon_lr=train.lr,
        muon_weight_decay=train.weight_decay / train.lr,  # which decays by lr^2 times it
        muon_beta2=0.95,
        muon_polar_steps=5,
        embed_lr=train.lr / 20,
        embed_betas=(0.9, 0.98),
        scalar_lr=train.lr / 20,
        scalar_betas=(0.9, 0.98),
        adam_eps=1e-6,
        weight_multiplier=getattr(model.config, "weight_multiplier", 1.0),
        compiled=compiled,
    )
    if compiled:
        optimizer.step(0.0, momentum=0.95)  # compiles, and moves nothing
        optimizer.reset()
    return lambda factor: optimizer.step(factor, momentum=0.95)


def adamw_step(model: nn.Module, train: FinetuneConfig, process: Process) -> Callable[[float], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(factor: float) -> None:
        sum_gradients(parameters, process)
        nn.utils.clip_grad_norm_(parameters, train.clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sum_gradients(parameters: list[nn.Parameter], process: Process) -> None:
    """Over ranks. A rank that had no example of a small last batch brings zeros."""
    if process.world_size == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


class Training:
    """One training of a network's model, in place, with one setting and seed."""

    def __init__(
        self, net: Network, data: Data, train: FinetuneConfig, process: Process, log: RunLog | None, label: str = ""
    ):
        """label: `task:mnli run:1/5 `, which opens the lines of the log."""
        self.net, self.data, self.train, self.process, self.log, self.label = net, data, train, process, log, label
        self.split = data.splits["train"]
        set_trainable(net.model, train.trainable)
        # Updates the model from each rank's part of the gradients, at a factor of the peak learning rate
        if train.optimizer == "muon":
            self.update = muon_step(net.model, train, process, compiled=bool(net.compiled_sizes))
        else:
            self.update = adamw_step(net.model, train, process)
        net.warm_up(training=True)
        self.per_epoch = -(-len(self.split.ends) // train.batch_size)
        self.steps = max(1, round(train.epochs * self.per_epoch))
        self.clock, self.losses = Clock(process.device), []
        self.best_score, self.best_step, self.best_weights, self.waited = -math.inf, self.steps, None, 0
        self.examples = 0  # learned from

    def run(self) -> tuple[dict, dict]:
        """Returns the run's summary, with metrics of every labelled split, and the predictions on these."""
        train, evals = self.train, self.train.evals_per_epoch
        for step in range(1, self.steps + 1):
            self.clock.start()
            self.train_step(step)
            last = step == self.steps
            if step % train.log_every == 0 or last:
                self.write_loss(step)
            due = step * evals // self.per_epoch > (step - 1) * evals // self.per_epoch
            # Without patience the last evaluation is that of every labelled split, below
            if due and not last or last and train.patience is not None:
                self.clock.stop()
                metrics, _ = evaluate(self.net, self.data, [self.data.dev], self.process)
                if not self.goes_on(step, dev_score(metrics, self.data)):
                    if self.losses:
                        self.write_loss(step)
                    break
        if self.best_weights is not None:
            self.net.model.load_state_dict(self.best_weights)
        metrics, predictions = evaluate(self.net, self.data, self.data.labelled, self.process)
        score, seconds = dev_score(metrics, self.data), self.clock.seconds
        if train.patience is None:
            self.write_line(step, dev_score=score)
        summary = {"score": score, "best_step": self.best_step, "steps": step, "seconds": seconds}
        summary |= {"examples_per_second": self.examples / max(seconds, 1e-9), "metrics": metrics}
        return summary, predictions

    def train_step(self, step: int) -> None:
        """The step numbered `step`, from 1; its loss stays on the device until write_loss."""
        net, train, process, lengths = self.net, self.train, self.process, self.split.lengths
        epoch, number = divmod(step - 1, self.per_epoch)
        if number == 0:
            self.order = np.random.default_rng([train.seed, epoch]).permutation(len(self.split.ends))
        batch = self.order[number * train.batch_size : (number + 1) * train.batch_size]
        self.examples += len(batch)
        batch = batch[np.argsort(lengths[batch], kind="stable")]  # so that ranks get equal work
        factor = lr_factor(step / (self.steps + 1), train)
        self.lr = train.lr * factor
        net.train(True)
        loss = torch.zeros((), device=process.device)
        for part, row in enumerate(net.rows(lengths, batch[process.rank :: process.world_size])):
            # Other encoders draw dropout in their own code, which must differ between rows
            seeds = [train.seed, step - 1] + ([] if net.kbert else [process.rank, part])
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            batch_index = (row[:, None] == batch).argmax(1)  # [n]
            row_loss = net.loss(self.split, row, batch_index, len(batch))
            row_loss.backward()
            loss += row_loss.detach()
        self.update(factor)
        self.losses.append(loss)
        if self.log:
            self.log.bar.update()

    def write_loss(self, step: int) -> None:
        """The mean of the losses since the last line."""
        (mean,) = self.process.sum(torch.stack(self.losses).mean().item())
        self.clock.stop()
        if not math.isfinite(mean):
            raise InputError(
                f"the loss is {mean} around step {step}: lower --train.lr from {self.train.lr:g}, "
                "or raise --train.lr_warmup"
            )
        self.write_line(step, train_loss=mean, lr=self.lr)
        self.losses.clear()

    def goes_on(self, step: int, score: float) -> bool:
        """Notes an evaluation, and keeps the best weights; False when patience has run out."""
        self.write_line(step, dev_score=score)
        if self.train.patience is None:
            return True
        if score > self.best_score:
            weights = {name: tensor.clone() for name, tensor in self.net.model.state_dict().items()}
            self.best_score, self.best_step, self.best_weights, self.waited = score, step, weights, 0
            return True
        self.waited += 1
        return self.waited < self.train.patience

    def write_line(self, step: int, **values: float) -> None:
        if not self.log:
            return
        seconds = self.clock.seconds
        line = log_line(step, self.steps, seconds, self.label, epoch=step / self.per_epoch, **values)
        self.log.step(line, "dev_score" in values, run=self.label.strip(), step=step, seconds=seconds, **values)


def judge(net: Network, data: Data, process: Process, log: RunLog | None, label: str) -> tuple[dict, dict]:
    """A run of a task that trains nothing: returns what Training.run does, and leaves one line in the log."""
    net.warm_up(training=False)
    clock = Clock(process.device)
    clock.start()
    metrics, predictions = evaluate(net, data, data.labelled, process)
    clock.stop()
    score, seconds = dev_score(metrics, data), clock.seconds
    if log:
        line = log_line(0, 0, seconds, label, dev_score=score)
        log.step(line, True, run=label.strip(), step=0, seconds=seconds, dev_score=score)
    return {"score": score, "best_step": 0, "steps": 0, "seconds": seconds, "metrics": metrics}, predictions


# ---------------------------------------------------------------------------------------------------------------------
# One task: every run of its grid, the chosen model's folder, predictions and card

# The settings that tell runs apart
RECORDED = ("optimizer", "lr", "weight_decay", "epochs", "batch_size", "lr_schedule", "trainable", "seed")
COMPILE_FROM = 3_000_000  # tokens of training, over all runs, that a CPU compiles for
MODEL_CARD = """---
{{ card_data }}
---
# {{ title }}

{% if settings -%}
`{{ base }}` finetuned on {{ report.task }}. The weights are those of the run that scored best on `{{ report.dev }}`,
with {{ settings }}.
{% else -%}
`{{ base }}` as it is, measured on {{ report.task }}.
{% endif %}

| from | split | metric | median | min | max | runs |
|---|---|---|---|---|---|---|
{% for start, split, metric, v in rows -%}
| {{ start }} | {{ split }} | {{ metric }} | {{ "%.4f | %.4f | %.4f" % (v.median, v.min, v.max) }} | {{ v.n }} |
{% endfor %}
{%- if settings %}
```python
from transformers import AutoModelFor{{ head }}

model = AutoModelFor{{ head }}.from_pretrained("{{ name }}"{{ branch }}, trust_remote_code=True)
```
{% endif %}"""


@dataclass
class TaskRuns:
    """All runs of one task: run() trains every cell of the grid and keeps the model that scores best on dev."""

    process: Process
    base: Base
    data: Data
    cells: list[FinetuneConfig]
    folder: Path
    log: RunLog | None
    branch: str | None  # of the Hub's repository, where it is not main

    def __post_init__(self):
        self.starts = ["pretrained", "random weights"] if self.cells[0].compare_random else ["pretrained"]
        self.net: Network | None = None
        splits = self.data.splits.items()
        self.made_from = self.process.on_main(
            lambda: {"base_sha256": self.base.sha256, **{split: content.fingerprint() for split, content in splits}}
        )

    def run(self) -> dict:
        """Returns what metrics.json holds."""
        self.process.on_main(lambda: self.folder.mkdir(exist_ok=True))
        todo = [(start, cell) for cell in self.cells for start in self.starts]
        self.write_head(len(todo))
        self.done = self.process.on_main(self.read_done)
        for number, (start, cell) in enumerate(todo, 1):
            settings = {name: getattr(cell, name) for name in RECORDED} if self.data.kind.trains else {}
            if not any((run["start"], run["settings"]) == (start, settings) for run in self.done):
                self.train(start, cell, settings, f"task:{self.data.name} run:{number}/{len(todo)} ")
        predictions = self.predict_unlabelled()
        return self.process.on_main(lambda: self.finish(predictions))

    def write_head(self, runs: int) -> None:
        if not self.log:
            return
        data, kind = self.data, self.data.kind
        sizes = ", ".join(f"{split} {content.examples}" for split, content in data.splits.items())
        classes = f"; classes {', '.join(kind.classes)}" if len(kind.classes) > 1 else ""
        self.log.section(data.name, f"{self.base.name} on {data.name}: {sizes}; {runs} runs{classes}", echo=True)
        for note in data.notes:
            self.log.write(f"note: {note}")

    # --- the runs: one line of runs.jsonl each, which a resumed grid passes over

    def read_done(self) -> list[dict]:
        record = self.folder / "runs.jsonl"
        if not record.exists():
            return []
        whole, _, torn = record.read_bytes().rpartition(b"\n")
        if torn:  # by a kill: that run is run again
            os.truncate(record, len(whole) + bool(whole))
        try:
            runs = [json.loads(line) for line in whole.decode().splitlines()]
            for run in runs:
                run["start"], run["settings"], run["metrics"], run["score"], run["best_step"], run["steps"]
        except (LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{record} is damaged ({said}): delete it to run its runs again") from error
        if any(run.get("made_from") != self.made_from for run in runs):
            raise InputError(f"{record} has runs of other data or another base model: delete it to run them again")
        return runs

    def train(self, start: str, cell: FinetuneConfig, settings: dict, label: str) -> None:
        data, process = self.data, self.process
        data.kind.prepare(data.splits.get("train"))
        self.load(build_model(self.base, data.kind, cell.seed, start == "random weights", cell.pooling))
        if data.kind.trains:
            summary, predictions = Training(self.net, data, cell, process, self.log, label).run()
        else:
            summary, predictions = judge(self.net, data, process, self.log, label)
        run = {"start": start, "settings": settings, "made_from": self.made_from, **summary}
        process.on_main(lambda: self.keep(run, predictions))
        self.done.append(run)

    def load(self, model: nn.Module) -> None:
        """Loads it into the network, which the first call builds."""
        if self.net is None:
            self.net = Network(model, self.base, self.data.kind, self.cells[0], self.process.device)
            self.compile()
        else:
            self.net.model.load_state_dict(model.state_dict())

    def compile(self) -> None:
        """On a CPU only for long training: at the micro shape, graphs pay off from some 2 million tokens on."""
        splits, first = self.data.splits, self.cells[0]
        lengths = splits["train" if self.data.kind.trains else self.data.dev].lengths
        tokens = lengths.sum() * sum(cell.epochs for cell in self.cells) * len(self.starts) * self.data.kind.trains
        pays = self.net.flex or tokens >= COMPILE_FROM
        if first.compile and self.net.kbert and pays and why_eager(self.process.device) is None:
            batch = -(-first.batch_size // self.process.world_size) if self.data.kind.trains else len(lengths)
            self.net.compile(lengths, batch, max(int(split.lengths.max()) for split in splits.values()))

    def keep(self, run: dict, predictions: dict) -> None:
        others = [other["score"] for other in self.done if other["start"] == run["start"]]
        if run["start"] == "pretrained" and all(run["score"] > score for score in others):
            if self.data.kind.trains:
                what = self.net.model, self.base.tokenizer, self.data.kind.finished(self.net.model)
                save_folder(self.folder / "model", lambda into: save_model(into, *what))
            self.write_predictions(predictions)
        with open(self.folder / "runs.jsonl", "a") as file:
            file.write(json.dumps(run) + "\n")

    def write_predictions(self, predictions: dict) -> None:
        folder = self.folder / "predictions"
        folder.mkdir(exist_ok=True)
        for split, values in predictions.items():
            self.data.kind.write(folder, split, self.data.splits[split], values)

    def predict_unlabelled(self) -> dict:
        """The best model's predictions on unlabelled splits."""
        data = self.data
        unlabelled = [split for split in data.splits if split != "train" and split not in data.labelled]
        if not unlabelled:
            return {}
        chosen = open_base(str(self.folder / "model"), self.base.max_length, self.base.trusted)
        data.kind.prepare(None)
        self.load(build_model(chosen, data.kind, seed=0))
        dev = self.best_run("pretrained")["metrics"][data.dev]
        _, predictions = evaluate(self.net, data, unlabelled, self.process, dev)
        return predictions

    # --- the report

    def finish(self, predictions: dict) -> dict:
        report = self.report()
        self.write_predictions(predictions)
        self.write_card(report)
        for start in self.starts:
            runs = [run for run in self.done if run["start"] == start]
            if len(runs) > len(self.same_settings(start)):
                self.log.section("grid", grid_table(runs), echo=True)
        self.log.section(f"results {self.data.name}", results_table(report["results"]), echo=True)
        if self.data.kind.trains:
            self.log.write(f"model: {self.folder / 'model'}")
        write_json(self.folder / "metrics.json", report)  # last: what has it is finished
        return report

    def best_run(self, start: str) -> dict:
        return max((run for run in self.done if run["start"] == start), key=lambda run: run["score"])

    def same_settings(self, start: str) -> list[dict]:
        """The runs with the settings that score best, over their seeds."""
        best = {**self.best_run(start)["settings"], "seed": 0}
        return [run for run in self.done if run["start"] == start and {**run["settings"], "seed": 0} == best]

    def report(self) -> dict:
        data, best = self.data, self.best_run("pretrained")
        results = {}
        for start in self.starts:
            results[start] = spread_metrics([run["metrics"] for run in self.same_settings(start)])
        results[data.kind.baseline_name] = spread_metrics([data.baseline()])
        splits = {}
        for split, content in data.splits.items():
            splits[split] = {"examples": content.examples, "fingerprint": self.made_from[split]}
        return {
            "task": data.name,
            "base_model": self.base.name,
            "dataset": data.source,
            "dev": data.dev,
            "kind": data.kind.name,
            "classes": data.kind.classes,
            "splits": splits,
            "notes": data.notes,
            "model": {"settings": best["settings"], "metrics": best["metrics"]},
            "results": results,
            "runs": self.done,
        }

    def write_card(self, report: dict) -> None:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData

        base, kind, dataset = self.base, self.data.kind, Path(self.data.source)
        title = self.cells[0].hf_model_name or self.folder.resolve().name
        common = {"task_type": kind.pipeline_tag, "dataset_name": self.data.name}
        common["dataset_type"] = dataset.name if dataset.exists() else self.data.source
        evaluations = [
            EvalResult(**common, dataset_split=split, metric_type=metric, metric_value=round(value, 5))
            for split, metrics in report["model"]["metrics"].items()
            for metric, value in metrics.items()
        ]
        data = ModelCardData(
            model_name=title,
            library_name="transformers",
            license="mit" if base.kbert else None,
            tags=["finetuned"] * self.data.kind.trains + ["kbert"] * base.kbert,
            base_model=None if Path(base.name).exists() else base.name,
            pipeline_tag=kind.pipeline_tag,
            eval_results=evaluations,
        )
        settings = ", ".join(f"{name} {value}" for name, value in report["model"]["settings"].items())
        said = {"title": title, "base": base.title, "head": kind.head, "settings": settings, "report": report}
        said["name"] = self.cells[0].hf_model_name or (self.folder / "model").as_posix()
        said["branch"] = f', revision="{self.branch}"' if self.branch else ""
        card = ModelCard.from_template(data, template_str=MODEL_CARD, rows=flat_results(report["results"]), **said)
        folder = self.folder / "model" if self.data.kind.trains else self.folder
        (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def spread_metrics(runs: list[dict]) -> dict:
    """{split: {metric: value}} of each run -> {split: {metric: spread}}."""
    return {
        split: {metric: spread([run[split][metric] for run in runs]) for metric in metrics}
        for split, metrics in runs[0].items()
    }


def flat_results(results: dict) -> Iterator[tuple[str, str, str, dict]]:
    """What was started from, split, metric, and the spread of its values."""
    for start, splits in results.items():
        for split, metrics in splits.items():
            for metric, value in metrics.items():
                yield start, split, metric, value


def grid_table(runs: list[dict]) -> str:
    """Settings that differ, and how they score: the best first."""
    rows = [{**run["settings"], "dev_score": run["score"], "best_step": run["best_step"]} for run in runs]
    table = pd.DataFrame(rows)
    same = [name for name in RECORDED if table[name].nunique() == 1]
    table = table.drop(columns=same).sort_values("dev_score", ascending=False, kind="stable")
    return table.to_string(index=False, float_format="{:.6g}".format)


def results_table(results: dict) -> str:
    """Starting point against split and metric or, with many metrics, the other way round: the median and, with
    several seeds, the range.
    """
    cells: dict[str, dict] = {start: {} for start in results}
    for start, split, metric, value in flat_results(results):
        range_of = f" ({value['min']:.4f} to {value['max']:.4f})" if value["n"] > 1 else ""
        cells[start][f"{split} {metric}"] = f"{value['median']:.4f}{range_of}"
    table = pd.DataFrame.from_dict(cells, orient="index").fillna("-")
    table = table if table.shape[1] <= 4 else table.T
    return table.to_string(col_space=[len(name) + 2 for name in table])  # two blanks between names, which hold some


# ---------------------------------------------------------------------------------------------------------------------
# All of GLUE: one row

ROW = (
    ("MNLI-m", "mnli", "validation_matched", "accuracy"),
    ("MNLI-mm", "mnli", "validation_mismatched", "accuracy"),
    ("QQP acc", "qqp", "validation", "accuracy"),
    ("QQP F1", "qqp", "validation", "f1"),
    ("QNLI", "qnli", "validation", "accuracy"),
    ("SST-2", "sst2", "validation", "accuracy"),
    ("CoLA", "cola", "validation", "matthews_correlation"),
    ("STS-B", "stsb", "validation", "spearman"),
    ("MRPC acc", "mrpc", "validation", "accuracy"),
    ("MRPC F1", "mrpc", "validation", "f1"),
    ("RTE", "rte", "validation", "accuracy"),
)


def glue_scores(results: dict[str, dict]) -> dict[str, float | None]:
    """{task: {split: {metric: spread}}} -> columns of the row in percent, and averages for each way of counting.

    MNLI counts as one task (the mean of its parts) or as two; QQP and MRPC by accuracy or by F1; STS-B by Spearman.
    Where data of one's own has no validation split, a labelled test split comes before a part of train.
    """
    scores: dict[str, float | None] = {}
    for column, task, split, metric in ROW:
        splits = results.get(task, {})
        others = [*(name for name in splits if name.startswith("test")), HELD_OUT] if task != "mnli" else ()
        named = next((splits[name] for name in (split, *others) if name in splits), None)
        scores[column] = 100 * named[metric]["median"] if named else None

    def values(*columns: str) -> list[float]:
        return [scores[column] for column in columns if scores[column] is not None]

    mnli = values("MNLI-m", "MNLI-mm")
    for by in ("acc", "F1"):
        rest = values(f"QQP {by}", "QNLI", "SST-2", "CoLA", "STS-B", f"MRPC {by}", "RTE")
        for count, parts in (("one", [statistics.fmean(mnli)] if mnli else []), ("two", mnli)):
            scores[f"avg, MNLI as {count}, {by}"] = statistics.fmean(parts + rest) if parts + rest else None
    return scores


def glue_row(title: str, scores: dict[str, float | None]) -> str:
    cells = [title, *("-" if value is None else f"{value:.1f}" for value in scores.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in (["model", *scores], ["---"] * len(cells), cells))


# ---------------------------------------------------------------------------------------------------------------------
# The command


OPERATIONAL = ("row_tokens", "device", "timeout_minutes", "compile", "log_every", "hub_minutes")


def alike(settings: dict) -> dict:
    """What a run must share with one that continues it: all but OPERATIONAL."""
    if not isinstance(train := settings.get("train"), dict):
        return settings
    return {**settings, "train": {name: value for name, value in train.items() if name not in OPERATIONAL}}


def claim_folder(train: FinetuneConfig, settings: dict, task: str) -> Path:
    """A new folder for the run, or that of the unfinished one it continues. settings: what config.yaml holds."""
    out = Path(train.out)
    folder = out / (train.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{task}")
    taken = (folder / "config.yaml").exists()
    if train.resume:
        unfinished = [run for run in out.glob("*") if not is_finished(run, "metrics.json")]
        same = [run for run in unfinished if alike(read_settings(run)) == alike(settings)]
        if taken and folder not in same:
            raise InputError(
                f"{folder} is finished or was made with other settings: resume with those, "
                "or choose another --train.run_name"
            )
        if taken:
            return folder
        if same and train.run_name is None:
            return max(same, key=os.path.getmtime)
        which = folder if train.run_name else f"of these settings, from {settings['train']['base_model']}"
        print(f"no unfinished run {which}: starting {folder}")
    elif taken:
        raise InputError(
            f"{folder} holds a run already: choose another --train.run_name, or continue it with --train.resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, settings)
    return folder


class Finetuner:
    """What one call of the command does: it opens base model, data and folder, finetunes one task or all of GLUE."""

    def __init__(self, process: Process, settings: dict, given: set[str], argv: list[str], code: dict[str, str]):
        """settings and given: as parse_flags gives them. code: read_code() of when the program started."""
        self.process, self.given, self.argv, self.code = process, given, argv, code
        self.task, self.protocol = settings["task"], PROTOCOLS[settings["protocol"]]
        self.data, self.train = DataConfig(**settings["data"]), FinetuneConfig(**settings["train"])
        self.out, preset = Path(self.train.out), settings["preset"]
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_float32_matmul_precision("high")
        self.base_name = self.train.base_model or process.on_main(lambda: str(newest_run(self.out, preset)))
        self.base = self.open_base(self.base_name)
        self.train = choose_rates(self.train, self.protocol, self.base.kbert)
        # For config.yaml: without the run's place, and without the grid's settings, which it would fix
        left_out = ("out", "run_name", "resume", *free_names(self.protocol, given))
        train = {name: value for name, value in settings["train"].items() if name not in left_out}
        self.repeat = {**settings, "train": {**train, "base_model": self.base_name}}
        self.hub = HubPusher(self.train.hf_model_name, self.train.hub_minutes) if self.train.hf_model_name else None

    def run(self) -> None:
        if self.task == "glue":
            self.open_folder(self.base)
            reports = self.finetune_glue()
        else:
            base = self.base
            if self.task in self.protocol.from_mnli:
                base = self.open_base(self.process.on_main(lambda: mnli_model(self.out, self.base_name)))
            data = self.read(self.task, base)  # before there is a folder, which bad data would leave behind
            if self.hub and not data.kind.trains:
                raise InputError(f"--task {self.task} trains nothing to push: drop --train.hf_model_name")
            self.open_folder(base)
            reports = {self.task: self.finetune(data, base, self.folder)}
            self.push(self.folder, "main")
        if self.log:
            self.close(reports)

    def open_base(self, name: str) -> Base:
        return self.process.on_main(lambda: open_base(name, self.data.max_length, self.train.trust_remote_code))

    def read(self, task: str, base: Base) -> Data:
        if task == "pairs" and self.data.dataset is None:
            self.data.dataset = str(locate_data(SAMPLE, self.process) / "pairs")
        detector = "KBERTForReplacedTokenDetection" in (base.config.get("architectures") or ())
        return self.process.on_main(lambda: read_data(task, base.tokenizer, base.max_length, self.data, detector))

    def open_folder(self, base: Base) -> None:
        """And the log, which opens with what is started from: base."""
        if self.hub:
            self.process.on_main(self.hub.check)
        self.folder = self.process.on_main(lambda: claim_folder(self.train, self.repeat, self.task))
        self.log = RunLog(self.folder) if self.process.is_main else None
        if not self.log:
            return
        data = {"base_sha256": base.sha256}
        machine = environment(self.process.device, self.process.world_size)
        train = {name: getattr(self.train, name) for name in self.repeat["train"]} | {"base_model": self.base_name}
        train["pooling"] = self.train.pooling if base.pools else None
        config = {**self.repeat, "train": train, "base_model": base.name}
        self.log.open(self.argv, config, machine, data, self.code)
        given = self.train.base_model or base is not self.base
        newest = "" if given else ", the newest finished pretraining run"
        self.log.section("run", f"{self.folder}: from {base.name}{newest}", echo=True)

    def finetune(self, data: Data, base: Base, folder: Path, branch: str | None = None) -> dict:
        """One task, whose report it returns."""
        cells = grid_of(self.protocol, data.name, self.given, self.train)
        cells = cells if data.kind.trains else cells[:1]  # no setting changes what is not trained
        return TaskRuns(self.process, base, data, cells, folder, self.log, branch).run()

    def push(self, folder: Path, revision: str) -> None:
        if self.hub:
            self.process.on_main(lambda: self.hub.push(folder / "model", revision))

    def finetune_glue(self) -> dict[str, dict]:
        """Every GLUE task whose data is there, finished ones not run again: task -> report."""
        reports = {}
        for task in GLUE:
            from_mnli = task in self.protocol.from_mnli and "mnli" in reports
            base = self.open_base(str(self.folder / "mnli" / "model")) if from_mnli else self.base
            if task in self.protocol.from_mnli and not from_mnli and self.log:
                self.log.write(f"note: {task} starts from {self.base_name}: there is no MNLI model here")
            try:
                finished = self.finished(task)
                branch = task if self.hub else None
                reports[task] = finished or self.finetune(self.read(task, base), base, self.folder / task, branch)
                self.push(self.folder / task, task)  # again where it was finished: the Hub passes over what it has
            except MissingData as error:
                if self.data.dataset is None:  # the Hub, which has them all
                    raise InputError(f"{error}; or go on later with --train.resume") from error
                if self.log:
                    self.log.write(f"{task} is left out: {error}")
        if not reports:
            raise InputError(
                "no GLUE task has its data: give --data.dataset FOLDER with a folder for each task, "
                "named as in nyu-mll/glue"
            )
        self.process.on_main(lambda: self.write_row(reports))
        return reports

    def finished(self, task: str) -> dict | None:
        metrics = self.folder / task / "metrics.json"
        return self.process.on_main(lambda: read_json(metrics) if metrics.exists() else None)

    def write_row(self, reports: dict[str, dict]) -> None:
        scores = glue_scores({task: report["results"]["pretrained"] for task, report in reports.items()})
        counted = {task for column, task, *_ in ROW if scores[column] is not None}
        said = f"medians over runs; averages over {len(counted)} of {len(GLUE)} tasks"
        if others := [task for task in reports if task not in counted]:
            said += f" (not {', '.join(others)}: no split that the row takes has labels)"
        self.log.section("glue", f"{said}\n{glue_row(self.base.title, scores)}", echo=True)
        report = {"task": "glue", "base_model": self.base_name, "protocol": self.repeat["protocol"]}
        report |= {"scores": scores, "tasks": list(reports)}
        write_json(self.folder / "metrics.json", report)

    def close(self, reports: dict[str, dict]) -> None:
        result = {"run": str(self.folder), "finished": True}
        for name in ("splits", "results"):
            result[name] = {task: report[name] for task, report in reports.items()}
        if self.hub:  # before the result, which says that nothing is left to resume
            self.hub.finish()
        self.log.close(result)
        self.log.bar.close()
        if any(run["steps"] for report in reports.values() for run in report["runs"]):
            draw_curves(self.folder)


def read_flags(argv: list[str]) -> tuple[dict, set[str]]:
    """The settings, and the names of those that argv gives: flags over protocol over preset."""
    parser = make_parser(__doc__, {"data": DataConfig, "train": FinetuneConfig})
    plain = {
        "preset": (PRESETS, "base", "named settings that protocol and flags override [base]"),
        "task": ([*TASKS, "glue"], "mnli", "what to finetune on; glue: all its tasks [mnli; of --preset micro, pairs]"),
        "protocol": (PROTOCOLS, "default", "named settings and grid, between preset and flags [default]"),
    }
    for name, (choices, default, said) in plain.items():
        parser.add_argument(f"--{name}", choices=list(choices), default=default, help=said)
    protocols = {name: protocol.settings for name, protocol in PROTOCOLS.items()}
    return parse_flags(parser, argv, {"preset": PRESETS, "protocol": protocols})


def main(argv: list[str] | None = None) -> None:
    code = read_code(MODULES)
    argv = sys.argv[1:] if argv is None else argv
    settings, given = read_flags(argv)
    train = settings["train"]
    with join_processes(train["device"], train["timeout_minutes"]) as process:
        Finetuner(process, settings, given, ["finetuner.py", *argv], code).run()


if __name__ == "__main__":
    run_program(main, "--train.resume")
