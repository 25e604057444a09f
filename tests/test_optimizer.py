"""Muon and Adam: the orthogonalisation against an SVD, and any number of ranks against one process."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import run_python
from model import PRESETS, KBERTConfig, KBERTForMaskedLM, Linear
from optimizer import Optimizer, polar_express
from trainer import why_eager


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192), (1, 64)])
def test_polar_express_lands_in_its_band_around_the_polar_factor(shape):
    torch.manual_seed(0)
    n = min(shape)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    gradient = u @ torch.diag_embed(torch.logspace(0, -2, n).expand(3, n)) @ v  # singular values from 1 to 0.01
    result = polar_express(gradient).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.25
    cosine = (result * (u @ v)).sum((1, 2)) / (result.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_polar_express_of_deficient_and_zero_matrices():
    torch.manual_seed(0)
    deficient = torch.randn(64, 8) @ torch.randn(8, 48)
    result = polar_express(torch.stack([deficient, torch.zeros(64, 48)])).float()
    values = torch.linalg.svdvals(result[0])
    assert values[:8].min() > 0.7 and values.max() < 1.25  # the others are bf16 rounding, which grows but stays below
    assert (result[1] == 0).all()


def settings(**changed) -> dict:
    muon = dict(muon_lr=0.02, muon_weight_decay=1.0, muon_beta2=0.95, muon_polar_steps=5)
    embed, scalar = dict(embed_lr=0.01, embed_betas=(0.7, 0.95)), dict(scalar_lr=0.01, scalar_betas=(0.9, 0.95))
    return {**muon, **embed, **scalar, "adam_eps": 1e-10, **changed}


def small_model(**changed) -> KBERTForMaskedLM:
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    return KBERTForMaskedLM(KBERTConfig(vocab_size=70, **shape, **changed))


def bytes_sent(optimizer: Optimizer) -> int:
    """By each rank in a step: fp32 gradients of every other rank's share, and its bf16 updates to every other."""
    return sum(group.share * math.prod(group.row) * (group.world_size - 1) * (4 + 2) for group in optimizer.groups)


def test_every_parameter_is_in_one_group_and_muon_has_the_blocks_matrices():
    model = KBERTForMaskedLM(KBERTConfig(vocab_size=70, **PRESETS["micro"]))
    optimizer = Optimizer(model, rank=0, world_size=1, **settings())
    in_muon = {id(p) for group in optimizer.muon for p in group.parameters}
    for name, p in model.named_parameters():
        assert (id(p) in in_muon) == (".blocks." in name and p.ndim == 2), name
    rows = {"muon.64x256": 3 * 4 * 4, "muon.256x256": 4, "muon.384x256": 2 * 4, "muon.256x384": 4}
    assert {group.name: group.rows for group in optimizer.muon} == rows


