"""Our training step against `transformers.ModernBertForMaskedLM` of the same shape, on the same documents, in one run.

    python tests/benchmark.py                                               the micro shape on the embedded sample
    python tests/benchmark.py --data DIR --layers 6 --hidden 384 --heads 6 --intermediate 576
    python tests/benchmark.py --data DIR ... --train-minutes 15             train both that long, each by its own schedule: curves of validation loss
    python tests/benchmark.py --preset base --data DIR --row-tokens 65536   on a GPU
    python tests/benchmark.py --profile ...                                 our step by kind of kernel
    python tests/benchmark.py --attention --preset base --data DIR ...      FlexAttention against varlen_attn, on a GPU
    python tests/benchmark.py --loader                                      the loader alone, on one core
    python tests/benchmark.py --packing 'corpus/*.jsonl.xz' --data DIR      packing against `tokenizers` alone, with DIR's tokenizer

The reference (records/baseline/modernbert.py) gets AdamW, bf16 autocast, sdpa, prediction at masked positions only, and the batch shape
that suits it best: bucketed or concatenated, eager or, where shapes are static, compiled. Both sides take turns, so that a busy machine
slows both; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, Loader, Row, read_manifest
from model import PRESETS, KBERTConfig, KBERTForMaskedLM, attend, flex_mask
from records.baseline.modernbert import RECIPE, Reference
from trainer import PRESETS as TRAINER_PRESETS
from trainer import (
    ROOT,
    Clock,
    Place,
    TrainConfig,
    Work,
    can_compile,
    draw_masks,
    lr_factor,
    make_loss,
    make_optimizer,
    mask_count,
    mask_rate,
    model_config,
    muon_momentum,
    peak_flops,
    processes,
    validate,
    warm_up,
)

MASK_RATE = 0.30  # of the timed steps: ModernBERT's


def schedule(settings: dict, minutes: float | None) -> TrainConfig:
    """What a preset of the trainer, or the baseline's recipe, says of training."""
    return TrainConfig(
        **{name.removeprefix("train."): value for name, value in settings.items() if name.startswith("train.")}
        | {"max_minutes": minutes}
    )


class Ours:
    """KBERT: blockwise or FlexAttention on packed rows, Muon and Adam, compiled."""

    name = "kbert"

    def __init__(self, config: KBERTConfig, train: TrainConfig, row_tokens: int, max_length: int, device: torch.device):
        torch.manual_seed(1)
        self.config, self.train, self.max_length = config, train, max_length
        self.model = KBERTForMaskedLM(config).to(device)
        self.model.encoder.compute_dtype = torch.bfloat16
        compiled = can_compile(device)
        self.optimizer = make_optimizer(self.model, train, rank=0, world_size=1, compiled=compiled)
        self.loss_of = make_loss(self.model, compiled)
        warm_up(self.model, self.loss_of, self.optimizer, train, row_tokens, max_length, device)

    def gradients(self, row: Row, count: int) -> torch.Tensor:
        input_ids, masked, targets = draw_masks(row, count, 1, self.config.mask_token_id)
        loss = self.loss_of(
            input_ids,
            row.document_ids,
            row.positions,
            masked,
            targets,
            max_seqlen=self.max_length,
            window=self.config.local_attention_window,
        )
        loss = loss / min(count, row.round_text[0])
        loss.backward()
        return loss.detach()

    def step(self, row: Row, count: int, progress: float) -> torch.Tensor:
        loss = self.gradients(row, count)
        self.optimizer.step(lr_factor(progress, self.train), muon_momentum(progress, self.train))
        return loss

    def validate(self, loader: Loader, place: Place) -> float:
        return validate(
            self.loss_of, loader, self.config.mask_token_id, self.config.local_attention_window, self.max_length, place
        )


