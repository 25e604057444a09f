"""The finetuner on tiny models: batches, metrics, SQuAD, folders, protocols, bad input."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import finetuner
from conftest import ROOT, run_python
from dataloading import InputError, sha256_of, write_manifest, write_shard
from finetuner import TASKS, FinetuneConfig, Network
from hub_stand_in import Hub
from model import KBERTConfig, KBERTForMaskedLM

WORDS = "good bad the a film was story and plot with people who saw it then they went home by train or bus in rain sun snow wind".split()
SPECIALS = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIALS + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A pretraining run's model/, with weights that let blocks do something."""
    folder = tmp_path_factory.mktemp("logs") / "pretrained" / "model"
    torch.manual_seed(0)
    model = KBERTForMaskedLM(
        KBERTConfig(
            vocab_size=len(SPECIALS + WORDS),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            local_attention_window=16,
            cls_token_id=0,
            sep_token_id=1,
            pad_token_id=2,
            mask_token_id=3,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(WORDS).save_pretrained(folder)
    (folder.parent / "config.json").write_text(json.dumps({"preset": "micro"}))
    return str(folder)


def make_rows(number: int, seed: int) -> list[dict]:
    """Films; those with the word "good" are class 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        words = rng.choice(WORDS[2:], rng.integers(3, 20)).tolist()
        words.insert(rng.integers(0, len(words)), WORDS[1 - i % 2])
        rows.append({"text": " ".join(words), "text_pair": "the film was", "label": i % 2, "idx": 1000 + i})
    return rows


def write_jsonl(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> str:
    return write_jsonl(
        tmp_path_factory.mktemp("films"),
        train=make_rows(256, 1),
        validation=make_rows(40, 2),
        test=[{**row, "label": -1} for row in make_rows(10, 3)],
    )


QUICK = ["--train.epochs", "1", "--train.batch_size", "16", "--train.lr", "1e-3", "--train.log_every", "4"]


def go(base: str, out: Path, *flags: str, task: str = "custom") -> Path:
    finetuner.main(
        ["--task", task, "--train.base_model", base, "--train.out", str(out), "--train.run_name", "run", *QUICK, *flags]
    )
    return out / "run"


@pytest.fixture(scope="module")
def finished(base, films, tmp_path_factory) -> Path:
    return go(
        base, tmp_path_factory.mktemp("out"), "--data.dataset", films, "--train.epochs", "4", "--train.compare_random"
    )


def make_network(
    base: str, row_tokens: int = 4096, kind: str = "classes", dropout: float = 0.1, pooling: str = "mean"
) -> tuple[Network, finetuner.Base]:
    opened = finetuner.open_base(base, None)
    opened.config["classifier_dropout"] = dropout
    model = finetuner.build_model(opened, kind, ["a", "b"], seed=1, pooling=pooling)
    return Network(model, opened, kind, FinetuneConfig(row_tokens=row_tokens), torch.device("cpu")), opened


def make_split(base: finetuner.Base, number: int = 12) -> finetuner.Split:
    rows = make_rows(number, 5)
    ids = [np.array(base.tokenizer(row["text"], row["text_pair"])["input_ids"], dtype=np.int32) for row in rows]
    return finetuner.Split(
        np.concatenate(ids),
        None,
        np.cumsum([len(x) for x in ids]),
        np.array([row["label"] for row in rows]),
        np.ones(number, bool),
        list(range(number)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("kind, pooling", [("classes", "mean"), ("classes", "cls"), ("span", "mean")])
def test_an_example_does_not_see_what_it_is_packed_with(base, kind, pooling):
    net, opened = make_network(base, kind=kind, pooling=pooling)
    split = make_split(opened)
    net.train(False)
    with torch.no_grad():
        (row,) = net.rows(split.lengths, np.arange(12))
        together = net.outputs(split, row, np.arange(12), 12)
        for at, i in enumerate(row):
            alone = net.outputs(split, np.array([i]), np.arange(1), 1)[0]
            ids = torch.from_numpy(split.of(split.tokens, i)).long()[None]
            out = net.model(ids)
            theirs = out.logits[0] if kind == "classes" else torch.cat([out.start_logits, out.end_logits])
            torch.testing.assert_close(together[at][..., : alone.size(-1)], alone, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(alone, theirs, atol=2e-5, rtol=1e-4)


def gradients(net: Network, split: finetuner.Split, seed: int) -> torch.Tensor:
    net.train(True)
    net.model.encoder.compute_dtype = None
    net.model.zero_grad()
    for row in net.rows(split.lengths, np.arange(12)):
        torch.manual_seed(seed)
        (net.loss(net.outputs(split, row, row, 12), split.labels[row]) / 12).backward()
    return torch.cat([p.grad.flatten() for p in net.model.parameters()])


def test_a_gpu_compiles_each_size_of_row_once_for_training_and_once_for_prediction(base, monkeypatch):
    """What a GPU compiles, by the compiler's front end alone: graphs anew for each row would end in the eager fallback, many times slower."""
    plain, opened = make_network(base, row_tokens=512)
    monkeypatch.setattr(finetuner, "compiled_backend", lambda device: "flex")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    net, _ = make_network(base, row_tokens=512)
    split = make_split(opened, 40)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in (True, False):
            net.train(mode)
            for count in (1, 2, 4, 9, 15, 20, 3, 1):
                net.outputs(split, np.arange(count), np.arange(count), 20)
        plain.train(False)
        row = np.arange(12)
        torch.testing.assert_close(
            net.outputs(split, row, row, 12), plain.outputs(split, row, row, 12), atol=2e-5, rtol=1e-4
        )
    assert len(net.sizes) == 4 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * len(set(net.sizes))


def test_gradients_and_dropout_do_not_depend_on_packing(base):
    (small, opened), (large, _) = make_network(base, row_tokens=64), make_network(base)
    split = make_split(opened)
    assert len(small.rows(split.lengths, np.arange(12))) > 1
    torch.testing.assert_close(gradients(small, split, 3), gradients(large, split, 3), atol=1e-5, rtol=1e-3)
    assert not torch.allclose(gradients(large, split, 3), gradients(large, split, 4))  # dropout is there


def test_two_processes_train_as_one(base, films, tmp_path):
    script = tmp_path / "run.py"  # in fp32: rounding in bf16 would hide small differences
    script.write_text(
        "import sys, finetuner\nfinetuner.Network.train = lambda self, mode: self.model.train(mode) and None\nfinetuner.main(sys.argv[1:])\n"
    )
    lines = []
    for ranks in (1, 2):  # 49 examples: in the last batch one rank has none
        ended = run_python(
            script,
            "--task",
            "custom",
            "--train.base_model",
            base,
            "--data.dataset",
            films,
            "--data.text_pair",
            "text_pair",
            "--data.max_train_examples",
            "49",
            "--train.out",
            str(tmp_path),
            *QUICK,
            "--train.log_every",
            "1",
            "--train.lr",
            "1e-4",
            "--train.run_name",
            f"ranks{ranks}",
            processes=ranks,
        )
        assert ended.returncode == 0, ended.stderr
        lines.append(
            [json.loads(line) for line in (tmp_path / f"ranks{ranks}" / "metrics.jsonl").read_text().splitlines()]
        )
    losses = [[line["train_loss"] for line in said if "train_loss" in line] for said in lines]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert lines[0][-1]["dev_score"] == lines[1][-1]["dev_score"]
    assert (tmp_path / "ranks1/predictions/test.tsv").read_text() == (
        tmp_path / "ranks2/predictions/test.tsv"
    ).read_text()


def test_order_of_examples_is_a_function_of_the_seed(base):
    net, opened = make_network(base, row_tokens=64)
    split = make_split(opened)
    rows = net.rows(split.lengths, np.random.default_rng(0).permutation(12))
    assert sorted(np.concatenate(rows).tolist()) == list(range(12))
    assert all(split.lengths[row].sum() <= net.row_tokens for row in rows)
    assert [row.tolist() for row in rows] == [row.tolist() for row in net.rows(split.lengths, np.arange(12))]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_on_cases_done_by_hand():
    labels, predictions = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    found = finetuner.measure(("accuracy", "f1", "macro_f1", "matthews_correlation"), labels, predictions)
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "f1": 2 / 3, "macro_f1": 2 / 3, "matthews_correlation": (2 * 2 - 1 * 1) / 9}
    )
    found = finetuner.measure(("pearson", "spearman"), np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 10.0]))
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))


