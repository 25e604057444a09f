"""What several test files share: small shards, a word tokenizer, small models, and torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: threads that spin make a shared machine 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Where nothing answers: tests that need the Hub have a stand-in
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
# Where there is a GPU, tests/test_gpu.py alone is for it: the others compare bits, which a CPU repeats.
if "PYTEST_XDIST_WORKER" not in os.environ and not any("test_gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

import trainer
from dataloading import read_manifest, sha256_of, write_json, write_shard
from model import KBERTConfig, KBERTForMaskedLM
from records.log import LOG_LINE

ROOT = Path(__file__).resolve().parents[1]
SPECIALS = {"cls": 0, "sep": 1, "pad": 2, "mask": 3, "unk": 4}
TOKEN = "hf_planted"  # of the Hub: no file and no message may hold it


@pytest.fixture(scope="session", autouse=True)
def planted_token():
    os.environ["HF_TOKEN"] = TOKEN


def write_documents(
    directory: Path, shards: dict[str, list[list[list[int]]]], vocab_size: int = 64, tokenizer: str = "none"
) -> Path:
    """Shards of documents (lists of token ids) by split, with their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, contents in shards.items():
        for number, documents in enumerate(contents):
            path = directory / f"test_{split}_{number:06d}.bin"
            ids = [token for document in documents for token in (SPECIALS["cls"], *document, SPECIALS["sep"])]
            write_shard(path, np.array(ids, dtype=np.uint16))
            entries[path.name] = {
                "split": split,
                "tokens": len(ids),
                "documents": len(documents),
                "sha256": sha256_of(path),
            }
    write_json(
        directory / "manifest.json",
        {
            "format": 1,
            "tokenizer": {"name": "test", "sha256": tokenizer, "vocab_size": vocab_size, **SPECIALS},
            "source": {"name": "test"},
            "split_rule": "given",
            "shards": entries,
        },
    )
    return directory


def sentences(seed: int, count: int, vocab_size: int = 64, shortest: int = 3, longest: int = 90) -> list[list[int]]:
    """Documents a model can learn: each token follows from the one before it, but for one in eight."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        document = [int(rng.integers(5, vocab_size))]
        for _ in range(int(rng.integers(shortest, longest)) - 1):
            document.append(
                int(rng.integers(5, vocab_size))
                if rng.random() < 1 / 8
                else 5 + (document[-1] * 7 + 3) % (vocab_size - 5)
            )
        documents.append(document)
    return documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_documents(
        tmp_path_factory.mktemp("corpus"),
        {"train": [sentences(1, 300), sentences(2, 200)], "valid": [sentences(3, 60)], "test": [sentences(4, 40)]},
    )


@pytest.fixture(scope="session")
def counted(tmp_path_factory) -> Path:
    """Shards whose documents have half as many words as tokens."""
    shards = {"train": [sentences(1, 300)], "valid": [sentences(3, 60)]}
    directory = write_documents(tmp_path_factory.mktemp("counted"), shards)
    manifest = read_manifest(directory)
    for entry in manifest["shards"].values():
        entry["words"] = (entry["tokens"] - 2 * entry["documents"]) // 2
    write_json(directory / "manifest.json", manifest)
    return directory


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory) -> Path:
    """A folder that AutoTokenizer loads: one id a word, specials as in SPECIALS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "[MASK]",
        "[UNK]",
        *"the cat dog sat ran on under a mat tree and then slept".split(),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_max_length=256,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


VOCAB = 200  # of `tiny` and `row_of`
LENGTHS = [1, 30, 128, 7, 200, 3, 64, 90]  # of documents, for `row_of`


