"""What people do with the model in the Hugging Face world: padded batches, pipelines, saved folders, export."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.export import Dim

from conftest import LENGTHS, ROOT, VOCAB, row_of, tiny
from model import (
    KBERTConfig,
    KBERTForMaskedLM,
    KBERTForMultipleChoice,
    KBERTForQuestionAnswering,
    KBERTForReplacedTokenDetection,
    KBERTForSequenceClassification,
    KBERTForTokenClassification,
    KBERTModel,
    Linear,
)
from trainer import save_model

HEADS = (
    KBERTForMaskedLM,
    KBERTForSequenceClassification,
    KBERTForTokenClassification,
    KBERTForMultipleChoice,
    KBERTForQuestionAnswering,
    KBERTForReplacedTokenDetection,
)


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-export.txt")


def padded(lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S] of the texts of row_of(lengths). mixed: the second half are padded left."""
    ids, documents, _ = row_of(lengths)
    S = max(lengths)
    batch, mask = torch.full((len(lengths), S), 2), torch.zeros(len(lengths), S, dtype=torch.long)
    for number, length in enumerate(lengths):
        left = side == "left" or side == "mixed" and number >= len(lengths) // 2
        place = slice(S - length, S) if left else slice(0, length)
        batch[number, place], mask[number, place] = ids[documents == number], 1
    return {"input_ids": batch, "attention_mask": mask}


def inputs_of(cls: type, lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """As the head takes them: of multiple choice [B / 2, 2, S]."""
    inputs = padded(lengths, side)
    return {k: x.unflatten(0, (-1, 2)) for k, x in inputs.items()} if cls is KBERTForMultipleChoice else inputs


def logits_of(model, inputs: dict) -> torch.Tensor:
    out = model(**inputs)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left", "mixed"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("cls", HEADS)
def test_every_head_agrees_with_the_packed_row(cls, pooling, side, attention):
    model = tiny(cls, classifier_pooling=pooling, num_labels=3)
    model.set_attn_implementation(attention)
    ids, documents, positions = row_of(LENGTHS)
    hidden = model.encoder.encode(ids, documents, positions, max_seqlen=max(LENGTHS))  # [T, d]
    texts = [hidden[documents == number] for number in range(len(LENGTHS))]
    inputs = inputs_of(cls, LENGTHS, side)
    got, inside = logits_of(model, inputs), inputs["attention_mask"].bool()
    if cls in (KBERTForSequenceClassification, KBERTForMultipleChoice):
        pooled = torch.stack([text[0] if pooling == "cls" else text.mean(0) for text in texts])
        expected, got = model.classify(pooled), got.reshape(len(LENGTHS), -1)
    else:
        heads = {KBERTForMaskedLM: "logits", KBERTForReplacedTokenDetection: "logits"}
        heads |= {KBERTForTokenClassification: "classify"}
        head = getattr(model, heads.get(cls, "span_logits"))
        out = head(hidden[: sum(LENGTHS)])
        expected, got = torch.stack(out, -1) if isinstance(out, tuple) else out, got[inside]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", HEADS)
def test_texts_without_a_token_give_finite_numbers_in_every_dtype(cls, dtype, attention):
    model = tiny(cls).to(dtype)
    model.set_attn_implementation(attention)
    inputs = inputs_of(cls, LENGTHS)
    inputs["attention_mask"][0] = 0
    assert torch.isfinite(logits_of(model, inputs)).all()


def test_hidden_states_and_attentions_are_recorded_or_refused():
    model, inputs = tiny(), padded(LENGTHS)
    with pytest.raises(ValueError, match="output_attentions needs eager attention"):
        model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(len(LENGTHS), 4, max(LENGTHS)))
    assert (out.attentions[0][0, :, :, 1:] == 0).all()  # the first text has one token
    for x in (*out.hidden_states, *out.attentions):
        x.retain_grad()
    out.logits.sum().backward()
    assert all(x.grad is not None for x in (*out.hidden_states, *out.attentions))


@pytest.mark.parametrize("cls", [KBERTModel, *HEADS])
def test_tuples_when_asked_for(cls):
    inputs = inputs_of(cls, LENGTHS)
    expected = tiny(cls)(**inputs)[0]
    assert torch.equal(tiny(cls)(**inputs, return_dict=False)[0], expected)
    assert torch.equal(tiny(cls, return_dict=False)(**inputs)[0], expected)


