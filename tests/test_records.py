"""records/: a true record passes, and every forgery is caught, also by a forger who seals the log again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.transforms import Bbox
from transformers import AutoTokenizer

import finetuner
import trainer
from conftest import (
    ROOT,
    TINY_SHAPE,
    as_flags,
    flags,
    in_section,
    losses,
    metrics_of,
    run_python,
    sentences,
    telling,
    write_documents,
)
from data.tasks import TASKS
from dataloading import InputError, sha256_of
from records.baseline import modernbert
from records.leaderboard import BEGIN, END, draw_published, duration, matches, score_of, update
from records.log import LOG_LINE, WHOLE_LAST_LAYER, log_line, read_code, read_log, seal, split_code, with_header
from records.plot import draw, figure, series
from records.submit import extract, submit
from records.verify import (
    METRICS,
    RACES,
    check_run,
    check_systems_only,
    check_track,
    expected_steps,
    imports,
    measure,
    page,
    read_records,
    read_tracks,
    refusal,
    verify,
)

SHORT = {"steps": 8, "valid_every": 4, "log_every": 2, "save_every": 0, "declared_runs": 3}


def sealed(text: str) -> str:
    """A log with the hash that its lines ask for."""
    head, title, tail = text.rpartition("=== result\n")
    result = {name: value for name, value in json.loads(tail).items() if name != "sha256"}
    return f"{head}{title}{json.dumps({**result, 'sha256': seal(split_code(head)[0], result)})}\n"


MINUTES = itertools.count()


def at_its_own_minute(text: str) -> str:
    hour, minute = divmod(next(MINUTES), 60)
    return re.sub(r'("started": "\S+T)[\d:]+Z', rf"\g<1>{hour:02d}:{minute:02d}:00Z", text)


def retimed(text: str, seconds_a_step: float, jitter: float) -> str:
    """The same run on a faster or slower machine, consistent down to the hash."""
    text = at_its_own_minute(text)
    peak = json.loads(text.split("=== environment\n")[1].split("\n")[0])["peak_flops"]
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if match := LOG_LINE.match(line):
            step, flops = int(match["step"]), float(match["flops"])
            seconds = step * seconds_a_step + (jitter if step else 0)
            said = {name: float(match[name]) for name in ("train_loss", "val_loss") if match[name]}
            said |= {"tokens": int(match["tokens"]), "flops": flops, "mfu": flops / max(seconds, 1e-9) / peak}
            lines[number] = log_line(step, int(match["steps"]), seconds, **said)
        elif line.startswith('{"run"'):
            result = json.loads(line)
            lines[number] = json.dumps(result | {"seconds": result["step"] * seconds_a_step + jitter})
    return sealed("\n".join(lines))


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> list[Path]:
    """Three declared runs of 8 steps. Their times are set, so that no test depends on how busy this machine is."""
    out = tmp_path_factory.mktemp("declared")
    for seed in (1, 2, 3):
        settings = {f"train.{name}": value for name, value in (SHORT | {"seed": seed}).items()}
        trainer.main(flags(corpus, out, f"run-{seed}", *as_flags(settings)))
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def archive(runs, tmp_path_factory) -> Path:
    """A repository's records/ with two true records: the second is the first, twice as fast."""
    root = tmp_path_factory.mktemp("repository") / "records"
    root.mkdir()
    (root / "README.md").write_text("Rules.\n")
    (root.parent / "README.md").write_text(f"# Title\n{BEGIN}\n{END}\nThe rest.\n")
    log = read_log(runs[0])
    worst = max(read_log(run).named("result", "val_loss") for run in runs)
    data, environment = log.named("data"), log.named("environment")
    track = {
        "title": "for tests",
        "why": "",
        "target": {"metric": "val_loss", "value": worst + 0.5},
        "race": "seconds",
        "min_runs": 3,
        "max_length": 100,
        "data": {"hash": data["hash"], "tokenizer_sha256": data["tokenizer"], "validation": data["validation"]},
        "hardware": {"world_size": 1, "threads": environment["threads"]},
    }
    (root / "tracks.json").write_text(json.dumps({"tiny": track}))
    for name, seconds in (("before", 2.0), ("ours", 1.0)):
        folders = []
        for number, run in enumerate(runs):
            folders.append(tmp_path_factory.mktemp(f"{name}-{number}"))
            timed = retimed((run / "log.txt").read_text(), seconds, 0.01 * number)
            (folders[-1] / "log.txt").write_text(timed)
        said = {"track": "tiny", "name": name, "contributors": ["a", "b"], "what": "A test."}
        submit(root, folders, said | {"date": environment["started"][:10]})
    return root


def copied(archive: Path, into: Path) -> Path:
    """An archive of records to be forged, with the page that shows them beside it."""
    shutil.copy(archive.parent / "README.md", into)
    return shutil.copytree(archive, into / "records")


@pytest.fixture
def record(archive, tmp_path) -> Path:
    """The second record of a copy of the archive."""
    return next((copied(archive, tmp_path) / "tiny").glob("*_ours"))


def change(path: Path, edit: Callable[[str], str], seal: bool = True) -> None:
    before = path.read_text()
    after = edit(before)
    assert after != before
    path.write_text(sealed(after) if seal else after)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_track(record: Path, **values) -> None:
    """Of a record's track, in its copy of tracks.json."""
    path = record.parents[1] / "tracks.json"
    tracks = json.loads(path.read_text())
    tracks[record.parent.name] |= values
    path.write_text(json.dumps(tracks))


# --- a true record


def test_true_records_pass(archive):
    for folder in (archive / "tiny").iterdir():
        assert verify(folder) == []
    assert not telling(archive)
    ours = next((archive / "tiny").glob("*_ours"))
    said = json.loads((ours / "record.json").read_text())
    assert said["beats"].endswith("_before") and said["measured"]["n"] == 3
    assert said["measured"]["speedup"] == pytest.approx(2, rel=1e-3)
    assert {path.name for path in ours.iterdir()} == {"record.json", "logs", "README.md", "curve.png"}
    assert read_log(ours / "logs" / "1.txt").code == {name: (ROOT / name).read_text() for name in trainer.MODULES}
    assert "def " not in (ours / "logs" / "2.txt").read_text() and (ours / "curve.png").stat().st_size > 1000
    assert sum(path.stat().st_size for path in ours.rglob("*") if path.is_file()) < 300_000


def test_commands_say_what_they_found(archive, record):
    folders = [str(folder) for folder in (archive / "tiny").iterdir()]
    done = run_python("records/verify.py", *folders)
    assert done.returncode == 0 and "2 records verified" in done.stdout
    (record / "logs" / "2.txt").unlink()
    done = run_python("records/verify.py", str(record))
    assert done.returncode == 1 and "seeds 1, 3" in done.stdout


def test_code_whose_last_line_is_not_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("records.log.ROOT", tmp_path)
    (tmp_path / "trainer.py").write_text("a\nmain()")
    code = read_code(["trainer.py"])
    text, found = split_code(with_header("trainer.py", code["trainer.py"]) + "\n=== run\n")
    assert found == code == {"trainer.py": "a\nmain()\n"} and text.endswith("\n=== run\n") and "main" not in text


def test_expected_lines():
    train = {"log_every": 10, "valid_every": 25, "save_every": 0}
    assert expected_steps(train, 52) == ({10, 20, 25, 30, 40, 50, 52}, {0, 25, 50, 52})
    assert expected_steps(train | {"valid_every": 0, "save_every": 15}, 20) == ({10, 15, 20}, {20})


def test_a_run_with_grad_accum_passes(corpus, tmp_path):
    settings = {"train.grad_accum": 12, "train.steps": 2, "train.save_every": 0}
    settings |= {"train.mask_rate_start": 0.3, "train.mask_rate_end": 0.3}  # of 256 tokens 80, more than 30%
    trainer.main(flags(corpus, tmp_path, "accum", *as_flags(settings)))
    assert list(check_run(read_log(tmp_path / "accum"))) == []


