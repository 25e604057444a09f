"""Replaced-token detection: what is drawn, the loss, validation, ranks, resume and the models that it leaves."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, pipeline

import finetuner
import trainer
from conftest import (
    SPECIALS,
    TINY_SHAPE,
    as_flags,
    flags,
    lines,
    losses,
    metrics_of,
    run_python,
    sentences,
    write_documents,
)
from dataloading import InputError, Loader, frozen_mask, frozen_words, read_manifest, sha256_of
from model import KBERTConfig, KBERTForReplacedTokenDetection, draw_words, soft_cap
from objectives import MaskedLM, ReplacedTokenDetection, detection_scores, mask_count
from records.log import GENERATOR_AND_DETECTOR, MASKED_LAST_LAYER, WHOLE_LAST_LAYER, Work, read_log
from records.verify import check_run, check_track

RTD = (
    "--train.objective rtd --train.detection_weight 10 --train.replace_rate 0.3 --train.steps 40 --train.save_every 20"
)


@pytest.fixture(scope="module")
def detected(corpus, tmp_path_factory):
    """A run of 40 steps with a checkpoint at 20."""
    out = tmp_path_factory.mktemp("runs")
    trainer.main(flags(corpus, out, "detected", RTD))
    return out / "detected"


def small_objective(**changed) -> ReplacedTokenDetection:
    shape = {name.removeprefix("model."): value for name, value in TINY_SHAPE.items()}
    config = KBERTConfig(vocab_size=64, mask_token_id=SPECIALS["mask"], pad_token_id=SPECIALS["pad"], **shape)
    torch.manual_seed(0)
    objective = ReplacedTokenDetection(config, 1, 100, **{"generator_layers": 1, "detection_weight": 10.0, **changed})
    for p in objective.network.parameters():
        torch.nn.init.normal_(p, std=0.2 / config.weight_multiplier if p.ndim == 2 else 0.2)
    objective.prepare(torch.device("cpu"), torch.float32, compiled=False)
    return objective


def test_words_are_drawn_with_the_probabilities_of_softmax():
    """300 words in three blocks of 128: evenly spaced numbers draw each as often as it is likely."""
    V, cap, draws = 300, 30.0, 100_000
    logits = torch.randn(1, 384, generator=torch.Generator().manual_seed(0)) * 3
    weights = torch.where(torch.arange(384) < V, (logits * soft_cap(logits, cap)).exp(), 0.0)
    sums = weights.unflatten(1, (-1, 128)).sum(-1)
    uniform = (torch.arange(draws) + 0.5) / draws
    words = draw_words(logits.expand(draws, -1), sums.expand(draws, -1), uniform, cap, V)
    drawn = torch.bincount(words, minlength=384) / draws
    torch.testing.assert_close(drawn, weights[0] / weights.sum(), atol=2e-5, rtol=0)


def test_the_loss_is_that_of_two_plain_models_one_after_the_other(corpus):
    """By their padded forward, a document at a time; and drawing words changes no loss of the generator."""
    objective = small_objective()
    row = next(iter(Loader(corpus, read_manifest(corpus), "train", 256, 100, seed=1)))
    count, text = mask_count(0.15, 256), row.round_text[0]
    detect, seen = objective.detect, []
    objective.detect = lambda filled, *rest, **call: seen.append(filled) or detect(filled, *rest, **call)
    loss, measures = objective.loss(row, count, 16, count, text)
    (filled,) = seen
    masked = MaskedLM(objective.generator.config, 1, 100)
    masked.model.load_state_dict(objective.generator.state_dict())
    masked.prepare(torch.device("cpu"), torch.float32, compiled=False)
    _, (generator_loss,) = masked.loss(row, count, 16, count, text)
    replaced = filled != row.input_ids
    plain = KBERTForReplacedTokenDetection(objective.model.config)
    plain.load_state_dict(objective.parts()[""][1])
    total = 0.0
    for document in range(len(row.round_lengths)):
        place = row.document_ids == document
        logits = plain.eval()(filled[place][None]).logits[0]
        told = row.text[place]
        total += F.binary_cross_entropy_with_logits(logits[told], replaced[place][told].float(), reduction="sum")
    assert 0 < replaced.sum() <= count and not replaced[~row.text].any()
    expected = [generator_loss + 10 * total / text, generator_loss, total / text]
    torch.testing.assert_close(measures[:3], torch.stack(expected).detach(), atol=1e-4, rtol=1e-4)
    assert loss.item() == measures[0] and measures[4] == replaced.sum() / text


def test_the_detector_moves_no_weight_of_the_generator(corpus):
    gradients = []
    for weight in (1.0, 100.0):
        objective = small_objective(detection_weight=weight)
        row = next(iter(Loader(corpus, read_manifest(corpus), "train", 256, 100, seed=1)))
        objective.loss(row, 32, 16, 32, row.round_text[0])[0].backward()
        gradients.append([p.grad for p in objective.generator.parameters()])
        assert objective.embedding.weight.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_validation_replaces_the_same_words_whatever_the_rows(corpus):
    manifest, found = read_manifest(corpus), []
    for size in (128, 512):
        by_place = {}
        for row in Loader(corpus, manifest, "valid", size, 100, seed=None):
            words, ids = frozen_words(row), row.input_ids.numpy()
            masked = frozen_mask(row.offsets)
            assert (words[~masked] == ids[~masked]).all()
            for at in np.flatnonzero(masked):
                document = ids[(row.document_ids == row.document_ids[at]).numpy() & row.text.numpy()]
                assert words[at] in document
                by_place[row.offsets[at]] = int(words[at])
        found.append(by_place)
    assert found[0] == found[1] and len(set(found[0].values())) > 10


def test_detection_scores_are_those_of_every_pair():
    left, replaced = np.array([0.1, 0.1, 0.4, 0.6]), np.array([0.1, 0.6, 0.9])
    histogram = np.stack([np.bincount((x * 10).astype(int), minlength=10) for x in (left, replaced)])
    pairs = [(b > a) + (b == a) / 2 for a in left for b in replaced]
    found = detection_scores(histogram)
    assert found == pytest.approx({"val_accuracy": 5 / 7, "val_f1": 2 * 2 / (2 * 2 + 1 + 1), "val_auc": np.mean(pairs)})


def test_flops_are_those_of_both_networks():
    config = KBERTConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    small = KBERTConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    work = Work()
    work.add(np.array([100, 30]), 20, 128)
    vocabulary = 3 * 2 * 20 * 64 * config.vocab_size
    detector = work.training_flops(config, WHOLE_LAST_LAYER) - vocabulary + 3 * 2 * 130 * (64 * 64 + 64)
    generator = work.training_flops(small, MASKED_LAST_LAYER)
    assert work.training_flops(config, GENERATOR_AND_DETECTOR, 2) == pytest.approx(generator + detector)


def test_a_generator_has_half_the_layers_unless_told_otherwise():
    config = KBERTConfig(
        vocab_size=64, num_hidden_layers=3, hidden_size=64, num_attention_heads=1, intermediate_size=64
    )
    train = trainer.TrainConfig(objective="rtd")
    objective = trainer.make_objective(config, train, 100)
    assert objective.generator.config.num_hidden_layers == train.generator_layers == 2


def test_a_run_learns_to_tell_replacements(detected):
    first, *_, last = [line for line in lines(detected) if line["val_auc"]]
    assert float(last["val_auc"]) > 0.6 > float(first["val_auc"])
    assert 0.8 < float(first["val_accuracy"]) < 0.9  # its logits start at zero, which is no detection
    assert float(last["val_loss"]) < float(first["val_loss"]) - 0.3
    log = read_log(detected)
    assert list(check_run(log)) == [] and log.named("result", "val_auc") == pytest.approx(
        float(last["val_auc"]), abs=1e-4
    )
    train = metrics_of(detected)[-1]
    assert train["train_loss"] == pytest.approx(train["generator_loss"] + 10 * train["detector_loss"])
    assert 0 < train["replaced"] < 0.31 and train["detected"] > 0.7
    assert f"{float(last['val_auc']):.4f}" in (detected / "model" / "README.md").read_text()


def test_ranks_share_one_and_the_same_training(corpus, detected, tmp_path):
    result = run_python("trainer.py", *flags(corpus, tmp_path, "ranks", RTD), processes=3)
    assert result.returncode == 0, result.stderr
    assert [line["flops"] for line in lines(tmp_path / "ranks")] == [line["flops"] for line in lines(detected)]
    for kind, tolerance in (("train_loss", 0.1), ("val_loss", 0.01), ("val_accuracy", 0.01), ("val_auc", 0.01)):
        assert losses(tmp_path / "ranks", kind) == pytest.approx(losses(detected, kind), abs=tolerance)
    alone, together = ([m["replaced"] for m in metrics_of(run)] for run in (detected, tmp_path / "ranks"))
    assert together == pytest.approx(alone, abs=0.01)


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(corpus, detected, tmp_path):
    shutil.copytree(detected, tmp_path / "killed")
    for gone in ("model", "generator", "checkpoints/step-000040"):
        shutil.rmtree(tmp_path / "killed" / gone)
    trainer.main(flags(corpus, tmp_path, "killed", RTD, "--train.resume auto"))
    for file in ("model", "generator", "checkpoints/step-000040", "checkpoints/step-000040/generator"):
        path = f"{file}/model.safetensors"
        assert (tmp_path / "killed" / path).read_bytes() == (detected / path).read_bytes()


def test_a_run_is_not_continued_by_another_objective(corpus, detected, tmp_path):
    shutil.copytree(detected, tmp_path / "other")
    checkpoint = tmp_path / "other" / "checkpoints" / "step-000020"
    with pytest.raises(InputError, match=r"other settings \(objective, generator_layers\)"):
        trainer.main(flags(corpus, tmp_path, "other", "--train.resume", checkpoint))


def test_what_is_saved_opens_as_other_models_do(detected):
    """The detector whole, its embedding the sum of both, and the generator as a masked LM."""
    detector = AutoModelForPreTraining.from_pretrained(detected / "model", trust_remote_code=True)
    generator = AutoModelForMaskedLM.from_pretrained(detected / "generator", trust_remote_code=True)
    assert detector.config.num_hidden_layers == 2 and generator.config.num_hidden_layers == 1
    ids = torch.tensor([[0, 10, 11, 12, 1]])
    labels = torch.tensor([[-100, 0, 1, 0, -100]])
    out = detector.eval()(ids, labels=labels)
    assert out.logits.shape == (1, 5)
    expected = F.binary_cross_entropy_with_logits(out.logits[0, 1:4], labels[0, 1:4].float())
    torch.testing.assert_close(out.loss, expected)
    assert not torch.equal(detector.get_input_embeddings().weight, generator.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="detects replaced words and predicts none: load the generator beside it"):
        AutoModelForMaskedLM.from_pretrained(detected / "model", trust_remote_code=True)


def test_a_detector_is_found_and_finetuned_and_its_generator_fills_masks(word_tokenizer, tmp_path):
    """As any other run: the newest one serves the finetuner; the generator is a masked LM for pipelines and judges."""
    shards, digest = {"train": [sentences(1, 200, 17)], "valid": [sentences(3, 40, 17)]}, "tokenizer.json"
    data = write_documents(tmp_path / "data", shards, vocab_size=17, tokenizer=sha256_of(word_tokenizer / digest))
    shutil.copytree(word_tokenizer, data / "tokenizer")
    out = tmp_path / "logs"
    trainer.main(flags(data, out, "found", RTD, "--train.steps 2 --train.save_every 0"))
    generator = str(out / "found" / "generator")
    (best, *_) = pipeline("fill-mask", generator, trust_remote_code=True, device="cpu")("the cat [MASK] on a mat")
    assert len(best["token_str"]) > 0
    pairs, films = tmp_path / "pairs.jsonl", tmp_path / "films.csv"
    pairs.write_text('{"sentence_good": "the cat sat", "sentence_bad": "cat the sat"}\n' * 4)
    films.write_text("text,label\n" + "the cat sat,1\na dog ran,0\n" * 20)
    asked = {
        "blimp": {"data.dataset": pairs, "train.base_model": generator},
        "custom": {"data.dataset": films, "train.epochs": 1, "train.optimizer": "muon"},
    }
    for task, settings in asked.items():
        common = {"task": task, "train.run_name": task, "train.out": out, "train.device": "cpu", "train.compile": False}
        finetuner.main(as_flags(common | settings))
        report = json.loads((out / task / "metrics.json").read_text())
        assert report["results"]["pretrained"]
    assert report["base_model"] == str(out / "found" / "model")


def test_hooks_on_a_detectors_embedding_take_effect():
    encoder, token = small_objective().model.encoder, torch.arange(128)
    row = token % 60, token * 0, token
    assert not torch.equal(encoder.encode(*row, 128)[0], encoder.encode(*row, 128)[1])
    encoder.get_input_embeddings().register_forward_hook(lambda module, ids, states: states * 0)
    assert (encoder.encode(*row, 128) == 0).all()


def test_validation_holds_the_graph_of_one_row(corpus):
    """Of two, a GPU whose memory the training fills has no room."""
    objective, manifest = small_objective(), read_manifest(corpus)
    loader = Loader(corpus, manifest, "valid", 256, 100, seed=None)
    detect, kept = objective.detect, []

    def watched(*rest, **call):
        assert not any(score() is not None for score in kept)
        loss, scores = detect(*rest, **call)
        kept.append(weakref.ref(scores))
        return loss, scores

    objective.detect = watched
    objective.validate(loader, 16, lambda *sums: list(sums))
    assert len(kept) > 1


def test_a_track_of_validation_loss_takes_masking_alone(detected):
    log = read_log(detected)
    track = {"data": {"validation": {}}, "hardware": {}, "target": {"metric": "val_loss"}}
    track["data"] |= {"hash": log.named("data", "hash"), "tokenizer_sha256": log.named("data", "tokenizer")}
    track["data"]["validation"] = log.named("data", "validation")
    track["max_length"] = 100
    (problem,) = check_track(log, track)
    assert "the track's target is the val_loss of mlm" in problem
