"""Every mode of tests/benchmark.py that a CPU can run, on a tiny model: not how fast it is, but that it measures what it says."""

from __future__ import annotations

import json
import math

import pytest

from conftest import run_python

TINY = ("--layers", 2, "--hidden", 64, "--heads", 1, "--intermediate", 64, "--row-tokens", 256, "--max-length", 96)


def benchmark(corpus, tmp_path, *arguments) -> dict:
    result = run_python("tests/benchmark.py", "--data", corpus, *TINY, *arguments, "--out", tmp_path / "result.json")
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / "result.json").read_text())


def test_a_step_is_measured_beside_the_reference_in_each_shape(corpus, tmp_path):
    found = benchmark(corpus, tmp_path, "--rounds", 1, "--steps", 1, "--reference-row-tokens", 192)
    assert set(found["variants"]) == {
        "modernbert bucketed eager",
        "modernbert concatenated eager",
        "modernbert concatenated compiled",
    }
    assert found["reference_tokens_per_s"] == max(found["variants"].values())
    assert found["ratio"] == pytest.approx(found["ours_tokens_per_s"] / found["reference_tokens_per_s"], rel=0.05)


def test_a_profile_accounts_for_the_whole_step(corpus, tmp_path):
    shares = benchmark(corpus, tmp_path, "--profile")["shares"]
    assert {"matrix products", "attention", "elementwise", "optimizer"} <= set(shares)
    assert 0.99 < sum(shares.values()) < 1.5  # beyond 1 where two threads work at once


def test_training_is_compared_by_the_same_validation_and_for_its_own_time(corpus, tmp_path):
    found = benchmark(
        corpus,
        tmp_path,
        "--train-minutes",
        0.02,
        "--reference-minutes",
        0.04,
        "--reference-lrs",
        1e-3,
        "--valid-tokens",
        1000,
    )
    ours, reference = found["curves"].values()
    # Nothing is learned before the clock starts; the reference spreads its guess over the padded vocabulary.
    assert ours[0][2] == pytest.approx(math.log(64), abs=0.1) and reference[0][2] == pytest.approx(
        math.log(128), abs=0.1
    )
    assert ours[-1][2] == found["ours_loss"] < ours[0][2]
    assert ours[-1][0] >= 0.02 * 60 and reference[-1][0] >= 0.04 * 60


def test_the_loader_alone(corpus, tmp_path):
    assert benchmark(corpus, tmp_path, "--loader")["loader_tokens_per_s"] > 0
