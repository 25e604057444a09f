"""Shards -> documents -> windows -> packed rows -> device. Knows nothing of the model.

    shard      the .bin of llm.c and modded-nanogpt: 256 int32 of header (20240520, 1, number of tokens), then uint16 tokens
    document   [CLS] tokens ... [SEP], contiguous in a shard
    window     a document, or a piece of one that is longer than `max_length`, with a [CLS] and a [SEP] of its own
    row        what one forward takes: whole windows side by side, `row_tokens` in all, padding only at the end

The sequence of rows is a function of (seed, data) alone; rank r of W takes rows r, r + W, r + 2W, ... of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Files: shards and the manifest beside them

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB_SIZE = 2**16  # tokens are stored as uint16
SPECIAL_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, where, and the command that mends it."""


def read_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard: [number of tokens] uint16. Raises InputError when magic, version or size are wrong."""
    size = path.stat().st_size if path.exists() else 0
    if size < HEADER_BYTES:
        raise InputError(f"{path} is missing or shorter than a shard's header: build or download it again")
    magic, version, num_tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(f"{path} is not a token shard (magic {magic}, version {version}): build or download it again")
    if size != HEADER_BYTES + 2 * num_tokens:
        raise InputError(f"{path} is truncated ({size:,} bytes, its header asks for {HEADER_BYTES + 2 * num_tokens:,}): "
                         "delete it and build or download it again")
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


def read_manifest(directory: Path) -> dict:
    """The manifest of a folder of shards, checked against the files it names.

    {"format": 1,
     "tokenizer": {"name", "sha256" (of tokenizer/tokenizer.json), "vocab_size", "cls", "sep", "pad", "mask", "unk"},
     "source": {...}, "split_rule": "...",
     "shards": {file name: {"split": "train" | "valid" | "test", "tokens", "documents", "sha256"}}}
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise InputError(f"no manifest.json in {directory}: run `python data/download_fineweb_edu.py --out {directory}`, "
                         f"or pack your own text with `python data/pack_fineweb_edu.py --out {directory} ...`")
    try:
        manifest = json.loads(path.read_text())
        shards, vocab_size = manifest["shards"], manifest["tokenizer"]["vocab_size"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a manifest ({error!r}): delete it and build the data again") from error
    if vocab_size > MAX_VOCAB_SIZE:
        raise InputError(f"{path}: a vocabulary of {vocab_size:,} does not fit in uint16 shards: use one of at most {MAX_VOCAB_SIZE:,}")
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    if tokenizer.exists() and sha256_of(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise InputError(f"{tokenizer} is not the tokenizer that {path} names: pack the text again with the tokenizer you want")
    for name, entry in shards.items():
        if len(read_shard(directory / name)) != entry["tokens"]:
            raise InputError(f"{directory / name} does not have the {entry['tokens']:,} tokens that manifest.json names: build or download it again")
    return manifest


def write_manifest(directory: Path, manifest: dict) -> None:
    temporary = directory / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, directory / "manifest.json")