# --- the code of a log, laid out again


def test_extracted_code_is_that_of_the_log_and_runs(archive, runs, tmp_path):
    for source in (next((archive / "tiny").glob("*_ours")), runs[0], runs[0] / "log.txt"):
        out = tmp_path / f"{source.name}-code"
        assert extract(source, out).startswith("trainer.py --preset micro")
        found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.py")}
        hashes = {name: hashlib.sha256(text).hexdigest() for name, text in found.items()}
        assert hashes == read_log(runs[0]).hashes
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "trainer.py", "--help"], cwd=out, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_code_of_committed_records_can_be_extracted(tmp_path):
    for folder in sorted(path.parent for path in (ROOT / "records").glob("*/*/record.json")):
        extract(folder, tmp_path / folder.parent.name / folder.name)


def test_extracting_refuses_what_would_do_harm(record, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(InputError, match="not an empty folder"):
        extract(record, tmp_path / "full")
    with pytest.raises(InputError, match="not an empty folder"):
        extract(record, tmp_path / "full" / "file")
    with pytest.raises(InputError, match="no code in it"):
        extract(record / "logs" / "2.txt", tmp_path / "out")
    change(record / "logs" / "1.txt", lambda text: text.replace("--- records/plot.py ", "--- ../../plot.py "))
    with pytest.raises(InputError, match="would lie outside"):
        extract(record, tmp_path / "deep" / "out")
    assert not (tmp_path / "plot.py").exists() and (tmp_path / "full" / "file").read_text() == "kept"


def test_commands_of_submit(record, tmp_path):
    done = run_python("records/submit.py", "--extract", record, "--out", tmp_path / "code")
    assert done.returncode == 0 and "then run:\ntrainer.py --preset micro" in done.stdout
    assert (tmp_path / "code" / "trainer.py").read_bytes() == (ROOT / "trainer.py").read_bytes()
    done = run_python("records/submit.py", "logs/run", "--track", "tiny")
    assert done.returncode == 2 and "a record needs --name, --contributors, --what" in done.stderr


# --- forgeries

FORGED = (
    (lambda text: re.sub(r"(step:6/8 .* train_time:)6\d\d\d", r"\g<1>5123", text), "step_avg is not train_time / step"),
    (lambda text: re.sub(r"(step:6/8 .* mfu:)\d", r"\g<1>9", text), "mfu is not flops"),
    (lambda text: re.sub(r"step:6/8 .*\n", "", text), "no train_loss after step 6"),
    (lambda text: re.sub(r"(step:4/8 val_loss.*\n)", r"\1\1", text), "a val_loss too many, after step 4"),
    (
        lambda text: re.sub(r"(step:8/8 val_loss:)\d", r"\g<1>0", text),
        "the last line's val_loss is not that of the result",
    ),
    (lambda text: re.sub(r"(step:6/8.*)\n(step:8/8.*)\n", r"\2\n\1\n", text), "does not grow"),
    (lambda text: re.sub(r"(step:0/8) val_loss:\S+", r"\1", text), "no val_loss before the first step"),
    (in_section("result", "seconds", 1.0), "the last line's seconds"),
    (in_section("result", "flops", 1.0e9), "do not follow from the configuration"),
    (in_section("result", "flops_counted_by", WHOLE_LAST_LAYER), "do not follow from the configuration"),
    (
        in_section("result", "flops_counted_by", "guess"),
        "FLOPs counted by 'guess': the ways known here are masked-last",
    ),
    (in_section("result", "work.masked", 10), "work.masked is 10, outside"),
    (in_section("config", "model.hidden_size", 128), "do not follow from the configuration"),
    (in_section("config", "train.steps", 9), "8 steps of the 9 configured"),
    (in_section("result", "finished", False), "did not finish"),
    (lambda text: text.replace("=== run\n", "=== resumed\nstep-000004\n=== run\n"), "a resumed run"),
)


@pytest.mark.parametrize("seal", (True, False), ids=("sealed", "unsealed"))
@pytest.mark.parametrize("edit,message", FORGED, ids=range(len(FORGED)))
def test_an_edited_log(record, edit, message, seal):
    log = record / "logs" / "2.txt"
    change(log, edit, seal)
    problems = verify(record)
    assert any(message in problem and str(log) in problem for problem in problems), problems


def test_an_edited_line_breaks_the_seal(record):
    edit = lambda text: re.sub(r"(step:4/8 train_loss:\d\.\d\d)", r"\g<1>1", text)  # noqa: E731
    change(record / "logs" / "1.txt", edit, seal=False)
    change(record / "logs" / "2.txt", in_section("result", "model_sha256", "0" * 64), seal=False)
    change(record / "logs" / "3.txt", lambda text: text + f"--- trainer.py sha256:{'0' * 64}\n", seal=False)
    problems = "\n".join(verify(record))
    assert problems.count("its hash does not follow") == 2 and "a line after the result" in problems


def test_timed_runs_do_not_share_a_machine(record):
    started = read_log(record / "logs" / "1.txt").named("environment", "started")
    change(record / "logs" / "2.txt", in_section("environment", "started", started))
    assert any("before" in problem and "run one after the other" in problem for problem in verify(record))


def test_older_logs_seal_their_lines_alone(record):
    def old(text: str) -> str:
        head, title, tail = text.rpartition("=== result\n")
        result = {name: value for name, value in json.loads(tail).items() if name != "sha256"}
        digest = hashlib.sha256(split_code(head)[0].encode()).hexdigest()
        return f"{head}{title}{json.dumps({**result, 'log_sha256': digest})}\n"

    for log in (record / "logs").iterdir():
        change(log, old, seal=False)
    assert verify(record) == []


def test_a_line_is_named_by_its_number_in_the_file_also_after_code(record):
    log = record / "logs" / "1.txt"
    change(log, lambda text: re.sub(r"(step:6/8 .* mfu:)\d", r"\g<1>9", text))
    (problem,) = (problem for problem in verify(record) if "mfu is not" in problem)
    number = int(problem.removeprefix(f"{log}:").split(":")[0])
    assert log.read_text().split("\n")[number - 1].startswith("step:6/8 ")


def test_flops_of_logs_from_before_ways_to_count_had_names(record):
    for number in (1, 2, 3):
        unnamed = lambda text: re.sub(r'"flops_counted_by": "[^"]+", ', "", text)  # noqa: E731
        change(record / "logs" / f"{number}.txt", unnamed)
    assert verify(record) == []
    change(record / "logs" / "2.txt", in_section("config", "recipe", "modernbert"))  # of the baseline, all layers whole
    assert any("2.txt" in problem and "do not follow" in problem for problem in verify(record))


@pytest.mark.parametrize(
    "section,name,value,message",
    (
        (
            "data",
            "validation.fingerprint",
            "0" * 16,
            "data.validation.fingerprint is '0000000000000000', the track's is",
        ),
        ("data", "validation.masked_tokens", 7, "data.validation.masked_tokens is 7"),
        ("data", "hash", "other", "data.hash is 'other'"),
        ("config", "data.max_length", 512, "config.data.max_length is 512"),
        ("config", "data.verify", False, "--data.verify false"),
        ("environment", "device", "a faster one", "a run of this record: device is 'a faster one'"),
        ("environment", "torch", "9.9", "torch is '9.9'"),
        ("environment", "world_size", 8, "world_size is 8, the track's is 1"),
        ("config", "train.muon_lr", 0.5, "other settings than 1.txt: muon_lr"),
        ("config", "lr", 1e-3, "other settings than 1.txt: lr"),  # the baseline's
        ("config", "train.objective", "rtd", "other settings than 1.txt: objective"),
        ("config", "train.declared_runs", 5, "5 runs were declared when it started, 3 in record.json"),
        (
            "config",
            "train.declared_runs",
            None,
            "no number of runs was declared: run them all with --train.declared_runs",
        ),
        ("config", "train.seed", 4, "there are those with seeds 1, 3, 4"),
    ),
)
def test_one_run_that_differs(record, section, name, value, message):
    change(record / "logs" / "2.txt", in_section(section, name, value))
    assert any(message in problem for problem in verify(record))


def test_a_log_twice(record):
    shutil.copy(record / "logs" / "1.txt", record / "logs" / "2.txt")
    change(record / "logs" / "2.txt", in_section("config", "train.seed", 2))
    assert any("the same run as 1.txt" in problem for problem in verify(record))


def test_a_run_left_out(record):
    (record / "logs" / "3.txt").unlink()
    problems = "\n".join(verify(record))
    assert "logs/3.txt is not there" in problems and "3 runs were declared" in problems


def test_most_of_a_log_twice(record):
    """Another number in one line does not make it another run."""
    again = in_section("config", "train.seed", 2)(read_log(record / "logs" / "1.txt").text)
    again = at_its_own_minute(re.sub(r"(step:4/8 train_loss:)\d", r"\g<1>3", again))
    (record / "logs" / "2.txt").write_text(sealed(again))
    assert any("the same run as 1.txt" in problem for problem in verify(record))


@pytest.mark.parametrize(
    "edit,message",
    (
        (lambda text: re.sub(r"(step:0/8 val_loss:)\S+", r"\g<1>2.5000", text), "a loss of 2.5 before any step"),
        (
            lambda text: re.sub(r"(step:0/8) val_loss:\S+(.*\n)", r"\1\2\1 val_loss:2.5000\2", text),
            "a loss of 2.5 before any step",
        ),
        (
            lambda text: retimed(in_section("environment", "peak_flops", 1e8)(text), 1.0, 0.0),
            "no machine does more than its peak",
        ),
        (lambda text: text.replace("trainer.py --preset", "turbo.py --preset", 1), "turbo.py ran, in 1.txt trainer.py"),
        (lambda text: re.sub(r"(step:\d+)/8 ", r"\1/10 ", text), "a run of 10 steps, its configuration asks for 8"),
        (in_section("environment", "device", "EPYC | 0.1 s"), "device is 'EPYC | 0.1 s', which has |"),
        (lambda text: re.sub(r'("started": ")\d{4}', r"\g<1>9998", text), "which is yet to come"),
    ),
)
def test_what_no_run_says(record, edit, message):
    change(record / "logs" / "2.txt", edit)
    assert any(message in problem for problem in verify(record)), verify(record)


def test_variables_count_of_whichever_log_has_them(record):
    for number, variables in ((2, {"OMP_NUM_THREADS": "1"}), (3, {"OMP_NUM_THREADS": "2"})):
        change(record / "logs" / f"{number}.txt", in_section("environment", "variables", variables))
    change(record / "logs" / "1.txt", lambda text: text.replace('"variables": {', '"others": {', 1))
    assert "variables" not in read_log(record / "logs" / "1.txt").named("environment")
    assert any("the environment variables are" in problem for problem in verify(record))


def test_what_a_module_imports():
    text = """import os, turbo
from data import make_sample as sample
try:
    import quick.fast
except ImportError:
    pass


def later():
    import lazy
"""
    assert set(imports(text)) == {"os", "turbo", "data", "data.make_sample", "quick.fast"}


def test_the_program_s_code_is_kept(record):
    def without(name: str) -> Callable[[str], str]:
        def edit(text: str) -> str:
            header = re.search(rf"^--- {name} sha256:\w+(?: lines:(\d+))?\n", text, re.MULTILINE)
            lines = int(header[1] or 0)
            return text[: header.start()] + text[header.end() :].split("\n", lines)[lines]

        return edit

    for name in ("trainer.py", "model.py"):
        for number in (1, 2, 3):
            change(record / "logs" / f"{number}.txt", without(name))
        assert any(f"1.txt: it lacks {name}" in problem for problem in verify(record)), name


def test_systems_only_changes_no_setting(record):
    change_json(record / "record.json", systems_only="the same, compiled")
    for number in (1, 2, 3):
        change(record / "logs" / f"{number}.txt", in_section("config", "train.muon_lr", 0.5))
    assert any("systems_only, but other settings than" in problem for problem in verify(record))


def test_systems_only_shows_as_much_in_as_many_steps(record):
    before, ours = read_records(record.parent)
    assert not any("systems_only, but shown" in problem for problem in check_systems_only(ours, before))
    for log in ours.logs:
        log.sections["result"]["step"] *= 2
    assert any("tokens in 16 steps" in problem for problem in check_systems_only(ours, before))


def test_links_and_what_cannot_be_read(record):
    (record / "curve.png").unlink()
    (record / "curve.png").symlink_to("nowhere")
    assert verify(record) == [f"{record / 'curve.png'}: a link: a record holds its own files"]
    (record / "curve.png").unlink()
    (record / "README.md").unlink()
    (record / "README.md").mkdir()
    assert "Is a directory" in verify(record)[0]


def test_a_linked_track_is_judged_by_the_tracks_beside_the_link(record, tmp_path):
    elsewhere = shutil.copytree(record.parents[1], tmp_path / "elsewhere")
    change_track(record, target={"metric": "val_loss", "value": 0.1})
    shutil.rmtree(record.parent)
    record.parent.symlink_to(elsewhere / record.parent.name)
    assert any("0.1" in problem for problem in verify(record))


def test_logs_are_named_without_detours(record):
    logs = json.loads((record / "record.json").read_text())["logs"]
    change_json(record / "record.json", logs=[*logs, "../../tracks.json"])
    assert any("../../tracks.json is not there" in problem for problem in verify(record))


def test_paired_runs_are_no_copies(record):
    """Those of the record before, said to be of this machine."""
    before, other = next(record.parent.glob("*_before")), in_section("environment", "machine", "another")
    (record / "paired").mkdir()
    for number in (1, 2, 3):
        change(record / "logs" / f"{number}.txt", other)
        text = other(read_log(before / "logs" / f"{number}.txt").text)
        (record / "paired" / f"{number}.txt").write_text(sealed(at_its_own_minute(text)))
    assert any("paired/1.txt: a copy of" in problem for problem in verify(record))


def test_the_clock_s_end_is_as_late_on_any_machine(record):
    """Twice as many steps in the same time: what took the record before so long takes half of it here."""
    ours, (before, *_) = (read_records(record.parent)[-1], read_records(record.parent))
    track, ours.paired = read_tracks(record.parents[1])["tiny"], read_records(record.parent)[0].logs
    for log in ours.paired:
        log.sections["config"]["train"]["max_minutes"] = 1.0
        log.sections["result"]["step"] *= 2
    assert measure(ours, track, before)["speedup"] == pytest.approx(1, rel=1e-2)


def test_code_changed_after_the_run(record):
    first, ran = record / "logs" / "1.txt", (record / "logs" / "1.txt").read_text()
    change(first, lambda text: text.replace("def muon_momentum(", "def much_momentum("))
    assert verify(record) == [f"{first}: not the code that ran: trainer.py"]
    first.write_text(split_code(ran)[0])
    assert any("1.txt: no code in it" in problem for problem in verify(record))
    forged = hashlib.sha256(read_log(record / "logs" / "2.txt").text.encode()).hexdigest()
    first.write_text(sealed(re.sub(r"(--- model.py sha256:)\w+", rf"\g<1>{forged}", ran)))
    assert any("not the code that ran: model.py" in problem for problem in verify(record))


def test_a_loss_above_target(record):
    tracks = json.loads((record.parents[1] / "tracks.json").read_text())
    tracks["tiny"]["target"]["value"] = json.loads((record / "record.json").read_text())["measured"]["val_loss"] - 0.1
    (record.parents[1] / "tracks.json").write_text(json.dumps(tracks))
    assert any("does not meet the target" in problem for problem in verify(record))


def test_a_mean_below_target_is_not_enough(record):
    """p >= 0.01: the runs scatter too much for what they claim."""
    measured = json.loads((record / "record.json").read_text())["measured"]
    tracks = json.loads((record.parents[1] / "tracks.json").read_text())
    tracks["tiny"]["target"]["value"] = measured["val_loss"] + 0.1 * measured["val_loss_std"]
    (record.parents[1] / "tracks.json").write_text(json.dumps(tracks))
    assert any("does not meet the target" in problem for problem in verify(record))
    change_json(record / "record.json", systems_only="the same, compiled")
    assert not any("does not meet the target" in problem for problem in verify(record))


def test_numbers_of_record_json_are_recomputed(record):
    said = json.loads((record / "record.json").read_text())
    change_json(record / "record.json", measured=said["measured"] | {"seconds": 1.0})
    assert any("measured.seconds is 1.0, the logs give" in problem for problem in verify(record))
    change_json(record / "record.json", date="2020-01-01")
    record = record.rename(record.with_name("2020-01-01_ours"))
    assert any("the date is 2020-01-01, the last run started" in problem for problem in verify(record))


def test_not_faster(record):
    for number in (1, 2, 3):
        change(record / "logs" / f"{number}.txt", lambda text, n=number: retimed(text, 1.999, 0.01 * n))
    assert any("not faster than" in problem for problem in verify(record))


def test_faster_only_on_a_faster_machine(record):
    for number in (1, 2, 3):
        change(record / "logs" / f"{number}.txt", in_section("environment", "machine", "another"))
    assert any("compared runs are made on one machine" in problem for problem in verify(record))
    # the record before, run again on that machine, is as fast
    shutil.copytree(record / "logs", record / "paired")
    problems = "\n".join(verify(record))
    assert "not faster than" in problems and "one machine" not in problems
    change(record / "logs" / "2.txt", in_section("environment", "variables", {"OMP_WAIT_POLICY": "active"}))
    assert any("variables are {'OMP_WAIT_POLICY': 'active'}" in said for said in verify(record))


def test_systems_only_waives_the_test_alone_and_a_track_has_its_least_runs(record):
    before = next(record.parent.glob("*_before"))
    mean = json.loads((record / "record.json").read_text())["measured"]["val_loss"]
    change_track(record, min_runs=4)
    assert any("3 runs; the track asks for 4" in problem for problem in verify(record))
    change_track(record, min_runs=3)
    for folder in (record, before):
        change_json(folder / "record.json", systems_only="the same, compiled")
    assert not any("systems_only needs" in problem for problem in verify(record))
    assert any("systems_only needs a record to be faster than" in problem for problem in verify(before))
    change_track(record, target={"metric": "val_loss", "value": mean - 0.01})
    assert any("a mean loss that meets the target" in problem for problem in verify(record))


def test_a_slower_machine_beats_by_its_own_paired_runs(record):
    """Twice as fast as the record before, but slower than that was on its machine: of the same day, it stands last."""
    other = in_section("environment", "machine", "another")
    for number in (1, 2, 3):
        change(record / "logs" / f"{number}.txt", lambda text, n=number: retimed(other(text), 3.0, 0.01 * n))
    pair(record, other, seconds=6.0)
    measured = json.loads((record / "record.json").read_text())["measured"]
    said = "\n".join(verify(record))
    for name in ("seconds", "seconds_std", "p_faster", "speedup"):
        if found := re.search(rf"measured\.{name} is \S+, the logs give (\S+)", said):
            measured[name] = float(found[1])
    change_json(record / "record.json", measured=measured)
    before, ours = read_records(record.parent)[-2:]
    (record / "README.md").write_text(page(ours, read_tracks(record.parents[1])["tiny"], before))
    assert verify(record) == [] and measured["speedup"] == pytest.approx(2, abs=0.01)
    assert ours.path == record


def pair(record: Path, edit: Callable[[str], str], seconds: float = 3.0) -> None:
    """Runs of the record before, which has the code and the settings of this one."""
    (record / "paired").mkdir()
    for number in (1, 2, 3):
        text = edit(read_log(record / "logs" / f"{number}.txt").text)
        (record / "paired" / f"{number}.txt").write_text(retimed(text, seconds, 0.01 * number))


PAIRED = (
    (lambda text: re.sub(r"(--- model.py sha256:)....", r"\g<1>0000", text), "not the code of"),
    (in_section("config", "train.embed_lr", 1e-9), "not the settings of DATE_before: embed_lr"),
    (in_section("environment", "compiled", True), "compiled is True, that of DATE_before False"),
    (in_section("data", "hash", "other"), "data.hash is 'other', the track's is"),
    (
        lambda text: in_section(
            "config", "train.seed", json.loads(text.split("=== config\n")[1].split("\n")[0])["train"]["seed"] + 1
        )(text),
        "runs with seeds 2, 3, 4; asked for: at least 3",
    ),
)


@pytest.mark.parametrize("edit,message", PAIRED, ids=range(len(PAIRED)))
def test_paired_runs_are_those_of_the_record_before(record, edit, message):
    pair(record, edit)
    message = message.replace("DATE_before", json.loads((record / "record.json").read_text())["beats"])
    assert any(message in problem for problem in verify(record)), verify(record)


def test_each_record_beats_one_that_no_other_beats(record):
    beats = json.loads((record / "record.json").read_text())["beats"]
    change_json(record / "record.json", beats="2020-01-01_lost")
    assert verify(record) == [f"{record.parent}: {record.name} beats a record that is not there"]
    change_json(record / "record.json", beats=None)
    assert f"{beats} and {record.name} say of no record that they beat it" in verify(record)[0]


@pytest.mark.parametrize(
    "values,message",
    (
        ({"contributors": ["a | b"]}, "contributors is not a list of names"),
        ({"contributors": "me"}, "contributors is not a list of names"),
        ({"name": "ours |"}, "is not DATE_NAME"),
        ({"name": "theirs"}, "is not DATE_NAME"),
    ),
)
def test_what_would_break_the_table(record, values, message):
    change_json(record / "record.json", **values)
    (problem,) = verify(record)
    assert message in problem


def test_files_that_no_record_has(record):
    (record / "test_more.py").write_text("")
    assert verify(record) == [f"{record}: test_more.py: not a file of a record"]


def test_runs_of_a_record_before_need_one(record):
    first = read_records(record.parent)[0].path
    for folder in ("paired", "paired_finetuned"):
        (first / folder).mkdir(exist_ok=True)
        shutil.copy(first / "logs" / "2.txt", first / folder / "1.txt")
    problems = "\n".join(verify(first))
    assert "but this one beats none" in problems and "finetunings of no runs whose score" in problems


def test_a_device_is_named_by_whole_words(record):
    log, track = (
        read_log(record / "logs" / "2.txt"),
        json.loads((record.parents[1] / "tracks.json").read_text())["tiny"],
    )
    for found, asked, right in (
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA RTX A1000", "A100", False),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA GH100", "H100", False),
    ):
        log.sections["environment"]["device"] = found
        problems = list(check_track(log, track | {"hardware": {"device": asked}}))
        assert problems == [] if right else f"device is {found!r}, the track's is {asked!r}" in problems[0]


