"""Our training step against `transformers.ModernBertForMaskedLM` of the same shape, on the same documents, in one run.

    python tests/benchmark.py                                               the micro shape on the embedded sample
    python tests/benchmark.py --data DIR --layers 6 --hidden 384 --heads 6 --intermediate 576
    python tests/benchmark.py --preset base --data DIR --row-tokens 65536   on a GPU
    python tests/benchmark.py --objectives                                  a step of detection against one of masking
    python tests/benchmark.py --profile ...                                 our step by kind of kernel
    python tests/benchmark.py --attention --preset base --data DIR ...      FlexAttention and varlen_attn, on a GPU
    python tests/benchmark.py --inference --preset base                     the padded forward, as people serve it
    python tests/benchmark.py --finetune --max-length 128                   the finetuner's step against Trainer's way
    python tests/benchmark.py --loader                                      the loader alone, on one core
    python tests/benchmark.py --packing 'corpus/*.jsonl.xz' --data DIR      packing against `tokenizers` alone

The reference (records/baseline/modernbert.py) gets AdamW, bf16 autocast, sdpa, prediction at masked positions only, and
the batch shape that suits it best: bucketed or concatenated, eager or, where shapes are static, compiled. Both sides
take turns, so that a busy machine slows both; medians are compared. Two trainings are compared by their logs:
`python records/plot.py logs/OURS logs/BASELINE`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import finetuner
from data.examples import Split
from data.tasks import TASKS, Classes, Data
from dataloading import InputError, Loader, Row, first_line, read_manifest
from model import PRESETS, KBERTConfig, KBERTForSequenceClassification, KBERTModel, attend, flex_mask
from objectives import mask_count
from records.baseline.modernbert import Reference
from records.log import Work, peak_flops
from trainer import PRESETS as TRAINER_PRESETS
from trainer import (
    ROOT,
    SAMPLE,
    Process,
    TrainConfig,
    compute_dtype,
    join_processes,
    locate_data,
    make_objective,
    make_optimizer,
    model_config,
    warm_up,
    why_eager,
)

MASK_RATE = 0.30  # of the timed steps: ModernBERT's


class Ours:
    """KBERT: blockwise or FlexAttention on packed rows, Muon and Adam, compiled where there is a compiler."""

    def __init__(
        self, config: KBERTConfig, preset: str, row_tokens: int, max_length: int, process: Process, objective="mlm"
    ):
        torch.manual_seed(1)
        self.name = "kbert" if objective == "mlm" else f"kbert {objective}"
        self.config = config
        settings = [(name.split("."), value) for name, value in TRAINER_PRESETS[preset].items()]
        self.train = TrainConfig(**{name: value for (group, name), value in settings if group == "train"})
        self.train.objective = objective
        self.objective = make_objective(config, self.train, max_length)
        compiled = why_eager(process.device) is None
        self.objective.prepare(process.device, compute_dtype(process.device), compiled)
        self.optimizer = make_optimizer(self.objective.network, config, self.train, process, compiled)
        warm_up(self.objective, self.train, row_tokens, max_length)
        self.optimizer.step(lr_factor=0.0, momentum=0.0)  # compiles the rest
        self.optimizer.reset()

    def step(self, row: Row, count: int) -> Tensor:
        loss = self.gradients(row, count)
        self.optimizer.step(lr_factor=1.0, momentum=0.95)
        return loss

    def gradients(self, row: Row, count: int) -> Tensor:
        text, window = row.round_text[0], self.config.local_attention_window
        loss, measures = self.objective.loss(row, count, window, min(count, text), text)
        loss.backward()
        return measures[0]

    def flops(self, row: Row, count: int) -> float:
        work, counted_by = Work(), self.objective.flops_counted_by
        work.add(row.round_lengths, count, self.config.local_attention_window)
        return work.training_flops(self.config, counted_by, self.train.generator_layers)


def peak_memory_mb(device: torch.device) -> float:
    """Of the process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def timed(side: Ours | Reference, rows: list[Row], rate: float = MASK_RATE) -> list[float]:
    """Seconds of a step on each row."""
    seconds = []
    for row in rows:
        start = time.perf_counter()
        side.step(row, mask_count(rate, row.input_ids.size(0))).item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return seconds


