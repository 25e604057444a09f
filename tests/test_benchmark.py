"""Every mode of tests/benchmark.py that a CPU can run, on a tiny model: not how fast, but that it is what it says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import first_hour
from conftest import ROOT, run_python
from tests.benchmark import time_ways

EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # other tests compile
TINY = ("--layers", 2, "--hidden", 64, "--heads", 1, "--intermediate", 64, "--row-tokens", 256, "--max-length", 96)


def benchmark(corpus: Path, tmp_path: Path, *arguments: object, env: dict | None = None) -> dict:
    out = tmp_path / "result.json"
    result = run_python("tests/benchmark.py", "--data", corpus, *TINY, *arguments, "--out", out, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())


def test_a_step_is_measured_beside_the_reference_in_each_shape(corpus, tmp_path):
    found = benchmark(corpus, tmp_path, "--rounds", 1, "--steps", 1, "--reference-row-tokens", 192, env=EAGER)
    shapes = {"bucketed eager", "concatenated eager", "concatenated compiled"}
    assert set(found["variants"]) == {f"modernbert {shape}" for shape in shapes}
    assert found["reference_tokens_per_s"] == max(found["variants"].values())
    assert found["ratio"] == pytest.approx(found["ours_tokens_per_s"] / found["reference_tokens_per_s"], rel=0.05)


def test_a_profile_accounts_for_the_whole_step(corpus, tmp_path):
    shares = benchmark(corpus, tmp_path, "--profile")["shares"]
    assert {"matrix products", "attention", "elementwise", "optimizer"} <= set(shares)
    assert 0.99 < sum(shares.values()) < 1.5  # beyond 1 where two threads work at once


def test_the_padded_forward_is_measured_in_every_cell(corpus, tmp_path):
    rows = benchmark(corpus, tmp_path, "--inference", "--rounds", 1, env=EAGER)["serving"]
    assert len({(row["how"], row["batch"]) for row in rows}) == len(rows) and len(rows) in (16, 30)
    assert all(row["ratio"] == pytest.approx(row["kbert"] / row["modernbert"]) for row in rows)


def test_the_finetuner_is_measured_beside_the_trainers_way(corpus, tmp_path):
    found = benchmark(corpus, tmp_path, "--finetune", "--rounds", 1, "--steps", 1, env=EAGER)
    ours, *others = found["finetuning_examples_per_s"].values()
    assert len(others) == 2 and found["finetuning_ratio"] == pytest.approx(ours / max(others))


def test_a_way_to_attend_that_is_wrong_or_cannot_run_is_left_out(monkeypatch, capsys):
    def impossible(q, k, v, window):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ways = {
        "flex": lambda q, k, v, window: q * k,
        "as good": lambda q, k, v, window: k * q,
        "no number": lambda q, k, v, window: q * k / 0 * 0,
        "other": lambda q, k, v, window: q + k,
        "impossible": impossible,
    }
    q, k, v = (torch.randn(1, 8, 1, 4, requires_grad=True) for _ in range(3))
    assert set(time_ways(ways, q, k, v, None)) == {"flex", "as good"}
    said = capsys.readouterr().out
    assert "no number is left out (InputError: differs from flex by nan" in said
    assert "impossible is left out (RuntimeError: no such backend" in said


def test_the_loader_alone(corpus, tmp_path):
    assert benchmark(corpus, tmp_path, "--loader")["loader_tokens_per_s"] > 0


def test_the_sample_is_that_of_the_checkout_from_wherever_the_command_is_given(corpus, tmp_path):
    """trainer.py's way to find it, which builds it where it is missing."""
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    for pattern in ("*.py", "data/*.py", "records/*.py", "records/baseline/*.py", "tests/benchmark.py"):
        for path in ROOT.glob(pattern):
            (clone / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, clone / path.relative_to(ROOT))
    shutil.copytree(corpus, clone / "data" / "sample")
    elsewhere.mkdir()
    command = [sys.executable, clone / "tests" / "benchmark.py", *map(str, TINY), "--loader"]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "M tokens/s" in result.stdout


def test_the_first_hour_on_a_machine_without_a_gpu(tmp_path):
    """Two of its parts: the others take minutes each."""
    done = run_python("tests/first_hour.py", "--part", 1, "--part", 5, "--out", tmp_path / "hour")
    report = (tmp_path / "hour" / "report.md").read_text()
    assert done.returncode == 0, done.stdout
    assert "| tests/test_gpu.py | skipped | no GPU |" in report and "tokens/s, MFU" in report


def test_a_part_that_breaks_off_is_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(machine):
        """Broken."""
        yield "a figure", "ok", "1"
        raise RuntimeError("no log")

    def sound(machine):
        """Sound."""
        yield "another", "ok", "2"

    monkeypatch.setattr(first_hour, "PARTS", {1: broken, 2: sound})
    monkeypatch.setattr("sys.argv", ["first_hour.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        first_hour.main()
    report = (tmp_path / "report.md").read_text()
    assert ended.value.code == 1 and "| another | ok | 2 |" in report
    assert "| a figure | ok | 1 |\n| the rest of this part | FAILED | RuntimeError: no log |" in report


def test_a_command_of_the_first_hour_that_takes_too_long_is_ended(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import time\nprint('begun')\ntime.sleep(600)")
    machine = first_hour.Machine(tmp_path, torch.device("cpu"), gpus=0, minutes=1, small=True)
    done = machine.run("slow", str(script), timeout=5)
    assert done.returncode == 124 and done.stdout == "begun\n\nmore than 5 s"
    assert "begun" in (tmp_path / "slow.txt").read_text()


def test_what_to_expect_of_an_h100_is_what_the_notebook_computes():
    """151 ms for a row of 65,536 tokens."""
    assert first_hour.expectations() in (ROOT / "README.md").read_text()
    tokens, mfu = first_hour.expected_rate("base", "H100")
    assert tokens == pytest.approx(65_536 / 0.151, rel=0.02) and mfu == pytest.approx(0.34, abs=0.015)
