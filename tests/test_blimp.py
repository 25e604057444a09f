"""Minimal pairs, judged without training: agreement with a plain scorer, what is read, what is said."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

import finetuner
import objectives
from conftest import SPECIALS, as_flags, run_python, tiny
from dataloading import InputError
from hub_stand_in import Hub
from model import KBERTForReplacedTokenDetection

WORDS = "the cat dog sat ran on under a mat tree and then slept".split()
IDS = {f"{name}_token_id": i for name, i in SPECIALS.items() if name != "unk"}
VOCABULARY = len(SPECIALS) + len(WORDS)
THEIRS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
THEIRS |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 2, "initializer_range": 0.5}
MODELS = {
    "kbert": lambda: tiny(vocab_size=VOCABULARY, **IDS),
    "bert": lambda: BertForMaskedLM(BertConfig(**THEIRS)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**THEIRS, bos_token_id=0, eos_token_id=1)),
}


def save(folder: Path, word_tokenizer: Path, name: str, make=None) -> str:
    torch.manual_seed(0)
    (make or MODELS[name])().save_pretrained(folder)
    AutoTokenizer.from_pretrained(word_tokenizer).save_pretrained(folder)
    return str(folder)


def make_pairs(number: int, seed: int, **more) -> list[dict]:
    """Sentences of 3 to 20 words; the worse one has two of them changed."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(number):
        good = rng.choice(WORDS, rng.integers(3, 20))
        bad = good.copy()
        bad[rng.choice(len(bad), 2, replace=False)] = rng.choice(WORDS, 2)
        rows.append({"sentence_good": " ".join(good), "sentence_bad": " ".join(bad), **more})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Two paradigms of one field in one file, one without a UID in another; sizes differ, so means do."""
    folder, same = tmp_path_factory.mktemp("pairs"), {"sentence_good": "the zebra sat", "sentence_bad": "the yak sat"}
    fields = ("syntax/semantics", "syntax_semantics")  # as BLiMP writes it
    syntax = make_pairs(12, 1, UID="island", field=fields[0]) + make_pairs(7, 2, UID="binding", field=fields[1])
    write_jsonl(folder / "syntax.jsonl", syntax)
    write_jsonl(folder / "turn_taking.jsonl", [*make_pairs(4, 3), same])
    return str(folder)


def judge(base: str, out: Path, dataset: object, **more) -> Path:
    where = {"task": "blimp", "train.base_model": base, "train.out": out, "train.run_name": "run"}
    finetuner.main(as_flags(where | {"data.dataset": dataset} | more))
    return out / "run"


def metrics_of(run: Path, start: str = "pretrained") -> dict[str, float]:
    results = json.loads((run / "metrics.json").read_text())["results"]
    return {name: value["median"] for name, value in results[start]["test"].items()}


def predictions_of(run: Path) -> list[dict]:
    with open(run / "predictions" / "test.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@torch.no_grad()
def plain_score(model, tokenizer, sentence: str) -> float:
    """Pseudo-log-likelihood, one masked position at a time."""
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    total = 0.0
    for at in range(1, ids.size(1) - 1):  # neither [CLS] nor [SEP]
        masked = ids.clone()
        masked[0, at] = tokenizer.mask_token_id
        logits = model(input_ids=masked, attention_mask=torch.ones_like(masked)).logits[0, at]
        total += logits.double().log_softmax(-1)[ids[0, at]].item()
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def as_on_a_gpu(monkeypatch) -> None:
    """Rows of few sizes through FlexAttention, by the compiler's front end alone."""
    for module in (finetuner, objectives):
        monkeypatch.setattr(module, "compiled_backend", lambda device: "flex")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*MODELS, "kbert as on a GPU"])
