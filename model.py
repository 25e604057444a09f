"""KBERT: a bidirectional encoder in one file, which stands alone because it is uploaded to the Hub with the weights.

    from transformers import AutoModelForMaskedLM
    model = AutoModelForMaskedLM.from_pretrained("USER/NAME", trust_remote_code=True)

Pre-norm blocks of attention (RoPE, QK-norm, value residual) and GeGLU. Every third layer attends to the whole document,
the others to a sliding window, where their heads start out at a token's neighbours. The MLM head is tied to the
embedding, its logits are soft-capped. Matrices and embedding are stored divided by weight_multiplier, and activations
are multiplied by it instead: stored like this, they have the scale that suits AdamW's usual learning rates.

There are two ways through the same blocks. Training packs: `encode` takes a row of T tokens without padding, which
holds documents side by side, told apart by `document_ids`. All other callers pad: Hugging Face's `forward` takes
input_ids and attention_mask [B, S]; none of its shapes depend on data, so it compiles and exports whole.

Shapes: B texts of S tokens, or one row of T, N masked positions, H heads, D head width, d hidden_size,
f intermediate_size, V vocabulary, C tiles or blocks of a row, Z slots of whole documents.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers import modeling_outputs as outputs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

PRESETS = {  # small has the shape of Ettin-17M, base and large have those of ModernBERT
    "micro": dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=384),
    "small": dict(num_hidden_layers=7, hidden_size=256, num_attention_heads=4, intermediate_size=384),
    "base": dict(num_hidden_layers=22, hidden_size=768, num_attention_heads=12, intermediate_size=1152),
    "large": dict(num_hidden_layers=28, hidden_size=1024, num_attention_heads=16, intermediate_size=2624),
}


def option(default, help: str):
    """A dataclass field with a line of help that names its unit; such fields become flags of the scripts."""
    return dataclasses.field(default=default, metadata={"help": help})


class KBERTConfig(PretrainedConfig):
    model_type = "kbert"

    # Format of the weights: 1 had no weight_multiplier; 1 and 2 padded the vocabulary to a multiple of 128
    checkpoint_format: int = 3
    # Set by the data, not by flags
    vocab_size: int = 50_368
    max_position_embeddings: int = 1024  # the longest document it was trained on; RoPE itself has no limit
    pad_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    mask_token_id: int | None = None

    num_hidden_layers: int = option(22, "layers")
    hidden_size: int = option(768, "width of the residual stream; a multiple of 64")
    num_attention_heads: int = option(12, "attention heads")
    intermediate_size: int = option(1152, "width of GeGLU; a multiple of 64")
    global_attention_every: int = option(3, "layers; 0, 3, 6, ... attend to the whole document, the others locally")
    local_attention_window: int = option(128, "tokens that a local layer sees, half of them to each side")
    frequency_base: float = option(10_000.0, "RoPE's theta")
    logit_softcap: float = option(30.0, "logits stay within plus and minus this")
    value_residual: bool = option(True, "mix the first layer's values into every layer's")
    embedding_skip: bool = option(True, "mix the embedding into every layer's input")
    neighbour_heads: bool = option(True, "local layers start out attending to adjacent tokens, by biases of q and k")
    norm_eps: float = option(1e-6, "added to the mean square in RMSNorm")
    weight_multiplier: float = option(8.0, "what matrices and the embedding are stored divided by")
    classifier_dropout: float = option(0.1, "probability, before the classifier of a finetuned model")
    classifier_pooling: str = "mean"  # or "cls": the finetuner's choice
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        heads = ("MaskedLM", "SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering")
        auto_map = {"AutoConfig": "model.KBERTConfig", "AutoModel": "model.KBERTModel"}
        auto_map |= {f"AutoModelFor{head}": f"model.KBERTFor{head}" for head in heads}
        auto_map["AutoModelForPreTraining"] = "model.KBERTForReplacedTokenDetection"
        kwargs.setdefault("auto_map", auto_map)
        if kwargs.pop("rope_parameters", None):
            raise ValueError("rope_parameters are not known here: RoPE has one, frequency_base")
        super().__post_init__(**kwargs)
        if self.checkpoint_format != 3:
            known = "format 3, or of 1 and 2 with a vocabulary that is a multiple of 128"
            rule = "load the one saved with it, by trust_remote_code=True"
            raise ValueError(f"this model.py knows checkpoints of {known}, not of {self.checkpoint_format}: {rule}")

        def check(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"{name} {getattr(self, name)} {rule}: change --model.{name}")

        shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        others = ("global_attention_every", "local_attention_window", "frequency_base", "logit_softcap")
        for name in (*shape, *others, "weight_multiplier"):
            check(name, getattr(self, name) > 0, "must be positive")
        check("norm_eps", self.norm_eps >= 0, "must not be negative")
        check("classifier_dropout", 0 <= self.classifier_dropout <= 1, "must lie between 0 and 1")
        fits = self.hidden_size % self.num_attention_heads == 0 and self.head_dim % 4 == 0
        rule = f"must divide hidden_size {self.hidden_size} into heads whose width is a multiple of 4"
        check("num_attention_heads", fits, rule)
        rule = f"makes heads {self.head_dim} wide, and attention may overflow beyond 128"
        check("num_attention_heads", self.head_dim <= 128, rule)
        for name in ("hidden_size", "intermediate_size"):
            check(name, getattr(self, name) % 64 == 0, "must be a multiple of 64")
        # HeadLoss sums exp(logit) in fp32, multiplies that by weights and divides by it: 2^32 are left on either side.
        largest = math.log(torch.finfo(torch.float32).max / 2**32 / self.vocab_size)
        rule = f"must be at most {math.floor(largest)}, or the sum of exp(logit) over the vocabulary overflows"
        check("logit_softcap", self.logit_softcap <= largest, rule)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        stored_as = config_dict.get("checkpoint_format", 1)
        undivided = {"weight_multiplier": 1.0} if stored_as == 1 else {}
        alike = stored_as in (1, 2) and config_dict.get("vocab_size", cls.vocab_size) % 128 == 0
        changed = undivided | {"checkpoint_format": 3 if alike else stored_as}
        return super().from_dict(config_dict | changed, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_global(self, layer: int) -> bool:
        return layer % self.global_attention_every == 0


# ---------------------------------------------------------------------------------------------------------------------
# Blocks. Their norms have no weights: the matrix that follows each can learn the scale.


class Linear(nn.Linear):
    """Without bias; fp32 weights are cast to the activations' dtype. Muon sees the weight as `stacked` matrices."""

    def __init__(self, in_features: int, out_features: int, stacked: int = 1):
        super().__init__(in_features, out_features, bias=False)
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class ZeroLinear(Linear):
    """Starts at zero, so that each block starts as the identity."""


