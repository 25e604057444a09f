"""Downloads packed fineweb-edu (ModernBERT's tokens, 100M a shard): N shards to train, one to validate, one to test.

    python data/download_fineweb_edu.py --num_chunks 10

Run it again after an interruption, or with a larger number: what is there and whole stays.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.train_tokenizer import bring_tokenizer, reading
from dataloading import HEADER_BYTES, InputError, read_shard, run_script, sha256_of, write_json

REPO = "lapp0/packed_fineweb_edu"
TOKENIZER = "answerdotai/ModernBERT-base"


def list_shards(repo: str, pattern: str) -> tuple[str, dict[str, tuple]]:
    """The commit of a dataset repo, and {name: (split, file on the Hub)} of its shards; the split is group 1."""
    from huggingface_hub import HfApi

    with reading(f"{repo} on the Hugging Face Hub"):
        revision = HfApi().dataset_info(repo).sha
        entries = list(HfApi().list_repo_tree(repo, repo_type="dataset", revision=revision))
    files = {entry.path: entry for entry in entries if hasattr(entry, "size")}  # folders have none
    matches = {name: re.fullmatch(pattern, name) for name in sorted(files)}
    return revision, {name: (match[1], files[name]) for name, match in matches.items() if match}


def check_shard(path: Path, remote) -> str | None:
    """What is wrong with a file, judged by its header, its size and, where the Hub knows it, its hash."""
    try:
        size = HEADER_BYTES + 2 * len(read_shard(path))
    except InputError as error:
        return str(error)
    if size != remote.size:
        return f"{path} has {size:,} bytes, the Hub's file {remote.size:,}"
    if remote.lfs and sha256_of(path) != remote.lfs.sha256:
        return f"{path} is not the Hub's file (its sha256 differs)"
    return None


def download_shards(repo: str, revision: str, remotes: dict, out: Path, threads: int) -> None:
    """Downloads shards in parallel. Raises InputError with the names of those that failed once the others are done."""
    from huggingface_hub import hf_hub_download

    out.mkdir(parents=True, exist_ok=True)
    size = sum(remote.size for remote in remotes.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc=repo, mininterval=1) as total:

        class FilePart(tqdm):
            """Passes the progress of one file on to the one bar."""

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **{**kwargs, "disable": True})
                total.update(kwargs.get("initial") or 0)

            def update(self, n=1):
                total.update(n)

        def fetch(name: str) -> str | None:
            path = out / name
            try:
                if path.exists() and check_shard(path, remotes[name]) is None:
                    total.update(remotes[name].size)
                    return None
                path.unlink(missing_ok=True)
                hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=out, tqdm_class=FilePart)
                fault = check_shard(path, remotes[name])
                if fault:
                    path.unlink()
            except Exception as error:  # one file's failure must not hide another's
                fault = " ".join(str(error).split()) or type(error).__name__
            return fault and f"{name} ({fault})"

        with ThreadPoolExecutor(threads) as pool:
            failed = [fault for fault in pool.map(fetch, remotes) if fault]
    if failed:
        faults = "; ".join(failed)
        raise InputError(f"{len(failed)} of {len(remotes)} files failed, run the same command again: {faults}")


def download(repo: str, revision: str, files: dict, out: Path, threads: int, mark: int | None = None) -> None:
    """files: as list_shards gives them. mark: the token that occurs exactly once in each document; None: [CLS]."""
    download_shards(repo, revision, {name: remote for name, (_, remote) in files.items()}, out, threads)
    _, tokenizer = bring_tokenizer(TOKENIZER, out)
    mark, shards = tokenizer["cls"] if mark is None else mark, {}
    for name, (split, _) in tqdm(files.items(), unit="file", desc="manifest"):
        tokens = read_shard(out / name)
        documents = sum(int(np.count_nonzero(tokens[i : i + 2**24] == mark)) for i in range(0, len(tokens), 2**24))
        shards[name] = {"split": split, "tokens": len(tokens), "documents": documents, "sha256": sha256_of(out / name)}
    source = {"dataset": repo, "revision": revision}
    manifest = {"format": 1, "tokenizer": tokenizer, "source": source, "split_rule": "as published", "shards": shards}
    write_json(out / "manifest.json", manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--num_chunks", type=int, required=True, help="training shards, of about 100M tokens and 200 MB each")
    flag("--out", type=Path, default=Path("data/fineweb_edu"), help="folder for shards, manifest and tokenizer")
    flag("--threads", type=int, default=8, help="files fetched at the same time")
    args = parser.parse_args()
    revision, found = list_shards(REPO, r"fwedu_(train|valid|test)_(\d{6})\.bin")
    train = [name for name, (split, _) in found.items() if split == "train"]
    if not 1 <= args.num_chunks <= len(train):
        most = f"{len(train)}, the training shards of {REPO}"
        raise InputError(f"--num_chunks {args.num_chunks} is not between 1 and {most}")
    wanted = train[: args.num_chunks] + ["fwedu_valid_000000.bin", "fwedu_test_000000.bin"]
    if missing := [name for name in wanted if name not in found]:
        raise InputError(f"{REPO} has no {', '.join(missing)}")
    download(REPO, revision, {name: found[name] for name in wanted}, args.out, args.threads)


if __name__ == "__main__":
    run_script(main)
