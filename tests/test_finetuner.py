"""The finetuner on tiny models: batches, metrics, SQuAD, data, folders, protocols, bad input."""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import finetuner
import objectives
import trainer
from conftest import ROOT, TOKEN, as_flags, run_python, telling
from data.examples import Split, cut_longest_first, encode_texts, number_classes, read_files, read_labels
from data.squad import N_BEST, Windows, answer_scores, best_answers, candidates, encode_questions, null_threshold
from data.tasks import GLUE, HELD_OUT, TASKS, Classes, Kind, Span, read_data, score
from dataloading import LABEL_END, NO_LABEL, InputError, sha256_of, write_json, write_shard
from finetuner import PROTOCOLS, DataConfig, FinetuneConfig, Network, choose_rates, grid_of
from hub_stand_in import Hub
from model import KBERTConfig, KBERTForMaskedLM
from records.log import read_log
from trainer import HubPusher, Process

WORDS = """good bad the a film was story and plot with people who saw it then they went home by train or bus in rain sun
snow wind""".split()
SPECIALS = {"cls": 0, "sep": 1, "pad": 2, "mask": 3, "unk": 4}
NAMES = {name: f"[{name.upper()}]" for name in SPECIALS}
SHAPE = {"vocab_size": len(SPECIALS) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 2}
ALONE = Process(0, 1, torch.device("cpu"))


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*NAMES.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    names = {f"{name}_token": text for name, text in NAMES.items()}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A pretraining run's model/, with weights that let blocks do something."""
    folder = tmp_path_factory.mktemp("logs") / "pretrained" / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {f"{name}_token_id": i for name, i in SPECIALS.items() if name != "unk"}
    model = KBERTForMaskedLM(KBERTConfig(**SHAPE | shape | ids, local_attention_window=16))
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.1 / model.config.weight_multiplier if parameter.ndim == 2 else 0.1
            parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(WORDS).save_pretrained(folder)
    trainer.write_settings(folder.parent, {"preset": "micro"})
    return str(folder)


@pytest.fixture
def tokenizer(base) -> PreTrainedTokenizerFast:
    return finetuner.open_base(base, None).tokenizer