def rotary_frequencies(head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """[D / 2] radians a token, from 2 down to 1 / base; the usual 1 tells neighbours apart less well.

    Half of them are zero, so half of each head ignores position (half-truncated RoPE, modded-nanogpt).
    """
    frequency = 2.0 * (2.0 * base) ** -torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=device)
    return torch.cat([frequency, torch.zeros_like(frequency)])


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin [..., 1, D], computed from positions [...]: no table to outgrow, no buffer to lose in loading.

    Both are parts of one tensor, because the compiler computes one tensor once but would recompute two in each layer.
    """
    angle = positions[..., None].float() * rotary_frequencies(head_dim, base, positions.device)  # [..., D / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos, sin, -sin], dim=-1).to(dtype)[..., None, :].chunk(2, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos + b sin, b cos - a sin) for the halves of x [B, S, H, D]."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * sin


def neighbour_bias(num_heads: int, head_dim: int, base: float) -> Tensor:
    """Biases of q and k [2, H, D] by which heads start out attending to the tokens at -1, +1, -2, +2, in turn.

    Under RoPE, constant q and k add a score that depends on the distance alone (Su 2023, "RoPE + bias"): here 3.5^2
    times the sum of cos(frequency * (distance - offset)) over the frequencies above 0.1. Without it a model must first
    learn that neighbours matter. For local layers only: global ones that start out there get stuck.
    """
    frequency = rotary_frequencies(head_dim, base)  # [D / 2]
    offset = torch.tensor([-1.0, 1.0, -2.0, 2.0]).repeat(-(-num_heads // 4))[:num_heads, None]  # [H, 1]
    angle = offset * frequency  # [H, D / 2]
    q = torch.cat([angle.cos(), -angle.sin()], dim=-1)  # [H, D]
    k = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)], dim=-1)
    return torch.stack([q, k]) * 3.5 * (frequency > 0.1).repeat(2)


class Attention(nn.Module):
    def __init__(self, config: KBERTConfig, layer: int):
        super().__init__()
        self.config, self.num_heads, self.multiplier = config, config.num_attention_heads, config.weight_multiplier
        # Muon orthogonalises each head's q, k and v by itself, at less cost than the whole.
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, stacked=3 * self.num_heads)
        self.out = ZeroLinear(config.hidden_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.head_dim, config.norm_eps, elementwise_affine=False)
        self.value_lambda = nn.Parameter(torch.empty(())) if config.value_residual and layer > 0 else None
        biased = config.neighbour_heads and not config.is_global(layer)
        self.qk_bias = nn.Parameter(torch.empty(2, self.num_heads, config.head_dim)) if biased else None

    def forward(self, x: Tensor, first_value: Tensor | None, rotary, mask, wanted: Tensor | None):
        """As Block.forward; rotary: rotary_tables. Returns states, weights [B, H, S, S] if eager, and values."""
        q, k, v = self.qkv(x * self.multiplier).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, S, H, D] each
        v = v * self.multiplier  # that of self.out, where it needs no pass of its own
        if self.value_lambda is not None:
            v = v + self.value_lambda * (first_value - v)  # Zhou et al. 2024, "Value Residual Learning"
        q, k = self.norm(q), self.norm(k)
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[0].to(q.dtype), k + self.qk_bias[1].to(k.dtype)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        scale = 0.12  # about 1 / sqrt(64), for any width of head
        if isinstance(mask, (BlockMask, Tiles)):
            x, weights = attend(q, k, v, mask, scale), None
        else:
            chosen = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            by_head = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D] each
            x, weights = chosen(self, *by_head, mask, scaling=scale, is_causal=False)
        x = x.flatten(2)  # [B, S, d]
        return self.out(x if wanted is None else x[:, wanted]), weights, v


class GeGLU(nn.Module):
    def __init__(self, config: KBERTConfig):
        super().__init__()
        self.multiplier = config.weight_multiplier
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, stacked=2)
        self.down = ZeroLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x * self.multiplier).chunk(2, dim=-1)  # [B, S, f] each
        return self.down(F.gelu(gate) * up * self.multiplier)


class Block(GradientCheckpointingLayer):
    def __init__(self, config: KBERTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = GeGLU(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, elementwise_affine=False)
        self.input_lambdas = nn.Parameter(torch.empty(2)) if config.embedding_skip and layer > 0 else None

    def forward(self, x: Tensor, x0: Tensor, first_value, rotary, mask, wanted: Tensor | None):
        """x, x0 [B, S, d] -> [B, S, d], or [1, N, d] at the positions wanted [N] of a row; and its values."""
        if self.input_lambdas is not None:
            x = self.input_lambdas[0] * x + self.input_lambdas[1] * x0
        attended, _, value = self.attention(self.norm(x), first_value, rotary, mask, wanted)
        x = (x if wanted is None else x[:, wanted]) + attended
        return x + self.mlp(self.norm(x)), value


# ---------------------------------------------------------------------------------------------------------------------
# The models


def check_range(numbers: Tensor, size: int, what: str) -> None:
    """Numbers must be below size. For the CPU alone: on a GPU this would wait, and the kernel has an assertion."""
    if numbers.device.type != "cpu" or torch.compiler.is_compiling() or numbers.numel() == 0:
        return
    if (largest := int(numbers.max())) >= size:
        raise ValueError(f"{what} go up to {largest}, and there are {size}, counted from 0")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [..., classes], labels [...], -100 for none -> mean."""
    check_range(labels, logits.size(-1), "labels")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def mean_state(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, S, d], zero where there is no token -> [B, d]."""
    size = hidden.size(1) if attention_mask is None else attention_mask.sum(1, keepdim=True).clamp(min=1)
    return hidden.sum(1) / size


class KBERTPreTrainedModel(PreTrainedModel):
    config_class = KBERTConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["Block"]
    _input_embed_layer = "embed"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer need not say how many labels it has in all: losses are means
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if isinstance(module, (ZeroLinear, Detector)):
                init.zeros_(module.weight)
            else:
                stored = 1 / self.config.weight_multiplier if isinstance(module, Linear) else 1.0
                init.normal_(module.weight, std=0.5 * module.in_features**-0.5 * stored)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02 / self.config.weight_multiplier)
        elif isinstance(module, Attention):
            if module.value_lambda is not None:
                init.constant_(module.value_lambda, 0.5)
            if module.qk_bias is not None:
                init.copy_(module.qk_bias, neighbour_bias(*module.qk_bias.shape[1:], self.config.frequency_base))
        elif isinstance(module, Block) and module.input_lambdas is not None:
            init.copy_(module.input_lambdas, torch.tensor([1.0, 0.0]))


class KBERTModel(KBERTPreTrainedModel):
    def __init__(self, config: KBERTConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, elementwise_affine=False)
        self.compute_dtype: torch.dtype | None = None  # of activations; None: the weights' own
        self.attention_backend = "blockwise"  # what compiled code uses: compiled_backend(device)
        self.post_init()

    def encode(self, input_ids, document_ids, positions, max_seqlen, window=None, slots=None, wanted=None) -> Tensor:
        """One row without padding: input_ids, document_ids (ascending), positions [T] -> hidden states [T, d].

        T is a multiple of 128, and no document but padding is longer than max_seqlen.
        window: tokens that local layers see, half of them to each side; local_attention_window when None.
        slots: pack_slots(document_ids, max_seqlen), which a compiled model without FlexAttention has to be given.
        wanted [N]: return the states at these positions alone, [N, d]; the last layer then computes no others.
        """
        reach = (self.config.local_attention_window if window is None else window) // 2
        # FlexAttention run eagerly would write out all T x T scores.
        if self.attention_backend == "flex" and torch.compiler.is_compiling():
            local_mask, global_mask = flex_mask(document_ids, reach), flex_mask(document_ids, None)
        else:
            slots = pack_slots(document_ids, max_seqlen) if slots is None else slots
            global_mask = slot_tiles(document_ids, slots)
            # Where local layers see whole documents, slots of these waste less than tiles
            local_mask = local_tiles(document_ids, reach) if reach < max_seqlen - 1 else global_mask
        return self.run_blocks(self.embed(input_ids)[None], positions, local_mask, global_mask, wanted)[0]

    def run_blocks(self, x: Tensor, positions: Tensor, local_mask, global_mask, wanted: Tensor | None = None) -> Tensor:
        """Embeddings [B, S, d], positions [S] or [B, S], a mask for each kind of layer -> hidden states [B, S, d]."""
        x = x0 = self.norm(x.to(self.compute_dtype or x.dtype) * self.config.weight_multiplier)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.frequency_base, x.dtype)
        first_value = None
        for layer, block in enumerate(self.blocks):
            mask = global_mask if self.config.is_global(layer) else local_mask
            last = layer == len(self.blocks) - 1
            x, value = block(x, x0, first_value, rotary, mask, wanted if last else None)
            first_value = value if layer == 0 else first_value
        return self.norm(x)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> outputs.BaseModelOutput:
        """input_ids, or inputs_embeds [B, S, d]; attention_mask, position_ids [B, S] -> last_hidden_state [B, S, d].

        It is zero where attention_mask is. Positions count padding too: distances alone matter. token_type_ids are not
        looked at.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        B, S, *_ = given.shape
        if S == 0:
            raise ValueError("the texts have no tokens: input_ids is [B, 0]")
        if attention_mask is not None and attention_mask.shape != (B, S):
            shape = list(attention_mask.shape)
            raise ValueError(f"attention_mask has to be [{B}, {S}], 1 for tokens and 0 for padding, and is {shape}")
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs eager attention: model.set_attn_implementation("eager")')
        if inputs_embeds is None:
            check_range(input_ids, self.config.vocab_size, "input_ids")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # [B, S, d]
        dtype = self.compute_dtype or x.dtype
        keep = None if attention_mask is None else attention_mask.bool()
        token, reach = torch.arange(S, device=x.device), self.config.local_attention_window // 2
        local_mask = global_mask = None if keep is None else additive_mask(keep[:, None], dtype)  # [B, 1, 1, S]
        if torch.compiler.is_compiling() or S > reach + 1:  # an exported program takes every length
            near = ((token[:, None] - token).abs() <= reach)[None]  # [1, S, S]
            local_mask = additive_mask(near if keep is None else near & keep[:, None], dtype)  # [B, 1, S, S]
        x = self.run_blocks(x, token if position_ids is None else position_ids, local_mask, global_mask)
        return outputs.BaseModelOutput(last_hidden_state=x if keep is None else x * keep[..., None])

    @torch.no_grad()
    def mean_states(self, texts: list[list[int]], batch_size: int = 8) -> Tensor:
        """Token ids of each text -> the mean of its states, as an embedding [texts, d] fp32.

        Texts are batched by length, which leaves little padding: model.mean_states(tokenizer(texts)["input_ids"]).
        """
        means = torch.empty(len(texts), self.config.hidden_size, device=self.device)
        by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(texts), batch_size):
            numbers = by_length[start : start + batch_size]
            rows = [torch.tensor(texts[number], device=self.device) for number in numbers]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # [B, S]
            hidden = self(pad_sequence(rows, batch_first=True), mask, return_dict=True).last_hidden_state
            means[numbers] = mean_state(hidden.float(), mask)
        return means


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """The factor that brings logits x within plus and minus cap; its cube is the cap's slope. Tanh is slower."""
    return torch.rsqrt(1 + (x * (1 / cap)).square())


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the tied head: hidden [N, d], weight [V, d], targets [N], -100 for none.

    Each logit is read once: softmax goes without subtracting the maximum, which the soft cap bounds (KBERTConfig checks
    that fp32 holds the sums), and the gradient is stored before its rows are divided by their sums; in the backward's
    products the hidden states are divided instead.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, uniform=None):
        """uniform [N] in [0, 1): also return words [N], each drawn by its logits."""
        V = ctx.vocab_size = weight.size(0)
        if V % 128:  # products of other sizes are slow, and words are drawn in blocks of 128
            weight = F.pad(weight, (0, 0, 0, -V % 128))
        target, has_target = targets.clamp(min=0)[:, None], targets >= 0  # [N, 1], [N]
        logits = hidden @ weight.t()  # [N, V padded]
        own, x = logits.gather(1, target)[:, 0].float(), logits.float()
        own_factor, factor = soft_cap(own, cap), soft_cap(x, cap)
        own = own * own_factor  # [N] the target's logit
        word = torch.arange(weight.size(0), device=weight.device, dtype=torch.int32)
        weights = torch.where(word < V, (x * factor).exp(), 0.0)
        sums = None if uniform is None else weights.unflatten(1, (-1, 128)).sum(-1)
        total = (weights if sums is None else sums).sum(-1)  # [N]
        own_gradient = (own.exp() - total) * own_factor**3
        gradient = (weights * factor**3).to(logits.dtype).scatter(1, target, own_gradient[:, None].to(logits.dtype))
        ctx.save_for_backward(hidden, weight, gradient, has_target / total)
        loss = torch.where(has_target, total.log() - own, 0.0).sum()
        if uniform is None:
            return loss
        words = draw_words(logits, sums, uniform, cap, V)
        ctx.mark_non_differentiable(words)
        return loss, words

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):
        hidden, weight, gradient, scale = ctx.saved_tensors
        scale = (scale * upstream)[:, None]  # [N, 1]
        of_hidden = ((gradient @ weight) * scale).to(hidden.dtype)  # [N, d]
        of_weight = (gradient.t() @ (hidden * scale).to(hidden.dtype))[: ctx.vocab_size]
        return of_hidden, of_weight, None, None, None


