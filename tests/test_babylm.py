"""BabyLM's rules: from files of an utterance a line to a model within them, and to their own pipeline."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import trainer
from conftest import ROOT, TINY, TINY_SHAPE, as_flags, flags, in_section, lines, metrics_of, run_python, story
from dataloading import InputError, count_text, data_hash, read_manifest
from hub_stand_in import Hub
from records.log import read_log
from records.verify import check_run

SET = "BabyLM-community/BabyLM-2026-Strict-Small"
FILES = ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard")
WORDS = [line.split()[0] for line in (ROOT / "LICENSE").read_text().splitlines() if line.split()]

# What their pipeline calls: its zero-shot scores of a masked LM, and the states that its finetuning classifies
PIPELINE = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer

scores, states = [], []
for revision in (*sys.argv[1:], None):
    common = dict(trust_remote_code=True, revision=revision)
    processor = AutoProcessor.from_pretrained("me/baby", padding_side="right", **common)
    tokenizer = processor.tokenizer if hasattr(processor, "tokenizer") else processor
    encoded = processor(text="the copy of this", return_offsets_mapping=True)
    tokens, places = encoded["input_ids"], [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > 0]
    masked, each = torch.tensor([tokens] * len(places)), range(len(places))
    masked[each, places] = tokenizer.mask_token_id
    model = AutoModelForMaskedLM.from_pretrained("me/baby", **common).eval()
    with torch.no_grad():
        logits = model(input_ids=masked, attention_mask=torch.ones_like(masked))["logits"]
    scores.append(logits[each, places].log_softmax(-1)[each, [tokens[i] for i in places]].sum().item())

    tokenizer = AutoTokenizer.from_pretrained("me/baby", **common)
    batch = tokenizer(["the copy", "the notice of this copy"], padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained("me/baby", **common)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert not hasattr(output, "logits")
    assert output.last_hidden_state.shape[-1] == AutoConfig.from_pretrained("me/baby", **common).hidden_size
    states.append(output.last_hidden_state[:, 0].sum().item())
*first, last_branch, main = zip(scores, states)
assert len({*first, main}) == len(first) + 1 and last_branch == main, (scores, states)
"""


def utterances(seed: int) -> bytes:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + "\n" for _ in range(120 + 40 * seed)).encode()