def test_scores_are_those_of_a_plain_scorer(word_tokenizer, pairs, tmp_path, monkeypatch, name):
    base = save(tmp_path / "base", word_tokenizer, name.split()[0])
    if name.endswith("GPU"):
        as_on_a_gpu(monkeypatch)
    run = judge(base, tmp_path, pairs, **{"train.row_tokens": 512})
    model = AutoModelForMaskedLM.from_pretrained(base, trust_remote_code=True).eval()
    tokenizer, found, right = AutoTokenizer.from_pretrained(base), predictions_of(run), {}
    assert len(found) == 24 and len({row["score_good"] for row in found}) > 20
    for row in found:
        good, bad = (plain_score(model, tokenizer, row[which]) for which in ("good", "bad"))
        clear = name == "kbert" and abs(good - bad) > 0.5  # which a CPU scores in bf16
        rounded = pytest.approx((good, bad), abs=2e-3, rel=0.02 if clear else None)
        assert (float(row["score_good"]), float(row["score_bad"])) == rounded
        assert float(row["correct"]) == (0.5 if abs(good - bad) < 1e-5 else good > bad)
        right.setdefault(row["UID"], []).append(float(row["correct"]))
    means = {uid: np.mean(values) for uid, values in right.items()}
    expected = {f"paradigm {uid}": value for uid, value in means.items()}
    expected |= {"accuracy": np.mean(list(means.values())), "equal": 1 / 24}
    expected["field syntax_semantics"] = (means["island"] + means["binding"]) / 2
    assert metrics_of(run) == pytest.approx(expected)
    assert set(means) == {"island", "binding", "turn_taking"}