def draw_words(logits: Tensor, sums: Tensor, uniform: Tensor, cap: float, vocab_size: int) -> Tensor:
    """logits [N, V padded] before the soft cap, uniform [N] in [0, 1) -> words [N], drawn with softmax's probabilities.

    sums [N, V padded / 128]: of exp(logit) in blocks of 128 words. One number chooses the block, then the word in it:
    neither noise for each word nor a sum that runs over the whole vocabulary is needed.
    """
    ends = sums.cumsum(-1)
    height = uniform[:, None] * ends[:, -1:]  # [N, 1]
    block = (ends <= height).sum(-1, keepdim=True).clamp(max=ends.size(1) - 1)  # [N, 1]
    height = height - (ends - sums).gather(1, block)  # within the block
    word = block * 128 + torch.arange(128, device=logits.device)  # [N, 128]
    x = logits.gather(1, word).float()
    weights = torch.where(word < vocab_size, (x * soft_cap(x, cap)).exp(), 0.0)
    chosen = (weights.cumsum(-1) <= height).sum(-1, keepdim=True)  # [N, 1]
    return (block * 128 + chosen.clamp(max=127)).clamp(max=vocab_size - 1)[:, 0]


class KBERTForMaskedLM(KBERTPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "encoder.embed.weight"}

    def __init__(self, config: KBERTConfig):
        if "KBERTForReplacedTokenDetection" in (config.architectures or ()):  # its embedding would pass for a head
            raise ValueError("this KBERT detects replaced words and predicts none: load the generator beside it")
        super().__init__(config)
        self.encoder = KBERTModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        hidden = hidden.to(self.lm_head.weight.dtype) * self.config.weight_multiplier
        x = self.lm_head(hidden).float()
        return x * soft_cap(x, self.config.logit_softcap)

    def loss(self, input_ids, document_ids, positions, masked, targets, max_seqlen, window=None, slots=None) -> Tensor:
        """Summed cross-entropy of a row at its masked positions [N], which alone reach the vocabulary.

        The row as KBERTModel.encode takes it; targets [N]: the words there, -100 for none.
        """
        hidden = self.encoder.encode(input_ids, document_ids, positions, max_seqlen, window, slots, masked)  # [N, d]
        return self.head_loss(hidden, targets)

    def loss_and_words(
        self, input_ids, document_ids, positions, masked, targets, uniform, max_seqlen, window=None, slots=None
    ) -> tuple[Tensor, Tensor]:
        """As `loss`, and input_ids [T] with a word at each masked position, drawn from the guesses by uniform [N]."""
        hidden = self.encoder.encode(input_ids, document_ids, positions, max_seqlen, window, slots, masked)
        loss, words = self.head_loss(hidden, targets, uniform)
        words = torch.where(targets >= 0, words.to(input_ids.dtype), input_ids[masked])
        return loss, input_ids.index_put((masked,), words)

    def head_loss(self, hidden: Tensor, targets: Tensor, *uniform: Tensor):
        """As HeadLoss.forward."""
        hidden, weight = hidden * self.config.weight_multiplier, self.lm_head.weight.to(hidden.dtype)
        return HeadLoss.apply(hidden, weight, targets, self.config.logit_softcap, *uniform)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> outputs.MaskedLMOutput:
        """As KBERTModel.forward; labels [B, S], -100 for none -> logits [B, S, V] fp32, mean loss."""
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.logits(out.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels)
        return outputs.MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)