def make_rows(number: int, seed: int) -> list[dict]:
    """Films; those with the word "good" are class 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        words = rng.choice(WORDS[2:], rng.integers(3, 20)).tolist()
        words.insert(rng.integers(0, len(words)), WORDS[1 - i % 2])
        rows.append({"text": " ".join(words), "text_pair": "the film was", "label": i % 2, "idx": 1000 + i})
    return rows


def pairs_of(first: str, second: str, number: int, classes: int, seed: int) -> list[dict]:
    """classes 0: rows without labels."""
    rows = make_rows(number, seed)
    labels = [i % classes if classes else -1 for i in range(number)]
    texts = [{first: row["text"], second: row["text_pair"]} for row in rows]
    return [{**text, "label": label, "idx": i} for i, (text, label) in enumerate(zip(texts, labels))]


def unlabelled(rows: list[dict]) -> list[dict]:
    return [{**row, "label": -1} for row in rows]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> str:
    folder, test = tmp_path_factory.mktemp("films"), unlabelled(make_rows(10, 3))
    return write_jsonl(folder, train=make_rows(256, 1), validation=make_rows(40, 2), test=test)


QUICK = {"train.epochs": 1, "train.batch_size": 16, "train.lr": 1e-3, "train.log_every": 4}


def flags(base: str, out: Path, task: str = "custom", **more) -> list[str]:
    """more: data_dataset=... is --data.dataset ..."""
    where = {"task": task, "train.base_model": base, "train.out": out, "train.run_name": "run"}
    return as_flags(where | QUICK | {name.replace("_", ".", 1): value for name, value in more.items()})


def go(base: str, out: Path, task: str = "custom", **more) -> Path:
    finetuner.main(flags(base, out, task, **more))
    return out / "run"


def report_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(base, films, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    return go(base, out, data_dataset=films, train_epochs=4, train_compare_random="true")


def kind_of(cls: type[Kind], task: str = "custom", classes: tuple[str, ...] = ("a", "b"), **settings) -> Kind:
    kind = cls(TASKS[task], DataConfig(**settings))
    kind.classes = list(classes)
    return kind


def make_network(base: str, row_tokens: int = 4096, kind: Kind | None = None, pooling: str = "mean") -> Network:
    opened, kind = finetuner.open_base(base, None), kind or kind_of(Classes)
    opened.config["classifier_dropout"] = 0.1
    model = finetuner.build_model(opened, kind, seed=1, pooling=pooling)
    return Network(model, opened, kind, FinetuneConfig(row_tokens=row_tokens), torch.device("cpu"))


def make_split(tokenizer: PreTrainedTokenizerFast, number: int = 12) -> Split:
    rows = make_rows(number, 5)
    labels = np.array([row["label"] for row in rows])
    return encode_texts(Dataset.from_list(rows), ["text", "text_pair"], labels, tokenizer, 64)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("cls, pooling", [(Classes, "mean"), (Classes, "cls"), (Span, "mean")])
def test_an_example_does_not_see_what_it_is_packed_with(base, tokenizer, cls, pooling):
    classes = () if cls is Span else ("a", "b")
    net, split = make_network(base, kind=kind_of(cls, classes=classes), pooling=pooling), make_split(tokenizer)
    net.train(False)
    with torch.no_grad():
        (row,) = net.rows(split.lengths, np.arange(12))
        together = net.outputs(split, row, np.arange(12), 12)
        for at, i in enumerate(row):
            alone = net.outputs(split, np.array([i]), np.arange(1), 1)[0]
            ids = torch.from_numpy(split.of(split.tokens, i)).long()[None]
            out = net.model(ids)
            theirs = out.logits[0] if cls is Classes else torch.cat([out.start_logits, out.end_logits])
            torch.testing.assert_close(together[at][..., : alone.size(-1)], alone, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(alone, theirs, atol=2e-5, rtol=1e-4)


def compile_in_front_alone(monkeypatch, backend: str) -> None:
    """Through the compiler's front end alone: at dynamo's own limit a ninth graph would run eagerly."""
    for module in (finetuner, objectives):
        monkeypatch.setattr(module, "compiled_backend", lambda device: backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["flex", "blockwise"])
def test_two_sizes_of_row_are_compiled_before_the_first_step(base, tokenizer, monkeypatch, backend):
    """For training, and where FlexAttention needs it for prediction; real rows then bring no graph of their own."""
    compile_in_front_alone(monkeypatch, backend)
    plain, split = make_network(base, row_tokens=512), make_split(tokenizer, 40)
    for _ in ("one task", "another one in the same process"):
        net = make_network(base, row_tokens=512)
        net.compile(split.lengths, 20, 40)
        net.model.requires_grad_(backend == "blockwise")  # FlexAttention has no backward on a CPU
        assert len(net.compiled_sizes) == 2 and max(net.compiled_sizes) <= 512
        net.warm_up(training=True)
        graphs = unique_graphs()
        assert graphs == (2 if backend == "blockwise" else 4)
        for training in (True, False):
            net.train(training)
            with torch.set_grad_enabled(training):
                for count in (1, 2, 4, 9, 15, 20, 3, 1):
                    net.outputs(split, np.arange(count), np.arange(count), 20)
        assert unique_graphs() == graphs and net.sizes == ([] if backend == "blockwise" else net.compiled_sizes)
    for network in (net, plain):
        network.model.train(True)
        network.model.dropout.p = 0.0
        network.model.encoder.compute_dtype = None
    row = np.arange(12)
    torch.testing.assert_close(
        *(network.outputs(split, row, row, 12) for network in (net, plain)), atol=2e-5, rtol=1e-4
    )


def test_a_batch_longer_than_any_that_was_tried_is_divided(base, tokenizer, monkeypatch):
    compile_in_front_alone(monkeypatch, "blockwise")
    net, split = make_network(base, row_tokens=4096), make_split(tokenizer, 40)
    net.compile(np.full(40, 8), 10, int(split.lengths.max()))
    net.train(True)
    rows = net.rows(split.lengths, np.arange(40))
    assert net.compiled_sizes == [128] and len(rows) > 1 and sorted(np.concatenate(rows)) == list(range(40))
    for row in rows:
        assert net.outputs(split, row, np.arange(len(row)), len(row)).shape == (len(row), 2)


def test_a_cpu_compiles_where_there_is_much_to_train(base, films, tmp_path, monkeypatch):
    compile_in_front_alone(monkeypatch, "blockwise")
    quick = {"data_dataset": films, "data_max_train_examples": 64}
    eager = go(base, tmp_path / "eager", **quick)
    assert unique_graphs() == 0
    monkeypatch.setattr(finetuner, "COMPILE_FROM", 1)
    compiled = go(base, tmp_path / "compiled", **quick)
    assert unique_graphs() > 0
    found = [
        [line["train_loss"] for line in read_jsonl(run / "metrics.jsonl") if "train_loss" in line]
        for run in (eager, compiled)
    ]
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def gradients(net: Network, split: Split, seed: int) -> torch.Tensor:
    net.train(True)
    net.model.encoder.compute_dtype = None
    net.model.zero_grad()
    for row in net.rows(split.lengths, np.arange(12)):
        torch.manual_seed(seed)
        net.loss(split, row, row, 12).backward()
    return torch.cat([p.grad.flatten() for p in net.model.parameters()])


def test_gradients_and_dropout_do_not_depend_on_packing(base, tokenizer):
    small, large, split = make_network(base, row_tokens=64), make_network(base), make_split(tokenizer)
    assert len(small.rows(split.lengths, np.arange(12))) > 1
    torch.testing.assert_close(gradients(small, split, 3), gradients(large, split, 3), atol=1e-5, rtol=1e-3)
    assert not torch.allclose(gradients(large, split, 3), gradients(large, split, 4))  # dropout is there


def test_two_processes_train_as_one(base, films, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, finetuner\n"
        # In fp32: rounding in bf16 would hide small differences
        "finetuner.Network.train = lambda self, mode: self.model.train(mode) and None\n"
        # Rank 0 alone hashes what it reports
        "if os.environ.get('RANK') == '1': finetuner.Split.fingerprint = None\n"
        "finetuner.main(sys.argv[1:])\n"
    )
    few = {"data_max_train_examples": 49, "train_log_every": 1, "train_lr": 0.01}  # the last batch is one example
    runs = [tmp_path / f"ranks{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(runs, 1):
        more = few | {"data_dataset": films, "data_text_pair": "text_pair", "train_run_name": run.name}
        ended = run_python(script, *flags(base, tmp_path, **more), processes=ranks)
        assert ended.returncode == 0, ended.stderr
    lines = [read_jsonl(run / "metrics.jsonl") for run in runs]
    losses = [[line["train_loss"] for line in said if "train_loss" in line] for said in lines]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert lines[0][-1]["dev_score"] == lines[1][-1]["dev_score"]
    first, second = ((run / "predictions/test.tsv").read_text() for run in runs)
    assert first == second


def test_rows_hold_every_example_once(base, tokenizer):
    net, split = make_network(base, row_tokens=64), make_split(tokenizer)
    rows = net.rows(split.lengths, np.random.default_rng(0).permutation(12))
    assert sorted(np.concatenate(rows).tolist()) == list(range(12))
    assert all(split.lengths[row].sum() <= net.row_tokens for row in rows)
    assert [row.tolist() for row in rows] == [row.tolist() for row in net.rows(split.lengths, np.arange(12))]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_on_cases_done_by_hand():
    labels, predictions = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    found = score(("accuracy", "f1", "macro_f1", "matthews_correlation"), labels, predictions)
    # True positives 2, false positives 1, false negatives 1, true negatives 2
    matthews = (2 * 2 - 1 * 1) / 9
    assert found == pytest.approx(dict(accuracy=4 / 6, f1=2 / 3, macro_f1=2 / 3, matthews_correlation=matthews))
    found = score(("pearson", "spearman"), np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 10.0]))
    assert found == pytest.approx({"pearson": 14 / math.sqrt(5 * 50), "spearman": 1.0})


def test_metrics_have_a_value_when_a_class_is_never_predicted():
    zeros = np.zeros(4, dtype=int)
    found = score(("accuracy", "f1", "macro_f1", "matthews_correlation"), np.array([0, 1, 0, 1]), zeros)
    assert found == pytest.approx({"accuracy": 0.5, "f1": 0.0, "macro_f1": 1 / 3, "matthews_correlation": 0.0})
    assert score(("f1",), zeros, zeros) == {"f1": 0.0}
    assert score(("pearson", "spearman"), np.arange(4.0), np.ones(4)) == {"pearson": 0.0, "spearman": 0.0}


def test_figures_of_the_results_stand_apart():
    several, one = {"median": -0.0461, "min": -0.0481, "max": -0.0441, "n": 2}, {"median": 0.5, "n": 1}
    results = {"pretrained": {"validation": {"pearson": several, "spearman": several}}, "majority class": {}}
    head, ours, theirs = finetuner.results_table(results).splitlines()
    assert ours.count("  -0.0461 (-0.0481 to -0.0441)") == 2 and "validation pearson  " in head
    assert theirs.split() == ["majority", "class", "-", "-"]
    head, ours = finetuner.results_table({"pretrained": {"test": {"f1": one, "accuracy": one}}}).splitlines()
    assert "test f1   test accuracy" in head and ours.split() == ["pretrained", "0.5000", "0.5000"]


def test_a_grid_lists_what_differs_the_best_first():
    runs = [{"lr": lr, "weight_decay": 1e-6, "epochs": 1.0, "batch_size": 64} for lr in (1e-5, 3e-5, 8e-5)]
    same = {"optimizer": "muon", "lr_schedule": "cosine", "trainable": "all", "seed": 1}
    runs = [{"settings": {**run, **same}, "best_step": 4} for run in runs]
    table = finetuner.grid_table([{**run, "score": score} for run, score in zip(runs, (0.25, 0.75, 0.5))])
    assert [line.split() for line in table.splitlines()] == [
        ["lr", "dev_score", "best_step"],
        ["3e-05", "0.75", "4"],
        ["8e-05", "0.5", "4"],
        ["1e-05", "0.25", "4"],
    ]


def test_glue_averages():
    medians = {
        "mnli": {"validation_matched": {"accuracy": 0.8}, "validation_mismatched": {"accuracy": 0.9}},
        "mrpc": {HELD_OUT: {"accuracy": 0.5, "f1": 0.5}, "test_labelled": {"accuracy": 0.7, "f1": 0.8}},
        "stsb": {"validation": {"pearson": 0.1, "spearman": 0.6}},
    }
    scores = finetuner.glue_scores({task: finetuner.spread_metrics([splits]) for task, splits in medians.items()})
    assert scores["MNLI-mm"] == pytest.approx(90) and scores["STS-B"] == pytest.approx(60) and scores["RTE"] is None
    assert scores["avg, MNLI as one, acc"] == pytest.approx((85 + 70 + 60) / 3)
    assert scores["avg, MNLI as one, F1"] == pytest.approx((85 + 80 + 60) / 3)
    assert scores["avg, MNLI as two, acc"] == pytest.approx((80 + 90 + 70 + 60) / 4)
    assert scores["avg, MNLI as two, F1"] == pytest.approx((80 + 90 + 80 + 60) / 4)
    head, rule, row = finetuner.glue_row("ours", scores).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") and row.startswith("| ours | 80.0 | 90.0 | - |")


# ---------------------------------------------------------------------------------------------------------------------
# SQuAD


@pytest.mark.parametrize(
    "text, answers, f1, exact",
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1.0, 1.0),  # articles, punctuation and case do not count
        ("in the year 1990", ["1990", "year 1990"], 0.8, 0.0),  # the better reference: 2 common of 3 and 2
        ("dog dog", ["dog"], 2 / 3, 0.0),  # a word counts as often as both have it
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
    ],
)
def test_answers_are_scored_as_the_official_script_does(text, answers, f1, exact):
    assert answer_scores(text, answers) == pytest.approx((f1, exact))


def test_null_threshold_is_the_best_on_dev():
    difference, answered = np.array([-3.0, -1.0, 0.5, 2.0]), np.array([1.0, 0.5, 0.9, 0.0])
    empty = np.array([0.0, 0.0, 0.0, 1.0])
    threshold = null_threshold(difference, answered, empty)
    assert 0.5 <= threshold < 2.0

    def total(t):
        return np.where(difference > t, empty, answered).sum()

    assert total(threshold) == max(total(t) for t in (-4, -3, -1, 0.5, 2.0))
    assert null_threshold(difference, 0 * answered, 1 + 0 * empty) < -3  # never answers


def windows_of(question: list[int], contexts: list[str]) -> Windows:
    """Windows without tokens: for what follows from their candidates."""
    none = dict.fromkeys(("tokens", "segments", "ends", "labels", "known", "idx", "offsets", "names", "answers"))
    return Windows(**none, question=np.array(question), contexts=contexts)


def test_candidates_obey_order_length_and_context():
    offsets = np.array([[-1, -1], [-1, -1], [0, 3], [4, 7], [8, 11], [-1, -1]])
    logits = np.full((2, 6), -9.0)
    logits[0, [1, 2, 4]] = 9.0, 3.0, 5.0  # the question's token must not win
    logits[1, [2, 3, 4]] = 6.0, 4.0, 1.0
    logits[:, 0] = 1.5
    null, found = candidates(logits, offsets, max_answer=2)
    assert null == pytest.approx(3.0)
    assert found[0] == (pytest.approx(9.0), 0, 3) and found[1] == (pytest.approx(7.0), 0, 7)
    assert all(0 <= first < end and end - first <= 7 for _, first, end in found)
    ranked, difference = best_answers([(null, found)], windows_of([0], ["who saw it"]))
    assert [answer["text"] for answer in ranked[0][:2]] == ["who", "who saw"] and difference[0] == pytest.approx(-6.0)


def test_windows_share_one_list_of_answers():
    kept = [(3.0, [(5.0, 0, 3)]), (1.0, [(7.0, 4, 7), (6.0, 0, 3)]), (2.0, [])]
    ranked, difference = best_answers(kept, windows_of([0, 0, 1], ["who saw it", "unread"]))
    # Each text once, at its best score
    assert ranked[0] == [{"text": "saw", "score": 7.0}, {"text": "who", "score": 6.0}]
    assert difference[0] == pytest.approx(1.0 - 7.0)  # the lowest of the windows' null scores
    assert ranked[1][0]["text"] == "" and difference[1] == math.inf  # no span at all: no answer


def test_windows_cover_the_context(tokenizer):
    context = " ".join(WORDS * 4)
    answer = {"text": ["snow wind"], "answer_start": [context.index("snow", 300)]}
    row = {"id": "q", "question": "who saw it", "context": context, "answers": answer}
    split = encode_questions(Dataset.from_list([row]), ["question", "context"], tokenizer, max_length=38, stride=8)
    room = 38 - 3 - 3  # without [CLS], two [SEP] and the question
    assert len(split.ends) == 1 + math.ceil((4 * len(WORDS) - room) / (room - 8))
    seen = {tuple(pair) for pair in split.offsets.tolist() if pair[0] >= 0}
    assert len(seen) == 4 * len(WORDS)  # every word of the context is in some window
    last = split.only(np.array([len(split.ends) - 1]))
    assert np.array_equal(last.offsets, split.of(split.offsets, len(split.ends) - 1)) and last.contexts == [context]
    texts = []
    for window, (first, end) in enumerate(split.labels):
        offsets = split.of(split.offsets, window)
        texts.append(context[offsets[first, 0] : offsets[end, 1]] if first else "")
    assert set(texts) == {"", "snow wind"}


def make_questions(number: int) -> list[dict]:
    """A third of them has no answer."""
    rows = []
    for i, row in enumerate(make_rows(number, 7)):
        text = "story" if "story" in row["text"] else row["text"].split()[1]
        answers = {"text": [text], "answer_start": [row["text"].index(text)]}
        answers = answers if i % 3 else {"text": [], "answer_start": []}
        rows.append({"id": f"q{i}", "question": "who saw it", "context": row["text"], "answers": answers})
    return rows


def test_squad_v2_from_end_to_end(base, tmp_path):
    test = [{name: value for name, value in row.items() if name != "answers"} for row in make_questions(12)]
    whole = [row | {"answers": {"text": [row["context"]], "answer_start": [0]}} for row in test]  # better than silence
    data = write_jsonl(tmp_path / "squad", train=make_questions(32), validation=whole, test=test)
    run = go(base, tmp_path, "squad_v2", data_dataset=data)
    metrics = report_of(run)["model"]["metrics"]["validation"]
    assert {"f1", "exact_match", "null_threshold"} <= set(metrics)
    answers = json.loads((run / "predictions" / "validation.json").read_text())
    assert set(answers) == {f"q{i}" for i in range(12)}
    # Silent by the threshold of validation, though no answers tell it
    assert json.loads((run / "predictions" / "test.json").read_text()) == answers and any(answers.values())
    ranked = json.loads((run / "predictions" / "validation_nbest.json").read_text())
    for name, answer in answers.items():
        assert answer in ("", ranked[name][0]["text"]) and len(ranked[name]) <= N_BEST
    AutoModelForQuestionAnswering.from_pretrained(run / "model", trust_remote_code=True)


def test_answers_may_be_missing_or_a_list_and_are_counted_by_questions(base, tokenizer, tmp_path):
    rows = make_questions(24)
    as_list = [{"text": text, "answer_start": 0} for text in ("good", "bad")]
    rows[0] |= {"question": None, "answers": as_list[:1], "context": "good film"}
    without = [{name: value for name, value in row.items() if name != "answers"} for row in make_questions(6)]
    folder = write_jsonl(tmp_path / "squad", train=rows, validation=make_questions(12), test=without)
    settings = DataConfig(dataset=folder, max_train_examples=10, max_length=20)
    data = read_data("squad_v2", tokenizer, 20, settings)
    train = data.splits["train"]
    assert len(np.unique(train.question)) == 10 and len(train.ends) > 10 and data.labelled == ["validation"]
    for question in np.unique(train.question):  # with all of its windows
        row = next(row for row in rows if row["id"] == train.names[question])
        whole = encode_questions(Dataset.from_list([row]), ["question", "context"], tokenizer, 20, 128, True)
        assert (train.question == question).sum() == len(whole.ends)
    assert not read_data("squad", tokenizer, 20, settings).splits["validation"].known[::2].all()  # none: not known
    run = go(base, tmp_path, "squad_v2", data_dataset=folder)
    assert set(json.loads((run / "predictions" / "test.json").read_text())) == {f"q{i}" for i in range(6)}
    for answers in ("good", 7, {"text": "good"}, [{"text": "good"}], {"text": ["good"], "answer_start": []}):
        bad = write_jsonl(tmp_path / "bad", train=[{**row, "answers": answers} for row in make_questions(4)])
        with pytest.raises(InputError, match="write them as JSON lines"):
            read_data("squad", tokenizer, 20, DataConfig(dataset=bad))


# ---------------------------------------------------------------------------------------------------------------------
# Labels and data


def numbered(raw: dict[str, list], names: list[str] | None, own: bool) -> tuple[dict[str, list], list[str]]:
    tables = {split: Dataset.from_dict({"label": values}) for split, values in raw.items()}
    labels, classes = number_classes(read_labels(tables, "label", own), names)
    return {split: values.tolist() for split, values in labels.items()}, classes


def test_labels_keep_order_and_names():
    names = list(TASKS["mnli"].classes)
    labels, classes = numbered({"train": [2, 0, 1], "test": [-1, -1], "validation": ["neutral", None]}, names, False)
    assert classes == ["entailment", "neutral", "contradiction"]
    assert labels == {"train": [2, 0, 1], "test": [-1, -1], "validation": [1, -1]}
    labels, classes = numbered({"train": [-1, 1, 0], "test": [-1, -1]}, None, True)  # -1 is a class of one's own
    assert classes == ["-1", "0", "1"] and labels == {"train": [0, 2, 1], "test": [-1, -1]}
    labels, classes = numbered({"train": ["spam", "ham"]}, None, True)
    assert classes == ["ham", "spam"] and labels["train"] == [1, 0]
    labels, classes = numbered({"train": [-1.0, math.nan, 2.0], "test": [math.nan, -1.0]}, None, True)
    assert classes == ["-1", "2"] and labels == {"train": [0, -1, 1], "test": [-1, -1]}
    with pytest.raises(InputError, match="label 3, which is none of the classes entailment, neutral, contradiction"):
        numbered({"train": [0, 3]}, names, False)


def test_long_pairs_lose_the_end_of_the_longer_text_and_are_counted(tokenizer):
    rows = Dataset.from_dict({"a": ["good " * 30, "bad"], "b": ["the film", "it"]})
    split, cut = encode_texts(rows, ["a", "b"], np.array([0, 1]), tokenizer, 16)
    assert cut == 1 and split.ends[0] == 16
    words = tokenizer.convert_ids_to_tokens(split.tokens[:16].tolist())
    assert words == ["[CLS]", *["good"] * 11, "[SEP]", "the", "film", "[SEP]"]
    parts = cut_longest_first([np.arange(30), np.arange(2)], 13)
    assert [len(part) for part in parts] == [11, 2]


def pack(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[dict]]) -> str:
    """Shards in the published format."""
    folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    shards = {}
    for split, examples in rows.items():
        ids = []
        for row in examples:
            label = NO_LABEL if row["label"] == -1 else row["label"]
            ids += [0, label, LABEL_END, *tokenizer(row["text"], row["text_pair"])["input_ids"][1:]]
        path = folder / f"mnli_{split}_000000.bin"
        write_shard(path, np.array(ids, dtype=np.uint16))
        shards[path.name] = {"split": split, "tokens": len(ids), "documents": len(examples), "sha256": sha256_of(path)}
    digest = sha256_of(folder / "tokenizer" / "tokenizer.json")
    specials = {"name": "words", "sha256": digest, "vocab_size": len(tokenizer), **SPECIALS}
    manifest = {"format": 1, "source": {}, "split_rule": "given", "shards": shards, "tokenizer": specials}
    write_json(folder / "manifest.json", manifest)
    return str(folder)


@pytest.mark.parametrize("typed", (False, True))
def test_packed_shards_are_the_same_examples(tmp_path, typed):
    tokenizer = make_tokenizer(WORDS)
    if typed:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    train = [{**row, "label": i % 3} for i, row in enumerate(make_rows(40, 1))]
    rows = {"train": train, "validation_matched": make_rows(8, 2), "test_matched": unlabelled(make_rows(4, 3))}
    packed = DataConfig(dataset=pack(tmp_path / "packed", tokenizer, rows))
    text = DataConfig(dataset=write_jsonl(tmp_path / "text", **rows), text="text", text_pair="text_pair")
    for length in (64, 12):
        ours, theirs = (read_data("mnli", tokenizer, length, settings) for settings in (packed, text))
        for split in rows:
            assert np.array_equal(ours.splits[split].tokens, theirs.splits[split].tokens)
            assert np.array_equal(ours.splits[split].labels, theirs.splits[split].labels)
            assert np.array_equal(ours.splits[split].segments, theirs.splits[split].segments)
            assert typed == (ours.splits[split].segments is not None)
        assert ours.dev == "validation_matched" and not ours.splits["test_matched"].known.any()
    other = DataConfig(dataset=pack(tmp_path / "other", make_tokenizer(WORDS[::-1]), rows))
    with pytest.raises(InputError, match="not that of the base model"):
        read_data("mnli", tokenizer, 64, other)
    with pytest.raises(InputError, match="packed shards hold texts with classes"):
        read_data("squad", tokenizer, 64, packed)


def test_packed_classes_are_the_tasks_and_shards_add_up(tokenizer, tmp_path):
    """Whatever numbers the shards have for them, and however many shards there are."""
    folder = tmp_path / "packed"
    pack(folder, tokenizer, {"train": [{**row, "label": i % 3} for i, row in enumerate(make_rows(30, 1))]})
    manifest = json.loads((folder / "manifest.json").read_text())
    (name,) = manifest["shards"]
    shutil.copy(folder / name, folder / "mnli_train_000001.bin")
    manifest["shards"]["mnli_train_000001.bin"] = manifest["shards"][name]
    manifest["source"]["labels"] = ["contradiction", "entailment", "neutral"]  # by the alphabet, as pack_mnli.py does
    write_json(folder / "manifest.json", manifest)
    data = read_data("mnli", tokenizer, 64, DataConfig(dataset=str(folder)))
    labels = np.concatenate([data.splits[split].labels for split in ("train", HELD_OUT)])
    assert len(labels) == 60 and data.splits[HELD_OUT].examples == 6 and "held out" in data.notes[0]
    assert np.bincount(labels).tolist() == [20, 20, 20]
    for split in data.splits.values():
        assert split.labels.tolist() == [(2, 0, 1)[place % 3] for place in split.idx]
    manifest["source"]["labels"] = ["no", "perhaps", "yes"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(InputError, match="the shards' classes are no, perhaps, yes, the task's entailment, neutral"):
        read_data("mnli", tokenizer, 64, DataConfig(dataset=str(folder)))
    alone = pack(tmp_path / "alone", tokenizer, {"validation_matched": make_rows(8, 2)})
    with pytest.raises(InputError, match="the data set has no split train, only validation_matched"):
        read_data("mnli", tokenizer, 64, DataConfig(dataset=alone))


def stars(path: Path, labels: list) -> dict[str, str]:
    """Flags for a csv of one's own with these labels."""
    rows = make_rows(len(labels), 1)
    path.write_text("review,stars\n" + "".join(f"{row['text']},{label}\n" for row, label in zip(rows, labels)))
    return {"data_dataset": str(path), "data_text": "review", "data_label": "stars"}


