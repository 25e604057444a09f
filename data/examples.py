"""What examples are: rows of a file, of a set on the Hub or of packed shards become tokens and labels.

The lowest layer: squad.py (spans), blimp.py (minimal pairs) and tasks.py (the tasks) build on it. They take a tokenizer
and a length, and know nothing of models and training.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerFast

from dataloading import LABEL_END, NO_LABEL, InputError, first_line, read_manifest, read_shard


class MissingData(InputError):
    """Data that is not there; --task glue can continue without it."""


@dataclass
class Split:
    """Tokenised examples in flat arrays, which other ranks get whole at little cost."""

    tokens: np.ndarray  # [all tokens] int32
    segments: np.ndarray | None  # [all tokens] int8, 1 in the second text, for encoders that ask for it
    ends: np.ndarray  # [examples] where each example ends
    labels: np.ndarray  # [examples] int64 or, of numbers, float64; of spans and masked tokens [examples, 2]
    known: np.ndarray  # [examples] bool, False where a label is missing
    idx: list  # [examples] what predictions are listed by

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    @property
    def examples(self) -> int:
        """As the data counts them."""
        return len(self.ends)

    def of(self, flat: np.ndarray, i: int) -> np.ndarray:
        return flat[self.ends[i - 1] if i else 0 : self.ends[i]]

    def of_all(self, flat: np.ndarray, keep: np.ndarray) -> np.ndarray:
        return np.concatenate([self.of(flat, i) for i in keep])

    def contents(self) -> Iterator[bytes]:
        """Of each example and its label."""
        for i, label in enumerate(self.labels):
            yield self.of(self.tokens, i).tobytes() + label.tobytes()

    def fingerprint(self) -> str:
        """Of examples and labels, in whatever order."""
        hashes = sorted(hashlib.sha256(content).digest() for content in self.contents())
        return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]

    def shuffled(self, most: int) -> np.ndarray:
        """Numbers of the first `most` examples after shuffling."""
        return np.random.default_rng(0).permutation(self.examples)[:most]

    def groups(self) -> np.ndarray:
        """[examples] numbers from 0: examples of one text share one, unless there are not even ten texts."""
        numbers: dict[bytes, int] = {}
        group = [numbers.setdefault(self.of(self.tokens, i).tobytes(), len(numbers)) for i in range(len(self.ends))]
        return np.arange(len(group)) if len(numbers) < min(10, len(group)) else np.array(group)

    def only(self, keep: np.ndarray) -> Split:
        """The examples numbered `keep`."""
        return dataclasses.replace(
            self,
            tokens=self.of_all(self.tokens, keep),
            segments=None if self.segments is None else self.of_all(self.segments, keep),
            ends=np.cumsum(self.lengths[keep]),
            labels=self.labels[keep],
            known=self.known[keep],
            idx=[self.idx[i] for i in keep],
        )


# ---------------------------------------------------------------------------------------------------------------------
# Rows: files, and sets on the Hub

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
PART = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$|_\d{6}$")  # of a split in several files
# In a csv as pandas writes it; a class may be called None, a text may be "null"
MISSING = ["", "nan", "NaN", "<NA>"]


def read_files(path: Path) -> dict:
    """{split: rows}. Files of a folder are splits by name: train.csv, validation-00000-of-00001.parquet; a file: train.

    Raises MissingData for a folder without data, InputError for a file that cannot be read.
    """
    files = collections.defaultdict(list)  # of each split
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if suffix_of(file) and not file.name.startswith("."):
            split = PART.sub("", file.name.split(".")[0]) if path.is_dir() else "train"
            files[split].append(file)
    if not files and path.is_file():
        raise InputError(f"{path} is no {', '.join(READERS)} file: convert it to one")
    if not files:
        raise MissingData(
            f"{path} holds no {', '.join(READERS)} file: name them by split, "
            "such as train.parquet and validation.parquet"
        )
    for split, paths in files.items():
        if len({unpacked_name(file) for file in paths}) < len(paths):
            names = " and ".join(file.name for file in paths)
            raise InputError(f"{path} has the split {split} twice, as {names}: take one away")
    return {split: read_rows(paths) for split, paths in files.items()}


def unpacked_name(file: Path) -> str:
    """Without the suffix of a compression."""
    return re.sub(r"\.(gz|bz2|xz|zip|zst)$", "", file.name, flags=re.IGNORECASE)


def suffix_of(file: Path) -> str | None:
    """The suffix that says how to read it; None: there is no such one."""
    last = Path(unpacked_name(file)).suffix.lower()
    return last if last in READERS else None


def read_rows(files: list[Path]):
    """Rows of files of one kind. A csv's cells are text as it stands there; tidy_labels finds numbers among labels.

    A column of JSON has the type of its first 10 MB; what comes later and does not fit is an error.
    """
    from datasets import Dataset, disable_progress_bars, load_dataset, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # what it logs of a file that it cannot read is said below
    names, suffixes = ", ".join(map(str, files)), sorted({suffix_of(file) for file in files})
    if len(suffixes) > 1:
        raise InputError(f"{names} are one split in files of two kinds: take {' or '.join(suffixes)} away")
    for file in files:
        if not file.stat().st_size:
            raise InputError(f"{file} is empty: write rows to it or take it away")
    try:
        if (reader := READERS[suffixes[0]]) != "csv":
            return load_dataset(reader, data_files=[str(file) for file in files], split="train")
        how = {"dtype": str, "keep_default_na": False, "na_values": MISSING}
        if suffixes == [".tsv"]:
            how |= {"delimiter": "\t"} | ({} if quotes_close(files) else {"quoting": csv.QUOTE_NONE})
        tables = [pd.read_csv(file, **how) for file in files]
        if not all(isinstance(table.index, pd.RangeIndex) for table in tables):  # pandas took the first for numbers
            raise ValueError("rows have more cells than the head has names: quote cells that hold a delimiter")
        if any(set(table) != set(tables[0]) for table in tables):
            raise ValueError("their columns differ: " + " and ".join(", ".join(map(str, table)) for table in tables))
        return Dataset.from_pandas(pd.concat(tables), preserve_index=False)
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"cannot read {names}, or there are no rows ({said}): check it") from error


def quotes_close(paths: list[Path]) -> bool:
    """Whether quotes enclose cells: as GLUE writes a TSV, a quote that opens a cell need not close."""
    csv.field_size_limit(2**31 - 1)
    for path in paths:
        with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8", errors="replace", newline="") as file:
            try:
                rows = [row for row in csv.reader(file, delimiter="\t", strict=True) if row]
            except csv.Error:  # a cell without end, or one that goes on after its quote
                return False
        # Two stray quotes, a line or more apart, would enclose the end of one row and the beginning of another
        long = [cell for row in rows for cell in row if "\n" in cell]
        if long and (len(set(map(len, rows))) > 1 or any("\t" in cell for cell in long)):
            return False
    return True


def read_hub(name: str, config: str | None = None, diagnostic: str | None = None) -> dict:
    """{split: rows}. diagnostic: a configuration whose test split is one more split, of this name."""
    from datasets import load_dataset

    with reading_hub(name):
        rows = dict(load_dataset(name, config))
        if diagnostic:
            rows[diagnostic] = load_dataset(name, diagnostic, split="test")
    return rows


def read_configurations(name: str) -> dict:
    """{configuration: rows of all its splits}, of every configuration of a set on the Hub."""
    from datasets import concatenate_datasets, get_dataset_config_names, load_dataset

    with reading_hub(name):
        configurations = get_dataset_config_names(name)
        return {config: concatenate_datasets(list(load_dataset(name, config).values())) for config in configurations}


@contextlib.contextmanager
def reading_hub(name: str) -> Iterator[None]:
    """Turns what the Hub or the network has to say into MissingData."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    try:
        yield
    except Exception as error:
        raise MissingData(
            f"cannot load {name} from the Hugging Face Hub ({first_line(error)}): "
            "give --data.dataset FILE_OR_FOLDER with the same columns"
        ) from error


