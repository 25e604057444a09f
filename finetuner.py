"""Finetunes an encoder on one task and reports it: MNLI unless told otherwise, any GLUE task or all, IMDB, SQuAD, your own file.

    laptop, no data       torchrun --standalone --nproc_per_node=1 finetuner.py --preset micro
    one GPU               torchrun --standalone --nproc_per_node=1 finetuner.py --train.base_model USER/NAME
    eight GPUs            torchrun --standalone --nproc_per_node=8 finetuner.py --task glue --protocol modernbert --train.base_model USER/NAME
    your own file         torchrun --standalone --nproc_per_node=1 finetuner.py --task custom --data.dataset reviews.csv --data.text review

`--help` lists every setting with its unit. Without --train.base_model it starts from the newest pretraining run under logs/; any other
encoder of `transformers` is measured the same way. A run leaves logs/RUN/ with model/ in Hugging Face form and a card that carries the
results, metrics.json, predictions/ as gluebenchmark.com takes them, and log.txt. The same examples make up the same steps, with the same
dropout, on any number of ranks and however they are packed.

Shapes: n examples of a row, T tokens of a row, S tokens of its longest example, B examples of a step, C classes, d hidden_size.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import string
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from dataloading import InputError, read_manifest, read_shard, sha256_of
from model import KBERTConfig, KBERTForQuestionAnswering, KBERTForSequenceClassification, compiled_backend, option
from trainer import (
    LOG_LINE,
    MODULES,
    Clock,
    HubPusher,
    Place,
    RunLog,
    close_log,
    draw_curves,
    first_line,
    lr_factor,
    open_log,
    parse_flags,
    processes,
    save_folder,
    save_model,
)

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    dataset: str | None  # on the Hub, or a folder
    config: str | None
    columns: tuple[str, ...]  # the text, or the text and its pair
    metrics: tuple[str, ...]  # runs are chosen by their mean
    classes: tuple[str, ...] | None = None  # in the order of their numbers; None: found in the data
    kind: Literal["classes", "number", "span"] = "classes"
    files: dict = field(default_factory=dict)  # split -> name of its predictions on gluebenchmark.com
    server_names: bool = False  # whether the server wants classes by name, not by number
    diagnostic: str | None = None  # a configuration whose test split is predicted too
    report: tuple[str, ...] = ("validation",)  # splits of the summary row


def glue(config: str, columns: str, classes: str, metrics: str = "accuracy", file: str = "", **more) -> Task:
    return Task(
        "nyu-mll/glue",
        config,
        tuple(columns.split()),
        tuple(metrics.split()),
        tuple(classes.split()) or None,
        **({"files": {"test": file}} | more),
    )


TASKS = {  # in the order that --task glue runs them: MNLI first, for those that start from its model
    "mnli": glue(
        "mnli",
        "premise hypothesis",
        "entailment neutral contradiction",
        server_names=True,
        report=("validation_matched", "validation_mismatched"),
        files={"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "ax": "AX"},
        diagnostic="ax",
    ),
    "qqp": glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", "QQP"),
    "qnli": glue("qnli", "question sentence", "entailment not_entailment", file="QNLI", server_names=True),
    "sst2": glue("sst2", "sentence", "negative positive", file="SST-2"),
    "cola": glue("cola", "sentence", "unacceptable acceptable", "matthews_correlation", "CoLA"),
    "stsb": glue("stsb", "sentence1 sentence2", "", "pearson spearman", "STS-B", kind="number"),
    "mrpc": glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", "MRPC"),
    "rte": glue("rte", "sentence1 sentence2", "entailment not_entailment", file="RTE", server_names=True),
    "wnli": glue("wnli", "sentence1 sentence2", "not_entailment entailment", file="WNLI"),
    "imdb": Task("stanfordnlp/imdb", None, ("text",), ("accuracy",), ("neg", "pos"), report=("test",)),
    "squad": Task("rajpurkar/squad", None, ("question", "context"), ("f1", "exact_match"), kind="span"),
    "squad_v2": Task("rajpurkar/squad_v2", None, ("question", "context"), ("f1", "exact_match"), kind="span"),
    "pairs": Task(
        "data/sample/pairs",
        None,
        ("text", "text_pair"),
        ("accuracy",),
        ("another_description", "its_description"),
        report=("validation", "test"),
    ),
    "custom": Task(None, None, ("text",), ("accuracy", "macro_f1")),
}
GLUE = ("mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")  # WNLI is left out, as everywhere


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class DataConfig:
    dataset: str | None = option(
        None,
        "folder or file (csv, tsv, json, parquet), folder of packed shards, or id on the Hub; none: the task's own",
    )
    text: str | None = option(None, "column of the text; none: the task's")
    text_pair: str | None = option(None, "column of the second text; none: the task's")
    label: str = option("label", "column of the label")
    validation: str | None = option(
        None, "split that models are chosen by; none: validation, the task's, or a tenth of train held out"
    )
    max_length: int | None = option(
        None, "tokens of an example; longer ones are cut, the longer text first; none: the model's, 512 at most"
    )
    max_train_examples: int | None = option(
        None, "examples of train that are used, the first after shuffling; none: all"
    )
    stride: int = option(128, "tokens that neighbouring windows of a long context share (SQuAD)")
    max_answer: int = option(30, "tokens of an answer at most (SQuAD)")


@dataclass
class FinetuneConfig:
    """What is trained, for how long, how fast, and what is kept."""

    base_model: str | None = option(
        None, "folder or Hub id of a pretrained or finetuned encoder; none: the newest finished pretraining run"
    )
    epochs: float = option(3.0, "passes over train, at most")
    batch_size: int = option(32, "examples in an optimizer step, over all ranks")
    lr: float = option(5e-5, "AdamW's learning rate")
    weight_decay: float = option(0.01, "AdamW's, for matrices")
    lr_schedule: Literal["one_cycle", "cosine"] = option(
        "one_cycle", "how the learning rate falls after warm-up: linearly, or as a cosine"
    )
    lr_warmup: float = option(0.06, "fraction of the run in which the learning rate rises from 0")
    lr_floor: float = option(0.0, "fraction of the learning rate at the end")
    clip: float = option(1.0, "norm that gradients are clipped to")
    pooling: Literal["mean", "cls"] = option(
        "mean",
        "what of a text is classified: the mean of its tokens' states or that of [CLS]; of other encoders, their own",
    )
    trainable: Literal["all", "classifier", "last_2", "last_3"] = option(
        "all", "what is trained: all, the classifier, or it and the last layers"
    )
    evals_per_epoch: int = option(1, "evaluations on the validation split in an epoch")
    patience: int | None = option(
        None, "evaluations without improvement that end a run, which keeps its best weights; none: the last count"
    )
    seeds: int = option(1, "runs with seeds seed, seed + 1, ...; the median counts")
    seed: int = option(1, "of the classifier's weights, dropout and order of examples")
    compare_random: bool = option(False, "also finetune the same shape from random weights")
    row_tokens: int | None = option(None, "tokens in one forward; none: 4096 on a CPU, 16384 on a GPU")
    compile: bool = option(True, "torch.compile on a GPU")
    log_every: int = option(20, "steps between lines of the log")
    resume: bool = option(False, "continue the newest unfinished run of the same settings, or --train.run_name")
    out: str = option("logs", "folder of runs")
    run_name: str | None = option(None, "folder of this run within out; none: date, time and task")
    hf_model_name: str | None = option(
        None, "USER/NAME on the Hugging Face Hub to push to; with --task glue one branch for each task"
    )

    def __post_init__(self):
        for name in ("epochs", "batch_size", "lr", "evals_per_epoch", "seeds", "log_every"):
            if getattr(self, name) <= 0:
                raise InputError(f"--train.{name} is {getattr(self, name)}: give a positive number")


PRESETS = {
    "base": {},
    "micro": {
        "data.max_train_examples": 5000,
        "train.epochs": 2.0,
        "train.batch_size": 16,
        "train.lr": 3e-4,
        "train.compare_random": True,
    },
}
DEFAULT_TASK = {"base": "mnli", "micro": "pairs"}


@dataclass(frozen=True)
class Protocol:
    """Settings that flags override, and a grid over those that no flag fixes."""

    settings: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    long_epochs: tuple[float, ...] = ()  # the grid's epochs for tasks not in `short`
    short: tuple[str, ...] = ()
    from_mnli: tuple[str, ...] = ()  # tasks that start from the MNLI model


PROTOCOLS = {
    "default": Protocol(),
    "sane": Protocol(
        {  # Geiping and Goldstein 2022, "Cramming": one setting for all tasks
            "train.lr": 4e-5,
            "train.batch_size": 16,
            "train.epochs": 5.0,
            "train.seeds": 5,
            "train.lr_schedule": "cosine",
        }
    ),
    "modernbert": Protocol(  # Warner et al. 2024, "Smarter, better, faster, longer", table of GLUE hyperparameters
        {"train.batch_size": 64, "train.patience": 5, "train.evals_per_epoch": 4},
        grid={"lr": (1e-5, 3e-5, 5e-5, 8e-5), "weight_decay": (1e-6, 5e-6, 8e-6, 1e-5), "epochs": (1.0, 2.0, 3.0)},
        long_epochs=(2.0, 5.0, 10.0),
        short=("sst2", "mnli", "rte"),
        from_mnli=("rte", "mrpc", "stsb"),
    ),
}


def grid_of(protocol: Protocol, task: str, given: set[str], train: FinetuneConfig) -> list[FinetuneConfig]:
    """The settings of every run: the protocol's grid, without the fields that flags fix, times the seeds."""
    grid = {name: values for name, values in protocol.grid.items() if f"train.{name}" not in given}
    if "epochs" in grid and task not in protocol.short:
        grid["epochs"] = protocol.long_epochs
    seeds = range(train.seed, train.seed + train.seeds)
    return [
        dataclasses.replace(train, **dict(zip(grid, values)), seed=seed)
        for values in itertools.product(*grid.values())
        for seed in seeds
    ]


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

    @property
    def title(self) -> str:
        """The Hub id, or of logs/RUN/model the run."""
        return Path(self.name).resolve().parent.name if Path(self.name).exists() else self.name


