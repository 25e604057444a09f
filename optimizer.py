"""Muon for the matrices of layers and Adam for everything else, both sharded over ranks.

Every rank holds all parameters. In a step
    1. gradients are summed over ranks, each rank receiving its share of the rows (reduce-scatter, all groups at once),
    2. each rank turns its share into updates, with the optimizer state that only it keeps,
    3. updates are exchanged (all-gather, in bf16) and every rank applies all of them.

A group is one stack of rows: for Muon a row is a matrix [r, c], and all matrices of one shape are orthogonalised
together, as [n, r, c]; for Adam a row is a single number. Zeros pad the stack to a multiple of the world size, so any
number of matrices goes with any number of ranks.

Rates, epsilons and decay refer to the effective weights. Where a model stores them divided by a multiplier, updates
shrink by that factor, and gradients grow by it.

Bytes that a rank sends in a step, for P parameters on W ranks: (4 + 2) * P * (W - 1) / W, and a little for padding.
Adam's sums travel while Muon's stacks are built; each group's updates travel while the next group is orthogonalised.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Amsel et al. 2025, "The Polar Express": five steps, for singular values between 1e-3 and 1, each polynomial the best
# one for what the steps before it leave. The input is divided by a little more than its norm, for bf16's sake.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(gradient: Tensor, steps: int = len(POLAR_EXPRESS), eps: float = 1e-6) -> Tensor:
    """[n, r, c] -> bf16 [n, r, c]: about U V^T of each matrix's singular value decomposition U S V^T; zero stays zero.

    In exact arithmetic, singular values above 1e-3 of the Frobenius norm end up between 0.84 and 1.15 after five steps,
    between 0.12 and 1.88 after three; in bf16 the smallest of them end lower.
    """
    tall = gradient.size(-2) > gradient.size(-1)
    x = (gradient.mT if tall else gradient).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + eps)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT  # [n, min(r, c), min(r, c)]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def descend(p: Tensor, update: Tensor, rates: Tensor) -> None:
    """p -= lr * update, and cautious weight decay: only where it agrees with the update (Chen et al. 2025).

    p, update [n], rates [2]: lr and decay. A function of tensors alone, to be compiled into one kernel.
    """
    update = update.float()
    p.mul_(1 - rates[1] * (update * p > 0)).sub_(rates[0] * update)


# The names since torch 2.13, else the older ones.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """Parameters whose gradients form one stack of `rows` rows of shape `row`, sharded over ranks."""

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        row: tuple[int, ...],
        rank: int,
        world_size: int,
        multiplier: float = 1.0,
    ):
        """multiplier: what the parameters are stored divided by."""
        self.multiplier = multiplier
        self.name, self.parameters, self.row, self.rank, self.world_size = name, parameters, row, rank, world_size
        sizes = [p.numel() for p in parameters]
        self.rows = sum(sizes) // math.prod(row)
        self.share = -(-self.rows // world_size)  # rows of each rank, padding included
        self.state: dict[str, Tensor] = {}  # name -> [share, ...]
        device = parameters[0].device
        self.rates = torch.empty(2, device=device)  # learning rate and decay
        self.weights = torch.zeros(self.share * world_size, *row, device=device)
        for p, place in zip(parameters, self.weights.view(-1)[: sum(sizes)].split(sizes)):
            p.data = place.view_as(p).copy_(p.data)  # a view, so that one call updates all of them

    def reduce(self) -> None:
        """Starts summing gradients over ranks. A parameter that took no part has none: zero."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        parts = [gradient.reshape(-1, *self.row) for gradient in gradients]
        if padding := self.share * self.world_size - self.rows:
            parts.append(parts[0].new_zeros(padding, *self.row))
        self.stack = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.gradient, self.pending = self.stack, None
        if self.world_size > 1:
            self.gradient = self.stack.new_empty(self.share, *self.row)
            self.pending = reduce_scatter(self.gradient, self.stack, async_op=True)

    def exchange(self, update: Tensor) -> None:
        """Starts handing every rank's [share, ...] updates to all."""
        update = update.bfloat16().contiguous()
        self.stack, self.pending = update, None
        if self.world_size > 1:
            self.stack = update.new_empty(self.share * self.world_size, *self.row)
            self.pending = all_gather(self.stack, update, async_op=True)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None  # else it keeps what was exchanged until the next step

    @torch.no_grad()
    def apply(self, rule, lr: float, decay: float) -> None:
        """rule: `descend`, compiled or not."""
        for rate, value in zip(self.rates, (lr / self.multiplier, decay)):
            rate.fill_(value)  # a tensor made of numbers would have the host wait for the GPU
        rule(self.weights.view(-1), self.stack.view(-1), self.rates)
        del self.stack, self.gradient

    def state_dict(self) -> dict[str, Tensor]:
        """Whole state on the CPU, whatever the world size; every rank must call."""
        whole = {}
        for key, share in self.state.items():
            stack = share
            if self.world_size > 1:
                stack = share.new_empty(self.world_size * share.size(0), *share.shape[1:])
                all_gather(stack, share.contiguous())
            whole[f"{self.name}.{key}"] = stack[: self.rows].cpu().clone()
        return whole

    def load_state_dict(self, whole: dict[str, Tensor]) -> None:
        """whole: as `state_dict` gives it. KeyError where it is another model's."""
        for key, share in self.state.items():
            rows = whole[f"{self.name}.{key}"][self.rank * self.share : (self.rank + 1) * self.share]
            share.zero_()[: rows.size(0)].copy_(rows)


