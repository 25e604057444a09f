"""Fuzz: whatever a file holds, it is used or refused in one sentence, and each token of text is shown once an epoch.

A small share of the cases by default; `FUZZ_CASES=2000 python -m pytest tests/test_fuzz.py` tries many.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_finetuner import WORDS, make_tokenizer

import dataloading
from conftest import ROOT, SPECIALS
from data.tasks import read_data
from dataloading import HEADER_BYTES, InputError, Loader, RowStream, read_manifest, sha256_of, write_shard
from finetuner import DataConfig as FinetuneData
from model import KBERTConfig
from records.log import read_log, split_code, with_header
from records.submit import submit
from records.verify import MALFORMED, check_run, verify
from trainer import PRESETS, DataConfig, TrainConfig, make_parser, parse_flags

SHARD = "test_train_000000.bin"
CASES = int(os.environ.get("FUZZ_CASES", 100))

HYPOTHESIS = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with up to three places overwritten, inserted or cut out."""
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        content = content[:at] + draw(st.binary(max_size=12)) + content[at + length :]
    return content


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Of all values within JSON, from the inside out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, below in inner for found in places(below, (*path, key))] + [path] * bool(path)


@st.composite
def altered(draw, value: object) -> object:
    """JSON with one value in it replaced by any other."""
    *way, last = draw(st.sampled_from(places(value)))
    functools.reduce(lambda within, key: within[key], way, value)[last] = draw(JSON)
    return value


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """A file of some kilobytes warrants no more, whatever numbers stand in it."""
    tracemalloc.start()
    try:
        yield
    finally:  # where the file is refused, too
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 32e6


@little_memory()
def use(data: Path) -> None:
    """What a run does with its data before it trains, and a few rows; damage must be named."""
    try:
        manifest = read_manifest(data)
        dataloading.data_hash(manifest)
        dataloading.unigram_surprise([data / SHARD], manifest["tokenizer"])
        for split in ("train", "valid"):
            rows = iter(Loader(data, manifest, split, 256, 100, seed=1))
            for _ in range(3):
                next(rows)
            rows.close()
    except InputError:
        pass


def copied_once(tmp_path_factory, corpus: Path, name: str) -> Path:
    """A folder that all cases of a test share."""
    data = tmp_path_factory.getbasetemp() / name
    if not data.exists():
        shutil.copytree(corpus, data)
    return data


@HYPOTHESIS
@given(st.data())
def test_any_manifest_is_used_or_refused(tmp_path_factory, corpus, draw):
    data = copied_once(tmp_path_factory, corpus, "fuzzed")
    content = (corpus / "manifest.json").read_bytes()
    if draw.draw(st.booleans()):
        content = draw.draw(damaged(content))
    else:
        content = json.dumps(draw.draw(altered(json.loads(content)))).encode()
    (data / "manifest.json").write_bytes(content)
    use(data)