def peak_memory_mb(device: torch.device) -> float:
    """Of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def timed(side, rows: list[Row], device: torch.device) -> list[float]:
    seconds = []
    for row in rows:
        start = time.perf_counter()
        side.step(row, mask_count(MASK_RATE, row.input_ids.size(0)), 0.5).item()
        seconds.append(time.perf_counter() - start)
    return seconds


def compare_steps(arguments, config, train, new_loader, place) -> dict:
    device, reference_row_tokens = place.device, arguments.reference_row_tokens or arguments.row_tokens
    train.lr_warmup = 0.0
    variants = [("bucketed", False), ("concatenated", False)] + [("concatenated", True)] * can_compile(device)
    sides = [Ours(config, train, arguments.row_tokens, arguments.max_length, device)]
    memory = {sides[0].name: peak_memory_mb(device)}  # its warm-up is a whole step
    sides += [
        Reference(config, train, arguments.max_length, device, shape, compiled, 1e-4) for shape, compiled in variants
    ]
    rows = {side.name: iter(new_loader() if side is sides[0] else new_loader(reference_row_tokens)) for side in sides}
    seconds, tokens = ({side.name: [] for side in sides} for _ in range(2))
    for turn in range(1 + arguments.rounds):  # the first one compiles
        for side in list(sides):
            batch = [next(rows[side.name]) for _ in range(arguments.steps if turn else 2)]
            try:
                spent = timed(side, batch, device)
            except torch.OutOfMemoryError:
                if side is sides[0]:
                    raise
                print(f"{side.name} does not fit into the GPU's memory and is left out: lower --reference-row-tokens")
                sides.remove(side)
                continue
            memory.setdefault(side.name, peak_memory_mb(device))
            if turn:
                seconds[side.name] += spent
                tokens[side.name] += [int(row.round_lengths.sum()) for row in batch]
    rates = {side.name: statistics.median(tokens[side.name]) / statistics.median(seconds[side.name]) for side in sides}
    for name, rate in rates.items():
        print(
            f"{name:34s} {rate:10,.0f} tokens/s   step {1000 * statistics.median(seconds[name]):8.0f} ms   memory so far {memory[name]:7,.0f} MB"
        )
    ours = rates.pop("kbert")
    if not rates:
        raise InputError("no reference fits into the GPU's memory: lower --reference-row-tokens")
    best = max(rates, key=rates.get)
    work, peak = Work(), peak_flops(device)
    work.add(
        next(rows["kbert"]).round_lengths, mask_count(MASK_RATE, arguments.row_tokens), config.local_attention_window
    )
    return {
        "ours_tokens_per_s": round(ours),
        "reference_tokens_per_s": round(rates[best]),
        "ratio": round(ours / rates[best], 3),
        "reference": best,
        "variants": {name: round(rate) for name, rate in rates.items()},
        "mfu": round(work.training_flops(config) / statistics.median(seconds["kbert"]) / peak, 4),
        "ours_peak_memory_mb": round(memory["kbert"]),
    }


# Kernels by name, the first that fits; the optimizer's are counted apart. On a CPU, bmm is attention by tiles, and what is left of a
# compiled graph without the products it calls is elementwise.
KINDS = {
    "attention": r"flex|flash|fmha|attention|bmm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|linear|\bmm\b|::mm|addmm",
    "elementwise": r"CompiledFxGraph|triton|fused|elementwise|vectorized|reduce|copy|aten::|index|cat",
}


def profile_step(arguments, config, train, loader, place) -> dict:
    """Milliseconds of a step by kind of kernel, mean of three steps; what no kernel fills is idle."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda, rows, count = place.device.type == "cuda", iter(loader), mask_count(MASK_RATE, arguments.row_tokens)
    side, milliseconds, wall = Ours(config, train, arguments.row_tokens, arguments.max_length, place.device), {}, 0.0
    timed(side, [next(rows) for _ in range(2)], place.device)
    for row in [next(rows) for _ in range(3)]:
        for optimizing in (False, True):
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
                start = time.perf_counter()
                if optimizing:
                    side.optimizer.step(1.0, 0.95)
                else:
                    side.gradients(row, count)
                if cuda:
                    torch.cuda.synchronize()
                wall += 1000 * (time.perf_counter() - start) / 3
            for event in found.key_averages():
                if (event.device_type == DeviceType.CUDA) == cuda:
                    kind = (
                        "optimizer"
                        if optimizing
                        else next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
                    )
                    spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                    milliseconds[kind] = milliseconds.get(kind, 0.0) + spent / 3000
    milliseconds["idle"] = max(0.0, wall - sum(milliseconds.values()))
    for kind, spent in sorted(milliseconds.items(), key=lambda item: -item[1]):
        print(f"{kind:16s} {spent:9.1f} ms  {100 * spent / wall:5.1f}%")
    return {"step_ms": round(wall, 2), "shares": {kind: round(spent / wall, 4) for kind, spent in milliseconds.items()}}


