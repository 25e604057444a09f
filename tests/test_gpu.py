"""What only a GPU can show: FlexAttention's backward, the compiled step, memory, and agreement with the CPU. Skipped without one.

python -m pytest tests/test_gpu.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import sentences, write_documents
from test_model import LENGTHS, reference_attention, row_of, tiny
from test_trainer import flags, losses

from dataloading import Loader, read_manifest
from model import PRESETS, KBERTConfig, KBERTForMaskedLM, attend, flex_mask, local_tiles, pack_slots, slot_tiles
from trainer import PRESETS as TRAINER_PRESETS
from trainer import main, make_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("window", [8, 64, 100, None])
@pytest.mark.parametrize("backend", ["flex", "tiles"])
def test_attention_agrees_with_fp64_forward_and_backward(window, backend):
    _, documents, _ = row_of([300, 20, 129, 63, 500])
    documents = documents.cuda()
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, len(documents), 4, 64, device="cuda", requires_grad=True) for _ in range(3))
    direction = torch.randn(1, len(documents), 4, 64, device="cuda")
    if backend == "flex":
        got = torch.compile(attend)(q, k, v, flex_mask(documents, window), 0.12)
    else:
        got = attend(
            q,
            k,
            v,
            slot_tiles(documents, pack_slots(documents, 500)) if window is None else local_tiles(documents, window),
            0.12,
        )
    expected = reference_attention(q.cpu(), k.cpu(), v.cpu(), documents.cpu(), window, 0.12).cuda().float()
    assert (got - expected).norm() / expected.norm() < 2e-3  # tf32 products
    wanted = torch.autograd.grad(
        (
            reference_attention(q.cpu(), k.cpu(), v.cpu(), documents.cpu(), window, 0.12).cuda().float() * direction
        ).sum(),
        (q, k, v),
    )
    for a, b in zip(torch.autograd.grad((got * direction).sum(), (q, k, v)), wanted):
        assert (a - b).norm() / b.norm() < 5e-3


def test_the_compiled_step_gives_the_gradients_of_the_cpu():
    model = tiny(hidden_size=128, num_attention_heads=2)
    ids, documents, positions = row_of(LENGTHS)
    masked, targets = torch.arange(0, 512, 8), torch.randint(5, 200, (64,))
    model.loss(ids, documents, positions, masked, targets, 256).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    loss_of = make_loss(model, compiled=True)
    loss_of(*(x.cuda() for x in (ids, documents, positions, masked, targets)), max_seqlen=256, window=16).backward()
    for name, p in model.named_parameters():
        assert (p.grad.cpu() - expected[name]).norm() <= 1e-2 * expected[name].norm() + 1e-5, name


def test_one_compilation_serves_every_row_and_masking_rate(tmp_path):
    path = write_documents(tmp_path, {"train": [sentences(1, 400)]})
    model = tiny(vocab_size=64, hidden_size=128, num_attention_heads=2).cuda()
    model.encoder.compute_dtype = torch.bfloat16
    loss_of, rows = (
        make_loss(model, compiled=True),
        iter(Loader(path, read_manifest(path), "train", 1024, 100, seed=1, device="cuda")),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for count in (64, 128, 192, 256):
        row = next(rows)
        masked = torch.arange(0, 1024, 4, device="cuda")[:count]
        loss_of(
            row.input_ids,
            row.document_ids,
            row.positions,
            masked,
            row.input_ids[masked].long(),
            max_seqlen=100,
            window=16,
        ).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_on_a_gpu_follows_training_on_a_cpu(corpus, tmp_path):
    main(flags(corpus, tmp_path, "gpu", "--train.compile", "true"))
    from test_trainer import GOLDEN

    assert list(losses(tmp_path / "gpu", "train_loss").values())[:3] == pytest.approx(
        GOLDEN[:3], abs=0.15
    )  # other masks: another generator
    assert list(losses(tmp_path / "gpu", "val_loss").values())[-1] < math.log(64) - 0.3


def test_row_tokens_are_measured(corpus, tmp_path):
    main(
        flags(
            corpus,
            tmp_path,
            "auto",
            "--train.row_tokens",
            "none",
            "--train.batch_tokens",
            "65536",
            "--train.steps",
            "2",
        )
    )
    resolved = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert resolved["train"]["row_tokens"] == 65536


@pytest.mark.parametrize("preset", ["base"])
def test_the_base_model_takes_a_row_of_64k_tokens(preset):
    model = KBERTForMaskedLM(KBERTConfig(**PRESETS[preset])).cuda()
    model.encoder.compute_dtype = torch.bfloat16
    T = 65536
    token = torch.arange(T, device="cuda", dtype=torch.int32)
    masked = torch.arange(0, T, 4, device="cuda")
    loss = make_loss(model, compiled=True)(
        token % 50_000, token // 1024, token % 1024, masked, (masked * 7) % 50_000, max_seqlen=1024, window=128
    )
    loss.backward()
    assert loss.item() / len(masked) == pytest.approx(math.log(50_368), abs=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert TRAINER_PRESETS[preset]["model.hidden_size"] == 768 and np.isfinite(torch.cuda.max_memory_allocated())
