"""Builds a sample to train and finetune on with no network: the English in the documentation strings of Python and of
some packages that are installed here, a tokenizer trained on it, and a labelled pair task made from it.

    python data/make_sample.py
    python data/make_sample.py --vocab_size 16384 --out data/sample_16k

Beside the shards, pairs/{train,validation,test}.jsonl asks: does this description (`text_pair`) belong to this
summary (`text`)? Label 1: both come from one documentation string; label 0: the description is another package's.
Every summary and every description is used once, so that none gives its label away by turning up twice.
The same environment gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import gc
import inspect
import json
import multiprocessing
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.pack_fineweb_edu import SPLITS, ShardWriter
from data.train_tokenizer import bring_tokenizer, describe_split, digest_of, split_of, train_tokenizer
from dataloading import data_hash, read_json, run_script, usable_cores, write_json

# Not requirements.txt, which may change: the sample of records must not, and it is the documentation of these packages.
PACKAGES = ["torch", "numpy", "huggingface-hub", "datasets", "transformers", "tqdm"]
PACKAGES += ["scikit-learn", "scipy", "matplotlib", "pytest"]
MIN_CHARACTERS = 150
SPLIT_FRACTIONS = (0.05, 0.05)  # a small corpus: 1% would be too little to tell two runs apart
PAIR_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
PROSE = re.compile(r"[A-Z][^\n]*(?:\n[A-Za-z][^\n]*)*\Z")  # starts like a sentence, no line indented or a list item
SECTION = re.compile(r"(?:^|\n)(?:[-=~^]{3,}|\S.{0,40}:$|:\w+|\.\. |@\w+)", re.MULTILINE)
LONGEST_DESCRIPTION = 240  # characters of a pair's second text: a laptop should see thousands of pairs in a minute


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def required_packages() -> dict[str, str]:
    """Name and version of Python, of every installed package in PACKAGES, and of those that these ask for."""
    waiting, found = list(PACKAGES), {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", waiting.pop())[0]).lower()
        if re.match(r"triton$|cuda-|nvidia-", name):  # which torch asks for where it is built for GPUs
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a requirement of other platforms
            continue
        if name not in found:
            found[name] = package.version
            waiting += [line for line in package.requires or [] if "extra ==" not in line]
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def source_files(package: str) -> list[str]:
    if package == "python":
        library = Path(sysconfig.get_path("stdlib"))
        paths = [(path.relative_to(library), path) for path in library.rglob("*.py")]
    else:
        paths = [(Path(file), Path(file.locate())) for file in metadata.files(package) or [] if file.suffix == ".py"]
    unwanted = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    return [str(path) for relative, path in sorted(paths) if not unwanted & set(relative.parts)]


def read_docstrings(path: str) -> list[str]:
    """The documentation strings in a file, in order, without their code examples."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):  # a template, or syntax of another Python
        return []
    docstrings, nodes = [], [tree]
    for node in nodes:  # grows while it is walked: statements only, where ast.walk would visit every expression
        nodes += [child for child in getattr(node, "body", ()) if hasattr(child, "body")]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            paragraphs = [part.rstrip() for part in re.split(r"\n\s*\n", text)]
            text = "\n\n".join(part for part in paragraphs if ">>>" not in part and "```" not in part)
            if len(text) >= MIN_CHARACTERS and sum(map(str.isalpha, text)) >= 0.6 * len(text):
                docstrings.append(text)
    return docstrings


def read_documents(packages: list[str]) -> list[tuple[str, str]]:
    """(package, text), no paragraph of more than a few words twice, names and numbers in it disregarded."""
    files = [(package, path) for package in packages for path in source_files(package)]
    documents, seen = [], set()
    # spawn: the caller may hold threads and locks that a fork would copy; gc: syntax trees are many objects, no cycles
    with multiprocessing.get_context("spawn").Pool(min(usable_cores(), 60), initializer=gc.disable) as pool:
        read = pool.imap(read_docstrings, [path for _, path in files], chunksize=32)
        for (package, _), docstrings in zip(files, tqdm(read, total=len(files), unit="file", desc="reading")):
            for text in docstrings:
                new = []
                for paragraph in text.split("\n\n"):
                    words = " ".join(re.findall(r"\b[a-z]+\b", paragraph))
                    key = words if len(words) >= 40 else paragraph
                    if len(paragraph) < 80 or key not in seen:
                        new.append(paragraph)
                        seen.add(key)
                text = "\n\n".join(new)
                if len(text) >= MIN_CHARACTERS:
                    documents.append((package, text))
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def find_pair(text: str) -> tuple[str, str] | None:
    """(summary, description) if a text begins with a sentence and more prose."""
    prose = []
    for paragraph in text.split("\n\n"):
        if not PROSE.match(paragraph) or SECTION.search(paragraph):
            break
        prose.append(" ".join(paragraph.split()))
    if not prose:
        return None
    summary, *more = re.split(r"(?<=[.!?])\s+(?=[A-Z])", prose[0], maxsplit=1)
    description = " ".join(more + prose[1:])[:LONGEST_DESCRIPTION].rsplit(" ", 1)[0]
    return (summary, description) if 20 <= len(summary) <= 150 and len(description) >= 50 else None


