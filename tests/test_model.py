"""The model: what is packed together does not matter, the attention paths agree, Hugging Face loads what was saved."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import LENGTHS, VOCAB, reference_attention, row_of, tiny
from model import (
    PRESETS,
    HeadLoss,
    KBERTConfig,
    KBERTForMaskedLM,
    KBERTForMultipleChoice,
    KBERTForQuestionAnswering,
    KBERTForSequenceClassification,
    KBERTForTokenClassification,
    KBERTModel,
    attend,
    flex_mask,
    local_tiles,
    neighbour_bias,
    pack_slots,
    rotary_tables,
    rotate,
    slot_tiles,
)


def test_a_document_is_the_same_alone_packed_and_padded():
    model = tiny(KBERTModel)
    ids, documents, positions = row_of(LENGTHS)
    packed = model.encode(ids, documents, positions, max_seqlen=256)
    batch = torch.full((len(LENGTHS), 256), 2)
    mask = torch.zeros_like(batch)
    for number in range(len(LENGTHS)):
        inside = documents == number
        left = number * 3  # anywhere in the padding
        batch[number, left : left + inside.sum()], mask[number, left : left + inside.sum()] = ids[inside], 1
        alone = model(ids[inside][None]).last_hidden_state[0]
        torch.testing.assert_close(packed[inside], alone, atol=2e-5, rtol=1e-4)
    padded = model(batch, mask).last_hidden_state
    torch.testing.assert_close(padded[mask.bool()], packed[: sum(LENGTHS)], atol=2e-5, rtol=1e-4)
    assert (padded[~mask.bool()] == 0).all()


def plain_encoder(model: KBERTModel, ids: torch.Tensor) -> torch.Tensor:
    """The encoder written out once more, for one text, in fp64: what a checkpoint means."""
    c, S, token = model.config, len(ids), torch.arange(len(ids))
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    H, D, m = c.num_attention_heads, c.head_dim, c.weight_multiplier

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    frequency = 2.0 * (2.0 * c.frequency_base) ** -torch.linspace(0, 1, D // 4, dtype=torch.float64)
    angle = token[:, None, None] * torch.cat([frequency, 0 * frequency])  # [S, 1, D / 2]

    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)

    x = x0 = norm(m * w["embed.weight"][ids])
    first = None
    for layer in range(c.num_hidden_layers):
        at = f"blocks.{layer}."
        of = {name.removeprefix(at): tensor for name, tensor in w.items() if name.startswith(at)}
        if layer:
            x = of["input_lambdas"][0] * x + of["input_lambdas"][1] * x0
        q, k, v = (m * norm(x) @ of["attention.qkv.weight"].T).view(S, 3, H, D).unbind(1)
        first = v if layer == 0 else first
        if layer:
            v = v + of["attention.value_lambda"] * (first - v)
        q, k, visible = norm(q), norm(k), torch.ones(S, S, dtype=torch.bool)
        if layer % c.global_attention_every:
            q, k = q + of["attention.qk_bias"][0], k + of["attention.qk_bias"][1]
            visible = (token[:, None] - token).abs() <= c.local_attention_window // 2
        scores = 0.12 * torch.einsum("qhd,khd->hqk", turned(q), turned(k))
        seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
        x = x + m * seen.flatten(1) @ of["attention.out.weight"].T
        gate, up = (m * norm(x) @ of["mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + m * (F.gelu(gate) * up) @ of["mlp.down.weight"].T
    return norm(x)


def test_the_encoder_is_the_function_that_checkpoints_were_trained_as():
    model, (ids, _, _) = tiny(KBERTModel), row_of([128])
    with torch.no_grad():
        found = model(ids[None]).last_hidden_state[0].double()
        torch.testing.assert_close(found, plain_encoder(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 8, 64, 100, None])
@pytest.mark.parametrize("lengths", [LENGTHS, [128], [5] * 60, [600, 1, 1, 30]])
def test_tiled_attention_agrees_with_fp64_forward_and_backward(window, lengths):
    _, documents, _ = row_of(lengths)
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, len(documents), 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    direction = torch.randn(1, len(documents), 2, 16)
    if window is None:
        mask = slot_tiles(documents, pack_slots(documents, max(lengths)))
    else:
        mask = local_tiles(documents, window)
    inside = slice(sum(lengths))  # the padding after them may have been cut into slots
    got = attend(q, k, v, mask, 0.3)[:, inside]
    expected = reference_attention(q, k, v, documents, window, 0.3)[:, inside]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    gradients = (torch.autograd.grad((x * direction[:, inside]).sum(), (q, k, v)) for x in (got, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, [5] * 60, [1000]])
def test_slots_hold_every_token_once_and_documents_whole(lengths):
    _, documents, _ = row_of(lengths)
    longest = min(max(lengths), 200)
    slots = pack_slots(documents, longest)
    assert slots.size(1) == longest and sorted(slots[slots < len(documents)].tolist()) == list(range(len(documents)))
    for document, length in enumerate(lengths):
        inside = torch.isin(slots, (documents == document).nonzero()[:, 0]).any(1).sum()
        assert inside == -(-length // longest)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [8, 64, 200, None])
def test_flex_mask_lists_every_visible_pair_and_no_more(window, size):
    _, documents, _ = row_of([300, 20, 129, 63, 500])
    token = torch.arange(len(documents))
    visible = documents[:, None] == documents
    if window is not None:
        visible &= (token[:, None] - token).abs() <= window
    blocks = visible.view(len(documents) // size, size, -1, size).transpose(1, 2)
    mask = flex_mask(documents, window, size)
    for way, wanted in (("kv", blocks), ("q", blocks.permute(1, 0, 3, 2))):  # the forward's tables, the backward's
        some, every = torch.zeros_like(wanted[:, :, 0, 0]), torch.zeros_like(wanted[:, :, 0, 0])
        for table, found in ((way, some), (f"full_{way}", every)):
            indices, counts = getattr(mask, f"{table}_indices")[0, 0], getattr(mask, f"{table}_num_blocks")[0, 0]
            for row, count in enumerate(counts):
                found[row, indices[row, :count]] = True
        assert (every == wanted.all(-1).all(-1)).all() and not (every & some).any()
        assert (some | every)[wanted.any(-1).any(-1)].all()
    assert (mask.mask_mod(None, None, token[:, None], token) == visible).all()


def test_flex_attention_compiled_agrees_in_the_whole_model():
    """The compiled forward, one graph without a break, is what GPUs run, but for the kernel. CPUs have no backward."""
    model = tiny(hidden_size=128)
    row, masked = row_of(LENGTHS), torch.tensor([3, 40, 41, 300])
    targets = row[0][masked]
    with torch.no_grad():
        expected = model.encoder.encode(*row, 256), model.loss(*row, masked, targets, 256)
        model.encoder.attention_backend = "flex"
        compiled = [torch.compile(function, fullgraph=True) for function in (model.encoder.encode, model.loss)]
        torch.testing.assert_close(compiled[0](*row, 256), expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(compiled[1](*row, masked, targets, 256), expected[1], atol=1e-4, rtol=1e-4)


def test_loss_at_masked_positions_equals_the_loss_of_all_logits():
    model = tiny()
    ids, documents, positions = row_of(LENGTHS)
    masked = torch.tensor([3, 40, 41, 300, 400, 0])
    targets = torch.tensor([7, 8, 9, 10, 11, -100])
    labels = torch.full_like(ids, -100).index_put((masked,), targets)
    hidden = model.encoder.encode(ids, documents, positions, 256)
    expected = F.cross_entropy(model.logits(hidden), labels, reduction="sum")
    loss = model.loss(ids, documents, positions, masked, targets, 256)
    torch.testing.assert_close(loss, expected)
    # The last layer computes what is predicted alone: no gradient may miss the rest.
    for a, b in zip(torch.autograd.grad(loss, model.parameters()), torch.autograd.grad(expected, model.parameters())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "preset, vocab_size, total, without_embedding",
    [("base", 50_368, 149e6, 110e6), ("small", 50_368, 17e6, 3.9e6), ("large", 50_368, 395e6, 344e6)],
)
def test_presets_have_the_published_parameter_counts(preset, vocab_size, total, without_embedding):
    with torch.device("meta"):
        model = KBERTForMaskedLM(KBERTConfig(vocab_size=vocab_size, **PRESETS[preset]))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(total, rel=0.02)
    assert count - model.encoder.embed.weight.numel() == pytest.approx(without_embedding, rel=0.02)


def test_a_fresh_model_starts_as_its_embedding():
    """Zero-initialised projections survive transformers' own initialisation, and so do the skips' weights."""
    model = KBERTForMaskedLM(KBERTConfig(vocab_size=VOCAB, **PRESETS["micro"]))
    ids = torch.randint(5, VOCAB, (1, 20))
    expected = F.rms_norm(F.rms_norm(model.encoder.embed(ids), (256,)), (256,))
    torch.testing.assert_close(model.encoder(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    assert model.lm_head.weight is model.encoder.embed.weight
    assert [block.input_lambdas.tolist() for block in list(model.encoder.blocks)[1:]] == [[1.0, 0.0]] * 3


def test_heads_start_out_attending_to_their_neighbours():
    model = KBERTForMaskedLM(KBERTConfig(vocab_size=VOCAB, **PRESETS["micro"]))
    biases = [block.attention.qk_bias for block in model.encoder.blocks]
    biased = [bias is not None for bias in biases]
    assert biased == [False, True, True, False]  # global layers look for words wherever they are
    expected = neighbour_bias(4, 64, 10_000.0)
    torch.testing.assert_close(biases[1], expected)
    tables = rotary_tables(torch.arange(128), 64, 10_000.0, torch.float32)
    q, k = (rotate(x.expand(1, 128, 4, 64), *tables)[0] for x in expected)
    scores = torch.einsum("qhd,khd->hqk", q, k)  # of a text that says nothing: biases alone
    assert (scores.argmax(-1)[:, 10:-10] - torch.arange(10, 118)).unique(dim=1).tolist() == [[-1], [1], [-2], [2]]


@pytest.mark.parametrize(
    "cls, auto",
    [
        (KBERTModel, "AutoModel"),
        (KBERTForMaskedLM, "AutoModelForMaskedLM"),
        (KBERTForSequenceClassification, "AutoModelForSequenceClassification"),
        (KBERTForTokenClassification, "AutoModelForTokenClassification"),
        (KBERTForMultipleChoice, "AutoModelForMultipleChoice"),
        (KBERTForQuestionAnswering, "AutoModelForQuestionAnswering"),
    ],
)
def test_save_load_and_save_again_through_auto_classes(tmp_path, monkeypatch, cls, auto):
    import transformers

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny(cls)
    ids, mask = torch.randint(5, VOCAB, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, 20:] = 0
    if cls is KBERTForMultipleChoice:
        ids, mask = ids[None], mask[None]  # one question, three answers
    expected = model(input_ids=ids, attention_mask=mask)
    model.save_pretrained(tmp_path / "once")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "once", trust_remote_code=True).eval()
    assert type(loaded).__module__ != cls.__module__  # it came with the weights
    loaded.save_pretrained(tmp_path / "twice")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "twice", trust_remote_code=True).eval()
    for copy in (loaded, again):
        for name, tensor in copy.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        for key, value in copy(input_ids=ids, attention_mask=mask).items():
            # Not equal bit for bit: weights that were read may lie at another alignment.
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_every_class_loads_from_a_pretrained_masked_lm(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    for cls in (KBERTModel, KBERTForSequenceClassification, KBERTForQuestionAnswering):
        loaded = cls.from_pretrained(tmp_path)
        encoder = loaded if cls is KBERTModel else loaded.encoder
        assert torch.equal(encoder.blocks[3].mlp.down.weight, model.encoder.blocks[3].mlp.down.weight), cls


def test_fill_mask_pipeline_from_a_saved_folder(tmp_path, word_tokenizer):
    import transformers

    model = tiny(vocab_size=17, pad_token_id=2)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(word_tokenizer).save_pretrained(tmp_path)
    answers = transformers.pipeline("fill-mask", str(tmp_path), trust_remote_code=True)("the cat [MASK] on the mat")
    assert len(answers) == 5 and all(answer["token"] < 17 for answer in answers)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_hidden_layers=0), "num_hidden_layers 0 must be positive: change --model.num_hidden_layers"),
        (dict(hidden_size=-64), "hidden_size -64 must be positive: change --model.hidden_size"),
        (dict(num_attention_heads=0), "num_attention_heads 0 must be positive: change --model.num_attention_heads"),
        (dict(intermediate_size=0), "intermediate_size 0 must be positive"),
        (dict(global_attention_every=0), "global_attention_every 0 must be positive"),
        (dict(local_attention_window=-128), "local_attention_window -128 must be positive"),
        (dict(frequency_base=0.0), "frequency_base 0.0 must be positive"),
        (dict(logit_softcap=float("nan")), "logit_softcap nan must be positive"),
        (dict(norm_eps=-1e-6), "norm_eps -1e-06 must not be negative"),
        (dict(classifier_dropout=1.5), "classifier_dropout 1.5 must lie between 0 and 1"),
        (dict(num_attention_heads=5), "must divide hidden_size 256 into heads .* change --model.num_attention_heads"),
        (dict(num_attention_heads=1), "num_attention_heads 1 makes heads 256 wide, .* change --model.num_attention"),
        (dict(hidden_size=100, num_attention_heads=5), "hidden_size 100 must be a multiple of 64"),
        (dict(intermediate_size=100), "intermediate_size 100 must be a multiple of 64"),
        (dict(logit_softcap=100.0), "logit_softcap 100.0 must be at most 55, .* change --model.logit_softcap"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KBERTConfig(**{**PRESETS["micro"], **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [VOCAB, 50_304, 50_368])  # 50,304 is a multiple of 128
def test_the_largest_softcap_still_gives_the_right_loss_and_gradients(vocab_size, dtype):
    """Beyond it a sum of exponentials becomes infinite, or what is divided by it zero."""

    def accepted(cap: int) -> bool:
        try:
            return bool(KBERTConfig(vocab_size=vocab_size, logit_softcap=float(cap)))
        except ValueError:
            return False

    cap = max(filter(accepted, range(30, 101)))
    torch.manual_seed(0)
    hidden = torch.randn(64, 64, dtype=dtype, requires_grad=True)
    weight = (20 * torch.randn(vocab_size, 64)).to(dtype).requires_grad_()  # logits far beyond the cap
    targets = torch.randint(0, vocab_size, (64,)).index_fill(0, torch.tensor([3]), -100)
    loss = HeadLoss.apply(hidden, weight, targets, cap) / 1e6  # masked tokens in a large batch
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden @ exact_weight.t()
    logits = logits / (1 + (logits / cap).square()).sqrt()
    exact = F.cross_entropy(logits, targets, reduction="sum") / 1e6
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0, check_dtype=False)
    expected = torch.autograd.grad(exact, (exact_hidden, exact_weight))
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected):
        assert (a - b).norm() / b.norm() < 0.01


def test_importing_does_nothing():
    """No process group, no device, no arguments read, nothing written."""
    code = (
        "import torch, model, optimizer, dataloading, trainer; "
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout + result.stderr, result.stderr
