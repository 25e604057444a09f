"""Shards -> documents -> windows -> packed rows -> device. Knows nothing of the model.

    shard      the .bin of llm.c and modded-nanogpt: 256 int32 of header (20240520, 1, number of tokens), then the
               tokens as uint16
    document   [CLS] tokens ... [SEP], contiguous in a shard
    window     a document, or a piece of one that is longer than `max_length`, with a [CLS] and a [SEP] of its own
    row        what one forward takes: whole windows side by side, `row_tokens` in all, padding only at the end

The sequence of rows is a function of (seed, data) alone; rank r of W takes rows r, r + W, r + 2W, ... of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Files: shards and the manifest beside them

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB_SIZE = 2**16  # tokens are stored as uint16
LABEL_END, NO_LABEL = 65535, 65534  # in labelled shards: `[CLS] label 65535 text [SEP] text_pair [SEP]`
SPECIAL_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, where, and the command that fixes it."""


def usable_cores() -> int:
    """Those this process may run on: fewer than the machine's in a cpuset, a batch job or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: Exception) -> str:
    """The first line of the error's message, or of its cause's, which says more."""
    error = error.__cause__ or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_script(main: Callable[[], None]) -> None:
    """Runs main; what cannot be used, read or written ends it with one line."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


def read_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard: [number of tokens] uint16. Raises InputError when magic, version or size are wrong."""
    size = path.stat().st_size if path.is_file() else 0
    if size < HEADER_BYTES:
        raise InputError(f"{path} is missing or shorter than a shard's header: build or download it again")
    magic, version, num_tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(f"{path} is not a token shard (magic {magic}, version {version}): build or download it again")
    if size != HEADER_BYTES + 2 * num_tokens:
        raise InputError(
            f"{path} is truncated ({size:,} bytes, its header asks for {HEADER_BYTES + 2 * num_tokens:,}): "
            "delete it and build or download it again"
        )
    if num_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes a shard under a temporary name, then renames it: a shard that exists is whole."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no names with values in it")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: missing or not JSON ({error})") from error
    return found


def read_manifest(directory: Path) -> dict:
    """The manifest of a folder of shards, checked against the files it names.

    {"format": 1,
     "tokenizer": {"name", "sha256" (of tokenizer/tokenizer.json), "vocab_size", "cls", "sep", "pad", "mask", "unk"},
     "source": {...}, "split_rule": "...",
     "shards": {file name: {"split": "train" | "valid" | "test" (a labelled set has its own), "tokens", "documents",
                            "words" (what whitespace separates; older manifests lack it), "sha256"}}}
    """
    path = directory / "manifest.json"
    if not path.exists():
        how = f"pack your text with `python data/pack_fineweb_edu.py --out {directory} ...`"
        if directory.name == "fineweb_edu":
            how = f"run `python data/download_fineweb_edu.py --num_chunks 10 --out {directory}`, or {how}"
        raise InputError(f"no manifest.json in {directory}: {how}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path} is not a manifest ({said}): delete it and build the data again") from error
    shards, vocab_size = manifest["shards"], manifest["tokenizer"]["vocab_size"]
    if vocab_size > MAX_VOCAB_SIZE:
        raise InputError(
            f"{path}: a vocabulary of {vocab_size:,} does not fit in uint16 shards: "
            f"use one of at most {MAX_VOCAB_SIZE:,}"
        )
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if tokenizer.exists() and sha256_of(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise InputError(
            f"{tokenizer} is not the tokenizer that {path} names: pack the text again with the tokenizer you want"
        )
    for name, entry in shards.items():
        if len(read_shard(directory / name)) != entry["tokens"]:
            raise InputError(
                f"{directory / name} does not have the {entry['tokens']:,} tokens that manifest.json names: "
                "build or download it again"
            )
    return manifest


def check_manifest(manifest: dict) -> None:
    """What read_manifest describes. Raises ValueError, or what reading something else raises."""
    specials = manifest["tokenizer"]
    ids = [specials[name] for name in ("cls", "sep", "pad", "mask")]
    counts = [specials["vocab_size"], *ids, *(entry["tokens"] for entry in manifest["shards"].values())]
    counts += [entry.get(name, 0) for entry in manifest["shards"].values() for name in ("documents", "words")]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("a count or a token id that is not a whole number of at least 0")
    if max(ids) >= specials["vocab_size"]:
        raise ValueError("a special token beyond the vocabulary")
    words = [specials["sha256"]]
    for name, entry in manifest["shards"].items():
        words += [entry["split"], entry["sha256"]]
        if Path(name).name != name or name == ".." or "\0" in name or len(name.encode()) > 255:
            raise ValueError(f"{name[:40]!r} is not the name of a file in this folder")
    if not all(isinstance(word, str) for word in words) or not isinstance(manifest["source"], dict):
        raise ValueError("a split or sha256 that is not a string, or a source that is not a mapping")


def write_json(path: Path, content: dict) -> None:
    """Under a temporary name that is then replaced: a file that exists is whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Documents and windows

