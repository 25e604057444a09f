"""Packs text into token shards: fineweb-edu, any text set of the Hugging Face Hub, or files of your own.

    python data/pack_fineweb_edu.py --max_tokens 2_000_000_000 --out data/fineweb_edu
    python data/pack_fineweb_edu.py --dataset wikimedia/wikipedia --name 20231101.en --out data/wikipedia
    python data/pack_fineweb_edu.py --files 'corpus/*.jsonl.xz' --tokenizer data/my_tokenizer --out data/corpus
    python data/pack_fineweb_edu.py --files '*.train.txt' --join_lines 1000 --tokenizer data/t --out data/babylm

Each document becomes `[CLS] tokens ... [SEP]`, and lies whole in one shard. A hash of its text decides its split, so a
text that occurs twice stays on one side. The same command run again after a kill continues where the last shard ended,
and the result is byte for byte that of a run that was never stopped.

The work can be shared out with `--shard 0/4` ... `--shard 3/4` (over files where their number divides evenly, otherwise
over documents, which all machines then read). Part i of n numbers its shards i, i + n, i + 2n, ..., so nothing
collides, and leaves manifest_part_{i}of{n}.json. The part that ends last merges these into manifest.json; on machines
that share no disk, copy their folders into one and run any of the commands there again: it finds its part done and
merges.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.train_tokenizer import (
    FINEWEB_EDU,
    add_source_flags,
    backend_of,
    bring_tokenizer,
    describe_split,
    open_source,
    read_texts,
    reading,
    split_of,
)
from dataloading import (
    InputError,
    in_background,
    read_json,
    read_manifest,
    run_script,
    sha256_of,
    usable_cores,
    write_json,
    write_shard,
)

SPLITS = ("train", "valid", "test")


@functools.cache
def backend_in(folder: Path):
    from transformers import AutoTokenizer

    return backend_of(AutoTokenizer.from_pretrained(folder))


def tokenize(folder: Path, texts: list[str]) -> list[tuple[np.ndarray, int]]:
    """Of each text its ids, and the number of its words: of what whitespace separates."""
    encodings = backend_in(folder).encode_batch_fast(texts, add_special_tokens=False)
    return [(np.array(encoding.ids, dtype="<u2"), len(text.split())) for text, encoding in zip(texts, encodings)]


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def start_workers(folder: Path, count: int) -> ProcessPoolExecutor:
    """Processes, so that each turns its ids into arrays; with threads, one Python thread would do that for all."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(count, initializer=end_with_parent)
    backend_in(folder)  # where processes are forked, they have it too
    pool.submit(tokenize, folder, []).result()  # forks now, before there are threads
    return pool


def encode(pool: ProcessPoolExecutor, folder: Path, batches, ahead: int):
    """(texts, tokenize(texts), position) of every batch, in order, with `ahead` batches under way."""
    waiting = deque()
    for texts, position in batches:
        waiting.append((texts, pool.submit(tokenize, folder, texts), position))
        while len(waiting) > ahead:
            texts, tokenized, position = waiting.popleft()
            yield texts, tokenized.result(), position
    for texts, tokenized, position in waiting:
        yield texts, tokenized.result(), position


class ShardWriter:
    """Collects the documents of each split and writes a shard whenever the next document would not fit."""

    def __init__(self, out: Path, prefix: str, shard_size: int, cls: int, sep: int, part: int = 0, parts: int = 1):
        self.out, self.prefix, self.shard_size = out, prefix, shard_size
        self.cls, self.sep, self.part, self.parts = cls, sep, part, parts
        self.shards, self.pending = {}, {split: [] for split in SPLITS}
        self.tokens, self.words = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)  # of what is pending

    def add(self, split: str, ids: np.ndarray, words: int) -> None:
        document = np.empty(len(ids) + 2, dtype="<u2")
        document[0], document[1:-1], document[-1] = self.cls, ids, self.sep
        if self.tokens[split] and self.tokens[split] + len(document) > self.shard_size:
            self.flush(split)
        self.pending[split].append(document)
        self.tokens[split] += len(document)
        self.words[split] += words

    def flush(self, split: str) -> None:
        if not self.pending[split]:
            return
        index = self.part + self.parts * sum(entry["split"] == split for entry in self.shards.values())
        path = self.out / f"{self.prefix}_{split}_{index:06d}.bin"
        tokens = np.concatenate(self.pending[split])
        write_shard(path, tokens)
        counts = {"tokens": len(tokens), "documents": int((tokens == self.cls).sum()), "words": self.words[split]}
        self.shards[path.name] = {"split": split, **counts, "sha256": sha256_of(path)}
        self.pending[split], self.tokens[split], self.words[split] = [], 0, 0

    def save(self, path: Path, settings: dict, position: list) -> None:
        """The state to resume from. Shards written after it are written again, with the same bytes."""
        state = {"settings": settings, "shards": self.shards, "words": self.words, "position": position}
        pending = {split: np.concatenate(self.pending[split] or [np.empty(0, "<u2")]) for split in SPLITS}
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, state=json.dumps(state), **pending)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path, settings: dict) -> list:
        with reading(f"{path}, which says where to go on (without it packing starts again)"):
            saved = dict(np.load(path))
            state = json.loads(str(saved["state"]))
        check_settings(path, state["settings"], settings)
        if "words" not in state:
            raise InputError(f"{path} was left by an earlier version: choose another --out, or delete that folder")
        self.shards, self.words = state["shards"], state["words"]
        for split in SPLITS:
            self.pending[split], self.tokens[split] = [saved[split]] if len(saved[split]) else [], len(saved[split])
        return state["position"]


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        names = ", ".join(different)
        raise InputError(f"{path} was made with another {names}: choose another --out, or delete that folder")