def make_pairs(documents: list[tuple[str, str]]) -> dict[str, list[dict]]:
    groups, used = {split: [] for split in SPLITS}, set()
    for package, text in documents:
        pair = find_pair(text)
        if pair and not used & {part.lower() for part in pair}:
            used |= {part.lower() for part in pair}
            groups[split_of(text, *SPLIT_FRACTIONS)].append((package, *pair))
    pairs = {}
    for split, group in groups.items():
        # Half stay as they are. In the other half each summary gets the next one's description. Both halves then have
        # the same mix of packages and lengths, so that neither text alone tells the label.
        group.sort(key=lambda pair: digest_of(pair[1]))
        chosen, kept = group[::2], group[1::2]
        successors = zip(chosen, chosen[1:] + chosen[:1])
        swapped = [(summary, other) for (mine, summary, _), (theirs, _, other) in successors if mine != theirs]
        number = min(len(kept), len(swapped))
        rows = [(*pair, 1) for _, *pair in kept[:number]] + [(*pair, 0) for pair in swapped[:number]]
        rows.sort(key=lambda row: digest_of(row[0]))
        columns = ("text", "text_pair", "label", "idx")
        pairs[split] = [dict(zip(columns, (*row, idx))) for idx, row in enumerate(rows)]
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The sample


def make_sample(out: Path, vocab_size: int = 8192, packages: list[str] | None = None) -> None:
    """Builds the sample beside `out` and moves it there when it is complete."""
    versions = required_packages()
    documents = read_documents(packages or list(versions))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}_", dir=out.parent) as directory:
        build = Path(directory) / "new"
        (build / "pairs").mkdir(parents=True)
        for split, rows in make_pairs(documents).items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (build / "pairs" / f"{PAIR_SPLITS[split]}.jsonl").write_text(lines, encoding="utf-8")
        texts = sorted((text for _, text in documents), key=digest_of)  # so that packages mix
        splits = [split_of(text, *SPLIT_FRACTIONS) for text in texts]
        print(f"training a tokenizer of {vocab_size:,} entries on {sum(map(len, texts)):,} characters", flush=True)
        trained = Path(directory) / f"documentation-{vocab_size}"
        train_tokenizer([[text for text, split in zip(texts, splits) if split == "train"]], vocab_size, trained)
        backend, tokenizer = bring_tokenizer(str(trained), build)
        writer = ShardWriter(build, "sample", 100_000_000, tokenizer["cls"], tokenizer["sep"])
        for start in tqdm(range(0, len(texts), 2000), unit="batch", desc="packing"):
            batch = slice(start, start + 2000)
            encodings = backend.encode_batch_fast(texts[batch], add_special_tokens=False)
            for text, split, encoding in zip(texts[batch], splits[batch], encodings):
                writer.add(split, encoding.ids, len(text.split()))
        for split in SPLITS:
            writer.flush(split)
        source = {"documentation": {name: versions.get(name) for name in packages or versions}}
        manifest = {"format": 1, "tokenizer": tokenizer, "shards": writer.shards, "source": source}
        write_json(build / "manifest.json", {**manifest, "split_rule": describe_split(*SPLIT_FRACTIONS)})
        if out.exists():
            os.replace(out, Path(directory) / "old")
        os.replace(build, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--out", type=Path, default=ROOT / "data" / "sample", help="folder; an older sample there is replaced")
    flag("--vocab_size", type=int, default=8192, help="entries of the tokenizer, special tokens included")
    args = parser.parse_args()
    make_sample(args.out, args.vocab_size)
    made, tracks = data_hash(read_json(args.out / "manifest.json")), read_json(ROOT / "records" / "tracks.json")
    if named := [name for name, track in tracks.items() if track["data"]["hash"] == made]:
        print(f"{args.out} is the sample of the tracks {', '.join(named)}")
    else:
        print(f"{args.out} is another sample than the records' tracks have (records/README.md)")


if __name__ == "__main__":
    run_script(main)