def test_embeddings_and_positions_may_be_given():
    model, inputs = tiny(), padded(LENGTHS)
    expected = model(**inputs).logits
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    got = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(got, expected)
    positions = torch.arange(max(LENGTHS))[None]
    torch.testing.assert_close(model(**inputs, position_ids=positions + 5).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(**inputs, position_ids=positions * 2).logits, expected, atol=0.1)


@pytest.mark.parametrize("cls", [KBERTModel, *HEADS])
def test_misspelt_keywords_are_refused(cls):
    inputs = inputs_of(cls, LENGTHS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_maks'"):
        tiny(cls)(inputs["input_ids"], attention_maks=inputs["attention_mask"])


def test_impossible_inputs_are_refused():
    model, ids = tiny(), torch.full((2, 7), 5)
    with pytest.raises(ValueError, match=r"attention_mask has to be \[2, 7\], .* and is \[2, 1, 7, 7\]"):
        model(ids, torch.ones(2, 1, 7, 7))
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="the texts have no tokens"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="rope_parameters are not known here"):
        KBERTConfig(rope_parameters={"rope_theta": 10_000.0})
    with pytest.raises(ValueError, match="knows checkpoints of format 3, .* not of 4"):
        KBERTConfig(checkpoint_format=4)
    with pytest.raises(ValueError, match="a vocabulary that is a multiple of 128, not of 2"):
        KBERTConfig.from_dict({"checkpoint_format": 2, "vocab_size": VOCAB})
    with pytest.raises(ValueError, match=f"input_ids go up to {VOCAB}, and there are {VOCAB}"):
        model(ids.fill_(VOCAB))