def test_metrics_have_a_value_when_a_class_is_never_predicted():
    ones = np.ones(4, dtype=int)
    found = finetuner.measure(("accuracy", "f1", "macro_f1", "matthews_correlation"), np.array([0, 1, 0, 1]), 0 * ones)
    assert found == pytest.approx({"accuracy": 0.5, "f1": 0.0, "macro_f1": 1 / 3, "matthews_correlation": 0.0})
    assert finetuner.measure(("f1",), 0 * ones, 0 * ones) == {"f1": 0.0}
    assert finetuner.measure(("pearson", "spearman"), np.arange(4.0), np.ones(4)) == {"pearson": 0.0, "spearman": 0.0}


def test_figures_of_the_results_stand_apart():
    cell = {"median": -0.0461, "min": -0.0481, "max": -0.0441, "n": 2}
    lines = finetuner.results_table({"pretrained": {"validation": {"pearson": cell, "spearman": cell}}}).splitlines()
    assert (
        lines[1].split("  ")[-1].strip() == "-0.0461 (-0.0481 to -0.0441)"
        and lines[1].count("  -0.0461 (-0.0481 to -0.0441)") == 2
    )
    assert len(lines[0]) == len(lines[1])


def test_glue_averages():
    medians = {
        "mnli": {"validation_matched": {"accuracy": 0.8}, "validation_mismatched": {"accuracy": 0.9}},
        "mrpc": {"test_labelled": {"accuracy": 0.7, "f1": 0.8}},
        "stsb": {"validation": {"pearson": 0.1, "spearman": 0.6}},
    }
    scores = finetuner.glue_scores(medians)
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
    assert finetuner.answer_scores(text, answers) == pytest.approx((f1, exact))


