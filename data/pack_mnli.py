"""Packs a labelled set (MNLI by default): each document becomes `[CLS] label 65535 text [SEP] text_pair [SEP]`.

    python data/pack_mnli.py --out data/mnli
    python data/pack_mnli.py --files train=reviews.csv test='held_out/*.csv' --text review --text_pair none \\
        --label stars --prefix reviews --out data/reviews

Labels are the set's own whole numbers; labels that are words are numbered in alphabetical order over all splits and
listed in the manifest. A missing label (-1 in GLUE's test sets) is stored as 65534. One shard a split,
{prefix}_{split}_000000.bin. A label may equal the id of [CLS]: documents are found by their 65535, two tokens after
their start.
"""

from __future__ import annotations

import argparse
import collections
import glob
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.examples import READERS, check_rows, read_rows, suffix_of, texts_of, tidy_labels
from data.train_tokenizer import bring_tokenizer, reading
from dataloading import LABEL_END, NO_LABEL, InputError, run_script, sha256_of, write_json, write_shard


def open_splits(args: argparse.Namespace):
    """{split: labelled rows} and the description for the manifest."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    if not args.files:
        name = args.name or ("mnli" if args.dataset == "nyu-mll/glue" else None)
        with reading(f"{args.dataset} on the Hugging Face Hub"):
            revision = HfApi().dataset_info(args.dataset, revision=args.revision).sha
            splits = load_dataset(args.dataset, name, revision=revision)
        return splits, {"dataset": args.dataset, "name": name, "revision": revision}
    files = collections.defaultdict(list)
    for split, _, pattern in (item.partition("=") for item in args.files):
        files[split] += sorted(map(Path, glob.glob(pattern, recursive=True)))
    if empty := [split for split in files if not files[split]]:
        missing = ", ".join(empty)
        raise InputError(f"no file matches --files {missing}=...: write SPLIT=GLOB, such as train='reviews/*.csv'")
    if unknown := [str(path) for paths in files.values() for path in paths if not suffix_of(path)]:
        raise InputError(f"--files {unknown[0]} is none of {', '.join(READERS)}: convert it, or name another")
    splits = {split: read_rows(paths) for split, paths in files.items()}
    return splits, {"files": {split: [path.name for path in paths] for split, paths in files.items()}}


def number_labels(splits: dict, column: str) -> tuple[dict, list | None]:
    """{split: labels as the shards store them}, and the names of the labels where they have some."""
    raw = tidy_labels({split: rows[column] for split, rows in splits.items()})
    known = {label for labels in raw.values() for label in labels if label is not None}
    named = {tuple(getattr(rows.features[column], "names", ())) for rows in splits.values()}
    if len(named) > 1:
        raise InputError(f"the splits number the classes of column {column!r} differently: write them as words")
    words = sorted(known) if all(isinstance(label, str) for label in known) else None
    names = list(*named) or words
    if not words and not all(isinstance(label, int) and -1 <= label < NO_LABEL for label in known):
        raise InputError(
            f"column {column!r} holds neither words nor whole numbers from 0 to {NO_LABEL - 1}: choose another --label"
        )
    number = {name: i for i, name in enumerate(words)} if words else {label: label for label in known}
    number |= {None: NO_LABEL, -1: NO_LABEL}
    return {split: [number[label] for label in labels] for split, labels in raw.items()}, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, types = parser.add_argument, ", ".join(READERS)
    flag("--dataset", default="nyu-mll/glue", help="labelled set on the Hugging Face Hub, all of its splits")
    flag("--name", help="configuration of --dataset (nyu-mll/glue: mnli unless given)")
    flag("--revision", help="commit, branch or tag of --dataset (its newest commit unless given)")
    flag("--files", nargs="+", metavar="SPLIT=GLOB", help=f"read these files instead, a split's of one type: {types}")
    flag("--text", default="premise", help="column of the text")
    flag("--text_pair", default="hypothesis", help="column of the second text, none for single texts")
    flag("--label", default="label", help="column of the label")
    flag("--tokenizer", default="answerdotai/ModernBERT-base", help="Hub id or folder of the tokenizer")
    flag("--prefix", default="mnli", help="first part of the shards' names")
    flag("--out", type=Path, default=Path("data/mnli"), help="folder for shards, manifest and tokenizer")
    args = parser.parse_args()

    columns = [args.text] if args.text_pair == "none" else [args.text, args.text_pair]
    splits, source = open_splits(args)
    for split, rows in splits.items():
        check_rows(split, rows)
        if missing := set(columns + [args.label]) - set(rows.column_names):
            raise InputError(
                f"{split} has no column {', '.join(sorted(missing))}: choose --text, --text_pair and --label "
                f"out of {', '.join(rows.column_names)}"
            )
    labels, names = number_labels(splits, args.label)
    for split, of_split in labels.items():
        if 0 < (missing := of_split.count(NO_LABEL)) < len(of_split):
            print(f"note: {missing:,} of {len(of_split):,} rows of {split} have no label (none, or -1)")
    backend, tokenizer = bring_tokenizer(args.tokenizer, args.out, max_vocab_size=NO_LABEL)

    shards = {}
    for split, rows in splits.items():
        tokens, sep = [], [tokenizer["sep"]]
        for start in tqdm(range(0, len(rows), 1000), unit="batch", desc=split):
            texts = texts_of(rows[start : start + 1000], columns)
            encoded = [backend.encode_batch_fast(column, add_special_tokens=False) for column in texts]
            for i, parts in enumerate(zip(*encoded), start):
                tokens += [tokenizer["cls"], labels[split][i], LABEL_END]
                tokens += [token for part in parts for token in part.ids + sep]
        path = args.out / f"{args.prefix}_{split}_000000.bin"
        write_shard(path, np.array(tokens, dtype="<u2"))
        shards[path.name] = {"split": split, "tokens": len(tokens), "documents": len(rows), "sha256": sha256_of(path)}
    source |= {"columns": columns, "labels": names}
    manifest = {"format": 1, "tokenizer": tokenizer, "source": source, "split_rule": "as published", "shards": shards}
    write_json(args.out / "manifest.json", manifest)


if __name__ == "__main__":
    run_script(main)
