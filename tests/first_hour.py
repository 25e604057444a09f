"""The first hour on a new machine, as one command: is everything right there, and how fast is it?

    python tests/first_hour.py              every part, on whatever is there: one GPU, several, or a CPU
    python tests/first_hour.py --part 3     one of them, each meant for 8 minutes of an H100 (but for --minutes)
    python tests/first_hour.py --expect     what to expect on which GPU, computed

Needs no network: speed is measured on made-up documents with ModernBERT's vocabulary, training on the embedded sample.
What the machine lacks is skipped with its reason; without a GPU, or with --small, shapes are tiny and runs eager. Each
check runs in processes of its own, so that one that fails spoils no other. logs/first_hour/ keeps report.md, which is
what to send, and the output of every command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dataloading import InputError, first_line, sha256_of, write_json, write_shard
from model import PRESETS, KBERTConfig
from records.log import MASKED_LAST_LAYER, PEAK_FLOPS, Work, environment, read_log
from trainer import choose_cuda, why_eager

MODERNBERT = {"vocab_size": 50_368, "cls": 50_281, "sep": 50_282, "pad": 50_283, "mask": 50_284, "unk": 50_280}
TINY = "--model.num_hidden_layers 2 --model.hidden_size 64 --model.num_attention_heads 1 --model.intermediate_size 64"
TINY += " --data.max_length 256 --train.row_tokens 1024 --train.compile false"


@dataclass
class Machine:
    out: Path
    device: torch.device
    gpus: int
    minutes: float  # of the training run
    small: bool  # tiny shapes: a CPU, and continuous integration

    @property
    def flags(self) -> str:
        """For this script, started again."""
        return f"--out {shlex.quote(str(self.out))}" + " --small" * self.small

    @property
    def data(self) -> Path:
        return self.out / "made_up"

    @property
    def row_tokens(self) -> int:
        """What should fit for `base`, at about 1.2 MB a token: 65,536 in 80 GB, 16,384 in 24."""
        if self.small:
            return 1024
        memory = torch.cuda.get_device_properties(0).total_memory
        return next((size for size in (65536, 32768, 16384) if size * 1.2e6 < memory), 8192)

    def run(self, name: str, command: str, processes: int = 1, timeout: float = 480) -> subprocess.CompletedProcess:
        """command: a script of the repository and its arguments. Its output goes to NAME.txt."""
        whole, streams = launched(command, processes), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # Unbuffered, what was printed before a time limit is there
        process = subprocess.Popen(whole, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True, **streams)
        try:
            output, errors = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers, which would outlive it if it were killed
            output, errors = process.communicate(timeout=60)
            code, output = 124, f"{output}\nmore than {timeout} s"
        finally:
            process.kill()
        done = subprocess.CompletedProcess(whole, code, output, errors)
        said = f"$ {shlex.join(whole[1:])}\n{done.stdout}\n{done.stderr}"
        (self.out / f"{name}.txt").write_text(said, encoding="utf-8")
        return done

    def train_command(self, name: str, preset: str, more: str) -> str:
        """A command that trains on the made-up data."""
        shape = TINY if self.small else "--data.max_length 1024"
        data = f"--data.dir {shlex.quote(str(self.data))} --data.valid_tokens 20000"
        return f"trainer.py --preset {preset} {data} {shape} --train.valid_every 0 {self.fresh(name)} {more}"

    def train(self, name: str, preset: str, more: str, processes: int = 1) -> subprocess.CompletedProcess:
        return self.run(f"{name}_output", self.train_command(name, preset, more), processes, timeout=900)

    def fresh(self, name: str) -> str:
        """Flags of a run; deletes what an earlier hour left there."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        return f"--train.out {shlex.quote(str(self.out))} --train.run_name {name}"


def launched(command: str, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), *shlex.split(command)]


Check = tuple[str, str, str]  # what, "ok", "FAILED" or "skipped", and the figure or the reason


def verdict(what: str, done: subprocess.CompletedProcess, figure: str = "") -> Check:
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode:
        wrong = [line for line in done.stderr.splitlines() if re.search(r"error: |\w+Error: ", line)]
        return what, "FAILED", f"exit code {done.returncode}: {wrong[0].strip() if wrong else last}"
    return what, "ok", figure or last


