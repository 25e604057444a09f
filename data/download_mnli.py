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
from data.download_fineweb_edu import download, list_shards
from dataloading import LABEL_END, InputError, run_script

REPO = "lapp0/packed_glue_mnli"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/mnli"), help="folder for shards, manifest and tokenizer")
    parser.add_argument("--threads", type=int, default=4, help="files fetched at the same time")
    args = parser.parse_args()
    revision, found = list_shards(REPO, r"mnli_(train|validation_matched|validation_mismatched)_(\d{6})\.bin")
    if missing := {"train", "validation_matched"} - {split for split, _ in found.values()}:
        raise InputError(f"{REPO} has no shard of {', '.join(sorted(missing))}")
    download(REPO, revision, found, args.out, args.threads, mark=LABEL_END)


if __name__ == "__main__":
    run_script(main)