SCAN_TOKENS = 1 << 24  # tokens looked at together: 32 MB at a time, whatever the shard's size


def find_windows(tokens: np.ndarray, max_length: int, cls: int, sep: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a shard: (start, length) of their text, [windows] each, without the [CLS] and [SEP] they will get.

    A document whose text is longer than max_length - 2 is cut into the fewest pieces, of equal length to one token.
    A shard may begin in the middle of a document, and its last document may lack its [SEP].
    """
    chunks = range(0, len(tokens), SCAN_TOKENS)
    found = [lo + np.flatnonzero(tokens[lo : lo + SCAN_TOKENS] == cls) for lo in chunks]
    # A [CLS] before the shard, for a document that began in another.
    cls_at = np.concatenate([[-1], *found]).astype(np.int64)
    start = cls_at + 1
    end = np.append(cls_at[1:], len(tokens))
    filled = end > start  # with anything after [CLS]: not so in an empty shard
    end[filled] -= tokens[end[filled] - 1] == sep
    length = end - start  # [documents]

    pieces = -(-length // (max_length - 2))
    document = np.repeat(np.arange(len(length)), pieces)  # [windows]
    piece = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    low = length[document] * piece // pieces[document]
    high = length[document] * (piece + 1) // pieces[document]
    return start[document] + low, high - low


def check_size(path: Path, tokens: np.ndarray) -> None:
    """Call before reading mapped tokens: beyond the end of their file, a bus error kills the process.

    A file that breaks between this check and the read still kills it.
    """
    size, mapped = path.stat().st_size if path.exists() else 0, HEADER_BYTES + 2 * len(tokens)
    if size < mapped:
        raise InputError(f"{path} shrank from {mapped:,} to {size:,} bytes while in use: build or download it again")


def check_vocabulary(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    largest = max((int(tokens[lo : lo + SCAN_TOKENS].max()) for lo in range(0, len(tokens), SCAN_TOKENS)), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{path} holds token id {largest}, beyond the vocabulary of {vocab_size}: "
            "pack it again with its manifest's tokenizer"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Windows -> rows

LOOK_AHEAD = 512  # windows to choose from when closing a row: enough for padding under 0.5% of rows of 8k tokens


class RowStream:
    """The global sequence of rows, as lists of windows (shard, start, length of text); no token is touched here.

    Windows are taken in the order drawn while the next one fits; then the row is closed by best fit among the
    LOOK_AHEAD windows that follow. (Best fit from the start would hand out all long windows first.)
    `state` is the position after the last row: plain ints, independent of the number of ranks.
    """

    def __init__(
        self,
        shards: list[Path],
        specials: dict,
        row_tokens: int,
        max_length: int,
        seed: int | None,
        max_tokens: int | None = None,
        state: dict | None = None,
        unverified: dict[Path, str] | None = None,
    ):
        """seed None: one epoch in the order on disk, to the window that reaches max_tokens. Else: endless, shuffled.

        unverified: sha256 of shards, each checked, and taken out, when its shard is first opened.
        """
        if max_length > row_tokens:
            raise InputError(
                f"max_length {max_length} is longer than a row of {row_tokens} tokens: "
                "lower --data.max_length or raise --train.row_tokens"
            )
        if max_length < 3:
            raise InputError(
                f"max_length {max_length} leaves no room for text between [CLS] and [SEP]: raise --data.max_length"
            )
        self.shards, self.specials = shards, specials
        self.row_tokens, self.max_length, self.seed, self.text_left = row_tokens, max_length, seed, max_tokens
        self.tokens = [read_shard(path) for path in shards]
        self.unverified = {} if unverified is None else unverified
        self.checked: set[int] = set()
        state = state or {"epoch": 0, "shard": 0, "cursor": 0, "pool": []}
        self.epoch, self.shard, self.cursor = state["epoch"], state["shard"], state["cursor"]
        self.pool = [tuple(window) for window in state["pool"]]  # drawn and not yet placed, in the order drawn
        for shard in {window[0] for window in self.pool}:
            self.check_shard(shard)
        self.start_epoch()

    @property
    def state(self) -> dict:
        return {"epoch": self.epoch, "shard": self.shard, "cursor": self.cursor, "pool": self.pool[:]}

    def start_epoch(self) -> None:
        order = np.arange(len(self.shards))
        if self.seed is not None:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        self.order = order.tolist()
        self.open_shard()

    def open_shard(self) -> None:
        """Draws the order of the windows of the epoch's self.shard-th shard."""
        self.windows: list[tuple[int, int, int]] = []
        if self.shard >= len(self.order):
            return
        shard = self.order[self.shard]
        tokens = self.tokens[shard]
        self.check_shard(shard)
        start, length = find_windows(tokens, self.max_length, self.specials["cls"], self.specials["sep"])
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch, shard]).permutation(len(start))
            start, length = start[order], length[order]
        elif self.text_left is not None:
            keep = np.cumsum(length) - length < self.text_left
            start, length = start[keep], length[keep]
            self.text_left -= int(length.sum())
        self.windows = list(zip([shard] * len(start), start.tolist(), length.tolist()))

    def check_shard(self, shard: int) -> None:
        """Its size each time, before it is read; its hash and vocabulary once."""
        path, tokens = self.shards[shard], self.tokens[shard]
        check_size(path, tokens)
        if shard in self.checked:
            return
        if path in self.unverified:
            if sha256_of(path) != self.unverified[path]:
                raise InputError(
                    f"{path} is not what manifest.json names (sha256): delete it and build or download it again, "
                    "or take it as it is with --data.verify false"
                )
            del self.unverified[path]
        check_vocabulary(path, tokens, self.specials["vocab_size"])
        self.checked.add(shard)

    def fill_pool(self) -> None:
        while len(self.pool) < LOOK_AHEAD and self.shard < len(self.order):
            if self.cursor < len(self.windows):
                self.pool.append(self.windows[self.cursor])
                self.cursor += 1
            else:
                self.shard, self.cursor = self.shard + 1, 0
                self.open_shard()

    def take(self, room: int) -> tuple[int, int, int] | None:
        """The next window in turn if it fits into `room` tokens, else the longest that fits, else None."""
        if self.pool and self.pool[0][2] + 2 <= room:
            return self.pool.pop(0)
        fitting = [window for window in self.pool if window[2] + 2 <= room]
        if not fitting:
            return None
        longest = max(fitting, key=lambda window: window[2])  # of one length, the first drawn
        self.pool.remove(longest)
        return longest

    def next_row(self) -> list[tuple[int, int, int]] | None:
        """The windows of the next row; None at the end of a stream that has one."""
        for _ in range(2):
            row, room = [], self.row_tokens
            self.fill_pool()
            while (window := self.take(room)) is not None:
                row.append(window)
                room -= window[2] + 2
                self.fill_pool()
            if row:
                return row
            if self.seed is None:
                return None
            self.epoch, self.shard, self.cursor = self.epoch + 1, 0, 0
            self.start_epoch()
        raise InputError(f"no document with text in {[str(path) for path in self.shards]}: pack some text first")


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> tensors -> device


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies through pinned memory: from unpinned memory, the copy would make the host wait for the GPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def in_background(iterator: Iterator, depth: int = 2) -> Iterator:
    """Runs a generator in a thread of its own, up to `depth` items ahead. What it raises is raised here."""
    background, end = ThreadPoolExecutor(1), object()  # Python waits for its thread before it exits
    ahead = deque(background.submit(next, iterator, end) for _ in range(depth))
    try:
        while (item := ahead.popleft().result()) is not end:
            ahead.append(background.submit(next, iterator, end))
            yield item
    finally:
        for future in ahead:
            future.cancel()
        background.shutdown()
        iterator.close()