def make_data(folder: Path, tokens: int) -> None:
    """Shards of made-up documents of 60 to 1,024 tokens, with Zipfian word frequencies."""
    rng = np.random.default_rng(0)
    rank = np.arange(1, 50_001)
    odds = (1 / rank) / (1 / rank).sum()
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, size in (("train", tokens), ("valid", 40_000), ("test", 40_000)):
        lengths = np.exp(rng.uniform(np.log(60), np.log(1022), size // 300)).astype(int)
        ends = np.cumsum(lengths + 2)
        ids = rng.choice(50_000, ends[-1], p=odds).astype(np.uint16)
        ids[ends - lengths - 2], ids[ends - 1] = MODERNBERT["cls"], MODERNBERT["sep"]
        path = folder / f"made_up_{split}_000000.bin"
        write_shard(path, ids)
        entry = {"split": split, "tokens": len(ids), "documents": len(lengths), "sha256": sha256_of(path)}
        shards[path.name] = entry
    tokenizer = {"name": "made up", "sha256": "none", **MODERNBERT}
    source = {"source": {"name": "made up"}, "split_rule": "drawn apart"}
    write_json(folder / "manifest.json", {"format": 1, "tokenizer": tokenizer, "shards": shards, **source})


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def correctness(machine: Machine) -> Iterator[Check]:
    """Versions, and agreement with fp64."""
    here = environment(machine.device, machine.gpus or 1)
    for name in ("device", "driver", "cuda", "torch", "transformers", "python"):
        yield name, "ok" if name in here else "skipped", str(here.get(name, "none"))
    obstacle = why_eager(machine.device)
    yield "compiler", "FAILED" if obstacle else "ok", obstacle or "found"
    if machine.gpus:
        if importlib.util.find_spec("pytest"):
            many = "-n 4" if importlib.util.find_spec("xdist") else ""  # compiling, most of the time
            for which, spread in (("not 64k", many), ("64k", "")):  # which needs the memory for itself
                command = f"-m pytest -v {spread} tests/test_gpu.py -k '{which}'"
                done = machine.run(f"test_gpu_{which.replace(' ', '_')}", command, timeout=900)
                yield verdict(f"tests/test_gpu.py, {which}", done)
        else:
            yield "tests/test_gpu.py", "skipped", "no pytest: pip install -r requirements-dev.txt"
    else:
        yield "tests/test_gpu.py", "skipped", "no GPU"


def one_graph(machine: Machine) -> Iterator[Check]:
    """20 steps: graphs compiled, waits of the host, peak memory, and the row that fits."""
    for preset, objective in (("base", "mlm"), ("large", "mlm"), ("base", "rtd")):
        command = f"tests/first_hour.py --probe {preset} {objective} {machine.flags}"
        done = machine.run(f"probe_{preset}_{objective}", command)
        figure = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""
        yield verdict(f"20 steps of {preset}, {objective}", done, figure)


def ranks(machine: Machine) -> Iterator[Check]:
    """An interruption and what follows, two processes as one, an error on one of them."""
    yield from interruption(machine)
    if machine.gpus == 1:
        yield "1 and 2 GPUs", "skipped", "one GPU"
    else:
        batch = f"{2 * machine.row_tokens} --train.row_tokens {machine.row_tokens}"
        steps = f"--train.steps 20 --train.log_every 1 --train.batch_tokens {batch}"
        for n in (1, 2):
            yield verdict(f"20 steps on {n}", machine.train(f"ranks{n}", "base", steps, processes=n))
        one, two = ([line.train_loss for line in read_log(machine.out / f"ranks{n}").lines] for n in (1, 2))
        apart = max(abs(a - b) for a, b in zip(one, two) if a is not None and b is not None)
        yield "1 and 2 processes agree", "ok" if apart < 0.02 else "FAILED", f"losses within {apart:.4f}"
        done = machine.run("one_fails", f"tests/first_hour.py --fail {machine.flags}", processes=2, timeout=180)
        # From the error on: a rank that waits for it on a GPU lasts until torchrun kills it, 30 seconds later
        spent = time.time() - float((re.findall(r"failed at (\S+)", done.stdout) or ["-inf"])[-1])
        good = done.returncode != 0 and spent < 60
        yield "an error on one rank ends all", "ok" if good else "FAILED", f"{spent:.0f} s"


def interruption(machine: Machine) -> Iterator[Check]:
    processes, steps = 2 if machine.gpus > 1 else 1, "--train.steps 60 --train.grad_accum 1 --train.log_every 5"
    command = machine.train_command("interrupted", "base", steps)
    log = machine.out / "interrupted" / "log.txt"
    with open(machine.out / "interrupted.txt", "w") as output:
        process = subprocess.Popen(launched(command, processes), cwd=ROOT, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and "step:10/" in log.read_text(errors="ignore"):
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)  # too late or not: torchrun, once killed, would leave its workers behind
        signalled = time.monotonic()
        try:
            code = process.wait(120)
        finally:
            process.kill()
    spent = time.monotonic() - signalled
    saved = sorted(path.name for path in machine.out.glob("interrupted/checkpoints/*"))
    good = saved and (code == 0 or processes > 1)  # torchrun has a code of its own for a signal
    yield "SIGTERM saves and ends", "ok" if good else "FAILED", f"{spent:.0f} s, exit code {code}, {saved}"
    yield verdict("and the run goes on", machine.run("resumed", f"{command} --train.resume auto", processes))


def kernels(machine: Machine) -> Iterator[Check]:
    """Where a step's time goes, and each way of attention."""
    if machine.small:
        shape = "--layers 2 --hidden 64 --heads 1 --intermediate 64 --row-tokens 1024 --max-length 256"
    else:
        shape = f"--preset base --max-length 1024 --row-tokens {machine.row_tokens}"
    for mode in ("--profile", "--attention"):
        if mode == "--attention" and not machine.gpus:
            yield "attention", "skipped", "FlexAttention has no backward on a CPU"
            continue
        data = shlex.quote(str(machine.data))
        done = machine.run(mode[2:], f"tests/benchmark.py --data {data} {shape} {mode} --json")
        yield verdict(mode[2:], done)


def speed(machine: Machine) -> Iterator[Check]:
    """Tokens a second and MFU of every preset, on one GPU and on all, in steps of about a million tokens."""
    steps = "--train.steps 12 --train.log_every 3"
    for preset in ("micro", "small", "base", "large") if not machine.small else ("micro",):
        for processes in sorted({1, max(1, machine.gpus)}):
            name = f"speed_{preset}_{processes}"
            tokens = 65536 * processes * max(1, 16 // processes)  # which any row divides
            batch = "grad_accum 1" if machine.small else f"batch_tokens {tokens} --train.row_tokens none"
            done = machine.train(name, preset, f"{steps} --train.{batch}", processes)
            figure = rate(machine.out / name, processes) if done.returncode == 0 else ""
            yield verdict(f"{preset} on {processes}", done, figure)


def rate(run: Path, processes: int) -> str:
    """Of the last two lines' steps."""
    log = read_log(run)
    lines = [line for line in log.lines if line.train_loss is not None]
    first, last = lines[-3], lines[-1]
    steps, seconds = last.step - first.step, last.seconds - first.seconds
    mfu = (last.flops - first.flops) / seconds / log.named("environment", "peak_flops")
    row = log.named("config", "train", "row_tokens")
    per_second = (last.tokens - first.tokens) / seconds
    took = f"{1000 * seconds / steps:.1f} ms a step"
    return f"{per_second:,.0f} tokens/s, MFU {mfu:.1%}, rows of {row} tokens on {processes}, {took}"


def training(machine: Machine) -> Iterator[Check]:
    """A run whose log is kept, its finetuning, the baseline, and three runs that may be a record."""
    if machine.small:
        data = shlex.quote(str(machine.data))
        settings = f"{TINY} --data.dir {data} --train.batch_tokens 2048 --data.valid_tokens 20000"
    else:
        step = 8192 * machine.gpus * max(1, 8 // machine.gpus)  # 65,536 tokens, where so many GPUs share them evenly
        settings = f"--model.num_hidden_layers 7 --train.batch_tokens {step} --train.row_tokens none"
        settings += " --train.log_every 50"
    command = f"trainer.py --preset micro {settings} --train.max_minutes {machine.minutes} {machine.fresh('trained')}"
    done = machine.run("training", command, max(1, machine.gpus), timeout=60 * machine.minutes + 420)
    figure = ""
    if done.returncode == 0:
        result = read_log(machine.out / "trained").named("result")
        figure = f"validation loss {result['val_loss']:.4f} after {result['seconds']:.0f} s, {result['step']} steps"
    yield verdict(f"{machine.minutes:g} minutes of training", done, figure)
    if not machine.small:
        base = shlex.quote(str(machine.out / "trained" / "model"))
        command = f"finetuner.py --preset micro --train.base_model {base} {machine.fresh('tuned')}"
        yield verdict("finetuning on the sample's pairs", machine.run("tuned_output", command, max(1, machine.gpus)))
        command = f"records/baseline/modernbert.py --preset micro --train.steps 100 {machine.fresh('baseline')}"
        yield verdict("100 steps of the baseline", machine.run("baseline_output", command))
        yield from declared(machine)


def declared(machine: Machine) -> Iterator[Check]:
    """Three runs of the track sample-1xgpu, if the sample is the track's."""
    losses, log = [], None
    for seed in (1, 2, 3):
        name = f"declared-{seed}"
        command = "trainer.py --preset micro --train.batch_tokens 16384 --train.row_tokens 16384 --train.epochs 4 "
        command += f"--train.declared_runs 3 --train.seed {seed} {machine.fresh(name)}"
        done = machine.run(f"{name}_output", command)
        if done.returncode:
            yield verdict(f"declared run {seed}", done)
            return
        log = read_log(machine.out / name)
        losses.append(f"{log.named('result', 'val_loss'):.4f} in {log.named('result', 'seconds'):.1f} s")
    tracks = json.loads((ROOT / "records" / "tracks.json").read_text())
    same = tracks["sample-1xgpu"]["data"]["hash"] == log.named("data", "hash")
    yield "three declared runs", "ok", f"{', '.join(losses)}; {'the' if same else 'not the'} track's sample"


PARTS: dict[int, Callable[[Machine], Iterator[Check]]] = {
    1: correctness,
    2: one_graph,
    3: ranks,
    4: kernels,
    5: speed,
    6: training,
}


def checks_of(number: int, machine: Machine) -> Iterator[Check]:
    """A part's checks. If it breaks off, that is a failed check, and the other parts go on."""
    try:
        yield from PARTS[number](machine)
    except Exception as error:
        yield "the rest of this part", "FAILED", f"{type(error).__name__}: {first_line(error)}"


# ---------------------------------------------------------------------------------------------------------------------
# What to expect, computed: nothing of this has been measured

# Memory in bytes a second; FLOP/s are those of records/log.py.
BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L40S": 0.86e12, "RTX 4090": 1.01e12}


def expected_rate(preset: str, gpu: str, tokens: int = 65_536, longest: int = 1024) -> tuple[float, float]:
    """Tokens a second and MFU of one GPU, of a row of documents of `longest` tokens, forward and backward.

    Products at two thirds of peak, the head's at 0.54, attention's at 0.35 forward and 0.24 backward (FlexAttention, in
    blocks of 128, of which a local layer computes three); the rest moves 85 bytes for a token, layer and unit of width,
    and 15.5 for one of GeGLU's, at nine tenths of the bandwidth (records/notebook.md, on a GPU's compiler).
    """
    config, peak = KBERTConfig(**PRESETS[preset]), PEAK_FLOPS[gpu]
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    global_layers = sum(config.is_global(layer) for layer in range(layers))
    masked = round(0.225 * tokens)
    matrices = 3 * 2 * tokens * layers * (4 * d * d + 3 * d * f)
    head = 3 * 2 * masked * d * config.vocab_size
    attention = 4 * d * tokens * (global_layers * longest + (layers - global_layers) * 384)
    moved = tokens * layers * (85 * d + 15.5 * f)
    seconds = matrices / (0.66 * peak) + head / (0.54 * peak) + moved / (0.9 * BANDWIDTH[gpu]) + 0.002
    seconds += attention / (0.35 * peak) + 2.5 * attention / (0.24 * peak)
    work = Work()
    work.add(np.full(tokens // longest, longest), masked, config.local_attention_window)
    return tokens / seconds, work.training_flops(config, MASKED_LAST_LAYER) / seconds / peak


def expectations() -> str:
    """A table for the README."""
    lines = ["| GPU | `small` | `base` | MFU of `base` | `large` | default run of `base` on one; on eight |"]
    lines.append("|---|---|---|---|---|---|")
    for gpu in BANDWIDTH:
        rates = {preset: expected_rate(preset, gpu) for preset in ("small", "base", "large")}
        small, base, large = (f"{tokens / 1000:,.0f}k" for tokens, _ in rates.values())
        hours = 10_000 * 1_048_576 / rates["base"][0] / 3600
        run = f"{hours:.1f} h; {60 * hours / 8:.0f} min"
        lines.append(f"| {gpu} | {small} | {base} | {rates['base'][1]:.0%} | {large} | {run} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What the parts run in processes of their own


def probe(machine: Machine, preset: str, objective: str) -> None:
    """20 steps of a preset; prints one line: the row that fits, graphs, waits, peak memory. New graphs, or waits in the
    steps, are an error.
    """
    import warnings

    from dataloading import Loader, read_manifest
    from objectives import mask_count
    from tests.benchmark import Ours
    from trainer import Process, TrainConfig, candidate_rows, fit_row_tokens, mask_rate, model_config

    shape = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=1, intermediate_size=64)
    shape = shape if machine.small else PRESETS[preset]
    manifest, longest = read_manifest(machine.data), 256 if machine.small else 1024
    config = model_config(manifest["tokenizer"], longest, shape)
    process, sides = Process(0, 1, machine.device), []

    def attempt(row_tokens: int) -> None:
        sides.clear()
        sides.append(Ours(config, preset, row_tokens, longest, process, objective))

    sizes = [1024] if machine.small else candidate_rows(TrainConfig(), process)  # a run's
    row_tokens = fit_row_tokens(sizes, process, attempt)
    loader = Loader(machine.data, manifest, "train", row_tokens, longest, seed=1, device=machine.device)
    rows = [row for row, _ in zip(loader, range(20))]
    torch._dynamo.utils.counters.clear()
    if machine.gpus:
        torch.cuda.reset_peak_memory_stats()  # fit_row_tokens held memory back, and tried what does not fit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if machine.gpus:
            torch.cuda.set_sync_debug_mode("warn")
        for row in rows:
            loss = sides[0].step(row, mask_count(mask_rate(0.0, sides[0].train), row_tokens))
        if machine.gpus:
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # since the warm-up
    memory = torch.cuda.max_memory_allocated() / 2**30 if machine.gpus else float("nan")
    counted = f"{graphs} new graphs, {waits} waits of the host"
    print(f"rows of {row_tokens}, {counted}, {memory:.1f} GiB, loss {loss.item():.3f}")
    if graphs or waits:
        raise RuntimeError(f"{counted} in 20 steps, where there should be none")


def fail_on_one_rank(machine: Machine) -> None:
    """Rank 1 raises while the other waits for it."""
    import torch.distributed as dist

    from trainer import join_processes, stop_signals

    with stop_signals(), join_processes() as process:  # as training does
        if process.rank == 1:
            print(f"failed at {time.time()}")
            raise RuntimeError("rank 1 fails, as it should")
        dist.all_reduce(torch.zeros(1, device=process.device))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, action="append", help="run this part alone [all]")
    parser.add_argument("--out", type=Path, default=Path("logs/first_hour"), help="folder for all it leaves")
    parser.add_argument("--minutes", type=float, default=10, help="of the training run [10]")
    parser.add_argument("--small", action="store_true", help="tiny shapes, as on a machine without a GPU")
    parser.add_argument("--expect", action="store_true", help="print what to expect, computed, and run nothing")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--fail", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.expect:
        return print(expectations())
    try:
        gpus = torch.cuda.device_count() if choose_cuda("auto") else 0
    except InputError as error:  # a driver that is too old: not a machine without a GPU
        sys.exit(f"error: {error}")
    device = torch.device("cuda" if gpus else "cpu")
    out = arguments.out.resolve()
    machine = Machine(out, device, gpus, arguments.minutes, arguments.small or not gpus)
    if arguments.fail:
        return fail_on_one_rank(machine)
    if not (machine.data / "manifest.json").exists():
        make_data(machine.data, 300_000 if machine.small else 20_000_000)
    if arguments.probe:
        return probe(machine, *arguments.probe)
    report, failed = open(out / "report.md", "a", encoding="utf-8"), 0
    for number in arguments.part or PARTS:
        started, title = time.monotonic(), f"Part {number}: {PARTS[number].__doc__.splitlines()[0]}"
        print(f"\n{title}", flush=True)
        report.write(f"\n{title}\n\n| check | | |\n|---|---|---|\n")
        for what, state, figure in checks_of(number, machine):
            failed += state == "FAILED"
            print(f"  {state:8s}{what}: {figure}", flush=True)
            report.write(f"| {what} | {state} | {figure} |\n")
            report.flush()
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    print(f"\nreport: {out / 'report.md'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