def compare_attention(arguments, config, loader, place) -> dict:
    """Forward and backward of one layer's attention on a real row: FlexAttention, mask included, with its default and with tuned
    tiles, in blocks of 128 and of 64 tokens, against varlen_attn."""
    from torch.nn.attention.varlen import varlen_attn

    if place.device.type != "cuda":
        raise InputError("--attention needs a GPU: FlexAttention has no backward on a CPU")
    row, H, D = next(iter(loader)), config.num_attention_heads, config.hidden_size // config.num_attention_heads
    q, k, v = (
        torch.randn(1, row.input_ids.size(0), H, D, device=place.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    ends = torch.bincount(row.document_ids).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    longest = int(cu_seqlens.diff().max())

    def flex(q, k, v, window):
        return attend(q, k, v, flex_mask(row.document_ids, window), 0.12)

    def flex_64(q, k, v, window):  # a local layer computes 192 keys for a query, not 384
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=flex_mask(row.document_ids, window, 64), scale=0.12).transpose(1, 2)

    def varlen(q, k, v, window):
        sides = (-1, -1) if window is None else (window, window)
        return varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, scale=0.12, window_size=sides)[
            None
        ]

    tuned = {
        "max_autotune": True
    }  # the default backward kernel has tiles of 128 keys, which do not divide blocks of 64
    ways = {
        "flex": torch.compile(flex),
        "flex, tuned": torch.compile(flex, options=tuned),
        "flex, tuned, blocks of 64": torch.compile(flex_64, options=tuned),
        "varlen": varlen,
    }
    result = {}
    for window in (config.local_attention_window // 2, None):
        expected = ways["flex"](q, k, v, window).detach()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(23):
            for name, call in ways.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = call(q, k, v, window)
                out.sum().backward()
                torch.cuda.synchronize()
                if turn >= 3:  # compiled, and warm
                    seconds[name].append(time.perf_counter() - start)
                elif (error := float((out - expected).norm() / expected.norm())) > 0.01:
                    raise InputError(
                        f"{name} differs from flex by {error:.3f} at window {window}: its figure would mean nothing"
                    )
        times = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
        print(
            f"window {window}: "
            + ", ".join(
                f"{name} {spent:.2f} ms ({spent / times['flex']:.2f} of flex's)" for name, spent in times.items()
            )
        )
        result["global" if window is None else "local"] = {name: round(value, 3) for name, value in times.items()}
    return {"attention_ms": result}


def measure_loader(loader: Loader, seconds: float = 5.0) -> dict:
    """Tokens a second from warm shards, by one thread, the first epoch's opening of shards included."""
    torch.set_num_threads(1)
    for _ in zip(range(20), loader):
        pass
    tokens, padding, start = 0, 0, time.perf_counter()
    for row in loader:
        real = int(row.round_lengths.sum())
        tokens, padding = tokens + real, padding + row.input_ids.size(0) - real
        if (taken := time.perf_counter() - start) > seconds:
            break
    print(
        f"{tokens / taken / 1e6:.1f}M tokens/s, {100 * padding / (tokens + padding):.3f}% padding, {tokens:,} tokens in {taken:.1f} s"
    )
    return {"loader_tokens_per_s": round(tokens / taken), "padding": padding / (tokens + padding)}


def measure_packing(directory: Path, files: list[str]) -> dict:
    """Packing files, start-up and all, against `tokenizers` alone on the same texts in the same batches; both on all cores."""
    from data.train_tokenizer import add_source_flags, bring_tokenizer, open_source, read_texts

    seconds, tokenizer = {}, str(directory / "tokenizer")
    source = argparse.ArgumentParser()
    add_source_flags(source)
    source = source.parse_args(
        ["--files", *files, "--batch_characters", "8_000_000"]
    )  # enough to keep every thread of `tokenizers` busy to the batch's end
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                ROOT / "data" / "pack_fineweb_edu.py",
                "--files",
                *files,
                "--tokenizer",
                tokenizer,
                "--out",
                out,
            ],
            check=True,
        )
        seconds["packing"] = time.perf_counter() - start
        tokens = sum(entry["tokens"] for entry in read_manifest(Path(out))["shards"].values())
        backend, _ = bring_tokenizer(tokenizer, Path(out))
    stream, sizes, _ = open_source(source)
    batches = [texts for texts, _ in read_texts(stream, sizes, source.text_field, source.batch_characters)]
    start = time.perf_counter()
    for texts in batches:
        backend.encode_batch_fast(texts, add_special_tokens=False)
    seconds["tokenizers alone"] = time.perf_counter() - start
    for name, taken in seconds.items():
        print(f"{name:16s} {taken:7.1f} s  {tokens / taken / 1e6:.2f}M tokens/s")
    return {"packing_seconds": {name: round(taken, 2) for name, taken in seconds.items()}, "tokens": tokens}