def test_null_threshold_is_the_best_on_dev():
    difference, answered, empty = (
        np.array([-3.0, -1.0, 0.5, 2.0]),
        np.array([1.0, 0.5, 0.9, 0.0]),
        np.array([0.0, 0.0, 0.0, 1.0]),
    )
    threshold = finetuner.null_threshold(difference, answered, empty)
    assert 0.5 <= threshold < 2.0

    def total(t):
        return np.where(difference > t, empty, answered).sum()

    assert total(threshold) == max(total(t) for t in (-4, -3, -1, 0.5, 2.0))
    assert finetuner.null_threshold(difference, 0 * answered, 1 + 0 * empty) < -3  # never answers


def test_candidates_obey_order_length_and_context():
    offsets = np.array([[-1, -1], [-1, -1], [0, 3], [4, 7], [8, 11], [-1, -1]])
    logits = np.full((2, 6), -9.0)
    logits[0, [1, 2, 4]] = 9.0, 3.0, 5.0  # the question's token must not win
    logits[1, [2, 3, 4]] = 6.0, 4.0, 1.0
    logits[:, 0] = 1.5
    null, found = finetuner.candidates(logits, offsets, max_answer=2)
    assert null == pytest.approx(3.0)
    assert found[0] == (pytest.approx(9.0), 0, 3) and found[1] == (pytest.approx(7.0), 0, 7)
    assert all(0 <= first < end and end - first <= 7 for _, first, end in found)
    spans = finetuner.Spans(np.array([0]), offsets, ["who saw it"], [["who"]])
    ranked, difference = finetuner.best_answers([(null, found)], spans)
    assert [answer["text"] for answer in ranked[0][:2]] == ["who", "who saw"] and difference[0] == pytest.approx(-6.0)


def test_windows_share_one_list_of_answers():
    offsets = np.array([[0, 3], [4, 7], [0, 3]])
    spans = finetuner.Spans(np.array([0, 0, 1]), offsets, ["who saw it", "unread"], [["who"], []])
    ranked, difference = finetuner.best_answers(
        [(3.0, [(5.0, 0, 3)]), (1.0, [(7.0, 4, 7), (6.0, 0, 3)]), (2.0, [])], spans
    )
    assert ranked[0] == [
        {"text": "saw", "score": 7.0},
        {"text": "who", "score": 6.0},
    ]  # each text once, at its best score
    assert difference[0] == pytest.approx(1.0 - 7.0)  # the lowest of the windows' null scores
    assert ranked[1][0]["text"] == "" and difference[1] == math.inf  # no span at all: no answer


def test_windows_cover_the_context(base):
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    context = " ".join(WORDS * 4)
    start = context.index("snow", 300)
    rows = Dataset.from_list(
        [
            {
                "id": "q",
                "question": "who saw it",
                "context": context,
                "answers": {"text": ["snow wind"], "answer_start": [start]},
            }
        ]
    )
    split = finetuner.encode_questions(rows, ["question", "context"], tokenizer, max_length=38, stride=8)
    room = 38 - 3 - 3  # without [CLS], two [SEP] and the question
    assert len(split.ends) == 1 + math.ceil((4 * len(WORDS) - room) / (room - 8))
    seen = {tuple(pair) for pair in split.spans.offsets.tolist() if pair[0] >= 0}
    assert len(seen) == 4 * len(WORDS)  # every word of the context is in some window
    texts = []
    for window, (first, last) in enumerate(split.labels):
        offsets = split.of(split.spans.offsets, window)
        texts.append(context[offsets[first, 0] : offsets[last, 1]] if first else "")
    assert set(texts) == {"", "snow wind"}


