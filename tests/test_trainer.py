"""The run: schedules, counting, masks; the same training on any number of ranks, stopped or not; bad input."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

import objectives
import records.log
import records.plot
import trainer
from conftest import (
    GOLDEN,
    ROOT,
    SPECIALS,
    TOKEN,
    flags,
    lines,
    losses,
    metrics_of,
    run_python,
    sentences,
    telling,
    tiny,
    write_documents,
)
from data import download_fineweb_edu
from dataloading import InputError, Loader, count_text, frozen_mask, read_manifest, write_json
from hub_stand_in import Hub
from model import KBERTConfig
from objectives import compile_rows, draw_masks, mask_count
from records.log import LOG_LINE, MASKED_LAST_LAYER, WHOLE_LAST_LAYER, Work, log_line, peak_flops, read_log
from trainer import (
    PRESETS,
    DataConfig,
    TrainConfig,
    batch_factor,
    local_window,
    lr_factor,
    main,
    make_parser,
    mask_rate,
    muon_momentum,
    parse_flags,
)

ALONE = trainer.Process(0, 1, torch.device("cpu"))

# --- schedules and flags


def test_learning_rate_shapes():
    shape = lambda progress, **c: lr_factor(progress, TrainConfig(**c))  # noqa: E731
    common = dict(lr_warmup=0.1, lr_decay=0.5, lr_floor=0.1)
    for schedule in ("trapezoid", "one_cycle", "cosine"):
        assert shape(0.0, lr_schedule=schedule, **common) == 0
        assert shape(0.05, lr_schedule=schedule, **common) == pytest.approx(0.5)
        assert shape(0.1, lr_schedule=schedule, **common) == pytest.approx(1.0)
        assert shape(1.0, lr_schedule=schedule, **common) == pytest.approx(0.1)
    assert shape(0.5, **common) == 1 and shape(0.75, **common) == pytest.approx(0.55)
    assert shape(0.75, lr_decay_shape="sqrt", **common) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)))
    assert shape(0.55, lr_schedule="one_cycle", **common) == pytest.approx(0.55)
    assert shape(0.55, lr_schedule="cosine", **common) == pytest.approx(0.55)


def test_a_warm_up_may_last_the_whole_run():
    for schedule in ("trapezoid", "one_cycle", "cosine"):
        c = TrainConfig(lr_schedule=schedule, lr_warmup=1.0)
        assert lr_factor(0.5, c) == 0.5 and 0 <= lr_factor(1.0, c) <= 1


def test_where_warm_up_and_decay_overlap_the_rate_follows_the_lower():
    c = TrainConfig(lr_warmup=0.3, lr_decay=0.9, lr_floor=0.0)
    steps = [lr_factor(step / 1000, c) for step in range(1001)]
    assert steps[0] == steps[-1] == 0 and max(abs(a - b) for a, b in zip(steps, steps[1:])) < 0.004
    assert lr_factor(0.2, c) == pytest.approx(2 / 3) and lr_factor(0.3, c) == pytest.approx(0.7 / 0.9)


def test_other_schedules():
    c = TrainConfig(batch_start=0.5, batch_ramp=0.4, window_start=64, momentum_warmup=0.1)
    assert [batch_factor(p, c) for p in (0, 0.1, 0.3999, 0.4, 1)] == pytest.approx([0.5, 0.625, 0.875, 1, 1])
    assert [mask_rate(p, c) for p in (0, 0.5, 1)] == pytest.approx([0.3, 0.225, 0.15])
    assert [muon_momentum(p, c) for p in (0, 0.05, 0.1, 0.9, 0.99, 1)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95, 0.9, 0.85]
    )
    assert {muon_momentum(p, TrainConfig(muon_momentum=0.85)) for p in (0, 0.05, 0.5, 0.99, 1)} == {0.85}
    assert [local_window(p, c, 256) for p in (0, 0.3, 0.67, 1)] == [64, 192, 256, 256]
    assert local_window(0, TrainConfig(), 128) == 128


def settings_of(*argv: str) -> dict:
    parser = make_parser("", {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig})
    parser.add_argument("--preset", choices=list(PRESETS), default="base")
    return parse_flags(parser, list(argv), {"preset": PRESETS})[0]


def test_flags_override_the_preset_and_the_preset_the_defaults():
    settings = settings_of("--preset", "micro", "--train.steps", "7")
    assert settings["preset"] == "micro" and settings["train"]["steps"] == 7
    assert settings["train"]["row_tokens"] == PRESETS["micro"]["train.row_tokens"]
    assert settings["train"]["muon_lr"] == TrainConfig.muon_lr and settings["model"]["num_hidden_layers"] == 4
    assert settings_of()["data"] == vars(DataConfig()) and settings_of()["preset"] == "base"


def test_flags_override_a_config_wherever_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 7, seed: 5}\n")
    (tmp_path / "b.yaml").write_text("train: {steps: 8}\n")
    flags = "--train.steps", "9"
    for argv in ([*flags, "--config", f"{tmp_path}/a.yaml"], [f"--config={tmp_path}/a.yaml", *flags]):
        assert (settings_of(*argv)["train"]["steps"], settings_of(*argv)["train"]["seed"]) == (9, 5)
    both = settings_of("--config", f"{tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml")["train"]
    assert (both["steps"], both["seed"]) == (8, 5)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--train.compile=false", False),
        ("--train.compile False", False),
        ("--train.compile", True),
        ("--train.embed_betas 0.5,0.9", (0.5, 0.9)),
        ("--train.embed_betas [0.5,0.9]", (0.5, 0.9)),
        ("--train.save_words 1e6", 1e6),
        ("--train.save_words 1e6,2e6", (1e6, 2e6)),
        ("--train.max_minutes none", None),
        ("--train.max_minutes None", None),
        ("--train.max_minutes 1.5", 1.5),
        ("--train.seed 1_000", 1000),
        ("--train.steps=1_000_000", 1_000_000),
        ("--train.row_tokens none", None),
        ("--train.adam_eps 1e-4", 1e-4),
        ("--train.run_name none", None),
        ("--train.run_name 2026-11-25", "2026-11-25"),
        ("--train.run_name 007", "007"),
        ("--train.out 1,2", "1,2"),
        ("--train.lr_schedule cosine", "cosine"),
        ("--data.dir 12", "12"),
        ("--train.deterministic", True),
        ("--model.value_residual=false", False),
        ("--model.frequency_base 1_000", 1000.0),
    ],
)
def test_every_spelling_of_a_value(flag, value):
    group, name = flag.split()[0].split("=")[0].removeprefix("--").split(".")
    found = settings_of(*flag.split())[group][name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("said,kept", [("1e6", (1e6,)), ("1e6,2e6", (1e6, 2e6)), ("none", ())])
def test_words_at_which_to_keep_the_model(said, kept):
    settings = settings_of("--preset", "babylm", "--train.save_words", said)
    assert trainer.TrainConfig(**settings["train"]).save_words == kept


def test_a_run_leaves_the_config_that_repeats_it(corpus, finished, tmp_path):
    again = ["--config", str(finished / "config.yaml"), "--train.out", str(tmp_path), "--train.run_name", "again"]
    main(again)
    assert losses(tmp_path / "again", "train_loss") == losses(finished, "train_loss")
    first, second = (yaml.safe_load((run / "config.yaml").read_text()) for run in (finished, tmp_path / "again"))
    assert first["train"].pop("out") != second["train"].pop("out") and first == second


@pytest.mark.parametrize(
    "bad",
    [
        ["--train.step", "7"],
        ["--train.compile", "perhaps"],
        ["--train.lr_schedule", "flat"],
        ["--preset", "huge"],
        ["--train.embed_betas", "0.9"],
        ["--train.steps", "many"],
        ["--model.vocab_size", "9"],
        ["--config", "nowhere.yaml"],
        # Out of range
        ["--train.grad_accum", "0"],
        ["--train.max_minutes", "-1"],
        ["--train.lr_warmup", "2"],
        ["--train.mask_rate_end", "0"],
        ["--train.muon_polar_steps", "6"],
        ["--train.valid_every", "-1"],
        ["--data.valid_tokens", "0"],
    ],
)
def test_flags_that_mean_nothing_are_refused_in_one_line(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(bad)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and bad[0] in said


def test_a_setting_that_a_config_leaves_empty_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("train:\n  max_minutes:\n  mask_rate_end:\n")
    with pytest.raises(SystemExit):
        settings_of("--config", str(tmp_path / "config.yaml"))
    assert "error: --train.mask_rate_end has no value" in capsys.readouterr().err


def test_help_names_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--train.max_minutes X minutes of training time" in said
        and "optimizer steps [10000]" in said
        and "--model.*" in said
    )


# --- counting


def test_flops_count_what_is_attended_to():
    config = KBERTConfig(
        vocab_size=100, num_hidden_layers=4, hidden_size=64, num_attention_heads=2, intermediate_size=128
    )
    lengths = np.array([3, 20, 40, 100])
    pairs = {None: 0, 16: 0}
    for window in pairs:
        for n in lengths:
            at = np.arange(n)
            pairs[window] += int((np.abs(at[:, None] - at) <= (n if window is None else window // 2)).sum())
    matrices = 2 * lengths.sum() * sum(r * c for r, c in [(192, 64), (64, 64), (256, 64), (64, 128)]) * 4
    attention = 2 * 2 * 64 * (2 * pairs[None] + 2 * pairs[16])  # two products a pair; layers 0 and 3 are global
    work = Work()
    work.add(lengths[:2], 4, 16)
    work.add(lengths[2:], 6, 16)
    whole = 3 * (matrices + attention + 2 * 10 * 64 * 100)
    assert work.training_flops(config, WHOLE_LAST_LAYER) == whole
    assert work.training_flops(config, MASKED_LAST_LAYER) == whole - 3 * 2 * (lengths.sum() - 10) * sum(
        r * c for r, c in [(64, 64), (256, 64), (64, 128)]
    )


def test_log_lines_match_the_one_expression():
    line = log_line(120, 4000, 61.234, train_loss=4.1234, tokens=123456, flops=1.5e12, mfu=0.4567)
    speed = "train_time:61234ms step_avg:510.28ms tokens:123456 flops:1.500000e+12 mfu:0.4567"
    assert line == f"step:120/4000 train_loss:4.1234 {speed}"
    assert LOG_LINE.match(line)["train_loss"] == "4.1234" and LOG_LINE.match(line)["val_loss"] is None
    assert LOG_LINE.match(log_line(0, None, 0.0, val_loss=9.0, tokens=0, flops=0.0, mfu=0.0))["steps"] == "-"


# --- masks


def rows_of(corpus, count, split="train", **keywords):
    loader = iter(Loader(corpus, read_manifest(corpus), split, 256, 100, seed=3, **keywords))
    return [next(loader) for _ in range(count)]


def test_masks_take_text_only_and_do_not_depend_on_ranks(corpus):
    for row in rows_of(corpus, 5):
        ids, _, _, masked, targets = draw_masks(row, 64, seed=1, mask_id=SPECIALS["mask"])
        assert len(masked) == len(set(masked.tolist())) == 64 and row.text[masked].all()
        assert (ids[masked] == SPECIALS["mask"]).all() and torch.equal(targets, row.input_ids[masked].long())
        kept = torch.ones(256, dtype=torch.bool).index_fill(0, masked, False)
        assert torch.equal(ids[kept], row.input_ids[kept])
    other = [rows_of(corpus, 3, rank=rank, world_size=2) for rank in (0, 1)]
    for row, twin in zip(rows_of(corpus, 6), [row for pair in zip(*other) for row in pair]):
        assert torch.equal(draw_masks(row, 64, 1, 3)[3], draw_masks(twin, 64, 1, 3)[3])
    assert not torch.equal(draw_masks(row, 64, 1, 3)[3], draw_masks(row, 64, 2, 3)[3])


def test_a_row_with_little_text_masks_what_it_has(tmp_path):
    path = write_documents(tmp_path, {"train": [[[5, 6, 7]]]})
    (row,) = rows_of(path, 1)
    ids, _, _, _, targets = draw_masks(row, 16, seed=1, mask_id=3)
    assert sorted(targets.tolist())[-3:] == [5, 6, 7] and (targets == -100).sum() == 13
    assert (ids == SPECIALS["cls"]).sum() == 1 and (ids == SPECIALS["sep"]).sum() == 1 and (ids == 3).sum() == 3


def test_frozen_masks_follow_the_token_not_the_row():
    offsets = np.arange(100_000)
    mask = frozen_mask(offsets)
    assert mask.mean() == pytest.approx(0.15, abs=0.005)
    assert (frozen_mask(offsets[5000:6000]) == mask[5000:6000]).all()
    assert not frozen_mask(np.full(100, -1)).any()
    assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 0.02


def test_one_graph_serves_every_row_and_masking_rate(corpus, monkeypatch):
    """What a GPU compiles, by the compiler's front end alone, and that it is the loss of the other attention."""
    model = tiny(vocab_size=64, hidden_size=128, num_attention_heads=2)
    rows = iter(Loader(corpus, read_manifest(corpus), "train", 1024, 100, seed=1))
    monkeypatch.setattr(objectives, "compiled_backend", lambda device: "flex")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    compiled, eager = (
        compile_rows(model.loss, model.encoder, compiled=True),
        compile_rows(model.loss, model.encoder, compiled=False),
    )
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for count in (64, 128, 192, 256, 65):
            row, masked = next(rows), torch.arange(0, 1024, 4)[:count]
            arguments = row.input_ids, row.document_ids, row.positions, masked, row.input_ids[masked].long()
            torch.testing.assert_close(
                compiled(*arguments, max_seqlen=100, window=16),
                eager(*arguments, max_seqlen=100, window=16),
                rtol=1e-4,
                atol=1e-4,
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_many_windows_are_compiled_and_too_many_are_an_error(corpus, monkeypatch):
    """A window beyond the compiler's limit would run eagerly, and write out T x T scores on a GPU."""
    model = tiny(vocab_size=64, hidden_size=128, num_attention_heads=2, num_hidden_layers=2)
    row = next(iter(Loader(corpus, read_manifest(corpus), "train", 1024, 100, seed=1)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    loss_of, masked_row = compile_rows(model.loss, model.encoder, compiled=True), draw_masks(row, 64, 1, 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for window in range(16, 10 * 16, 16):  # dynamo's own limit is 8
            loss_of(*masked_row, max_seqlen=100, window=window)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9
        with torch._dynamo.config.patch(recompile_limit=9), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            loss_of(*masked_row, max_seqlen=100, window=1000)


# --- the run


def test_golden_losses(finished):
    """A change here is a change of the training itself: say why in the commit."""
    assert list(losses(finished, "train_loss").values()) == pytest.approx(GOLDEN, abs=0.02)


def test_a_run_learns_and_leaves_what_it_says(finished):
    valid = losses(finished, "val_loss")
    assert (
        list(valid) == [0, 10, 20] and valid[0] == pytest.approx(math.log(64), abs=0.1) and valid[20] < valid[0] - 0.3
    )
    assert {path.name for path in finished.iterdir()} == {
        "log.txt",
        "metrics.jsonl",
        "config.yaml",
        "curves.png",
        "checkpoints",
        "model",
    }
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-000010", "step-000020"]
    text = (finished / "log.txt").read_text()
    for title in ("command", "config", "environment", "data", "code", "run", "result"):
        assert f"\n=== {title}\n" in "\n" + text
    assert (ROOT / "optimizer.py").read_text() in text
    result = json.loads(text.split("=== result\n")[1].splitlines()[0])
    last = lines(finished)[-1]
    assert int(last["tokens"]) == result["work"]["tokens"] and float(last["val_loss"]) == pytest.approx(
        result["val_loss"], abs=1e-4
    )
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "train_loss" in m] == list(range(1, 21))
    card = (finished / "model" / "README.md").read_text()
    assert f"{result['val_loss']:.4f}" in card
    readme = (ROOT / "README.md").read_text()
    ours, readmes = (re.search(r"```python\n(import torch\n[^`]+Muon[^`]+)```", text)[1] for text in (card, readme))
    assert ours.replace(f"{finished}/model", "logs/RUN/model") == readmes
    assert f'pipeline("fill-mask", "{finished}/model", trust_remote_code=True)' in card


def test_tokens_are_those_of_the_rows(finished, corpus):
    loader = iter(Loader(corpus, read_manifest(corpus), "train", 256, 100, seed=1))
    assert int(lines(finished)[-1]["tokens"]) == sum(
        int((next(loader).input_ids != SPECIALS["pad"]).sum()) for _ in range(20 * 6)
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_one_and_the_same_training(corpus, finished, tmp_path, ranks):
    result = run_python("trainer.py", *flags(corpus, tmp_path, "ranks"), processes=ranks)
    assert result.returncode == 0, result.stderr
    alone, together = lines(finished), lines(tmp_path / "ranks")
    assert [line["tokens"] for line in alone] == [line["tokens"] for line in together]
    assert [line["flops"] for line in alone] == [line["flops"] for line in together]
    for kind in ("train_loss", "val_loss"):
        assert losses(tmp_path / "ranks", kind) == pytest.approx(losses(finished, kind), abs=0.01)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_weights_validate_to_the_same_loss_on_any_ranks(corpus, finished, tmp_path, ranks):
    """Those of the last checkpoint, on the test set: what a log says of a validation is not asked again."""
    shutil.copytree(finished, tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "checkpoints" / "step-000020"
    result = run_python("trainer.py", *flags(corpus, tmp_path, "copy", "--train.resume", checkpoint), processes=ranks)
    assert result.returncode == 0, result.stderr
    alone, together = (read_log(run).named("result", "test_loss") for run in (finished, tmp_path / "copy"))
    assert together == pytest.approx(alone, abs=1e-4) and losses(tmp_path / "copy", "val_loss")[20]


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(corpus, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "model")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-000020")
    main(flags(corpus, tmp_path, "killed", "--train.resume", "auto"))
    for file in ("model/model.safetensors", "checkpoints/step-000020/optimizer.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (finished / file).read_bytes()
    assert losses(tmp_path / "killed", "train_loss") == losses(finished, "train_loss")


def test_a_deterministic_run_is_bit_identical_and_needs_a_setting_of_cublas(corpus, finished, tmp_path, monkeypatch):
    main(flags(corpus, tmp_path, "same", "--train.deterministic true"))
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    model = "model/model.safetensors"
    assert (tmp_path / "same" / model).read_bytes() == (finished / model).read_bytes()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    process = types.SimpleNamespace(device=torch.device("cuda"))
    run = types.SimpleNamespace(process=process, train=TrainConfig(deterministic=True))
    with pytest.raises(InputError, match="needs `export CUBLAS_WORKSPACE_CONFIG=:4096:8`"):
        trainer.Run.build_model(run)


def test_checkpoints_ahead_of_the_one_resumed_are_set_aside(corpus, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "back")
    saved = tmp_path / "back" / "checkpoints"
    shutil.copytree(saved / "step-000020", saved / "step-000030")
    back = [
        "--train.resume",
        saved / "step-000010",
        "--train.steps 14 --train.save_every 14 --train.keep_checkpoints 2",
    ]
    main(flags(corpus, tmp_path, "back", *back))
    assert sorted(path.name for path in saved.iterdir()) == ["step-000010", "step-000014"]
    aside = tmp_path / "back" / "abandoned"
    assert sorted(path.name for path in aside.glob("step-*")) == ["step-000020", "step-000030"]
    assert str(aside / "step-000020") in capsys.readouterr().out
    assert trainer.find_checkpoint("auto", tmp_path, "back").name == "step-000014"


def test_the_code_in_the_log_is_what_ran(corpus, tmp_path, monkeypatch):
    """Also when a module is edited while the run compiles."""
    for name in trainer.MODULES:
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "code" / name)
    monkeypatch.setattr(records.log, "ROOT", tmp_path / "code")
    monkeypatch.setattr(trainer, "warm_up", lambda *_: (tmp_path / "code" / "model.py").write_text("edited = True\n"))
    main(flags(corpus, tmp_path, "edited", "--train.steps 1 --train.save_every 0"))
    assert read_log(tmp_path / "edited").code["model.py"] == (ROOT / "model.py").read_text()


def test_a_plot_that_fails_ends_nothing(corpus, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(records.plot, "draw", broken)
    main(flags(corpus, tmp_path, "plain", "--train.steps 1 --train.save_every 0"))
    said = capsys.readouterr().out
    assert "model FLOPs" in said and "no curves.png (RuntimeError: no font)" in said


@pytest.mark.parametrize("finished", [True, False])
def test_uploads_are_waited_for_when_the_other_ranks_are_gone(tmp_path, capsys, finished):
    """Also after SIGTERM; a slow Hub must not keep ranks in a collective until that gives up."""
    done = []
    hub = types.SimpleNamespace(finish=lambda: done.append("waited"), push=lambda folder, name: done.append(name))
    log = types.SimpleNamespace(bar=types.SimpleNamespace(close=lambda: None), wandb_run=None)
    objective = types.SimpleNamespace(parts=lambda: ("", "generator"))
    run = types.SimpleNamespace(process=ALONE, hub=hub, log=log, step=7, folder=tmp_path, print_summary=lambda: None)
    run.objective = objective
    assert not torch.distributed.is_initialized()
    trainer.Run.report(run, finished)
    assert done == (["main", "generator", "waited"] if finished else ["waited"])
    assert ("--train.resume auto" in capsys.readouterr().out) != finished


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_once_and_exits(corpus, tmp_path, number, code):
    arguments = flags(corpus, tmp_path, "term", "--train.steps 100_000 --train.save_every 0")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "trainer.py", *arguments], cwd=ROOT, text=True, **pipes)
    log, deadline = tmp_path / "term" / "log.txt", time.monotonic() + 120
    try:
        while not (log.exists() and "step:7/" in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        said, wrong = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in wrong
    last = int(lines(tmp_path / "term")[-1]["step"])
    assert said.endswith(f"\nstopped at step {last}; continue with --train.resume auto\n") and last >= 7
    (checkpoint,) = (tmp_path / "term" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] == int(checkpoint.name[5:]) == last


@pytest.mark.parametrize(
    "seconds, minutes, asked",
    [(0.01, None, [0, 1, 10, 20]), (4.0, None, [0, 1, *range(2, 25, 2)]), (0.01, 9.0, list(range(25)))],
)
def test_ranks_look_for_signals_every_ten_seconds(seconds, minutes, asked):
    """torchrun kills thirty seconds after SIGTERM: ten steps may take longer. By the clock, all end at one step."""
    steps = []
    process = types.SimpleNamespace(world_size=2, max=lambda *values: steps.append(run.step) or values)
    run = types.SimpleNamespace(process=process, train=TrainConfig(log_every=10, max_minutes=minutes), agree_every=1)
    run.clock = types.SimpleNamespace(now=lambda: run.step * seconds)
    for run.step in range(25):
        trainer.Run.agree(run, [])
    assert steps == asked


def test_a_run_by_the_clock_ends_when_its_time_is_up(corpus, tmp_path):
    main(flags(corpus, tmp_path, "clock", "--train.max_minutes", "0.03"))
    last = lines(tmp_path / "clock")[-1]
    assert last["steps"] == "-" and 1800 <= int(last["train_time"]) < 1800 + 2000 and last["val_loss"]


def test_batch_and_window_schedules_run(corpus, tmp_path):
    main(
        flags(
            corpus,
            tmp_path,
            "schedules",
            "--train.batch_start",
            "0.5",
            "--train.batch_ramp",
            "0.6",
            "--train.window_start",
            "64",
            "--model.local_attention_window",
            "128",
            "--train.grad_accum",
            "4",
            "--train.save_every",
            "0",
            "--train.steps",
            "8",
        )
    )
    metrics = metrics_of(tmp_path / "schedules")
    assert metrics[0]["batch_tokens"] == 512 and metrics[-1]["batch_tokens"] == 1024
    assert metrics[0]["window"] == 64 and metrics[-1]["window"] == 128
    factors = [metrics[step]["lr_factor"] for step in (1, -1)]
    assert factors == pytest.approx([0.625 * 0.5**0.5, 0.2875])  # a smaller batch takes smaller steps


def test_compiled_and_eager_training_agree(corpus, finished, tmp_path):
    if trainer.why_eager(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    main(flags(corpus, tmp_path, "compiled", "--train.compile", "true"))
    # Rounding alone is 0.03 after twenty steps; both gradients are as far from those in fp32
    assert losses(tmp_path / "compiled", "val_loss") == pytest.approx(losses(finished, "val_loss"), abs=0.05)


def test_without_a_compiler_it_says_so_once_and_runs(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    main(flags(corpus, tmp_path, "eager", "--train.compile", "true", "--train.steps", "1"))
    assert capsys.readouterr().out.count("no C++ compiler found: install g++") == 1


# --- the Hub


def test_a_run_pushes_model_and_checkpoints(corpus, word_tokenizer, tmp_path):
    from dataloading import sha256_of

    data = write_documents(
        tmp_path / "data",
        {"train": [sentences(1, 200, 17)], "valid": [sentences(3, 40, 17)]},
        vocab_size=17,
        tokenizer=sha256_of(word_tokenizer / "tokenizer.json"),
    )
    shutil.copytree(word_tokenizer, data / "tokenizer")
    with Hub() as hub:
        arguments = flags(data, tmp_path, "pushed", "--train.hf_model_name me/tiny")
        result = run_python("trainer.py", *arguments, env=hub.environment(tmp_path))
        assert result.returncode == 0, result.stderr
        pushed = hub.files("model", "me/tiny", "main")
        assert {"model.safetensors", "config.json", "model.py", "tokenizer.json", "README.md"} <= set(pushed)
        for branch in ("step-000010", "step-000020"):
            assert "model.safetensors" in hub.files("model", "me/tiny", branch)
        assert pushed["model.safetensors"] == (tmp_path / "pushed" / "model" / "model.safetensors").read_bytes()
        code = (
            "import sys; from transformers import pipeline; "
            "print(len(pipeline('fill-mask', 'me/tiny', trust_remote_code=True)('the cat [MASK] on')))"
        )
        loaded = run_python("-c", code, env=hub.environment(tmp_path))
        assert loaded.returncode == 0 and loaded.stdout.strip().endswith("5"), loaded.stderr
        assert not telling(tmp_path) and TOKEN not in result.stdout + result.stderr
        heads = hub.repos["model", "me/tiny"].values()
        assert not [path for head in heads for path, content in head["files"].items() if TOKEN.encode() in content]


def test_a_failing_hub_never_stops_a_run(corpus, tmp_path):
    with Hub() as hub:
        hub.broken = "commit"
        arguments = flags(corpus, tmp_path, "unpushed", "--train.hf_model_name me/tiny")
        (tmp_path / "token").write_text(TOKEN)  # where `hf auth login` leaves it
        environment = {**hub.environment(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_TOKEN": ""}
        result = run_python("trainer.py", *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    assert telling(tmp_path) == [tmp_path / "token"] and TOKEN not in result.stdout + result.stderr
    assert "hf upload me/tiny" in result.stdout and (tmp_path / "unpushed" / "model" / "model.safetensors").exists()
    assert (tmp_path / "unpushed" / "to_push" / "step-000010" / "model.safetensors").exists()


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, for what runs in this process."""
    with Hub() as hub:
        monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=hub.url))
        yield hub
    huggingface_hub.close_session()  # which has the time limit


def test_a_hub_that_never_answers_is_given_up(hub, tmp_path, capsys):
    pusher = trainer.HubPusher("me/tiny", 0.01)
    hub.silent = "whoami"
    with pytest.raises(InputError, match="no answer for the 0.01 minutes of --train.hub_minutes"):
        pusher.check()
    hub.silent = "branch"
    pusher.check()
    for name in ("one", "main"):
        (tmp_path / "to_push" / name).mkdir(parents=True)
        (tmp_path / "to_push" / name / "config.json").write_text("{}")
    pusher.push(tmp_path / "to_push" / "one", "one")
    pusher.push(tmp_path / "to_push" / "main", "main")
    pusher.pending[1][2].result()
    assert [path.name for path in trainer.unpushed(tmp_path)] == ["one"]  # while the run goes on
    pusher.finish()
    said = capsys.readouterr().out
    assert said.count("no answer for") == 1 and said.endswith(f"{tmp_path}/to_push/one . --revision one\n")
    assert set(hub.files("model", "me/tiny")) == {"config.json"}
    assert [path.name for path in trainer.unpushed(tmp_path)] == ["one"]


def test_training_does_not_wait_for_the_hub(hub, tmp_path):
    pusher = trainer.HubPusher("me/tiny", 10)
    pusher.check()
    hub.silent = ""
    (tmp_path / "config.json").write_text("{}")
    pusher.push(tmp_path, "one")
    hub.speak.set()
    pusher.finish()
    assert set(hub.files("model", "me/tiny", "one")) == {"config.json"}


def test_what_a_killed_run_did_not_push_is_pushed_by_the_next(corpus, hub, tmp_path, monkeypatch, capsys):
    again = flags(corpus, tmp_path, "run", "--train.hf_model_name me/tiny --train.resume auto --train.steps 4")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.HubPusher, "push", lambda *_: None)
        main([*again, "--train.save_every", "2"])
    kept = shutil.copytree(tmp_path / "run" / "to_push" / "main", tmp_path / "run" / "to_push" / "chck_1M")
    main(again)
    said = capsys.readouterr().out.splitlines()
    names = ("chck_1M", "main", "step-000002", "step-000004")
    commands = [f"hf upload me/tiny {kept.with_name(name)} . --revision {name}" for name in names]
    assert [line.split("with:  ")[1] for line in said if "push it later" in line] == commands
    log = tmp_path / "run" / "log.txt"
    log.write_text(log.read_text().split("=== result\n")[0])
    main(again)
    assert set(hub.repos["model", "me/tiny"]) == set(names) and not trainer.unpushed(tmp_path / "run")
    assert all("model.safetensors" in hub.files("model", "me/tiny", name) for name in names)


def test_wandb_is_imported_only_when_asked_for(corpus, tmp_path, monkeypatch):
    assert "wandb" not in sys.modules
    with pytest.raises(InputError, match="pip install wandb"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        main(flags(corpus, tmp_path, "missing", "--train.wandb_project", "p"))
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **keywords: run))
    main(flags(corpus, tmp_path, "reported", "--train.wandb_project p --train.steps 2 --train.save_every 0"))
    assert [step for step, _ in logged[:-1]] == [0, 1, 2, 2] and "val_loss" in logged[0][1] and logged[-1] == "finished"


# --- bad input: one sentence and a non-zero exit, on every rank


def failure(corpus, tmp_path, *more, processes=1, env=None) -> str:
    result = run_python("trainer.py", *flags(corpus, tmp_path, "bad", *more), processes=processes, env=env, timeout=120)
    assert result.returncode != 0
    found = [line for line in result.stderr.splitlines() if "error: " in line and "ERROR" not in line]
    said = [line[line.index("error: ") :] for line in found]
    assert len(said) == processes or processes > 1 and said, result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]
    return said[0]


def test_no_data_says_which_command_brings_some(tmp_path, monkeypatch):
    said = failure(tmp_path / "fineweb_edu", tmp_path, processes=2)
    script, *arguments = re.search(r"`python (data/download_fineweb_edu.py .+?)`", said)[1].split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(download_fineweb_edu, "list_shards", lambda *_: sys.exit("the flags are right"))
    with pytest.raises(SystemExit, match="the flags are right"):
        download_fineweb_edu.main()


@pytest.mark.parametrize("seed", (-1, 2**24))
def test_a_seed_that_cannot_be_is_refused(corpus, tmp_path, seed, capsys):
    with pytest.raises(SystemExit):
        main(flags(corpus, tmp_path, "seed", f"--train.seed {seed}"))
    assert "--train.seed" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_gone_on_with(corpus, finished, tmp_path):
    before = story_of(finished)
    step = finished / "checkpoints" / "step-000010"
    with pytest.raises(InputError, match=f"step-000010 is of the run {finished.name}, not of branch"):
        main(flags(corpus, finished.parent, "branch", "--train.resume", step))
    assert story_of(finished) == before and not (finished.parent / "branch").exists()


def story_of(run: Path) -> dict[str, int]:
    return {path.relative_to(run).as_posix(): path.stat().st_size for path in run.rglob("*")}


def test_settings_that_a_resumed_run_changes_are_logged(corpus, tmp_path):
    main(flags(corpus, tmp_path, "run", "--train.steps 4 --train.save_every 2"))
    (tmp_path / "run" / "checkpoints" / "step-000004").rename(tmp_path / "aside")
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    main(
        flags(corpus, tmp_path, "run", "--train.steps 5 --train.save_every 2 --train.muon_lr 0.01 --train.resume", step)
    )
    said = read_log(tmp_path / "run").sections["resumed"].splitlines()
    assert said == ["step-000002", "train.steps: 5, before: 4", "train.muon_lr: 0.01, before: 0.03"]
    state = step / "state.json"
    write_json(state, json.loads(state.read_text()) | {"world_size": 8})
    (step / "SHA256SUMS").unlink()
    trainer.write_hashes(step)
    main(flags(corpus, tmp_path, "run", "--train.steps 4 --train.save_every 2 --train.resume", step))
    assert read_log(tmp_path / "run").sections["resumed"].splitlines() == ["step-000002", "ranks: 1, before: 8"]


def test_a_test_set_that_is_damaged_costs_no_model(tmp_path):
    data = write_documents(
        tmp_path / "data", {"train": [sentences(1, 300)], "valid": [sentences(3, 60)], "test": [sentences(4, 40)]}
    )
    shard = data / "test_test_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x07\x00")
    with pytest.raises(InputError, match="test_test_000000.bin"):
        main(flags(data, tmp_path, "run", "--train.steps 2 --train.save_every 0"))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_row_that_is_mostly_padding_is_not_masked_whole(tmp_path):
    """As the last row of each epoch may be."""
    assert mask_count(0.3, 8192) == mask_count(0.3, 8192, 5000) == 2464 and mask_count(0.3, 8192, 2000) == 608
    data = write_documents(tmp_path / "data", {"train": [sentences(1, 4)], "valid": [sentences(3, 60)]})
    text = count_text(read_manifest(data))[0]
    assert 100 < text < 500
    main(flags(data, tmp_path, "run", "--train.row_tokens 1024 --train.batch_tokens 1024 --train.steps 4"))
    work = read_log(tmp_path / "run").named("result", "work")
    assert work["text"] == 4 * text and 0.2 < work["masked"] / work["text"] < 0.45


@pytest.mark.parametrize(
    "more, message",
    [
        (["--train.batch_tokens", "1000"], "use --train.batch_tokens 1024"),
        (["--train.row_tokens", "200"], "not a multiple of 128: try 128"),
        (["--data.max_length", "300"], "longer than a row"),
        (["--model.num_attention_heads", "5"], "must divide hidden_size"),
        (["--train.resume", "nowhere"], "is not a checkpoint"),
    ],
)
def test_bad_settings_are_one_sentence(corpus, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        main(flags(corpus, tmp_path, "bad", *more))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start again with --nproc_per_node=1"), trainer.join_processes():
        pass


@pytest.mark.parametrize(
    "compiler, header, capability, said",
    [
        ("gcc", True, (9, 0), None),
        (None, True, (9, 0), "no C compiler found: install gcc"),
        ("gcc", False, (9, 0), "install python3-dev"),
        ("gcc", True, (7, 5), "fp32"),
    ],
)
def test_what_a_gpu_needs_to_compile(tmp_path, monkeypatch, compiler, header, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(trainer.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(trainer.sysconfig, "get_path", lambda name: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    gpu = torch.device("cuda")
    assert trainer.why_eager(gpu) is None if said is None else said in trainer.why_eager(gpu)
    assert trainer.compute_dtype(gpu) == (torch.float32 if capability < (8, 0) else torch.bfloat16)


def test_a_driver_that_torch_cannot_use_is_an_error(monkeypatch):
    """Eight ranks that train on the CPU without a word would cost hours."""
    real = Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version" or real(path))
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "NVRM version: 470\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="NVRM version: 470.*update the driver.*--train.device cpu"):
        trainer.choose_cuda("auto")
    assert not trainer.choose_cuda("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not trainer.choose_cuda("auto")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(records.log, "measured_flops", lambda device: None)
    assert peak_flops(torch.device("cuda")) == peak


RANKS = """
import trainer

class Missing(trainer.InputError):
    pass

def missing():
    raise Missing("gone")

with trainer.join_processes() as process:
    for work in (missing, lambda: 1 / 0, lambda: "nothing"):
        try:
            said = process.on_main(work)
        except Exception as error:
            said = type(error).__name__
        print(f"{said}\\n", end="", flush=True)  # in one piece: the other rank writes too
"""


def test_ranks_share_what_rank_0_finds_out(tmp_path):
    """The exception itself, of whatever class; and a defect on rank 0 does not leave the others waiting."""
    (tmp_path / "ranks.py").write_text(RANKS)
    result = run_python(tmp_path / "ranks.py", processes=2, timeout=60)
    assert result.returncode == 0, result.stderr
    expected = ["InputError", "Missing", "Missing", "ZeroDivisionError", "nothing", "nothing"]
    assert sorted(result.stdout.split()) == expected


@pytest.mark.parametrize(
    "said", ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "NCCL error: Failed to CUDA malloc, out of memory")
)
def test_a_row_that_does_not_fit_makes_room_for_the_next(said):
    """Whoever runs out of it: torch's allocator, cuBLAS, NCCL."""
    tried = []

    def attempt(row_tokens: int) -> None:
        tried.append(row_tokens)
        if row_tokens > 256:
            raise RuntimeError(said)

    assert trainer.fit_row_tokens([1024, 512, 256, 128], ALONE, attempt) == 256 and tried == [1024, 512, 256]
    with pytest.raises(InputError, match="rows of 512 tokens do not fit"):
        trainer.fit_row_tokens([1024, 512], ALONE, attempt)
    with pytest.raises(ZeroDivisionError):
        trainer.fit_row_tokens([128], ALONE, lambda row_tokens: 1 / 0)


def test_ranks_that_nccl_cannot_connect_are_told_of_shared_memory(monkeypatch):
    def fail(*_, **__):
        raise torch.distributed.DistBackendError(
            "NCCL error in init.cc\nLast error:\nError while creating shared memory"
        )

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(InputError, match="rank 0 with the others .* creating shared memory.* --shm-size=1g"):
        trainer.join_group(torch.device("cpu"), 0, 2, timedelta(minutes=1))


MEMORY = """
import os, sys, torch, trainer

def too_large(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")

if os.environ["RANK"] == "1":
    trainer.warm_up = too_large
try:
    trainer.main(sys.argv[1:])
except trainer.InputError as error:
    sys.exit(f"error: {error}")
"""


def test_a_row_that_does_not_fit_on_one_rank_ends_all(corpus, tmp_path):
    (tmp_path / "memory.py").write_text(MEMORY)
    result = run_python(tmp_path / "memory.py", *flags(corpus, tmp_path, "big"), processes=2, timeout=60)
    assert result.returncode != 0 and "do not fit into this GPU's memory" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]


def test_heads_too_narrow_for_a_gpu_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "compiled_backend", lambda device: "flex")
    with pytest.raises(InputError, match="heads are 8 wide, .* lower --model.num_attention_heads to 4 at most"):
        narrow = "--model.num_attention_heads 8 --model.hidden_size 64 --train.compile true"
        main(flags(corpus, tmp_path, "narrow", narrow))


def test_a_copy_for_the_hub_that_finds_no_room_ends_nothing(tmp_path, capsys):
    def write(into: Path) -> None:
        (into / "half").write_text("a")
        raise OSError(28, "No space left on device")

    assert trainer.Run.to_push(types.SimpleNamespace(folder=tmp_path), "main", write) is None
    assert "No space left on device), so it is not pushed" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_sample_is_found_from_any_folder(tmp_path, monkeypatch):
    sample = tmp_path / "checkout" / "data" / "sample"
    sample.mkdir(parents=True)
    (sample / "manifest.json").write_text("{}")
    monkeypatch.setattr(trainer, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    assert trainer.locate_data("data/sample", ALONE) == sample
    assert trainer.locate_data("data/mine", ALONE) == Path("data/mine")


def test_a_token_beyond_the_vocabulary_reaches_every_rank(tmp_path):
    path = write_documents(tmp_path / "data", {"train": [sentences(1, 50, vocab_size=90)], "valid": [sentences(2, 20)]})
    assert "beyond the vocabulary of 64" in failure(path, tmp_path, processes=2)


def test_a_run_is_never_overwritten(corpus, finished):
    with pytest.raises(InputError, match="holds a run already"):
        main(flags(corpus, finished.parent, "finished"))


def test_a_resumed_run_keeps_its_rows(corpus, finished, tmp_path):
    """On another GPU, or beside another process, other rows would fit."""
    shutil.copytree(finished, tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "checkpoints" / "step-000010"
    main(flags(corpus, tmp_path, "moved", "--train.resume", checkpoint, "--train.row_tokens none --train.steps 11"))
    assert metrics_of(tmp_path / "moved")[-1]["batch_tokens"] == 1536


def test_a_checkpoint_of_other_settings_is_refused(corpus, counted, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    checkpoint = tmp_path / "other" / "checkpoints" / "step-000010"
    changes = {"--model.hidden_size 128": "model", "--train.seed 2": "seed", "--train.row_tokens 512": "row_tokens"}
    changes["--data.max_length 90"] = "model, max_length"
    for data, changed, said in [*((corpus, *pair) for pair in changes.items()), (counted, "", "data")]:
        with pytest.raises(InputError, match=rf"other settings \({said}\)"):
            main(flags(data, tmp_path, "other", "--train.resume", checkpoint, changed))


@pytest.mark.parametrize("omp, local, asked", [(None, 1, [6]), ("1", 1, []), ("1", 2, [3])])
def test_a_users_number_of_threads_holds_for_one_process(monkeypatch, omp, local, asked):
    called = []
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    monkeypatch.setattr(trainer, "usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    with trainer.join_processes("cpu"):
        assert called == asked


def test_validation_and_saving_stop_the_clock(counted, tmp_path, monkeypatch):
    running = {}

    def watch(name: str) -> None:
        method = getattr(trainer.Run, name)

        def watched(self, *rest):
            running.setdefault(name, set()).add(self.clock.started is not None)
            return method(self, *rest)

        monkeypatch.setattr(trainer.Run, name, watched)

    for name in ("validate", "write_checkpoint", "keep_model", "train_step"):
        watch(name)
    often = "--train.steps 4 --train.valid_every 2 --train.save_every 2 --train.save_words 1000"
    main(flags(counted, tmp_path, "run", often, "--train.log_every 100"))
    still = dict.fromkeys(("validate", "write_checkpoint", "keep_model"), {False})
    assert running == still | {"train_step": {True}}


def test_what_compiles_before_the_clock_moves_nothing(corpus, tmp_path, monkeypatch):
    held = []

    def hold(run, signals):
        held.append(run)
        run.stopped_by = 0
        return False

    monkeypatch.setattr(trainer.Run, "train_loop", hold)
    main(flags(corpus, tmp_path, "held"))
    (run,) = held
    assert run.optimizer.steps == 0 and run.clock.now() == 0
    assert not any(state.any() for group in run.optimizer.groups for state in group.state.values())
    torch.manual_seed(run.train.seed)
    fresh = trainer.make_objective(run.config, run.train, 100).network.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in run.objective.network.state_dict().items())


def test_no_hub_token_is_said_before_training(corpus, tmp_path):
    with Hub() as hub:
        environment = {**hub.environment(tmp_path), "HF_TOKEN": ""}
        hub.broken = "whoami"
        said = failure(corpus, tmp_path, "--train.hf_model_name me/tiny", processes=2, env=environment)
        assert "hf auth login" in said
    assert not list(tmp_path.glob("bad/checkpoints/*"))


def test_a_place_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in failure(corpus, tmp_path, "--train.out", tmp_path / "file", processes=2)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(corpus, tmp_path):
    from safetensors.torch import load_file

    hot = "--train.embed_lr 1e38 --train.muon_lr 1e38 --train.lr_warmup 0.5 --train.valid_every"
    with pytest.raises(InputError, match=r"the loss of step \d+ is (nan|inf), .*rows \["):
        main(flags(corpus, tmp_path, "hot", hot, 0, "--train.save_every 0"))
    # Weights that a step has spoilt, found at a validation and at a checkpoint, before the next step's loss tells
    with pytest.raises(InputError, match=r"the validation loss after step \d+ is nan, and nothing was saved"):
        main(flags(corpus, tmp_path, "judged", hot, 1, "--train.save_every 0"))
    with pytest.raises(InputError, match=r"the weights after step \d+ are not finite: .* go on from .*step-00000\d"):
        main(flags(corpus, tmp_path, "saved", hot, 0, "--train.save_every 1"))
    weights = [load_file(path) for path in tmp_path.glob("saved/checkpoints/*/model.safetensors")]
    assert weights and all(torch.isfinite(tensor).all() for named in weights for tensor in named.values())
