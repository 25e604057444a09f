"""Packs text into token shards: fineweb-edu, any text set of the Hugging Face Hub, or files of your own.

    python data/pack_fineweb_edu.py --max_tokens 2_000_000_000 --out data/fineweb_edu
    python data/pack_fineweb_edu.py --dataset wikimedia/wikipedia --name 20231101.en --out data/wikipedia
    python data/pack_fineweb_edu.py --files 'corpus/*.jsonl.xz' --tokenizer data/my_tokenizer --out data/corpus

Each document becomes `[CLS] tokens ... [SEP]`, and lies whole in one shard. A hash of its text decides its split, so a text
that occurs twice stays on one side. The same command run again after a kill continues where the last shard ended, and the
result is byte for byte that of a run that was never stopped.

The work can be shared out with `--shard 0/4` ... `--shard 3/4` (over files where their number divides evenly, otherwise over
documents, which all machines then read). Part i of n numbers its shards i, i + n, i + 2n, ..., so nothing collides, and leaves
manifest_part_{i}of{n}.json. The part that ends last merges these into manifest.json; on machines that share no disk, copy
their folders into one and run any of the commands there again: it finds its part done and merges.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import glob
import hashlib
import json
import os
import queue
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import MAX_VOCAB_SIZE, InputError, read_manifest, sha256_of, write_manifest, write_shard  # noqa: E402

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SPLITS = ("train", "valid", "test")
READ_CHARACTERS = 8_000_000  # a batch for the tokenizer: large enough to keep every core busy to its end
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": 2.7, ".xz": 3.7, ".bz2": 3.7, ".parquet": 1.7}  # characters in a byte, for the estimate of the time left


# ---------------------------------------------------------------------------------------------------------------------
# The source: a stream of texts in an order that never changes, with a position that can be saved


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default=FINEWEB_EDU, help="text set on the Hugging Face Hub; its train split is read")
    parser.add_argument("--name", help="configuration of --dataset (fineweb-edu: sample-10BT unless given)")
    parser.add_argument("--revision", help="commit, branch or tag of --dataset (its newest commit unless given)")
    parser.add_argument("--files", nargs="+", metavar="GLOB", help="read these files instead, all of one type: "
                        ".jsonl, .json, .txt (each also .gz, .xz, .bz2) or .parquet")
    parser.add_argument("--text_field", default="text", help="column that holds the text")
    parser.add_argument("--sample_by", choices=("paragraph", "line", "document"), default="paragraph",
                        help="what one document is in a .txt: a paragraph (up to a blank line), a line, or the whole file")
    parser.add_argument("--valid_fraction", type=float, default=0.01, help="share of the documents kept for validation")
    parser.add_argument("--test_fraction", type=float, default=0.01, help="share of the documents kept for testing")


def open_source(args: argparse.Namespace):
    """The source as a stream of Arrow tables, the characters in each of its files (estimated, 1 where unknown), its description."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    if args.files:
        files = sorted({file for pattern in args.files for file in glob.glob(pattern, recursive=True)})
        if not files:
            raise InputError(f"no file matches --files {' '.join(args.files)}")
        kinds = {next((s for s in reversed(Path(file).suffixes) if s not in COMPRESSIONS), "") for file in files}
        if len(kinds) > 1 or not kinds <= set(READERS):
            raise InputError(f"--files must be all of one type out of {', '.join(READERS)}, found {', '.join(sorted(kinds))}")
        reader = READERS[kinds.pop()]
        options = {"sample_by": args.sample_by} if reader == "text" else {}
        stream = load_dataset(reader, data_files=files, split="train", streaming=True, **options)
        source = {"files": [{"name": Path(file).name, "bytes": os.path.getsize(file)} for file in files], **options}
        sizes = [file["bytes"] * COMPRESSIONS.get(Path(file["name"]).suffix, 1) for file in source["files"]]
    else:
        name = args.name or ("sample-10BT" if args.dataset == FINEWEB_EDU else None)
        revision = HfApi().dataset_info(args.dataset, revision=args.revision).sha
        stream = load_dataset(args.dataset, name, revision=revision, split="train", streaming=True)
        source = {"dataset": args.dataset, "name": name, "revision": revision}
        splits = stream.info.splits or {}
        sizes = [splits["train"].num_bytes / stream.num_shards if "train" in splits else 1] * stream.num_shards
    columns = stream.column_names or list(next(iter(stream)))
    if args.text_field not in columns:
        raise InputError(f"the data has no column {args.text_field!r}: choose --text_field out of {', '.join(columns)}")
    return stream.select_columns(args.text_field).with_format("arrow"), sizes, {**source, "text_field": args.text_field}


