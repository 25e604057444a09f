"""What pretraining learns from: the tokens that it hides or replaces, the networks that find them, and their loss.

    mlm   MaskedLM                 which words were masked (Devlin et al. 2018, "BERT")
    rtd   ReplacedTokenDetection   which words a small generator has replaced (Clark et al. 2020, "ELECTRA")

An objective is a class; a third would be one more with the same methods, and trainer.py would have to choose it.
`network` is all that is trained, `model` what is kept of it, `masked_lm` what fills in masked words. What is drawn at
random follows from the seed and the number of the row, so that the same rows make the same step on any number of
ranks.

Shapes: T tokens in a row, N masked positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor

from dataloading import InputError, Loader, Row, frozen_mask, frozen_words, hash64
from model import (
    KBERTConfig,
    KBERTForMaskedLM,
    KBERTForReplacedTokenDetection,
    KBERTModel,
    compiled_backend,
    pack_slots,
)
from records.log import GENERATOR_AND_DETECTOR, MASKED_LAST_LAYER

# ---------------------------------------------------------------------------------------------------------------------
# Masks


def mask_count(rate: float, row_tokens: int, text: int | None = None) -> int:
    """Masked positions in a row, a multiple of 16.

    text: its tokens of text. In a row less than half full, such as an epoch's last, the rate applies to these.
    """
    tokens = row_tokens if text is None or 2 * text > row_tokens else text
    return max(16, round(rate * tokens / 16) * 16)


def random_of(row: Row, seed: int, purpose: int = 0) -> torch.Generator:
    """A generator on the row's device, seeded by (seed, row number): the same for a row on any number of ranks."""
    # Down to 32 bits: the CPU's generator ignores what lies above.
    (hashed,) = hash64(np.array([(seed << 40) + (purpose << 38) + row.index])) >> np.uint64(32)
    return torch.Generator(row.input_ids.device).manual_seed(int(hashed))


def draw_masks(row: Row, count: int, seed: int, mask_id: int) -> tuple[Tensor, ...]:
    """A row with `count` positions masked at random: what corrupt() returns and model.loss takes."""
    score = torch.rand(row.text.size(0), generator=random_of(row, seed), device=row.text.device)
    masked = score.masked_fill(~row.text, -1).topk(count, sorted=False).indices.sort().values
    return corrupt(row, masked, mask_id)


def frozen_masks(row: Row, mask_id: int) -> tuple[int, tuple[Tensor, ...]]:
    """How many positions of a row of validation are masked, and the row as corrupt() gives it."""
    masked = np.flatnonzero(frozen_mask(row.offsets))
    count = len(masked)
    # Filled up to a multiple of 64, never empty, with position 0, which is not text and so has no target.
    masked = torch.from_numpy(np.pad(masked, (0, -count % 64 or 64))).to(row.input_ids.device)
    return count, corrupt(row, masked, mask_id)


def corrupt(row: Row, masked: Tensor, mask_id: int) -> tuple[Tensor, ...]:
    """masked [N] -> input_ids, document_ids, positions [T], masked, targets [N]: -100 where `masked` is not text."""
    text, original = row.text[masked], row.input_ids[masked]
    input_ids = row.input_ids.index_put((masked,), torch.where(text, mask_id, original))
    return input_ids, row.document_ids, row.positions, masked, torch.where(text, original, -100).long()


# ---------------------------------------------------------------------------------------------------------------------
# Functions of a row, compiled


def compile_rows(function: Callable, encoder: KBERTModel, compiled: bool) -> Callable:
    """function(input_ids, document_ids, positions, ..., max_seqlen, window, slots), run by `encoder`.

    To be called without slots. There is a graph for each window, whatever the number of masks.
    """
    if not compiled:
        return function
    backend = encoder.attention_backend = compiled_backend(encoder.device)
    # A graph for each shape. Running out of graphs is an error: the rest would run eagerly
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled_function = torch.compile(function, dynamic=False)

    def call(*row: Tensor, max_seqlen: int, window: int) -> object:
        T, document_ids = row[0].size(0), row[1]
        slots = pack_slots(document_ids, max_seqlen) if backend == "blockwise" else None
        if slots is not None and len(slots) == 1:  # a size that the compiler takes for a constant
            slots = torch.cat([slots, torch.full_like(slots, T)])
        for tensor in row if slots is None else (*row, slots):
            if tensor.size(0) != T:
                torch._dynamo.mark_dynamic(tensor, 0)
        return compiled_function(*row, max_seqlen, window, slots)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