def compare_steps(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Ours and the reference in each shape, in turn."""
    device, row_tokens, longest = process.device, arguments.row_tokens, arguments.max_length
    ours = Ours(config, arguments.preset, row_tokens, longest, process)
    memory = {ours.name: peak_memory_mb(device)}  # its warm-up is a whole step
    shapes = [("bucketed", False), ("concatenated", False)] + [("concatenated", True)] * (why_eager(device) is None)
    sides = [ours] + [Reference(config, longest, device, *shape, lr=1e-4, seed=1) for shape in shapes]
    theirs = arguments.reference_row_tokens or row_tokens
    rows = {side.name: iter(new_loader(row_tokens if side is ours else theirs)) for side in sides}
    steps = []
    for turn in range(1 + arguments.rounds):  # the first one compiles
        for side in list(sides):
            batch = [next(rows[side.name]) for _ in range(arguments.steps if turn else 2)]
            try:
                seconds = timed(side, batch)
            except torch.OutOfMemoryError:
                if side is ours:
                    raise
                print(f"{side.name} does not fit into the GPU's memory and is left out: lower --reference-row-tokens")
                sides.remove(side)
                continue
            memory.setdefault(side.name, peak_memory_mb(device))
            if turn:
                steps += [(side.name, spent, int(row.round_lengths.sum())) for spent, row in zip(seconds, batch)]
    found = pandas.DataFrame(steps, columns=["side", "seconds", "tokens"]).groupby("side", sort=False).median()
    found["tokens/s"] = found["tokens"] / found["seconds"]
    found["memory so far, MB"] = pandas.Series(memory)
    print(found.to_string(float_format="{:,.2f}".format))
    rates = found["tokens/s"].drop(ours.name)
    if rates.empty:
        raise InputError("no reference fits into the GPU's memory: lower --reference-row-tokens")
    flops = ours.flops(next(rows[ours.name]), mask_count(MASK_RATE, row_tokens))
    mine, best = found.loc[ours.name], rates.idxmax()
    return {
        "ours_tokens_per_s": round(mine["tokens/s"]),
        "reference_tokens_per_s": round(rates[best]),
        "ratio": round(mine["tokens/s"] / rates[best], 3),
        "reference": best,
        "variants": rates.round().astype(int).to_dict(),
        "mfu": round(flops / mine["seconds"] / peak_flops(device), 4),
        "ours_peak_memory_mb": round(memory[ours.name]),
    }


def compare_objectives(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """A step of each objective, in turn: tokens/s, and how much of the machine's FLOP/s it uses."""
    shape = arguments.preset, arguments.row_tokens, arguments.max_length
    rates = {"mlm": MASK_RATE, "rtd": TrainConfig.replace_rate}
    sides = {name: Ours(config, *shape, process, objective=name) for name in rates}
    rows, steps = iter(new_loader()), []
    for turn in range(1 + arguments.rounds):
        for name, side in sides.items():
            batch = [next(rows) for _ in range(arguments.steps if turn else 2)]
            for row, spent in zip(batch, timed(side, batch, rates[name])):
                if turn:
                    flops = side.flops(row, mask_count(rates[name], arguments.row_tokens))
                    steps.append((name, spent, int(row.round_lengths.sum()) / spent, flops / spent))
    found = pandas.DataFrame(steps, columns=["objective", "seconds", "tokens/s", "FLOP/s"])
    found = found.groupby("objective", sort=False).median()
    found["mfu"] = found["FLOP/s"] / peak_flops(process.device)
    print(found.to_string(float_format="{:,.3f}".format))
    ratio = found.loc["rtd"] / found.loc["mlm"]
    print("rtd / mlm: {:.2f} of the time, {:.2f} of the FLOP/s".format(ratio["seconds"], ratio["FLOP/s"]))
    return {"seconds": found["seconds"].round(4).to_dict(), "mfu": found["mfu"].round(4).to_dict()}


# Kernels by name, the first that fits; the optimizer's are counted apart. On a CPU, bmm is attention by tiles, and what
# is left of a compiled graph without the products it calls is elementwise.
KINDS = {
    "attention": r"flex|flash|fmha|attention|bmm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|linear|\bmm\b|::mm|addmm",
    "elementwise": r"CompiledFxGraph|triton|fused|elementwise|vectorized|reduce|copy|aten::|index|cat",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel)), "other")