def test_a_zero_gradient_moves_nothing_and_makes_no_nan():
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = Optimizer(model, rank=0, world_size=1, **settings(muon_weight_decay=0.0))
    optimizer.step(1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_cautious_decay_never_turns_a_weight_against_its_update():
    model = small_model()
    twin = small_model()
    with torch.no_grad():
        for a, b in zip(model.parameters(), twin.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
    Optimizer(model, rank=0, world_size=1, **settings(muon_weight_decay=100.0)).step(1.0, 0.95)
    Optimizer(twin, rank=0, world_size=1, **settings(muon_weight_decay=0.0)).step(1.0, 0.95)
    start = dict(small_model().named_parameters())
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        if ".blocks." in name and a.ndim == 2:
            extra, update, weight = (a - b).detach(), (b - start[name]).detach(), start[name].detach()
            assert ((extra == 0) | (extra * weight < 0)).all()  # decay shrinks
            assert ((extra.abs() < 1e-7) | (extra * update > 0)).all()  # and only along the update


def test_muon_steps_have_the_size_that_lr_says():
    """A square matrix changes by about lr in spectral norm, whatever the gradient's size."""
    for size in (1e-6, 1.0, 1e6):
        model = small_model()
        square = model.encoder.blocks[0].attention.out.weight
        before = square.detach().clone()
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = size * torch.randn_like(p)
        Optimizer(model, rank=0, world_size=1, **settings(muon_weight_decay=0.0)).step(1.0, 0.95)
        assert 0.7 * 0.02 < torch.linalg.svdvals(square.detach() - before).max() < 1.5 * 0.02


def test_muon_written_out_for_tall_square_and_wide_matrices():
    """Nesterov, NorMuon by neuron, the norm kept, the longer step of a tall matrix, cautious decay."""
    model, lr, decay, beta = small_model(), 0.02, 100.0, 0.9
    optimizer = Optimizer(model, rank=0, world_size=1, **settings(muon_weight_decay=decay))

    def stacks(of) -> dict:
        groups = optimizer.muon
        return {g.row: torch.cat([of(p).reshape(-1, *g.row) for p in g.parameters]).clone() for g in groups}

    start, weights = stacks(lambda p: p.detach()), stacks(lambda p: p.detach())
    momentum, second = ({row: 0.0 for row in start} for _ in range(2))
    assert set(start) == {(128, 64), (64, 64), (64, 128), (32, 64)}
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        gradients = stacks(lambda p: p.grad)
        optimizer.step(1.0, beta)
        for (r, c), g in gradients.items():
            row = r, c
            momentum[row] = beta * momentum[row] + (1 - beta) * g
            update = polar_express((1 - beta) * g + beta * momentum[row]).float()
            mean = update.square().mean(-1 if r >= c else -2, keepdim=True)
            second[row] = 0.95 * second[row] + 0.05 * mean
            even = update / second[row].sqrt()
            even *= update.norm(dim=(1, 2), keepdim=True) / even.norm(dim=(1, 2), keepdim=True)
            even *= max(1.0, r / c) ** 0.5
            weights[row] *= 1 - lr * lr * decay * (even * weights[row] > 0)
            weights[row] -= lr * even
    for row, found in stacks(lambda p: p.detach()).items():
        wanted = weights[row] - start[row]
        assert (found - start[row] - wanted).norm() / wanted.norm() < 0.02, row


def test_weights_stored_divided_take_the_same_steps():
    """To the bit, by a power of two: with small gradients, too, where epsilons matter."""
    ids = torch.randint(5, 70, (2, 128))
    weights, losses = [], []
    for multiplier in (1.0, 8.0):
        model = small_model(weight_multiplier=multiplier)
        steps = settings(adam_eps=1e-4, weight_multiplier=multiplier)
        optimizer = Optimizer(model, rank=0, world_size=1, **steps)
        for _ in range(4):
            loss = 1e-4 * model(ids, labels=ids).loss
            loss.backward()
            optimizer.step(1.0, 0.95)
        stored = {id(m.weight) for m in model.modules() if isinstance(m, (Linear, torch.nn.Embedding))}
        weights.append([p * multiplier if id(p) in stored else p for p in model.parameters()])
        losses.append(loss)
    assert losses[0] == losses[1]
    for a, b in zip(*weights):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_embedding_follows_plain_adam(compiled):
    if compiled and why_eager(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    model, twin = small_model(), small_model()
    optimizer = Optimizer(model, rank=0, world_size=1, **settings(), compiled=compiled)
    plain = torch.optim.Adam([twin.encoder.embed.weight], lr=0.01, betas=(0.7, 0.95), eps=1e-10)
    start = twin.encoder.embed.weight.detach().clone()
    torch.manual_seed(1)
    for _ in range(5):
        model.encoder.embed.weight.grad = torch.randn_like(start)
        twin.encoder.embed.weight.grad = model.encoder.embed.weight.grad.clone()
        optimizer.step(1.0, 0.95)
        plain.step()
    moved, expected = model.encoder.embed.weight.detach() - start, twin.encoder.embed.weight.detach() - start
    assert (moved - expected).norm() / expected.norm() < 4e-3  # updates travel in bf16


# Run under torchrun: steps a model on one global batch of gradients, of which each rank holds its part, and saves it.
WORKER = """
import sys, torch
sys.path[:0] = ["tests"]
from test_optimizer import bytes_sent, settings, small_model
import optimizer
from trainer import join_processes

first, last, load, save = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
with join_processes() as process:
    model = small_model()
    ours = optimizer.Optimizer(model, rank=process.rank, world_size=process.world_size, **settings())
    if load != "-":
        saved = torch.load(load)
        model.load_state_dict(saved["model"])
        ours.load_state_dict(saved["optimizer"])
    sent = 0
    def counted(call, shares):
        def wrapped(output, input, **more):
            global sent
            sent += input.numel() * input.element_size() * (process.world_size - 1) // shares
            return call(output, input, **more)
        return wrapped
    whole = optimizer.all_gather
    optimizer.reduce_scatter = counted(optimizer.reduce_scatter, process.world_size)
    optimizer.all_gather = counted(whole, 1)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            parts = torch.randn(6, *p.shape, generator=generator)
            p.grad = parts[process.rank :: process.world_size].sum(0)
        ours.step(1.0, 0.9)
    assert sent == (last - first) * bytes_sent(ours), (sent, bytes_sent(ours))
    assert not any(group.pending for group in ours.groups)  # which would keep the updates in memory
    optimizer.all_gather = whole
    state = ours.state_dict()
    if process.is_main:
        torch.save({"model": model.state_dict(), "optimizer": state}, save)
"""


def run_worker(tmp_path, processes: int, first: int, last: int, load="-"):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    save = tmp_path / f"{processes}_{first}_{last}.pt"
    result = run_python(worker, first, last, load, save, processes=processes)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return save


def assert_same(a, b):
    # Sums over ranks differ in their last bits, which bf16 products inside Muon may round apart.
    torch.testing.assert_close(torch.load(a), torch.load(b), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("world_size", (1, 8, 64))
def test_bytes_sent_follow_the_formula(world_size):
    """6 * P * (W - 1) / W, but for padding: what the workers below count as they send it."""
    model = KBERTForMaskedLM(KBERTConfig(vocab_size=4096, **PRESETS["micro"]))
    numbers = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, rank=0, world_size=world_size, **settings())
    padding = sum((group.share * world_size - group.rows) * math.prod(group.row) for group in optimizer.groups)
    assert bytes_sent(optimizer) == 6 * (numbers + padding) * (world_size - 1) // world_size
    assert all(0 <= group.share * world_size - group.rows < world_size for group in optimizer.groups)


def test_two_and_three_ranks_give_what_one_process_gives_and_exchange_their_state(tmp_path):
    alone = run_worker(tmp_path, 1, 0, 4)
    two = run_worker(tmp_path, 2, 0, 2)
    assert_same(alone, run_worker(tmp_path, 3, 2, 4, load=two))  # saved under 2 ranks, continued under 3
    assert_same(alone, run_worker(tmp_path, 1, 2, 4, load=two))  # and under 1
