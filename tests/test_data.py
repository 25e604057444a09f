"""data/: packing, tokenizers, the embedded sample, downloads, labelled sets. Each script runs as its user runs it."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import make_sample
from data.train_tokenizer import add_source_flags, join, open_source, read_texts, split_of
from dataloading import read_manifest, read_shard, write_shard
from hub_stand_in import Hub

ROOT = Path(__file__).resolve().parents[1]
MODERNBERT = ROOT.parent / "shared" / "data" / "tokenizers" / "modernbert"
WORDS = [line.split()[0] for line in (ROOT / "LICENSE").read_text().splitlines() if line.split()]
SPECIAL_TEXT = "A text may say [MASK] or [CLS][SEP], even [PAD] or <|endoftext|>, and mean it."


def run(script: str, *arguments, env: dict | None = None) -> subprocess.CompletedProcess:
    """A process of its own where the environment matters, otherwise this one: importing the libraries takes seconds."""
    command = [str(ROOT / "data" / script), *map(str, arguments)]
    if env:
        return subprocess.run([sys.executable, *command], env=env, text=True, capture_output=True, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as error:
            return subprocess.CompletedProcess(command, int(error.code is not None), "", str(error.code))
    return subprocess.CompletedProcess(command, 0, "", "")


def succeed(script: str, *arguments, env: dict | None = None) -> None:
    result = run(script, *arguments, env=env)
    assert result.returncode == 0, result.stderr


def error_of(script: str, *arguments, env: dict | None = None) -> str:
    """The one sentence that a script ends with when its input cannot be used."""
    result = run(script, *arguments, env=env)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    return last


def make_texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + f" number {seed}.{i}" for i in range(number)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def documents_of(directory: Path, split: str) -> list[list[int]]:
    """The documents of a split, without [CLS] and [SEP], in the order of the shards."""
    manifest = read_manifest(directory)
    cls, sep, documents = manifest["tokenizer"]["cls"], manifest["tokenizer"]["sep"], []
    for name, entry in manifest["shards"].items():
        tokens = read_shard(directory / name)
        starts, ends = np.flatnonzero(tokens == cls), np.flatnonzero(tokens == sep)
        assert len(starts) == len(ends) == entry["documents"]
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == entry["sha256"]
        assert starts[0] == 0 and ends[-1] == len(tokens) - 1 and (starts[1:] == ends[:-1] + 1).all()
        if entry["split"] == split:
            documents += [tokens[start + 1 : end].tolist() for start, end in zip(starts, ends)]
    return documents


def texts_of(directory: Path, split: str) -> list[str]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory / "tokenizer").batch_decode(documents_of(directory, split))


def pack_files(files: Path, tokenizer: Path, out: Path, *more) -> None:
    succeed("pack_fineweb_edu.py", "--files", files, "--tokenizer", tokenizer, "--out", out, *more)


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(3000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(directory / "texts.jsonl", texts)
    succeed("train_tokenizer.py", "--files", source, "--vocab_size", 512, "--out", directory / "t")
    return directory / "t"


@pytest.fixture(scope="module")
def packed(tmp_path_factory, texts, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    source = write_jsonl(directory / "texts.jsonl", [*texts, SPECIAL_TEXT, "", "  \n", texts[0]])
    sizes = ["--shard_size", 20_000, "--valid_fraction", 0.1, "--test_fraction", 0.1]
    pack_files(source, tokenizer, directory / "out", *sizes)
    return directory / "out"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_trained_tokenizer(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert len(loaded) == 512 and loaded.model_max_length == 8192
    assert loaded("the copy [MASK].").input_ids.count(loaded.mask_token_id) == 1
    assert loaded("the copy [MASK]").input_ids == loaded("the copy[MASK]").input_ids  # the mask takes the space with it
    cls, sep = loaded.cls_token_id, loaded.sep_token_id
    first, second = (loaded(text, add_special_tokens=False).input_ids for text in ("this", "that"))
    assert loaded("this").input_ids == [cls, *first, sep]
    assert loaded("this", "that").input_ids == [cls, *first, sep, *second, sep]
    sentence = "Café, naïve: don't touch  the copy ."
    assert loaded.decode(loaded(sentence).input_ids, skip_special_tokens=True) == sentence


def test_vocabulary_too_large(tmp_path, texts):
    source = write_jsonl(tmp_path / "texts.jsonl", texts[:10])
    for vocab_size, message in ((70_000, "65,536"), (60_000, "entries only")):
        arguments = ("--files", source, "--vocab_size", vocab_size, "--out", tmp_path / "t")
        assert message in error_of("train_tokenizer.py", *arguments)


def test_packing_refuses_large_vocabulary(tmp_path, tokenizer, texts):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{i}": 512 + i for i in range(2**16)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    source, out = write_jsonl(tmp_path / "texts.jsonl", texts[:10]), tmp_path / "out"
    assert "66,048" in error_of("pack_fineweb_edu.py", "--files", source, "--tokenizer", tmp_path, "--out", out)
    assert not (tmp_path / "out" / "tokenizer").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def test_text_survives_packing(packed, texts):
    found = [text for split in ("train", "valid", "test") for text in texts_of(packed, split)]
    assert sorted(found) == sorted([*texts, SPECIAL_TEXT, texts[0]])
    manifest = read_manifest(packed)
    assert all(entry["tokens"] <= 20_000 for entry in manifest["shards"].values())
    assert "text_train_000001.bin" in manifest["shards"]


def test_special_tokens_of_modernbert_in_text(tmp_path):
    if not MODERNBERT.exists():
        pytest.skip("needs the ModernBERT tokenizer in ../shared/data")
    pack_files(write_jsonl(tmp_path / "texts.jsonl", [SPECIAL_TEXT]), MODERNBERT, tmp_path / "out")
    entry = read_manifest(tmp_path / "out")["tokenizer"]
    assert [entry[kind] for kind in ("vocab_size", "cls", "sep", "pad", "mask")] == [50368, 50281, 50282, 50283, 50284]
    (document,) = documents_of(tmp_path / "out", "train")
    assert not set(document) & {1, 50279, 50280, 50281, 50282, 50283, 50284}


def test_splits(packed, texts):
    train, valid, test = (set(texts_of(packed, split)) for split in ("train", "valid", "test"))
    assert not (train & valid or train & test or valid & test)
    assert 200 < len(valid) < 400 and 200 < len(test) < 400
    expected = "valid test train valid test valid valid train".split()  # pinned: tracks fix their shards by hash
    assert [split_of(letter, 0.3, 0.3) for letter in "abcdefgh"] == expected


@pytest.fixture(scope="module")
def many_files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    for i in range(4):
        write_jsonl(directory / f"{i}.jsonl", make_texts(2000 * (i + 1), seed=i + 1))
    return directory


@pytest.fixture(scope="module")
def whole(many_files, tokenizer) -> Path:
    pack(many_files, tokenizer, many_files / "whole")
    return many_files / "whole"


def pack_arguments(source: Path, tokenizer: Path, out: Path) -> list:
    sizes = ["--shard_size", 100_000, "--batch_characters", 200_000]
    return ["--files", source / "*.jsonl", "--tokenizer", tokenizer, "--out", out, *sizes]


def pack(source: Path, tokenizer: Path, out: Path, *more) -> None:
    succeed("pack_fineweb_edu.py", *pack_arguments(source, tokenizer, out), *more)


def processes_with(argument: Path) -> list[str]:
    """Their command lines; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_text())
    return [line for line in found if str(argument) in line]


