"""The recipe that records are measured against: ModernBERT's architecture from `transformers`, trained with AdamW.

    python records/baseline/modernbert.py --preset micro --train.max_minutes 8 --lr 5e-4 --train.declared_runs 3 --train.seed 1

It reads the trainer's data and schedules, judges by the trainer's validation tokens and masks, and leaves the trainer's log, so that
records/submit.py takes it like any other run. One process; bf16 autocast, sdpa, predictions at masked positions only.

Its model FLOPs are those of KBERT of that shape, which has the same matrices, but for the d x d of its prediction head (not counted).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dataloading import InputError, Loader, Row, read_manifest, sha256_of
from model import KBERTConfig
from trainer import (
    PRESETS,
    Clock,
    DataConfig,
    Place,
    RunLog,
    TrainConfig,
    Work,
    can_compile,
    close_log,
    data_hash,
    describe_validation,
    draw_curves,
    draw_masks,
    frozen_mask,
    lr_factor,
    mask_count,
    mask_rate,
    model_config,
    open_log,
    parse_flags,
    peak_flops,
    processes,
    validation_loader,
)

MODULES = ("trainer.py", "model.py", "dataloading.py", "records/baseline/modernbert.py")
# ModernBERT's warm-up and masking rate; its decay, over a small last part of a long run, is made half of these short ones
RECIPE = {"train.lr_warmup": 0.06, "train.lr_decay": 0.5, "train.mask_rate_start": 0.30, "train.mask_rate_end": 0.30}


class Reference:
    """`transformers`' ModernBERT with AdamW, fed the documents of our rows in the shape it likes.

    bucketed      documents sorted by length, padded to the longest of each batch
    concatenated  documents run together and cut into lines of max_length, without padding; attention crosses documents
    """

    def __init__(
        self,
        config: KBERTConfig,
        train: TrainConfig,
        max_length: int,
        device: torch.device,
        shape: str,
        compiled: bool,
        lr: float,
        seed: int = 1,
    ):
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        torch.manual_seed(seed)
        self.name = f"modernbert {shape} {'compiled' if compiled else 'eager'}"
        self.config, self.train, self.max_length, self.device, self.shape, self.lr, self.seed = (
            config,
            train,
            max_length,
            device,
            shape,
            lr,
            seed,
        )
        self.model = (
            ModernBertForMaskedLM(
                ModernBertConfig(
                    vocab_size=config.padded_vocab_size,
                    hidden_size=config.hidden_size,
                    num_hidden_layers=config.num_hidden_layers,
                    num_attention_heads=config.num_attention_heads,
                    intermediate_size=config.intermediate_size,
                    max_position_embeddings=max_length,
                    global_attn_every_n_layers=config.global_attention_every,
                    local_attention=config.local_attention_window,
                    sparse_prediction=True,
                    pad_token_id=config.pad_token_id,
                    cls_token_id=config.cls_token_id,
                    sep_token_id=config.sep_token_id,
                    bos_token_id=config.cls_token_id,
                    eos_token_id=config.sep_token_id,
                    attn_implementation="sdpa",
                )
            )
            .to(device)
            .train()
        )
        self.call = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            fused=True,
        )

    def batches(self, row: Row, input_ids: torch.Tensor, labels: torch.Tensor, shape: str):
        """input_ids, attention_mask, labels [B, S] each."""
        if shape == "concatenated":
            lines = [
                x[: x.size(0) // self.max_length * self.max_length].view(-1, self.max_length)
                for x in (input_ids.long(), labels)
            ]
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
                ids[line, :n], target[line, :n], mask[line, :n] = (
                    input_ids[start : start + n],
                    labels[start : start + n],
                    1,
                )
            yield ids, mask, target
            order = order[count:]

    def loss(self, call, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over the labels."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return call(input_ids=ids, attention_mask=mask, labels=labels).loss * (labels != -100).sum()

    def step(self, row: Row, count: int, progress: float) -> torch.Tensor:
        input_ids, masked, targets = draw_masks(row, count, self.seed, self.config.mask_token_id)
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


def train(
    place: Place,
    preset: str,
    data: DataConfig,
    settings: TrainConfig,
    model_values: dict,
    lr: float,
    shape: str,
    argv: list[str],
) -> None:
    directory, name = Path(data.dir), settings.run_name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_modernbert"
    manifest, run, device = read_manifest(directory), Path(settings.out) / name, place.device
    if (run / "log.txt").exists():
        raise InputError(f"{run} holds a run already: choose another --train.run_name")
    ids = manifest["tokenizer"]
    config = model_config(ids, data.max_length, model_values)
    row_tokens, compiled = settings.row_tokens or 8192, shape == "concatenated" and can_compile(device)
    torch.set_float32_matmul_precision("high")
    side = Reference(config, settings, data.max_length, device, shape, compiled, lr, settings.seed)
    valid, test = (validation_loader(directory, manifest, data, 8192, place, split) for split in ("valid", "test"))

    def new_loader() -> Loader:
        return Loader(directory, manifest, "train", row_tokens, data.max_length, seed=settings.seed, device=device)

    started = time.perf_counter()
    side.step(
        next(iter(new_loader())), mask_count(settings.mask_rate_start, row_tokens), 0.0
    )  # compiles; the learning rate is 0 there
    side.optimizer.state.clear()
    peak, compile_seconds = peak_flops(device), time.perf_counter() - started

    steps = None if settings.max_minutes is not None else settings.steps
    run.mkdir(parents=True, exist_ok=True)
    log = RunLog(run, steps, 0)
    settings = dataclasses.replace(settings, row_tokens=row_tokens, batch_tokens=row_tokens)
    resolved = {
        "preset": preset,
        "recipe": "modernbert",
        "adamw_lr": lr,
        "shape": shape,
        "data": dataclasses.asdict(data),
        "train": dataclasses.asdict(settings),
        "model": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(KBERTConfig)
            if "help" in field.metadata
        },
    }
    (run / "config.json").write_text(json.dumps(resolved, indent=1))
    validation = describe_validation(
        valid, [directory / n for n, e in manifest["shards"].items() if e["split"] == "train"], config.vocab_size
    )
    open_log(
        log,
        argv,
        resolved,
        place,
        {"peak_flops": peak, "compiled": compiled, "compile_seconds": round(compile_seconds, 2)},
        {
            "hash": data_hash(manifest),
            "tokenizer": ids["sha256"],
            "vocab_size": config.vocab_size,
            "validation": validation,
        },
        MODULES,
    )
    parameters = sum(p.numel() for p in side.model.parameters())
    log.section(
        "run",
        f"{run}: {side.name}, {parameters / 1e6:.1f}M parameters, AdamW at {lr:g}, one row of {row_tokens} tokens a step",
        echo=True,
    )

    clock, work, step, rows = Clock(device, 0.0), Work(), 0, iter(new_loader())

    def write_line(**loss: float) -> None:
        log.step(step, clock.seconds, work.tokens, work.training_flops(config, whole_last_layer=True), peak, loss)

    while True:
        progress = min(
            1.0,
            clock.now() / (60 * settings.max_minutes) if settings.max_minutes is not None else step / settings.steps,
        )
        done = progress >= 1
        if done or step % settings.valid_every == 0:
            clock.stop()
            if step and step % settings.log_every:
                write_line(train_loss=loss)
            val_loss = side.validate(valid, place)
            write_line(val_loss=val_loss)
        if done:
            break
        clock.start()
        row, count = next(rows), mask_count(mask_rate(progress, settings), row_tokens)
        loss = float(side.step(row, count, progress))
        if not math.isfinite(loss):
            raise InputError(f"the loss of step {step + 1} is {loss}: lower --lr from {lr:g}")
        step += 1
        lengths = row.round_lengths if shape == "bucketed" else np.full(row_tokens // data.max_length, data.max_length)
        work.add(lengths, min(count, row.round_text[0]), config.local_attention_window)
        if step % settings.log_every == 0:
            clock.stop()
            write_line(train_loss=loss)
    rows.close()
    side.model.save_pretrained(run / "model")
    close_log(
        log,
        {
            "run": str(run),
            "step": step,
            "finished": True,
            "val_loss": val_loss,
            "test_loss": side.validate(test, place),
            "seconds": clock.seconds,
            "flops": work.training_flops(config, whole_last_layer=True),
            "work": dataclasses.asdict(work),
            "parameters": parameters,
            "model_sha256": sha256_of(run / "model" / "model.safetensors"),
        },
    )
    draw_curves(run)
    print(f"validation loss {val_loss:.4f} after {clock.seconds:.1f} s; log {run / 'log.txt'}")


def main() -> None:
    extra = {
        "lr": {"type": float, "default": 5e-4, "help": "AdamW's learning rate [5e-4]"},
        "shape": {
            "choices": ["bucketed", "concatenated"],
            "default": "concatenated",
            "help": "batches it trains on [concatenated]",
        },
    }
    presets = {name: {**preset, **RECIPE} for name, preset in PRESETS.items()}
    preset, values = parse_flags(
        {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig}, presets, None, __doc__, "micro", extra
    )
    with processes() as place:
        train(
            place,
            preset,
            DataConfig(**values["data"]),
            TrainConfig(**values["train"]),
            values["model"],
            values["lr"],
            values["shape"],
            sys.argv,
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