@HYPOTHESIS
@given(st.data())
def test_any_shard_is_used_or_refused(tmp_path_factory, corpus, draw):
    data = copied_once(tmp_path_factory, corpus, "fuzzed_shard")
    path, verified = data / SHARD, draw.draw(st.booleans())
    path.write_bytes(draw.draw(damaged((corpus / SHARD).read_bytes())))
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    if not verified:  # so that what is wrong within is met, too
        manifest["shards"][SHARD] |= {"sha256": sha256_of(path), "tokens": (path.stat().st_size - HEADER_BYTES) // 2}
    (data / "manifest.json").write_text(json.dumps(manifest))
    use(data)


@HYPOTHESIS
@given(st.data())
def test_any_log_is_read_or_refused(tmp_path_factory, finished, draw):
    path, text = tmp_path_factory.getbasetemp() / "fuzzed.txt", (finished / "log.txt").read_bytes()
    head, tail = text.split(b"=== code\n")[0], text.split(b"=== run\n")[1]
    path.write_bytes(draw.draw(damaged(head + b"=== code\n" + with_header("a.py", "a\nb\n").encode() + b"\n" + tail)))
    with little_memory():
        try:
            log = read_log(path)
        except InputError:
            return
        with contextlib.suppress(*MALFORMED):  # which verify() turns into a line
            list(check_run(log))


@pytest.fixture(scope="module")
def parser():
    made = make_parser("", {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig})
    made.add_argument("--preset", choices=list(PRESETS), default="base")
    return made


@settings(HYPOTHESIS, max_examples=CASES // 5)  # the parser takes its time
@given(st.data())
def test_any_configuration_is_taken_or_refused(tmp_path_factory, finished, parser, draw):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(draw.draw(damaged((finished / "config.yaml").read_bytes())))
    try:
        with little_memory():
            parse_flags(parser, ["--config", str(path)], {"preset": PRESETS})
    except SystemExit as end:
        assert end.code == 2


# --- records

SECTIONS = ("config", "environment", "data", "result")


@st.composite
def altered_log(draw, content: bytes) -> bytes:
    """Damaged somewhere outside of its code, or with one value in its JSON replaced."""
    text, code = split_code(content.decode())
    if draw(st.booleans()):
        return draw(damaged(text.encode()))
    start = text.index(f"=== {draw(st.sampled_from(SECTIONS))}\n") + 4
    start = text.index("\n", start) + 1
    end = text.index("\n", start)
    return (text[:start] + json.dumps(draw(altered(json.loads(text[start:end])))) + text[end:]).encode()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """records/ with two of the project's own, the second in hand."""
    root = tmp_path_factory.mktemp("archive") / "records"
    for name in ("small-steps", "two-layers"):
        (source,) = (ROOT / "records" / "sample-cpu").glob(f"*_{name}")
        shutil.copytree(source, root / "sample-cpu" / source.name)
    shutil.copy(ROOT / "records" / "tracks.json", root)
    return root


@HYPOTHESIS
@given(st.data())
def test_any_record_is_verified_or_refused(archive, draw):
    record = (
        archive / "sample-cpu" / draw.draw(st.sampled_from(sorted(p.name for p in (archive / "sample-cpu").iterdir())))
    )
    path = record / draw.draw(st.sampled_from(["record.json", "logs/1.txt", "logs/2.txt"]))
    before = path.read_bytes()
    if path.suffix == ".txt":
        content = draw.draw(altered_log(before))
    elif draw.draw(st.booleans()):
        content = draw.draw(damaged(before))
    else:
        content = json.dumps(draw.draw(altered(json.loads(before)))).encode()
    try:
        path.write_bytes(content)
        with little_memory():
            assert all(isinstance(said, str) for said in verify(max((archive / "sample-cpu").iterdir())))
    finally:
        path.write_bytes(before)


@HYPOTHESIS
@given(st.data())
def test_any_runs_become_a_record_or_are_refused(archive, tmp_path_factory, draw):
    root = tmp_path_factory.mktemp("submitted")
    shutil.copy(archive / "tracks.json", root)
    old, new = sorted((archive / "sample-cpu").iterdir())
    if draw.draw(st.booleans()):
        shutil.copytree(old, root / "sample-cpu" / old.name)
    logs = sorted((new / "logs").iterdir())
    damaged_one = draw.draw(st.integers(0, len(logs) - 1))
    path = root / "log.txt"
    path.write_bytes(draw.draw(altered_log(logs[damaged_one].read_bytes())))
    logs[damaged_one] = path
    said = {"track": "sample-cpu", "name": "any", "contributors": ["a"], "what": "A test.", "date": "2026-11-22"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("records.submit.draw_runs", lambda out, *_: out.touch())
        try:
            submit(root, logs, said)
        except InputError:
            pass
    assert not list(root.glob("*/*.tmp"))


# --- tokens


def text_of(tokens: list[int]) -> list[int]:
    """Places of what is neither a [CLS] nor the [SEP] that ends a document."""
    ends = [i for i in range(len(tokens)) if i + 1 == len(tokens) or tokens[i + 1] == SPECIALS["cls"]]
    left_out = {i for i in ends if tokens[i] == SPECIALS["sep"]}
    return [i for i, token in enumerate(tokens) if token != SPECIALS["cls"] and i not in left_out]


@HYPOTHESIS
@given(st.data())
def test_each_token_of_text_comes_once_an_epoch(tmp_path_factory, draw):
    token = st.sampled_from([0, 0, 1, 1, 2, 3, 4, *range(5, 64)])
    shards = draw.draw(st.lists(st.lists(token, max_size=120), min_size=1, max_size=3))
    longest, room, ranks = draw.draw(st.tuples(st.integers(3, 40), st.integers(0, 100), st.integers(1, 3)))
    folder = tmp_path_factory.getbasetemp() / "tokens"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.bin" for number in range(len(shards))]
    for path, tokens in zip(paths, shards):
        write_shard(path, np.array(tokens, dtype=np.uint16))
    starts = np.cumsum([0, *map(len, shards)]).tolist()
    flat = [token for tokens in shards for token in tokens]
    expected = [start + i for start, tokens in zip(starts, shards) for i in text_of(tokens)]
    specials = {**SPECIALS, "vocab_size": 64}

    entries = {path.name: {"split": "valid", "sha256": sha256_of(path)} for path in paths}
    manifest, how = {"tokenizer": specials, "shards": entries}, (longest + room, longest)
    shown = []
    for rank in range(ranks):
        for row in Loader(folder, manifest, "valid", *how, seed=None, rank=rank, world_size=ranks):
            places = row.offsets[row.text.numpy()].tolist()
            assert [flat[place] for place in places] == row.input_ids[row.text].tolist()
            shown += places
    assert sorted(shown) == expected

    stream, shown = RowStream(paths, specials, *how, seed=1), []
    while expected and (row := stream.next_row()) and stream.epoch == 0:
        assert sum(length + 2 for _, _, length in row) <= longest + room
        shown += [starts[shard] + start + i for shard, start, length in row for i in range(length)]
    assert sorted(shown) == expected


# --- tables for the finetuner

ANY = st.none() | st.text(max_size=20) | st.integers(-3, 3) | st.floats() | st.booleans() | st.just([1, 2])
LABELS = st.sampled_from([ANY, st.integers(0, 2), st.sampled_from(["a", "b", ""]), st.floats(0, 1) | st.none()])
WRITERS = {
    "csv": lambda table: table.to_csv(index=False).encode(),
    "tsv": lambda table: table.to_csv(index=False, sep="\t").encode(),
    "json": lambda table: json.dumps(table.to_dict("records")).encode(),
    "jsonl": lambda table: "".join(json.dumps(row) + "\n" for row in table.to_dict("records")).encode(),
    "parquet": lambda table: table.astype({"text": str, "label": str}).to_parquet(),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `datasets` keeps what it has read: emptied after each case."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@settings(HYPOTHESIS, max_examples=CASES // 5)  # reading one takes its time
@given(st.data())
def test_any_table_is_read_or_refused(cache, draw):
    label, tokenizer = draw.draw(LABELS), make_tokenizer(WORDS)
    rows = draw.draw(st.lists(st.fixed_dictionaries({"text": ANY, "label": label}), max_size=12))
    ending, write = draw.draw(st.sampled_from(sorted(WRITERS.items())))
    content = write(pd.DataFrame(rows, columns=["text", "label"], dtype=object))
    if draw.draw(st.booleans()):
        content = draw.draw(damaged(content))
    path = cache / f"table.{ending}"
    path.write_bytes(content)
    try:
        with little_memory():
            data = read_data("custom", tokenizer, 32, FinetuneData(dataset=str(path)))
        assert data.splits["train"].known.all() and data.labelled
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(cache)
        cache.mkdir()
