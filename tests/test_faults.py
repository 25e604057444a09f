"""Nothing lost: killed at any moment or damaged anywhere, a run goes on by the same command, or says why not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import types
from pathlib import Path

import pytest
from safetensors import SafetensorError

import dataloading
import trainer
from conftest import TOKEN, flags, lines, losses, run_python, story, telling
from dataloading import HEADER_BYTES, InputError, Loader, read_manifest, read_shard, sha256_of
from records.log import read_log
from records.verify import check_run
from trainer import Run, damage_of, find_checkpoint, main

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


def test_a_signal_after_the_last_step_costs_nothing(corpus, whole, tmp_path, monkeypatch):
    """It comes when the model is written and the test loss is not yet measured."""
    write_models = Run.write_models

    def interrupted(self):
        write_models(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "write_models", interrupted)
    go_on(corpus, tmp_path / "run")
    assert read_log(tmp_path / "run").named("result", "test_loss") == read_log(whole).named("result", "test_loss")


def test_the_newest_run_is_the_one_that_saved_last(whole, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / "log.txt").unlink()
    os.utime(tmp_path / "first" / "checkpoints" / "step-000006", (2e9, 2e9))
    os.utime(tmp_path / "second", (2e9 + 1, 2e9 + 1))
    assert find_checkpoint("auto", tmp_path, None) == tmp_path / "first" / "checkpoints" / "step-000006"
    shutil.copytree(tmp_path / "first/checkpoints/step-000006", tmp_path / "first/checkpoints/step-000006-copy2")
    assert find_checkpoint("auto", tmp_path, "first").name == "step-000006"


def test_a_checkpoint_outside_its_run_is_refused(corpus, whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "checkpoints" / "step-000004", tmp_path / "backup" / "step-000004")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="is in no run's folder: copy it to logs/RUN/checkpoints"):
        main(flags(corpus, tmp_path, "none", SHORT, "--train.resume", "backup/step-000004"))
    assert sorted(tmp_path.rglob("*")) == before
    shutil.copytree(whole, tmp_path / "logs" / "run")
    shutil.rmtree(tmp_path / "logs" / "run" / "model")
    monkeypatch.chdir(tmp_path / "logs" / "run" / "checkpoints")
    main(flags(corpus, "nowhere", "run", SHORT, "--train.run_name none --train.resume ../checkpoints/step-000004"))
    assert_same_model(tmp_path / "logs" / "run", whole)


# --- one log


def test_the_log_of_a_resumed_run_is_that_of_one_never_stopped(corpus, whole, killed):
    shutil.rmtree(killed / "checkpoints" / "step-000006")
    for name in ("log.txt", "metrics.jsonl"):  # a kill cuts lines in half
        content = (killed / name).read_bytes()
        (killed / name).write_bytes(content[:-20])
    go_on(corpus, killed)
    assert story(killed) == story(whole)
    assert (killed / "log.txt").read_text().count("\n=== resumed\nstep-000004\n") == 1
    assert "step:5/6" in (killed / "abandoned" / "log.txt").read_text()
    found = list(check_run(read_log(killed)))
    assert ["a resumed run" in said for said in found] == [True], found


def interrupt(monkeypatch, step: int, number: int) -> None:
    """The signal comes in this step."""
    train_step = Run.train_step

    def interrupted(self, progress):
        train_step(self, progress)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "train_step", interrupted)


@pytest.fixture(scope="module")
def seldom(corpus, tmp_path_factory) -> Path:
    """`whole`, with one line of training losses, and those of validations and checkpoints."""
    out = tmp_path_factory.mktemp("seldom")
    main(flags(corpus, out, "run", SHORT, "--train.log_every 6"))
    return out / "run"


@pytest.mark.parametrize("step", [3, 4, 5])  # where only a validation, only a checkpoint and nothing at all is due
def test_the_log_of_an_interrupted_run_is_that_of_one_never_stopped(corpus, seldom, tmp_path, monkeypatch, step):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, step, signal.SIGTERM)
        go_on(corpus, run, "--train.log_every 6")
    assert max((run / "checkpoints").iterdir()).name == f"step-00000{step}"
    go_on(corpus, run, "--train.log_every 6")
    assert story(run) == story(seldom)
    assert_same_model(run, seldom)


def test_a_log_that_is_not_the_checkpoint_s_is_set_aside(corpus, whole, killed, capsys):
    (killed / "log.txt").write_text("lost\n")
    go_on(corpus, killed)
    assert "set aside in" in capsys.readouterr().out
    assert (killed / "abandoned" / "log.txt").read_text() == "lost\n"
    log = read_log(killed)
    assert "resumed" in log.sections and log.named("result", "val_loss") == read_log(whole).named("result", "val_loss")


def test_ctrl_c_saves_once_and_says_so(corpus, whole, tmp_path, monkeypatch, capsys):
    run, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        interrupt(patch, 3, signal.SIGINT)
        go_on(corpus, run)
    assert end.value.code == 130 and signal.getsignal(signal.SIGINT) == handler
    assert capsys.readouterr().out.endswith("\nstopped at step 3; continue with --train.resume auto\n")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    go_on(corpus, run)
    assert_same_model(run, whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    code = "import os, signal, trainer\nwith trainer.stop_signals() as came:\n"
    code += "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT); print(came, flush=True)"
    ended = run_python("-c", code)
    assert ended.returncode == -signal.SIGINT and ended.stdout == "[2]\n" and ended.stderr == ""


UNDER_TORCHRUN = """
import os, signal, sys, time, trainer
train_step = trainer.Run.train_step