@dataclass
class Row:
    """One rank's row, and what every rank knows of the round of `world_size` rows that it belongs to."""

    index: int  # number of the row in the global sequence
    input_ids: torch.Tensor  # [T] int32, not corrupted yet
    document_ids: torch.Tensor  # [T] int32, ascending; padding is the last document
    positions: torch.Tensor  # [T] int32, restarting at 0 in each document
    text: torch.Tensor  # [T] bool, False at [CLS], [SEP] and padding
    offsets: np.ndarray  # [T] int64, where each token of text lies in the shards, -1 elsewhere
    round_text: list[int]  # [W] tokens of text in each of the round's rows
    round_lengths: np.ndarray  # [documents of the round's rows] tokens in each, specials included
    state: dict  # position of the loader after this round


class Loader:
    """Iterates over this rank's rows, from the first each time; a background thread packs, pins and copies them ahead.

    A round is `world_size` consecutive rows, one a rank. A stream that ends fills its last round with empty rows.
    Restoring `state` (of any row, under any number of ranks) continues at the exact next row.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict,
        split: str,
        row_tokens: int,
        max_length: int,
        *,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
        state: dict | None = None,
        rows_ahead: int = 16,
        verify: bool = True,
    ):
        """verify: whether a shard that is first opened is checked against its hash in the manifest."""
        shards = [directory / name for name, entry in manifest["shards"].items() if entry["split"] == split]
        if not shards:
            raise InputError(
                f"{directory / 'manifest.json'} lists no {split} shards: pack it into another --out with "
                f"data/pack_fineweb_edu.py, with more text, smaller documents or a larger --{split}_fraction"
            )
        self.specials, self.row_tokens, self.rows_ahead = manifest["tokenizer"], row_tokens, rows_ahead
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.first_index = state["index"] if state else 0
        hashes = {directory / name: entry["sha256"] for name, entry in manifest["shards"].items()}
        unverified = hashes if verify else {}  # one for all streams, so that each shard is checked once
        stream = shards, self.specials, row_tokens, max_length, seed, max_tokens, state, unverified
        self.new_stream = lambda: RowStream(*stream)
        # Now, so that what cannot be fed is said here, and the first shard scanned before a clock runs.
        self.first_stream: RowStream | None = self.new_stream()
        self.shard_starts = np.cumsum([0] + [len(tokens) for tokens in self.first_stream.tokens])

    def __iter__(self) -> Iterator[Row]:
        stream, self.first_stream = self.first_stream or self.new_stream(), None
        return in_background(self.rows_of(stream), self.rows_ahead)

    def rows_of(self, stream: RowStream) -> Iterator[Row]:
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # a thread begins on GPU 0, whatever its rank
        index = self.first_index
        while True:
            rows = [stream.next_row() or [] for _ in range(self.world_size)]
            if not any(rows):
                return
            state = {"index": index + self.world_size, **stream.state}
            yield self.build_row(index + self.rank, rows, stream, state)
            index += self.world_size

    def build_row(self, index: int, rows: list[list[tuple]], stream: RowStream, state: dict) -> Row:
        """rows: the windows of each row of the round."""
        windows, size, tokens = rows[self.rank], self.row_tokens, stream.tokens
        for shard in {shard for shard, _, _ in windows}:
            check_size(stream.shards[shard], tokens[shard])
        input_ids = np.full(size, self.specials["pad"], dtype=np.int32)
        offsets = np.full(size, -1, dtype=np.int64)
        at = 0
        for shard, start, length in windows:
            place = slice(at + 1, at + 1 + length)
            input_ids[at], input_ids[place.stop] = self.specials["cls"], self.specials["sep"]
            input_ids[place] = tokens[shard][start : start + length]
            offsets[place] = self.shard_starts[shard] + start + np.arange(length)
            at = place.stop + 1
        if input_ids.max() >= self.specials["vocab_size"]:  # changed since its shard was opened
            for shard, start, length in windows:
                check_vocabulary(
                    stream.shards[shard], tokens[shard][start : start + length], self.specials["vocab_size"]
                )
        lengths = np.array([length + 2 for _, _, length in windows] + [size - at], dtype=np.int64)
        document_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        positions = np.arange(size, dtype=np.int32) - np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int32)

        return Row(
            index,
            to_device(input_ids, self.device),
            to_device(document_ids, self.device),
            to_device(positions, self.device),
            to_device(offsets >= 0, self.device),
            offsets,
            round_text=[sum(length for _, _, length in row) for row in rows],
            round_lengths=np.array([length + 2 for row in rows for _, _, length in row], dtype=np.int64),
            state=state,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The validation set: which tokens are masked, and what tells one set from another

FROZEN_MASK_RATE = 0.15


def hash64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: integers in, well-stirred uint64 out."""
    x = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def frozen_mask(offsets: np.ndarray) -> np.ndarray:
    """[T] bool: 15% of the text, decided for each token by where it lies in the shards alone.

    So the same tokens are masked whatever the world size, the row size and the way documents are packed or cut.
    """
    return (offsets >= 0) & (hash64(offsets + 1) < np.uint64(FROZEN_MASK_RATE * 2**64))


