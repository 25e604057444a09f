"""Kills runs of a small model at random, restarts them with the same command, and compares them with an unbroken one.

    python tests/soak.py --kills 100 --minutes 10
    python tests/soak.py --watch trainer.py --preset micro --train.steps 10000 ...

Weights must be the same to the bit, and so must the log, but for times and lines about resuming. A run that
ends otherwise is kept, named, and makes the exit code 1. --watch runs one command to its end instead, and prints its
memory and the time of its steps, from the first tenth to the last.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import flags, sentences, story, write_documents
from trainer import checkpoints_of, main

MORE = "--train.resume auto --train.start_afresh true --train.save_every 3"
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]


def start(data: Path, run: Path) -> int:
    """The command in a process of its own, forked off so that torch need not be imported each time."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(run.with_suffix(".out"), "ab", buffering=0) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        main(flags(data, run.parent, run.name, MORE))
        code = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # outside of training, as the script has it
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Its exit code; None if it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def moment(run: Path) -> str:
    """When the kill came, by its traces."""
    if (run / "model.tmp").exists():
        return "while it wrote the model"
    if list(run.glob("checkpoints/*.tmp")):
        return "while it wrote a checkpoint"
    if (run / "model").exists():
        return "after it wrote the model"
    if checkpoints_of(run):
        return "after a checkpoint"
    return "before the first checkpoint"


def damage(run: Path, dice: random.Random) -> None:
    """Cuts, empties or deletes a file of the newest checkpoint, or flips a bit."""
    path = dice.choice([path for path in checkpoints_of(run)[-1].iterdir() if path.suffix in (".safetensors", ".json")])
    content = bytearray(path.read_bytes())
    how = dice.choice(["cut", "empty", "gone", "flipped"])
    if how == "gone":
        return path.unlink()
    if how == "flipped":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flipped": content}[how])


def one_run(data: Path, run: Path, dice: random.Random, seconds: float) -> tuple[list[str], int | None]:
    """Up to five kills, then left alone. Returns what was done, and the last exit code, None if it hangs."""
    done = []
    for _ in range(dice.randint(1, 5)):
        process = start(data, run)
        code = wait(process, dice.uniform(0, 1.1 * seconds))
        if code is not None:
            return done, code
        number = dice.choice(SIGNALS)
        os.kill(process, number)
        code = wait(process, 60)
        done.append(f"{number.name} {moment(run)}")
        if code is None or number != signal.SIGKILL and code not in (0, 130, -number):
            return done, code
        if checkpoints_of(run) and dice.random() < 0.15 and not (run / "model").exists():
            damage(run, dice)
            done.append("the newest checkpoint damaged")
    return done, wait(start(data, run), 120)


def soak(kills: int, minutes: float, seed: int, folder: Path) -> bool:
    dice, end = random.Random(seed), time.monotonic() + 60 * minutes
    data = write_documents(
        folder / "data", {"train": [sentences(1, 300), sentences(2, 200)], "valid": [sentences(3, 60)]}
    )
    started = time.monotonic()
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    if wait(start(data, whole), 300) != 0:
        raise RuntimeError(f"the run never stopped failed: {whole.with_suffix('.out')}")
    seconds, weights = time.monotonic() - started, "model/model.safetensors"
    tried, held, runs = collections.Counter(), collections.Counter(), 0
    while sum(tried.values()) < kills and time.monotonic() < end:
        run = folder / f"{runs:04d}" / "run"
        run.parent.mkdir()
        done, code = one_run(data, run, dice, seconds)
        same = code == 0 and (run / weights).read_bytes() == (whole / weights).read_bytes()
        same = same and story(run) == story(whole)
        tried.update(done)
        held.update(done if same else [])
        runs += 1
        if same:
            shutil.rmtree(run.parent)
        else:
            print(f"not as one never stopped (exit code {code}): {run}; {', '.join(done)}")
    print(f"{runs} runs of 20 steps on {os.cpu_count()} cores, seed {seed}\n")
    print("| what was done | times | ended as a run never stopped |\n|---|---|---|")
    for what, times in sorted(tried.items()):
        print(f"| {what} | {times} | {held[what]} |")
    print(f"| all | {tried.total()} | {held.total()} |")
    return tried == held


def resident(process: int) -> float:
    """MB of memory that a process holds, without files that it maps."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1e3 if "RssAnon" in status else 0.0


def step_times(run: Path) -> list[float]:
    """Milliseconds of a step, one for each line of training losses but the first."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "train_loss" in line]
    pairs = [(a, b) for a, b in itertools.pairwise(found) if a.get("run") == b.get("run")]
    return [1e3 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs if b["step"] > a["step"]]


def watch(command: list[str], folder: Path) -> None:
    """Prints a table of memory and step times, a line for each tenth of the lines that the command logs.

    What comes after the last of them, such as a picture of the run, is left out.
    """
    run = folder / "run"
    where = ["--train.out", str(folder), "--train.run_name", "run"]
    process, found = subprocess.Popen([sys.executable, *command, *where], stdout=subprocess.DEVNULL), []
    while process.poll() is None:
        path = run / "metrics.jsonl"
        found.append((path.read_bytes().count(b"\n") if path.exists() else 0, resident(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"it failed with {process.returncode}")
    times, last = step_times(run), found[-1][0]
    print("| part of the run | MB at most | ms a step, median | least |\n|---|---|---|---|")
    for low, high in [(0, 5), *((tenth, tenth + 10) for tenth in range(0, 100, 10))]:
        memory = [mb for line, mb in found if low * last < 100 * line <= high * last and line < last]
        part = times[len(times) * low // 100 : len(times) * high // 100]
        median, least = statistics.median(part), min(part)
        print(f"| {low} to {high}% | {max(memory, default=math.nan):.1f} | {median:.2f} | {least:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="faults at least, if time allows [100]")
    parser.add_argument("--minutes", type=float, default=10, help="after which no further run is begun [10]")
    parser.add_argument("--seed", type=int, default=1, help="of what is done when [1]")
    parser.add_argument("--watch", nargs=argparse.REMAINDER, metavar="COMMAND", help="trainer.py or finetuner.py ...")
    arguments = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="soak-"))
    if arguments.watch:
        watch(arguments.watch, where)
    elif not soak(arguments.kills, arguments.minutes, arguments.seed, where):
        sys.exit(1)
    shutil.rmtree(where)