def check_columns(split: str, rows, wanted: list[str]) -> None:
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise InputError(
            f"{split} has no column {', '.join(missing)}: its columns are {', '.join(rows.column_names)}; "
            "rename one, or choose with --data.text, --data.text_pair and --data.label"
        )
    check_rows(split, rows)


def check_rows(split: str, rows) -> None:
    if not len(rows):
        raise InputError(f"split {split} has no rows: write some or take it away")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def read_labels(tables: dict, column: str, own: bool) -> dict[str, list]:
    """Labels of each split as they stand in the data, None where one is missing.

    own: whether the data is the user's own. There -1 may be a class: it means "no label" only where a split has no
    other label.
    """
    labels = {}
    for split, rows in tables.items():
        labels[split] = list(rows[column]) if column in rows.column_names else [None] * len(rows)
    for split, values in tidy_labels(labels).items():
        kinds = {float if isinstance(value, int) else type(value) for value in values if value is not None}
        if len(kinds) > 1 or kinds & {list, dict}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"split {split}: the labels in column {column} are of the kinds {names}: "
                "write all as numbers or all as text"
            )
        missing = {None} if own and set(values) - {-1, None} else {None, -1}
        labels[split] = [None if value in missing else value for value in values]
    return labels


# Not 007 or 1_1, which float takes
NUMERAL = re.compile(r"[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|inf)")
# A missing one among numbers, a class like others among words
UNKNOWN = {"NA", "N/A", "n/a", "NULL", "null", "None", "nan", "NaN"}