def profile_step(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Milliseconds of a step by kind of kernel, mean of three steps; what no kernel fills is idle."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda, rows, count = process.device.type == "cuda", iter(new_loader()), mask_count(MASK_RATE, arguments.row_tokens)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    side = Ours(config, arguments.preset, arguments.row_tokens, arguments.max_length, process)
    timed(side, [next(rows) for _ in range(2)])
    milliseconds, wall = {}, 0.0
    for row in [next(rows) for _ in range(3)]:
        for optimizing in (False, True):
            with profile(activities=[activity]) as found:
                start = time.perf_counter()
                if optimizing:
                    side.optimizer.step(lr_factor=1.0, momentum=0.95)
                else:
                    side.gradients(row, count)
                if cuda:
                    torch.cuda.synchronize()
                wall += 1000 * (time.perf_counter() - start) / 3
            for event in found.key_averages():
                if (event.device_type == DeviceType.CUDA) == cuda:
                    kind = "optimizer" if optimizing else kind_of(event.key)
                    spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                    milliseconds[kind] = milliseconds.get(kind, 0.0) + spent / 3000
    milliseconds["idle"] = max(0.0, wall - sum(milliseconds.values()))
    for kind, spent in sorted(milliseconds.items(), key=lambda item: -item[1]):
        print(f"{kind:16s} {spent:9.1f} ms  {100 * spent / wall:5.1f}%")
    return {"step_ms": round(wall, 2), "shares": {kind: round(spent / wall, 4) for kind, spent in milliseconds.items()}}


def ways_to_attend(document_ids: Tensor) -> dict[str, Callable]:
    """Name -> function of q, k, v [1, T, H, D] and a reach. The first is what the model does."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.bincount(document_ids).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    longest = int(cu_seqlens.diff().max())
    # One graph serves all rows only if they have as many documents: the rest is empty
    padded = F.pad(cu_seqlens, (0, max(0, len(document_ids) // 32 - len(ends))), value=len(document_ids))
    token = torch.arange(document_ids.size(0), device=document_ids.device)
    first = torch.searchsorted(document_ids, document_ids, side="left")  # [T] of each token's document
    last = torch.searchsorted(document_ids, document_ids, side="right") - 1

    def flex(q, k, v, reach):
        return attend(q, k, v, flex_mask(document_ids, reach), 0.12)

    def flex_with(size: int = 128, bounds: bool = False, **kernel_options) -> Callable:
        def call(q, k, v, reach):
            mask = flex_mask(document_ids, reach, size)
            if bounds:  # two numbers for each query, in place of document ids of both sides
                low = first if reach is None else torch.maximum(first, token - reach)
                high = last if reach is None else torch.minimum(last, token + reach)
                mask.mask_mod = lambda b, h, q, k: (low[q] <= k) & (k <= high[q])
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flex_attention(q, k, v, block_mask=mask, scale=0.12, kernel_options=kernel_options).transpose(1, 2)

        return call

    def varlen_with(cu_seqlens: Tensor) -> Callable:
        def call(q, k, v, reach):
            sides = (-1, -1) if reach is None else (reach, reach)
            limits = (cu_seqlens, cu_seqlens, longest, longest)
            return varlen_attn(q[0], k[0], v[0], *limits, scale=0.12, window_size=sides)[None]

        return call

    # flex_with's ways share one code, whose block size would become a symbol with its second value
    fixed, tuned = partial(torch.compile, dynamic=False), {"max_autotune": True}
    return {
        "flex": fixed(flex),
        "flex, tuned": fixed(flex, options=tuned),
        # The default backward kernel has tiles of 128 keys, which do not divide blocks of 64.
        "flex, tuned, blocks of 64": fixed(flex_with(64), options=tuned),
        "flex, mask by bounds": fixed(flex_with(bounds=True)),
        "flex, FLASH": fixed(flex_with(BACKEND="FLASH")),
        "varlen": varlen_with(cu_seqlens),
        "varlen, as many documents in each row": varlen_with(padded),
    }


def compare_attention(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Forward and backward of one layer's attention on a real row, mask included: FlexAttention in several ways, and
    varlen_attn."""
    if process.device.type != "cuda":
        raise InputError("--attention needs a GPU: FlexAttention has no backward on a CPU")
    row, heads = next(iter(new_loader())), config.num_attention_heads
    size = (1, row.input_ids.size(0), heads, config.hidden_size // heads)  # [1, T, H, D]
    style = {"device": process.device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(size, **style) for _ in range(3))
    result = {}
    for reach in (config.local_attention_window // 2, None):
        times = time_ways(ways_to_attend(row.document_ids), q, k, v, reach)
        for name, spent in times.items():
            print(f"reach {reach}: {name} {spent:.2f} ms ({spent / times['flex']:.2f} of flex's)")
        result["global" if reach is None else "local"] = {name: round(value, 3) for name, value in times.items()}
    return {"attention_ms": result}


def time_ways(ways: dict[str, Callable], q: Tensor, k: Tensor, v: Tensor, reach: int | None) -> dict[str, float]:
    """Median milliseconds of forward and backward, in turn; a way that cannot run here is left out, with its reason."""
    expected, seconds = ways["flex"](q, k, v, reach).detach(), {name: [] for name in ways}
    for turn in range(23):
        for name in list(seconds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                out = ways[name](q, k, v, reach)
                out.sum().backward()
                if turn < 3 and not (apart := float((out.detach() - expected).norm() / expected.norm())) <= 0.01:
                    raise InputError(f"differs from flex by {apart:.3f}")
            except Exception as error:  # a backend that is not installed, a GPU that it does not know
                print(f"reach {reach}: {name} is left out ({type(error).__name__}: {first_line(error)[:100]})")
                del seconds[name]
                continue
            torch.cuda.synchronize()
            if turn >= 3:  # compiled, and warm
                seconds[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in seconds.items()}


BY_LENGTH = "by length"  # KBERTModel.mean_states against the padded forward
RAGGED = torch.linspace(16, 128, 32).int().tolist()
CELLS = {  # texts of a batch by their tokens
    "1 x 16": [16],
    "1 x 128": [128],
    "1 x 512": [512],
    "32 x 16 to 128": RAGGED,
    f"32 x 16 to 128 {BY_LENGTH}": RAGGED,
    "32 x 128": [128] * 32,
    "8 x 512": [512] * 8,
    "2 x 2048": [2048] * 2,
}


def modernbert_config(config: KBERTConfig) -> PretrainedConfig:
    """The same shape, with sdpa."""
    from transformers import ModernBertConfig

    names = [*SHAPE.values(), "vocab_size", "pad_token_id", "cls_token_id", "sep_token_id"]
    shape = {name: getattr(config, name) for name in names}
    return ModernBertConfig(**shape, local_attention=config.local_attention_window, attn_implementation="sdpa")


def serving_models(
    config: KBERTConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, Callable]:
    """KBERT's padded forward and ModernBertModel of the same shape with sdpa, fresh from their initialisation."""
    from transformers import ModernBertModel

    torch.manual_seed(1)
    models = {"kbert": KBERTModel(config), "modernbert": ModernBertModel(modernbert_config(config))}
    models = {name: model.to(device, dtype).eval() for name, model in models.items()}
    return {name: torch.compile(model, dynamic=True) if compiled else model for name, model in models.items()}


def compare_serving(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Tokens a second, padding not counted, of both models in turn: median of 3 x rounds batches of each."""
    device, rows = process.device, []
    kinds = [(dtype, compiled) for dtype in (torch.float32, torch.bfloat16) for compiled in (False, True)]
    if why_eager(device) is not None:
        kinds = [kind for kind in kinds if not kind[1]]
    for dtype, compiled in kinds:
        sides = serving_models(config, device, dtype, compiled)
        for cell, lengths in CELLS.items():
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device)  # [B, S]
            inputs = {"input_ids": torch.randint(5, config.vocab_size, mask.shape, device=device)}
            inputs["attention_mask"] = mask
            texts = [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), lengths)]
            ways = {name: partial(model, **inputs) for name, model in sides.items()}
            if cell.endswith(BY_LENGTH):
                if compiled:  # mean_states calls the model as it is
                    continue
                ways["kbert"] = partial(sides["kbert"].mean_states, texts)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(2 + 3 * arguments.rounds):
                for name, serve in ways.items():
                    start = time.perf_counter()
                    with torch.inference_mode():
                        serve()[0].flatten()[0].item()  # waits for a GPU
                    if turn >= 2:  # compiled, and warm
                        seconds[name].append(time.perf_counter() - start)
            rates = {name: sum(lengths) / statistics.median(times) for name, times in seconds.items()}
            how = f"{str(dtype).removeprefix('torch.')} {'compiled' if compiled else 'eager'}"
            rows.append({"how": how, "batch": cell, **rates, "ratio": rates["kbert"] / rates["modernbert"]})
            print(
                "{how:18s} {batch:24s} {kbert:10,.0f} {modernbert:10,.0f}  {ratio:.2f}".format(**rows[-1]), flush=True
            )
    return {"serving": rows}


def examples_of(loader: Loader, number: int) -> Split:
    """The first documents of the data, with labels in turn: how fast a step is does not depend on them."""
    documents = []
    for row in loader:
        lengths = row.round_lengths.tolist()
        documents += row.input_ids.cpu()[: sum(lengths)].split(lengths)
        if len(documents) >= number:
            break
    tokens, ends = torch.cat(documents[:number]).numpy(), numpy.cumsum([len(text) for text in documents[:number]])
    return Split(tokens, None, ends, numpy.arange(len(ends)) % 2, numpy.ones(len(ends), bool), range(len(ends)))


class FinetunersWay:
    """finetuner.py's own step: examples side by side in rows of two compiled sizes, Muon and Adam."""

    def __init__(self, config: KBERTConfig, split: Split, batch_size: int, process: Process):
        kind = Classes(TASKS["custom"], None)
        train = finetuner.FinetuneConfig(batch_size=batch_size, epochs=100.0, optimizer="muon", lr=finetuner.MUON_LR)
        longest, pad = config.max_position_embeddings, SimpleNamespace(pad_token_id=config.pad_token_id)
        base = finetuner.Base("", True, {}, pad, longest)
        net = finetuner.Network(KBERTForSequenceClassification(config), base, kind, train, process.device)
        if why_eager(process.device) is None:
            net.compile(split.lengths, batch_size, longest)
        data = Data("documents", kind, "", {"train": split}, "train", [])
        self.training, self.number = finetuner.Training(net, data, train, process, None), 0

    def step(self) -> None:
        self.number += 1
        self.training.train_step(self.number)
        self.training.losses.pop().item()  # waits for a GPU


class TrainersWay:
    """transformers.Trainer's: batches padded to their longest example, bf16 autocast, gradients clipped, AdamW."""

    def __init__(self, model: nn.Module, split: Split, batch_size: int, device: torch.device):
        self.model, self.split, self.device = model.to(device).train(), split, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
        self.batches = torch.utils.data.DataLoader(range(split.examples), batch_size, shuffle=True, drop_last=True)
        self.order = itertools.chain.from_iterable(itertools.repeat(self.batches))

    def step(self) -> None:
        chosen = next(self.order).tolist()
        texts = [torch.from_numpy(self.split.of(self.split.tokens, i)).long() for i in chosen]
        mask = [torch.ones_like(text) for text in texts]
        inputs = {"attention_mask": pad_sequence(mask, True)}  # [B, S]
        inputs["input_ids"] = pad_sequence(texts, True, padding_value=self.model.config.pad_token_id)
        inputs["labels"] = torch.from_numpy(self.split.labels[chosen])
        inputs = {name: x.to(self.device) for name, x in inputs.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


def compare_finetuning(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Examples a second of each way in turn, medians over all timed steps."""
    from transformers import ModernBertForSequenceClassification

    batch_size, device = 32, process.device
    split = examples_of(new_loader(), 2000)
    torch.manual_seed(1)
    modernbert = ModernBertForSequenceClassification(modernbert_config(config))
    sides = {
        "finetuner.py": FinetunersWay(config, split, batch_size, process),
        "Trainer's way, kbert": TrainersWay(KBERTForSequenceClassification(config), split, batch_size, device),
        "Trainer's way, modernbert": TrainersWay(modernbert, split, batch_size, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + arguments.rounds):
        for name, side in sides.items():
            for _ in range(arguments.steps):
                start = time.perf_counter()
                side.step()
                if turn:  # warm
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: batch_size / statistics.median(times) for name, times in seconds.items()}
    ours, *others = rates.values()
    for name, rate in rates.items():
        print(f"{name:26s} {rate:8.1f} examples/s; finetuner.py is {ours / rate:.2f} times as fast")
    return {"finetuning_examples_per_s": rates, "finetuning_ratio": ours / max(others)}


def measure_loader(arguments, config: KBERTConfig, new_loader: Callable, process: Process) -> dict:
    """Tokens a second from warm shards, by one thread, the first epoch's opening of shards included."""
    torch.set_num_threads(1)
    loader = new_loader()
    for _ in zip(range(20), loader):
        pass
    tokens, padding, start = 0, 0, time.perf_counter()
    for row in loader:
        real = int(row.round_lengths.sum())
        tokens, padding = tokens + real, padding + row.input_ids.size(0) - real
        if (taken := time.perf_counter() - start) > 5:
            break
    share = padding / (tokens + padding)
    print(f"{tokens / taken / 1e6:.1f}M tokens/s, {100 * share:.3f}% padding, {tokens:,} tokens in {taken:.1f} s")
    return {"loader_tokens_per_s": round(tokens / taken), "padding": share}


def measure_packing(directory: Path, files: Sequence[str]) -> dict:
    """Packing files, start-up and all, against `tokenizers` alone on the same texts and batches; both on all cores."""
    from data.train_tokenizer import add_source_flags, bring_tokenizer, open_source, read_texts

    seconds, tokenizer = {}, str(directory / "tokenizer")
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    # Batches that keep every thread of `tokenizers` busy to their end
    source = parser.parse_args(["--files", *files, "--batch_characters", "8_000_000"])
    with tempfile.TemporaryDirectory() as out:
        script = ROOT / "data" / "pack_fineweb_edu.py"
        command = [sys.executable, script, "--files", *files, "--tokenizer", tokenizer, "--out", out]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds["packing"] = time.perf_counter() - start
        tokens = sum(entry["tokens"] for entry in read_manifest(Path(out))["shards"].values())
        backend, _ = bring_tokenizer(tokenizer, Path(out))
    stream, sizes, _ = open_source(source)
    batches = [texts for texts, _ in read_texts(stream, sizes, source)]
    start = time.perf_counter()
    for texts in batches:
        backend.encode_batch_fast(texts, add_special_tokens=False)
    seconds["tokenizers alone"] = time.perf_counter() - start
    for name, taken in seconds.items():
        print(f"{name:16s} {taken:7.1f} s  {tokens / taken / 1e6:.2f}M tokens/s")
    return {"packing_seconds": {name: round(taken, 2) for name, taken in seconds.items()}, "tokens": tokens}


MODES = {  # flag: what is done in place of compare_steps
    "profile": (profile_step, "our step by kind of kernel"),
    "objectives": (compare_objectives, "a step of masked LM and of replaced-token detection"),
    "attention": (compare_attention, "one layer's attention in several ways, on a GPU"),
    "inference": (compare_serving, "the padded forward against ModernBertModel's"),
    "finetune": (compare_finetuning, "the finetuner's step against transformers.Trainer's way"),
    "loader": (measure_loader, "the loader alone"),
}
SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=SAMPLE, help=f"folder of shards [{SAMPLE}]")
    add("--preset", default="micro", choices=list(PRESETS), help="shape of both models [micro]")
    for name, field in SHAPE.items():
        add(f"--{name}", type=int, help=f"{field}, instead of the preset's")
    add("--row-tokens", type=int, default=8192, help="tokens in a row and in an optimizer step [8192]")
    add("--reference-row-tokens", type=int, help="the same, of the reference [--row-tokens]")
    add("--max-length", type=int, default=256, help="tokens in the longest document [256]")
    add("--rounds", type=int, default=5, help="turns of each side [5]")
    add("--steps", type=int, default=3, help="timed steps in a turn [3]")
    for name, (_, what) in MODES.items():
        add(f"--{name}", action="store_true", help=f"measure {what}")
    add("--packing", nargs="+", metavar="GLOB", help="measure the packing of these files, with --data's tokenizer")
    add("--json", action="store_true", help="end with one JSON object on the last line")
    add("--out", type=Path, help="file to write the JSON object to")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    given = {field: getattr(arguments, name) for name, field in SHAPE.items()}
    shape = PRESETS[arguments.preset] | {field: value for field, value in given.items() if value is not None}
    row_tokens, longest = arguments.row_tokens, arguments.max_length
    torch.set_float32_matmul_precision("high")
    with join_processes() as process:
        directory = locate_data(arguments.data, process)
        manifest = read_manifest(directory)
        config = model_config(manifest["tokenizer"], longest, shape)

        def new_loader(tokens: int = row_tokens) -> Loader:
            return Loader(directory, manifest, "train", tokens, longest, seed=1, device=process.device)

        if arguments.packing:
            result = measure_packing(directory, arguments.packing)
        else:
            chosen = (measure for name, (measure, _) in MODES.items() if getattr(arguments, name))
            result = next(chosen, compare_steps)(arguments, config, new_loader, process)
        cpu = f"cpu, {torch.get_num_threads()} threads"
        result["device"] = torch.cuda.get_device_name() if process.device.type == "cuda" else cpu
    result["torch"] = torch.__version__
    result["shape"] = {**shape, "vocab_size": config.vocab_size, "row_tokens": row_tokens, "max_length": longest}
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: this does not fit into the GPU's memory: lower --row-tokens")