def test_from_six_files_to_a_model_with_its_branches(tmp_path):
    """The README's commands, in small; the last of the branches is the model at the end, which falls just short."""
    source = ["--dataset", SET, "--join_lines", 50, "--valid_fraction", 0.1, "--test_fraction", 0]
    trained, data = tmp_path / "tokenizer", tmp_path / "data"
    with Hub() as hub:

        def succeed(*command) -> None:
            environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
            done = run_python(*command, env=environment, timeout=600)
            assert done.returncode == 0, done.stderr

        hub.add("dataset", SET, {f"{name}.train.txt": utterances(i) for i, name in enumerate(FILES)})
        source += ["--revision", hub.repos["dataset", SET]["main"]["sha"]]
        succeed("data/train_tokenizer.py", *source, "--vocab_size", 320, "--out", trained)
        succeed("data/pack_fineweb_edu.py", *source, "--tokenizer", trained, "--out", data)
        tokens, words_per_token = count_text(read_manifest(data))
        last = round(2.02 * tokens * words_per_token)
        run = {"preset": "babylm", "data.dir": data, "data.max_length": 64, "data.valid_tokens": 200}
        run |= {"train.row_tokens": 256, "train.batch_tokens": 256, "train.save_every": 50, "train.compile": "false"}
        run |= {"train.epochs": 2, "train.save_words": f"1e3,1e4,{last},{2 * last}", "train.hf_model_name": "me/baby"}
        succeed("trainer.py", *as_flags(run | TINY_SHAPE | {"train.out": tmp_path, "train.run_name": "run"}))
        branches = ["chck_0.001M", "chck_0.01M", f"chck_{last / 1e6:g}M"]
        assert sorted(hub.repos["model", "me/baby"]) == sorted([*branches, "main"])
        succeed("-c", PIPELINE, *branches)
        for judge, uid in (("blimp_filtered", "island"), ("supplement_filtered", "turn_taking")):
            rows = [{"sentence_good": "the copy of this", "sentence_bad": "copy this the of", "UID": uid}] * 3
            (tmp_path / judge).mkdir()
            (tmp_path / judge / f"{uid}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            asked = {"task": "blimp", "data.dataset": tmp_path / judge, "train.base_model": tmp_path / "run" / "model"}
            succeed("finetuner.py", *as_flags(asked | {"train.out": tmp_path, "train.run_name": f"by {uid}"}))
            assert json.loads((tmp_path / f"by {uid}" / "metrics.json").read_text())["results"]["pretrained"]
    assert 0.97 * 2 * tokens < int(lines(tmp_path / "run")[-1]["words"]) / words_per_token <= 2 * tokens


def words_of(run: Path) -> list[int]:
    return [int(line["words"]) for line in lines(run)]


def test_a_run_ends_with_its_words_and_keeps_models_on_the_way(counted, tmp_path):
    """A step has 1,536 tokens: at most 768 words. Checkpoints go, as keep_checkpoints says; these models stay."""
    more = "--train.max_words 8000 --train.save_words 1000,1100,5000 --train.keep_checkpoints 1 --train.save_every 4"
    trainer.main(flags(counted, tmp_path, "whole", more))
    words = words_of(tmp_path / "whole")
    assert words == sorted(words) and 8000 - 768 <= words[-1] <= 8000
    kept = {path.name for path in (tmp_path / "whole" / "words").iterdir()}
    assert kept == {"chck_0.001M", "chck_0.0011M", "chck_0.005M"}
    assert all((tmp_path / "whole" / "words" / name / "model.safetensors").exists() for name in kept)
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 1
    factors = [metrics["lr_factor"] for metrics in metrics_of(tmp_path / "whole")]
    assert max(factors) > 0.9 and factors[-1] < 0.3  # the schedules follow the words


def test_a_run_that_ends_for_another_reason_keeps_no_model_of_words_it_did_not_see(counted, tmp_path):
    trainer.main(flags(counted, tmp_path, "run", "--train.steps 2 --train.save_words 500,1500"))
    shown = words_of(tmp_path / "run")[-1]
    assert 0.95 * 1500 < shown < 1500 and [path.name for path in (tmp_path / "run" / "words").iterdir()] == [
        "chck_0.0005M"
    ]


def test_resumed_with_other_counts_of_words(counted, tmp_path):
    trainer.main(flags(counted, tmp_path, "run", "--train.max_words 8000 --train.save_words none --train.save_every 4"))
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    again = ("--train.save_every 4 --train.resume", last)
    with pytest.raises(InputError, match="step-0.* has been shown .* tokens of text, more than the 6,000 that"):
        trainer.main(flags(counted, tmp_path, "run", *again, "--train.max_words 3000"))
    trainer.main(flags(counted, tmp_path, "run", *again, "--train.max_words 12000 --train.save_words 2000,10000"))
    assert [path.name for path in (tmp_path / "run" / "words").iterdir()] == ["chck_0.01M"]
    assert "words were shown before: none is kept after 2,000\n" in (tmp_path / "run" / "log.txt").read_text()


def test_models_kept_before_there_was_a_repository_are_pushed(counted, tmp_path):
    run = {"data.dir": counted, "train.max_words": 8000, "train.save_words": "1000,5000", "train.save_every": 4}
    run = as_flags(TINY | TINY_SHAPE | run | {"train.out": tmp_path, "train.run_name": "run"})
    assert run_python("trainer.py", *run).returncode == 0
    log = tmp_path / "run" / "log.txt"
    log.write_text(log.read_text().split("=== result\n")[0])  # as if killed at the end
    with Hub() as hub:
        again = [*run, "--train.resume", "auto", "--train.hf_model_name", "me/baby"]
        ended = run_python("trainer.py", *again, env=hub.environment(tmp_path / "home"))
        assert ended.returncode == 0, ended.stderr
        assert {"chck_0.001M", "chck_0.005M", "main"} <= set(hub.repos["model", "me/baby"])
        assert "model.safetensors" in hub.files("model", "me/baby", "chck_0.001M")


def test_steps_beside_a_presets_words(tmp_path):
    with pytest.raises(InputError, match="--train.steps has no effect beside --train.epochs and --train.max_words: "):
        trainer.main(["--preset", "babylm", "--train.steps", "2", "--train.out", str(tmp_path)])


def test_resumed_by_words_as_if_never_stopped(counted, tmp_path):
    more = "--train.epochs 1.5 --train.save_words 3000,5000 --train.save_every 4"
    for name in ("whole", "again"):
        trainer.main(flags(counted, tmp_path / name, "run", more))
    shown = words_of(tmp_path / "whole" / "run")[-1]
    epoch, per_token = count_text(read_manifest(counted))
    assert 1.5 * epoch - 1536 <= shown / per_token <= 1.5 * epoch
    models = [tmp_path / name / "run" / "words" / "chck_0.005M" / "model.safetensors" for name in ("whole", "again")]
    before = models[1].read_bytes()
    models[1].write_bytes(b"")
    first = tmp_path / "again" / "run" / "checkpoints" / "step-000004"
    trainer.main(flags(counted, tmp_path / "again", "run", more, "--train.resume", first))
    assert models[1].read_bytes() == before == models[0].read_bytes()
    assert story(tmp_path / "again" / "run") == story(tmp_path / "whole" / "run")


@pytest.mark.parametrize("ends", ("max_words 8000", "epochs 0.8"))
def test_the_verifier_knows_runs_that_end_by_what_was_shown(counted, tmp_path, ends):
    trainer.main(flags(counted, tmp_path, "run", f"--train.{ends} --train.log_every 1"))
    log = tmp_path / "run" / "log.txt"
    assert list(check_run(read_log(log))) == []
    whole, text, limit = log.read_text(), read_log(log).named("result", "work", "text"), "its epochs and words allow"
    for section, name, value, problem in (
        ("result", "work.text", 99 * text, limit),
        ("result", "work.text", 99 * text, f"work.text is {99 * text}, outside"),
        ("result", "work.text", text // 2, "the last line's words is not that of the result"),
        ("config", "train.epochs", 0.1, limit),
        ("config", "train.max_words", 500.0, limit),
        ("data", "text.words_per_token", 0.9, "the last line's words is not that of the result"),
    ):
        log.write_text(in_section(section, name, value)(whole))
        assert any(problem in said for said in check_run(read_log(log))), (name, value)
    for name in ("epochs", "max_words", "max_minutes"):  # and by none of these before its time
        log.write_text(whole := in_section("config", f"train.{name}", 1e9)(whole))
    problems = list(check_run(read_log(log)))
    assert any(limit in said for said in problems) and any("not with its" in said for said in problems)
    log.write_text(re.sub(r"(step:2/.* words:)\d", r"\g<1>9", whole))
    assert any("words does not grow" in said for said in check_run(read_log(log)))


def test_words_that_nobody_counted_and_steps_too_large(corpus, counted, tmp_path):
    for flag in ("--train.max_words 1e6", "--train.save_words 1e6,2e6"):
        with pytest.raises(InputError, match="does not count the words .* pack the text again"):
            trainer.main(flags(corpus, tmp_path, "bad", flag))
    with pytest.raises(InputError, match="leave 1,000 tokens of text, less than the 1,536 that a step may have"):
        trainer.main(flags(counted, tmp_path, "bad", "--train.max_words 500"))
    without = read_manifest(counted)
    for entry in without["shards"].values():
        del entry["words"]
    assert data_hash(without) == data_hash(read_manifest(counted))
