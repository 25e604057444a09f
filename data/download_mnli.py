"""Downloads packed MNLI (ModernBERT's tokens): each document is `[CLS] label 65535 premise [SEP] hypothesis [SEP]`.

    python data/download_mnli.py

The splits are "train", "validation_matched" and, where it is published, "validation_mismatched". Run it again after an
interruption: what is there and whole stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download_fineweb_edu import TOKENIZER, download_shards, list_shards, write_download_manifest
from data.train_tokenizer import bring_tokenizer
from dataloading import LABEL_END, InputError, run_script

REPO = "lapp0/packed_glue_mnli"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/mnli"), help="folder for shards, manifest and tokenizer")
    parser.add_argument("--threads", type=int, default=4, help="files fetched at the same time")
    args = parser.parse_args()
    revision, found = list_shards(REPO, r"mnli_(train|validation_matched|validation_mismatched)_(\d{6})\.bin")
    splits = {name: split for name, (split, _) in found.items()}
    if missing := {"train", "validation_matched"} - set(splits.values()):
        raise InputError(f"{REPO} has no shard of {', '.join(sorted(missing))}")
    download_shards(REPO, revision, {name: remote for name, (_, remote) in found.items()}, args.out, args.threads)
    _, tokenizer = bring_tokenizer(TOKENIZER, args.out)
    source = {"dataset": REPO, "revision": revision}
    write_download_manifest(args.out, source, splits, tokenizer, LABEL_END)


if __name__ == "__main__":
    run_script(main)