class Detector(nn.Linear):
    """The last layer of a detector. Starts at zero: started at random, one encoder of two finetuned badly."""


class KBERTForReplacedTokenDetection(KBERTPreTrainedModel):
    """Whether each token was replaced (Clark et al. 2020, "ELECTRA"): then its logit is positive."""

    def __init__(self, config: KBERTConfig):
        super().__init__(config)
        self.encoder = KBERTModel(config)
        # Not named like a classifier's layers, which must start afresh when this model is finetuned
        self.detector_dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, elementwise_affine=False)
        self.detector = Detector(config.hidden_size, 1)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [...] fp32."""
        x = self.norm(F.gelu(self.detector_dense(hidden * self.config.weight_multiplier)))
        return self.detector(x.to(self.detector.weight.dtype))[..., 0].float()

    def loss(
        self, input_ids, document_ids, positions, replaced, text, max_seqlen, window=None, slots=None
    ) -> tuple[Tensor, Tensor]:
        """Of a row, replaced and text [T] bool: cross-entropy summed over the text, and the logits [T]."""
        logits = self.logits(self.encoder.encode(input_ids, document_ids, positions, max_seqlen, window, slots))
        each = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        return torch.where(text, each, 0.0).sum(), logits

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> outputs.TokenClassifierOutput:
        """As KBERTModel.forward; labels [B, S], 1 replaced, 0 not, -100 for none -> logits [B, S], mean loss."""
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        logits, loss = self.logits(out.last_hidden_state), None
        if labels is not None:
            labelled = labels != -100
            loss = F.binary_cross_entropy_with_logits(logits[labelled], labels[labelled].float())
        return outputs.TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class KBERTForClassification(KBERTPreTrainedModel):
    """What the three classifiers below share."""

    def __init__(self, config: KBERTConfig, num_outputs: int | None = None):
        super().__init__(config)
        self.encoder = KBERTModel(config)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs or config.num_labels)
        self.post_init()

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, S, d], zero where there is no token -> a text's mean state, or that of its first token [B, d]."""
        if self.config.classifier_pooling != "cls":
            return mean_state(hidden, attention_mask)
        if attention_mask is None:
            return hidden[:, 0]
        first = attention_mask.int().argmax(1)  # [B] after padding on the left
        return hidden[torch.arange(hidden.size(0), device=hidden.device), first]

    def classify(self, hidden: Tensor) -> Tensor:
        """[..., d] -> logits [..., num_labels] fp32."""
        x = self.dropout(self.norm(F.gelu(self.dense(hidden * self.config.weight_multiplier))))
        return self.classifier(x.to(self.classifier.weight.dtype)).float()