class Muon(Group):
    """Nesterov momentum, orthogonalised (Jordan et al. 2024), then normalised by row, or by column if a matrix is wide.

    By row, which is a neuron, in Li et al. 2025, "NorMuon".
    """

    def __init__(self, name, parameters, row, rank, world_size, multiplier, *, lr, weight_decay, beta2, polar_steps):
        super().__init__(name, parameters, row, rank, world_size, multiplier)
        self.lr, self.weight_decay, self.beta2, self.polar_steps = lr, weight_decay, beta2, polar_steps
        self.scale = max(1.0, row[0] / row[1]) ** 0.5  # a tall matrix may change its output as much as a square one
        self.shorter = -1 if row[0] >= row[1] else -2  # the dimension that the second moment is a mean over
        momentum = torch.zeros(self.share, *row, device=parameters[0].device)
        second_moment = torch.zeros_like(momentum.mean(self.shorter, keepdim=True))
        self.state = {"momentum": momentum, "second_moment": second_moment}

    @torch.no_grad()
    def update(self, step: int, momentum: float) -> Tensor:
        """self.gradient [share, r, c] -> the update of the same shape, to be scaled by the learning rate."""
        gradient = self.gradient
        self.state["momentum"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(self.state["momentum"], momentum)
        update = polar_express(update, self.polar_steps, eps=1e-6 * self.multiplier)
        squares = update.float().square_().sum(self.shorter, keepdim=True)  # [share, r, 1] or [share, 1, c]
        second_moment = self.state["second_moment"].lerp_(squares / update.size(self.shorter), 1 - self.beta2)
        # A matrix whose output a zero-initialised one takes has no gradient at first, hence the clamps.
        second_moment = second_moment.clamp_min(1e-10)
        # The matrix keeps its norm: what the normalisation did to it follows from those of its rows or columns.
        before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares / second_moment))
        return update * (self.scale * (before / after.clamp_min(1e-20)).sqrt() * second_moment.rsqrt())


def adam_update(gradient, momentum, second_moment, unbias, beta1: float, beta2: float, eps: float) -> Tensor:
    """gradient, momentum, second_moment [n], unbias [2]: 1 - beta^step of each moment. To be compiled, as `descend`."""
    momentum.lerp_(gradient, 1 - beta1)
    second_moment.lerp_(gradient.square(), 1 - beta2)
    return ((momentum / unbias[0]) / ((second_moment / unbias[1]).sqrt() + eps)).bfloat16()