def test_a_fraction_makes_a_regression_and_a_tenth_of_train_is_held_out(base, tmp_path):
    run = go(base, tmp_path, **stars(tmp_path / "stars.csv", [i % 2 + 0.5 for i in range(60)]))
    report = report_of(run)
    sizes = {name: split["examples"] for name, split in report["splits"].items()}
    assert report["kind"] == "number" and sizes == {"train": 54, HELD_OUT: 6}
    assert "held out" in report["notes"][0]
    assert set(report["results"]["pretrained"][HELD_OUT]) == {"pearson", "spearman"}
    model = AutoModelForSequenceClassification.from_pretrained(run / "model", trust_remote_code=True)
    assert model.config.num_labels == 1


def test_a_number_is_learnt_whatever_its_size(base, tmp_path):
    """The saved model gives it as the labels have it."""
    rows = make_rows(200, 1)
    for row in rows:
        row["label"] = 90_000.5 if row["label"] else 100.5
    folder = write_jsonl(tmp_path / "prices", train=rows[:160], validation=rows[160:], test=unlabelled(rows[:4]))
    run = go(base, tmp_path, data_dataset=folder, train_epochs=4, train_lr=0.005)
    predictions = run / "predictions"
    found = {split: np.loadtxt(predictions / f"{split}.tsv", skiprows=1)[:, 1] for split in ("validation", "test")}
    wanted = np.array([row["label"] for row in rows[160:]])
    assert np.abs(found["validation"] - wanted).mean() < 30_000 < np.abs(wanted - wanted.mean()).mean()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = [model(**tokenizer(row["text"], return_tensors="pt")).logits.item() for row in rows[160:]]
        again = [model(**tokenizer(row["text"], return_tensors="pt")).logits.item() for row in rows[:4]]
    assert logits == pytest.approx(found["validation"], rel=1e-3) and again == pytest.approx(found["test"], rel=1e-3)
    more = go(str(run / "model"), tmp_path / "more", data_dataset=folder, train_epochs=1, train_lr=0.0005)
    assert max(line.train_loss for line in read_log(more / "log.txt").lines if line.train_loss is not None) < 2