def newest_run(out: Path, preset: str) -> Path:
    """model/ of the newest finished pretraining run; of micro runs alone under the preset micro."""
    found = []
    for path in out.glob("*/model/config.json"):
        run = path.parent.parent
        settings = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
        if "KBERTForMaskedLM" in (json.loads(path.read_text()).get("architectures") or []) and preset in (
            "base",
            settings.get("preset"),
        ):
            found.append(path)
    if not found:
        raise InputError(
            f"no finished {'micro ' if preset == 'micro' else ''}pretraining run under {out}/: pretrain with "
            f"`torchrun --standalone --nproc_per_node=1 trainer.py --preset {preset}`, or give --train.base_model"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def open_base(name: str, max_length: int | None) -> Base:
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
        if not config:
            raise OSError("it has no config.json")
        kbert = config.get("model_type") == "kbert"
        tokenizer = (PreTrainedTokenizerFast if kbert else AutoTokenizer).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot open the base model {name} ({str(error).strip().splitlines()[0]}): "
            "give --train.base_model a folder with config.json, weights and tokenizer, or a Hub id"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {name} has no tokenizer.json: save it as a fast tokenizer first")
    limit = config.get("max_position_embeddings") or 512
    tokenizer.model_max_length = min(max_length or 512, limit)
    return Base(name, kbert, config, tokenizer, tokenizer.model_max_length)


def build_model(
    base: Base, kind: str, classes: list[str], seed: int, random: bool = False, pooling: str | None = None
) -> nn.Module:
    """The encoder under a new head; from random weights, its shape alone is kept."""
    torch.manual_seed(seed)
    labels = (
        {}
        if kind == "span"
        else {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: i for i, name in enumerate(classes)},
            "problem_type": "regression" if kind == "number" else "single_label_classification",
        }
    )
    if base.kbert:
        drop = (
            "auto_map",
            "architectures",
            "id2label",
            "label2id",
        )  # auto_map may name the Hub repository it was loaded from
        labels |= {"classifier_pooling": pooling} if pooling else {}
        config = KBERTConfig.from_dict({k: v for k, v in base.config.items() if k not in drop} | labels)
        cls = KBERTForQuestionAnswering if kind == "span" else KBERTForSequenceClassification
        make = cls
    else:
        config = AutoConfig.from_pretrained(base.name, **labels)
        cls = (
            transformers.AutoModelForQuestionAnswering
            if kind == "span"
            else transformers.AutoModelForSequenceClassification
        )
        make = cls.from_config
    if random:
        return make(config)
    try:
        model, loading = cls.from_pretrained(
            base.name, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise InputError(
            f"cannot load the weights of {base.name} ({first_line(error.__cause__ or error)}): give --train.base_model a finished model"
        ) from error
    if missing := sorted(
        key for key in loading["missing_keys"] if base.kbert and key.startswith("encoder.")
    ):  # they would be fresh, without a word
        raise InputError(
            f"{base.name} has no {missing[0]}: it was trained by another model.py; finetune it with the checkout that trained it"
        )
    return model


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Freezes the encoder but for its last layers; a head, and the pooler that some encoders own, always trains."""
    if trainable == "all":
        return
    encoder = model.base_model
    layers = next(
        m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    encoder.requires_grad_(False)
    for layer in layers[len(layers) - (0 if trainable == "classifier" else int(trainable[-1])) :]:
        layer.requires_grad_(True)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# Data: files, Hub or shards -> splits of tokenised examples


class MissingData(InputError):
    """Data that is not there, where --task glue goes on without it."""


@dataclass
class Spans:
    """What finds the answer's text for a window of a context."""

    example: np.ndarray  # [windows] number of the question
    offsets: np.ndarray  # [all tokens, 2] int32 first character and the one after the last; -1 outside the context
    contexts: list[str]  # [questions]
    answers: list[list[str]]  # [questions] none: there is no answer


@dataclass
class Split:
    """Tokenised examples in flat arrays, which other ranks get whole at little cost."""

    tokens: np.ndarray  # [all tokens] int32
    segments: np.ndarray | None  # [all tokens] int8, 1 in the second text, for encoders that ask for it
    ends: np.ndarray  # [examples] where each example ends
    labels: np.ndarray  # [examples] int64 or, of numbers, float64; [windows, 2] an answer's first and last token
    known: np.ndarray  # [examples] bool, False where a label is missing
    idx: list  # [examples], of SQuAD [questions]
    spans: Spans | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    @property
    def fingerprint(self) -> str:
        """Of examples and labels, in whatever order."""
        hashes = sorted(
            hashlib.sha256(self.of(self.tokens, i).tobytes() + label.tobytes()).digest()
            for i, label in enumerate(self.labels)
        )
        return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]

    def of(self, flat: np.ndarray, i: int) -> np.ndarray:
        return flat[self.ends[i - 1] if i else 0 : self.ends[i]]

    def only(self, keep: np.ndarray) -> Split:
        """The examples numbered `keep`."""
        picked = np.concatenate(
            [np.arange(self.ends[i] - length, self.ends[i]) for i, length in zip(keep, self.lengths[keep])]
        )
        spans = self.spans and dataclasses.replace(
            self.spans, example=self.spans.example[keep], offsets=self.spans.offsets[picked]
        )
        return Split(
            self.tokens[picked],
            None if self.segments is None else self.segments[picked],
            np.cumsum(self.lengths[keep]),
            self.labels[keep],
            self.known[keep],
            self.idx if spans else [self.idx[i] for i in keep],
            spans,
        )


READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}