def read_texts(stream, sizes: list[float], text_field: str, part: int = 0, parts: int = 1, position: list | None = None):
    """Yields (texts, position after them) of one part of the work; blank texts are no documents.

    Files are read side by side, in up to 16 lanes and in proportion to their sizes: every shard then holds text of all
    files, which a loader that shuffles within shards can mix.
    """
    share_files = stream.num_shards % parts == 0
    if share_files:
        stream, sizes = stream.shard(parts, part, contiguous=False), sizes[part::parts]
    num_lanes = min(16, stream.num_shards)
    lanes = [stream.shard(num_lanes, i, contiguous=False) for i in range(num_lanes)]
    weights = [sum(sizes[i::num_lanes]) for i in range(num_lanes)]
    position = position or [{"state": None, "characters": 0, "ended": False} for _ in lanes]
    for lane, start in zip(lanes, position):
        if start["state"]:
            lane.load_state_dict(start["state"])
    tables = [lane.iter(batch_size=500) for lane in lanes]
    texts, characters = [], 0
    while open_lanes := [i for i in range(len(lanes)) if not position[i]["ended"]]:
        i = min(open_lanes, key=lambda i: position[i]["characters"] / weights[i])
        table = next(tables[i], None)
        if table is None:
            position[i]["ended"] = True
            continue
        for text in table[text_field].to_pylist():
            if text is not None and not isinstance(text, str):
                raise InputError(f"column {text_field!r} holds {type(text).__name__}, not text: choose another --text_field")
            if text and not text.isspace():
                position[i]["characters"] += len(text)
                if share_files or int.from_bytes(digest_of(text)[8:], "big") % parts == part:
                    texts.append(text)
                    characters += len(text)
        position[i]["state"] = lanes[i].state_dict()
        if characters >= READ_CHARACTERS:
            yield texts, copy.deepcopy(position)
            texts, characters = [], 0
    yield texts, position


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, valid_fraction: float, test_fraction: float) -> str:
    place = int.from_bytes(digest_of(text)[:8], "big") / 2**64
    return "valid" if place < valid_fraction else "test" if place < valid_fraction + test_fraction else "train"


def in_background(iterator, depth: int = 2):
    """Runs an iterator in a thread of its own, up to `depth` items ahead. Its exceptions are raised here."""
    items, stop, end = queue.Queue(depth), threading.Event(), object()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.2)
                return True
            except queue.Full:
                pass
        return False

    def run():
        try:
            all(put((item, None)) for item in iterator)  # put is False, and ends the loop, once nobody listens
            put((end, None))
        except BaseException as error:  # whatever it is, it belongs to the listener
            put((end, error))
        finally:
            iterator.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := items.get())[0] is not end:
            yield item[0]
        if item[1] is not None:
            raise item[1]
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def copy_tokenizer(name: str, out: Path, revision: str | None = None) -> None:
    """Copies a tokenizer's files from a folder or the Hub as they are: saved anew, they would have another hash."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    out.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:
        if Path(name).is_dir():
            path = Path(name) / file
        else:
            try:
                path = Path(hf_hub_download(name, file, revision=revision))
            except EntryNotFoundError:
                path = Path(file)
        if not path.exists() and file == "tokenizer.json":
            raise InputError(f"{name} has no tokenizer.json: choose a tokenizer that was saved in the fast format")
        if file == "tokenizer.json" and (out / file).exists() and sha256_of(path) != sha256_of(out / file):
            raise InputError(f"{out.parent} already holds the tokens of another tokenizer than {name}: choose another --out")
        if path.exists() and path.resolve() != (out / file).resolve():
            shutil.copyfile(path, out / (file + ".tmp"))
            os.replace(out / (file + ".tmp"), out / file)


def load_tokenizer(directory: Path, name: str, max_vocab_size: int = MAX_VOCAB_SIZE):
    """The fast tokenizer in a folder, set to take special tokens in a text for plain text, and its manifest entry."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if len(tokenizer) > max_vocab_size:
        raise InputError(f"{name} has a vocabulary of {len(tokenizer):,} entries: uint16 shards hold at most {max_vocab_size:,}")
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("cls", "sep", "pad", "mask", "unk")}
    if missing := [kind for kind, token_id in ids.items() if token_id is None and kind != "unk"]:
        raise InputError(f"{name} has no {', '.join(missing)} token: choose one that has, or run `python data/train_tokenizer.py`")
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True  # a "[MASK]" that somebody wrote is six characters
    if set(fast.encode(" ".join(tokenizer.all_special_tokens), add_special_tokens=False).ids) & {ids["cls"], ids["sep"], ids["mask"]}:
        raise InputError(f"{name} turns the text '[MASK]' into a special token even where told not to: choose another tokenizer")
    entry = {"name": name, "sha256": sha256_of(directory / "tokenizer.json"), "vocab_size": len(tokenizer), **ids}
    return fast, entry