def test_what_is_held_out_keeps_its_place_and_leaves_every_class(base, tokenizer, tmp_path):
    rows = [{"text": row["text"], "label": "usual" if i % 2 else "other"} for i, row in enumerate(make_rows(60, 1))]
    for place in (3, 20, 41, 59):
        rows[place]["label"] = f"rare {place}"
    folder = write_jsonl(tmp_path / "rare", train=rows)
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=folder))
    train, dev = data.splits["train"], data.splits[HELD_OUT]
    assert len(data.kind.classes) == 6 and set(train.labels) == set(range(6)) and len(dev.ends) > 1
    for split in (train, dev):
        for label, place in zip(split.labels, split.idx):
            assert data.kind.classes[label] == rows[place]["label"]


def test_what_has_no_text_or_no_label_is_said(tmp_path, tokenizer):
    def notes(texts: list, labels: list) -> list[str]:
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels)]
        write_jsonl(tmp_path, train=rows, validation=rows)
        return read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path))).notes

    said = ["1 examples of train have no text", "1 examples of validation have no text"]
    said += ["2 examples of train have no label and are left out"]
    said += ["2 examples of validation have no label and are not scored"]
    assert notes(["good film", None, "bad film", "a film", "good", "good"], ["1", "1", "0", "0", None, None]) == said
    assert notes(["good film", "bad film"] * 4, ["1", "0"] * 4) == []
    with pytest.raises(InputError, match="no example of train has a text: check --data.text"):
        notes([None, ""] * 4, ["1", "0"] * 4)


def test_a_column_has_one_type_over_the_whole_file(tmp_path, tokenizer):
    """However late the label comes that says which."""

    def read(name: str, lines: list[str]):
        (tmp_path / name).write_text("\n".join(lines))
        return read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path / name), max_train_examples=100))

    def rows(*labels) -> list[str]:
        return ["text,label", *(f"good film,{label}" for label in labels)]

    late = read("late.csv", rows(*[1, 2] * 5_000, "NA"))
    assert late.kind.classes == ["1", "2"] and "1 examples of train have no label" in late.notes[0]
    assert read("fraction.csv", rows(*[1, 2] * 5_000, 0.5)).kind.name == "number"
    words = read("words.csv", rows(*["True", "False", "Unknown"] * 10, *["True", "False"] * 5_000))
    assert words.kind.classes == ["False", "True", "Unknown"]
    quoted = [json.dumps({"text": "good", "label": label}) for label in ["4.5", "3.0"] * 10]
    assert read("quoted.jsonl", quoted).kind.name == "number"
    for labels in ([".5", "NA", "1.5"], ["4.5", "nan"], ["1.5", " 2"]):
        assert (
            read("spelled.jsonl", [json.dumps({"text": "good", "label": x}) for x in labels * 10]).kind.name == "number"
        )
    for classes in (["01", "1"], ["1_1", "1_2"], ["007", "inf"]):
        named = [json.dumps({"text": "good", "label": label}) for label in classes * 10]
        assert read("named.jsonl", named).kind.classes == classes


def test_numbers_of_classes_are_those_of_their_own_names(tmp_path, tokenizer):
    def write(folder: str, split: str, names: list[str], labels: list[int]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        columns = {"sentence1": ["good"] * len(labels), "sentence2": ["bad"] * len(labels), "label": labels}
        features = Features({name: Value("string") for name in ("sentence1", "sentence2")})
        features["label"] = ClassLabel(names=names)
        Dataset.from_dict(columns, features).to_parquet(tmp_path / folder / f"{split}.parquet")

    def labels_of(folder: str, task: str, split: str, **more) -> list[int]:
        data = read_data(task, tokenizer, 64, DataConfig(dataset=str(tmp_path / folder), **more))
        return data.splits[split].labels.tolist()

    for split in ("train", "validation"):  # MRPC's first class is not_equivalent
        write("alphabet", split, ["equivalent", "not_equivalent"], [0, 1, 0])
    assert labels_of("alphabet", "mrpc", "validation") == [1, 0, 1]
    write("fewer", "train", ["a", "b", "c"], [0, 1, 2])
    write("fewer", "validation", ["a", "c"], [0, 1])
    assert labels_of("fewer", "custom", "validation", text="sentence1") == [0, 2]
    write_jsonl(tmp_path / "numbered", train=[{"sentence1": "good", "label": i % 2} for i in range(8)])
    write("numbered", "validation", ["bad", "good"], [0, 1, -1])
    assert labels_of("numbered", "custom", "validation", text="sentence1") == [0, 1, -1]


def test_what_is_beside_a_split_is_not_read(tmp_path):
    rows = "text,label\ngood,1\n"
    for name in ("train.csv.bak", "._train.csv", ".train.csv", "notes.txt"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "train.CSV").write_text(rows)
    (tmp_path / "dev-00000-of-00001-a09b74b3ef9c3b56.csv").write_text(rows)
    assert {split: len(found) for split, found in read_files(tmp_path).items()} == {"train": 1, "dev": 1}
    (tmp_path / "train_000001.csv").write_text("text,stars\ngood,1\n")
    with pytest.raises(InputError, match="train_000001.csv.*their columns differ: text, label and text, stars"):
        read_files(tmp_path)
    (tmp_path / "train_000001.csv").write_text("label,text\nNA,bad\n")  # in another order, and of another type
    read_files(tmp_path)
    train = read_files(tmp_path)["train"]
    assert list(zip(train["text"], read_labels({"train": train}, "label", own=True)["train"])) == [
        ("good", 1),
        ("bad", None),
    ]


def test_a_split_called_dev_is_what_models_are_chosen_by(tmp_path, tokenizer):
    folder = write_jsonl(tmp_path, train=make_rows(20, 1), dev=make_rows(8, 2), devices=make_rows(8, 3))
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=folder))
    assert data.dev == "dev" and HELD_OUT not in data.splits and not data.notes
    write_jsonl(tmp_path, dev=[{**row, "label": None} for row in make_rows(8, 2)], devices=make_rows(8, 3))
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=folder))
    assert data.dev == HELD_OUT and data.splits["dev"].examples == 8


def test_what_is_held_out_has_labels(tmp_path, tokenizer):
    """Of few labelled rows, and of a class called -1."""
    rows = make_rows(100, 1)
    few = [{**row, "label": row["label"] if i < 10 else None} for i, row in enumerate(rows)]
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=write_jsonl(tmp_path / "few", train=few)))
    assert data.splits[HELD_OUT].known.all() and data.splits[HELD_OUT].examples == 1
    signs = [{**row, "label": -1 if i else 1} for i, row in enumerate(rows)]
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=write_jsonl(tmp_path / "signs", train=signs)))
    assert data.kind.classes == ["-1", "1"] and data.splits[HELD_OUT].known.sum() == 10


def test_rows_of_one_text_are_held_out_together(tmp_path, tokenizer):
    rows = [row for row in make_rows(100, 1) for _ in range(2)]
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=write_jsonl(tmp_path, train=rows)))
    texts = {
        name: {split.of(split.tokens, i).tobytes() for i in range(split.examples)}
        for name, split in data.splits.items()
    }
    assert data.splits[HELD_OUT].examples == 20 and not texts["train"] & texts[HELD_OUT]


def test_questions_are_held_out_whole(tmp_path, tokenizer):
    rows = []
    for i in range(20):
        context = " ".join(["bad film", *["the film was"] * 20, "good"])
        answers = {"text": ["good"], "answer_start": [context.index("good")]}
        rows.append({"id": f"q{i}", "question": "the film", "context": context, "answers": answers})
    data = read_data("squad", tokenizer, 32, DataConfig(dataset=write_jsonl(tmp_path, train=rows)))
    train, dev = data.splits["train"], data.splits[HELD_OUT]
    assert len(dev.names) == dev.examples == 2 and len(dev.ends) > 2 and dev.question.tolist() == sorted(dev.question)
    assert sorted(train.names + dev.names) == sorted(row["id"] for row in rows) and max(dev.question) == 1


def test_a_quote_in_a_tsv_opens_no_cell(tokenizer, tmp_path):
    rows = [(row["text"], row["label"]) for row in make_rows(40, 1)]
    for place in (3, 11, 20, 33):
        rows[place] = (f'"{rows[place][0]}', rows[place][1])
    (tmp_path / "train.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows]))
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path)))
    assert sum(split.examples for split in data.splits.values()) == 40
    with gzip.open(tmp_path / "train.tsv.gz", "wt") as file:
        file.write((tmp_path / "train.tsv").read_text())
    assert len(read_files(tmp_path / "train.tsv.gz")["train"]) == 40
    (tmp_path / "train.tsv.gz").unlink()
    rows = [[f'a "good" film\nin {i} lines', i % 2] for i in range(20)]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    lines = read_files(tmp_path)["train"]
    assert [[text, int(label)] for text, label in zip(lines["text"], lines["label"])] == rows
    (tmp_path / "train.tsv").write_text('text\tlabel\n"a ""good"" film"\t1\n"bad"\n')  # the last has no label
    assert list(read_files(tmp_path)["train"]["text"]) == ['a "good" film', "bad"]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "good\t1\nbad\t0\n" * 10)
    (tmp_path / "validation.jsonl").write_text('{"text": "good", "label": 1}\n')
    assert read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path))).splits["validation"].examples == 1
    (tmp_path / "validation.tsv").write_text("text\tlabel\ngood\t1\n")
    with pytest.raises(InputError, match="files of two kinds: take .jsonl or .tsv away"):
        read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path)))