def struck(self, progress):
    train_step(self, progress)
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], self.process.rank, self.step) == ("0", 1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], self.process.rank, self.step) == ("1", 0, 5):
        os.kill(os.getppid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # until it has come back
            time.sleep(0.01)

trainer.Run.train_step = struck
try:
    trainer.main(sys.argv[1:])
except trainer.InputError as error:
    sys.exit(f"error: {error}")
"""


def test_torchrun_starts_a_killed_rank_again_and_hands_ctrl_c_on(corpus, whole, tmp_path):
    """Killed in step 3, the two ranks go on from 2; torchrun itself is told to stop in step 5; one rank finishes."""
    script, run = tmp_path / "struck.py", tmp_path / "run"
    script.write_text(UNDER_TORCHRUN)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", script)
    ended = run_python(*launch, *flags(corpus, tmp_path, "run", SHORT))
    assert "error: rank 0 waits in vain for the others" in ended.stderr and "[rank" not in ended.stderr
    assert "=== resumed\nstep-000002\n" in ended.stdout and losses(run, "train_loss").keys() == {1, 2, 3, 4, 5}
    assert ended.stdout.endswith("\nstopped at step 5; continue with --train.resume auto\n"), ended.stdout
    assert ended.stdout.count("=== saved") == 3 and (run / "checkpoints/step-000005").exists()
    go_on(corpus, run)
    assert_same_model(run, whole)


SILENT = """
import os, signal, sys, trainer
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
other = os.fork()
os.environ["RANK"] = "0" if other else "1"
try:
    with trainer.join_processes("cpu", timeout_minutes=0.05) as process:
        if process.rank == 1:
            signal.pause()
        process.sum(1.0)
except trainer.InputError as error:
    print(error)
os.kill(other, signal.SIGKILL)
"""


def test_a_rank_that_does_not_answer_ends_the_others(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ended = run_python("-c", SILENT, port, timeout=100)
    said = r"rank 0 waits in vain .*Timed out.* not answered for the 0.05 minutes of --train.timeout_minutes; resume"
    assert ended.returncode == 0 and re.fullmatch(f"{said} the run\n", ended.stdout), ended.stderr


# --- damaged checkpoints


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)


def fail_to_read(path: Path) -> None:
    """It opens, and reading it fails, as on a bad disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


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
    "model unreadable": ("model.safetensors", fail_to_read),
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


# --- disks that are full


def fill_disk(monkeypatch, names: list[str]) -> None:
    """For these checkpoints."""
    save_model = trainer.save_model

    def save(into, *more):
        save_model(into, *more)
        if into.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "save_model", save)


def test_a_checkpoint_that_cannot_be_written_ends_nothing_if_another_stands(
    corpus, whole, tmp_path, monkeypatch, capsys
):
    fill_disk(monkeypatch, ["step-000004.tmp"])
    go_on(corpus, tmp_path / "run")
    assert "step-000004 cannot be written ([Errno 28] No space left" in capsys.readouterr().err
    assert sorted(path.name[-1] for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "6"]
    assert_same_model(tmp_path / "run", whole)
    fill_disk(monkeypatch, ["step-000002.tmp"])
    with pytest.raises(InputError, match="step-000002 cannot be written .*make room"):
        go_on(corpus, tmp_path / "other")
    monkeypatch.undo()

    def save(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer, "save_model", save)
    with pytest.raises(InputError, match="^I/O error: No space left"):  # and no traceback: it is no defect of ours
        go_on(corpus, tmp_path / "third", "--train.save_every 0")


