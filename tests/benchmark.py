"""Our training step against `transformers.ModernBertForMaskedLM` of the same shape, on the same documents, in one run.

    python tests/benchmark.py                                               the micro shape on the embedded sample
    python tests/benchmark.py --data DIR --layers 6 --hidden 384 --heads 6 --intermediate 576
    python tests/benchmark.py --data DIR ... --train-minutes 15             train both that long: two curves of validation loss
    python tests/benchmark.py --preset base --data DIR --row-tokens 65536   on a GPU
    python tests/benchmark.py --loader                                      the loader alone, on one core

The reference gets AdamW, bf16 autocast, sdpa, prediction at masked positions only, and the batch shape that suits it best among
    bucketed      documents sorted by length, padded to the longest of each batch
    concatenated  documents run together and cut into lines of max_length, without padding; attention crosses documents
each eager and, where shapes are static, compiled. Both sides take turns, so that a busy machine slows both; medians are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, Loader, Row, read_manifest  # noqa: E402
from model import PRESETS, KBERTConfig, KBERTForMaskedLM  # noqa: E402
from trainer import (Clock, Place, TrainConfig, can_compile, draw_masks, forward_flops, frozen_mask, lr_factor, make_loss, make_optimizer, mask_count,  # noqa: E402
                     mask_rate, muon_momentum, peak_flops, processes, validate, warm_up)

MASK_RATE = 0.30  # of the timed steps: ModernBERT's


class Ours:
    """KBERT: blockwise or FlexAttention on packed rows, Muon and Adam, compiled."""

    name = "kbert"

    def __init__(self, config: KBERTConfig, train: TrainConfig, row_tokens: int, max_length: int, device: torch.device):
        torch.manual_seed(1)
        self.config, self.train, self.max_length = config, train, max_length
        self.model = KBERTForMaskedLM(config).to(device)
        self.model.encoder.compute_dtype = torch.bfloat16
        self.optimizer = make_optimizer(self.model, train, rank=0, world_size=1)
        self.loss_of = make_loss(self.model, can_compile(device))
        warm_up(self.model, self.loss_of, self.optimizer, [config.local_attention_window], row_tokens, max_length, device)

    def step(self, row: Row, count: int, progress: float) -> torch.Tensor:
        input_ids, masked, targets = draw_masks(row, count, 1, self.config.mask_token_id)
        loss = self.loss_of(input_ids, row.document_ids, row.positions, masked, targets, max_seqlen=self.max_length, window=self.config.local_attention_window)
        loss = loss / min(count, row.round_text[0])
        loss.backward()
        self.optimizer.step(lr_factor(progress, self.train), muon_momentum(progress, self.train))
        return loss.detach()

    def validate(self, loader: Loader, place: Place) -> float:
        return validate(self.loss_of, loader, self.config.mask_token_id, self.config.local_attention_window, self.max_length, place)


class Reference:
    """transformers' ModernBERT with AdamW, fed the documents of our rows in the shape it likes."""

    def __init__(self, config: KBERTConfig, train: TrainConfig, max_length: int, device: torch.device, shape: str, compiled: bool, lr: float):
        from transformers import ModernBertConfig, ModernBertForMaskedLM
        torch.manual_seed(1)
        self.name = f"modernbert {shape} {'compiled' if compiled else 'eager'}"
        self.config, self.train, self.max_length, self.device, self.shape, self.lr = config, train, max_length, device, shape, lr
        self.model = ModernBertForMaskedLM(ModernBertConfig(
            vocab_size=config.padded_vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size, max_position_embeddings=max_length,
            global_attn_every_n_layers=config.global_attention_every, local_attention=config.local_attention_window, sparse_prediction=True,
            pad_token_id=config.pad_token_id, cls_token_id=config.cls_token_id, sep_token_id=config.sep_token_id,
            bos_token_id=config.cls_token_id, eos_token_id=config.sep_token_id, attn_implementation="sdpa")).to(device).train()
        self.call = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
                                           lr=lr, betas=(0.9, 0.98), eps=1e-6)

    def batches(self, row: Row, input_ids: torch.Tensor, labels: torch.Tensor, shape: str):
        """input_ids, attention_mask, labels [B, S] each."""
        if shape == "concatenated":
            lines = [x[: x.size(0) // self.max_length * self.max_length].view(-1, self.max_length) for x in (input_ids.long(), labels)]
            yield lines[0], torch.ones_like(lines[0]), lines[1]
            return
        # Batches of at most `budget` padded tokens, in order of length.
        lengths = torch.bincount(row.document_ids)[: len(row.round_lengths)].tolist()
        starts = [0, *itertools.accumulate(lengths)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        budget = 2048 if self.device.type == "cpu" else 65536
        while order:
            count = next((n for n in range(len(order), 0, -1) if n * lengths[order[n - 1]] <= budget), 1)
            size = lengths[order[count - 1]]
            ids = torch.full((count, size), self.config.pad_token_id, device=self.device)
            target, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for line, document in enumerate(order[:count]):
                n, start = lengths[document], starts[document]
                ids[line, :n], target[line, :n], mask[line, :n] = input_ids[start : start + n], labels[start : start + n], 1
            yield ids, mask, target
            order = order[count:]

    def loss(self, call, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over the labels."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return call(input_ids=ids, attention_mask=mask, labels=labels).loss * (labels != -100).sum()

    def step(self, row: Row, count: int, progress: float) -> torch.Tensor:
        input_ids, masked, targets = draw_masks(row, count, 1, self.config.mask_token_id)
        labels = torch.full_like(input_ids, -100, dtype=torch.long).index_put((masked,), targets)
        total, masked_tokens = 0.0, min(count, row.round_text[0])
        for ids, mask, target in self.batches(row, input_ids, labels, self.shape):
            if (target != -100).any():
                loss = self.loss(self.call, ids, mask, target) / masked_tokens
                loss.backward()
                total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor(progress, self.train)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def validate(self, loader: Loader, place: Place) -> float:
        """On whole documents, whatever shape it trains in; the masks are those our model is judged by."""
        total, count = 0.0, 0
        self.model.eval()
        for row in loader:
            masked = torch.from_numpy(frozen_mask(row.offsets)).to(self.device)
            labels = torch.where(masked, row.input_ids.long(), -100)
            input_ids = torch.where(masked, self.config.mask_token_id, row.input_ids)
            for batch in self.batches(row, input_ids, labels, "bucketed"):
                if (batch[2] != -100).any():
                    with torch.no_grad():
                        total += self.loss(self.model, *batch).item()
            count += int(masked.sum())
        self.model.train()
        return total / count


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


def compare_steps(arguments, config, train, loader, place) -> dict:
    rows, device = iter(loader), place.device
    train.lr_warmup = 0.0
    variants = [("bucketed", False), ("concatenated", False)] + [("concatenated", True)] * can_compile(device)
    sides = [Ours(config, train, arguments.row_tokens, arguments.max_length, device)]
    memory = {sides[0].name: peak_memory_mb(device)}
    sides += [Reference(config, train, arguments.max_length, device, shape, compiled, 1e-4) for shape, compiled in variants]
    for side in sides:
        timed(side, [next(rows) for _ in range(2)], device)
        memory.setdefault(side.name, peak_memory_mb(device))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    tokens = []
    for _ in range(arguments.rounds):
        batch = [next(rows) for _ in range(arguments.steps)]
        tokens += [int(row.round_lengths.sum()) for row in batch]
        for side in sides:
            seconds[side.name] += timed(side, batch, device)
    rates = {name: statistics.median(tokens) / statistics.median(times) for name, times in seconds.items()}
    best = max((name for name in rates if name != "kbert"), key=rates.get)
    flops = 3 * forward_flops(config, batch[0].round_lengths, mask_count(MASK_RATE, arguments.row_tokens), config.local_attention_window)
    peak = peak_flops(device)
    for name, rate in rates.items():
        print(f"{name:34s} {rate:10,.0f} tokens/s   step {1000 * statistics.median(seconds[name]):8.0f} ms   memory so far {memory[name]:7,.0f} MB")
    return {"ours_tokens_per_s": round(rates["kbert"]), "reference_tokens_per_s": round(rates[best]), "ratio": round(rates["kbert"] / rates[best], 3),
            "reference": best, "variants": {name: round(rate) for name, rate in rates.items()},
            "mfu": round(flops / statistics.median(seconds["kbert"]) / peak, 4), "ours_peak_memory_mb": round(memory["kbert"])}


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
    print(f"{tokens / taken / 1e6:.1f}M tokens/s, {100 * padding / (tokens + padding):.3f}% padding, {tokens:,} tokens in {taken:.1f} s")
    return {"loader_tokens_per_s": round(tokens / taken), "padding": padding / (tokens + padding)}


def train_for(side, loader: Loader, valid: Loader, train: TrainConfig, row_tokens: int, place: Place, curve: list) -> float:
    """Trains a side for train.max_minutes, appending [seconds, step, validation loss] to `curve`. Returns the last loss."""
    clock, step, rows, next_validation = Clock(place.device, 0.0), 0, iter(loader), 0.0
    while True:
        progress = min(1.0, clock.now() / (60 * train.max_minutes))
        if progress >= next_validation or progress >= 1:
            clock.stop()
            curve.append([round(clock.seconds, 1), step, side.validate(valid, place)])
            print(f"{side.name:34s} {clock.seconds:7.1f} s  step {step:6d}  validation loss {curve[-1][2]:.4f}", flush=True)
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
    reference_train = TrainConfig(max_minutes=train.max_minutes, lr_warmup=0.06, lr_decay=0.5, mask_rate_start=0.30, mask_rate_end=0.30)
    losses = {}
    for lr in arguments.reference_lrs:
        reference = Reference(config, reference_train, arguments.max_length, place.device, arguments.reference_shape, arguments.reference_compile, lr)
        if arguments.reference_compile:  # before its clock starts, as for ours
            reference.step(next(iter(new_loader())), mask_count(MASK_RATE, arguments.row_tokens), 0.0)
        losses[lr] = train_for(reference, new_loader(), valid, reference_train, arguments.row_tokens, place, curves.setdefault(f"{reference.name} lr {lr:g}", []))
    best = min(losses, key=losses.get)
    curve = curves["kbert"]
    reached = next((seconds for seconds, _, loss in curve if loss <= losses[best]), None)
    print(f"validation loss after {train.max_minutes} min: ours {ours_loss:.4f}, ModernBERT {losses[best]:.4f} (best of lr {sorted(losses)}: {best}); "
          f"ours is below that after {reached} s")
    return {"ours_loss": ours_loss, "reference_loss": losses[best], "reference_lr": best, "minutes": train.max_minutes,
            "seconds_to_reference_loss": reached, "curves": curves}


def plot(curves: dict[str, list], out: Path) -> None:
    """Validation loss against minutes of training, readable on light and dark pages."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150, facecolor="white", layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot([seconds / 60 for seconds, _, _ in curve], [loss for _, _, loss in curve], label=name, lw=2.2 if number == 0 else 1.4,
                  color=("#c1272d", "#7fa7d1", "#3b6ea5", "#1b3a5c")[number % 4])
    axes.set(xlabel="training time (minutes)", ylabel="validation loss (nats per masked token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/sample", help="folder of shards [data/sample]")
    parser.add_argument("--preset", default="micro", choices=list(PRESETS), help="shape of both models [micro]")
    for name, field in (("layers", "num_hidden_layers"), ("hidden", "hidden_size"), ("heads", "num_attention_heads"), ("intermediate", "intermediate_size")):
        parser.add_argument(f"--{name}", type=int, dest=field, help=f"{field}, instead of the preset's")
    parser.add_argument("--row-tokens", type=int, default=8192, help="tokens in a row and in an optimizer step [8192]")
    parser.add_argument("--max-length", type=int, default=256, help="tokens in the longest document [256]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side [5]")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn [3]")
    parser.add_argument("--loader", action="store_true", help="measure the loader alone")
    parser.add_argument("--train-minutes", type=float, help="instead of timing steps, train each side this many minutes")
    parser.add_argument("--valid-tokens", type=int, default=100_000, help="tokens of text to validate on [100000]")
    parser.add_argument("--reference-lrs", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3], help="AdamW's learning rates to try [2.5e-4 5e-4 1e-3]")
    parser.add_argument("--reference-shape", choices=["bucketed", "concatenated"], default="bucketed", help="batches that the reference trains on [bucketed]")
    parser.add_argument("--reference-compile", action="store_true", help="compile the reference when training")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="file to write the JSON object to")
    parser.add_argument("--plot", type=Path, help="with --train-minutes: picture of the curves to write")
    arguments = parser.parse_args()
    shape = {**PRESETS[arguments.preset], **{f: v for f in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
                                             if (v := getattr(arguments, f)) is not None}}
    directory = Path(arguments.data)
    manifest = read_manifest(directory)
    ids = manifest["tokenizer"]
    config = KBERTConfig(vocab_size=ids["vocab_size"], max_position_embeddings=arguments.max_length, pad_token_id=ids["pad"], cls_token_id=ids["cls"],
                         sep_token_id=ids["sep"], mask_token_id=ids["mask"], **shape)
    with processes() as place:
        torch.set_float32_matmul_precision("high")
        def new_loader():
            return Loader(directory, manifest, "train", arguments.row_tokens, arguments.max_length, seed=1, device=place.device)
        valid = Loader(directory, manifest, "valid", arguments.row_tokens, arguments.max_length, seed=None, max_tokens=arguments.valid_tokens, device=place.device)
        train = TrainConfig(max_minutes=arguments.train_minutes)
        if arguments.loader:
            result = measure_loader(new_loader())
        elif arguments.train_minutes:
            result = compare_training(arguments, config, train, new_loader, valid, place)
        else:
            result = compare_steps(arguments, config, train, new_loader(), place)
        device = torch.cuda.get_device_name() if place.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        result |= {"device": device, "torch": torch.__version__,
                   "shape": {**shape, "vocab_size": config.vocab_size, "row_tokens": arguments.row_tokens, "max_length": arguments.max_length}}
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