def test_links_lead_somewhere(record):
    with open(record / "README.md", "a") as file:
        file.write("[the track](../../README.md#tracks) [me](mailto:a@b.c)\n")
    assert verify(record) == []
    with open(record / "README.md", "a") as file:
        file.write("[the other log](logs/9.txt#there)\n")
    assert any("README.md:" in problem and "a link to logs/9.txt" in problem for problem in verify(record))


def test_the_page_says_what_the_logs_give(record):
    page = record / "README.md"
    said = page.read_text()
    page.write_text(said.replace("| 3 |", "| 4 |"))
    assert len(found := verify(record)) == 1 and "README.md: lacks the line '| 3 | " in found[0]
    page.write_text(said + "\nAnd a word more.\n")
    assert verify(record) == []
    page.unlink()
    assert verify(record) == [f"{page}: lacks the line '# ours', which record.json and the logs give"]


def test_what_is_no_log(record, tmp_path):
    (record / "logs" / "1.txt").write_text("hello\n")
    assert verify(record) == [f"{record}/logs/1.txt has no line of a run: give a log of trainer.py or finetuner.py"]
    (record / "logs" / "1.txt").write_text("step:1/2 nonsense\n")
    assert verify(record) == [f"{record}/logs/1.txt:1: not a line of a log: 'step:1/2 nonsense'"]
    (record / "record.json").unlink()
    assert "missing or not JSON" in verify(record)[0]