def make_questions(number: int, v2: bool) -> list[dict]:
    rows = []
    for i, row in enumerate(make_rows(number, 7)):
        text = "story" if "story" in row["text"] else row["text"].split()[1]
        answers = (
            {"text": [], "answer_start": []}
            if v2 and i % 3 == 0
            else {"text": [text], "answer_start": [row["text"].index(text)]}
        )
        rows.append({"id": f"q{i}", "question": "who saw it", "context": row["text"], "answers": answers})
    return rows


def test_squad_v2_from_end_to_end(base, tmp_path):
    data = write_jsonl(tmp_path / "squad", train=make_questions(32, True), validation=make_questions(12, True))
    run = go(base, tmp_path, "--data.dataset", data, task="squad_v2")
    report = json.loads((run / "metrics.json").read_text())
    assert {"f1", "exact_match", "null_threshold"} <= set(report["model"]["metrics"]["validation"])
    answers = json.loads((run / "predictions" / "validation.json").read_text())
    assert set(answers) == {f"q{i}" for i in range(12)}
    ranked = json.loads((run / "predictions" / "validation_nbest.json").read_text())
    assert all(
        answers[name] in ("", ranked[name][0]["text"]) and len(ranked[name]) <= finetuner.N_BEST for name in answers
    )
    AutoModelForQuestionAnswering.from_pretrained(run / "model", trust_remote_code=True)


# ---------------------------------------------------------------------------------------------------------------------
# Labels and data


def test_labels_keep_order_and_names():
    task = TASKS["mnli"]
    labels, classes = finetuner.number_labels(
        {"train": [2, 0, 1], "test": [-1, -1], "validation": ["neutral", None]}, task, list(task.classes), custom=False
    )
    assert classes == ["entailment", "neutral", "contradiction"]
    assert [labels[split].tolist() for split in ("train", "test", "validation")] == [[2, 0, 1], [-1, -1], [1, -1]]
    custom = TASKS["custom"]
    labels, classes = finetuner.number_labels(
        {"train": [-1, 1, 0], "test": [-1, -1]}, custom, None, custom=True
    )  # -1 is a class of one's own
    assert classes == ["-1", "0", "1"] and labels["train"].tolist() == [0, 2, 1] and labels["test"].tolist() == [-1, -1]
    labels, classes = finetuner.number_labels({"train": ["spam", "ham"]}, custom, None, custom=True)
    assert classes == ["ham", "spam"] and labels["train"].tolist() == [1, 0]
    with pytest.raises(InputError, match="label 3, which is none of the classes entailment, neutral, contradiction"):
        finetuner.number_labels({"train": [0, 3]}, task, list(task.classes), custom=False)


def test_long_pairs_lose_the_end_of_the_longer_text_and_are_counted(base):
    opened = finetuner.open_base(base, 16)
    rows = Dataset.from_dict({"a": ["good " * 30, "bad"], "b": ["the film", "it"]})
    split, cut = finetuner.encode_texts(rows, ["a", "b"], np.array([0, 1]), opened.tokenizer, 16)
    assert cut == 1 and split.ends[0] == 16
    assert opened.tokenizer.convert_ids_to_tokens(split.tokens[:16].tolist()) == [
        "[CLS]",
        *["good"] * 11,
        "[SEP]",
        "the",
        "film",
        "[SEP]",
    ]
    parts = finetuner.cut_longest_first([np.arange(30), np.arange(2)], 13)
    assert [len(part) for part in parts] == [11, 2]


def pack(folder: Path, base: str, rows: dict[str, list[dict]], tokenizer=None) -> str:
    """Shards in the published format: [CLS] label 65535 text [SEP] text_pair [SEP], 65534 for no label."""
    tokenizer = tokenizer or finetuner.open_base(base, None).tokenizer
    folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    shards = {}
    for split, examples in rows.items():
        ids = [
            i
            for row in examples
            for i in (
                0,
                65534 if row["label"] == -1 else row["label"],
                65535,
                *tokenizer(row["text"], row["text_pair"])["input_ids"][1:],
            )
        ]
        path = folder / f"mnli_{split}_000000.bin"
        write_shard(path, np.array(ids, dtype=np.uint16))
        shards[path.name] = {"split": split, "tokens": len(ids), "documents": len(examples), "sha256": sha256_of(path)}
    write_manifest(
        folder,
        {
            "format": 1,
            "source": {},
            "split_rule": "given",
            "shards": shards,
            "tokenizer": {
                "name": "words",
                "sha256": sha256_of(folder / "tokenizer" / "tokenizer.json"),
                "vocab_size": len(tokenizer),
                "cls": 0,
                "sep": 1,
                "pad": 2,
                "mask": 3,
                "unk": 4,
            },
        },
    )
    return str(folder)


