"""What only a GPU can show: FlexAttention's backward, the compiled step, memory, agreement with the CPU.

    python -m pytest tests/test_gpu.py

Skipped without a GPU. tests/first_hour.py runs these and measures speed.
"""

from __future__ import annotations

import math

import pytest
import torch

from conftest import (
    GOLDEN,
    LENGTHS,
    flags,
    losses,
    metrics_of,
    reference_attention,
    row_of,
    run_python,
    sentences,
    tiny,
    write_documents,
)
from dataloading import Loader, read_manifest
from model import (
    PRESETS,
    HeadLoss,
    KBERTConfig,
    KBERTForMaskedLM,
    attend,
    flex_mask,
    local_tiles,
    pack_slots,
    slot_tiles,
)
from objectives import compile_rows, draw_masks
from trainer import main, read_settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_float32_matmul_precision("high")


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


def tiles(documents: torch.Tensor, window: int | None):
    return slot_tiles(documents, pack_slots(documents, 500)) if window is None else local_tiles(documents, window)


@pytest.mark.parametrize("window", [8, 64, 100, None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", [flex_mask, tiles])
def test_attention_agrees_with_fp64_forward_and_backward(window, dtype, tolerance, backend):
    """FlexAttention with the tiles it chooses, in bf16 as in training, and tf32."""
    _, documents, _ = row_of([300, 20, 129, 63, 500])
    torch.manual_seed(1)
    q, k, v, direction = (torch.randn(1, len(documents), 4, 64).to(dtype).double() for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = reference_attention(*inputs, documents, window, 0.12)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    on_gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    call = torch.compile(attend) if backend is flex_mask else attend
    got = call(*on_gpu, backend(documents.cuda(), window), 0.12)
    assert distance(got, expected) < tolerance
    for a, b in zip(torch.autograd.grad((got * direction.to("cuda", dtype)).sum(), on_gpu), wanted):
        assert distance(a, b) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_50368_words_in_bf16_agrees_with_fp64(compiled):
    torch.manual_seed(1)
    V, N, d, cap = 50_368, 1024, 768, 30.0
    hidden, weight = torch.randn(N, d).bfloat16().double(), (0.1 * torch.randn(V, d)).bfloat16().double()
    targets = torch.randint(0, V, (N,))
    targets[::7] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    logits = hidden @ weight.t()
    capped = logits / (1 + (logits / cap) ** 2).sqrt()
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="sum", ignore_index=-100)
    wanted = torch.autograd.grad(expected, inputs)
    on_gpu = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in inputs]
    call = torch.compile(HeadLoss.apply) if compiled else HeadLoss.apply
    got = call(*on_gpu, targets.cuda(), cap)
    assert distance(got, expected.detach()) < 1e-3
    for a, b in zip(torch.autograd.grad(got, on_gpu), wanted):
        assert distance(a, b) < 2e-2


def test_the_compiled_step_gives_the_gradients_of_the_cpu():
    torch.set_float32_matmul_precision("highest")  # tf32 is off by up to 3% in single scalars
    model = tiny(hidden_size=128, num_attention_heads=2)
    ids, documents, positions = row_of(LENGTHS)
    row = ids, documents, positions, torch.arange(0, 512, 8), torch.randint(5, 200, (64,))
    model.loss(*row, 256).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss_of = compile_rows(model.loss, model.cuda().encoder, compiled=True)
    loss_of(*(x.cuda() for x in row), max_seqlen=256, window=16).backward()
    for name, p in model.named_parameters():
        assert (p.grad.cpu() - expected[name]).norm() <= 1e-2 * expected[name].norm() + 1e-5, name


def test_one_compilation_serves_every_row_and_masking_rate(tmp_path):
    path = write_documents(tmp_path, {"train": [sentences(1, 400)]})
    model = tiny(vocab_size=64, hidden_size=128, num_attention_heads=2).cuda()
    model.encoder.compute_dtype = torch.bfloat16
    loader = Loader(path, read_manifest(path), "train", 1024, 100, seed=1, device="cuda")
    loss_of = compile_rows(model.loss, model.encoder, compiled=True)
    for count, row in zip((64, 128, 192, 256), loader):
        loss_of(*draw_masks(row, count, 1, 3), max_seqlen=100, window=16).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_on_a_gpu_follows_training_on_a_cpu(corpus, tmp_path):
    main(flags(corpus, tmp_path, "gpu", "--train.compile true"))
    # The masks are others, from another generator.
    assert list(losses(tmp_path / "gpu", "train_loss").values())[:3] == pytest.approx(GOLDEN[:3], abs=0.15)
    assert list(losses(tmp_path / "gpu", "val_loss").values())[-1] < math.log(64) - 0.3


def test_detection_on_a_gpu_follows_detection_on_a_cpu(corpus, tmp_path):
    rtd = "--train.objective rtd --train.detection_weight 5"
    main(flags(corpus, tmp_path, "cpu", f"{rtd} --train.device cpu --train.compile false"))
    main(flags(corpus, tmp_path, "gpu", f"{rtd} --train.compile true"))
    cpu, gpu = (losses(tmp_path / run, "train_loss") for run in ("cpu", "gpu"))
    assert list(gpu.values())[:3] == pytest.approx(list(cpu.values())[:3], rel=0.1)  # other masks, other words
    cpu, gpu = (losses(tmp_path / run, "val_loss") for run in ("cpu", "gpu"))  # of the same masks
    assert list(gpu.values())[-1] == pytest.approx(list(cpu.values())[-1], abs=0.25)
    assert (tmp_path / "gpu" / "generator" / "model.safetensors").exists()


LARGE = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 75e9, reason="needs 80 GB"
)


def test_row_tokens_are_measured(corpus, tmp_path):
    main(flags(corpus, tmp_path, "auto", "--train.row_tokens none --train.batch_tokens 65536 --train.steps 2"))
    assert read_settings(tmp_path / "auto")["train"]["row_tokens"] == 65536


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(corpus, tmp_path):
    for ranks in (1, 2):
        done = run_python("trainer.py", *flags(corpus, tmp_path, f"gpus{ranks}"), processes=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / f"gpus{ranks}") for ranks in (1, 2))
    assert [m["train_loss"] for m in one] == pytest.approx([m["train_loss"] for m in two], abs=0.02)


@LARGE
def test_the_base_model_takes_a_row_of_64k_tokens():
    model = KBERTForMaskedLM(KBERTConfig(**PRESETS["base"])).cuda()
    model.encoder.compute_dtype = torch.bfloat16
    token = torch.arange(65536, device="cuda", dtype=torch.int32)
    masked = torch.arange(0, 65536, 4, device="cuda")
    row = token % 50_000, token // 1024, token % 1024, masked, (masked * 7) % 50_000
    loss = compile_rows(model.loss, model.encoder, compiled=True)(*row, max_seqlen=1024, window=128)
    loss.backward()
    # Above the log of 50,368, 10.8: before training, the tied head has each token guess itself, here at other targets
    assert loss.item() / len(masked) == pytest.approx(13.73, abs=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