# --- a record by MNLI


@pytest.fixture(scope="module")
def mnli_archive(archive, runs, word_tokenizer, tmp_path_factory) -> Path:
    """records/ with the first record of a track whose target is MNLI, with one finetuning of each run."""
    import finetuner

    rng, tmp_path = np.random.default_rng(0), tmp_path_factory.mktemp("mnli")
    words = [word for word in AutoTokenizer.from_pretrained(word_tokenizer).get_vocab() if word[0] != "["]
    (tmp_path / "mnli").mkdir()
    for split, number in (("train", 24), ("validation_matched", 300)):  # the published shards have no mismatched ones
        rows = [
            {"premise": " ".join(rng.choice(words, 6)), "hypothesis": " ".join(rng.choice(words, 3)), "label": i % 3}
            for i in range(number)
        ]
        (tmp_path / "mnli" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = []
    for run in runs:
        shutil.copytree(word_tokenizer, run / "model", dirs_exist_ok=True)
        train = {"base_model": run / "model", "out": tmp_path, "run_name": f"tuned-{run.name}"}
        train |= {"epochs": 1, "seeds": 3, "batch_size": 8}
        settings = {"data.dataset": tmp_path / "mnli"} | {f"train.{name}": value for name, value in train.items()}
        finetuner.main(as_flags(settings))
        tuned.append(tmp_path / f"tuned-{run.name}")
    root = tmp_path / "records"
    shutil.copytree(archive, root)
    shutil.copy(archive.parent / "README.md", tmp_path)
    tracks = json.loads((root / "tracks.json").read_text())
    splits = read_log(tuned[0]).named("result", "splits", "mnli")
    tracks["tiny-mnli"] = tracks["tiny"] | {
        "target": {"metric": "mnli_matched", "value": 1.0},
        "judged_by": {
            "settings": {"epochs": 1.0, "batch_size": 8, "seeds": 3, "lr_schedule": "one_cycle"},
            "lr": {"muon": finetuner.MUON_LR, "adamw": 5e-5},
            "splits": {name: splits[name] for name in ("train", "validation_matched")},
        },
    }
    (root / "tracks.json").write_text(json.dumps(tracks))
    date = read_log(runs[0]).named("environment", "started")[:10]
    said = {"track": "tiny-mnli", "name": "tuned", "date": date, "contributors": ["a"], "what": "A test."}
    with pytest.raises(InputError, match="0 runs of finetuner.py --task mnli on its model"):
        submit(root, runs, dict(said), tuned[:2])
    submit(root, runs, said, tuned)
    return root


@pytest.fixture
def by_mnli(mnli_archive, tmp_path) -> Path:
    return next((copied(mnli_archive, tmp_path) / "tiny-mnli").glob("*_tuned"))


def test_a_record_by_mnli(by_mnli):
    assert verify(by_mnli) == []
    results = [read_log(log).named("result", "results") for log in sorted((by_mnli / "finetuned").iterdir())]
    scores = [100 * result["mnli"]["pretrained"]["validation_matched"]["accuracy"]["median"] for result in results]
    said = json.loads((by_mnli / "record.json").read_text())["measured"]
    assert said["finetuned_by"] | {"optimizer": "muon", "lr": 0.01, "epochs": 1.0, "seeds": 3} == said["finetuned_by"]
    assert len(scores) == 3 and said["mnli_matched"] == pytest.approx(sum(scores) / 3) and said["p_target"] < 0.01
    root = by_mnli.parents[1]
    assert root / "figures" / "pareto.png" in update(root, check=False)  # with a star of ours
    assert (
        said["mnli_mismatched"] is None
        and f"| MNLI {said['mnli_matched']:.1f} |" in (root.parent / "README.md").read_text()
    )
    assert score_of({"mnli_matched": 80.0, "mnli_mismatched": 81.0}) == "MNLI 80.0 / 81.0"


@pytest.mark.parametrize(
    "section,name,value,message",
    (
        ("config", "train.epochs", 9.0, "not the track's finetuning, but with epochs 9.0 in place of 1.0"),
        ("config", "train.lr_schedule", "cosine", "with lr_schedule cosine in place of one_cycle"),
        ("config", "train.lr", 0.02, "with lr 0.02 in place of 0.01"),
        ("config", "train.optimizer", "adamw", "with lr 0.01 in place of 5e-05"),
        ("config", "train.lr", 1.0, "other settings than 1.txt: lr"),
        ("data", "base_sha256", "0" * 64, "started from another model"),
        ("result", "splits.mnli.validation_matched.fingerprint", "0", "the track's is"),
        ("result", "splits.mnli.train.fingerprint", "0", "train is {'examples': 24, 'fingerprint': '0'}, the track's"),
        (
            "result",
            "results.mnli.pretrained.validation_matched.accuracy.median",
            0.99,
            "not the median of the runs' last dev_score",
        ),
        ("environment", "device", "H100", "device is 'H100'"),
    ),
)
def test_a_forged_finetuning(by_mnli, section, name, value, message):
    change(by_mnli / "finetuned" / "2.txt", in_section(section, name, value))
    assert any(message in problem for problem in verify(by_mnli))


@pytest.mark.parametrize(
    "edit,message",
    (
        (
            lambda text: re.sub(r"task:mnli run:2/3 step:3/3 .*train_loss.*\n", "", text),
            "no train_loss after step 3 of run 2",
        ),
        (lambda text: re.sub(r"task:mnli run:2/3 .*\n", "", text), "there are the runs 1, 3; its seeds ask for 3"),
        (lambda text: re.sub(r"task:mnli run:[23]/3 .*\n", "", text), "there are the runs 1; its seeds ask for 3"),
        (
            lambda text: re.sub(r"(run:2/3 step:)3(/3 .*dev_score)", r"\g<1>2\2", text),
            "step or train_time does not grow",
        ),
        (lambda text: text.replace(":3/3 ", ":4/3 "), "ended after 4 steps of 3"),
        (
            lambda text: re.sub(r"(task:mnli run:2/3 step:)3(/3 .*dev_score.*\n)", r"\g<1>2\2", text),
            "run 2 has its last dev_score after step [2], not after its last, 3",
        ),
    ),
)
def test_lines_of_a_finetuning(by_mnli, edit, message):
    change(by_mnli / "finetuned" / "2.txt", edit)
    assert any(message in problem for problem in verify(by_mnli)), verify(by_mnli)


def test_each_run_is_judged_by_its_own_model(by_mnli):
    model = read_log(by_mnli / "logs" / "1.txt").named("result", "model_sha256")
    for number in (2, 3):
        change(by_mnli / "logs" / f"{number}.txt", in_section("result", "model_sha256", model))
        (by_mnli / "finetuned" / f"{number}.txt").unlink()
    assert any("one model_sha256" in problem for problem in verify(by_mnli))


def test_the_code_that_finetuned_is_kept(by_mnli, tmp_path):
    first, commands = by_mnli / "finetuned" / "1.txt", extract(by_mnli, tmp_path / "code").split("\n")
    assert [command.split()[0] for command in commands] == ["trainer.py", "finetuner.py"]
    for name in finetuner.MODULES:
        assert (tmp_path / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    for name, message in (
        ("finetuner.py", "not the code that ran: finetuner.py"),
        ("model.py", "other code than 1.txt"),
    ):
        kept = first.read_text()
        change(first, lambda text, name=name: re.sub(rf"(--- {name} sha256:)....", r"\g<1>0000", text))
        assert any(message in problem for problem in verify(by_mnli)), name
        first.write_text(kept)
    first.write_text(read_log(first).text)
    assert any("1.txt: no code in it" in problem for problem in verify(by_mnli))


# --- a record by its score after a fixed time


def scored(text: str, score: float) -> str:
    """The same finetuning with another result, consistent down to the hash."""
    text = re.sub(r"dev_score:\d\S*", f"dev_score:{score:.4f}", at_its_own_minute(text))
    return sealed(in_section("result", "results.mnli.pretrained.validation_matched.accuracy.median", score)(text))


@pytest.fixture
def by_score(mnli_archive, runs, tmp_path) -> Path:
    """Of a track that is raced by MNLI within ten minutes of pretraining and finetuning, the second record."""
    root = tmp_path / "records"
    shutil.copytree(mnli_archive, root)
    shutil.copy(mnli_archive.parent / "README.md", tmp_path)
    tracks = json.loads((root / "tracks.json").read_text())
    tracks["tiny-score"] = tracks["tiny-mnli"] | {"race": "score", "limits": {"minutes": 10}}
    (root / "tracks.json").write_text(json.dumps(tracks))
    tuned = sorted(next((root / "tiny-mnli").glob("*_tuned")).glob("finetuned/*.txt"))
    said = {"track": "tiny-score", "contributors": ["a"], "what": "A test."}
    said["date"] = read_log(runs[0]).named("environment", "started")[:10]
    for name, score in (("before", 0.4), ("ours", 0.6)):
        for number, log in enumerate(tuned):
            (tmp_path / f"{name}-{number}.txt").write_text(scored(log.read_text(), score + 0.01 * number))
        finetuned = [tmp_path / f"{name}-{number}.txt" for number in range(len(tuned))]
        folder = submit(root, runs, said | {"name": name}, finetuned)
    return folder


def test_a_record_by_score(by_score):
    assert verify(by_score) == []
    measured = json.loads((by_score / "record.json").read_text())["measured"]
    assert measured["gain"] == pytest.approx(20, abs=0.02) and measured["p_gain"] < 0.01
    tuning = [read_log(log) for log in (by_score / "finetuned").iterdir()]
    seconds = sum(line.seconds for log in tuning for line in {line.run: line for line in log.lines}.values()) / 3
    assert seconds > 0 and measured["seconds_in_all"] == pytest.approx(measured["seconds"] + seconds)
    assert "20.00 points above [before]" in (by_score / "README.md").read_text()
    change_track(by_score, limits={"minutes": 0.95 * measured["seconds_in_all"] / 60})
    assert any("minutes, the track allows" in problem for problem in verify(by_score))


def test_a_score_that_is_not_better(by_score):
    for number in (1, 2, 3):
        change(by_score / "finetuned" / f"{number}.txt", lambda text, n=number: scored(text, 0.4 + 0.011 * (n - 1)))
    assert any("not better than" in problem for problem in verify(by_score))


def test_a_better_score_is_shown_on_one_machine(by_score):
    for folder in ("logs", "finetuned"):
        for number in (1, 2, 3):
            change(by_score / folder / f"{number}.txt", in_section("environment", "machine", "another"))
    assert any("runs are made on one machine" in problem for problem in verify(by_score))
    before, other = next(by_score.parent.glob("*_before")), in_section("environment", "machine", "another")
    for folder, into in (("logs", "paired"), ("finetuned", "paired_finetuned")):
        (by_score / into).mkdir()
        for log in (before / folder).iterdir():
            text = other(log.read_text())  # which takes other times
            text = retimed(text, 1.5, 0.01 * int(log.stem)) if folder == "logs" else sealed(text)
            (by_score / into / log.name).write_text(text)
    assert verify(by_score) == []
    change(by_score / "paired_finetuned" / "2.txt", in_section("config", "train.pooling", "cls"))
    assert any("not the code, or not the settings, of the finetunings" in problem for problem in verify(by_score))


# --- a record by BLiMP


@pytest.fixture(scope="module")
def blimp_archive(archive, counted, word_tokenizer, tmp_path_factory) -> Path:
    """records/ with a record of a track whose target is BLiMP, of runs that end by the words shown."""
    tmp_path, rng = tmp_path_factory.mktemp("blimp"), np.random.default_rng(0)
    words = [word for word in AutoTokenizer.from_pretrained(word_tokenizer).get_vocab() if word[0] != "["]
    pairs = [[" ".join(rng.choice(words, 6)) for _ in range(2)] for _ in range(400)]
    table = pd.DataFrame(pairs, columns=["sentence_good", "sentence_bad"]).assign(UID=["island", "binding"] * 200)
    table.to_csv(tmp_path / "pairs.csv", index=False)
    made = {"before": 5000, "ours": 3000}
    for name, shown in made.items():
        for seed in (1, 2, 3):
            run, judged = f"{name}-{seed}", f"{name}-judged-{seed}"
            more = f"--train.max_words {shown} --train.declared_runs 3 --train.seed {seed} --train.log_every 1"
            trainer.main(flags(counted, tmp_path, run, more))
            shutil.copytree(word_tokenizer, tmp_path / run / "model", dirs_exist_ok=True)
            where = {"data.dataset": tmp_path / "pairs.csv", "train.base_model": tmp_path / run / "model"}
            where |= {"train.out": tmp_path, "train.run_name": judged}
            finetuner.main(as_flags({"task": "blimp", **where}))
    root, log, judgement = tmp_path / "records", read_log(tmp_path / run), read_log(tmp_path / judged)
    shutil.copytree(archive, root)
    shutil.copy(archive.parent / "README.md", tmp_path)
    tracks, data = json.loads((root / "tracks.json").read_text()), log.named("data")
    fixed = {name: data[name] for name in ("hash", "validation", "text")}
    tracks["tiny-blimp"] = tracks["tiny"] | {
        "target": {"metric": "blimp", "value": 1.0},
        "race": "flops",
        "limits": {"epochs": 10, "words": 5000},
        "data": {**fixed, "tokenizer_sha256": data["tokenizer"]},
        "judged_by": {"settings": {}, "splits": {"test": judgement.named("result", "splits", "blimp", "test")}},
        "hardware": {},
    }
    (root / "tracks.json").write_text(json.dumps(tracks))
    for name in made:
        runs = [tmp_path / f"{name}-{seed}" for seed in (1, 2, 3)]
        judged = [tmp_path / f"{name}-judged-{seed}" for seed in (1, 2, 3)]
        said = {"track": "tiny-blimp", "name": name, "contributors": ["a"], "what": "A test."}
        said["date"] = max(read_log(run).named("environment", "started") for run in runs)[:10]
        with pytest.raises(InputError, match="0 runs of finetuner.py --task blimp on its model"):
            submit(root, runs, dict(said), judged[:2])
        submit(root, runs, said, judged)
    return root


@pytest.fixture
def by_blimp(blimp_archive, tmp_path) -> Path:
    return next((copied(blimp_archive, tmp_path) / "tiny-blimp").glob("*_ours"))


def test_a_record_by_blimp(by_blimp):
    assert verify(by_blimp) == []
    logs = [read_log(log) for log in sorted((by_blimp / "finetuned").iterdir())]
    results = [log.named("result", "results", "blimp", "pretrained", "test", "accuracy", "median") for log in logs]
    measured = json.loads((by_blimp / "record.json").read_text())["measured"]
    assert measured["blimp"] == pytest.approx(100 * sum(results) / 3) and measured["mnli_matched"] is None
    assert "finetuned_by" not in measured and [len(log.lines) for log in logs] == [1, 1, 1]
    before = json.loads(next(by_blimp.parent.glob("*_before/record.json")).read_text())["measured"]
    assert measured["gain"] == pytest.approx(before["flops"] / measured["flops"]) and measured["p_gain"] < 0.01
    update(by_blimp.parents[1], check=False)
    row = f"{measured['flops']:.2e} ({measured['gain']:.1f} times as cheap)"
    assert row in (readme := (by_blimp.parents[2] / "README.md").read_text())
    assert f"| BLiMP {measured['blimp']:.1f} |" in readme


def test_a_cheaper_run_may_be_of_another_machine(by_blimp):
    for folder in ("logs", "finetuned"):
        for number in (1, 2, 3):
            change(by_blimp / folder / f"{number}.txt", in_section("environment", "machine", "another"))
    assert verify(by_blimp) == []


@pytest.mark.parametrize("limit,value", (("words", 2000), ("epochs", 0.1)))
def test_more_text_than_the_track_allows(by_blimp, limit, value):
    change_track(by_blimp, limits={limit: value})
    assert any(problem.endswith(f"{limit}, the track allows {value}") for problem in verify(by_blimp))


def test_a_detector_has_no_score_of_a_masked_lm(by_blimp):
    change(by_blimp / "logs" / "1.txt", in_section("config", "train.objective", "rtd"))
    assert any("the BLiMP score of a masked LM; rtd makes none" in problem for problem in verify(by_blimp))


def test_not_cheaper(by_blimp):
    before = next(by_blimp.parent.glob("*_before"))
    for log in (*before.glob("logs/*.txt"), *before.glob("finetuned/*.txt")):
        shutil.copy(log, by_blimp / log.relative_to(before))
    assert any("not cheaper than" in problem for problem in verify(by_blimp))


@pytest.mark.parametrize(
    "section,name,value,message",
    (
        ("data", "base_sha256", "0" * 64, "started from another model than these runs'"),
        ("result", "splits.blimp.test.examples", 7, "test is {'examples': 7,"),
        ("result", "results.blimp.pretrained.test.accuracy.median", 0.99, "not the median of the runs' last dev_score"),
    ),
)
def test_a_forged_judgement(by_blimp, section, name, value, message):
    change(by_blimp / "finetuned" / "2.txt", in_section(section, name, value))
    assert any(message in problem for problem in verify(by_blimp))


def test_tracks_ask_for_what_their_protocol_does():
    for track in json.loads((ROOT / "records" / "tracks.json").read_text()).values():
        asked = track.get("judged_by", {})
        if "lr" not in asked:
            continue
        settings = finetuner.read_flags(["--protocol", asked["protocol"]])[0]
        given, protocol = settings["train"] | settings["data"] | settings, finetuner.PROTOCOLS[settings["protocol"]]
        assert {name: given[name] for name in asked["settings"]} == asked["settings"] and not protocol.grid
        train = finetuner.FinetuneConfig(**settings["train"])
        chosen = [finetuner.choose_rates(train, protocol, kbert) for kbert in (True, False)]
        assert {train.optimizer: train.lr for train in chosen} == asked["lr"]


def test_the_sample_s_finetuning_is_that_of_its_track():
    asked = json.loads((ROOT / "records" / "tracks.json").read_text())["sample-pairs-cpu"]["judged_by"]["settings"]
    settings = finetuner.read_flags(["--preset", "micro"])[0]
    given = settings["train"] | settings["data"] | settings
    assert {name: given[name] for name in asked} == asked


def test_every_track_stands_in_the_rules():
    tracks = json.loads((ROOT / "records" / "tracks.json").read_text())
    rules = (ROOT / "records" / "README.md").read_text()
    for name, track in tracks.items():
        target = track["target"] or {"metric": "val_loss"}
        assert f"`{name}`" in rules and track["race"] in RACES and target["metric"] in ("val_loss", *METRICS)
        assert target["metric"] == "val_loss" or METRICS[target["metric"]][0] in TASKS
        limits = {"epochs", "words"} if "text" in track["data"] else set()
        assert set(track.get("limits", {})) <= limits | {"minutes"}
        said = re.search(rf"\| `{name}` \(not open yet\) \|", rules) is not None
        assert said == ("not open yet" in (refusal(track, "2026-01-01") or "") and "closed" not in track)


# --- submitting


def test_submit_refuses_and_leaves_nothing(archive, runs):
    said = {"track": "tiny", "name": "again", "date": "2020-01-01", "contributors": ["a"], "what": "Nothing."}
    before = sorted(archive.rglob("*"))
    with pytest.raises(InputError, match="this is no record yet:\n.*the date is 2020-01-01"):
        submit(archive, runs, dict(said))
    with pytest.raises(InputError, match="3 runs were declared, with seeds from 1; there are those with seeds 2"):
        submit(archive, runs[1:2], dict(said))
    with pytest.raises(InputError, match="--contributors is not a list of names without"):
        submit(archive, runs, said | {"contributors": ["Jane <j@x.org>"]})
    with pytest.raises(InputError, match="not declared"):
        submit(archive, runs, said | {"track": "other"})
    with pytest.raises(InputError, match="is not there"):
        submit(archive, [Path("nowhere")], dict(said))
    assert sorted(archive.rglob("*")) == before


def test_submit_names_the_logs_that_it_was_given(by_mnli, runs):
    said = {"track": "tiny", "name": "again", "date": "2020-01-01", "contributors": ["a"], "what": "Nothing."}
    tuned = by_mnli / "finetuned" / "1.txt"
    with pytest.raises(InputError, match=f"{tuned} is a finetuning: give it to --finetuned"):
        submit(by_mnli.parents[1], [*runs[:2], tuned], dict(said))
    with pytest.raises(InputError, match=f"{runs[1]} is a pretraining"):
        submit(by_mnli.parents[1], runs, dict(said), runs[1:2])
    with pytest.raises(InputError) as refused:
        submit(by_mnli.parents[1], runs, said | {"track": "tiny-mnli"}, [tuned, tuned])
    assert str(tuned) in str(refused.value) and ".tmp" not in str(refused.value), str(refused.value)


def test_declared_runs_have_their_seeds(corpus, tmp_path):
    with pytest.raises(InputError, match="their seeds are 1 to 3"):
        trainer.main(flags(corpus, tmp_path, "fourth", "--train.seed", 4, "--train.declared_runs", 3))


def test_a_closed_track_is_history(archive, record, runs):
    """Its records stand, in the table's last place; a new one is refused, by submit and by verify."""
    root, said = record.parents[1], {"track": "tiny", "name": "late", "contributors": ["a"], "what": "Nothing."}
    said["date"] = read_log(runs[0]).named("environment", "started")[:10]
    change_track(record, closed={"on": "9999-12-31", "why": "Nobody else has its data."})
    tracks = json.loads((root / "tracks.json").read_text())
    open_too = {name: value for name, value in tracks["tiny"].items() if name != "closed"}
    (root / "tracks.json").write_text(json.dumps(tracks | {"open": open_too}))
    shutil.copytree(root / "tiny", root / "open")
    assert verify(record) == []
    update(root, check=False)
    text = (root.parent / "README.md").read_text()
    assert text.index("**open**") < text.index("**tiny**: for tests.")
    assert "Closed since 9999-12-31, kept as history: Nobody else has its data." in text
    change_track(record, closed={"on": said["date"], "why": "Nobody else has its data."})
    with pytest.raises(InputError, match=r"^track tiny is closed since [\d-]+: Nobody else has its data\.$"):
        submit(root, runs, dict(said))
    assert verify(record) == [
        f"{record / 'record.json'}: track tiny is closed since {said['date']}: Nobody else has its data."
    ]


def test_a_track_of_which_something_is_unknown_is_not_open(record, runs):
    log = read_log(runs[0])
    said = {"track": "tiny", "name": "early", "date": log.named("environment", "started")[:10]}
    said |= {"contributors": ["a"], "what": "Nothing."}
    splits = {"test": {"examples": 7, "fingerprint": None}}
    for unknown in ({"target": None}, {"data": {"hash": None}}, {"judged_by": {"settings": {}, "splits": splits}}):
        change_track(record, why="Not downloaded.", **unknown)
        with pytest.raises(InputError, match="^track tiny is not open yet: Not downloaded.$"):
            submit(record.parents[1], runs, dict(said))


# --- tables and pictures


def test_leaderboard(archive, record):
    root = record.parents[1]
    assert len(update(root, check=True)) == 4  # two tables and two pictures
    update(root, check=False)
    assert update(root, check=True) == []
    text = (root.parent / "README.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("The rest.\n")
    assert "| 2 | [ours](records/tiny/" in text and "2.0 times as fast" in text
    (root.parent / "README.md").write_text(text.replace("| 2 | [ours]", "| 2 | [mine]"))
    assert update(root, check=True) == [root.parent / "README.md"]
    (root / "figures" / "tiny.png").write_bytes((root / "figures" / "pareto.png").read_bytes())
    assert root / "figures" / "tiny.png" in update(root, check=True)
    assert matches(83.9) == "crammed BERT" and matches(None) == matches(50.0) == "-" and matches(88.0) == "RoBERTa-base"


@pytest.mark.parametrize(
    "seconds,said",
    (
        (2.94, "2.9 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (112.54, "1 min 53 s"),
        (119.7, "2 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7199, "2 h 0 min"),
        (5400, "1 h 30 min"),
    ),
)
def test_durations_carry_over(seconds, said):
    assert duration(seconds) == said


def test_no_name_in_the_picture_lies_on_a_point_a_line_or_another_name(tmp_path):
    drawn, axes = figure(2)
    panels = draw_published(axes, {})
    drawn.savefig(tmp_path / "pareto.png")  # which lays it out for good
    for axis, names, points, lines in panels:
        boxes, inside = [name.get_window_extent() for name in names], axis.get_window_extent()
        assert len(boxes) == len(points) > 10
        assert all(inside.contains(*corner) for box in boxes for corner in box.corners())
        others = [Bbox(axis.transData.transform(line)).padded(3) for line in lines]
        others += [axis.get_legend().get_window_extent()]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in (*others, *boxes[:number])), names[number]
    pyplot.close(drawn)


def test_committed_tables_are_fresh():
    assert run_python("records/leaderboard.py", "--check").returncode == 0


def test_plot_draws_any_runs(runs, tmp_path):
    assert (runs[0] / "curves.png").exists()  # left by the trainer
    draw(runs, tmp_path / "three.png")
    assert (tmp_path / "three.png").stat().st_size > 10_000
    done = run_python("records/plot.py", runs[0], "--out", tmp_path / "four")
    assert done.returncode == 1 and "four is no .png, .svg or .pdf file" in done.stderr
    done = run_python("records/plot.py", str(tmp_path))
    assert done.returncode == 1 and "is not there: give the folder of a run" in done.stderr


# --- the baseline leaves a log of the same kind


def baseline(out: Path, name: str, *more: object) -> Path:
    modernbert.main([*map(str, more), "--train.out", str(out), "--train.run_name", name])
    return out / name


def test_baseline(corpus, tmp_path):
    train = {"row_tokens": 512, "steps": 6, "valid_every": 3, "log_every": 2, "grad_accum": 2}
    settings = {"shape": "bucketed", "lr": 1e-3, "data.dir": corpus, "data.max_length": 100, "data.valid_tokens": 1500}
    settings |= {f"train.{name}": value for name, value in train.items()}
    run = baseline(tmp_path, "baseline", *as_flags(settings | TINY_SHAPE))
    log, valid = read_log(run), losses(run, "val_loss")
    assert list(check_run(log)) == [] and log.named("result", "flops_counted_by") == WHOLE_LAST_LAYER
    assert valid[6] < valid[0] and log.named("data", "validation", "masked_tokens") > 0
    assert set(log.hashes) == {*trainer.MODULES, "records/baseline/modernbert.py"}
    assert json.loads((run / "model" / "config.json").read_text())["classifier_pooling"] == "mean"
    assert [(line["lr"] > 0, round(line["mask_rate"], 1)) for line in metrics_of(run)] == [(True, 0.3)] * 4
    assert all(series(log)[panel] for panel in ("loss", "lr", "mask", "rate"))
    # Its config.yaml repeats it, and what warms up before the clock starts moves no weight
    again = baseline(tmp_path, "again", "--config", run / "config.yaml", "--train.lr_warmup", 0)
    assert losses(again, "val_loss")[0] == valid[0] and losses(again, "val_loss")[6] != valid[6]
    again = baseline(tmp_path, "same", "--config", run / "config.yaml")
    assert losses(again, "train_loss") == losses(run, "train_loss")


def test_the_baseline_can_be_finetuned_and_judged(word_tokenizer, tmp_path):
    """Its model/ holds what the finetuner needs, the tokenizer with it."""
    tokenizer, data = AutoTokenizer.from_pretrained(word_tokenizer), tmp_path / "data"
    shutil.copytree(word_tokenizer, data / "tokenizer")
    texts = {split: [sentences(seed, 20, len(tokenizer))] for seed, split in enumerate(("train", "valid", "test"))}
    write_documents(data, texts, len(tokenizer), sha256_of(word_tokenizer / "tokenizer.json"))
    train = {"shape": "bucketed", "data.dir": data, "data.max_length": 32, "data.valid_tokens": 200}
    train |= {"train.row_tokens": 512, "train.steps": 2, "train.valid_every": 0}
    base = baseline(tmp_path, "baseline", *as_flags(train | TINY_SHAPE)) / "model"
    texts = [("the cat sat", "the dog ran"), ("a dog slept on the mat", "a cat ran under a tree")] * 10
    pairs = pd.DataFrame(texts, columns=["sentence_good", "sentence_bad"])
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    pairs.assign(label=[0, 1] * 10).to_csv(tmp_path / "labelled.csv", index=False)
    tasks = {"custom": {"data.dataset": tmp_path / "labelled.csv", "data.text": "sentence_good", "train.epochs": 1}}
    tasks["blimp"] = {"data.dataset": tmp_path / "pairs.csv"}
    for task, more in tasks.items():
        where = {"task": task, "train.base_model": base, "train.out": tmp_path, "train.run_name": task}
        finetuner.main(as_flags(where | more))
        report = json.loads((tmp_path / task / "metrics.json").read_text())
        assert report["base_model"] == str(base) and 0 <= report["model"]["metrics"][report["dev"]]["accuracy"] <= 1


def test_a_resumed_baseline_is_bit_identical_to_one_never_stopped(corpus, tmp_path):
    train = {"shape": "bucketed", "data.dir": corpus, "data.max_length": 100, "data.valid_tokens": 1500}
    train |= {"train.row_tokens": 512, "train.steps": 6, "train.valid_every": 0, "train.save_every": 3}
    settings = as_flags(train | TINY_SHAPE)
    whole = baseline(tmp_path, "whole", *settings)
    shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "model")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-000006")
    killed = baseline(tmp_path, "killed", *settings, "--train.resume", "auto")
    for file in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(InputError, match=r"other settings \(lr\)"):
        baseline(tmp_path, "killed", *settings, "--lr", 5e-4, "--train.resume", killed / "checkpoints" / "step-000003")