@pytest.mark.parametrize("cls", HEADS)
def test_matrices_stored_divided_are_the_same_function(tmp_path, cls):
    """Also those of a folder from before there was a multiplier: by one, of which its config.json says nothing."""
    divided, inputs = tiny(cls, vocab_size=256), inputs_of(cls, LENGTHS)
    divided.save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    own = {id(m.weight) for m in divided.modules() if isinstance(m, (Linear, torch.nn.Embedding))}
    for name, p in divided.named_parameters():
        if id(p) in own:
            weights[name] *= divided.config.weight_multiplier
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    del config["weight_multiplier"], config["checkpoint_format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = cls.from_pretrained(tmp_path).eval()
    assert whole.config.weight_multiplier == 1 and whole.config.checkpoint_format == 3
    assert torch.equal(logits_of(whole, inputs), logits_of(divided, inputs))


@pytest.mark.parametrize("cls", HEADS[:-1])  # a detector's labels are probabilities
def test_labels_out_of_range_are_refused(cls):
    model, inputs = tiny(cls, num_labels=3), inputs_of(cls, LENGTHS)
    B, S = len(inputs["input_ids"]), max(LENGTHS)
    shape = (B, S) if cls in (KBERTForMaskedLM, KBERTForTokenClassification) else (B,)
    names = ("start_positions", "end_positions") if cls is KBERTForQuestionAnswering else ("labels",)
    with pytest.raises(ValueError, match="labels go up to 999, and there are"):
        model(**inputs, **{name: torch.full(shape, 999) for name in names})


def test_hooks_on_the_embedding_take_effect_on_both_paths():
    model, row = tiny(), row_of(LENGTHS)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(row[0][None]).logits.requires_grad and model.encoder.encode(*row, 256).requires_grad


def test_gradient_checkpointing_changes_no_gradient():
    inputs = padded(LENGTHS)
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert model.is_gradient_checkpointing
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("words", [VOCAB + 10, VOCAB + 200, VOCAB - 50])
def test_a_resized_vocabulary_survives_saving(tmp_path, words):
    model, ids = tiny(), torch.randint(5, 100, (2, 9))
    before, mean = model(ids).logits, model.encoder.embed.weight[:VOCAB].mean(0)
    model.resize_token_embeddings(words)
    model.save_pretrained(tmp_path)
    loaded = KBERTForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.encoder.embed.weight
    logits = loaded(ids).logits
    assert logits.shape == (2, 9, words) and len(loaded.encoder.embed.weight) == words == loaded.config.vocab_size
    torch.testing.assert_close(logits[..., :VOCAB], before[..., :words])
    for row in loaded.encoder.embed.weight[VOCAB:words]:  # transformers draws them close around the mean
        torch.testing.assert_close(row, mean, atol=1e-5, rtol=0)


def test_another_vocabulary_than_the_weights_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        KBERTForMaskedLM.from_pretrained(tmp_path, vocab_size=190)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        KBERTForMaskedLM.from_pretrained(pretrained_model_name_or_path=tmp_path, config=tiny(vocab_size=190).config)


def test_mean_states_are_those_of_each_text_alone():
    model = tiny(KBERTModel)
    ids, documents, _ = row_of(LENGTHS)
    texts = [ids[documents == number] for number in range(len(LENGTHS))]
    expected = torch.cat([model(text[None]).last_hidden_state.mean(1) for text in texts])
    for batch_size in (3, 100):
        found = model.mean_states([text.tolist() for text in texts], batch_size)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_padded_forward_compiles_whole():
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in (LENGTHS, [9, 50]):
            inputs = padded(lengths)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_texts_longer_than_any_in_training():
    ids = torch.randint(5, VOCAB, (1, 4500))
    assert torch.isfinite(tiny(max_position_embeddings=256)(ids).logits).all()


# --- from a saved folder


@pytest.fixture
def saved(tmp_path, word_tokenizer, monkeypatch):
    """cls -> a folder with its model and a tokenizer, as the trainer saves it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def save(cls, **changed):
        tokenizer = transformers.AutoTokenizer.from_pretrained(word_tokenizer)
        model = tiny(cls, vocab_size=18, max_position_embeddings=100, **changed)
        save_model(tmp_path / "saved", model, tokenizer)
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize(
    "task, cls",
    [
        ("feature-extraction", KBERTModel),
        ("fill-mask", KBERTForMaskedLM),
        ("text-classification", KBERTForSequenceClassification),
        ("token-classification", KBERTForTokenClassification),
    ],
)
def test_pipelines_from_a_saved_folder(saved, task, cls):
    texts = ["the cat [MASK] on the mat", "a dog [MASK]"]
    answer = transformers.pipeline(task, str(saved(cls)), trust_remote_code=True)
    together = answer(texts, batch_size=2)  # padded
    for text, found in zip(texts, together):
        alone = answer(text)
        if task == "feature-extraction":
            alone, found = torch.tensor(alone)[0], torch.tensor(found)[0]
            torch.testing.assert_close(found[: len(alone)], alone, atol=1e-4, rtol=1e-4)
        else:
            alone, found = ([x] if isinstance(x, dict) else x for x in (alone, found))
            assert [x["score"] for x in found] == pytest.approx([x["score"] for x in alone], abs=1e-4)


def test_zero_shot_classification_from_nli_labels(saved):
    names = {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}}
    names["label2id"] = {label: number for number, label in names["id2label"].items()}
    folder = str(saved(KBERTForSequenceClassification, **names))
    answer = transformers.pipeline("zero-shot-classification", folder, trust_remote_code=True)
    text, choices = "the cat sat on the mat", ["cat", "dog", "tree"]
    found = answer(text, choices, hypothesis_template="a {} slept")
    inputs = answer.tokenizer([text] * 3, [f"a {choice} slept" for choice in choices], return_tensors="pt")
    expected = answer.model(**inputs).logits[:, 0].softmax(0)
    scores = dict(zip(found["labels"], found["scores"]))
    assert [scores[choice] for choice in choices] == pytest.approx(expected.tolist(), abs=1e-4)


def test_sentence_transformers_opens_the_folder(saved):
    needs("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(saved(KBERTForMaskedLM)), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 100
    texts = ["the cat sat", "a dog slept on the mat under a tree"]
    expected = model[0].auto_model.mean_states(model.tokenizer(texts)["input_ids"])
    torch.testing.assert_close(torch.from_numpy(model.encode(texts)), expected, atol=1e-4, rtol=1e-4)


def test_weights_may_be_placed_by_accelerate_and_lie_on_disk(saved, tmp_path):
    needs("accelerate")
    folder, ids = saved(KBERTForMaskedLM), torch.randint(5, 18, (2, 9))
    expected = KBERTForMaskedLM.from_pretrained(folder)(ids).logits
    block = 4 * sum(p.numel() for p in tiny(vocab_size=18).encoder.blocks[0].parameters())  # bytes
    for limit in ({}, {"max_memory": {"cpu": 2 * block}, "offload_folder": tmp_path / "disk"}):
        model = KBERTForMaskedLM.from_pretrained(folder, device_map="auto", **limit)
        assert ("disk" in getattr(model, "hf_device_map", {}).values()) == bool(limit)
        torch.testing.assert_close(model(ids).logits, expected)


def test_the_tokenizer_folder_says_nothing_of_this_machine_and_runs_no_code(saved, tmp_path):
    folder = saved(KBERTForMaskedLM)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & set(settings)
    (folder / "model.py").write_text("raise SystemExit('somebody ran this')")
    code = f"from transformers import AutoTokenizer as A; print(A.from_pretrained({str(folder)!r}).model_max_length)"
    found = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "100" and not (tmp_path / "modules").exists()


# --- export: batch and length are dynamic, nothing else is

SHAPES = [([3, 50], "right"), ([7] * 6, "left"), (LENGTHS, "mixed"), ([300, 1], "right")]


def dynamic(inputs: dict) -> dict:
    """Batch and length, the first dimension and the last, of every input."""
    return {name: {0: Dim.DYNAMIC, x.dim() - 1: Dim.DYNAMIC} for name, x in inputs.items()}


@pytest.mark.parametrize("cls", [KBERTModel, *HEADS])
def test_exported_programs_agree_at_other_sizes(cls):
    model, inputs = tiny(cls), inputs_of(cls, LENGTHS)
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=dynamic(inputs)).module()
    for lengths, side in SHAPES:
        inputs = inputs_of(cls, lengths, side)
        for a, b in zip(program(**inputs).to_tuple(), model(**inputs).to_tuple()):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [KBERTModel, *HEADS])
def test_onnx_runtime_agrees_at_other_sizes(cls, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    model, inputs = tiny(cls), inputs_of(cls, LENGTHS)
    options = {"dynamo": True, "dynamic_shapes": dynamic(inputs), "input_names": list(inputs)}
    torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=inputs, **options)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for lengths, side in SHAPES:
        inputs = inputs_of(cls, lengths, side)
        found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        for a, b in zip(found, model(**inputs).to_tuple()):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-4, rtol=1e-4)


def test_a_number_to_predict_may_have_a_column_of_its_own(saved):
    model = KBERTForSequenceClassification.from_pretrained(saved(KBERTForSequenceClassification, num_labels=1)).eval()
    input_ids, labels = torch.tensor([[0, 5, 1], [0, 6, 1]]), torch.tensor([1.0, 3.0])
    one, other = (model(input_ids, labels=x).loss for x in (labels, labels[:, None]))
    assert one == other == (model(input_ids).logits[:, 0] - labels).square().mean()


# --- finetuning by others' means


def test_the_readmes_recipe_gives_the_trainer_muon_for_matrices(saved, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it: pip install accelerate")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (recipe,) = (block for block in blocks if "torch.optim.Muon" in block)
    folder = saved(KBERTForSequenceClassification, num_labels=3)
    train = [{"input_ids": [0, 5 + i % 3, 8, 1], "label": i % 3} for i in range(96)]
    names = {"train": train, "tokenizer": transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)}
    exec(recipe.replace("logs/RUN/model", str(folder)), names)
    before = KBERTForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(not torch.equal(p, before[name]) for name, p in names["model"].named_parameters())
    matrices = {id(p) for p in names["muon"].state}
    assert {id(p) for p in names["adamw"].state} | matrices == {id(p) for p in names["model"].parameters()}
    assert all(p.grad is None for p in names["model"].parameters())
    assert len(matrices) == 4 * 4 and names["muon"].param_groups[0]["lr"] < 0.01
    losses = [line["train_loss"] for line in names["trainer"].state.log_history if "train_loss" in line]
    assert all(loss < 1.0 for loss in losses)