def frozen_words(row: Row) -> np.ndarray:
    """[T] int32: the row's tokens, those of the frozen mask replaced by words of the same window, drawn by place."""
    ids, text, positions = row.input_ids.cpu().numpy(), row.offsets >= 0, row.positions.cpu().numpy()
    documents = row.document_ids.cpu().numpy()
    words = np.bincount(documents, weights=text)[documents].astype(np.int64)  # [T] of text in a token's window
    first = np.arange(len(ids)) - positions + 1  # [T] the place of its first, after [CLS]
    drawn = first + (hash64(row.offsets + (1 << 40)) % np.maximum(words, 1).astype(np.uint64)).astype(np.int64)
    return np.where(frozen_mask(row.offsets), ids[np.minimum(drawn, len(ids) - 1)], ids)


def data_hash(manifest: dict) -> str:
    """Hash of tokenizer and shards: runs that share it read the same tokens."""
    shards = sorted((name, entry["sha256"]) for name, entry in manifest["shards"].items())
    return hashlib.sha256(json.dumps([manifest["tokenizer"]["sha256"], shards]).encode()).hexdigest()


def count_text(manifest: dict, split: str = "train") -> tuple[int, float | None]:
    """Of a split's shards: tokens of text, [CLS] and [SEP] left out, and words per token, None where it is unknown."""
    shards = [entry for entry in manifest["shards"].values() if entry["split"] == split]
    tokens = sum(entry["tokens"] - 2 * entry.get("documents", 0) for entry in shards)
    counted = tokens > 0 and all("words" in entry for entry in shards)
    return tokens, sum(entry["words"] for entry in shards) / tokens if counted else None