def test_a_csv_is_taken_as_it_is_written(tokenizer, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "007, yes\n1.50,yes \n,no\n" * 10)
    rows = read_files(tmp_path)["train"]
    assert list(rows["text"])[:3] == ["007", "1.50", None]
    assert read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path))).kind.classes == ["no", "yes"]


@pytest.mark.parametrize("rows", ("good film, the plot,1\n" * 20, '"he said \\"good\\"", and bad film",1\n' * 20))
def test_a_csv_with_more_cells_than_names_is_refused(tokenizer, tmp_path, rows):
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    with pytest.raises(InputError, match="more cells than the head has names: quote cells that hold a delimiter"):
        read_files(tmp_path)


def test_files_that_cannot_be_meant_are_named(tmp_path):
    for name in ("train.csv", "train.csv.gz"):
        pd.DataFrame(make_rows(4, 1)).to_csv(tmp_path / name, index=False)
    with pytest.raises(InputError, match="has the split train twice, as train.csv and train.csv.gz: take one away"):
        read_files(tmp_path)
    (tmp_path / "films.xlsx").write_text("")
    with pytest.raises(InputError, match="films.xlsx is no .parquet, .* file: convert it to one"):
        read_files(tmp_path / "films.xlsx")


@pytest.mark.parametrize("kind", (".csv", ".tsv"))
def test_a_class_may_be_called_none(tokenizer, tmp_path, kind):
    rows = [{"text": row["text"], "label": ("None", "NA")[i % 2]} for i, row in enumerate(make_rows(60, 1))]
    rows[5]["text"], rows[7]["label"] = "null", ""
    pd.DataFrame(rows).to_csv(tmp_path / f"train{kind}", sep="\t" if kind == ".tsv" else ",", index=False)
    read = read_files(tmp_path)["train"]
    assert read["text"][5] == "null" and read["label"][7] is None
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path)))
    assert list(data.kind.classes) == ["NA", "None"]
    assert sum(split.known.sum() for split in data.splits.values()) == 59
    for i, row in enumerate(rows):  # among numbers, it is one that is missing
        row["label"] = "NA" if i == 7 else i % 4 + 0.5
    pd.DataFrame(rows).to_csv(tmp_path / f"train{kind}", sep="\t" if kind == ".tsv" else ",", index=False)
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path)))
    assert data.kind.name == "number" and sum(split.known.sum() for split in data.splits.values()) == 59


def test_named_classes_have_no_minus_one(tokenizer, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    labels = [-1, 0, 1] * 10
    texts = [row["text"] for row in make_rows(30, 1)]
    Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(tmp_path / "train.parquet")
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path)))
    assert data.kind.classes == ["no", "yes"] and "have no label" in " ".join(data.notes)


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([0, 1, ""] * 20, ["0", "1"]),  # a blank makes them 0.0, 1.0 and nan
        (["1.0", "2.0", "3.0"] * 10, ["1", "2", "3"]),
        (["", 0.5, 1] * 10, ["score"]),
    ],
)
def test_whole_numbers_are_classes_whatever_is_missing(tokenizer, tmp_path, labels, classes):
    named = {name.removeprefix("data_"): value for name, value in stars(tmp_path / "stars.csv", labels).items()}
    data = read_data("custom", tokenizer, 64, DataConfig(**named))
    assert data.kind.classes == classes
    assert any("have no label" in note for note in data.notes) == ("" in labels)


def test_the_embedded_pairs_are_those_of_the_checkout_from_any_folder(base, tmp_path, monkeypatch):
    """Built there where they are missing."""

    def make_sample(out: Path) -> None:
        write_jsonl(out / "pairs", train=make_rows(24, 1), validation=make_rows(8, 2))
        write_json(out / "manifest.json", {"shards": {}})

    monkeypatch.setattr(trainer, "ROOT", tmp_path / "checkout")
    monkeypatch.setattr("data.make_sample.make_sample", make_sample)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("built", "found"):
        report = report_of(go(base, tmp_path, "pairs", train_run_name=name).with_name(name))
        assert report["splits"]["train"]["examples"] == 24 and report["classes"] == list(TASKS["pairs"].classes)
        assert report["dataset"] == str(tmp_path / "checkout" / "data" / "sample" / "pairs")


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_learns_and_reports_beside_majority_and_random_weights(base, finished):
    report, log = report_of(finished), read_log(finished)
    assert set(report["results"]) == {"pretrained", "random weights", "majority class"}
    assert report["results"]["majority class"]["validation"]["accuracy"]["median"] == 0.5
    assert report["model"]["metrics"]["validation"]["accuracy"] > 0.8
    assert {line.run for line in log.lines} == {1, 2} and tuple(log.code) == finetuner.MODULES
    # What records/ reads
    assert log.named("config", "protocol") == "default" and log.named("config", "base_model") == base
    assert log.named("config", "train", "optimizer") == "muon" and log.named("config", "train", "lr") == 1e-3
    assert log.named("data", "base_sha256") == sha256_of(Path(base) / "model.safetensors")
    for name in ("splits", "results"):
        assert log.named("result", name, "custom") == report[name]
    assert "random weights" in log.text


def test_the_folder_predicts_what_the_run_reported(finished, films):
    model = AutoModelForSequenceClassification.from_pretrained(finished / "model", trust_remote_code=True)
    assert model.config.id2label == {0: "0", 1: "1"}
    tokenizer = AutoTokenizer.from_pretrained(finished / "model", trust_remote_code=True)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    right = {}
    for split in ("validation", "test"):  # test has no labels
        rows = read_jsonl(Path(films) / f"{split}.jsonl")
        found = [answer["label"] for answer in classify([row["text"] for row in rows], batch_size=8)]
        header, *lines = (finished / "predictions" / f"{split}.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        assert [line.split("\t") for line in lines] == [[str(row["idx"]), label] for row, label in zip(rows, found)]
        right[split] = np.mean([int(label) == row["label"] for row, label in zip(rows, found)])
    assert report_of(finished)["model"]["metrics"]["validation"]["accuracy"] == pytest.approx(right["validation"])


def test_the_card_carries_the_results(finished):
    from huggingface_hub import ModelCard

    card, results = ModelCard.load(finished / "model" / "README.md"), report_of(finished)["results"]
    said = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    accuracy = results["pretrained"]["validation"]["accuracy"]["median"]
    assert said["validation", "accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert f"| pretrained | validation | accuracy | {accuracy:.4f} |" in card.text
    assert "| majority class | validation | accuracy | 0.5000 | 0.5000 | 0.5000 | 1 |" in card.text
    assert f'.from_pretrained("{finished}/model", trust_remote_code=True)' in card.text


def test_a_run_leaves_the_config_that_repeats_it(finished, tmp_path):
    again = {"config": finished / "config.yaml", "train.out": tmp_path, "train.run_name": "again"}
    finetuner.main(as_flags(again))
    first, second = (report_of(run) for run in (finished, tmp_path / "again"))
    assert first["results"] == second["results"] and first["splits"] == second["splits"]
    assert (finished / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "task, split, values, lines",
    [
        ("mnli", "test_mismatched", [2, 0], ["0\tcontradiction", "1\tentailment"]),
        ("cola", "test", [1, 0], ["0\t1", "1\t0"]),
        ("stsb", "test", [5.2, 3.14159], ["0\t5.000", "1\t3.142"]),
    ],
)
def test_predictions_are_as_the_server_wants_them(tmp_path, task, split, values, lines):
    kind = kind_of(TASKS[task].kind, task, TASKS[task].classes)
    content = Split(np.zeros(0, np.int32), None, np.zeros(2), np.zeros(2), np.zeros(2, bool), [0, 1])
    kind.write(tmp_path, split, content, np.array(values))
    written = (tmp_path / f"{TASKS[task].files[split]}.tsv").read_text().splitlines()
    assert written == ["index\tprediction", *lines]


def test_files_are_named_as_the_server_wants_them():
    names = {name for task in GLUE for name in TASKS[task].files.values()}
    assert names == {"MNLI-m", "MNLI-mm", "AX", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"}


@pytest.mark.parametrize(
    "trainable, layers", [("classifier", []), ("last_2", [2, 3]), ("last_3", [1, 2, 3]), ("all", [0, 1, 2, 3])]
)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_is_not_trainable_stays(base, tokenizer, films, trainable, layers, optimizer):
    net = make_network(base)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=films, max_train_examples=16))
    train = FinetuneConfig(trainable=trainable, epochs=2, batch_size=8, optimizer=optimizer, lr=1e-3, log_every=2)
    finetuner.Training(net, data, train, ALONE, None).run()
    moved = {name for name, tensor in net.model.state_dict().items() if not torch.equal(tensor, before[name])}
    head = {"dense.weight", "classifier.weight", "classifier.bias"}
    blocks = {name for name in before if any(name.startswith(f"encoder.blocks.{layer}.") for layer in layers)}
    expected = set(before) if trainable == "all" else head | blocks
    trained = sum(p.numel() for p in net.model.parameters() if p.requires_grad)
    assert moved == expected and trained == sum(before[name].numel() for name in expected)


# ---------------------------------------------------------------------------------------------------------------------
# Flags, grids, seeds, protocols, other encoders


def settings_of(text: str) -> dict:
    return finetuner.read_flags(text.split())[0]


def test_flags_override_the_protocol_and_the_protocol_the_preset():
    settings = settings_of("--preset micro --protocol sane --train.epochs 3")
    names = ("epochs", "lr", "batch_size", "seeds", "lr_schedule", "compare_random")
    assert [settings["train"][name] for name in names] == [3.0, None, 16, 5, "cosine", True]
    assert settings["task"] == "pairs" and settings["data"]["max_train_examples"] == 5000
    assert settings_of("")["task"] == "mnli" and settings_of("")["train"] == vars(FinetuneConfig())
    assert settings_of("--preset micro --task rte")["task"] == "rte"


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--train.resume", True),
        ("--train.compile=false", False),
        ("--train.epochs 3", 3.0),
        ("--train.lr 1e-3", 1e-3),
        ("--train.seed=1_000", 1000),
        ("--train.patience None", None),
        ("--train.run_name 2026-11-25", "2026-11-25"),
        ("--train.trainable last_2", "last_2"),
        ("--data.max_length none", None),
        ("--data.text_pair none", None),
        ("--data.label 12", "12"),
    ],
)
def test_every_spelling_of_a_value(flag, value):
    group, name = flag.split()[0].split("=")[0].removeprefix("--").split(".")
    found = settings_of(flag)[group][name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "bad",
    [
        *("--train.epochs 0", "--train.lr -1", "--train.seeds 0", "--train.lr_warmup 2", "--train.pooling max"),
        *("--data.max_length 0", "--task none", "--protocol nothing", "--train.mask 1"),
    ],
)
def test_flags_that_mean_nothing_are_refused_in_one_line(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        finetuner.main(bad.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and bad.split()[0] in said


def test_protocols():
    protocol = PROTOCOLS["modernbert"]
    cells = grid_of(protocol, "cola", set(), FinetuneConfig())
    assert len(cells) == 48 and {cell.epochs for cell in cells} == {2.0, 5.0, 10.0}
    assert {cell.epochs for cell in grid_of(protocol, "rte", set(), FinetuneConfig())} == {1.0, 2.0, 3.0}
    assert len(grid_of(protocol, "rte", {"train.lr", "train.epochs"}, FinetuneConfig())) == 4
    cells = grid_of(PROTOCOLS["default"], "rte", set(), FinetuneConfig(seeds=3, seed=5))
    assert [cell.seed for cell in cells] == [5, 6, 7]


@pytest.mark.parametrize(
    "kbert, protocol, changed, optimizer, lr",
    [
        (True, "default", {}, "muon", 0.01),
        (True, "sane", {}, "muon", 0.01),
        (True, "default", {"optimizer": "adamw"}, "adamw", 5e-5),
        (True, "default", {"lr": 0.02}, "muon", 0.02),
        (False, "default", {}, "adamw", 5e-5),
        (False, "sane", {}, "adamw", 4e-5),
        (False, "default", {"lr": 1e-4}, "adamw", 1e-4),
        (False, "sane", {"optimizer": "muon"}, "muon", 0.003),
    ],
)
def test_a_kbert_is_finetuned_by_what_pretrained_it_and_others_by_adamw(kbert, protocol, changed, optimizer, lr):
    chosen = choose_rates(FinetuneConfig(**changed), PROTOCOLS[protocol], kbert)
    assert (chosen.optimizer, chosen.lr) == (optimizer, lr)


def test_what_other_encoders_cannot_do_is_said():
    sizes = dict(hidden_size=16, num_attention_heads=1, intermediate_size=16, embedding_size=8, vocab_size=20)
    albert = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=3, **sizes))
    with pytest.raises(InputError, match="this encoder's layers are one and the same"):
        finetuner.set_trainable(albert, "last_2")
    finetuner.set_trainable(albert, "classifier")
    trained = {name.split(".")[0] for name, p in albert.named_parameters() if p.requires_grad}
    assert "classifier" in trained and not any(p.requires_grad for p in albert.albert.encoder.parameters())


