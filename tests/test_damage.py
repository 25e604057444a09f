"""Every command with its input files damaged: it does its work all the same, or says in one sentence why not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import finetuner
import trainer
from conftest import ROOT, as_flags, flags, sentences, write_documents
from data import pack_fineweb_edu, pack_mnli, train_tokenizer
from dataloading import InputError, sha256_of
from records import leaderboard, plot, submit, verify

TEXT = "the cat sat on a mat and then the dog ran under a tree"
SMALL = "--train.steps 1 --train.valid_every 0 --train.save_every 0 --train.batch_tokens 256"


def flipped(content: bytes) -> bytes:
    """A bit in each of five places, the first byte among them."""
    changed = bytearray(content)
    for place in range(0, len(changed), max(1, len(changed) // 5)):
        changed[place] ^= 4
    return bytes(changed)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not JSON": lambda content: b"{" + content,
    "other JSON": lambda content: b"[1]",
    "flipped": flipped,
    "not text": lambda content: b"\xff\xfe" + content,
}


FINETUNING = {"task": "custom", "data.dataset": "rows.jsonl", "train.out": "logs", "train.run_name": "tuned"}
FINETUNING = as_flags(FINETUNING | {"train.resume": "true", "train.epochs": 1, "train.batch_size": 40})


@pytest.fixture(scope="module")
def sound(tmp_path_factory, word_tokenizer) -> Path:
    """Data, texts, tables, a pretraining run, a grid half done, and records: what the commands read."""
    root = tmp_path_factory.mktemp("sound")
    before = Path.cwd()
    os.chdir(root)
    tokenizer = sha256_of(word_tokenizer / "tokenizer.json")
    documents = {"train": [sentences(1, 60, 17)], "valid": [sentences(3, 20, 17)]}
    write_documents(root / "data", documents, vocab_size=17, tokenizer=tokenizer)
    shutil.copytree(word_tokenizer, root / "data" / "tokenizer")
    trainer.main(flags("data", "logs", "pretrained", SMALL))
    rows = [{"text": " ".join(TEXT.split()[i % 9 :]), "label": i % 2} for i in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script(train_tokenizer.main, *TEXTS, "--vocab_size", 262, "--valid_fraction", 0, "--out", "tokenizer")
    finetuner.main(FINETUNING)
    (root / "logs" / "tuned" / "metrics.json").unlink()
    for path in ("resumed/resume_0of1.npz", "done/manifest.json"):
        Path(path).parent.mkdir()
        np.savez(path, state="{}") if path.endswith("npz") else Path(path).write_text("{}")
    (source,) = (ROOT / "records" / "sample-cpu").glob("*_two-layers")
    shutil.copytree(source, root / "repository" / "records" / "sample-cpu" / source.name)
    shutil.copy(ROOT / "records" / "tracks.json", root / "repository" / "records")
    shutil.copy(ROOT / "README.md", root / "repository")
    os.chdir(before)
    return root


def script(main: Callable, *argv: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *map(str, argv)])
        main()


def submit_one() -> None:
    said = {"track": "sample-cpu", "name": "again", "contributors": ["a"], "what": "A test.", "date": "2026-11-22"}
    submit.submit(Path("repository/records"), [Path(RECORD, "logs", "1.txt")], said)


RECORD = "repository/records/sample-cpu/2026-11-22_two-layers"
TRACKS = "repository/records/tracks.json"
DATA = ["data/manifest.json", "data/test_train_000000.bin", "data/test_valid_000000.bin"]
HASHED = [*DATA[1:], "data/tokenizer/tokenizer.json"]  # by the manifest: no damage may pass
TOKENIZER = ["data/tokenizer/tokenizer.json", "data/tokenizer/tokenizer_config.json"]
MODEL = ["logs/pretrained/model/config.json", "logs/pretrained/model/model.safetensors"]
MODEL += [path.replace("data/tokenizer", "logs/pretrained/model") for path in TOKENIZER]
TEXTS = ("--files", "rows.jsonl", "--out", "packed")
LABELLED = ("--files", "train=rows.jsonl", "--text", "text", "--text_pair", "none", "--out", "packed")
COMMANDS = {  # in a folder like `sound`: what is run, and the files that it reads
    "trainer": (partial(trainer.main, flags("data", "logs", "new", SMALL)), DATA + TOKENIZER),
    "trainer --config": (
        partial(trainer.main, ["--config", "logs/pretrained/config.yaml", "--train.run_name", "new"]),
        ["logs/pretrained/config.yaml"],
    ),
    "finetuner": (
        partial(finetuner.main, [*FINETUNING, "--train.run_name", "new", "--train.resume", "false"]),
        [*MODEL, "rows.jsonl"],
    ),
    "finetuner --train.resume": (
        partial(finetuner.main, FINETUNING),
        ["logs/pretrained/config.yaml", "logs/tuned/config.yaml", "logs/tuned/runs.jsonl"],
    ),
    "train_tokenizer": (
        partial(script, train_tokenizer.main, *TEXTS, "--vocab_size", 262, "--valid_fraction", 0),
        ["rows.jsonl"],
    ),
    "pack_fineweb_edu": (
        partial(script, pack_fineweb_edu.main, *TEXTS, "--tokenizer", "tokenizer"),
        ["rows.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"],
    ),
    **{
        f"pack_fineweb_edu --out {out}": (
            partial(script, pack_fineweb_edu.main, *TEXTS, "--out", out, "--tokenizer", "tokenizer"),
            [path],
        )
        for out, path in (("resumed", "resumed/resume_0of1.npz"), ("done", "done/manifest.json"))
    },
    "pack_mnli": (
        partial(script, pack_mnli.main, *LABELLED, "--tokenizer", "tokenizer"),
        ["rows.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"],
    ),
    "plot": (
        partial(script, plot.main, "logs/pretrained"),
        ["logs/pretrained/log.txt", "logs/pretrained/metrics.jsonl"],
    ),
    "verify": (partial(script, verify.main, RECORD), [f"{RECORD}/record.json", f"{RECORD}/logs/1.txt", TRACKS]),
    "leaderboard": (
        partial(leaderboard.update, Path("repository/records"), check=True),
        [f"{RECORD}/record.json", f"{RECORD}/logs/2.txt", TRACKS, "repository/README.md"],
    ),
    "submit": (submit_one, [f"{RECORD}/record.json", f"{RECORD}/logs/1.txt", TRACKS]),
    "submit --extract": (
        partial(script, submit.main, "--extract", "logs/pretrained", "--out", "extracted"),
        ["logs/pretrained/log.txt"],
    ),
}
CASES = [(name, path) for name, (_, paths) in COMMANDS.items() for path in paths]


@pytest.mark.parametrize("name, path", CASES, ids=[f"{name}: {path}" for name, path in CASES])
def test_a_command_survives_damage_or_names_it(sound, tmp_path, monkeypatch, name, path):
    run, _ = COMMANDS[name]
    for damage in DAMAGES.values():
        root = shutil.copytree(sound, tmp_path / "root")
        monkeypatch.chdir(root)
        Path(path).write_bytes(damage(Path(path).read_bytes()))
        try:
            run()
            assert path not in HASHED
        except (InputError, OSError) as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 500
        except SystemExit as end:
            assert end.code
        shutil.rmtree(root)