class KBERTForSequenceClassification(KBERTForClassification):
    """A label, several ("multi_label_classification") or a number (num_labels 1), from a text's mean state or [CLS]."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch: squared error for a number, cross-entropy for a class."""
        if self.config.num_labels == 1:
            return F.mse_loss(logits[:, 0], labels.float().view(-1))
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return cross_entropy(logits, labels)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> outputs.SequenceClassifierOutput:
        """As KBERTModel.forward; labels [B] or [B, num_labels] -> logits [B, num_labels], mean loss."""
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.classify(self.pool(out.last_hidden_state, attention_mask))
        loss = None if labels is None else self.loss(logits, labels)
        return outputs.SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class KBERTForTokenClassification(KBERTForClassification):
    """A label for each token, such as the kind of name that it is part of."""

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> outputs.TokenClassifierOutput:
        """As KBERTModel.forward; labels [B, S], -100 for none -> logits [B, S, num_labels], mean loss."""
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.classify(out.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels)
        return outputs.TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class KBERTForMultipleChoice(KBERTForClassification):
    """The best of several texts, as of a question with each of its answers: a score for each."""

    def __init__(self, config: KBERTConfig):
        super().__init__(config, num_outputs=1)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> outputs.MultipleChoiceModelOutput:
        """input_ids, attention_mask and their kin [B, choices, S], labels [B] -> logits [B, choices], mean loss."""
        choices = (kwargs["inputs_embeds"] if input_ids is None else input_ids).size(1)
        kwargs = {name: x.flatten(0, 1) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        input_ids, attention_mask = (x if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask))
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        logits = self.classify(self.pool(out.last_hidden_state, attention_mask)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return outputs.MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions)


