"""The recipe that records are measured against: ModernBERT's architecture from `transformers`, trained with AdamW.

    python records/baseline/modernbert.py --preset micro --train.max_minutes 8 --train.declared_runs 3

It is trainer.py's run with another model, optimizer and step: the same data, schedules, clock, log, validation tokens
and masks, checkpoints and resume too, so that records/submit.py takes it like any other. One process; bf16 autocast,
sdpa, predictions at masked positions only.

What differs from ModernBERT's own training: AdamW without clipping for StableAdamW; documents that are cut at the ends
of lines and see each other in training; a warm-up of 6% for its 0.2%, half of the run as decay, no growing batches;
every masked word replaced by [MASK]; no dropout; RoPE's base of 160,000 in global layers from the start.

Its model FLOPs are those of KBERT of that shape, which has the same matrices, but for the d x d of its prediction head
(not counted).

Shapes: T tokens in a row, B lines of S tokens.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dataloading import InputError, Loader, Row, frozen_mask
from model import KBERTConfig
from objectives import draw_masks, load_tied, mask_count
from records.log import WHOLE_LAST_LAYER, read_code
from trainer import MODULES as TRAINER_MODULES
from trainer import (
    PRESETS,
    DataConfig,
    Process,
    Run,
    TrainConfig,
    lr_factor,
    make_parser,
    mask_rate,
    model_config,
    parse_flags,
    run_program,
    save_model,
    train_to_the_end,
    why_eager,
)

MODULES = (*TRAINER_MODULES, "records/baseline/modernbert.py")
# ModernBERT's masking rate; its warm-up and decay, small parts of a long run, are larger ones of these short runs
RECIPE = {"train.lr_warmup": 0.06, "train.lr_decay": 0.5, "train.mask_rate_start": 0.30, "train.mask_rate_end": 0.30}
SMALL_STEPS = {"train.row_tokens": 2048}  # the best of those tried for micro (records/notebook.md)


def make_model(config: KBERTConfig, max_length: int):
    """`transformers`' ModernBERT of a KBERT's shape."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    same += ("pad_token_id", "cls_token_id", "sep_token_id")
    theirs = ModernBertConfig(
        **{name: getattr(config, name) for name in same},
        vocab_size=-(-config.vocab_size // 128) * 128,  # for the speed of products
        max_position_embeddings=max_length,
        global_attn_every_n_layers=config.global_attention_every,
        local_attention=config.local_attention_window,
        sparse_prediction=True,
        classifier_pooling="mean",  # as the released models have it; the class's default is "cls"
        bos_token_id=config.cls_token_id,
        eos_token_id=config.sep_token_id,
        attn_implementation="sdpa",
    )
    return ModernBertForMaskedLM(theirs)


class FlatAdamW:
    """torch's AdamW with a state that lies flat, as safetensors stores it."""

    def __init__(self, groups: list[dict], **settings):
        self.adamw = torch.optim.AdamW(groups, **settings)

    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        state = self.adamw.state_dict()["state"]
        return {f"{number}.{name}": value for number, kept in state.items() for name, value in kept.items()}

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        state: dict[int, dict] = {}
        for key, value in flat.items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


class Reference:
    """ModernBERT with AdamW, fed the documents of our rows in the shape it likes.

    bucketed      documents sorted by length, padded to the longest of each batch
    concatenated  documents run together and cut into lines of max_length, without padding; attention crosses documents
    """

    flops_counted_by = WHOLE_LAST_LAYER  # its layers are all alike
    measures = ("train_loss",)

    def __init__(self, config: KBERTConfig, max_length: int, device, shape: str, compiled: bool, lr: float, seed: int):
        torch.manual_seed(seed)
        self.name = f"modernbert {shape} {'compiled' if compiled else 'eager'}"
        self.config, self.max_length, self.shape, self.lr, self.seed = config, max_length, shape, lr, seed
        self.model = self.network = self.masked_lm = make_model(config, max_length).to(device).train()
        self.call = torch.compile(self.model) if compiled else self.model
        matrices = {"params": [p for p in self.model.parameters() if p.ndim == 2], "weight_decay": 0.01}
        others = {"params": [p for p in self.model.parameters() if p.ndim != 2], "weight_decay": 0.0}
        self.optimizer = FlatAdamW([matrices, others], lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(self, row: Row, count: int, factor: float = 1.0) -> Tensor:
        """One optimizer step on a row of which `count` positions are masked, at `factor` of the learning rate."""
        loss = self.gradients(row, count)
        self.optimizer.step(self.lr * factor)
        return loss

    def gradients(self, row: Row, count: int) -> Tensor:
        """Adds a row's gradients to the parameters'. Returns the loss, a mean over its targets."""
        input_ids, _, _, masked, targets = draw_masks(row, count, self.seed, self.config.mask_token_id)
        labels = torch.full_like(input_ids, -100, dtype=torch.long).index_put((masked,), targets)
        total = torch.zeros((), device=input_ids.device)
        for batch in self.batches(row, input_ids, labels, self.shape):
            loss = self.loss(self.call, *batch) / min(count, row.round_text[0])
            loss.backward()
            total += loss.detach()
        return total

    def validation_loss(self, loader: Loader) -> float:
        """On whole documents, whatever shape it trains in; the masks are those our model is judged by."""
        total, count = 0.0, 0
        self.model.eval()
        for row in loader:
            masked = torch.from_numpy(frozen_mask(row.offsets)).to(row.input_ids.device)
            labels = torch.where(masked, row.input_ids.long(), -100)
            input_ids = torch.where(masked, self.config.mask_token_id, row.input_ids)
            for batch in self.batches(row, input_ids, labels, "bucketed"):
                with torch.no_grad():
                    total += self.loss(self.model, *batch).item()
            count += int(masked.sum())
        self.model.train()
        return total / count

    def parts(self) -> dict:
        """What a checkpoint holds, as of an objective (objectives.py)."""
        return {"": (self.model, None)}

    def extra_state(self) -> dict:
        return {}

    def load(self, folder: Path) -> None:
        load_tied(self.model, folder)

    def loss(self, call, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Summed over the labels."""
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
            mean = call(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        return mean * (labels != -100).sum()

    def batches(self, row: Row, input_ids: Tensor, labels: Tensor, shape: str) -> Iterator[tuple[Tensor, ...]]:
        """input_ids, labels [T] -> input_ids, attention_mask, labels [B, S], of batches that have labels."""
        make = self.concatenated if shape == "concatenated" else self.bucketed
        for batch in make(row, input_ids, labels):
            if (batch[2] != -100).any():
                yield batch

    def concatenated(self, row: Row, input_ids: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
        whole = len(input_ids) // self.max_length * self.max_length
        ids, target = (x[:whole].view(-1, self.max_length) for x in (input_ids.long(), labels))
        yield ids, torch.ones_like(ids), target

    def bucketed(self, row: Row, input_ids: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Batches of at most `budget` tokens, padding included, in order of length."""
        budget = 2048 if input_ids.device.type == "cpu" else 65536
        lengths = row.round_lengths.tolist()
        ids, targets = (x[: sum(lengths)].split(lengths) for x in (input_ids.long(), labels))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        while order:
            count = next((n for n in range(len(order), 0, -1) if n * lengths[order[n - 1]] <= budget), 1)
            batch, order = order[:count], order[count:]
            mask = pad_sequence([torch.ones_like(ids[document]) for document in batch], True)
            padded = pad_sequence([ids[document] for document in batch], True, self.config.pad_token_id)
            yield padded, mask, pad_sequence([targets[document] for document in batch], True, -100)


class BaselineRun(Run):
    """The trainer's run around the reference; what is not said here is as it is there."""

    def __init__(self, process: Process, settings: dict, argv: list[str], code: dict[str, str]):
        self.lr, self.shape, train = settings["lr"], settings["shape"], settings["train"]
        if train["objective"] != "mlm":
            raise InputError("the baseline finds masked words: leave out --train.objective")
        if process.world_size > 1:
            raise InputError("the baseline runs in one process: start it with python, not with torchrun")
        row_tokens, longest = train["row_tokens"] or 8192, settings["data"]["max_length"]
        if self.shape == "concatenated" and row_tokens % longest:
            raise InputError(
                f"--train.row_tokens {row_tokens} is not a multiple of --data.max_length {longest}, the lines that "
                f"rows are cut into: use {max(1, row_tokens // longest) * longest}"
            )
        train |= {"row_tokens": row_tokens, "batch_tokens": row_tokens, "grad_accum": None}  # a step is a row
        train["run_name"] = train["run_name"] or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_modernbert"
        super().__init__(process, settings, argv, code)

    def identity_of_run(self) -> dict:
        return {**super().identity_of_run(), "objective": "modernbert", "lr": self.lr, "shape": self.shape}

    def resolved(self) -> dict:
        return {**super().resolved(), "lr": self.lr, "shape": self.shape}

    def build_model(self) -> None:
        train, longest, device = self.train, self.data.max_length, self.process.device
        torch.set_float32_matmul_precision("high")
        self.config = model_config(self.manifest["tokenizer"], longest, self.model_values)
        self.compiled = train.compile and self.shape == "concatenated" and why_eager(device) is None
        self.objective = Reference(self.config, longest, device, self.shape, self.compiled, self.lr, train.seed)
        self.optimizer = self.objective.optimizer
        self.parameters = sum(p.numel() for p in self.objective.model.parameters())
        self.row_tokens, self.rows_per_rank = train.row_tokens, 1
        started, rows = time.perf_counter(), iter(self.loader_of("train", self.process, seed=train.seed))
        self.objective.gradients(next(rows), mask_count(train.mask_rate_start, self.row_tokens))  # compiles
        self.objective.model.zero_grad()
        self.compile_seconds = time.perf_counter() - started
        rows.close()

    def train_step(self, progress: float) -> None:
        waiting = time.perf_counter()
        row = next(self.rows)
        self.data_wait += time.perf_counter() - waiting
        factor = lr_factor(progress, self.train)
        text = row.round_text[0]
        masks = mask_count(mask_rate(progress, self.train), self.row_tokens, text)
        loss = self.objective.step(row, masks, factor)
        self.step += 1
        self.loader_state = row.state
        self.check_finite(loss.item(), f"the loss of step {self.step}")
        lengths, shown = row.round_lengths, self.work.text + text
        if self.shape == "concatenated":
            lengths = np.full(self.row_tokens // self.data.max_length, self.data.max_length)
        self.work.add(lengths, min(masks, text), self.config.local_attention_window)
        self.work.text = shown  # its lines hold the marks of documents
        metrics = {"lr": self.lr * factor, "mask_rate": masks / self.row_tokens, "rows": [row.index]}
        self.unread.append((self.step, loss[None], metrics))

    def validate(self, loader: Loader) -> dict[str, float]:
        loss = self.objective.validation_loss(loader)
        self.check_finite(loss, f"the validation loss after step {self.step}")
        return {"val_loss": loss}

    def check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise InputError(f"{what} is {loss}: lower --lr from {self.lr:g}")

    def write_model(self, part: str, model: torch.nn.Module, weights: dict | None, into: Path) -> None:
        save_model(into, model, self.tokenizer, weights)


def main(argv: list[str] | None = None) -> None:
    code = read_code(MODULES)
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__, {"data": DataConfig, "train": TrainConfig, "model": KBERTConfig})
    presets = {name: {**preset, **RECIPE} for name, preset in PRESETS.items()}
    for name in ("micro", "babylm"):
        presets[name] |= SMALL_STEPS
    shapes = ("bucketed", "concatenated")
    parser.add_argument("--preset", choices=list(presets), default="micro", help="settings flags override [micro]")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate [1e-3]")
    parser.add_argument("--shape", choices=shapes, default="concatenated", help="batches it trains on [concatenated]")
    settings, _ = parse_flags(parser, argv, {"preset": presets})
    train_to_the_end(BaselineRun, settings, ["records/baseline/modernbert.py", *argv], code)


if __name__ == "__main__":
    run_program(main, "--train.resume auto")