def test_kill_and_resume(tmp_path, many_files, tokenizer, whole):
    command = [sys.executable, ROOT / "data" / "pack_fineweb_edu.py", *pack_arguments(many_files, tokenizer, tmp_path)]
    for shards in (1, 4):  # killed twice, of ten shards
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        while not ((tmp_path / f"text_train_{shards:06d}.bin").exists() and (tmp_path / "resume_0of1.npz").exists()):
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "manifest.json").exists()
        patience = time.monotonic() + 60
        while processes_with(tmp_path):  # its workers notice
            assert time.monotonic() < patience, "a killed packing left processes behind"
            time.sleep(0.05)
    pack(many_files, tokenizer, tmp_path)
    assert shards_of(tmp_path) == shards_of(whole)


def test_done_already_and_other_settings(many_files, tokenizer, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    pack(many_files, tokenizer, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    message = error_of("pack_fineweb_edu.py", *pack_arguments(many_files, tokenizer, whole), "--valid_fraction", 0.2)
    assert "split_rule" in message and "--out" in message


@pytest.mark.parametrize("parts", [2, 3])  # 4 files: 2 parts share them out by file, 3 by document
def test_parts_are_the_whole(tmp_path, many_files, tokenizer, whole, parts):
    for part in range(parts):
        assert not (tmp_path / "manifest.json").exists()
        pack(many_files, tokenizer, tmp_path, "--shard", f"{part}/{parts}")
    for split in ("train", "valid", "test"):
        assert sorted(documents_of(tmp_path, split)) == sorted(documents_of(whole, split))


def test_max_tokens(tmp_path, many_files, tokenizer):
    pack(many_files, tokenizer, tmp_path, "--max_tokens", 150_000)
    assert 149_000 < sum(entry["tokens"] for entry in read_manifest(tmp_path)["shards"].values()) <= 150_000


def test_files_are_mixed(whole):
    first = texts_of(whole, "train")[:2000]
    assert {text.rsplit(" ", 1)[1].split(".")[0] for text in first} == {"1", "2", "3", "4"}


@pytest.mark.parametrize("kind", ["jsonl.xz", "parquet"])
def test_files_of_one_size_end_together_however_they_compress(tmp_path, tokenizer, kind):
    """Or the last shard holds one kind of text alone, and a seed may have a run begin with it."""
    varied = make_texts(6000, seed=1)
    for name, texts in (("plain", [f"{'word ' * 33}number 2.{i}" for i in range(6000)]), ("varied", varied)):
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{name}.{kind}")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (tmp_path / f"{name}.{kind}").write_bytes(lzma.compress(lines.encode()))
    pack_files(tmp_path / f"*.{kind}", tokenizer, tmp_path / "out")
    packed = texts_of(tmp_path / "out", "train")
    for fifth in range(5):
        part = packed[len(packed) * fifth // 5 : len(packed) * (fifth + 1) // 5]
        assert 0.3 < sum(text.startswith("word word") for text in part) / len(part) < 0.7


# --- an utterance a line


@pytest.fixture(scope="module")
def utterances(tmp_path_factory) -> Path:
    """Six files as BabyLM has them; each line says where it stands."""
    directory, draw = tmp_path_factory.mktemp("utterances"), random.Random(0)
    for number, count in enumerate((300, 50, 900, 10, 400, 1700)):
        lines = [f"{' '.join(draw.choices(WORDS, k=draw.randint(1, 20)))} {number}.{i}" for i in range(count)]
        lines.insert(5, "  ")  # a blank one is no utterance
        (directory / f"{number}.train.txt").write_text("".join(line + "\n" for line in lines))
    return directory


def joining(utterances: Path, words: int) -> list:
    return ["--files", utterances / "*.train.txt", "--join_lines", words]


def test_lines_are_joined_in_order_and_never_across_files(tmp_path, tokenizer, utterances):
    def arguments(words: int) -> list:
        sizes = ["--valid_fraction", 0.1, "--test_fraction", 0.1]
        return [*joining(utterances, words), "--tokenizer", tokenizer, "--out", tmp_path, *sizes]

    succeed("pack_fineweb_edu.py", *arguments(100))
    shards, files = read_manifest(tmp_path)["shards"].values(), {str(number): [] for number in range(6)}
    documents = [text for split in ("train", "valid", "test") for text in texts_of(tmp_path, split)]
    for document in documents:
        places = [line.rsplit(" ", 1)[1].split(".") for line in document.split("\n")]
        assert len({file for file, _ in places}) == 1
        files[places[0][0]].append([int(line) for _, line in places])
    for file in files.values():
        lines = [line for document in sorted(file) for line in document]
        assert lines and lines == list(range(len(lines)))
    sizes = [len(document.split()) for document in documents]
    assert max(sizes) < 100 + 21 and sum(size < 100 for size in sizes) <= 6  # what is left over of each file
    assert sum(entry["words"] for entry in shards) == sum(sizes)
    assert {entry["split"] for entry in shards} == {"train", "valid", "test"}
    assert "another source" in error_of("pack_fineweb_edu.py", *arguments(50))


def test_joining_goes_on_from_any_position(utterances):
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    args = parser.parse_args([*map(str, joining(utterances, 100)), "--batch_characters", "20_000"])

    def read(position=None) -> list:
        stream, sizes, _ = open_source(args)
        return list(read_texts(stream, sizes, args, position=position))

    whole = read()
    assert len(whole) > 5 and all(any(lane["lines"] for lane in position) for _, position in whole[:-1])
    for number, (_, position) in enumerate(whole[:-1], 1):
        rest = read(json.loads(json.dumps(position)))
        assert [texts for texts, _ in rest] == [texts for texts, _ in whole[number:]]


def test_a_line_longer_than_a_document_is_cut():
    numbers = list(map(str, range(25)))
    lines = ["a b", " ".join(numbers), "c"]
    assert join(lines, 10, whole=False) == (
        ["a b\n" + " ".join(numbers[:10]), " ".join(numbers[10:20])],
        [" ".join(numbers[20:]), "c"],
    )


def test_joining_opens_few_files_at_once(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text("".join(f"{number} {line}\n" for line in range(1200)))
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    args = parser.parse_args(["--files", str(tmp_path / "*.txt"), "--join_lines", "100", "--batch_characters", "1"])
    stream, sizes, _ = open_source(args)
    documents, most = [], 0
    for texts, position in read_texts(stream, sizes, args):
        documents += texts
        most = max(most, sum(lane["state"] is not None and not lane["ended"] for lane in position))
    assert most == 16
    lines = sorted(tuple(map(int, line.split())) for document in documents for line in document.split("\n"))
    assert lines == [(number, line) for number in range(40) for line in range(1200)]


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "txt", "txt.gz", "parquet"])
def test_file_types(tmp_path, tokenizer, texts, kind):
    texts, path = texts[:50], tmp_path / f"texts.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        content = "\n\n".join(texts).encode() if kind.startswith("txt") else lines
        compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.get(kind.split(".")[-1], bytes)
        path.write_bytes(compress(content))
    pack_files(path, tokenizer, tmp_path / "out", "--valid_fraction", 0, "--test_fraction", 0)
    assert texts_of(tmp_path / "out", "train") == texts


def test_rows_of_json_lines_need_only_the_text(tmp_path, tokenizer, texts):
    rows = [{"text": text} for text in texts[:20]] + [{"url": "a", "text": texts[20]}, {"text": None}, {"url": 1}]
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": [1], "text": texts[21]}))
    pack_files(tmp_path / "*.jsonl", tokenizer, tmp_path / "out", "--valid_fraction", 0, "--test_fraction", 0)
    assert sorted(texts_of(tmp_path / "out", "train")) == sorted(texts[:22])


def test_bad_input(tmp_path, tokenizer, texts):
    source = write_jsonl(tmp_path / "texts.jsonl", texts[:10])

    def message(*arguments):
        return error_of("pack_fineweb_edu.py", "--tokenizer", tokenizer, "--out", tmp_path / "out", *arguments)

    assert "no file matches" in message("--files", tmp_path / "*.parquet")
    missing = message("--files", source, "--text_field", "body")
    assert "no column 'body'" in missing and "id, text" in missing
    assert "'id' holds int" in message("--files", source, "--text_field", "id")
    assert "--shard" in message("--files", source, "--shard", "4/4")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    assert "cannot read" in message("--files", tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "cannot read the data's first row: there is none" in message("--files", tmp_path / "empty.jsonl")
    shares = "--valid_fraction", "0.6", "--test_fraction", "0.5"
    assert f"{' '.join(shares[:2])} and {' '.join(shares[2:])} are no shares" in message("--files", source, *shares)
    assert "--join_lines -5" in message("--files", source, "--join_lines", "-5")
    (tmp_path / "a.txt").write_text("a tale of two cities\n" * 9_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(("un été\n" * 9_000).encode("latin1")))
    assert "b.txt.gz is not UTF-8" in message("--files", tmp_path / "a.txt", tmp_path / "b.txt.gz")
    (tmp_path / "bnc.train").write_text("a tale\n")
    assert "bnc.train does not end in any of" in message("--files", tmp_path / "a.txt", tmp_path / "bnc.train")
    assert "all of one type, found .jsonl and .txt" in message("--files", source, tmp_path / "a.txt")
    (tmp_path / "file").write_text("in the way")
    assert "file" in message("--files", source, "--out", tmp_path / "file" / "out")
    assert "tokenizer.json" in message("--files", source, "--tokenizer", tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the administrator may write everywhere")
def test_no_permission(tmp_path, tokenizer, texts):
    source = write_jsonl(tmp_path / "texts.jsonl", texts[:10])
    (tmp_path / "closed").mkdir(mode=0o500)
    out = tmp_path / "closed" / "out"
    assert "closed" in error_of("pack_fineweb_edu.py", "--files", source, "--tokenizer", tokenizer, "--out", out)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "sample"
    make_sample.make_sample(out, vocab_size=1024, packages=["networkx", "huggingface-hub"])
    return out


def test_all_that_the_sample_is_made_of_is_pinned_for_records():
    """Or the text that records were made on would change with the next release of one."""
    lines = (ROOT / "records" / "sample-cpu" / "requirements.txt").read_text().splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if "==" in line}
    packages = set(make_sample.required_packages())
    assert {"python", "numpy", "torch", "pytest"} <= packages and packages - {"python"} <= pinned


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that ties a process to cores")
def test_the_sample_is_read_by_as_many_processes_as_there_are_usable_cores(monkeypatch):
    """In a container or a batch job, the host may have many more."""
    running = []

    def progress(iterable, **_):
        running.append(len(multiprocessing.active_children()))
        return iterable

    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(make_sample, "tqdm", progress)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        assert make_sample.read_documents(["tqdm"])
    finally:
        os.sched_setaffinity(0, allowed)
    assert running == [1]


def pairs_of(directory: Path) -> dict[str, list[dict]]:
    files = {split: directory / "pairs" / f"{split}.jsonl" for split in ("train", "validation", "test")}
    lines = {split: path.read_text(encoding="utf-8").split("\n")[:-1] for split, path in files.items()}
    return {split: [json.loads(line) for line in rows] for split, rows in lines.items()}


def test_sample_is_deterministic(tmp_path, sample):
    make_sample.make_sample(tmp_path / "sample", vocab_size=1024, packages=["networkx", "huggingface-hub"])
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (sample, tmp_path / "sample")
    )
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_sample_splits_do_not_leak(sample):
    paragraphs = {
        split: {part for text in texts_of(sample, split) for part in text.split("\n\n") if len(part) >= 80}
        for split in ("train", "valid", "test")
    }
    assert all(paragraphs.values())
    assert not paragraphs["train"] & (paragraphs["valid"] | paragraphs["test"])
    assert not paragraphs["valid"] & paragraphs["test"]


def test_pairs(sample):
    pairs = pairs_of(sample)
    used = [row[field] for rows in pairs.values() for row in rows for field in ("text", "text_pair")]
    assert len(used) == len(set(used)) > 100
    for split, rows in pairs.items():
        assert [row["idx"] for row in rows] == list(range(len(rows)))
        assert sum(row["label"] for row in rows) * 2 == len(rows) > 0
        texts = texts_of(sample, "valid" if split == "validation" else split)
        documents = "\n".join(" ".join(text.split()) for text in texts)
        assert all(row["text"][:60] in documents for row in rows)  # no pair is of another split's document


# ---------------------------------------------------------------------------------------------------------------------
# Downloads and labelled sets


def shard_bytes(directory: Path, tokens: np.ndarray) -> bytes:
    write_shard(directory / "shard.bin", tokens)
    return (directory / "shard.bin").read_bytes()


@pytest.fixture
def hub(tmp_path, tokenizer):
    tokens = np.full(5000, 300, dtype=np.uint16)
    tokens[::50], tokens[49::50] = 0, 1
    labelled = tokens.copy()
    labelled[1::50], labelled[2::50] = 2, 65535
    with Hub() as hub:
        hub.add("model", "answerdotai/ModernBERT-base", {path.name: path.read_bytes() for path in tokenizer.iterdir()})
        files = {"README.md": b""}
        for i, name in enumerate(("train_000001", "train_000002", "train_000003", "valid_000000", "test_000000"), 1):
            files[f"fwedu_{name}.bin"] = shard_bytes(tmp_path, tokens[: 1000 * i])
        hub.add("dataset", "lapp0/packed_fineweb_edu", files)
        splits = ("train", "validation_matched", "test_matched")
        files = {f"mnli_{split}_000000.bin": shard_bytes(tmp_path, labelled) for split in splits}
        hub.add("dataset", "lapp0/packed_glue_mnli", files)
        yield hub


def test_download(tmp_path, hub):
    out, env = tmp_path / "out", hub.environment(tmp_path / "home")
    hub.cut_next = 1  # a transfer that breaks off is taken up where it ended
    succeed("download_fineweb_edu.py", "--num_chunks", 2, "--out", out, env=env)
    wanted = {f"fwedu_{name}.bin" for name in ("train_000001", "train_000002", "valid_000000", "test_000000")}
    assert {path.name for path in out.glob("*.bin")} == wanted
    shards = read_manifest(out)["shards"]
    assert {name: (entry["split"], entry["documents"]) for name, entry in shards.items()} == {
        "fwedu_train_000001.bin": ("train", 20),
        "fwedu_train_000002.bin": ("train", 40),
        "fwedu_valid_000000.bin": ("valid", 80),
        "fwedu_test_000000.bin": ("test", 100),
    }

    content = (out / "fwedu_train_000002.bin").read_bytes()
    (out / "fwedu_train_000002.bin").write_bytes(content[:1500])
    hub.requests.clear()
    succeed("download_fineweb_edu.py", "--num_chunks", 2, "--out", out, env=env)
    assert (out / "fwedu_train_000002.bin").read_bytes() == content
    assert {request.rsplit("/", 1)[1] for request in hub.requests if "fwedu_" in request} == {"fwedu_train_000002.bin"}


def test_download_names_what_failed(tmp_path, hub):
    out, env = tmp_path / "out", hub.environment(tmp_path / "home")

    def message(num_chunks: int) -> str:
        return error_of("download_fineweb_edu.py", "--num_chunks", num_chunks, "--out", out, env=env)

    hub.fail_status, hub.broken = 403, "train_000002"
    hub.change("dataset", "lapp0/packed_fineweb_edu", "main", {"fwedu_train_000003.bin": b"not a shard" * 1000})
    failed = message(3)
    assert "2 of 5 files" in failed and "fwedu_train_000002.bin (" in failed and "not a token shard" in failed
    found = {path.name for path in out.glob("*.*")} - {".cache"}
    assert found == {"fwedu_train_000001.bin", "fwedu_valid_000000.bin", "fwedu_test_000000.bin"}
    assert "between 1 and 3" in message(4)
    hub.broken = ""
    assert "cannot read lapp0" in message(1)


def test_download_mnli(tmp_path, hub):
    succeed("download_mnli.py", "--out", tmp_path / "out", env=hub.environment(tmp_path / "home"))
    shards = read_manifest(tmp_path / "out")["shards"]
    documents = {entry["split"]: entry["documents"] for entry in shards.values()}
    assert documents == {"train": 100, "validation_matched": 100}


def test_pack_from_the_hub(tmp_path, hub, tokenizer, texts):
    hub.add("dataset", "me/texts", {"texts.jsonl": write_jsonl(tmp_path / "texts.jsonl", texts[:100]).read_bytes()})
    arguments = ["--dataset", "me/texts", "--prefix", "mine", "--valid_fraction", 0, "--test_fraction", 0]
    arguments += ["--tokenizer", "answerdotai/ModernBERT-base", "--out", tmp_path / "out"]
    succeed("pack_fineweb_edu.py", *arguments, env=hub.environment(tmp_path / "home"))
    assert texts_of(tmp_path / "out", "train") == texts[:100]
    assert read_manifest(tmp_path / "out")["source"]["revision"] == hub.repos["dataset", "me/texts"]["main"]["sha"]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_labelled_set(tmp_path, tokenizer, kind):
    from transformers import AutoTokenizer

    rows = {"a": ["this copy", "[SEP] or not", "the notice", None], "b": ["that", "this", "be", "not"]}
    rows["label"] = [2, 0, -1, None]
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table(rows), path)
        elif kind == "json":
            path.write_text("".join(json.dumps(dict(zip(rows, row))) + "\n" for row in zip(*rows.values())))
        else:
            cells = [["" if cell is None else str(cell) for cell in row] for row in [rows, *zip(*rows.values())]]
            path.write_text("".join(",".join(row) + "\n" for row in cells))
    files = [f"{split}={tmp_path / split}.{kind}" for split in ("train", "validation")]
    columns, out = ["--text", "a", "--text_pair", "b"], tmp_path / "out"
    offline = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    succeed("pack_mnli.py", "--files", *files, *columns, "--tokenizer", tokenizer, "--out", out, env=offline)
    assert set(read_manifest(tmp_path / "out")["shards"]) == {"mnli_train_000000.bin", "mnli_validation_000000.bin"}
    loaded, expected = AutoTokenizer.from_pretrained(tokenizer), []
    for first, second, label in zip(*rows.values()):
        texts = (first or "", second)
        a, b = (loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts)
        label = 65534 if label in (-1, None) else label
        expected += [loaded.cls_token_id, label, 65535, *a, loaded.sep_token_id]
        expected += [*b, loaded.sep_token_id]
    assert read_shard(tmp_path / "out" / "mnli_train_000000.bin").tolist() == expected
    twice = [f"train={tmp_path / split}.{kind}" for split in ("train", "validation")]
    succeed("pack_mnli.py", "--files", *twice, *columns, "--tokenizer", tokenizer, "--out", out / "twice", env=offline)
    assert read_shard(out / "twice" / "mnli_train_000000.bin").tolist() == 2 * expected


def test_labelled_set_of_numbers_by_a_models_tokenizer(tmp_path, tokenizer):
    """Numbers are texts like any other, and a model's folder is a tokenizer's, whose own code is not asked for."""
    model = tmp_path / "model"
    shutil.copytree(tokenizer, model)
    auto_map = {"AutoConfig": "model.KBERTConfig", "AutoModel": "model.KBERTModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "kbert", "auto_map": auto_map}))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.csv").write_text("a,label\n0,0\n17,1\n")
    (tmp_path / "empty.csv").write_text("a,label\n")
    options = ["--text", "a", "--text_pair", "none", "--tokenizer", model, "--out", tmp_path / "out"]
    assert "split train has no rows" in error_of("pack_mnli.py", "--files", f"train={tmp_path}/empty.csv", *options)
    succeed("pack_mnli.py", "--files", f"train={tmp_path}/**/a.csv", *options)
    tokens = read_shard(tmp_path / "out" / "mnli_train_000000.bin").tolist()
    assert tokens.count(65535) == 2 and len(tokens) > 8  # [CLS] label 65535 [SEP] twice, and the numbers