class KBERTForQuestionAnswering(KBERTPreTrainedModel):
    """A span of the context: its first and last token."""

    def __init__(self, config: KBERTConfig):
        super().__init__(config)
        self.encoder = KBERTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def span_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> start and end logits [...] fp32."""
        return self.qa_outputs(hidden.to(self.qa_outputs.weight.dtype)).float().unbind(-1)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, start_positions=None, end_positions=None, **kwargs):
        """As KBERTModel.forward; positions [B] -> start and end logits [B, S], mean loss."""
        out = self.encoder(input_ids, attention_mask, return_dict=True, **kwargs)
        start, end = self.span_logits(out.last_hidden_state)  # [B, S] each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (cross_entropy(start, start_positions) + cross_entropy(end, end_positions)) / 2
        return outputs.QuestionAnsweringModelOutput(loss, start, end, out.hidden_states, out.attentions)


KBERTConfig.register_for_auto_class()
KBERTModel.register_for_auto_class("AutoModel")
KBERTForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
KBERTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KBERTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
KBERTForReplacedTokenDetection.register_for_auto_class("AutoModelForPreTraining")
KBERTForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
KBERTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")


# ---------------------------------------------------------------------------------------------------------------------
# Attention of padded batches: transformers has sdpa and its kin, and leaves "eager" to the model


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """visible [B, queries or 1, S] -> what to add to scores [B, 1, ...]: zero, or -1e4, which hides a key in any dtype.

    QK-norm keeps scores far smaller, so -1e4 is enough. A query that sees no key then gets a mean; -inf would give NaN.
    """
    return torch.where(visible, 0.0, -1e4).to(dtype)[:, None]


def eager_attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs):
    """q, k, v [B, H, S, D] -> states [B, S, H, D] and the weights [B, H, S, S]."""
    scores = q @ k.mT * scaling
    weights = (scores if mask is None else scores + mask).float().softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2), weights


# ---------------------------------------------------------------------------------------------------------------------
# Attention of packed rows: which keys a query sees, written down from document boundaries, and two ways to compute it

BLOCK = 128  # tokens in a block of FlexAttention, to which a row is padded
LOCAL_BLOCK = 64  # queries in a tile of local attention


def flex_mask(document_ids: Tensor, reach: int | None, size: int = BLOCK) -> BlockMask:
    """BlockMask of a row in C blocks of `size` tokens, from document boundaries alone: no table exceeds [C, C].

    reach: tokens that a query sees to each side; None: all of its document.

    Documents are contiguous. So are the keys that a query sees, and so are the blocks that some, or all, of a block's
    queries see. Visibility is symmetric: the tables serve the backward too. A sort would compile slowly for a GPU.
    """
    T = document_ids.size(0)
    token = torch.arange(T, device=document_ids.device)
    low = torch.searchsorted(document_ids, document_ids, side="left")  # [T] first key of each query
    high = torch.searchsorted(document_ids, document_ids, side="right") - 1  # [T] its last
    if reach is not None:
        low, high = torch.maximum(low, token - reach), torch.minimum(high, token + reach)
    low, high = low.view(-1, size), high.view(-1, size)  # [C, size], both ascending
    # [C, 1] each: blocks from first to end - 1 are seen in part or whole, those from full to full_end - 1 wholly.
    first, end = low[:, :1] // size, high[:, -1:] // size + 1
    full, full_end = (low[:, -1:] + size - 1) // size, (high[:, :1] + 1) // size
    full, full_end = (torch.where(full < full_end, x, end) for x in (full, full_end))
    num_full = full_end - full
    block = torch.arange(T // size, device=document_ids.device)  # [C]
    # [C, C] those before the full ones, then those after
    partial = first + block + torch.where(block < full - first, 0, num_full)
    tables: list[Tensor] = []  # of partial blocks, then of full ones: how many each block of queries sees, and which
    for count, blocks in ((end - first - num_full, partial), (num_full, full + block)):
        tables += [count.view(1, 1, -1).int(), blocks.clamp(max=T // size - 1).int()[None, None]]

    def visible(b, h, q, k):
        same = document_ids[q] == document_ids[k]
        return same if reach is None else same & ((q - k).abs() <= reach)

    return BlockMask((T, T), *tables, *tables, BLOCK_SIZE=(size, size), mask_mod=visible)


# FlexAttention cannot train on CPUs and old GPUs, and on a CPU the backward of sdpa costs several times its forward.
# There the same attention is computed by plain batched products over tiles: blocks of queries with the keys around them
# for local layers, slots full of whole documents for global ones. Cost is linear in T.


class Tiles(NamedTuple):
    visible: Tensor  # [C, 1, queries, keys] bool
    to_slots: Tensor | None = None  # [Z * max_seqlen] the token at each place of each slot; None for local layers
    to_row: Tensor | None = None  # [T] the place of each token


def pack_slots(document_ids: Tensor, max_seqlen: int) -> Tensor:
    """Puts documents whole into slots of max_seqlen tokens, longest first: [Z, max_seqlen] token numbers, T if empty.

    A small loop over documents, which the compiler cannot trace.
    """
    T, slots = document_ids.size(0), []
    pieces, start = [], 0
    for length in torch.bincount(document_ids).tolist():  # padding may be longer than any document: cut
        pieces += [(start + at, min(max_seqlen, length - at)) for at in range(0, length, max_seqlen)]
        start += length
    for start, length in sorted(pieces, key=lambda piece: -piece[1]):
        slot = next((slot for slot in slots if len(slot) + length <= max_seqlen), None)
        if slot is None:
            slots.append(slot := [])
        slot += range(start, start + length)
    return torch.tensor([tokens + [T] * (max_seqlen - len(tokens)) for tokens in slots], device=document_ids.device)


def slot_tiles(document_ids: Tensor, slots: Tensor) -> Tiles:
    """Global attention: all pairs within a slot that belong to one document."""
    T, token = document_ids.size(0), slots.flatten()
    place = torch.arange(token.size(0), device=slots.device)
    to_row = place.new_zeros(T + 1).scatter(0, token, place)[:T]
    # Empty places stand for the last token and see each other alone; nothing reads what comes of them.
    to_slots = token.clamp(max=T - 1)
    document = torch.where(token < T, document_ids[to_slots], -1).view(slots.shape)  # [Z, max_seqlen]
    return Tiles((document[:, :, None] == document[:, None, :])[:, None], to_slots, to_row)


def local_tiles(document_ids: Tensor, reach: int) -> Tiles:
    """Local attention, `reach` tokens to each side: blocks of queries with the blocks of keys around them."""
    token = torch.arange(document_ids.size(0), device=document_ids.device).view(-1, LOCAL_BLOCK, 1)
    document = document_ids.view(-1, LOCAL_BLOCK, 1)
    sides = -(-reach // LOCAL_BLOCK)
    around = [Neighbours.apply(x + 1, sides).mT - 1 for x in (document, token)]  # [C, 1, keys]; -1 beyond the row
    return Tiles(((document == around[0]) & ((token - around[1]).abs() <= reach))[:, None])


class Neighbours(torch.autograd.Function):
    """[C, size, ...] -> [C, (2 * sides + 1) * size, ...]: each block with `sides` more on each side, zeros at the ends.

    A strided view of one padded tensor, so that the compiler computes that tensor once and not anew for each copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sides: int) -> Tensor:
        ctx.sides = sides
        C, size = x.shape[:2]
        edge = x.new_zeros(sides, *x.shape[1:])
        padded = torch.cat([edge, x, edge])  # [C + 2 * sides, size, ...]
        return padded.as_strided((C, (2 * sides + 1) * size, *x.shape[2:]), padded.stride()).clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        sides = ctx.sides
        parts = gradient.chunk(2 * sides + 1, dim=1)  # [C, size, ...] each
        total = parts[sides]
        for shift in range(1, sides + 1):  # block c comes `shift` after block c - shift and `shift` before c + shift
            after, before = parts[sides + shift], parts[sides - shift]
            edge = torch.zeros_like(total[:shift])
            total = total + torch.cat([edge, after[:-shift]]) + torch.cat([before[shift:], edge])
        return total, None