def test_a_grids_rates_are_as_far_apart_for_muon_as_for_adamw():
    def rates(optimizer: str, kbert: bool) -> list[float]:
        train = choose_rates(FinetuneConfig(optimizer=optimizer), PROTOCOLS["modernbert"], kbert)
        return sorted({cell.lr for cell in grid_of(PROTOCOLS["modernbert"], "rte", set(), train)})

    assert rates("auto", kbert=False) == rates("adamw", kbert=True) == [1e-5, 3e-5, 5e-5, 8e-5]
    assert rates("auto", kbert=True) == pytest.approx([0.002, 0.006, 0.01, 0.016])
    assert rates("muon", kbert=False) == pytest.approx([0.0006, 0.0018, 0.003, 0.0048])


def test_the_config_of_a_grid_repeats_the_grid(base, tmp_path):
    argv, grids = as_flags({"protocol": "modernbert", "train.lr": 1e-4, "train.base_model": base}), []
    for _ in range(2):
        settings, given = finetuner.read_flags(argv)
        command = finetuner.Finetuner(ALONE, settings, given, argv, {})
        grids.append(grid_of(command.protocol, "cola", given, command.train))
        trainer.write_settings(tmp_path, command.repeat)
        argv = ["--config", str(tmp_path / "config.yaml")]
    assert grids[0] == grids[1] and len(grids[0]) == 12 and {cell.lr for cell in grids[0]} == {1e-4}