def unigram_surprise(shards: list[Path], specials: dict) -> np.ndarray:
    """[vocabulary] nats: minus the logarithm of each token's frequency, with add-one smoothing."""
    counts, budget = np.ones(specials["vocab_size"]), 100_000_000  # tokens: enough to know frequencies, quick to read
    for path in shards:
        tokens = read_shard(path)[:budget]
        budget -= len(tokens)
        for low in range(0, len(tokens), SCAN_TOKENS):
            counts += np.bincount(tokens[low : low + SCAN_TOKENS], minlength=len(counts))[: len(counts)]
    counts[[specials[name] for name in ("cls", "sep", "pad", "mask")]] = 0
    with np.errstate(divide="ignore"):
        return -np.log(counts / counts.sum())


def describe_validation(directory: Path, manifest: dict, loader: Loader) -> dict:
    """Size and fingerprint of a loader's set with its masks, and the loss of predicting by unigram frequencies alone.

    The fingerprint sums a hash of (place, token, masked) over the text, so it does not depend on how rows are packed.
    """
    shards = [directory / name for name, entry in manifest["shards"].items() if entry["split"] == "train"]
    surprise = unigram_surprise(shards, manifest["tokenizer"])
    fingerprint, tokens, masked_tokens, unigram = 0, 0, 0, 0.0
    for row in loader:
        ids, text, masked = row.input_ids.cpu().numpy(), row.offsets >= 0, frozen_mask(row.offsets)
        code = hash64(row.offsets[text] + 1) + (ids[text].astype(np.uint64) * np.uint64(2) + masked[text])
        fingerprint = (fingerprint + int(hash64(code).sum(dtype=np.uint64))) % 2**64
        tokens, masked_tokens = tokens + int(text.sum()), masked_tokens + int(masked.sum())
        unigram += surprise[ids[masked]].sum()
    found = {"tokens": tokens, "masked_tokens": masked_tokens, "fingerprint": f"{fingerprint:016x}"}
    return found | {"unigram_loss": unigram / max(1, masked_tokens)}