def tiny(cls=KBERTForMaskedLM, **changed):
    """A small model whose zero-initialised matrices are not zero, or nothing would depend on attention."""
    shape = dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    others = dict(vocab_size=VOCAB, local_attention_window=16, pad_token_id=2)
    torch.manual_seed(0)
    model = cls(KBERTConfig(**{**shape, **others, **changed}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 / model.config.weight_multiplier if p.ndim == 2 else 0.2)
    return model.eval()


def row_of(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, document_ids, positions of documents side by side, filled up to a multiple of 128."""
    lengths = lengths + [-sum(lengths) % 128] if sum(lengths) % 128 else lengths
    ids = torch.randint(5, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids, documents, torch.cat([torch.arange(n) for n in lengths])


def reference_attention(q, k, v, documents, window, scale):
    """Plain attention over all T x T pairs in fp64. q, k, v: [1, T, H, D]."""
    q, k, v = (x.double()[0].transpose(0, 1) for x in (q, k, v))
    token = torch.arange(len(documents))
    visible = documents[:, None] == documents
    if window is not None:
        visible &= (token[:, None] - token).abs() <= window
    return ((q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1)[None]


def run_python(
    *arguments: str, processes: int = 1, env: dict | None = None, timeout: int = 300
) -> subprocess.CompletedProcess:
    """Runs a script or module of the repository in processes of its own, under torchrun when there are several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        timeout=timeout,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )


def telling(folder: Path) -> list[Path]:
    """Files that hold the token."""
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# --- runs of trainer.py on a model that takes seconds

TINY = {
    "preset": "micro",
    "data.max_length": 100,
    "data.valid_tokens": 1500,
    "train.row_tokens": 256,
    "train.batch_tokens": 1536,
    "train.steps": 20,
    "train.valid_every": 10,
    "train.save_every": 10,
    "train.keep_checkpoints": 9,
    "train.compile": "false",
    "train.muon_lr": 0.03,
    "train.embed_lr": 0.02,
    "train.lr_warmup": 0.2,
    "train.lr_decay": 0.5,
}
TINY_SHAPE = {
    "model.num_hidden_layers": 2,
    "model.hidden_size": 64,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.local_attention_window": 16,
}


def as_flags(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def flags(corpus: Path, out: Path, name: str, *more: object) -> list[str]:
    """Of a run of TINY. more: further flags, several in one text or each by itself."""
    where = {"data.dir": corpus, "train.out": out, "train.run_name": name}
    return [*as_flags(TINY | TINY_SHAPE | where), *" ".join(map(str, more)).split()]


def lines(run: Path) -> list[dict]:
    text = (run / "log.txt").read_text()
    return [match.groupdict() for line in text.splitlines() if (match := LOG_LINE.match(line))]


def losses(run: Path, kind: str) -> dict[int, float]:
    return {int(line["step"]): float(line[kind]) for line in lines(run) if line[kind]}


def metrics_of(run: Path, kind: str = "train_loss") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [metrics for metrics in found if kind in metrics]


def in_section(section: str, name: str, value) -> Callable[[str], str]:
    """Sets a value, however deep, in a section of JSON."""

    def edit(text: str) -> str:
        start = text.index(f"=== {section}\n") + len(f"=== {section}\n")
        end = text.index("\n", start)
        said, *keys = json.loads(text[start:end]), *name.split(".")
        inner = said
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return text[:start] + json.dumps(said) + text[end:]

    return edit


def story(run: Path) -> tuple[str, list[dict], dict]:
    """Log, metrics and result, without what differs between two runs of the same settings: time and place."""
    text, result = (run / "log.txt").read_text().split("=== run\n")[1].split("=== result\n")
    text = re.sub(r"=== resumed\n.*\n", "", re.sub(r"/\S+/run\b", "RUN", text))
    text = re.sub(r" train_time:\S+ step_avg:\S+| mfu:\S+|, compiled in .*", "", text)
    metrics, result = (run / "metrics.jsonl").read_text().splitlines(), json.loads(result)
    timed = ("seconds", "mfu", "data_wait_seconds", "run", "sha256")
    without_times = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in metrics]
    return text, without_times, {k: v for k, v in result.items() if k not in timed}


# Training losses of a run of TINY on `corpus`. CPUs with and without AMX differ by 0.010.
GOLDEN = [4.2140, 4.2071, 4.1819, 4.1718, 4.1721, 4.3042, 4.1845, 4.1603, 4.1935, 4.1169]
GOLDEN += [4.1151, 4.0487, 3.9716, 3.8683, 3.7448, 3.5996, 3.4022, 3.3174, 3.1254, 2.9835]


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory) -> Path:
    """A run of 20 steps with a checkpoint at 10."""
    out = tmp_path_factory.mktemp("runs")
    trainer.main(flags(corpus, out, "finished"))
    return out / "finished"