def test_a_half_done_grid_is_resumed(base, films, tmp_path):
    few = {"data_dataset": films, "data_max_train_examples": 32, "train_seeds": 3}
    few |= {"train_patience": 1, "train_evals_per_epoch": 2}
    run = go(base, tmp_path, **few)
    report, records = report_of(run), read_jsonl(run / "runs.jsonl")
    assert len(records) == 3 and report["results"]["pretrained"]["validation"]["accuracy"]["n"] == 3
    (run / "metrics.json").unlink()
    half = [{**records[0], "seconds": 12345.0}, records[1]]  # recognisable
    (run / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    # How it is run may differ
    assert go(base, tmp_path, **few, train_resume="true", train_log_every=2, train_timeout_minutes=5) == run
    again = read_jsonl(run / "runs.jsonl")
    assert again[:2] == half and len(again) == 3 and again[2]["metrics"] == records[2]["metrics"]
    assert report_of(run)["results"] == report["results"]
    with pytest.raises(InputError, match="holds a run already"):
        go(base, tmp_path, **few)
    with pytest.raises(InputError, match="is finished or was made with other settings"):
        go(base, tmp_path, **few, train_resume="true")
    (run / "metrics.json").unlink()
    go(base, tmp_path, **few, train_resume="true", train_run_name="another")  # which is not there, so it is started
    assert len(read_jsonl(run.with_name("another") / "runs.jsonl")) == 3 and not (run / "metrics.json").exists()


def test_runs_on_other_data_or_from_other_weights_are_not_resumed(base, films, tmp_path):
    base, films = shutil.copytree(base, tmp_path / "base"), shutil.copytree(films, tmp_path / "films")
    few = {"data_dataset": films, "data_max_train_examples": 32}
    run = go(str(base), tmp_path / "out", **few)
    (run / "metrics.json").unlink()
    rows = read_jsonl(films / "validation.jsonl")
    for changed in (films / "validation.jsonl", base / "model.safetensors"):
        kept = changed.read_bytes()
        if changed.parent == films:
            write_jsonl(films, validation=[{**row, "label": 1 - row["label"]} for row in rows])
        else:
            weights = load_file(changed)
            save_file(
                weights | {"encoder.embed.weight": weights["encoder.embed.weight"] * 2}, changed, {"format": "pt"}
            )
        with pytest.raises(InputError, match="runs of other data or another base model: delete it to run them again"):
            go(str(base), tmp_path / "out", **few, train_resume="true")
        changed.write_bytes(kept)
    go(str(base), tmp_path / "out", **few, train_resume="true")


def test_glue_runs_what_is_there_and_hands_mnli_over(base, tmp_path, capsys):
    mnli, rte = ("premise", "hypothesis"), ("sentence1", "sentence2")
    splits = {"validation_matched": pairs_of(*mnli, 9, 3, 2), "validation_mismatched": pairs_of(*mnli, 9, 3, 3)}
    write_jsonl(tmp_path / "glue" / "mnli", train=pairs_of(*mnli, 24, 3, 1), **splits)
    write_jsonl(tmp_path / "glue" / "rte", train=pairs_of(*rte, 16, 2, 1), validation=pairs_of(*rte, 8, 2, 2))
    few = {"protocol": "modernbert", "train_lr": 1e-4, "train_weight_decay": 0}
    run = go(base, tmp_path, "glue", data_dataset=tmp_path / "glue", **few)
    scores = report_of(run)["scores"]
    reports = {task: report_of(run / task) for task in ("mnli", "rte")}
    accuracy = reports["mnli"]["results"]["pretrained"]["validation_mismatched"]["accuracy"]["median"]
    assert scores["MNLI-mm"] == pytest.approx(100 * accuracy) and scores["CoLA"] is None
    assert reports["rte"]["base_model"] == str(run / "mnli" / "model")
    alone = go(base, tmp_path, "rte", data_dataset=tmp_path / "glue", **few, train_run_name="alone").with_name("alone")
    assert report_of(alone)["base_model"] == str(run / "mnli" / "model")
    weights = run / "mnli" / "model" / "model.safetensors"
    assert read_log(alone).named("data", "base_sha256") == sha256_of(weights)
    for report in (*reports.values(), report_of(alone)):
        assert report["model"]["settings"]["optimizer"] == "muon"
    said = capsys.readouterr().out
    assert "cola is left out: " in said
    header, _, row = said.split("tasks\n")[1].splitlines()[:3]
    # Named for the run that it started from
    assert header.startswith("| model | MNLI-m |") and row.startswith("| pretrained | ")
    with pytest.raises(InputError, match="run finetuner.py --task mnli first"):
        finetuner.mnli_model(tmp_path, "somebody/else")


def test_glue_without_mnli_says_what_starts_elsewhere(base, tmp_path, capsys):
    rte = ("sentence1", "sentence2")
    write_jsonl(tmp_path / "glue" / "rte", train=pairs_of(*rte, 16, 2, 1), validation=pairs_of(*rte, 8, 2, 2))
    few = {"protocol": "modernbert", "train_lr": 1e-4, "train_weight_decay": 0, "train_epochs": 1}
    (tmp_path / "glue" / "dataset_infos.json").write_text("{}")  # no data of the tasks that have no folder
    run = go(base, tmp_path, "glue", data_dataset=tmp_path / "glue", **few)
    assert f"note: rte starts from {base}: there is no MNLI model here" in (run / "log.txt").read_text()


@pytest.mark.parametrize("steps, evaluations, at", [(7, 4, [2, 4, 6, 7]), (11, 2, [6, 11]), (3, 8, [1, 2, 3])])
def test_as_many_evaluations_in_an_epoch_as_asked_for(base, films, tmp_path, steps, evaluations, at):
    few = {"data_dataset": films, "data_max_train_examples": 4 * steps, "train_batch_size": 4, "train_epochs": 2}
    run = go(base, tmp_path, **few, train_patience=99, train_evals_per_epoch=evaluations)
    found = [line.step for line in read_log(run).lines if line.dev_score is not None]
    assert found == at + [steps + step for step in at]


def test_resumed_glue_pushes_also_what_was_finished(base, tmp_path, monkeypatch):
    rte, pushed = ("sentence1", "sentence2"), []
    write_jsonl(tmp_path / "glue" / "rte", train=pairs_of(*rte, 16, 2, 1), validation=pairs_of(*rte, 8, 2, 2))
    monkeypatch.setattr(HubPusher, "check", lambda hub: None)
    monkeypatch.setattr(HubPusher, "push", lambda hub, folder, revision: pushed.append((folder, revision)))
    few = {"data_dataset": tmp_path / "glue", "train_resume": "true", "train_hf_model_name": "me/tuned"}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(finetuner.Finetuner, "write_row", killed)
        go(base, tmp_path, "glue", **few)
    pushed.clear()
    run = go(base, tmp_path, "glue", **few)
    assert pushed == [(run / "rte" / "model", "rte")]
    card = (run / "rte" / "model" / "README.md").read_text()
    assert 'from_pretrained("me/tuned", revision="rte", trust_remote_code=True)' in card


KILLED = """
import os, signal, sys
import finetuner

MOMENTS = [(finetuner, "save_folder"), (finetuner.TaskRuns, "keep"), (finetuner.TaskRuns, "finish"), (os, "replace")]
MOMENTS += [(finetuner.TaskRuns, "write_predictions"), (finetuner.Training, "run"), (finetuner.Finetuner, "close")]

def run(left):
    def struck(work):
        def count(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **named)
        return count
    for owner, name in MOMENTS:
        setattr(owner, name, struck(getattr(owner, name)))
    finetuner.main(sys.argv[1:])

for left in range(1, 100, 2):
    if not (child := os.fork()):
        run(left)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(f"{left // 2} kills" if code == 0 else code)
"""


def test_all_of_glue_killed_again_and_again_gives_the_same_table(base, tmp_path):
    rte = ("sentence1", "sentence2")
    mnli = {"train": pairs_of("premise", "hypothesis", 24, 3, 1), "test": pairs_of("premise", "hypothesis", 5, 0, 3)}
    for part in ("validation_matched", "validation_mismatched"):
        mnli[part] = pairs_of("premise", "hypothesis", 9, 3, 2)
    write_jsonl(tmp_path / "glue" / "mnli", **mnli)
    write_jsonl(tmp_path / "glue" / "rte", train=pairs_of(*rte, 16, 2, 1), validation=pairs_of(*rte, 8, 2, 2))
    few = {"data_dataset": tmp_path / "glue", "train_seeds": 2, "train_resume": "true"}
    whole = go(base, tmp_path / "whole", "glue", **few)
    ended = run_python("-c", KILLED, *flags(base, tmp_path / "killed", "glue", **few))
    assert int(re.fullmatch(r"(\d+) kills\n", ended.stderr.splitlines(True)[-1])[1]) > 3, ended.stderr
    killed = tmp_path / "killed" / "run"
    for part in (".", "mnli", "rte"):
        ours, theirs = report_of(killed / part), report_of(whole / part)
        for name in ("scores", "results", "splits"):
            assert ours.get(name) == theirs.get(name)
    assert read_log(killed).named("result", "finished")
    for path in whole.glob("*/predictions/*"):
        assert path.read_bytes() == (killed / path.relative_to(whole)).read_bytes()


def test_from_hub_to_hub(base, tmp_path):
    """Base model and MNLI come from the Hub, the finetuned model goes there; all three test sets are answered."""

    def parquet(split: str, table: list[dict]) -> bytes:
        Dataset.from_list(table).to_parquet(tmp_path / f"{split}.parquet")
        return (tmp_path / f"{split}.parquet").read_bytes()

    rows = functools.partial(pairs_of, "premise", "hypothesis")
    mnli = {"train": rows(32, 3, 1), "validation_matched": rows(9, 3, 2), "validation_mismatched": rows(9, 3, 3)}
    mnli |= {"test_matched": rows(7, 0, 4), "test_mismatched": rows(7, 0, 5)}
    files = {f"mnli/{split}.parquet": parquet(split, table) for split, table in mnli.items()}
    files["ax/test.parquet"] = parquet("test", rows(5, 0, 6))
    configs = []
    for name in ("mnli", "ax"):
        paths = [path for path in files if path.startswith(name)]
        configs.append({"config_name": name, "data_files": [{"split": Path(p).stem, "path": p} for p in paths]})
    files["README.md"] = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    settings = {"train.base_model": "me/base", "train.hf_model_name": "me/tuned", "train.run_name": "run"}
    code = """from transformers import pipeline
classify = pipeline("text-classification", "me/tuned", trust_remote_code=True, device="cpu")
print(classify({"text": "the film", "text_pair": "was good"})["label"])"""
    with Hub() as hub:
        hub.add("dataset", "nyu-mll/glue", files)
        hub.add("model", "me/base", {path.name: path.read_bytes() for path in Path(base).iterdir()})
        where = {"train.out": tmp_path / "out"}
        ended = run_python("finetuner.py", *as_flags(settings | where | QUICK), env=hub.environment(tmp_path))
        assert ended.returncode == 0, ended.stderr
        loaded = run_python("-c", code, env=hub.environment(tmp_path))
        assert loaded.stdout.strip().split("\n")[-1] in TASKS["mnli"].classes, loaded.stderr
        card = hub.files("model", "me/tuned")["README.md"].decode()
        pushed = b"".join(hub.files("model", "me/tuned").values())
        assert TOKEN.encode() not in pushed and not telling(tmp_path) and TOKEN not in ended.stdout + ended.stderr
    assert "base_model: me/base" in card and "validation_mismatched" in card
    predictions = tmp_path / "out" / "run" / "predictions"
    for name, lines in (("MNLI-m", 8), ("MNLI-mm", 8), ("AX", 6)):
        assert len((predictions / f"{name}.tsv").read_text().splitlines()) == lines


THEIRS = {**SHAPE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MARKS = {"cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
OTHERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**THEIRS)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**THEIRS, **MARKS)),
}


FOREIGN = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification

Path("MARK").touch()


class ForeignConfig(BertConfig):
    model_type = "foreign"


class ForeignModel(BertForSequenceClassification):
    config_class = ForeignConfig