def tidy_labels(labels: dict[str, list]) -> dict[str, list]:
    """Labels of each split as they are meant, None where one is missing; words that are all numbers are numbers."""
    labels = {split: [tidy_label(value) for value in values] for split, values in labels.items()}
    words = {value for values in labels.values() for value in values if isinstance(value, str)}
    if words <= UNKNOWN or not all(NUMERAL.fullmatch(word) for word in words - UNKNOWN):
        return labels
    number = {word: tidy_label(float(word)) for word in words - UNKNOWN} | dict.fromkeys(UNKNOWN)
    return {
        split: [number[value] if isinstance(value, str) else value for value in values]
        for split, values in labels.items()
    }


def tidy_label(value: object) -> object:
    """Words without blanks around them; a column of whole numbers with one blank cell is one of floats, with a nan."""
    if isinstance(value, str):
        return value.strip() or None
    value = float(value) if isinstance(value, Decimal) else value
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return value


def number_classes(labels: dict[str, list], names: list[str] | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of each split as numbers, -1 where missing, and the names of the classes; those of train in order."""
    found = {split: set(values) - {None} for split, values in labels.items()}
    if names is None:
        classes = sorted(found["train"])
        names, number = [str(value) for value in classes], {value: i for i, value in enumerate(classes)}
    else:
        number = {key: i for i, name in enumerate(names) for key in (i, name)}
    for split, values in found.items():
        if unknown := sorted(map(str, values - number.keys())):
            more = f" and {len(names) - 10} others" if len(names) > 10 else ""
            raise InputError(
                f"split {split} has the label {unknown[0]}, which is none of the classes "
                f"{', '.join(names[:10])}{more}: check --data.label"
            )
    number[None] = -1
    return {split: np.array([number[value] for value in values]) for split, values in labels.items()}, names


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def texts_of(batch: dict, columns: list[str]) -> list[list[str]]:
    """The texts of each column: empty where one is missing, and a number as it is written."""
    return [["" if text is None else str(text) for text in batch[column]] for column in columns]


def encode_texts(
    rows, columns: list[str], labels: np.ndarray, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[Split, int]:
    """The split, and how many examples were cut, the longer text first."""
    tokens, segments, cut = [], [], 0
    for batch in rows.iter(batch_size=1000):
        encoded = tokenizer(*texts_of(batch, columns), truncation=True, max_length=max_length)
        tokens += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        segments += [np.array(ids, dtype=np.int8) for ids in encoded.get("token_type_ids", [])]
        cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    known = ~np.isnan(labels) if labels.dtype == np.float64 else labels >= 0
    idx = list(rows["idx"]) if "idx" in rows.column_names else list(range(len(rows)))
    ends = np.cumsum([len(ids) for ids in tokens])
    return Split(np.concatenate(tokens), np.concatenate(segments) if segments else None, ends, labels, known, idx), cut


# ---------------------------------------------------------------------------------------------------------------------
# Packed labelled shards: `[CLS] label 65535 text [SEP] text_pair [SEP]`


def read_shards(
    directory: Path, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[dict[str, Split], list[str] | None, int]:
    """Splits of packed shards, the classes' names where the manifest has them, and how many examples were cut."""
    manifest = read_manifest(directory)
    columns = manifest["source"].get("columns")
    check_tokenizer(directory, manifest["tokenizer"], tokenizer, pairs=columns is None or len(columns) > 1)
    cls, sep = manifest["tokenizer"]["cls"], manifest["tokenizer"]["sep"]
    found, cut = collections.defaultdict(lambda: ([], [])), 0  # of each split texts and labels
    for name in sorted(manifest["shards"]):
        tokens = read_shard(directory / name)
        marks = np.flatnonzero(tokens == LABEL_END)
        if not len(marks) or (tokens[marks - 2] != cls).any():
            raise InputError(
                f"{directory / name} is not a labelled shard ([CLS] label 65535 ...): pack it with data/pack_mnli.py"
            )
        texts, labels = found[manifest["shards"][name]["split"]]
        labels.append(tokens[marks - 1].astype(np.int64))
        for start, end in zip(marks + 1, [*(marks[1:] - 2), len(tokens)]):
            text = np.asarray(tokens[start:end], dtype=np.int32)
            if len(text) + 1 > max_length:
                # Each part but the first opens with the [SEP] between them
                parts = np.split(text[:-1], np.flatnonzero(text[:-1] == sep))
                text = np.concatenate([*cut_longest_first(parts, max_length - 2), text[-1:]])
                cut += 1
            texts.append(np.concatenate([[cls], text]).astype(np.int32))
    splits = {}
    for split, (texts, labels) in found.items():
        ends, labels = np.cumsum([len(text) for text in texts]), np.concatenate(labels)
        known, idx = labels != NO_LABEL, list(range(len(texts)))
        segments = None
        if "token_type_ids" in tokenizer.model_input_names:  # 1 after the first [SEP]
            segments = np.concatenate([(np.cumsum(text == sep) - (text == sep) > 0).astype(np.int8) for text in texts])
        splits[split] = Split(np.concatenate(texts), segments, ends, np.where(known, labels, -1), known, idx)
    return splits, manifest["source"].get("labels"), cut


def check_tokenizer(directory: Path, specials: dict, tokenizer: PreTrainedTokenizerFast, pairs: bool) -> None:
    """Raises InputError where the shards of a manifest's tokenizer are not in the tokenizer's own numbers."""
    vocabulary = tokenizer.get_vocab()
    if (directory / "tokenizer").is_dir():
        same = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer").get_vocab() == vocabulary
    else:
        ours = [tokenizer.cls_token_id, tokenizer.sep_token_id, len(vocabulary)]
        same = [specials[name] for name in ("cls", "sep", "vocab_size")] == ours
    if not same:
        raise InputError(
            f"{directory} is packed with the tokenizer {specials.get('name')}, which is not that of the base model "
            f"{tokenizer.name_or_path}: give raw text, or pack it again with `python data/pack_mnli.py --tokenizer` "
            "and the base model"
        )
    if pairs and tokenizer.num_special_tokens_to_add(pair=True) != 3:
        raise InputError(
            f"{directory} has one [SEP] between two texts, and {tokenizer.name_or_path} has more there: give raw text"
        )


def cut_longest_first(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Shortens the longest part until all fit into `room` tokens."""
    sizes = [len(part) for part in parts]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return [part[:size] for part, size in zip(parts, sizes)]