def read_rows(task: Task, data: DataConfig) -> dict:
    """{split: rows of the data set}. Files in a folder are splits by name: train.parquet, validation-00000-of-00001.parquet."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    name = data.dataset or task.dataset
    if name is None:
        raise InputError(
            "--task custom needs data: give --data.dataset FILE_OR_FOLDER, --data.text COLUMN and --data.label COLUMN"
        )
    path = Path(name) / task.config if task.config and (Path(name) / task.config).is_dir() else Path(name)
    if not path.exists() and not (name == task.dataset or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise MissingData(f"no file or folder {name}: check --data.dataset")
    try:
        if not path.exists():
            try:
                rows = dict(load_dataset(name, task.config if name == task.dataset else None))
                if task.diagnostic and name == task.dataset:
                    rows[task.diagnostic] = load_dataset(name, task.diagnostic, split="test")
                return rows
            except Exception as error:  # whatever the Hub or the network has to say
                raise MissingData(
                    f"cannot load {name} from the Hugging Face Hub ({first_line(error.__cause__ or error)}): "
                    "give --data.dataset FILE_OR_FOLDER with the same columns"
                ) from error
        files = collections.defaultdict(list)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if reader := next((READERS[s] for s in file.suffixes if s in READERS), None):
                split = re.sub(r"-\d{5}-of-\d{5}$|_\d{6}$", "", file.name.split(".")[0]) if path.is_dir() else "train"
                files[reader, split].append(file)
        if not files:
            raise MissingData(
                f"{path} holds no {', '.join(READERS)} file: name them by split, such as train.parquet and validation.parquet"
            )
        rows = {}
        for (reader, split), paths in files.items():
            if not all(file.stat().st_size for file in paths):
                raise InputError(f"{paths[0]} is empty: write rows to it or take it away")
            more = {"delimiter": "\t"} if ".tsv" in paths[0].suffixes else {}
            rows[split] = load_dataset(reader, data_files=[str(file) for file in paths], split="train", **more)
        beside = path.parent / task.diagnostic if task.diagnostic else None
        if beside and path.name == task.config and beside.is_dir():
            rows[task.diagnostic] = read_rows(
                dataclasses.replace(task, diagnostic=None), DataConfig(dataset=str(beside))
            )["test"]
        return rows
    except InputError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        raise InputError(
            f"cannot read {path}, or it has no rows ({first_line(error.__cause__ or error)}): check the file"
        ) from error


def choose_columns(task: Task, data: DataConfig, rows: dict) -> list[str]:
    columns = [
        data.text or task.columns[0],
        *filter(None, [data.text_pair or (task.columns[1] if len(task.columns) > 1 else None)]),
    ]
    for split, table in rows.items():
        wanted = columns + (["answers"] if task.kind == "span" else [data.label] if split == "train" else [])
        if missing := [column for column in wanted if column not in table.column_names]:
            raise InputError(
                f"{split} has no column {', '.join(missing)}: its columns are {', '.join(table.column_names)}; "
                "choose with --data.text, --data.text_pair and --data.label"
            )
        if not len(table):
            raise InputError(f"split {split} has no rows: write some or take it away")
    return columns


def number_labels(
    raw: dict[str, list], task: Task, names: list[str] | None, custom: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of each split as numbers, -1 or nan where missing, and the names of the classes (of a number: none)."""
    # In a set of one's own, -1 may be a class: there it means "no label" only in a split that has no other.
    none = {split: {None} if custom and set(values) - {-1, None} else {None, -1} for split, values in raw.items()}
    labels = {
        split: [None if value in none[split] or value != value else value for value in values]
        for split, values in raw.items()
    }
    if task.kind == "number":
        return {split: np.array(values, dtype=np.float64) for split, values in labels.items()}, ["score"]
    seen = {split: set(values) - {None} for split, values in labels.items()}
    if names is None:
        values = sorted(seen["train"])
        names, number = [str(value) for value in values], {value: i for i, value in enumerate(values)}
    else:
        number = {key: i for i, name in enumerate(names) for key in (i, name)}
    for split, values in seen.items():
        if unknown := sorted(map(str, values - number.keys())):
            raise InputError(
                f"split {split} has the label {unknown[0]}, which is none of the classes {', '.join(names)}: check --data.label"
            )
    return {
        split: np.array([-1 if value is None else number[value] for value in values])
        for split, values in labels.items()
    }, names


def encode_texts(
    rows, columns: list[str], labels: np.ndarray, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Split, int]:
    """The split, and how many examples were cut, the longer text first."""
    tokens, segments, cut = [], [], 0
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        texts = (["" if text is None else str(text) for text in batch[column]] for column in columns)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        tokens += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        segments += [np.array(ids, dtype=np.int8) for ids in encoded.get("token_type_ids", [])]
        cut += sum(bool(e.overflowing) for e in encoded.encodings)
    known = ~np.isnan(labels) if labels.dtype == np.float64 else labels >= 0
    idx = list(rows["idx"]) if "idx" in rows.column_names else list(range(len(rows)))
    ends = np.cumsum([len(ids) for ids in tokens])
    return Split(np.concatenate(tokens), np.concatenate(segments) if segments else None, ends, labels, known, idx), cut


def encode_questions(
    rows, columns: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
) -> Split:
    """Windows over each context that share `stride` tokens. A window without the whole answer is labelled as having none: [CLS]."""
    parts: dict[str, list] = {name: [] for name in ("tokens", "segments", "labels", "example", "offsets")}
    answers, contexts = [], []
    room = max(8, max_length // 2)  # tokens of a question: a context needs some room beside it
    stride = min(stride, (max_length - room) // 2)
    for number in range(len(rows)):
        row = rows[number]
        question, context, answer = (
            row[columns[0]].strip(),
            row[columns[1]],
            row["answers"] or {"text": [], "answer_start": []},
        )
        whole = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        question = question[: whole[room - 8][1]] if len(whole) > room - 8 else question
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, ids in enumerate(encoded["input_ids"]):
            inside = np.array([part == 1 for part in encoded.sequence_ids(window)])
            offsets = np.where(inside[:, None], np.array(encoded["offset_mapping"][window]), -1)  # [tokens, 2]
            label = (0, 0)
            if answer["text"]:
                first, last = answer["answer_start"][0], answer["answer_start"][0] + len(answer["text"][0])
                held = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < last) & inside)
                if len(held) and offsets[held[0], 0] <= first and offsets[held[-1], 1] >= last:
                    label = (held[0], held[-1])
            segments = encoded["token_type_ids"][window] if "token_type_ids" in encoded else []
            for name, value in zip(
                parts, (np.array(ids, np.int32), np.array(segments, np.int8), label, number, offsets.astype(np.int32))
            ):
                parts[name].append(value)
        contexts.append(context)
        answers.append(list(answer["text"]))
    segments = np.concatenate(parts["segments"])
    idx = list(rows["id"]) if "id" in rows.column_names else list(map(str, range(len(rows))))
    return Split(
        np.concatenate(parts["tokens"]),
        segments if len(segments) else None,
        np.cumsum([len(ids) for ids in parts["tokens"]]),
        np.array(parts["labels"], dtype=np.int64),
        np.ones(len(parts["tokens"]), dtype=bool),
        idx,
        Spans(np.array(parts["example"]), np.concatenate(parts["offsets"]), contexts, answers),
    )


LABEL_END, NO_LABEL = 65535, 65534  # of packed labelled shards: `[CLS] label 65535 text [SEP] text_pair [SEP]`