class MaskedLM:
    """Predicts masked words."""

    flops_counted_by = MASKED_LAST_LAYER
    measures = ("train_loss",)  # what `loss` measures

    def __init__(self, config: KBERTConfig, seed: int, max_length: int):
        self.seed, self.max_length, self.mask_id = seed, max_length, config.mask_token_id
        self.model = self.network = self.masked_lm = KBERTForMaskedLM(config)

    def prepare(self, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        """dtype: of activations."""
        self.model.to(device).encoder.compute_dtype = dtype
        self.loss_of = compile_rows(self.model.loss, self.model.encoder, compiled)

    def loss(self, row: Row, count: int, window: int, targets: int, text: int) -> tuple[Tensor, Tensor]:
        """A row's part of the step's loss, and of its measures [1]: over rows and ranks, the parts sum up to means.

        count: masked positions of the row; targets, text: masked words and tokens of text in the step, over all ranks.
        """
        masked_row = draw_masks(row, count, self.seed, self.mask_id)
        loss = self.loss_of(*masked_row, max_seqlen=self.max_length, window=window) / targets
        return loss, loss.detach()[None]

    def validate(self, loader: Loader, window: int, total_over_ranks: Callable) -> dict[str, float]:
        """Cross-entropy summed over the frozen masks of the whole set, over their number.

        total_over_ranks: Process.sum.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.model.device), 0
        for row in loader:
            masks, masked_row = frozen_masks(row, self.mask_id)
            count += masks
            # With gradients enabled, though unused: the graph that training compiled serves here too.
            total += self.loss_of(*masked_row, max_seqlen=self.max_length, window=window).detach()
        return {"val_loss": mean_of(*total_over_ranks(total.item(), count))}

    def parts(self) -> dict[str, tuple[KBERTForMaskedLM, dict | None]]:
        """What is saved: by folder, "" for the main one, a model, and its weights where they are not its own."""
        return {"": (self.model, None)}

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep beside the models, by name."""
        return {}

    def load(self, folder: Path) -> None:
        load_tied(self.model, folder)


class GeneratorsAndOwn(nn.Embedding):
    """The generator's embedding, which its loss alone moves, plus one that starts at zero.

    He et al. 2021, "DeBERTaV3": gradient-disentangled embedding sharing.
    """

    def __init__(self, generators: nn.Embedding):
        super().__init__(
            generators.num_embeddings, generators.embedding_dim, _weight=torch.zeros_like(generators.weight)
        )
        self.generators = [generators]  # in a list: not a part of this one

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + self.generators[0](input_ids).detach()

    def sum(self) -> Tensor:
        """[V, d]."""
        return self.weight.detach() + self.generators[0].weight.detach()


class ReplacedTokenDetection:
    """A small masked LM, the generator, fills masks with words drawn from its guesses; a detector finds them.

    Only the detector is kept. The two share no gradient, so `weight` matters only relative to adam_eps.
    """

    flops_counted_by = GENERATOR_AND_DETECTOR
    measures = ("train_loss", "generator_loss", "detector_loss", "detected", "replaced")
    bins = 4096  # of the detector's probabilities in validation

    def __init__(self, config: KBERTConfig, seed: int, max_length: int, generator_layers: int, detection_weight: float):
        self.seed, self.max_length, self.mask_id, self.weight = seed, max_length, config.mask_token_id, detection_weight
        small = copy.deepcopy(config)
        small.num_hidden_layers = generator_layers
        self.generator = self.masked_lm = KBERTForMaskedLM(small)
        self.model = KBERTForReplacedTokenDetection(config)
        self.model.encoder.embed = self.embedding = GeneratorsAndOwn(self.generator.encoder.embed)
        self.network = nn.ModuleDict({"generator": self.generator, "detector": self.model})

    def prepare(self, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self.network.to(device)
        for model in (self.generator, self.model):
            model.encoder.compute_dtype = dtype
        self.generate = compile_rows(self.generator.loss_and_words, self.generator.encoder, compiled)
        self.detect = compile_rows(self.model.loss, self.model.encoder, compiled)

    def loss(self, row: Row, count: int, window: int, targets: int, text: int) -> tuple[Tensor, Tensor]:
        """As MaskedLM's; measures: both losses, and the fractions of the text classified correctly and replaced."""
        masked_row = draw_masks(row, count, self.seed, self.mask_id)
        uniform = torch.rand(count, generator=random_of(row, self.seed, purpose=1), device=row.text.device)
        call = {"max_seqlen": self.max_length, "window": window}
        generator_loss, filled = self.generate(*masked_row, uniform, **call)
        replaced = filled != row.input_ids
        detector_loss, scores = self.detect(filled, row.document_ids, row.positions, replaced, row.text, **call)
        right = (((scores > 0) == replaced) & row.text).sum()
        generator_loss, detector_loss = generator_loss / targets, detector_loss / text
        loss = generator_loss + self.weight * detector_loss
        measured = loss, generator_loss, detector_loss, right / text, replaced.sum() / text
        return loss, torch.stack([value.detach() for value in measured])

    def validate(self, loader: Loader, window: int, total_over_ranks: Callable) -> dict[str, float]:
        """The generator's loss on the frozen masks, and how well the detector finds replacements there.

        These are words of the same document, the same in every run, so that runs with other generators compare.
        """
        device, call = self.model.device, {"max_seqlen": self.max_length, "window": window}
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        histogram = torch.zeros(2 * self.bins, dtype=torch.int64, device=device)
        for row in loader:
            masks, masked_row = frozen_masks(row, self.mask_id)
            count += masks
            uniform = torch.zeros(len(masked_row[-1]), device=device)
            total += self.generate(*masked_row, uniform, **call)[0].detach()
            filled = torch.from_numpy(frozen_words(row)).to(device)
            replaced = filled != row.input_ids
            # Detached, so that a row's graph is freed before the next is built
            scores = self.detect(filled, row.document_ids, row.positions, replaced, row.text, **call)[1].detach()
            place = (scores.sigmoid() * self.bins).ceil().long().sub(1).clamp(min=0)  # the lower half: logits up to 0
            place = place + self.bins * replaced
            histogram += torch.bincount(place[row.text], minlength=2 * self.bins)
        total, count, *histogram = total_over_ranks(total.item(), count, *histogram.tolist())
        return {"val_loss": mean_of(total, count), **detection_scores(np.reshape(histogram, (2, self.bins)))}

    def parts(self) -> dict[str, tuple[nn.Module, dict | None]]:
        weights = self.model.state_dict() | {"encoder.embed.weight": self.embedding.sum()}
        return {"": (self.model, weights), "generator": (self.generator, None)}

    def extra_state(self) -> dict[str, Tensor]:
        return {"own_embedding": self.embedding.weight.detach()}  # which the sum would give but for rounding

    def load(self, folder: Path) -> None:
        load_tied(self.generator, folder / "generator")
        load_tied(self.model, folder)
        own = load_file(folder / "extra.safetensors")["own_embedding"]
        self.embedding.weight.data.copy_(own)


def load_tied(model: nn.Module, folder: Path) -> None:
    """Weights of a folder, in which a tied head is left out. Raises InputError where they are another model's."""
    weights = load_file(folder / "model.safetensors", device=str(model.device))
    found = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight", "decoder.weight"}  # ours, and ModernBERT's
    if others := {*found.missing_keys} - tied | {*found.unexpected_keys}:
        raise InputError(f"{folder} holds weights of another model ({min(others)}): resume by the code that wrote them")


def mean_of(total: float, count: float) -> float:
    if not count:
        raise InputError("the set holds no text to mask: pack more text")
    return total / count


def detection_scores(histogram: np.ndarray) -> dict[str, float]:
    """[2, bins]: tokens left and replaced, by the probability of being replaced -> accuracy, F1, area under the ROC."""
    left, replaced = histogram.astype(float)
    half = len(left) // 2
    found, missed, false = replaced[half:].sum(), replaced[:half].sum(), left[half:].sum()
    below = left.cumsum() - left / 2  # pairs in one bin count half
    return {
        "val_accuracy": (left[:half].sum() + found) / histogram.sum(),
        "val_f1": 2 * found / max(1.0, 2 * found + missed + false),
        "val_auc": float((replaced * below).sum() / max(1.0, left.sum() * replaced.sum())),
    }