class Rearrange(torch.autograd.Function):
    """x[index], whose gradient is gradient[inverse]: a gather each way, where autograd would scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


class SoftmaxWeights(torch.autograd.Function):
    """exp(scale * scores) where visible, else zero, in the scores' dtype; to be divided by their sum.

    The backward takes them as they are: autograd would compute them again, and keep them in fp32 too for their sum.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, visible: Tensor, scale: float) -> Tensor:
        weights = torch.where(visible, (scores.float() * scale).exp(), 0.0).to(scores.dtype)
        ctx.scale = scale
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weights,) = ctx.saved_tensors
        return (gradient.float() * weights * ctx.scale).to(weights.dtype), None, None


def compiled_backend(device: torch.device) -> str:
    """Where FlexAttention can train (GPUs since Ampere) "flex", else "blockwise".

    To be asked outside the compiled model, whose graph it would break in two.
    """
    return "flex" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "blockwise"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tiles, scale: float) -> Tensor:
    """q, k, v: [1, T, H, D] -> [1, T, H, D]."""
    if isinstance(mask, BlockMask):
        # v as a strided view of qkv beside contiguous q and k is read wrongly by the CPU's kernel (torch 2.13)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v.contiguous()))  # [1, H, T, D]
        return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)
    _, _, H, D = q.shape
    queries, keys = mask.visible.shape[2:]
    q, k, v = (x[0] for x in (q, k, v))  # [T, H, D]
    if mask.to_slots is not None:
        q, k, v = (Rearrange.apply(x, mask.to_slots, mask.to_row).view(-1, queries, H, D) for x in (q, k, v))
    else:
        sides = (keys // queries - 1) // 2
        q, k, v = (x.view(-1, queries, H, D) for x in (q, k, v))  # [C, queries, H, D]
        k, v = Neighbours.apply(k, sides), Neighbours.apply(v, sides)  # [C, keys, H, D]
    # One dimension for tiles and heads: with two, torch would transpose k element by element before the product.
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [C * H, queries or keys, D]
    # No maximum is subtracted, a pass less each way: QK-norm bounds q and k, their learned biases stay small.
    scores = (q @ k.mT).unflatten(0, (-1, H))  # [C, H, queries, keys]
    weights = SoftmaxWeights.apply(scores, mask.visible, scale).flatten(0, 1)  # [C * H, queries, keys]
    x = (weights @ v) / weights.sum(-1, keepdim=True, dtype=torch.float32).to(v.dtype)
    x = x.unflatten(0, (-1, H)).transpose(1, 2).reshape(-1, H, D)
    return (x if mask.to_slots is None else Rearrange.apply(x, mask.to_row, mask.to_slots))[None]