def cut_longest_first(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Shortens the longest part until all fit into `room` tokens."""
    sizes = [len(part) for part in parts]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return [part[:size] for part, size in zip(parts, sizes)]


def read_shards(directory: Path, base: Base) -> tuple[dict[str, Split], list[str] | None, int]:
    """Splits of packed shards, the classes' names where the manifest has them, and how many examples were cut."""
    manifest = read_manifest(directory)
    specials, vocabulary = manifest["tokenizer"], base.tokenizer.get_vocab()
    if (directory / "tokenizer").is_dir():
        same = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer").get_vocab() == vocabulary
    else:
        ours = [base.tokenizer.cls_token_id, base.tokenizer.sep_token_id, len(vocabulary)]
        same = [specials[name] for name in ("cls", "sep", "vocab_size")] == ours
    if not same:
        raise InputError(
            f"{directory} is packed with the tokenizer {specials.get('name')}, which is not that of the base model {base.name}: "
            "give raw text, or pack it again with `python data/pack_mnli.py --tokenizer` and the base model"
        )
    splits, cut = {}, 0
    for name in sorted(manifest["shards"]):
        tokens = read_shard(directory / name)
        marks = np.flatnonzero(tokens == LABEL_END)
        if not len(marks) or (tokens[marks - 2] != specials["cls"]).any():
            raise InputError(
                f"{directory / name} is not a labelled shard ([CLS] label 65535 ...): pack it with data/pack_mnli.py"
            )
        texts, labels = [], tokens[marks - 1].astype(np.int64)
        for start, end in zip(marks + 1, [*(marks[1:] - 2), len(tokens)]):
            text = np.asarray(tokens[start:end], dtype=np.int32)
            if len(text) + 1 > base.max_length:
                parts = np.split(
                    text[:-1], np.flatnonzero(text[:-1] == specials["sep"])
                )  # each but the first opens with [SEP]
                text = np.concatenate([*cut_longest_first(parts, base.max_length - 2), text[-1:]])
                cut += 1
            texts.append(np.concatenate([[specials["cls"]], text]).astype(np.int32))
        splits[manifest["shards"][name]["split"]] = Split(
            np.concatenate(texts),
            None,
            np.cumsum([len(text) for text in texts]),
            np.where(labels == NO_LABEL, -1, labels),
            labels != NO_LABEL,
            list(range(len(texts))),
        )
    return splits, manifest["source"].get("labels"), cut


@dataclass
class Data:
    """A task with its examples."""

    name: str
    task: Task
    source: str  # folder, file or Hub id
    splits: dict[str, Split]
    classes: list[str]
    dev: str  # the split that models are chosen by
    notes: list[str]  # what the reader should know about how it was read
    max_answer: int  # tokens

    @property
    def labelled(self) -> list[str]:
        """Splits to measure on."""
        return [split for split, content in self.splits.items() if split != "train" and content.known.any()]


def read_data(name: str, data: DataConfig, base: Base) -> Data:
    """Everything from --task and --data.* to tokenised splits."""
    task, notes, custom = TASKS[name], [], name == "custom"
    if data.dataset and (Path(data.dataset) / "manifest.json").exists():
        splits, named, cut = read_shards(Path(data.dataset), base)
        classes = list(task.classes or named or map(str, range(int(splits["train"].labels.max()) + 1)))
        for split, content in splits.items():
            if content.labels.max() >= len(classes):
                raise InputError(
                    f"split {split} has the label {content.labels.max()}, which is none of the classes {', '.join(classes)}: "
                    "check --task"
                )
    else:
        rows = read_rows(task, data)
        if "train" not in rows:
            raise InputError(
                f"the data set has no split train, only {', '.join(rows)}: name a file train.parquet, train.csv or train.jsonl"
            )
        columns = choose_columns(task, data, rows)
        if not any(split.startswith("validation") or split == data.validation for split in rows):
            held = rows["train"].train_test_split(test_size=min(2000, math.ceil(len(rows["train"]) / 10)), seed=0)
            rows |= {"train": held["train"], "validation": held["test"]}
            notes.append(f"no validation split: {len(held['test'])} rows of train are held out for it")
        if task.kind == "span":
            classes, cut = [], 0
            splits = {
                split: encode_questions(table, columns, base.tokenizer, base.max_length, data.stride)
                for split, table in rows.items()
            }
        else:
            raw = {
                split: list(table[data.label]) if data.label in table.column_names else [None] * len(table)
                for split, table in rows.items()
            }
            names = task.classes or getattr(rows["train"].features[data.label], "names", None)
            if custom and names is None and any(type(value) is float and value == value for value in raw["train"]):
                task = dataclasses.replace(task, kind="number", metrics=("pearson", "spearman"))
            labels, classes = number_labels(raw, task, names and list(names), custom)
            encoded = {
                split: encode_texts(table, columns, labels[split], base.tokenizer, base.max_length)
                for split, table in rows.items()
            }
            splits, cut = (
                {split: content for split, (content, _) in encoded.items()},
                sum(over for _, over in encoded.values()),
            )
    if cut:
        notes.append(f"{cut} examples are longer than {base.max_length} tokens and were cut, the longer text first")
    if not splits["train"].known.all():
        notes.append(f"{(~splits['train'].known).sum()} examples of train have no label and are left out")
    keep = np.flatnonzero(splits["train"].known)
    if data.max_train_examples is not None:
        keep = np.random.default_rng(0).permutation(keep)[: data.max_train_examples]
    if not len(keep):
        raise InputError("no example of train has a label: check --data.label")
    splits["train"] = splits["train"].only(keep)
    if task.kind == "classes" and len(classes) < 2:
        raise InputError(
            f"column {data.label} holds only the class {', '.join(classes)}: there is nothing to tell apart"
        )
    dev = data.validation or next(
        split for split in ("validation", *task.report, *splits) if split in splits and split != "train"
    )
    if dev not in splits or not splits[dev].known.any():
        raise InputError(
            f"no labelled split {dev} to choose by: the splits are {', '.join(splits)}; choose with --data.validation"
        )
    return Data(name, task, data.dataset or task.dataset, splits, classes, dev, notes, data.max_answer)


# ---------------------------------------------------------------------------------------------------------------------
# From examples to logits


class Network:
    """A model and the way examples go through it: rows without padding for KBERT, padded batches for other encoders.

    It trains in bf16 and predicts in fp32, as from_pretrained will.
    """

    def __init__(self, model: nn.Module, base: Base, kind: str, train: FinetuneConfig, device: torch.device):
        self.model, self.kbert, self.kind, self.device = model.to(device), base.kbert, kind, device
        self.max_length, self.pad = base.max_length, base.tokenizer.pad_token_id
        self.row_tokens = max(
            train.row_tokens or (16384 if device.type == "cuda" else 4096), -(-base.max_length // 128) * 128
        )
        # Rows differ in size: with FlexAttention, graphs are compiled for a few; without, it runs eagerly.
        self.sizes = []
        if self.kbert:
            self.encode = model.encoder.encode
            if train.compile and (backend := compiled_backend(device)) == "flex":
                self.sizes = [-(-self.row_tokens // (part * 128)) * 128 for part in (8, 4, 2, 1)]
                model.encoder.attention_backend = backend
                self.encode = torch.compile(self.encode, dynamic=False)

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        if self.kbert:
            self.model.encoder.compute_dtype = torch.bfloat16 if mode else None

    def rows(self, lengths: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
        """Divides the examples `chosen` into rows of at most row_tokens, short ones together."""
        rows, size = [[]], 0
        for i in sorted(chosen, key=lambda i: (lengths[i], i)):
            size = (
                size + lengths[i] if self.kbert else (len(rows[-1]) + 1) * lengths[i]
            )  # padded to the longest, this one
            if size > self.row_tokens and rows[-1]:
                rows, size = [*rows, []], lengths[i]
            rows[-1].append(i)
        return [np.array(row) for row in rows if row]

    def outputs(self, split: Split, row: np.ndarray, slots: np.ndarray, batch: int) -> Tensor:
        """Logits of a row's examples: [n, C], or start and end of an answer [n, 2, S], minus infinity beyond an example's end.

        slots [n]: places of the row's examples in a step's batch.
        """
        return self.packed(split, row, slots, batch) if self.kbert else self.padded(split, row)

    def packed(self, split: Split, row: np.ndarray, slots: np.ndarray, batch: int) -> Tensor:
        lengths = split.lengths[row]
        starts, total, longest = np.cumsum(lengths) - lengths, int(lengths.sum()), int(lengths.max())
        T = next(size for size in self.sizes if size >= total) if self.sizes else -(-total // 128) * 128
        input_ids = np.full(T, self.pad, dtype=np.int32)
        input_ids[:total] = np.concatenate([split.of(split.tokens, i) for i in row])
        document_ids = np.repeat(np.arange(len(row) + 1, dtype=np.int32), [*lengths, T - total])
        positions = np.arange(T, dtype=np.int32) - np.repeat(
            np.array([*starts, total], dtype=np.int32), [*lengths, T - total]
        )
        document_ids, positions = (torch.from_numpy(x).to(self.device) for x in (document_ids, positions))
        # All states, also where only those of [CLS] count: a graph that picked them would be compiled anew for each number of examples.
        hidden = self.encode(
            torch.from_numpy(input_ids).to(self.device),
            document_ids,
            positions,
            self.max_length if self.sizes else longest,
        )  # [T, d]
        if self.kind == "span":
            logits = hidden.new_full((len(row), 2, longest), -torch.inf, dtype=torch.float32)
            both = torch.stack(self.model.span_logits(hidden[:total]), dim=-1)  # [tokens, 2]
            return (
                logits.transpose(1, 2)
                .index_put((document_ids[:total].long(), positions[:total].long()), both)
                .transpose(1, 2)
            )
        # The classifier sees the whole batch, zero where another row or rank has the example: so dropout, drawn from the
        # step's seed, meets each example alike wherever it lies.
        slots, starts, sizes = (torch.from_numpy(x).to(self.device) for x in (slots, starts, lengths))
        if self.model.config.classifier_pooling == "cls":
            pooled = hidden[starts]  # [n, d]
        else:
            pooled = hidden.new_zeros(len(row), hidden.size(-1), dtype=torch.float32).index_add(
                0, document_ids[:total].long(), hidden[:total].float()
            )
            pooled = (pooled / sizes[:, None]).to(hidden.dtype)
        return self.model.classify(hidden.new_zeros(batch, hidden.size(-1)).index_copy(0, slots, pooled))[slots]

    def padded(self, split: Split, row: np.ndarray) -> Tensor:
        lengths = split.lengths[row]
        mask = np.arange(lengths.max()) < lengths[:, None]  # [n, S]
        inputs = {"input_ids": np.full(mask.shape, self.pad), "attention_mask": mask.astype(np.int64)}
        inputs["input_ids"][mask] = np.concatenate([split.of(split.tokens, i) for i in row])
        if split.segments is not None:
            inputs["token_type_ids"] = np.zeros(mask.shape, dtype=np.int64)
            inputs["token_type_ids"][mask] = np.concatenate([split.of(split.segments, i) for i in row])
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.model.training):
            out = self.model(**{name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()})
        if self.kind != "span":
            return out.logits.float()
        outside = torch.from_numpy(~mask).to(self.device)
        return torch.stack([out.start_logits, out.end_logits], dim=1).float().masked_fill(outside[:, None], -torch.inf)

    def loss(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        """Summed over examples."""
        labels = torch.from_numpy(labels).to(self.device)
        if self.kind == "number":
            return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        if self.kind == "span":
            return sum(F.cross_entropy(logits[:, i], labels[:, i], reduction="sum") for i in (0, 1)) / 2
        return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def predict(net: Network, split: Split, place: Place, max_answer: int) -> list:
    """For each example its logits [C], or of a window its candidate answers. Ranks share the rows; all get all."""
    net.train(False)
    found = []
    for row in net.rows(split.lengths, np.arange(len(split.ends)))[place.rank :: place.world_size]:
        logits = net.outputs(split, row, np.arange(len(row)), len(row)).cpu().numpy()
        if split.spans is not None:
            logits = [
                candidates(window, split.of(split.spans.offsets, i), max_answer) for window, i in zip(logits, row)
            ]
        found += list(zip(row.tolist(), logits))
    if place.world_size > 1:
        every: list = [None] * place.world_size
        dist.all_gather_object(every, found)
        found = [pair for part in every for pair in part]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics. What has no value, such as the correlation of a constant, is 0.

METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda y, p: f1_score(y, p, labels=[1], average="macro", zero_division=0.0),
    "macro_f1": lambda y, p: f1_score(y, p, average="macro", zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda y, p: pearsonr(y, p).statistic if len(y) > 1 else 0.0,
    "spearman": lambda y, p: spearmanr(y, p).statistic if len(y) > 1 else 0.0,
}


def measure(names: tuple[str, ...], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy and sklearn warn of constant input
        return {name: float(np.nan_to_num(METRICS[name](labels, predictions))) for name in names}


def decide(outputs: list, kind: str) -> np.ndarray:
    """Logits -> class numbers or scores [examples]."""
    logits = np.stack(outputs)
    return logits[:, 0].astype(np.float64) if kind == "number" else logits.argmax(-1)


# SQuAD: candidates of a window, the best of a question, and the official scores

N_BEST = 20


def candidates(logits: np.ndarray, offsets: np.ndarray, max_answer: int) -> tuple[float, list[tuple[float, int, int]]]:
    """logits [2, S], offsets [tokens, 2] -> score of no answer, and up to N_BEST (score, first character, end) of the best spans."""
    start, end = (np.where(offsets[:, 0] >= 0, row[: len(offsets)], -np.inf) for row in logits)
    starts, ends = (np.argsort(-row, kind="stable")[:N_BEST] for row in (start, end))
    length = ends[None] - starts[:, None] + 1  # [N_BEST, N_BEST]
    scores = np.where((length > 0) & (length <= max_answer), start[starts][:, None] + end[ends][None], -np.inf)
    best = [divmod(int(flat), len(ends)) for flat in np.argsort(-scores, axis=None, kind="stable")[:N_BEST]]
    return (
        float(logits[0, 0] + logits[1, 0]),
        [
            (float(scores[i, j]), int(offsets[starts[i], 0]), int(offsets[ends[j], 1]))
            for i, j in best
            if np.isfinite(scores[i, j])
        ],
    )


def best_answers(outputs: list, spans: Spans) -> tuple[list[list[dict]], np.ndarray]:
    """For each question up to N_BEST {text, score} over its windows, the best first, and by how much no answer scores higher than that."""
    null, found = np.full(len(spans.contexts), np.inf), [[] for _ in spans.contexts]
    for number, (score, of_window) in zip(spans.example, outputs):
        null[number] = min(null[number], score)
        found[number] += of_window
    ranked = []
    for context, answers in zip(spans.contexts, found):
        by_text = {}  # neighbouring windows find the same text: its best score counts
        for score, first, end in sorted(answers, key=lambda answer: -answer[0]):
            by_text.setdefault(context[first:end], score)
        ranked.append(
            [{"text": text, "score": score} for text, score in itertools.islice(by_text.items(), N_BEST)]
            or [{"text": "", "score": -math.inf}]
        )
    return ranked, np.array([none - answers[0]["score"] for none, answers in zip(null, ranked)])


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and spare blanks, as the official script has it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(text: str, answers: list[str]) -> tuple[float, float]:
    """(F1, exact match) against the best of the reference answers; of a question without one, the empty text is right."""

    def f1(found: list[str], wanted: list[str]) -> float:
        if not found or not wanted:
            return float(found == wanted)
        common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
        return 2 * common / (len(found) + len(wanted))

    wanted = [answer for answer in map(normal, answers) if answer] or [""]
    return max(f1(normal(text).split(), answer.split()) for answer in wanted), float(normal(text) in wanted)


def null_threshold(difference: np.ndarray, answered: np.ndarray, empty: np.ndarray) -> float:
    """The threshold on `difference` above which no answer is given, for the highest sum of scores (answered or empty [questions])."""
    order = np.argsort(difference, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((answered - empty)[order])])  # of answering the first k
    gain[1:-1][difference[order][1:] == difference[order][:-1]] = -np.inf  # ties go together
    k = int(gain.argmax())
    return float(difference[order][k - 1] if k else difference.min() - 1)


def measure_spans(
    outputs: list, spans: Spans, v2: bool, threshold: float | None = None
) -> tuple[dict[str, float], list[tuple[str, list[dict]]]]:
    """Scores, and for each question its answer and n-best list. SQuAD 2.0: at `threshold`, or, on the split that chooses it, at the best one."""
    ranked, difference = best_answers(outputs, spans)
    texts = [answers[0]["text"] for answers in ranked]
    scores = np.array([answer_scores(text, answers) for text, answers in zip(texts, spans.answers)])  # [questions, 2]
    if not v2:
        return dict(zip(("f1", "exact_match"), scores.mean(0).tolist())), list(zip(texts, ranked))
    empty = np.array([answer_scores("", answers) for answers in spans.answers])
    threshold = null_threshold(difference, scores[:, 0], empty[:, 0]) if threshold is None else threshold
    silent = difference > threshold
    scores = np.where(silent[:, None], empty, scores)
    metrics = {**dict(zip(("f1", "exact_match"), scores.mean(0).tolist())), "null_threshold": threshold}
    return metrics, [("" if quiet else text, answers) for quiet, text, answers in zip(silent, texts, ranked)]


def evaluate(net: Network, data: Data, splits: list[str], place: Place) -> tuple[dict, dict]:
    """{split: metrics} of those with labels, {split: predictions}. The dev split comes first: it chooses the null threshold."""
    metrics, predictions = {}, {}
    for name in sorted(splits, key=lambda name: name != data.dev):
        split = data.splits[name]
        outputs = predict(net, split, place, data.max_answer)
        if data.task.kind == "span":
            threshold = metrics.get(data.dev, {}).get("null_threshold")
            metrics[name], predictions[name] = measure_spans(outputs, split.spans, data.name == "squad_v2", threshold)
            continue
        predictions[name] = decide(outputs, data.task.kind)
        if split.known.any():
            metrics[name] = measure(data.task.metrics, split.labels[split.known], predictions[name][split.known])
    return metrics, predictions


def dev_score(metrics: dict[str, dict], data: Data) -> float:
    return statistics.fmean(metrics[data.dev][name] for name in data.task.metrics)


# ---------------------------------------------------------------------------------------------------------------------
# One run


def sum_gradients(parameters: list[nn.Parameter], place: Place) -> None:
    """Over ranks. A rank that had no example of a small last batch brings zeros."""
    if place.world_size == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


def finetune(
    net: Network, data: Data, train: FinetuneConfig, place: Place, log: RunLog | None, label: str
) -> tuple[dict, dict]:
    """Trains the network's model in place. label: `task:mnli run:1/5`, which opens lines of the log.

    Returns what is said of the run, with the metrics of every labelled split, and the predictions on these.
    """
    split = data.splits["train"]
    examples, lengths = len(split.ends), split.lengths
    set_trainable(net.model, train.trainable)
    parameters = [p for p in net.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    per_epoch = -(-examples // train.batch_size)
    steps = max(1, round(train.epochs * per_epoch))
    eval_every = max(1, per_epoch // train.evals_per_epoch)
    clock, losses, best, waited = Clock(place.device, 0.0), [], {"score": -math.inf, "step": steps, "weights": None}, 0

    def write(step: int, **values: float) -> None:
        formats = {"train_loss": ".4f", "lr": ".3e", "dev_score": ".4f"}
        said = "".join(f" {name}:{value:{formats[name]}}" for name, value in values.items())
        line = f"{label} step:{step}/{steps} epoch:{step / per_epoch:.3f}{said} train_time:{1000 * clock.seconds:.0f}ms"
        assert LOG_LINE.match(line), line
        log.write(line, echo="dev_score" in values)
        log.metrics.write(json.dumps({"run": label, "step": step, "seconds": clock.seconds, **values}) + "\n")

    for step in range(steps):
        clock.start()
        epoch, number = divmod(step, per_epoch)
        if number == 0:
            order = np.random.default_rng([train.seed, epoch]).permutation(examples)
        batch = order[number * train.batch_size : (number + 1) * train.batch_size]
        batch = batch[np.argsort(lengths[batch], kind="stable")]  # so that ranks get equal work
        slot = {int(i): at for at, i in enumerate(batch)}
        factor = lr_factor((step + 1) / (steps + 1), train)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * factor
        net.train(True)
        loss = torch.zeros((), device=place.device)
        for part, row in enumerate(net.rows(lengths, batch[place.rank :: place.world_size])):
            # Other encoders draw dropout in their own code, which must differ between rows
            seeds = [train.seed, step] + ([] if net.kbert else [place.rank, part])
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            row_loss = net.loss(
                net.outputs(split, row, np.array([slot[int(i)] for i in row]), len(batch)), split.labels[row]
            ) / len(batch)
            row_loss.backward()
            loss += row_loss.detach()
        sum_gradients(parameters, place)
        nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        done = step + 1
        if log:
            log.bar.update()
        if done % train.log_every == 0 or done == steps:
            mean = place.sum(torch.stack(losses).mean().item())[0]
            clock.stop()
            if not math.isfinite(mean):
                raise InputError(
                    f"the loss is {mean} around step {done}: lower --train.lr from {train.lr:g}, or raise --train.lr_warmup"
                )
            if log:
                write(done, train_loss=mean, lr=train.lr * factor)
            losses.clear()
        if done % eval_every == 0 and done < steps or done == steps and train.patience is not None:
            clock.stop()
            value = dev_score(evaluate(net, data, [data.dev], place)[0], data)
            if log:
                write(done, dev_score=value)
            if train.patience is None:
                continue
            if value > best["score"]:
                best = {
                    "score": value,
                    "step": done,
                    "weights": {name: tensor.clone() for name, tensor in net.model.state_dict().items()},
                }
                waited = 0
            else:
                waited += 1
                if waited == train.patience:
                    break
    if best["weights"] is not None:
        net.model.load_state_dict(best["weights"])
    metrics, predictions = evaluate(net, data, data.labelled, place)
    value = dev_score(metrics, data)
    if log and train.patience is None:
        write(done, dev_score=value)
    return {
        "score": value,
        "best_step": best["step"],
        "steps": steps,
        "seconds": clock.seconds,
        "examples_per_second": done * train.batch_size / max(clock.seconds, 1e-9),
        "metrics": metrics,
    }, predictions


# ---------------------------------------------------------------------------------------------------------------------
# One task: every run of its grid, the chosen model's folder, predictions and card


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def baseline(data: Data) -> dict:
    """The metrics of answering always with the most common class of train, or with its mean."""
    if data.task.kind == "span":
        return {}
    labels = data.splits["train"].labels
    constant = labels.mean() if data.task.kind == "number" else np.bincount(labels).argmax()
    known = {name: data.splits[name].labels[data.splits[name].known] for name in data.labelled}
    return {name: measure(data.task.metrics, labels, np.full(len(labels), constant)) for name, labels in known.items()}


def write_predictions(folder: Path, data: Data, predictions: dict) -> None:
    """gluebenchmark.com: one TSV for each test split, `index` and `prediction`. SQuAD: the JSON that the official script reads, and n-best lists."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = data.task.server_names or data.task.dataset != "nyu-mll/glue"
    for split, values in predictions.items():
        idx, path = data.splits[split].idx, folder / f"{data.task.files.get(split, split)}.tsv"
        if data.task.kind == "span":
            for name, found in zip((f"{split}.json", f"{split}_nbest.json"), zip(*values)):
                (folder / name).write_text(json.dumps(dict(zip(idx, found)), ensure_ascii=False), encoding="utf-8")
            continue
        if data.task.kind == "number":
            low, high = (0.0, 5.0) if data.name == "stsb" else (-math.inf, math.inf)  # what the server takes
            said = [f"{min(high, max(low, value)):.3f}" for value in values]
        else:
            said = [data.classes[value] if by_name else str(value) for value in values]
        lines = [f"{i}\t{text}" for i, text in zip(idx, said)]
        path.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")


CARD = """---
{header}
---
# {title}

`{base}` finetuned on {task}. The weights are those of the run that scored best on `{dev}`, with {settings}.

| from | split | metric | median | min | max | runs |
|---|---|---|---|---|---|---|
{rows}

```python
from transformers import {auto}

model = {auto}.from_pretrained("{title}", trust_remote_code=True)
```
"""


def model_card(title: str, base: Base, data: Data, report: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    span = data.task.kind == "span"
    task_type = "question-answering" if span else "text-classification"
    dataset = Path(data.source).name if Path(data.source).exists() else data.source
    evaluations = [
        EvalResult(
            task_type=task_type,
            dataset_type=dataset,
            dataset_name=data.name,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 5),
        )
        for split, metrics in report["model"]["metrics"].items()
        for metric, value in metrics.items()
    ]
    local = Path(base.name).exists()
    header = ModelCardData(
        model_name=title,
        library_name="transformers",
        license="mit",
        tags=["finetuned", *(["kbert"] if base.kbert else [])],
        base_model=None if local else base.name,
        pipeline_tag=task_type,
        eval_results=evaluations,
    ).to_yaml()
    rows = [
        f"| {start} | {split} | {metric} | {value['median']:.4f} | {value['min']:.4f} | {value['max']:.4f} | {value['n']} |"
        for start, metrics in report["results"].items()
        for split, named in metrics.items()
        for metric, value in named.items()
    ]
    return CARD.format(
        header=header,
        title=title,
        base=base.title,
        task=data.name,
        dev=data.dev,
        settings=", ".join(f"{name} {value}" for name, value in report["model"]["settings"].items()),
        rows="\n".join(rows),
        auto=f"AutoModelFor{'QuestionAnswering' if span else 'SequenceClassification'}",
    )


def run_task(
    place: Place,
    base: Base,
    data: Data,
    cells: list[FinetuneConfig],
    folder: Path,
    log: RunLog | None,
    hub: HubPusher | None,
    revision: str,
) -> dict:
    """Finetunes with every setting of `cells`, keeps the model that scores best on the dev split, and returns what metrics.json holds."""
    kind, train = data.task.kind, cells[0]
    place.on_first(lambda: folder.mkdir(exist_ok=True))
    starts = ["pretrained", "random weights"] if train.compare_random else ["pretrained"]
    todo = [(start, cell) for cell in cells for start in starts]
    if log:
        sizes = ", ".join(f"{split} {len(content.ends)}" for split, content in data.splits.items())
        named = f"; classes {', '.join(data.classes)}" if kind == "classes" else ""
        log.section(data.name, f"{base.name} on {data.name}: {sizes}; {len(todo)} runs{named}", echo=True)
        for note in data.notes:
            log.write(f"note: {note}")

    def make(cell: FinetuneConfig, start: str) -> nn.Module:
        model = build_model(base, kind, data.classes, cell.seed, start == "random weights", cell.pooling)
        if kind == "number":  # or the head spends its steps on learning the mean
            head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1][
                -1
            ]
            nn.init.constant_(head.bias, data.splits["train"].labels.mean())
        return model

    # --- the runs: one line of runs.jsonl each, which a resumed grid passes over
    record = folder / "runs.jsonl"
    done: list[dict] = place.on_first(
        lambda: [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    )
    net = None
    for number, (start, cell) in enumerate(todo, 1):
        settings = {
            key: getattr(cell, key) for key in ("lr", "weight_decay", "epochs", "batch_size", "trainable", "seed")
        }
        if any((run["start"], run["settings"]) == (start, settings) for run in done):
            continue
        fresh = make(cell, start)
        if net is None:
            net = Network(fresh, base, kind, train, place.device)
        else:  # into the model that is compiled already
            net.model.requires_grad_(True)
            net.model.load_state_dict(fresh.state_dict())
        result, predictions = finetune(net, data, cell, place, log, f"task:{data.name} run:{number}/{len(todo)}")
        run = {"start": start, "settings": settings, **result}

        def keep() -> None:
            if start == "pretrained" and all(
                run["score"] > other["score"] for other in done if other["start"] == start
            ):
                save_folder(folder / "model", lambda into: save_model(into, net.model, base.tokenizer))
                write_predictions(folder / "predictions", data, predictions)
            with open(record, "a") as file:
                file.write(json.dumps(run) + "\n")

        place.on_first(keep)
        done.append(run)

    # --- the settings that score best, over their seeds
    chosen, results = {}, {}
    for start in starts:
        runs = [run for run in done if run["start"] == start]
        chosen[start] = max(runs, key=lambda run: run["score"])
        same = [run for run in runs if {**run["settings"], "seed": 0} == {**chosen[start]["settings"], "seed": 0}]
        results[start] = {
            split: {metric: spread([run["metrics"][split][metric] for run in same]) for metric in values}
            for split, values in chosen[start]["metrics"].items()
        }
        if log and len(runs) > len(same):
            log.section("grid", grid_table(runs), echo=True)
    results["majority class"] = {
        split: {metric: spread([value]) for metric, value in values.items()} for split, values in baseline(data).items()
    }

    # --- splits without labels, by the chosen model
    predictions = {}
    if unlabelled := [split for split in data.splits if split != "train" and split not in data.labelled]:
        saved = build_model(open_base(str(folder / "model"), base.max_length), kind, data.classes, seed=0)
        net = net or Network(saved, base, kind, train, place.device)
        net.model.load_state_dict(saved.state_dict())
        _, predictions = evaluate(net, data, unlabelled, place)
    best = chosen["pretrained"]
    report = {
        "task": data.name,
        "base_model": base.name,
        "dataset": data.source,
        "dev": data.dev,
        "kind": kind,
        "classes": data.classes,
        "splits": {
            split: {"examples": len(content.ends), "fingerprint": content.fingerprint}
            for split, content in data.splits.items()
        },
        "notes": data.notes,
        "model": {"settings": best["settings"], "metrics": best["metrics"]},
        "results": results,
        "runs": done,
    }

    def finish() -> None:
        write_predictions(folder / "predictions", data, predictions)
        (folder / "model" / "README.md").write_text(
            model_card(train.hf_model_name or folder.resolve().name, base, data, report), encoding="utf-8"
        )
        (folder / "metrics.json.tmp").write_text(json.dumps(report, indent=1))
        os.replace(folder / "metrics.json.tmp", folder / "metrics.json")  # last: a folder with it is finished
        log.section(f"results {data.name}", results_table(results), echo=True)
        log.write(f"model: {folder / 'model'}")
        if hub:
            hub.push(folder / "model", revision)

    place.on_first(finish)
    return report


def grid_table(runs: list[dict]) -> str:
    """Best first."""
    names = [name for name in runs[0]["settings"] if len({run["settings"][name] for run in runs}) > 1]
    lines = [" ".join(f"{name:>12}" for name in [*names, "dev_score", "best_step"])]
    for run in sorted(runs, key=lambda run: -run["score"]):
        lines.append(
            " ".join(
                f"{value:>12.6g}"
                for value in [*(run["settings"][name] for name in names), run["score"], run["best_step"]]
            )
        )
    return "\n".join(lines)


def results_table(results: dict) -> str:
    """What was started from against split and metric: the median and, of several seeds, the range."""
    columns = [(split, metric) for split, values in results["pretrained"].items() for metric in values]
    width = max(
        30, *(len(f"{split} {metric}") + 2 for split, metric in columns)
    )  # of `-0.0461 (-0.0481 to -0.0441)`, and a gap
    lines = [" " * 16 + "".join(f"{split + ' ' + metric:>{width}}" for split, metric in columns)]
    for start, splits in results.items():
        cells = []
        for split, metric in columns:
            value = splits.get(split, {}).get(metric)
            more = f" ({value['min']:.4f} to {value['max']:.4f})" if value and value["n"] > 1 else ""
            cells.append(f"{(format(value['median'], '.4f') + more) if value else '-':>{width}}")
        lines.append(f"{start:<16}" + "".join(cells))
    return "\n".join(lines)


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


def glue_scores(medians: dict[str, dict]) -> dict[str, float | None]:
    """{task: {split: {metric: value}}} -> columns of the row in percent, and averages over tasks for each way of counting.

    MNLI counts as one task (the mean of its parts) or as two; QQP and MRPC by accuracy or by F1; STS-B by Spearman.
    """
    scores: dict[str, float | None] = {}
    for column, task, split, metric in ROW:
        splits = medians.get(task, {})
        # Data of one's own may hold a labelled test split instead
        named = splits.get(split) or (
            next((v for k, v in splits.items() if k.startswith("test")), None) if task != "mnli" else None
        )
        scores[column] = 100 * named[metric] if named else None
    mnli = [scores[name] for name in ("MNLI-m", "MNLI-mm") if scores[name] is not None]
    for by in ("acc", "F1"):
        rest = [
            scores[name]
            for name in (f"QQP {by}", "QNLI", "SST-2", "CoLA", "STS-B", f"MRPC {by}", "RTE")
            if scores[name] is not None
        ]
        for count, parts in (("one", [statistics.fmean(mnli)] if mnli else []), ("two", mnli)):
            scores[f"avg, MNLI as {count}, {by}"] = statistics.fmean(parts + rest) if parts + rest else None
    return scores


def glue_row(title: str, scores: dict[str, float | None]) -> str:
    cells = [title, *("-" if value is None else f"{value:.1f}" for value in scores.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in (["model", *scores], ["---"] * len(cells), cells))


def mnli_model(out: Path, base: str) -> str:
    """model/ of the newest finished MNLI run from the same base model."""
    found = []
    for path in [*out.glob("*/metrics.json"), *out.glob("*/mnli/metrics.json")]:
        report = json.loads(path.read_text())
        if (report.get("task"), report.get("base_model")) == ("mnli", base):
            found.append(path)
    if not found:
        raise InputError(
            f"this protocol starts from the MNLI model of {base}, and {out}/ has none: "
            "run finetuner.py --task mnli first, with the same --train.base_model"
        )
    return str(max(found, key=lambda path: path.stat().st_mtime).parent / "model")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def open_run(train: FinetuneConfig, resolved: dict, name: str) -> Path:
    """A new folder for the run, or that of the unfinished one it continues."""
    out = Path(train.out)
    folder = out / (train.run_name or name)
    if train.resume:
        same = [
            path.parent
            for path in out.glob("*/config.json")
            if json.loads(path.read_text()) == resolved and not (path.parent / "metrics.json").exists()
        ]
        if train.run_name and (folder / "config.json").exists() and folder not in same:
            raise InputError(
                f"{folder} is finished or was made with other settings: resume with those, or choose another --train.run_name"
            )
        if same:
            return folder if folder in same else max(same, key=lambda path: path.stat().st_mtime)
    elif (folder / "config.json").exists():
        raise InputError(
            f"{folder} holds a run already: choose another --train.run_name, or continue it with --train.resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(resolved, indent=1))
    return folder


def finetune_all(place: Place, preset: str, task: str, protocol_name: str, given: dict, argv: list[str]) -> None:
    protocol = PROTOCOLS[protocol_name]
    values: dict[str, dict] = {"data": {}, "train": {}}
    flags = {f"{group}.{name}": value for group in values for name, value in given[group].items()}
    for name, value in (PRESETS[preset] | protocol.settings | flags).items():
        group, option_name = name.split(".", 1)
        values[group][option_name] = value
    data, train = DataConfig(**values["data"]), FinetuneConfig(**values["train"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")

    if task == "pairs" and data.dataset is None and not (ROOT / TASKS["pairs"].dataset).exists():
        from data.make_sample import make_sample

        place.on_first(lambda: make_sample(ROOT / "data" / "sample"))
    base_name = train.base_model or place.on_first(lambda: str(newest_run(Path(train.out), preset)))
    base = place.on_first(lambda: open_base(base_name, data.max_length))
    resolved = {
        "task": task,
        "protocol": protocol_name,
        "base_model": base_name,
        "data": dataclasses.asdict(data),
        "train": {k: v for k, v in dataclasses.asdict(train).items() if k not in ("resume", "run_name", "out")},
    }

    def read(name: str, start: Base) -> Data | str:
        """A task's examples, or why its data is missing."""

        def attempt() -> Data | str:
            try:
                return read_data(name, data, start)
            except MissingData as error:
                return str(error)

        return place.on_first(attempt)

    if task in protocol.from_mnli:
        base = place.on_first(lambda: open_base(mnli_model(Path(train.out), base_name), data.max_length))
    only = read(task, base) if task != "glue" else None  # before there is a folder, which bad data would leave behind
    if isinstance(only, str):
        raise InputError(only)
    hub = []
    if train.hf_model_name:
        place.on_first(lambda: hub.append(HubPusher(train.hf_model_name)))
    folder = Path(
        place.on_first(
            lambda: str(
                open_run(train, json.loads(json.dumps(resolved)), f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{task}")
            )
        )
    )
    log = RunLog(folder, None, 0) if place.first else None
    if log:
        weights = Path(base_name) / "model.safetensors"
        open_log(
            log,
            argv,
            resolved,
            place,
            {},
            {"base_sha256": sha256_of(weights) if weights.exists() else None},
            (*MODULES, "finetuner.py"),
        )
        log.section(
            "run",
            f"{folder}: from {base_name}" + ("" if train.base_model else ", the newest finished pretraining run"),
            echo=True,
        )

    def finetuned(found: Data, start: Base, into: Path, revision: str) -> dict:
        return run_task(
            place,
            start,
            found,
            grid_of(protocol, found.name, set(flags), train),
            into,
            log,
            hub[0] if hub else None,
            revision,
        )

    reports: dict[str, dict] = {}
    if only:
        reports[task] = finetuned(only, base, folder, "main")
    else:
        for name in GLUE:
            start = base
            if name in protocol.from_mnli and "mnli" in reports:
                start = place.on_first(lambda: open_base(str(folder / "mnli" / "model"), data.max_length))
            metrics = folder / name / "metrics.json"
            found = place.on_first(lambda: json.loads(metrics.read_text()) if metrics.exists() else None) or read(
                name, start
            )
            if isinstance(found, str):
                if log:
                    log.write(f"{name} is left out: {found}")
                continue
            reports[name] = found if isinstance(found, dict) else finetuned(found, start, folder / name, name)
        if not reports:
            raise InputError(
                "no GLUE task has its data: give --data.dataset FOLDER with a folder for each task, named as in nyu-mll/glue"
            )
        scores = glue_scores(
            {
                name: {
                    split: {metric: value["median"] for metric, value in values.items()}
                    for split, values in report["results"]["pretrained"].items()
                }
                for name, report in reports.items()
            }
        )

        def finish() -> None:
            row = glue_row(base.title, scores)
            log.section(
                "glue", f"medians over runs; averages over {len(reports)} of {len(GLUE)} tasks\n{row}", echo=True
            )
            report = {
                "task": "glue",
                "base_model": base_name,
                "protocol": protocol_name,
                "scores": scores,
                "tasks": list(reports),
            }
            (folder / "metrics.json").write_text(json.dumps(report, indent=1))

        place.on_first(finish)
    if log:
        close_log(
            log,
            {
                "run": str(folder),
                "finished": True,
                **{key: {name: report[key] for name, report in reports.items()} for key in ("splits", "results")},
            },
        )
        draw_curves(folder)
        log.bar.close()
        for command in hub[0].finish() if hub else []:
            print(f"not pushed, kept on disk; push it later with:  {command}")


def main(argv: list[str] | None = None) -> None:
    extra = {
        "task": {
            "choices": [*TASKS, "glue"],
            "default": None,
            "help": "what to finetune on; glue: every task of it [mnli; of --preset micro, pairs]",
        },
        "protocol": {
            "choices": list(PROTOCOLS),
            "default": "default",
            "help": "named settings and grid, between preset and flags [default]",
        },
    }
    preset, given = parse_flags(
        {"data": DataConfig, "train": FinetuneConfig}, dict.fromkeys(PRESETS, {}), argv, __doc__, "base", extra
    )
    with processes() as place:
        command = sys.argv if argv is None else ["finetuner.py", *argv]
        finetune_all(place, preset, given["task"] or DEFAULT_TASK[preset], given["protocol"], given, command)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
