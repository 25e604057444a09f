"""What people do with the model in the Hugging Face world: padded batches, pipelines, Trainer, export."""

from __future__ import annotations

import pytest
import torch

from conftest import LENGTHS, row_of, tiny
from model import (
    KBERTForMaskedLM,
    KBERTForMultipleChoice,
    KBERTForQuestionAnswering,
    KBERTForSequenceClassification,
    KBERTForTokenClassification,
)

HEADS = (
    KBERTForMaskedLM,
    KBERTForSequenceClassification,
    KBERTForTokenClassification,
    KBERTForMultipleChoice,
    KBERTForQuestionAnswering,
)


def padded(lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S] of the texts of row_of(lengths). mixed: the second half are padded left."""
    ids, documents, _ = row_of(lengths)
    S = max(lengths)
    batch, mask = torch.full((len(lengths), S), 2), torch.zeros(len(lengths), S, dtype=torch.long)
    for number, length in enumerate(lengths):
        left = side == "left" or side == "mixed" and number >= len(lengths) // 2
        place = slice(S - length, S) if left else slice(0, length)
        batch[number, place], mask[number, place] = ids[documents == number], 1
    return {"input_ids": batch, "attention_mask": mask}


def inputs_of(cls: type, lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """As the head takes them: of multiple choice [B / 2, 2, S]."""
    inputs = padded(lengths, side)
    return {k: x.unflatten(0, (-1, 2)) for k, x in inputs.items()} if cls is KBERTForMultipleChoice else inputs


def logits_of(model, inputs: dict) -> torch.Tensor:
    out = model(**inputs)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left", "mixed"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("cls", HEADS)
def test_every_head_agrees_with_the_packed_row(cls, pooling, side, attention):
    model = tiny(cls, classifier_pooling=pooling, num_labels=3)
    model.set_attn_implementation(attention)
    ids, documents, positions = row_of(LENGTHS)
    hidden = model.encoder.encode(ids, documents, positions, max_seqlen=max(LENGTHS))  # [T, d]
    texts = [hidden[documents == number] for number in range(len(LENGTHS))]
    inputs = inputs_of(cls, LENGTHS, side)
    got, inside = logits_of(model, inputs), inputs["attention_mask"].bool()
    if cls in (KBERTForSequenceClassification, KBERTForMultipleChoice):
        pooled = torch.stack([text[0] if pooling == "cls" else text.mean(0) for text in texts])
        expected, got = model.classify(pooled), got.reshape(len(LENGTHS), -1)
    else:
        heads = {KBERTForMaskedLM: "logits", KBERTForTokenClassification: "classify"}
        head = getattr(model, heads.get(cls, "span_logits"))
        out = head(hidden[: sum(LENGTHS)])
        expected, got = torch.stack(out, -1) if isinstance(out, tuple) else out, got[inside]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", HEADS)
def test_texts_without_a_token_give_finite_numbers_in_every_dtype(cls, dtype, attention):
    model = tiny(cls).to(dtype)
    model.set_attn_implementation(attention)
    inputs = inputs_of(cls, LENGTHS)
    inputs["attention_mask"][0] = 0
    assert torch.isfinite(logits_of(model, inputs)).all()