def test_packed_shards_are_the_same_examples(base, tmp_path):
    rows = {
        "train": [{**row, "label": i % 3} for i, row in enumerate(make_rows(40, 1))],
        "validation_matched": make_rows(8, 2),
        "test_matched": [{**row, "label": -1} for row in make_rows(4, 3)],
    }
    packed = pack(tmp_path / "packed", base, rows)
    text = write_jsonl(tmp_path / "text", **rows)
    for length in (None, 12):
        opened = finetuner.open_base(base, length)
        ours = finetuner.read_data("mnli", finetuner.DataConfig(dataset=packed), opened)
        theirs = finetuner.read_data(
            "mnli", finetuner.DataConfig(dataset=text, text="text", text_pair="text_pair"), opened
        )
        for split in rows:
            assert np.array_equal(ours.splits[split].tokens, theirs.splits[split].tokens)
            assert np.array_equal(ours.splits[split].labels, theirs.splits[split].labels)
        assert ours.dev == "validation_matched" and not ours.splits["test_matched"].known.any()
    with pytest.raises(InputError, match="not that of the base model"):
        finetuner.read_data(
            "mnli",
            finetuner.DataConfig(dataset=pack(tmp_path / "other", base, rows, make_tokenizer(WORDS[::-1]))),
            opened,
        )