"""


def test_a_base_models_own_code_is_run_only_if_trusted(films, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "foreign", tmp_path / "it_ran"
    OTHERS["bert"]().save_pretrained(folder)
    make_tokenizer(WORDS).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "theirs.ForeignConfig", "AutoModelForSequenceClassification": "theirs.ForeignModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": auto}))
    (folder / "theirs.py").write_text(FOREIGN.replace("MARK", str(mark)))
    few = {"data_dataset": films, "data_max_train_examples": 16}
    with pytest.raises(InputError, match="foreign brings code of its own, .* give --train.trust_remote_code true"):
        go(str(folder), tmp_path, **few)
    assert not mark.exists()
    report = report_of(go(str(folder), tmp_path, **few, train_trust_remote_code="true"))
    assert mark.exists() and report["results"]["pretrained"]


def test_weights_under_other_names_are_no_pretrained_encoder(films, tmp_path):
    folder, model = tmp_path / "wrapped", OTHERS["bert"]()
    model.save_pretrained(folder)
    save_file({f"module.{name}": p.clone() for name, p in model.state_dict().items()}, folder / "model.safetensors")
    make_tokenizer(WORDS).save_pretrained(folder)
    with pytest.raises(InputError, match="none of the weights of .*wrapped has the name of one of BertFor"):
        go(str(folder), tmp_path, data_dataset=films)
    base = finetuner.open_base(str(folder), None)
    assert base.title == "wrapped"
    model = BertForSequenceClassification(BertConfig(**THEIRS))
    finetuner.set_trainable(model, "last_3")  # of two
    assert all(p.requires_grad for p in model.bert.encoder.parameters())
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_muon_gets_other_encoders_linear_layers_but_the_classifier(name, monkeypatch):
    made, build = [], finetuner.Optimizer
    monkeypatch.setattr(finetuner, "Optimizer", lambda *args, **settings: made.append(build(*args, **settings)))
    model = AutoModelForSequenceClassification.from_config(OTHERS[name]().config)
    finetuner.muon_step(model, FinetuneConfig(lr=0.003), ALONE, compiled=False)
    muon = {id(p): group.row for group in made[0].muon for p in group.parameters}
    for name, p in model.named_parameters():
        assert (id(p) in muon) == (p.ndim == 2 and "embeddings" not in name and "classifier" not in name), name
        if id(p) in muon:  # queries, keys and values of one layer by head
            assert muon[id(p)] == ((16, 32) if name.endswith("Wqkv.weight") else tuple(p.shape))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_encoders_are_measured_the_same_way(films, tmp_path, name, optimizer):
    torch.manual_seed(0)
    folder, tokenizer = tmp_path / name, make_tokenizer(WORDS)
    OTHERS[name]().save_pretrained(folder)
    if name == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    more = {"data_text_pair": "text_pair", "train_trainable": "last_2", "train_optimizer": optimizer}
    run = go(str(folder), tmp_path, data_dataset=films, **more)
    logged = read_log(run).sections["config"]["train"]["pooling"]
    used = json.loads((run / "model" / "config.json").read_text()).get("classifier_pooling")
    assert logged == used == {"bert": None, "modernbert": "mean"}[name]  # whose class has "cls" by default
    classify = pipeline("text-classification", model=str(run / "model"), device="cpu")
    rows = read_jsonl(Path(films) / "validation.jsonl")
    found = [classify({"text": row["text"], "text_pair": row["text_pair"]})["label"] for row in rows]
    accuracy = np.mean([int(label) == row["label"] for row, label in zip(rows, found)])
    assert report_of(run)["model"]["metrics"]["validation"]["accuracy"] == pytest.approx(accuracy)


def test_the_newest_pretraining_run_is_the_default_base(base, finished):
    assert finetuner.newest_run(Path(base).parents[1], "micro") == Path(base)
    with pytest.raises(InputError, match="no finished pretraining run"):
        finetuner.newest_run(finished.parent, "base")  # holds a finetuned model only


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_said_in_one_sentence(base, films, tmp_path):
    def said(dataset: object, start: str = base, **more) -> str:
        with pytest.raises(InputError) as caught:
            go(start, tmp_path / "out", data_dataset=str(dataset), **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("text,label\n")
    sevens = [{**row, "label": 7} for row in make_rows(4, 2)]
    bad = write_jsonl(tmp_path / "bad", train=make_rows(20, 1), validation=sevens)
    same = write_jsonl(tmp_path / "same", train=[{**row, "label": 1} for row in make_rows(20, 1)])
    assert "its columns are text, text_pair, label, idx" in said(films, data_text="review")
    assert "is empty" in said(tmp_path / "empty.csv")
    assert "no rows" in said(tmp_path / "header.csv")
    assert "label 7, which is none of the classes 0, 1" in said(bad)
    assert "nothing (there is no such folder): give --train.base_model" in said(films, start=str(tmp_path / "nothing"))
    assert "no file or folder" in said(tmp_path / "nothing.csv")
    assert "nothing to tell apart" in said(same)
    assert not (tmp_path / "out").exists()  # none of them left a run behind


def as_csv(rows: list[tuple], head: str = "text,label") -> bytes:
    return "".join(f"{line}\n" for line in (head, *(f"{text},{label}" for text, label in rows))).encode()


FILMS = [(row["text"], row["label"]) for row in make_rows(40, 1)]
MANY = [("good film", number) for number in range(10_000)]
AWKWARD = {  # csv -> what its refusal says, or of how many classes it is taken to be
    "a label missing now and then": (as_csv([(text, "" if label else 1) for text, label in FILMS[1:]] + FILMS), 2),
    "all labels missing": (as_csv([(text, "") for text, _ in FILMS]), "no example of train has a label"),
    "NaN": (as_csv([*FILMS, ("good", "NaN"), ("NaN", 1)]), 2),
    "null": (as_csv([*FILMS, ("good", "null"), ("null", 1)]), 2),
    "a column twice": (as_csv([(text, f"{label},{label}") for text, label in FILMS], "text,label,label"), 2),
    "latin-1": (as_csv([*FILMS, ("caf\xe9", 1)]).replace(b"\xc3\xa9", b"\xe9"), "cannot read .*utf-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + as_csv(FILMS), 2),
    "no text at all": (as_csv([("", label) for _, label in FILMS]), "no example of train has a text"),
    "one class": (as_csv([(text, 1) for text, _ in FILMS]), "holds only the class 1"),
    "100,000 characters": (as_csv([("good " * 20_000, 0), *FILMS]), 2),
    "10,000 classes, once each": (as_csv(MANY), "train has a row of each class, and none can be held out"),
    "infinite": (as_csv([(text, "inf" if label else 0.5) for text, label in FILMS]), "is infinite"),
    "words among fractions": (as_csv([(text, "good" if label else 0.5) for text, label in FILMS]), 2),
    "an open quote": (as_csv([*FILMS, ('"good', 1)]), "cannot read .*EOF inside string"),
    "one row": (as_csv(FILMS[:1]), "train has one row"),
    "no head": (as_csv(FILMS[1:], ",".join(map(str, FILMS[0]))), "no column text, label"),
}


@pytest.mark.parametrize("content, said", AWKWARD.values(), ids=AWKWARD)
def test_awkward_tables_are_read_or_refused(tokenizer, tmp_path, content, said):
    (tmp_path / "table.csv").write_bytes(content)
    if isinstance(said, int):
        found = read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path / "table.csv")))
        assert len(found.kind.classes) == said and found.dev == HELD_OUT
        return
    with pytest.raises(InputError, match=said) as caught:
        read_data("custom", tokenizer, 64, DataConfig(dataset=str(tmp_path / "table.csv")))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_awkward_examples_are_learnt_from(base, tmp_path):
    """Without text, longer than a window, and of 10,000 classes."""
    rows = [*MANY, ("", 3), ("good " * 20_000, 4)]
    (tmp_path / "train.csv").write_bytes(as_csv(rows))
    (tmp_path / "validation.csv").write_bytes(as_csv(rows[-20:]))
    run = go(base, tmp_path / "out", data_dataset=tmp_path, data_max_train_examples=32)
    assert len(report_of(run)["classes"]) == 10_000


def test_a_split_whose_labels_are_missing_is_no_split_to_choose_by(base, tmp_path):
    without = [{"text": row["text"]} for row in make_rows(8, 2)]
    films = write_jsonl(tmp_path / "films", train=make_rows(20, 1), validation=without)
    with pytest.raises(InputError, match="no labelled split validation to choose by"):
        go(base, tmp_path / "out", data_dataset=films, data_validation="validation")
    with pytest.raises(InputError, match="cannot be chosen by what it learned"):
        go(base, tmp_path / "out", data_dataset=films, data_validation="train")
    films = write_jsonl(tmp_path / "films", other=make_rows(8, 3))
    run = go(base, tmp_path / "out", data_dataset=films, data_validation="other")
    assert set(report_of(run)["model"]["metrics"]) == {"other"}


def test_a_model_of_another_model_py_is_refused(base, films, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(base, older)
    weights = load_file(older / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "qk_bias" not in name}
    save_file(weights, older / "model.safetensors", {"format": "pt"})
    message = "differ in encoder.blocks.1.attention.qk_bias: it was trained by another model.py"
    with pytest.raises(InputError, match=message):
        go(str(older), tmp_path, data_dataset=films)
    for name, tensor in (("skip_lambda", torch.zeros(())), ("mlp.gate_up.weight", torch.zeros(8, 8))):
        name = f"encoder.blocks.1.{name}"
        weights = {**load_file(Path(base) / "model.safetensors"), name: tensor}
        save_file(weights, older / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"differ in {name}"):
            go(str(older), tmp_path / name, data_dataset=films)


def test_data_that_is_not_there_is_told_on_every_rank(base, tmp_path):
    glue = {"task": "glue", "train.base_model": base, "train.out": tmp_path, "data.dataset": tmp_path / "nothing"}
    ended = run_python("finetuner.py", *as_flags(glue), processes=2)
    assert ended.returncode != 0 and ended.stderr.count("error: no GLUE task has its data") == 2
    assert all(f"{task} is left out: no file or folder" in ended.stdout for task in GLUE)


def test_reading_data_needs_no_script_and_no_model():
    code = "import sys, data.tasks; print(*{'finetuner', 'trainer', 'model', 'datasets'} & set(sys.modules))"
    assert run_python("-c", code).stdout.split() == []


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data on this machine")
def test_real_files_are_read(tokenizer):
    def read(task: str, folder: str, **more):
        return read_data(task, tokenizer, 32, DataConfig(dataset=str(SHARED / folder), **more))

    mnli = read("mnli", "nli", max_train_examples=100)
    assert mnli.dev == "validation" and len(mnli.splits["validation_matched"].ends) == 9815
    assert mnli.kind.classes[2] == "contradiction"
    mrpc = read("mrpc", "glue")
    assert mrpc.dev == HELD_OUT and len(mrpc.splits["test_labelled"].ends) == 1725  # a tenth of train is held out
    sts = read("stsb", "glue/sts")
    assert sts.kind.name == "number" and sts.splits["train"].labels.max() == 5.0


def test_adamw_sums_over_ranks_clips_and_decays_matrices_alone(monkeypatch):
    """As torch's own; a small gradient, then a large one, tell sum and clipping apart."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))  # another rank with the same
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    train = FinetuneConfig(lr=0.1, weight_decay=0.5, clip=1.0)
    step = finetuner.adamw_step(ours, train, Process(0, 2, torch.device("cpu")))
    groups = [{"params": [theirs.weight], "weight_decay": 0.5}, {"params": [theirs.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6)
    for size in (0.1, 10.0):
        ours.weight.grad = torch.full_like(ours.weight, size)  # none for the bias: no example here
        theirs.weight.grad = torch.full_like(theirs.weight, 2 * size)
        theirs.bias.grad = torch.zeros_like(theirs.bias)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        step(1.0)
        plain.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_patience_ends_a_run_which_keeps_its_best_weights(base, tokenizer, films, monkeypatch):
    net, seen, scores = make_network(base), [], iter([0.5, 0.7, 0.6, 0.7, 0.9])  # the last: of the kept weights

    def judged(*_):
        seen.append({name: tensor.clone() for name, tensor in net.model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(finetuner, "dev_score", judged)
    data = read_data("custom", tokenizer, 64, DataConfig(dataset=films, max_train_examples=32))
    train = FinetuneConfig(epochs=9, batch_size=32, optimizer="muon", lr=1e-3, patience=2)
    said, _ = finetuner.Training(net, data, train, ALONE, None).run()
    assert (said["steps"], said["best_step"], said["score"], len(seen)) == (4, 2, 0.9, 5)
    assert all(torch.equal(seen[4][name], tensor) for name, tensor in seen[1].items())
    assert not torch.equal(seen[3]["classifier.weight"], seen[1]["classifier.weight"])


def test_the_folder_holds_the_seed_that_scored_best(base, films, tmp_path, monkeypatch):
    def run(training):
        number = training.train.seed - 1
        torch.nn.init.constant_(training.net.model.classifier.bias, number)
        score = (0.6, 0.9, 0.7)[number]
        said = {"score": score, "best_step": 1, "steps": 1, "seconds": 1.0}
        metrics = {"validation": {"accuracy": score, "macro_f1": score}}
        return said | {"metrics": metrics}, {"validation": np.full(40, number % 2)}

    monkeypatch.setattr(finetuner.Training, "run", run)
    monkeypatch.setattr(finetuner, "draw_curves", lambda folder: None)
    folder = go(base, tmp_path, data_dataset=films, train_seeds=3)
    assert (load_file(folder / "model" / "model.safetensors")["classifier.bias"] == 1).all()
    assert set((folder / "predictions" / "validation.tsv").read_text().split()[3::2]) == {"1"}
    assert report_of(folder)["model"]["settings"]["seed"] == 2