def train_for(
    side, loader: Loader, valid: Loader, train: TrainConfig, row_tokens: int, place: Place, curve: list
) -> float:
    """Trains a side for train.max_minutes, appending [seconds, step, validation loss] to `curve`. Returns the last loss."""
    clock, step, rows, next_validation = Clock(place.device, 0.0), 0, iter(loader), 0.0
    while True:
        progress = min(1.0, clock.now() / (60 * train.max_minutes))
        if progress >= next_validation or progress >= 1:
            clock.stop()
            curve.append([round(clock.seconds, 1), step, side.validate(valid, place)])
            print(
                f"{side.name:34s} {clock.seconds:7.1f} s  step {step:6d}  validation loss {curve[-1][2]:.4f}",
                flush=True,
            )
            next_validation += 1 / 10
        if progress >= 1:
            rows.close()
            return curve[-1][2]
        clock.start()
        loss = side.step(next(rows), mask_count(mask_rate(progress, train), row_tokens), progress).item()
        assert math.isfinite(loss), f"{side.name} diverged at step {step}"
        step += 1


def compare_training(arguments, config, train, new_loader, valid, place) -> dict:
    curves: dict[str, list] = {}
    ours = Ours(config, train, arguments.row_tokens, arguments.max_length, place.device)
    ours_loss = train_for(ours, new_loader(), valid, train, arguments.row_tokens, place, curves.setdefault("kbert", []))
    row_tokens = arguments.reference_row_tokens or arguments.row_tokens
    reference_train = schedule(RECIPE, arguments.reference_minutes or train.max_minutes)
    losses = {}
    for lr in arguments.reference_lrs:
        reference = Reference(
            config,
            reference_train,
            arguments.max_length,
            place.device,
            arguments.reference_shape,
            arguments.reference_compile,
            lr,
        )
        if arguments.reference_compile:  # before its clock starts, as for ours
            reference.step(next(iter(new_loader(row_tokens))), mask_count(MASK_RATE, row_tokens), 0.0)
        losses[lr] = train_for(
            reference,
            new_loader(row_tokens),
            valid,
            reference_train,
            row_tokens,
            place,
            curves.setdefault(f"{reference.name} lr {lr:g}", []),
        )
    best = min(losses, key=losses.get)
    curve = curves["kbert"]
    reached = next((seconds for seconds, _, loss in curve if loss <= losses[best]), None)
    print(
        f"validation loss: ours {ours_loss:.4f} after {train.max_minutes:g} min, ModernBERT {losses[best]:.4f} after {reference_train.max_minutes:g} min "
        f"(best of lr {sorted(losses)}: {best}); ours is below that after {reached} s"
    )
    return {
        "ours_loss": ours_loss,
        "reference_loss": losses[best],
        "reference_lr": best,
        "minutes": train.max_minutes,
        "reference_minutes": reference_train.max_minutes,
        "seconds_to_reference_loss": reached,
        "curves": curves,
    }