class Adam(Group):
    def __init__(self, name, parameters, rank, world_size, multiplier=1.0, *, lr, betas, eps, compiled: bool):
        super().__init__(name, parameters, (), rank, world_size, multiplier)
        self.lr, self.weight_decay, self.betas, self.eps = lr, 0.0, betas, eps
        self.rule = torch.compile(adam_update, dynamic=False) if compiled else adam_update
        zeros = torch.zeros(self.share, device=parameters[0].device)
        self.unbias = zeros.new_empty(2)
        self.state = {"momentum": zeros, "second_moment": zeros.clone()}

    @torch.no_grad()
    def update(self, step: int, momentum: float) -> Tensor:
        """Like Muon.update, on [share]. step: its number, from 1. `momentum` is Muon's: Adam has decays of its own."""
        for unbias, beta in zip(self.unbias, self.betas):
            unbias.fill_(1 - beta**step)
        momentum, second_moment = self.state["momentum"], self.state["second_moment"]
        return self.rule(self.gradient, momentum, second_moment, self.unbias, *self.betas, self.eps * self.multiplier)


class Optimizer:
    """All groups of a model: model.Linear's weights for Muon, the embedding (with its head) and the rest for Adam."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        world_size: int,
        muon_lr: float,
        muon_weight_decay: float,
        muon_beta2: float,
        muon_polar_steps: int,
        embed_lr: float,
        embed_betas: tuple[float, float],
        scalar_lr: float,
        scalar_betas: tuple[float, float],
        adam_eps: float,
        weight_multiplier: float = 1.0,
        compiled: bool = False,
    ):
        """weight_multiplier: what the model stores model.Linear's weights and the embedding divided by."""
        embeddings, others, matrices = [], [], {}
        is_embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        stacked = {id(m.weight): m.stacked for m in model.modules() if hasattr(m, "stacked")}
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            if id(p) in is_embedding:
                embeddings.append(p)
            elif id(p) in stacked:
                matrices.setdefault((p.size(0) // stacked[id(p)], p.size(1)), []).append(p)
            else:
                others.append(p)
        muon = dict(lr=muon_lr, weight_decay=muon_weight_decay, beta2=muon_beta2, polar_steps=muon_polar_steps)
        muon["multiplier"] = weight_multiplier
        self.muon = [
            Muon(f"muon.{r}x{c}", group, (r, c), rank, world_size, **muon) for (r, c), group in sorted(matrices.items())
        ]
        embed = dict(lr=embed_lr, betas=embed_betas, eps=adam_eps, multiplier=weight_multiplier, compiled=compiled)
        rest = dict(lr=scalar_lr, betas=scalar_betas, eps=adam_eps, compiled=False)
        named = (("adam.embed", embeddings, embed), ("adam.rest", others, rest))
        self.adam = [Adam(name, group, rank, world_size, **settings) for name, group, settings in named if group]
        grouped = sorted(id(p) for group in self.groups for p in group.parameters)
        assert grouped == sorted(id(p) for p in trained), "every parameter belongs to exactly one group"
        self.descend = torch.compile(descend, dynamic=True) if compiled else descend  # one kernel for all lengths
        self.steps = 0

    @property
    def groups(self) -> list[Group]:
        return [*self.adam, *self.muon]

    def step(self, lr_factor: float, momentum: float) -> None:
        """One update from the gradients, each rank's part of a loss that is a sum over ranks. Frees the gradients.

        lr_factor: of each group's learning rate; momentum: Muon's.
        """
        self.steps += 1
        for group in self.groups:
            group.reduce()
        for group in self.groups:
            group.wait()
            group.exchange(group.update(self.steps, momentum))
        for group in self.groups:
            group.wait()
            lr = group.lr * lr_factor
            group.apply(self.descend, lr, min(1.0, lr * lr * group.weight_decay))  # a decay above 1 would flip signs
            for p in group.parameters:
                p.grad = None

    def reset(self) -> None:
        """To the state before the first step; the parameters stay as they are."""
        self.steps = 0
        for group in self.groups:
            for share in group.state.values():
                share.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Whole state on the CPU, for any world size; every rank must call."""
        whole = {"steps": torch.tensor(self.steps)}
        for group in self.groups:
            whole |= group.state_dict()
        return whole

    def load_state_dict(self, whole: dict[str, Tensor]) -> None:
        self.steps = int(whole["steps"])
        for group in self.groups:
            group.load_state_dict(whole)