def encode(fast, batches):
    for texts, position in batches:
        yield texts, fast.encode_batch_fast(texts, add_special_tokens=False), position


# ---------------------------------------------------------------------------------------------------------------------
# The shards


class ShardWriter:
    """Collects the documents of each split and writes a shard whenever the next document would not fit."""

    def __init__(self, out: Path, prefix: str, shard_size: int, cls: int, sep: int, part: int = 0, parts: int = 1):
        self.out, self.prefix, self.shard_size, self.cls, self.sep, self.part, self.parts = out, prefix, shard_size, cls, sep, part, parts
        self.shards, self.pending, self.waiting = {}, {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)

    def add(self, split: str, ids: list[int]) -> None:
        document = np.empty(len(ids) + 2, dtype="<u2")
        document[0], document[1:-1], document[-1] = self.cls, ids, self.sep
        if self.waiting[split] and self.waiting[split] + len(document) > self.shard_size:
            self.flush(split)
        self.pending[split].append(document)
        self.waiting[split] += len(document)

    def flush(self, split: str) -> None:
        if not self.pending[split]:
            return
        index = self.part + self.parts * sum(entry["split"] == split for entry in self.shards.values())
        path = self.out / f"{self.prefix}_{split}_{index:06d}.bin"
        tokens = np.concatenate(self.pending[split])
        write_shard(path, tokens)
        self.shards[path.name] = {"split": split, "tokens": len(tokens), "documents": int((tokens == self.cls).sum()),
                                  "sha256": sha256_of(path)}
        self.pending[split], self.waiting[split] = [], 0

    def save(self, path: Path, settings: dict, position: list) -> None:
        """The state to resume from. Shards written after it are written again, with the same bytes."""
        state = json.dumps({"settings": settings, "shards": self.shards, "position": position})
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, state=state, **{s: np.concatenate(self.pending[s] or [np.empty(0, "<u2")]) for s in SPLITS})
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path, settings: dict) -> list:
        saved = np.load(path)
        state = json.loads(str(saved["state"]))
        check_settings(path, state["settings"], settings)
        self.shards = state["shards"]
        for split in SPLITS:
            self.pending[split], self.waiting[split] = [saved[split]] if len(saved[split]) else [], len(saved[split])
        return state["position"]


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        raise InputError(f"{path} was made with another {', '.join(different)}: choose another --out, or delete that folder first")