def plot(curves: dict[str, list], out: Path) -> None:
    """Validation loss against minutes of training."""
    from records.plot import COLORS, figure

    drawn, (axis,) = figure(["loss"])
    for color, (name, curve) in zip(COLORS, curves.items()):
        axis.plot(
            [seconds / 60 for seconds, _, _ in curve], [loss for _, _, loss in curve], color=color, lw=1.6, label=name
        )
    axis.set(xlabel="training time (minutes)", ylabel="validation loss (nats per masked token)")
    axis.legend(frameon=False, fontsize=8)
    drawn.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/sample", help="folder of shards [data/sample]")
    parser.add_argument("--preset", default="micro", choices=list(PRESETS), help="shape of both models [micro]")
    for name, field in (
        ("layers", "num_hidden_layers"),
        ("hidden", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("intermediate", "intermediate_size"),
    ):
        parser.add_argument(f"--{name}", type=int, dest=field, help=f"{field}, instead of the preset's")
    parser.add_argument("--row-tokens", type=int, default=8192, help="tokens in a row and in an optimizer step [8192]")
    parser.add_argument("--max-length", type=int, default=256, help="tokens in the longest document [256]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side [5]")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn [3]")
    parser.add_argument("--profile", action="store_true", help="measure our step by kind of kernel")
    parser.add_argument("--attention", action="store_true", help="measure one layer's attention in four ways, on a GPU")
    parser.add_argument("--loader", action="store_true", help="measure the loader alone")
    parser.add_argument("--packing", nargs="+", metavar="GLOB", help="measure the packing of these files")
    parser.add_argument(
        "--train-minutes", type=float, help="instead of timing steps, train each side this many minutes"
    )
    parser.add_argument(
        "--reference-minutes",
        type=float,
        help="minutes for the reference, if others: what does ours reach in a part of its time? [--train-minutes]",
    )
    parser.add_argument("--valid-tokens", type=int, default=100_000, help="tokens of text to validate on [100000]")
    parser.add_argument(
        "--reference-lrs",
        type=float,
        nargs="+",
        default=[2.5e-4, 5e-4, 1e-3],
        help="AdamW's learning rates to try [2.5e-4 5e-4 1e-3]",
    )
    parser.add_argument(
        "--reference-shape",
        choices=["bucketed", "concatenated"],
        default="bucketed",
        help="batches that the reference trains on [bucketed]",
    )
    parser.add_argument(
        "--reference-row-tokens",
        type=int,
        help="tokens in a row and in an optimizer step of the reference [--row-tokens]",
    )
    parser.add_argument("--reference-compile", action="store_true", help="compile the reference when training")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="file to write the JSON object to")
    parser.add_argument("--plot", type=Path, help="with --train-minutes: picture of the curves to write")
    arguments = parser.parse_args()
    shape = {
        **PRESETS[arguments.preset],
        **{
            f: v
            for f in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
            if (v := getattr(arguments, f)) is not None
        },
    }
    directory = Path(arguments.data)
    manifest = read_manifest(directory)
    config = model_config(manifest["tokenizer"], arguments.max_length, shape)
    with processes() as place:
        torch.set_float32_matmul_precision("high")

        def new_loader(row_tokens: int = arguments.row_tokens):
            return Loader(directory, manifest, "train", row_tokens, arguments.max_length, seed=1, device=place.device)

        valid = Loader(
            directory,
            manifest,
            "valid",
            arguments.row_tokens,
            arguments.max_length,
            seed=None,
            max_tokens=arguments.valid_tokens,
            device=place.device,
        )
        train = schedule(TRAINER_PRESETS[arguments.preset], arguments.train_minutes)
        if arguments.loader:
            result = measure_loader(new_loader())
        elif arguments.packing:
            result = measure_packing(directory, arguments.packing)
        elif arguments.profile:
            result = profile_step(arguments, config, train, new_loader(), place)
        elif arguments.attention:
            result = compare_attention(arguments, config, new_loader(), place)
        elif arguments.train_minutes:
            result = compare_training(arguments, config, train, new_loader, valid, place)
        else:
            result = compare_steps(arguments, config, train, new_loader, place)
        device = (
            torch.cuda.get_device_name() if place.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )
        result |= {
            "device": device,
            "torch": torch.__version__,
            "shape": {
                **shape,
                "vocab_size": config.vocab_size,
                "row_tokens": arguments.row_tokens,
                "max_length": arguments.max_length,
            },
        }
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")
    if arguments.plot and "curves" in result:
        plot(result["curves"], arguments.plot)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: this does not fit into the GPU's memory: lower --row-tokens")