def test_a_detector_judges_by_its_own_scores(word_tokenizer, pairs, tmp_path):
    """How likely it finds each token to be the text's own, summed up in a plain loop."""
    make = functools.partial(tiny, KBERTForReplacedTokenDetection, vocab_size=VOCABULARY, **IDS)
    base = save(tmp_path / "base", word_tokenizer, "detector", make)
    run = judge(base, tmp_path, pairs)
    report = json.loads((run / "metrics.json").read_text())
    assert "scored by a detector" in report["kind"] and "no pseudo-log-likelihood" in " ".join(report["notes"])
    found = predictions_of(run)
    model, tokenizer = make(), AutoTokenizer.from_pretrained(base)
    assert len(found) == 24 and len({row["score_good"] for row in found}) > 20
    for row in found:
        scores, own = [float(row["score_good"]), float(row["score_bad"])], []
        for which in ("good", "bad"):
            ids = tokenizer(row[which], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                own.append((1 - model(ids).logits[0, 1:-1].double().sigmoid()).log().sum().item())
        clear = abs(scores[0] - scores[1]) > 0.5  # which a CPU scores in bf16
        assert scores == pytest.approx(own, abs=2e-3, rel=0.05 if clear else None)


def test_a_model_blind_to_context_is_at_chance(word_tokenizer, tmp_path):
    """Of the same words in another order it finds none likelier, whatever rounding says of the sums."""
    base = save(tmp_path / "base", word_tokenizer, "kbert")
    rows = make_pairs(41, 4)  # an odd number, of which no half is right
    for row in rows:
        row["sentence_bad"] = " ".join(row["sentence_good"].split()[::-1])
    run = judge(base, tmp_path, write_jsonl(tmp_path / "mirrored.jsonl", rows), **{"train.compare_random": "true"})
    ours = metrics_of(run)
    assert ours["equal"] < 0.5 and ours["accuracy"] != 0.5
    blind = {"accuracy": 0.5, "equal": 1.0, "paradigm mirrored": 0.5}
    assert metrics_of(run, "random weights") == blind and metrics_of(run, "chance") == {"accuracy": 0.5}


# ---------------------------------------------------------------------------------------------------------------------
# What is read and what is left


def test_any_file_of_pairs_is_read(word_tokenizer, tmp_path):
    base, rows = save(tmp_path / "base", word_tokenizer, "kbert"), make_pairs(9, 5)
    names = ("json", "csv", "parquet", "renamed")
    files = {name: tmp_path / f"hypernym.{name.replace('renamed', 'tsv')}" for name in names}
    write_jsonl(files["json"], rows)
    table = Dataset.from_list(rows)
    table.to_csv(files["csv"])
    table.to_parquet(files["parquet"])
    renamed = table.rename_columns({"sentence_good": "yes", "sentence_bad": "no"})
    renamed.to_csv(files["renamed"], sep="\t")
    found = []
    for name, file in files.items():
        columns = {"data.text": "yes", "data.text_pair": "no"} if name == "renamed" else {}
        found.append(predictions_of(judge(base, tmp_path / name, file, **columns)))
    assert all(other == found[0] for other in found) and [row["pair"] for row in found[0]] == list("012345678")
    assert {row["UID"] for row in found[0]} == {"hypernym"}


def test_a_run_leaves_results_card_and_no_model(word_tokenizer, pairs, tmp_path):
    base = save(tmp_path / "base", word_tokenizer, "kbert")
    run = judge(base, tmp_path, pairs, protocol="modernbert", **{"train.seeds": 3})  # of which no setting matters
    report, card = json.loads((run / "metrics.json").read_text()), (run / "README.md").read_text()
    assert len(report["runs"]) == 1 and report["model"]["settings"] == {}
    assert report["splits"]["test"]["examples"] == 24 and report["kind"] == "minimal pairs"
    assert not (run / "model").exists() and not (run / "curves.png").exists()
    assert "| pretrained | test | paradigm binding |" in card and "finetuned" not in card
    log = (run / "log.txt").read_text()
    accuracy = metrics_of(run)["accuracy"]
    assert f"test accuracy {accuracy:.4f} 0.5000" in " ".join(log.split("=== results blimp")[1].split())


def test_the_hub_set_is_read_with_all_its_configurations(word_tokenizer, tmp_path):
    base, files, configs = save(tmp_path / "base", word_tokenizer, "kbert"), {}, []
    for seed, name in enumerate(("causative", "drop_argument")):
        Dataset.from_list(make_pairs(5, seed, UID=name, field="syntax")).to_parquet(tmp_path / "rows.parquet")
        path = f"{name}/train-00000-of-00001.parquet"
        files[path] = (tmp_path / "rows.parquet").read_bytes()
        configs.append({"config_name": name, "data_files": [{"split": "train", "path": path}]})
    files["README.md"] = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    settings = {"task": "blimp", "train.base_model": base, "train.out": tmp_path, "train.run_name": "run"}
    with Hub() as hub:
        hub.add("dataset", "nyu-mll/blimp", files)
        ended = run_python("finetuner.py", *as_flags(settings), env=hub.environment(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert {"paradigm causative", "paradigm drop_argument", "field syntax"} < set(metrics_of(tmp_path / "run"))


def test_bad_input_is_said_in_one_sentence(word_tokenizer, pairs, tmp_path):
    base = save(tmp_path / "base", word_tokenizer, "kbert")

    def said(start: str, dataset: object, **more) -> str:
        with pytest.raises(InputError) as caught:
            judge(start, tmp_path / "out", dataset, **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    blank = write_jsonl(tmp_path / "blank.jsonl", [*make_pairs(2, 1), {"sentence_good": "", "sentence_bad": "a cat"}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "a cat", "label": 1}])
    assert "pair 2 of blank has a sentence without words" in said(base, blank)
    assert "has no column sentence_good, sentence_bad" in said(base, other)
    assert "trains nothing to push" in said(base, pairs, **{"train.hf_model_name": "me/judged"})
    assert not (tmp_path / "out").exists()
    classifier = lambda: BertForSequenceClassification(BertConfig(**THEIRS))  # noqa: E731
    headless = save(tmp_path / "headless", word_tokenizer, "", classifier)
    assert "has no cls.predictions" in said(headless, pairs)
    file = Path(base) / "tokenizer.json"
    maskless = PreTrainedTokenizerFast(tokenizer_file=str(file), cls_token="[CLS]", pad_token="[PAD]")
    maskless.save_pretrained(base)
    assert "has no mask token" in said(base, pairs)