def pack(encoded, writer: ShardWriter, state_path: Path, settings: dict, fractions: tuple, max_tokens: int | None, size: float) -> None:
    tokens = sum(entry["tokens"] for entry in writer.shards.values()) + sum(writer.waiting.values())
    with tqdm(total=max_tokens, initial=tokens, unit="tok", unit_scale=True, desc="packing", mininterval=1) as bar:
        for texts, encodings, position in encoded:
            shards_before, tokens_before = len(writer.shards), tokens
            for text, encoding in zip(texts, encodings):
                ids = encoding.ids
                if max_tokens is not None and tokens + len(ids) + 2 > max_tokens:
                    return
                writer.add(split_of(text, *fractions), ids)
                tokens += len(ids) + 2
            if len(writer.shards) > shards_before:
                writer.save(state_path, settings, position)
            read = sum(lane["characters"] for lane in position)
            if max_tokens is None and size > read > 0:
                bar.total = int(tokens * size / read)
            bar.update(tokens - tokens_before)


def write_json(path: Path, content: dict) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def merge_parts(out: Path, parts: int) -> bool:
    """Writes manifest.json once the manifests of all parts are there."""
    paths = [out / f"manifest_part_{part}of{parts}.json" for part in range(parts)]
    if not all(path.exists() for path in paths):
        return False
    manifests = [json.loads(path.read_text()) for path in paths]
    for path, manifest in zip(paths, manifests):
        check_settings(path, manifest, {key: manifests[0][key] for key in ("tokenizer", "source", "split_rule")})
    shards = {name: entry for manifest in manifests for name, entry in manifest["shards"].items()}
    merged = {**manifests[0], "shards": dict(sorted(shards.items()))}
    write_manifest(out, merged)
    read_manifest(out)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    parser.add_argument("--tokenizer", default="answerdotai/ModernBERT-base", help="Hub id or folder of the tokenizer")
    parser.add_argument("--out", type=Path, default=Path("data/fineweb_edu"), help="folder for the shards, the manifest and the tokenizer")
    parser.add_argument("--prefix", help="first part of the shards' names (fwedu for fineweb-edu, otherwise text)")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens in a shard, at most (one longer document excepted)")
    parser.add_argument("--max_tokens", type=int, help="stop at this many tokens, all splits and parts together (none: all of the text)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do part I of N (I from 0) of the work")
    args = parser.parse_args()
    try:
        part, parts = (int(number) for number in args.shard.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 0 <= part < parts:
        raise InputError(f"--shard {args.shard} is not I/N with I from 0 to N - 1, such as 0/4")

    tokenizer_name = Path(args.tokenizer).resolve().name if Path(args.tokenizer).is_dir() else args.tokenizer
    copy_tokenizer(args.tokenizer, args.out / "tokenizer")
    fast, tokenizer = load_tokenizer(args.out / "tokenizer", tokenizer_name)
    stream, sizes, source = open_source(args)
    fractions = (args.valid_fraction, args.test_fraction)
    settings = {
        "format": 1, "tokenizer": tokenizer, "source": {**source, "shard_size": args.shard_size, "max_tokens": args.max_tokens},
        "split_rule": "blake2b(text) / 2^64: valid below {}, then test up to {} more, the rest train".format(*fractions)}
    name = "manifest.json" if parts == 1 else f"manifest_part_{part}of{parts}.json"

    if (args.out / name).exists():
        check_settings(args.out / name, json.loads((args.out / name).read_text()), settings)
        print(f"{args.out / name}: done already")
    else:
        prefix = args.prefix or ("fwedu" if source.get("dataset") == FINEWEB_EDU else "text")
        writer = ShardWriter(args.out, prefix, args.shard_size, tokenizer["cls"], tokenizer["sep"], part, parts)
        state_path = args.out / f"resume_{part}of{parts}.npz"
        position = writer.restore(state_path, settings) if state_path.exists() else None
        texts = in_background(read_texts(stream, sizes, args.text_field, part, parts, position))
        max_tokens = None if args.max_tokens is None else args.max_tokens // parts
        with contextlib.closing(in_background(encode(fast, texts))) as encoded:
            pack(encoded, writer, state_path, settings, fractions, max_tokens, sum(sizes) / parts)
        for split in SPLITS:
            writer.flush(split)
        write_json(args.out / name, {**settings, "shards": dict(sorted(writer.shards.items()))})
        state_path.unlink(missing_ok=True)
    if parts > 1 and not merge_parts(args.out, parts):
        print(f"{args.out}: manifest.json follows when all {parts} parts are here")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