def test_a_log_that_cannot_be_written_is_named(corpus, tmp_path, monkeypatch):
    def full(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_full(self, progress):
        self.log.file = types.SimpleNamespace(write=full, name=self.log.file.name)
        self.write_line(train_loss=1.0)

    monkeypatch.setattr(Run, "train_step", make_full)
    with pytest.raises(InputError, match="log.txt cannot be written .*No space left"):
        go_on(corpus, tmp_path / "run")


# --- files and secrets


def test_files_can_be_read_by_others_and_hold_no_token(corpus, tmp_path, capfd):
    assert os.environ["HF_TOKEN"] == TOKEN
    go_on(corpus, tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20 and all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    assert not telling(tmp_path) and TOKEN not in "".join(capfd.readouterr())


# --- damaged data


@pytest.fixture
def data(corpus, tmp_path) -> Path:
    return shutil.copytree(corpus, tmp_path / "data")


SHARD = "test_train_000000.bin"


def in_mid_run(monkeypatch, damage) -> None:
    """The damage is done when the rows of the first steps are built."""
    train_step = Run.train_step

    def damaged(self, progress):
        if self.step == 2:
            damage()
        train_step(self, progress)

    monkeypatch.setattr(Run, "train_step", damaged)


def set_token(path: Path, token: int, at: int = 40) -> None:
    with open(path, "rb+") as file:
        file.seek(HEADER_BYTES + 2 * at)
        file.write(int(token).to_bytes(2, "little"))


def test_a_shard_cut_while_it_is_read_is_named(data, tmp_path, monkeypatch):
    in_mid_run(monkeypatch, lambda: os.truncate(data / SHARD, HEADER_BYTES + 100))
    with pytest.raises(InputError, match=f"{SHARD} shrank from .* to 1,124 bytes"):
        go_on(data, tmp_path / "run", "--train.steps 100")
    assert damage_of(tmp_path / "run/checkpoints/step-000002") is None


def test_a_token_beyond_the_vocabulary_in_mid_run_is_named(data, tmp_path, monkeypatch):
    tokens = len(read_shard(data / SHARD))
    in_mid_run(monkeypatch, lambda: [set_token(data / SHARD, 9999, at) for at in range(tokens)])
    with pytest.raises(InputError, match=f"{SHARD} holds token id 9999, beyond the vocabulary of 64"):
        go_on(data, tmp_path / "run", "--train.steps 100")


def test_a_changed_token_within_the_vocabulary_is_found(data, tmp_path):
    tokens = read_shard(data / SHARD)
    set_token(data / SHARD, 5 + (int(tokens[40]) + 1) % 50)
    with pytest.raises(InputError, match=f"{SHARD} is not what manifest.json names .*--data.verify false"):
        go_on(data, tmp_path / "run")
    go_on(data, tmp_path / "taken", "--data.verify false")


def test_every_shard_is_verified_once_also_in_the_background(data, monkeypatch):
    hashed = []
    monkeypatch.setattr(dataloading, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    loader = Loader(data, read_manifest(data), "valid", 256, 100, seed=None)
    assert [len(list(loader)) > 5 for _ in range(2)] == [True, True] and hashed == ["test_valid_000000.bin"]
    loader, names = Loader(data, read_manifest(data), "train", 256, 100, seed=1), set()
    rows = iter(loader)
    while len(names) < 2:
        names = set(hashed) - {"test_valid_000000.bin"}
        next(rows)
    for _ in range(500):
        next(rows)
    assert sorted(hashed) == [SHARD, "test_train_000001.bin", "test_valid_000000.bin"]


def test_shards_of_windows_that_a_checkpoint_holds_are_verified(data):
    rows = iter(Loader(data, read_manifest(data), "train", 256, 100, seed=1))
    state = next(rows).state
    rows.close()
    assert {window[0] for window in state["pool"]} == {0, 1} and state["shard"] == 2  # no shard is left to open
    set_token(data / SHARD, 5 + (int(read_shard(data / SHARD)[40]) + 1) % 50)
    with pytest.raises(InputError, match="is not what manifest.json names"):
        Loader(data, read_manifest(data), "train", 256, 100, seed=1, state=state)


def test_a_tokenizer_that_is_not_json_is_one_sentence(data, word_tokenizer, tmp_path):
    shutil.copytree(word_tokenizer, data / "tokenizer")
    (data / "tokenizer" / "tokenizer_config.json").write_text("{")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = sha256_of(data / "tokenizer" / "tokenizer.json")
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="data/tokenizer is not a tokenizer"):
        go_on(data, tmp_path / "run")


@pytest.mark.parametrize("name", ["../outside.bin", "/tmp/outside.bin", "folder/inside.bin", ".."])
def test_names_that_lead_outside_the_folder_are_refused(data, name):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"][name] = manifest["shards"][SHARD]
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not the name of a file in this folder"):
        read_manifest(data)
