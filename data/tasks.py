"""The tasks that an encoder is measured on, what kinds of task there are, and how the data of one is read.

A kind of task is one class: how its examples are encoded, what is minimised, how predictions are measured and written,
which head a model needs. A new kind is a new class; a new head also needs its logits in finetuner.py's Network.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data.blimp import Pairs, encode_pairs, measure_pairs
from data.examples import (
    MissingData,
    Split,
    check_columns,
    encode_texts,
    number_classes,
    read_configurations,
    read_files,
    read_hub,
    read_labels,
    read_shards,
)
from data.squad import Windows, candidates, encode_questions, measure_spans
from dataloading import InputError

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


def score(metrics: tuple[str, ...], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy and sklearn warn of constant input
        return {name: float(np.nan_to_num(METRICS[name](labels, predictions))) for name in metrics}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of task


class Kind:
    """What all kinds share: one label for each text or pair of texts, and a head that classifies it."""

    name: str
    metrics: tuple[str, ...]  # unless the task names its own
    head = "SequenceClassification"  # of transformers, and of model.py
    problem_type: str | None = None  # of a model's configuration
    pipeline_tag = "text-classification"
    trains = True  # False: the base model is judged as it is (zero-shot), and no split train is needed
    label_column: str | None = None  # that train needs beside its texts; None: --data.label
    baseline_name = "majority class"

    def __init__(self, task: Task, settings):
        """settings: of --data.*, the finetuner's DataConfig."""
        self.task, self.settings = task, settings
        self.metrics = task.metrics or self.metrics
        self.classes: list[str] = []

    # --- reading

    def read_hub(self, name: str) -> dict:
        """{split: rows} of a set on the Hub."""
        own = name != self.task.dataset
        return read_hub(name) if own else read_hub(name, self.task.config, self.task.diagnostic)

    def number_labels(self, labels: dict[str, list], names: list[str] | None) -> dict[str, np.ndarray]:
        """names: of the classes, where the data has them."""
        raise NotImplementedError

    def encode(
        self, tables: dict, columns: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> tuple[dict[str, Split], int]:
        """Splits of examples, and how many of these were cut."""
        column, splits, cut = self.settings.label, {}, 0
        named = {split: getattr(rows.features.get(column), "names", None) for split, rows in tables.items()}
        labels = read_labels(tables, column, own=self.task.dataset is None and named["train"] is None)
        numbered = not (named["train"] or self.task.classes) and any(isinstance(x, int) for x in labels["train"])
        for split, names in named.items():  # a split's numbers are those of its own names, and -1 is none
            if names and not numbered and set(names) <= set(self.task.classes or names):
                labels[split] = [names[x] if isinstance(x, int) and x >= 0 else x for x in labels[split]]
            if names:
                labels[split] = [None if x == -1 else x for x in labels[split]]
        numbers = self.number_labels(labels, named["train"])
        for split, rows in tables.items():
            splits[split], more = encode_texts(rows, columns, numbers[split], tokenizer, max_length)
            cut += more
        return splits, cut

    def name_packed(self, splits: dict[str, Split], names: list[str] | None) -> None:
        """Takes the classes of packed shards. names: those of the manifest."""
        raise InputError("packed shards hold texts with classes: give --data.dataset raw text for this task")

    def check(self, train: Split | None) -> None:
        """Raises InputError for labels that nothing can be learnt from."""

    # --- learning

    def model_settings(self) -> dict:
        """What a model's configuration says of the head."""
        if not self.classes:
            return {}
        names = dict(enumerate(self.classes))
        return {"id2label": names, "label2id": {v: k for k, v in names.items()}, "problem_type": self.problem_type}

    def prepare(self, train: Split | None) -> None:
        """Before a model learns from train, or, if None, before a finished one predicts."""

    def resume(self, model: nn.Module) -> None:
        """Makes a finished model one to train on: undoes what `finished` did."""

    def finished(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Weights of a trained model, where its own are not what is to be saved."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed over examples. logits: as Network.outputs gives them."""
        raise NotImplementedError

    # --- measuring

    def wanted(self, split: Split, row: np.ndarray) -> np.ndarray | None:
        """[n] the one token of each example `row` whose state the head reads; None: all of them."""
        return None

    def keep(self, logits: Tensor, split: Split, row: np.ndarray) -> list:
        """What is kept of the logits of the examples `row`, one entry for each."""
        return list(logits.cpu().numpy())

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """[examples, C] -> predictions [examples]."""
        raise NotImplementedError

    def constant(self, labels: np.ndarray) -> float:
        """The one answer that fits labels best."""
        raise NotImplementedError

    def baseline(self, train: Split | None, split: Split) -> dict[str, float]:
        """Metrics of always giving the one answer that fits train best; none for a kind without such an answer."""
        labels = split.labels[split.known]
        return score(self.metrics, labels, np.full(len(labels), self.constant(train.labels)))

    def measure(self, kept: list, split: Split, dev: dict[str, float]) -> tuple[dict[str, float], list | np.ndarray]:
        """Metrics, none where no label is known, and predictions. dev: metrics of the dev split, {} for itself."""
        predictions, known = self.decide(np.stack(kept)), split.known
        metrics = score(self.metrics, split.labels[known], predictions[known]) if known.any() else {}
        return metrics, predictions

    # --- answering

    def spell(self, predictions: np.ndarray) -> list[str]:
        raise NotImplementedError

    def write(self, folder: Path, name: str, split: Split, predictions: list | np.ndarray) -> None:
        """A TSV as gluebenchmark.com takes it, `index` and `prediction`. name: of the split."""
        table = pd.DataFrame({"index": split.idx, "prediction": self.spell(predictions)})
        table.to_csv(folder / f"{self.task.files.get(name, name)}.tsv", sep="\t", index=False)


class Classes(Kind):
    name = "classes"
    metrics = ("accuracy", "macro_f1")
    problem_type = "single_label_classification"

    def number_labels(self, labels: dict[str, list], names: list[str] | None) -> dict[str, np.ndarray]:
        numbers, self.classes = number_classes(labels, list(self.task.classes or names or []) or None)
        return numbers

    def name_packed(self, splits: dict[str, Split], names: list[str] | None) -> None:
        self.classes = list(self.task.classes or names or map(str, range(int(splits["train"].labels.max()) + 1)))
        if names and sorted(names) != sorted(self.classes):
            raise InputError(
                f"the shards' classes are {', '.join(names)}, the task's {', '.join(self.classes)}: check --task"
            )
        number = np.array([self.classes.index(name) for name in names or self.classes] + [-1])  # the last: missing
        for split, content in splits.items():
            if content.labels.max() >= len(self.classes):
                raise InputError(
                    f"split {split} has the label {content.labels.max()}, which is none of the classes "
                    f"{', '.join(self.classes)}: check --task"
                )
            content.labels = number[content.labels]

    def check(self, train: Split | None) -> None:
        found = np.unique(train.labels)
        if len(found) < 2:
            raise InputError(
                f"column {self.settings.label} of train holds only the class {self.classes[found[0]]}: "
                "there is nothing to tell apart"
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")

    def decide(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def constant(self, labels: np.ndarray) -> float:
        return np.bincount(labels).argmax()

    def spell(self, predictions: np.ndarray) -> list[str]:
        return [str(number) if self.task.by_number else self.classes[number] for number in predictions]


class Number(Kind):
    name = "number"
    metrics = ("pearson", "spearman")
    problem_type = "regression"
    # Of train's labels: a head learns standardised labels, and the weights that are saved undo that
    mean, deviation = 0.0, 1.0

    def number_labels(self, labels: dict[str, list], names: list[str] | None) -> dict[str, np.ndarray]:
        self.classes = ["score"]
        try:
            numbers = {split: np.array(values, dtype=np.float64) for split, values in labels.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"a label in column {self.settings.label} is no number ({error}): check it") from error
        if any(np.isinf(values).any() for values in numbers.values()):
            raise InputError(f"a label in column {self.settings.label} is infinite: check it")
        return numbers

    def prepare(self, train: Split | None) -> None:
        self.mean, self.deviation = (0.0, 1.0) if train is None else (train.labels.mean(), train.labels.std() or 1.0)

    def head_of(self, model: nn.Module) -> tuple[str, nn.Linear]:
        named = model.named_modules()
        *_, head = ((name, part) for name, part in named if isinstance(part, nn.Linear) and part.out_features == 1)
        return head

    @torch.no_grad()
    def resume(self, model: nn.Module) -> None:
        _, head = self.head_of(model)
        head.weight /= self.deviation
        head.bias.sub_(self.mean).div_(self.deviation)

    def finished(self, model: nn.Module) -> dict[str, Tensor]:
        (head, _), weights = self.head_of(model), model.state_dict()
        weights[f"{head}.weight"] = weights[f"{head}.weight"] * self.deviation
        weights[f"{head}.bias"] = weights[f"{head}.bias"] * self.deviation + self.mean
        return weights

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), ((labels - self.mean) / self.deviation).float(), reduction="sum")

    def decide(self, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0].astype(np.float64) * self.deviation + self.mean

    def constant(self, labels: np.ndarray) -> float:
        return labels.mean()

    def spell(self, predictions: np.ndarray) -> list[str]:
        return [f"{value:.3f}" for value in np.clip(predictions, *self.task.bounds)]


class Span(Kind):
    """An answer is a span of a question's context. SQuAD 2.0 also has questions without an answer."""

    name = "span"
    metrics = ("f1", "exact_match")
    head = "QuestionAnswering"
    pipeline_tag = "question-answering"
    label_column = "answers"

    def encode(
        self, tables: dict, columns: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> tuple[dict[str, Split], int]:
        how = (columns, tokenizer, max_length, self.settings.stride, self.task.unanswerable)
        return {split: encode_questions(rows, *how) for split, rows in tables.items()}, 0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum(F.cross_entropy(logits[:, i], labels[:, i], reduction="sum") for i in (0, 1)) / 2

    def keep(self, logits: Tensor, split: Windows, row: np.ndarray) -> list:
        longest, logits = self.settings.max_answer, logits.cpu().numpy()
        return [candidates(window, split.of(split.offsets, i), longest) for window, i in zip(logits, row)]

    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        return {}

    def measure(self, kept: list, split: Windows, dev: dict[str, float]) -> tuple[dict[str, float], list]:
        return measure_spans(kept, split, self.task.unanswerable, dev.get("null_threshold"))

    def write(self, folder: Path, name: str, split: Windows, predictions: list) -> None:
        """The JSON that the official script reads, and n-best lists."""
        for file, found in zip((f"{name}.json", f"{name}_nbest.json"), zip(*predictions)):
            text = json.dumps(dict(zip(split.names, found)), ensure_ascii=False)
            (folder / file).write_text(text, encoding="utf-8")


class MinimalPairs(Kind):
    """Two sentences, one of them acceptable: the masked language model should find that one likelier. Zero-shot."""

    name = "minimal pairs"
    metrics = ("accuracy",)
    head = "MaskedLM"
    pipeline_tag = "fill-mask"
    trains = False
    baseline_name = "chance"
    masked = True

    def read_hub(self, name: str) -> dict:
        return read_configurations(name)

    def encode(
        self, tables: dict, columns: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> tuple[dict[str, Split], int]:
        """One split, whatever files and splits the data has: nothing was trained on any."""
        file = Path(self.settings.dataset or "")
        if file.is_file():  # which read_files calls train
            tables = {file.name.split(".")[0]: rows for rows in tables.values()}
        pairs, cut = encode_pairs(tables, columns, tokenizer, max_length, self.masked)
        return {"test": pairs}, cut

    def wanted(self, split: Pairs, row: np.ndarray) -> np.ndarray | None:
        return split.labels[row, 0] if self.masked else None

    def keep(self, logits: Tensor, split: Pairs, row: np.ndarray) -> list:
        target = torch.from_numpy(split.labels[row, 1]).to(logits.device)
        return (-F.cross_entropy(logits, target, reduction="none")).tolist()

    def baseline(self, train: None, split: Pairs) -> dict[str, float]:
        return {"accuracy": 0.5}

    def measure(self, kept: list, split: Pairs, dev: dict[str, float]) -> tuple[dict[str, float], pd.DataFrame]:
        return measure_pairs(kept, split)

    def write(self, folder: Path, name: str, split: Pairs, predictions: pd.DataFrame) -> None:
        """A TSV of the pairs with their scores, which a CPU rounds to bf16 where a pair is clear."""
        predictions.to_csv(folder / f"{name}.tsv", sep="\t", index=False, float_format="%.4f")


class DetectedPairs(MinimalPairs):
    """By a detector of replaced tokens, which reads a sentence as it is: how likely each token is the text's own."""

    name = "minimal pairs, scored by a detector"
    head = "ReplacedTokenDetection"
    pipeline_tag = "feature-extraction"
    masked = False

    def keep(self, logits: Tensor, split: Pairs, row: np.ndarray) -> list:
        """logits [n, S] -> the sum of log(1 - p) over the text, which is what stands between [CLS] and [SEP]."""
        token = torch.arange(logits.size(1), device=logits.device)
        last = torch.from_numpy(split.lengths[row]).to(logits.device) - 1
        text = (token > 0) & (token < last[:, None])  # [n, S]
        return F.logsigmoid(-logits).masked_fill(~text, 0.0).sum(1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    dataset: str | None  # on the Hub, or a folder; None: one's own
    columns: tuple[str, ...]  # the text, or the text and its pair
    kind: type[Kind] | None = Classes  # None: numbers where a label is a fraction, else classes
    metrics: tuple[str, ...] = ()  # runs are chosen by their mean; none: those of the kind
    classes: tuple[str, ...] = ()  # in the order of their numbers; none: found in the data
    config: str | None = None  # of a set on the Hub that has several, or a folder
    bounds: tuple[float, float] = (-math.inf, math.inf)  # of a number
    unanswerable: bool = False  # whether a question may have no answer
    diagnostic: str | None = None  # a configuration whose test split is predicted too
    files: dict = field(default_factory=dict)  # split -> name of its predictions on gluebenchmark.com
    by_number: bool = False  # whether the server wants classes by number, not by name
    unused: tuple[str, ...] = ()  # splits to leave unread


def glue(config: str, columns: str, classes: str = "", metrics: str = "accuracy", file: str = "", **more) -> Task:
    said = {"metrics": tuple(metrics.split()), "classes": tuple(classes.split()), "files": {"test": file}}
    return Task("nyu-mll/glue", tuple(columns.split()), config=config, **(said | more))


MNLI_FILES = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "ax": "AX"}
PAIR_CLASSES = ("another_description", "its_description")
TASKS = {  # in the order that --task glue runs them: MNLI first, for those that start from its model
    "mnli": glue("mnli", "premise hypothesis", "entailment neutral contradiction", files=MNLI_FILES, diagnostic="ax"),
    "qqp": glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", "QQP", by_number=True),
    "qnli": glue("qnli", "question sentence", "entailment not_entailment", file="QNLI"),
    "sst2": glue("sst2", "sentence", "negative positive", file="SST-2", by_number=True),
    "cola": glue("cola", "sentence", "unacceptable acceptable", "matthews_correlation", "CoLA", by_number=True),
    "stsb": glue("stsb", "sentence1 sentence2", "", "pearson spearman", "STS-B", kind=Number, bounds=(0.0, 5.0)),
    "mrpc": glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1", "MRPC", by_number=True),
    "rte": glue("rte", "sentence1 sentence2", "entailment not_entailment", file="RTE"),
    "wnli": glue("wnli", "sentence1 sentence2", "not_entailment entailment", file="WNLI", by_number=True),
    "imdb": Task("stanfordnlp/imdb", ("text",), Classes, ("accuracy",), ("neg", "pos"), unused=("unsupervised",)),
    "squad": Task("rajpurkar/squad", ("question", "context"), Span),
    "squad_v2": Task("rajpurkar/squad_v2", ("question", "context"), Span, unanswerable=True),
    "pairs": Task("data/sample/pairs", ("text", "text_pair"), Classes, ("accuracy",), PAIR_CLASSES),
    "blimp": Task("nyu-mll/blimp", ("sentence_good", "sentence_bad"), MinimalPairs),
    "custom": Task(None, ("text",), kind=None),
}
GLUE = ("mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte")  # WNLI is left out, as everywhere

# ---------------------------------------------------------------------------------------------------------------------
# A task with its examples


@dataclass
class Data:
    name: str
    kind: Kind
    source: str  # folder, file or Hub id
    splits: dict[str, Split]
    dev: str  # the split that models are chosen by
    notes: list[str]  # what the reader should know about how it was read

    @property
    def labelled(self) -> list[str]:
        """Splits to measure on."""
        return [split for split, content in self.splits.items() if split != "train" and content.known.any()]

    def baseline(self) -> dict[str, dict[str, float]]:
        """{split: metrics} of answering always with the most common class of train, with its mean, or by chance."""
        train = self.splits.get("train")
        found = {name: self.kind.baseline(train, self.splits[name]) for name in self.labelled}
        return {name: metrics for name, metrics in found.items() if metrics}


def read_data(name: str, tokenizer: PreTrainedTokenizerFast, max_length: int, settings, detector: bool = False) -> Data:
    """Everything from --task and --data.* (settings) to tokenised splits, of examples of at most max_length tokens.

    detector: whether the encoder was pretrained as one.
    Raises MissingData for data that is not there, InputError for data that is no use.
    """
    task, notes = TASKS[name], []
    source = settings.dataset or task.dataset
    if source is None:
        raise InputError(
            f"--task {name} needs data: give --data.dataset FILE_OR_FOLDER, --data.text COLUMN and --data.label COLUMN"
        )
    kind = (task.kind or Classes)(task, settings)
    if detector and task.kind is MinimalPairs:
        kind = DetectedPairs(task, settings)
        notes.append("scored by a detector of replaced words: no pseudo-log-likelihood, as of a masked language model")
    if (Path(source) / "manifest.json").exists():
        splits, names, cut = read_shards(Path(source), tokenizer, max_length)
        check_splits(kind, splits)
        kind.name_packed(splits, names)
    else:
        tables = {split: rows for split, rows in read_tables(kind, source).items() if split not in task.unused}
        columns = choose_columns(kind, tables)
        if task.kind is None and has_fractions(tables, settings.label):
            kind = Number(task, settings)
        splits, cut = kind.encode(tables, columns, tokenizer, max_length)
        notes += count_blank(splits, tokenizer.num_special_tokens_to_add(pair=len(columns) > 1))
    if cut:
        notes.append(f"{cut} examples are longer than {max_length} tokens and were cut, the longer text first")
    if kind.trains:
        notes += leave_out_unlabelled(splits)
        notes += hold_out(splits, settings.validation, isinstance(kind, Classes))
        if settings.max_train_examples is not None:
            splits["train"] = splits["train"].only(splits["train"].shuffled(settings.max_train_examples))
    kind.check(splits.get("train"))
    return Data(name, kind, source, splits, choose_dev(splits, settings.validation), notes)


def read_tables(kind: Kind, source: str) -> dict:
    """{split: rows} of a file, a folder (of GLUE, also of all its tasks) or a set on the Hub."""
    path, task = Path(source), kind.task
    if task.config and (path / task.config).is_dir():
        path = path / task.config
    elif task.config in GLUE and any((path / other).is_dir() for other in GLUE):
        raise MissingData(f"{path} has no folder {task.config}")
    if path.exists():
        tables = read_files(path)
        beside = path.parent / str(task.diagnostic)
        if path.name == task.config and beside.is_dir():
            tables[task.diagnostic] = next(iter(read_files(beside).values()))  # it has one split
        return tables
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise MissingData(f"no file or folder {source}: check --data.dataset")
    return kind.read_hub(source)


def check_splits(kind: Kind, found: dict) -> None:
    if kind.trains and "train" not in found:
        raise InputError(
            f"the data set has no split train, only {', '.join(found)}: name a file train.parquet, train.csv or "
            "train.jsonl"
        )


def choose_columns(kind: Kind, tables: dict) -> list[str]:
    """The column of the text, or those of the text and its pair."""
    check_splits(kind, tables)
    text, pair = (*kind.task.columns, None)[:2]
    columns = [column for column in (kind.settings.text or text, kind.settings.text_pair or pair) if column]
    label = kind.label_column or kind.settings.label
    for split, rows in tables.items():
        check_columns(split, rows, columns + ([label] if kind.trains and split == "train" else []))
    return columns


def has_fractions(tables: dict, column: str) -> bool:
    """Whether a label of train is a fraction: whole numbers, also as floats, are classes."""
    labels = read_labels({"train": tables["train"]}, column, own=True)["train"]
    return any(isinstance(label, float) for label in labels)


HELD_OUT = "validation_held_out"  # the split that is made where there is none to choose by


def count_blank(splits: dict[str, Split], specials: int) -> list[str]:
    """Notes of the splits that have examples of no more than the `specials` tokens around a text."""
    notes = []
    for split, content in splits.items():
        blank = int((content.lengths <= specials).sum())
        if split == "train" and blank == len(content.lengths):
            raise InputError("no example of train has a text: check --data.text")
        notes += [f"{blank} examples of {split} have no text"] if blank else []
    return notes


def leave_out_unlabelled(splits: dict[str, Split]) -> list[str]:
    """Keeps the labelled examples of train; returns a note of those without a label, and of other splits'."""
    notes = []
    for split, content in splits.items():
        missing = int((~content.known).sum())
        if split == "train" and missing:
            if missing == len(content.known):
                raise InputError("no example of train has a label: check --data.label")
            splits[split] = content.only(np.flatnonzero(content.known))
            notes.append(f"{missing} examples of train have no label and are left out")
        elif 0 < missing < len(content.known):
            notes.append(f"{missing} examples of {split} have no label and are not scored")
    return notes


def validations(splits: dict[str, Split]) -> list[str]:
    """The labelled splits that are called so."""
    called = [split for split in splits if re.match("(validation|valid|val|dev)(?![a-z])", split)]
    return [split for split in called if splits[split].known.any()]


def hold_out(splits: dict[str, Split], validation: str | None, classes: bool) -> list[str]:
    """Where there is no split to choose by, takes a tenth of train's texts, up to 2000; returns a note of it.

    classes: whether labels are classes.
    """
    if validation in splits or validations(splits):
        return []
    train = splits["train"]
    if train.examples < 2:
        raise InputError("train has one row, and none can be held out to choose by: write more, or a validation split")
    group = train.groups()  # what is learned from must not come again where it is to be judged
    texts = int(group.max()) + 1
    chosen = np.random.default_rng(0).permutation(texts)[: min(2000, math.ceil(texts / 10))]
    is_held = np.isin(group, chosen)
    held, rest = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if classes:  # one of each class that nothing would teach goes back
        found, first = np.unique(train.labels[held], return_index=True)
        back = first[~np.isin(found, train.labels[rest])]
        rest, held = np.sort(np.concatenate([rest, held[back]])), np.delete(held, back)
    if not len(held):
        raise InputError(
            "train has a row of each class, and none can be held out to choose by: write more rows "
            "(or a fraction, if the labels are numbers to predict)"
        )
    splits |= {"train": train.only(rest), HELD_OUT: train.only(held)}
    return [f"no labelled validation split: {splits[HELD_OUT].examples} examples of train are held out for it"]


def choose_dev(splits: dict[str, Split], validation: str | None) -> str:
    if validation == "train":
        raise InputError("--data.validation train: a model cannot be chosen by what it learned; leave it out")
    if validation == "validation" and HELD_OUT in splits:
        validation = HELD_OUT
    found = validations(splits) or [split for split in splits if split != "train"]
    dev = validation or ("validation" if "validation" in found else found[0])
    if dev not in splits or not splits[dev].known.any():
        raise InputError(
            f"no labelled split {dev} to choose by: the splits are {', '.join(splits)}; choose with --data.validation"
        )
    return dev