def test_a_float_label_makes_a_regression_and_a_tenth_of_train_is_held_out(base, tmp_path):
    (tmp_path / "stars.csv").write_text(
        "review,stars\n" + "".join(f"{row['text']},{row['label'] + 0.5}\n" for row in make_rows(60, 1))
    )
    run = go(
        base, tmp_path, "--data.dataset", str(tmp_path / "stars.csv"), "--data.text", "review", "--data.label", "stars"
    )
    report = json.loads((run / "metrics.json").read_text())
    assert (
        report["kind"] == "number"
        and {name: split["examples"] for name, split in report["splits"].items()} == {"train": 54, "validation": 6}
        and "held out" in report["notes"][0]
    )
    assert set(report["results"]["pretrained"]["validation"]) == {"pearson", "spearman"}
    assert (
        AutoModelForSequenceClassification.from_pretrained(run / "model", trust_remote_code=True).config.num_labels == 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_learns_and_reports_beside_majority_and_random_weights(finished):
    report = json.loads((finished / "metrics.json").read_text())
    assert set(report["results"]) == {"pretrained", "random weights", "majority class"}
    assert report["results"]["majority class"]["validation"]["accuracy"]["median"] == 0.5
    assert report["model"]["metrics"]["validation"]["accuracy"] > 0.8
    lines = [line for line in (finished / "log.txt").read_text().splitlines() if line.startswith("task:custom")]
    assert lines and all(finetuner.LOG_LINE.match(line) for line in lines)
    assert "random weights" in (finished / "log.txt").read_text()


def test_the_folder_predicts_what_the_run_reported(finished, films):
    model = AutoModelForSequenceClassification.from_pretrained(finished / "model", trust_remote_code=True)
    assert model.config.id2label == {0: "0", 1: "1"}
    tokenizer = AutoTokenizer.from_pretrained(finished / "model", trust_remote_code=True)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for split in ("validation", "test"):  # test has no labels
        rows = [json.loads(line) for line in (Path(films) / f"{split}.jsonl").read_text().splitlines()]
        found = [answer["label"] for answer in classify([row["text"] for row in rows], batch_size=8)]
        header, *lines = (finished / "predictions" / f"{split}.tsv").read_text().splitlines()
        assert header == "index\tprediction"
        assert [line.split("\t") for line in lines] == [[str(row["idx"]), label] for row, label in zip(rows, found)]
    labels = [json.loads(line)["label"] for line in (Path(films) / "validation.jsonl").read_text().splitlines()]
    said = [
        int(line.split("\t")[1]) for line in (finished / "predictions" / "validation.tsv").read_text().splitlines()[1:]
    ]
    accuracy = json.loads((finished / "metrics.json").read_text())["model"]["metrics"]["validation"]["accuracy"]
    assert np.mean(np.array(said) == labels) == pytest.approx(accuracy)


def test_the_card_carries_the_results(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "model" / "README.md")
    report = json.loads((finished / "metrics.json").read_text())
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["validation", "accuracy"] == pytest.approx(
        report["model"]["metrics"]["validation"]["accuracy"], abs=1e-4
    )


def test_predictions_are_named_as_the_server_wants(tmp_path):
    def write(task: str, split: str, values, classes: list[str]) -> list[str]:
        content = finetuner.Split(np.zeros(0, np.int32), None, np.zeros(2), np.zeros(2), np.zeros(2, bool), [0, 1])
        data = finetuner.Data(task, TASKS[task], "glue", {split: content}, classes, "validation", [], 30)
        finetuner.write_predictions(tmp_path, data, {split: np.array(values)})
        return (tmp_path / f"{TASKS[task].files[split]}.tsv").read_text().splitlines()

    assert write("mnli", "test_mismatched", [2, 0], list(TASKS["mnli"].classes)) == [
        "index\tprediction",
        "0\tcontradiction",
        "1\tentailment",
    ]
    assert write("cola", "test", [1, 0], list(TASKS["cola"].classes))[1:] == ["0\t1", "1\t0"]
    assert write("stsb", "test", [5.2, 3.14159], ["score"])[1:] == ["0\t5.000", "1\t3.142"]
    names = {name for task in finetuner.GLUE for name in TASKS[task].files.values()}
    assert names == {"MNLI-m", "MNLI-mm", "AX", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"}


@pytest.mark.parametrize(
    "trainable, layers", [("classifier", []), ("last_2", [2, 3]), ("last_3", [1, 2, 3]), ("all", [0, 1, 2, 3])]
)
def test_what_is_not_trainable_stays(base, films, trainable, layers):
    net, opened = make_network(base)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    data = finetuner.read_data("custom", finetuner.DataConfig(dataset=films, max_train_examples=16), opened)
    finetuner.finetune(
        net,
        data,
        FinetuneConfig(trainable=trainable, epochs=2, batch_size=8, lr=1e-3, log_every=2),
        finetuner.Place(0, 1, torch.device("cpu")),
        None,
        "",
    )
    moved = {name for name, tensor in net.model.state_dict().items() if not torch.equal(tensor, before[name])}
    head = {"dense.weight", "classifier.weight", "classifier.bias"}
    blocks = {name for name in before if any(name.startswith(f"encoder.blocks.{layer}.") for layer in layers)}
    expected = set(before) if trainable == "all" else head | blocks
    assert moved == expected
    assert sum(p.numel() for p in net.model.parameters() if p.requires_grad) == sum(
        before[name].numel() for name in expected
    )


# ---------------------------------------------------------------------------------------------------------------------
# Grids, seeds, protocols, other encoders


def test_protocols():
    settings = finetuner.PROTOCOLS["sane"].settings
    assert (settings["train.lr"], settings["train.batch_size"], settings["train.epochs"], settings["train.seeds"]) == (
        4e-5,
        16,
        5.0,
        5,
    )
    protocol = finetuner.PROTOCOLS["modernbert"]
    cells = finetuner.grid_of(protocol, "cola", set(), FinetuneConfig())
    assert len(cells) == 48 and {cell.epochs for cell in cells} == {2.0, 5.0, 10.0}
    assert {cell.epochs for cell in finetuner.grid_of(protocol, "rte", set(), FinetuneConfig())} == {1.0, 2.0, 3.0}
    assert len(finetuner.grid_of(protocol, "rte", {"train.lr", "train.epochs"}, FinetuneConfig())) == 4
    assert [
        cell.seed
        for cell in finetuner.grid_of(finetuner.PROTOCOLS["default"], "rte", set(), FinetuneConfig(seeds=3, seed=5))
    ] == [5, 6, 7]


def test_a_half_done_grid_is_resumed(base, films, tmp_path):
    flags = [
        "--data.dataset",
        films,
        "--data.max_train_examples",
        "32",
        "--train.seeds",
        "3",
        "--train.patience",
        "1",
        "--train.evals_per_epoch",
        "2",
    ]
    run = go(base, tmp_path, *flags)
    records = (run / "runs.jsonl").read_text().splitlines()
    report = json.loads((run / "metrics.json").read_text())
    assert len(records) == 3 and report["results"]["pretrained"]["validation"]["accuracy"]["n"] == 3
    (run / "metrics.json").unlink()
    first = {**json.loads(records[0]), "seconds": 12345.0}  # recognisable
    (run / "runs.jsonl").write_text(json.dumps(first) + "\n" + json.dumps({**json.loads(records[1])}) + "\n")
    assert go(base, tmp_path, *flags, "--train.resume") == run
    again = [json.loads(line) for line in (run / "runs.jsonl").read_text().splitlines()]
    assert again[0]["seconds"] == 12345.0 and len(again) == 3
    assert again[2]["metrics"] == json.loads(records[2])["metrics"]
    assert json.loads((run / "metrics.json").read_text())["results"] == report["results"]
    with pytest.raises(InputError, match="holds a run already"):
        go(base, tmp_path, *flags)


def test_glue_runs_what_is_there_and_hands_mnli_over(base, tmp_path, capsys):
    def rows(first: str, second: str, number: int, classes: int, seed: int) -> list[dict]:
        return [
            {first: row["text"], second: row["text_pair"], "label": i % classes}
            for i, row in enumerate(make_rows(number, seed))
        ]

    write_jsonl(
        tmp_path / "glue" / "mnli",
        train=rows("premise", "hypothesis", 24, 3, 1),
        validation_matched=rows("premise", "hypothesis", 9, 3, 2),
        validation_mismatched=rows("premise", "hypothesis", 9, 3, 3),
    )
    write_jsonl(
        tmp_path / "glue" / "rte",
        train=rows("sentence1", "sentence2", 16, 2, 1),
        validation=rows("sentence1", "sentence2", 8, 2, 2),
    )
    run = go(
        base,
        tmp_path,
        "--data.dataset",
        str(tmp_path / "glue"),
        "--protocol",
        "modernbert",
        "--train.lr",
        "1e-4",
        "--train.weight_decay",
        "0",
        task="glue",
    )
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    reports = {task: json.loads((run / task / "metrics.json").read_text()) for task in ("mnli", "rte")}
    assert scores["MNLI-mm"] == pytest.approx(
        100 * reports["mnli"]["results"]["pretrained"]["validation_mismatched"]["accuracy"]["median"]
    )
    assert reports["rte"]["base_model"] == str(run / "mnli" / "model") and scores["CoLA"] is None
    header, _, row = capsys.readouterr().out.split("tasks\n")[1].splitlines()[:3]
    assert header.startswith("| model | MNLI-m |") and row.startswith(
        "| pretrained | "
    )  # named for the run that it started from
    with pytest.raises(InputError, match="run finetuner.py --task mnli first"):
        finetuner.mnli_model(tmp_path, "somebody/else")


def test_from_hub_to_hub(base, tmp_path):
    """Base model and MNLI come from the Hub, the finetuned model goes there, with the answers to all three test sets on disk."""

    def rows(number: int, seed: int, labelled: bool = True) -> list[dict]:
        return [
            {"premise": row["text"], "hypothesis": row["text_pair"], "label": i % 3 if labelled else -1, "idx": i}
            for i, row in enumerate(make_rows(number, seed))
        ]

    def parquet(split: str, table: list[dict]) -> bytes:
        Dataset.from_list(table).to_parquet(tmp_path / f"{split}.parquet")
        return (tmp_path / f"{split}.parquet").read_bytes()

    mnli = {
        "train": rows(32, 1),
        "validation_matched": rows(9, 2),
        "validation_mismatched": rows(9, 3),
        "test_matched": rows(7, 4, False),
        "test_mismatched": rows(7, 5, False),
    }
    configs = {"mnli": {split: f"mnli/{split}.parquet" for split in mnli}, "ax": {"test": "ax/test.parquet"}}
    header = {
        "configs": [
            {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
            for name, files in configs.items()
        ]
    }
    with Hub() as hub:
        hub.add(
            "dataset",
            "nyu-mll/glue",
            {
                "README.md": f"---\n{json.dumps(header)}\n---\n".encode(),
                "ax/test.parquet": parquet("test", rows(5, 6, False)),
                **{configs["mnli"][split]: parquet(split, table) for split, table in mnli.items()},
            },
        )
        hub.add("model", "me/base", {path.name: path.read_bytes() for path in Path(base).iterdir()})
        ended = run_python(
            "finetuner.py",
            "--train.base_model",
            "me/base",
            "--train.hf_model_name",
            "me/tuned",
            "--train.out",
            str(tmp_path / "out"),
            "--train.run_name",
            "run",
            *QUICK,
            env=hub.environment(tmp_path),
        )
        assert ended.returncode == 0, ended.stderr
        code = (
            "from transformers import pipeline; classify = pipeline('text-classification', 'me/tuned', trust_remote_code=True, device='cpu'); "
            "print(classify({'text': 'the film', 'text_pair': 'was good'})['label'])"
        )
        loaded = run_python("-c", code, env=hub.environment(tmp_path))
        assert loaded.stdout.strip().split("\n")[-1] in TASKS["mnli"].classes, loaded.stderr
        card = hub.files("model", "me/tuned")["README.md"].decode()
    assert "base_model: me/base" in card and "validation_mismatched" in card
    lines = {
        name: len((tmp_path / f"out/run/predictions/{name}.tsv").read_text().splitlines())
        for name in ("MNLI-m", "MNLI-mm", "AX")
    }
    assert lines == {"MNLI-m": 8, "MNLI-mm": 8, "AX": 6}


SHAPE = dict(
    vocab_size=len(SPECIALS + WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=2,
)
OTHERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHAPE, cls_token_id=0, sep_token_id=1, bos_token_id=0, eos_token_id=1)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_encoders_are_measured_the_same_way(films, tmp_path, kind):
    torch.manual_seed(0)
    folder, tokenizer = tmp_path / kind, make_tokenizer(WORDS)
    OTHERS[kind]().save_pretrained(folder)
    if kind == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    run = go(
        str(folder), tmp_path, "--data.dataset", films, "--data.text_pair", "text_pair", "--train.trainable", "last_2"
    )
    report = json.loads((run / "metrics.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(run / "model"), device="cpu"
    )
    rows = [json.loads(line) for line in (Path(films) / "validation.jsonl").read_text().splitlines()]
    found = [int(classify({"text": row["text"], "text_pair": row["text_pair"]})["label"]) for row in rows]
    assert np.mean(np.array(found) == [row["label"] for row in rows]) == pytest.approx(
        report["model"]["metrics"]["validation"]["accuracy"]
    )


def test_the_newest_pretraining_run_is_the_default_base(base, finished, tmp_path):
    out = Path(base).parent.parent
    assert finetuner.newest_run(out, "micro") == Path(base)
    with pytest.raises(InputError, match="no finished pretraining run"):
        finetuner.newest_run(finished.parent, "base")  # holds a finetuned model only


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_said_in_one_sentence(base, films, tmp_path):
    def said(*flags: str, task: str = "custom", start: str = base) -> str:
        with pytest.raises(InputError) as caught:
            go(start, tmp_path / "out", *flags, task=task)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "its columns are text, text_pair, label, idx" in said("--data.dataset", films, "--data.text", "review")
    (tmp_path / "empty.csv").touch()
    assert "is empty" in said("--data.dataset", str(tmp_path / "empty.csv"))
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "no rows" in said("--data.dataset", str(tmp_path / "header.csv"))
    bad = write_jsonl(
        tmp_path / "bad", train=make_rows(20, 1), validation=[{**row, "label": 7} for row in make_rows(4, 2)]
    )
    assert "label 7, which is none of the classes 0, 1" in said("--data.dataset", bad)
    assert "give --train.base_model" in said("--data.dataset", films, start=str(tmp_path / "nothing"))
    assert "no file or folder" in said("--data.dataset", str(tmp_path / "nothing.csv"))
    assert "nothing to tell apart" in said(
        "--data.dataset", write_jsonl(tmp_path / "one", train=[{**row, "label": 1} for row in make_rows(20, 1)])
    )
    assert not (tmp_path / "out").exists()  # none of them left a run behind


def test_a_model_of_another_model_py_is_refused(base, films, tmp_path):
    shutil.copytree(base, tmp_path / "older")
    weights = load_file(tmp_path / "older" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "qk_bias" not in name},
        tmp_path / "older" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match="has no encoder.blocks.1.attention.qk_bias: it was trained by another model.py"
    ):
        go(str(tmp_path / "older"), tmp_path, "--data.dataset", films)


def test_bad_input_ends_every_rank(base, tmp_path):
    ended = run_python(
        "finetuner.py",
        "--task",
        "custom",
        "--train.base_model",
        base,
        "--train.out",
        str(tmp_path),
        "--data.dataset",
        str(tmp_path / "nothing.csv"),
        processes=2,
    )
    assert ended.returncode != 0 and ended.stderr.count("error: no file or folder") == 2


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data on this machine")
def test_real_files_are_read(base):
    opened = finetuner.open_base(base, 32)
    mnli = finetuner.read_data(
        "mnli", finetuner.DataConfig(dataset=str(SHARED / "nli"), max_train_examples=100), opened
    )
    assert (
        mnli.dev == "validation"
        and len(mnli.splits["validation_matched"].ends) == 9815
        and mnli.classes[2] == "contradiction"
    )
    mrpc = finetuner.read_data("mrpc", finetuner.DataConfig(dataset=str(SHARED / "glue")), opened)
    assert (
        mrpc.dev == "validation" and len(mrpc.splits["test_labelled"].ends) == 1725
    )  # a tenth of train is held out to choose by
    sts = finetuner.read_data("stsb", finetuner.DataConfig(dataset=str(SHARED / "glue" / "sts")), opened)
    assert sts.task.kind == "number" and sts.splits["train"].labels.max() == 5.0
