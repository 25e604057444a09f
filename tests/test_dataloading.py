"""Shards, windows, rows: every token exactly once, for any world size, row size and shard size."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

import dataloading
from conftest import ROOT, SPECIALS, run_python, sentences, write_documents
from dataloading import (
    HEADER_BYTES,
    InputError,
    Loader,
    describe_validation,
    find_windows,
    frozen_mask,
    read_manifest,
    read_shard,
    write_shard,
)

CLS, SEP, PAD = SPECIALS["cls"], SPECIALS["sep"], SPECIALS["pad"]

CORPORA = {
    "several shards": [sentences(1, 120, longest=200), sentences(2, 80), sentences(3, 1)],
    "shards of one document": [sentences(seed, 1) for seed in range(9)],
    "documents longer than a row": [[list(range(5, 60)) * 40], sentences(4, 5)],
    "an empty shard between": [sentences(5, 20), [], sentences(6, 20)],
}


def loader_of(path, split="train", row_tokens=256, max_length=100, seed=7, **keywords) -> Loader:
    return Loader(path, read_manifest(path), split, row_tokens, max_length, seed=seed, **keywords)


def epoch(path, world_size=1, **keywords) -> list[list]:
    """Rows of one epoch, by rank, taken in shuffled order."""

    loaders = [loader_of(path, rank=rank, world_size=world_size, **keywords) for rank in range(world_size)]
    return [list(itertools.takewhile(lambda row: row.state["epoch"] == 0, loader)) for loader in loaders]


def text_tokens(rows) -> Counter:
    """(place in the shards, id) of every token of text."""
    found: Counter = Counter()
    for row in rows:
        text = row.offsets >= 0
        found.update(zip(row.offsets[text].tolist(), row.input_ids.numpy()[text].tolist()))
    return found


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("row_tokens, max_length", [(128, 20), (256, 100), (1024, 1024)])
def test_an_epoch_visits_every_token_once(tmp_path, name, row_tokens, max_length):
    path = write_documents(tmp_path, {"train": CORPORA[name]})
    (rows,) = epoch(path, row_tokens=row_tokens, max_length=max_length)
    seen = text_tokens(rows)
    whole = [token for shard in CORPORA[name] for document in shard for token in (CLS, *document, SEP)]
    assert set(seen.values()) == {1}
    assert set(seen) == {(place, token) for place, token in enumerate(whole) if token >= 5}


@pytest.mark.parametrize("max_length", [3, 10, 64, 1000])
def test_windows_are_whole_and_as_equal_as_can_be(max_length):
    document = np.array([CLS, *range(5, 60), SEP, CLS, 7, SEP, CLS, SEP], dtype=np.uint16)
    start, length = find_windows(document, max_length, CLS, SEP)
    assert np.concatenate([document[s : s + n] for s, n in zip(start, length)]).tolist() == [*range(5, 60), 7]
    assert length.max() <= max_length - 2 and length[:-1].max() - length[:-1].min() <= 1


def test_a_shard_may_begin_and_end_inside_a_document():
    start, length = find_windows(np.array([8, 9, SEP, CLS, 5, 6], dtype=np.uint16), 10, CLS, SEP)
    assert list(zip(start.tolist(), length.tolist())) == [(0, 2), (4, 2)]


def test_rows_hold_whole_documents_with_restarting_positions(tmp_path):
    path = write_documents(tmp_path, {"train": CORPORA["several shards"]})
    for row in epoch(path)[0]:
        ids, documents, positions = row.input_ids.numpy(), row.document_ids.numpy(), row.positions.numpy()
        assert (np.diff(documents) >= 0).all()
        for document in range(documents[-1] + 1):
            inside = np.flatnonzero(documents == document)
            assert positions[inside].tolist() == list(range(len(inside)))
            if ids[inside[0]] != PAD:
                assert ids[inside[0]] == CLS and ids[inside[-1]] == SEP and row.text.numpy()[inside[1:-1]].all()
            else:
                assert document == documents[-1] and (ids[inside] == PAD).all() and not row.text.numpy()[inside].any()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_world_size_sees_the_same_global_rows(tmp_path, world_size):
    path = write_documents(tmp_path, {"train": CORPORA["several shards"]})
    alone = list(itertools.islice(loader_of(path), 48))
    loaders = [loader_of(path, rank=rank, world_size=world_size) for rank in range(world_size)]
    rounds = list(itertools.islice(zip(*loaders), 48 // world_size))
    together = [row for round_ in rounds for row in round_]
    assert [row.index for row in together] == list(range(48))
    for a, b in zip(alone, together):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.document_ids.tolist() == b.document_ids.tolist()
    for round_ in rounds:  # what each rank says of its peers' rows is what they hold
        texts = [int(row.text.sum()) for row in round_]
        assert all(row.round_text == texts for row in round_)
        lengths = [torch.bincount(row.document_ids[row.input_ids != PAD]) for row in round_]
        assert all(row.round_lengths.tolist() == torch.cat(lengths).tolist() for row in round_)


@pytest.mark.parametrize("stop_after, world_after", [(1, 1), (7, 1), (12, 3), (40, 2), (120, 4)])
def test_resume_continues_at_the_exact_next_row(tmp_path, stop_after, world_after):
    path = write_documents(tmp_path, {"train": CORPORA["several shards"]})
    rows = list(itertools.islice(loader_of(path), 200))  # several epochs
    state = json.loads(json.dumps(rows[stop_after - 1].state))
    again = [next(iter(loader_of(path, state=state, rank=rank, world_size=world_after))) for rank in range(world_after)]
    for offset, row in enumerate(again):
        assert row.index == stop_after + offset
        assert row.input_ids.tolist() == rows[stop_after + offset].input_ids.tolist()


def test_epochs_differ_in_order_and_seeds_too(tmp_path):
    path = write_documents(tmp_path, {"train": CORPORA["several shards"]})
    first = [row.input_ids.tolist() for row in itertools.islice(loader_of(path), 8)]
    assert first == [row.input_ids.tolist() for row in itertools.islice(loader_of(path), 8)]
    assert first != [row.input_ids.tolist() for row in itertools.islice(loader_of(path, seed=8), 8)]
    rows = list(itertools.islice(loader_of(path), 200))
    second = [row.input_ids.tolist() for row in rows if row.state["epoch"] == 1][:8]
    assert first != second


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_has_fixed_rows_and_drops_none(tmp_path, world_size):
    path = write_documents(tmp_path, {"valid": CORPORA["several shards"]})
    fixed = dict(split="valid", seed=None, world_size=world_size)
    once, again = ([list(loader_of(path, rank=rank, **fixed)) for rank in range(world_size)] for _ in range(2))
    assert len({len(rows) for rows in once}) == 1  # empty rows fill the last round: no rank waits for another
    for a, b in zip(itertools.chain(*once), itertools.chain(*again), strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
    alone = list(loader_of(path, split="valid", seed=None))
    assert text_tokens(row for rows in once for row in rows) == text_tokens(alone)


def test_each_shard_is_scanned_once_and_the_first_when_the_loader_is_made(tmp_path, monkeypatch):
    """Before the training clock starts. A later iteration begins anew."""
    scanned: list[tuple[str, int]] = []
    for name in ("find_windows", "check_vocabulary"):
        scan = getattr(dataloading, name)

        def counted(*arguments, name=name, scan=scan):
            scanned.append((name, next(len(x) for x in arguments if isinstance(x, np.ndarray))))
            return scan(*arguments)

        monkeypatch.setattr(dataloading, name, counted)
    path = write_documents(tmp_path, {split: CORPORA["several shards"] for split in ("train", "valid")})
    sizes = [entry["tokens"] for entry in read_manifest(path)["shards"].values() if entry["split"] == "valid"]
    expected = [(name, size) for size in sizes for name in ("check_vocabulary", "find_windows")]
    loader = loader_of(path, split="valid", seed=None)
    assert scanned == expected[:2]
    first = [row.input_ids.tolist() for row in loader]
    assert scanned == expected
    assert [row.input_ids.tolist() for row in loader] == first and scanned == 2 * expected  # it starts afresh
    scanned.clear()
    loader = loader_of(path)
    first = [row.input_ids.tolist() for row in itertools.islice(loader, 4)]
    assert sorted(scanned) == sorted(expected)  # few windows: the rows' pool holds those of all shards
    assert [row.input_ids.tolist() for row in itertools.islice(loader, 4)] == first


@pytest.mark.parametrize("row_tokens", [128, 512])
def test_the_first_tokens_of_validation_do_not_depend_on_rows(tmp_path, row_tokens):
    path = write_documents(tmp_path, {"valid": CORPORA["several shards"]})
    tokens = text_tokens(loader_of(path, split="valid", seed=None, max_tokens=1000, row_tokens=row_tokens))
    assert tokens == text_tokens(loader_of(path, split="valid", seed=None, max_tokens=1000, row_tokens=256))
    assert 1000 <= len(tokens) < 1100  # whole windows


def test_padding_stays_under_half_a_percent(tmp_path):
    """On lengths as real text has them (log-normal, median 150 tokens); the real corpus is tried below."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5, 0.8, 6000)).astype(int).clip(3, 4000)
    path = write_documents(tmp_path, {"train": [[[5] * n for n in lengths]]})
    rows = epoch(path, row_tokens=8192, max_length=1024)[0]
    assert sum(int((row.input_ids == PAD).sum()) for row in rows[:-1]) / (8192 * (len(rows) - 1)) < 0.005
    assert all(int((row.input_ids == PAD).sum()) < 0.005 * 8192 for row in rows[: len(rows) // 2])


def test_padding_on_real_text(tmp_path):
    corpus = ROOT.parent / "shared" / "data" / "corpus" / "gov_00.jsonl.xz"
    if not corpus.exists():
        pytest.skip("needs the project's real text, which is not here")
    import lzma

    with lzma.open(corpus, "rt") as file:
        documents = [[5] * len(json.loads(line)["text"].split()) for line in file]
    rows = epoch(write_documents(tmp_path, {"train": [documents]}), row_tokens=8192, max_length=1024)[0]
    assert sum(int((row.input_ids == PAD).sum()) for row in rows) / (8192 * len(rows)) < 0.005


def test_a_process_may_exit_while_rows_are_being_packed(tmp_path):
    """A thread that is inside torch when Python takes itself apart would abort the process."""
    path = write_documents(tmp_path, {"train": CORPORA["several shards"]})
    code = f"""
from pathlib import Path
from dataloading import Loader, read_manifest
path = Path({str(path)!r})
loaders = [iter(Loader(path, read_manifest(path), "train", 256, 100, seed=seed, rows_ahead=2000)) for seed in range(8)]
for rows in loaders:
    next(rows)
for rows in loaders[1:]:  # one is left open, as by a run that fails
    rows.close()
"""
    run = run_python("-c", code)
    assert run.returncode == 0 and "Exception" not in run.stderr, run.stderr


# --- bad input


def test_shards_that_cannot_be_used_say_why(tmp_path):
    path = write_documents(tmp_path / "good", {"train": [sentences(1, 10)]}) / "test_train_000000.bin"
    whole = path.read_bytes()
    for broken, message in (
        (b"", "shorter than a shard's header"),
        (b"\x00" * len(whole), "not a token shard"),
        (whole[:-3], "truncated"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            read_manifest(path.parent)
    with pytest.raises(InputError, match="no manifest.json in .*: pack your text with `python data/pack"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="run `python data/download_fineweb_edu.py .*, or pack your text with"):
        read_manifest(tmp_path / "fineweb_edu")


def test_manifest_must_agree_with_its_files(tmp_path, word_tokenizer):
    import shutil

    path = write_documents(tmp_path, {"train": [sentences(1, 10)]})
    write_shard(path / "test_train_000000.bin", np.array([0, 5, 1]))
    with pytest.raises(InputError, match="does not have the"):
        read_manifest(path)
    path = write_documents(tmp_path / "b", {"train": [sentences(1, 10)]}, tokenizer="another")
    shutil.copytree(word_tokenizer, path / "tokenizer")
    with pytest.raises(InputError, match="is not the tokenizer that"):
        read_manifest(path)
    with pytest.raises(InputError, match="does not fit in uint16"):
        read_manifest(write_documents(tmp_path / "c", {"train": [[]]}, vocab_size=65_537))


def test_the_loader_refuses_what_it_cannot_feed(tmp_path):
    path = write_documents(tmp_path / "a", {"train": [[[5, 63]]]})
    with pytest.raises(InputError, match="lists no valid shards"):
        loader_of(path, split="valid")
    with pytest.raises(InputError, match="longer than a row"):
        loader_of(path, row_tokens=128, max_length=129)
    with pytest.raises(InputError, match="beyond the vocabulary"):
        next(iter(loader_of(write_documents(tmp_path / "b", {"train": [[[5, 64]]]}))))
    with pytest.raises(InputError, match="no document with text"):
        next(iter(loader_of(write_documents(tmp_path / "c", {"train": [[], [[]]]}))))


def test_a_shard_that_exists_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(5, 10))
    assert read_shard(path).tolist() == [5, 6, 7, 8, 9] and path.stat().st_size == HEADER_BYTES + 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_the_loaders_thread_works_on_its_ranks_gpu(corpus, monkeypatch):
    def seen(device):
        raise InterruptedError(f"{threading.current_thread() is threading.main_thread()} {device}")

    monkeypatch.setattr(torch.cuda, "set_device", seen)
    loader = Loader(corpus, read_manifest(corpus), "train", 256, 100, seed=1, device="cuda:3")
    with pytest.raises(InterruptedError, match="False cuda:3"):
        next(iter(loader))


def test_the_validation_set_is_the_one_that_tracks_fix_by_hash(tmp_path):
    """Pinned: a change here ends every track of records/tracks.json."""
    assert np.flatnonzero(frozen_mask(np.arange(80))).tolist() == [2, 4, 32, 33, 41, 42, 43, 49, 52, 53]
    path = write_documents(tmp_path, {"train": [[[5]]], "valid": [[list(range(5, 60))]]})
    for row_tokens in (128, 512):
        loader = loader_of(path, split="valid", seed=None, row_tokens=row_tokens)
        found = describe_validation(path, read_manifest(path), loader)
        assert (found["masked_tokens"], found["fingerprint"]) == (10, "5ebe73b56952aea1")