def pack(encoded, writer: ShardWriter, state_path: Path, settings: dict, fractions, max_tokens, size: float) -> None:
    """Moves documents from the stream to the writer; `size`: characters to come, for the estimate of the time left."""
    tokens = sum(entry["tokens"] for entry in writer.shards.values()) + sum(writer.tokens.values())
    with tqdm(total=max_tokens, initial=tokens, unit="tok", unit_scale=True, desc="packing", mininterval=1) as bar:
        for texts, tokenized, position in encoded:
            shards_before, tokens_before = len(writer.shards), tokens
            for text, (ids, words) in zip(texts, tokenized):
                if max_tokens is not None and tokens + len(ids) + 2 > max_tokens:
                    return
                writer.add(split_of(text, *fractions), ids, words)
                tokens += len(ids) + 2
            if len(writer.shards) > shards_before:
                writer.save(state_path, settings, position)
            read = sum(lane["characters"] for lane in position)
            if max_tokens is None and size > read > 0:
                bar.total = int(tokens * size / read)
            bar.update(tokens - tokens_before)


def merge_parts(out: Path, parts: int) -> bool:
    """Writes manifest.json once the manifests of all parts are there."""
    paths = [out / f"manifest_part_{part}of{parts}.json" for part in range(parts)]
    if not all(path.exists() for path in paths):
        return False
    manifests = [read_json(path) for path in paths]
    for path, manifest in zip(paths, manifests):
        check_settings(path, manifest, {key: value for key, value in manifests[0].items() if key != "shards"})
    shards = {name: entry for manifest in manifests for name, entry in manifest["shards"].items()}
    write_json(out / "manifest.json", {**manifests[0], "shards": dict(sorted(shards.items()))})
    read_manifest(out)  # are all of the shards here, too?
    return True


def pack_source(args: argparse.Namespace, part: int, parts: int, tokenizer: dict, pool, ahead: int) -> None:
    """One part of the work, from the source to its manifest."""
    stream, sizes, source = open_source(args)
    fractions = (args.valid_fraction, args.test_fraction)
    prefix = args.prefix or ("fwedu" if source.get("dataset") == FINEWEB_EDU else "text")
    source |= {"prefix": prefix, "shard_size": args.shard_size, "max_tokens": args.max_tokens, "parts": parts}
    settings = {"format": 1, "tokenizer": tokenizer, "source": source, "split_rule": describe_split(*fractions)}
    manifest = args.out / ("manifest.json" if parts == 1 else f"manifest_part_{part}of{parts}.json")
    if manifest.exists():
        check_settings(manifest, read_json(manifest), settings)
        print(f"{manifest}: done already")
        return

    writer = ShardWriter(args.out, prefix, args.shard_size, tokenizer["cls"], tokenizer["sep"], part, parts)
    state_path = args.out / f"resume_{part}of{parts}.npz"
    position = writer.restore(state_path, settings) if state_path.exists() else None
    texts = in_background(read_texts(stream, sizes, args, part, parts, position))
    max_tokens = None if args.max_tokens is None else args.max_tokens // parts
    with contextlib.closing(texts):
        encoded = encode(pool, args.out / "tokenizer", texts, ahead)
        pack(encoded, writer, state_path, settings, fractions, max_tokens, sum(sizes) / parts)
    for split in SPLITS:
        writer.flush(split)
    write_json(manifest, {**settings, "shards": dict(sorted(writer.shards.items()))})
    for path in (state_path, state_path.with_suffix(".tmp")):
        path.unlink(missing_ok=True)
    for split, fraction in zip(SPLITS, (1 - sum(fractions), *fractions)):
        if fraction > 0 and not any(entry["split"] == split for entry in writer.shards.values()):
            count = sum(entry["documents"] for entry in writer.shards.values())
            more = "" if split == "train" else f", raise --{split}_fraction"
            how = f"pack more text{more}, or make smaller documents (--sample_by, --join_lines)"
            print(f"none of {count:,} documents fell to {split}: {how}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    flag, largest = parser.add_argument, "tokens in a shard, at most (a longer document has a shard of its own)"
    flag("--tokenizer", default="answerdotai/ModernBERT-base", help="Hub id or folder of the tokenizer")
    flag("--out", type=Path, default=Path("data/fineweb_edu"), help="folder for shards and all that belongs to them")
    flag("--prefix", help="first part of the shards' names (fwedu for fineweb-edu, otherwise text)")
    flag("--shard_size", type=int, default=100_000_000, help=largest)
    flag("--max_tokens", type=int, help="stop at this many tokens, all splits and parts together (no end)")
    flag("--shard", default="0/1", metavar="I/N", help="do part I of N (I from 0) of the work")
    args = parser.parse_args()
    try:
        part, parts = (int(number) for number in args.shard.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 0 <= part < parts:
        raise InputError(f"--shard {args.shard} is not I/N with I from 0 to N - 1, such as 0/4")

    _, tokenizer = bring_tokenizer(args.tokenizer, args.out)
    workers = min(usable_cores(), 60)  # Windows allows no more processes in a pool
    with start_workers(args.out / "tokenizer", workers) as pool:
        pack_source(args, part, parts, tokenizer, pool, ahead=2 * workers)
    if parts > 1 and not merge_parts(args.out, parts):
        print(f"{args.out}: manifest.json follows when all {parts} parts are here")


if __name__ == "__main__":
    try:
        run_script(main)
    except BrokenExecutor:
        died = "a process that tokenizes has died, of too little memory perhaps"
        sys.exit(f"error: {died}: run the same command again, it continues")
