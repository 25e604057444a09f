"""Nothing lost: killed at any moment or damaged anywhere, a run goes on by the same command, or says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import flags, lines, losses
from dataloading import InputError
from trainer import main

SHORT = "--train.steps 6 --train.valid_every 3 --train.save_every 2 --train.batch_tokens 512 --train.resume auto"


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run of 6 steps never stopped, with checkpoints at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole")
    main(flags(corpus, out, "run", SHORT))
    return out / "run"


@pytest.fixture
def killed(whole, tmp_path) -> Path:
    """The same, killed while it saved its model."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "model")
    log = run / "log.txt"
    log.write_text(log.read_text().split("=== result\n")[0])
    return run


def go_on(corpus: Path, run: Path, *more: object) -> None:
    main(flags(corpus, run.parent, run.name, SHORT, *more))


def assert_same_model(run: Path, whole: Path) -> None:
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def steps_set_aside(run: Path) -> list[int]:
    return sorted(int(path.name[5:11]) for path in (run / "abandoned").glob("step-*"))


# --- killed


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(corpus, whole, killed, capsys):
    shutil.rmtree(killed / "checkpoints")
    before = (killed / "log.txt").read_text()
    go_on(corpus, killed)
    assert "has no checkpoint to resume: starting afresh" in capsys.readouterr().out
    assert (killed / "abandoned" / "log.txt").read_text() == before
    assert "=== resumed" not in (killed / "log.txt").read_text()
    assert losses(killed, "train_loss") == losses(whole, "train_loss") and len(lines(killed)) == len(lines(whole))
    assert_same_model(killed, whole)


def test_a_finished_run_is_left_as_it_is(corpus, whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    go_on(corpus, whole)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


# --- damaged checkpoints


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)


def drop_a_key(path: Path) -> None:
    state = json.loads(path.read_text())
    del state["loader"]
    path.write_text(json.dumps(state))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {
    "model cut": ("model.safetensors", cut_in_half),
    "model empty": ("model.safetensors", empty),
    "optimizer cut": ("optimizer.safetensors", cut_in_half),
    "optimizer gone": ("optimizer.safetensors", Path.unlink),
    "optimizer flipped": ("optimizer.safetensors", flip_a_bit),
    "state cut": ("state.json", cut_in_half),
    "state empty": ("state.json", empty),
    "state gone": ("state.json", Path.unlink),
    "state without a key": ("state.json", drop_a_key),
    "hashes cut": ("SHA256SUMS", cut_in_half),
    "hashes gone": ("SHA256SUMS", Path.unlink),
    "all gone": (".", lambda folder: [path.unlink() for path in folder.iterdir()]),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_found(killed, capsys, name, damage):
    from trainer import find_checkpoint

    newest = killed / "checkpoints" / "step-000006"
    damage(newest / name)
    assert find_checkpoint("auto", killed.parent, "run").name == "step-000004"
    assert f"{newest} is damaged: " in capsys.readouterr().out
    with pytest.raises(InputError, match="not a checkpoint that is whole"):
        find_checkpoint(str(newest), killed.parent, "run")


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_ones(corpus, whole, killed):
    for step, (name, damage) in ((6, DAMAGE["optimizer flipped"]), (4, DAMAGE["all gone"])):
        damage(killed / "checkpoints" / f"step-00000{step}" / name)
    go_on(corpus, killed)
    assert steps_set_aside(killed) == [4, 6]
    assert_same_model(killed, whole)


def test_without_a_whole_checkpoint_a_run_starts_afresh_only_if_told_to(corpus, whole, killed, capsys):
    for folder in (killed / "checkpoints").iterdir():
        flip_a_bit(folder / "model.safetensors")
    before = sorted(killed.rglob("*"))
    with pytest.raises(InputError, match="--train.start_afresh true"):
        go_on(corpus, killed)
    assert sorted(killed.rglob("*")) == before
    go_on(corpus, killed, "--train.start_afresh true")
    assert "starting afresh" in capsys.readouterr().out and steps_set_aside(killed) == [2, 4, 6]
    assert_same_model(killed, whole)
