"""Spans, as SQuAD asks for them: questions and windows, candidate answers, the official scores, the null threshold.

Shapes: S tokens of a window, padded. A question has one window or several, as long as its context asks.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.examples import Split
from dataloading import InputError

N_BEST = 20

# ---------------------------------------------------------------------------------------------------------------------
# Questions -> windows


@dataclass
class Windows(Split):
    """Examples are windows over the contexts of questions; what follows finds an answer's text in them."""

    question: np.ndarray  # [windows] number of the question
    offsets: np.ndarray  # [all tokens, 2] int32 first character and the one after the last; -1 outside the context
    names: list[str]  # [questions] their ids
    contexts: list[str]  # [questions]
    answers: list[list[str]]  # [questions] none: there is no answer

    @property
    def examples(self) -> int:
        return len(self.names)

    def shuffled(self, most: int) -> np.ndarray:
        """The windows of `most` questions."""
        return np.flatnonzero(np.isin(self.question, super().shuffled(most)))

    def groups(self) -> np.ndarray:
        """[windows] the number of the question."""
        return self.question

    def only(self, keep: np.ndarray) -> Windows:
        """The windows numbered `keep`, and their questions."""
        asked, question = np.unique(self.question[keep], return_inverse=True)
        of_asked = {name: [getattr(self, name)[i] for i in asked] for name in ("names", "contexts", "answers")}
        offsets = self.of_all(self.offsets, keep)
        return dataclasses.replace(super().only(keep), question=question, offsets=offsets, **of_asked)


def encode_questions(
    rows,
    columns: list[str],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
    unanswerable: bool = False,
) -> Windows:
    """Windows over each context that share `stride` tokens.

    A window that lacks part of the answer is labelled as having none: [CLS]. Unless `unanswerable`, a question without
    an answer counts as unlabelled.
    """
    tokens, segments, labels, questions, offsets, contexts, answers, known = ([] for _ in range(8))
    room = max(8, max_length // 2)  # tokens of a question: a context needs some room beside it
    stride = min(stride, (max_length - room) // 2)
    for number, row in enumerate(rows):
        question, context = (row[column] or "" for column in columns)
        question, given = question.strip(), row.get("answers")
        answer = read_answers(given)
        whole = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        question = question[: whole[room - 8][1]] if len(whole) > room - 8 else question
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, ids in enumerate(encoded["input_ids"]):
            inside = np.array([part == 1 for part in encoded.sequence_ids(window)])
            offset = np.where(inside[:, None], np.array(encoded["offset_mapping"][window]), -1)  # [tokens, 2]
            tokens.append(np.array(ids, np.int32))
            if "token_type_ids" in encoded:
                segments.append(np.array(encoded["token_type_ids"][window], np.int8))
            labels.append(find_answer(answer, offset))
            questions.append(number)
            offsets.append(offset.astype(np.int32))
            known.append(given is not None and (unanswerable or len(answer["text"]) > 0))
        contexts.append(context)
        answers.append(list(answer["text"]))
    names = list(rows["id"]) if "id" in rows.column_names else list(map(str, range(len(rows))))
    return Windows(
        tokens=np.concatenate(tokens),
        segments=np.concatenate(segments) if segments else None,
        ends=np.cumsum([len(ids) for ids in tokens]),
        labels=np.array(labels, dtype=np.int64),
        known=np.array(known),
        idx=list(range(len(tokens))),
        question=np.array(questions),
        offsets=np.concatenate(offsets),
        names=names,
        contexts=contexts,
        answers=answers,
    )


def read_answers(given: object) -> dict:
    """{"text": [...], "answer_start": [...]}, as SQuAD has them, of that or of a list of single answers."""
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {name: [one.get(name) for one in given] for name in ("text", "answer_start")}
    given = given or {"text": [], "answer_start": []}
    texts, starts = (given.get(name) if isinstance(given, dict) else None for name in ("text", "answer_start"))
    right = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not right or not all(isinstance(start, int) for start in starts):
        raise InputError(
            f'answers are {str(given)[:60]!r}, not {{"text": [...], "answer_start": [...]}}: write them as JSON lines'
        )
    return given


def find_answer(answer: dict, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token of the first reference answer in a window, offsets [tokens, 2]; (0, 0): not all of it."""
    if not answer["text"]:
        return 0, 0
    first, end = answer["answer_start"][0], answer["answer_start"][0] + len(answer["text"][0])
    held = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < end) & (offsets[:, 0] >= 0))
    whole = len(held) and offsets[held[0], 0] <= first and offsets[held[-1], 1] >= end
    return (held[0], held[-1]) if whole else (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Logits -> answers


def candidates(logits: np.ndarray, offsets: np.ndarray, max_answer: int) -> tuple[float, list[tuple[float, int, int]]]:
    """Of a window, the score of no answer, and the best N_BEST spans: (score, first character, end).

    logits [2, S] of start and end, offsets [tokens, 2], max_answer in tokens.
    """
    start, end = (np.where(offsets[:, 0] >= 0, row[: len(offsets)], -np.inf) for row in logits)
    starts, ends = (np.argsort(-row, kind="stable")[:N_BEST] for row in (start, end))
    length = ends[None] - starts[:, None] + 1  # [N_BEST, N_BEST]
    scores = np.where((length > 0) & (length <= max_answer), start[starts][:, None] + end[ends][None], -np.inf)
    found = []
    for flat in np.argsort(-scores, axis=None, kind="stable")[:N_BEST]:
        i, j = divmod(int(flat), len(ends))
        if np.isfinite(scores[i, j]):
            found.append((float(scores[i, j]), int(offsets[starts[i], 0]), int(offsets[ends[j], 1])))
    return float(logits[0, 0] + logits[1, 0]), found


def best_answers(outputs: list, windows: Windows) -> tuple[list[list[dict]], np.ndarray]:
    """For each question up to N_BEST {text, score} over its windows, the best first, and its null difference.

    outputs: candidates() of each window. The difference [questions]: the score of no answer minus the best one's.
    """
    null, found = np.full(len(windows.contexts), np.inf), [[] for _ in windows.contexts]
    for number, (score, of_window) in zip(windows.question, outputs):
        null[number] = min(null[number], score)
        found[number] += of_window
    ranked = []
    for context, answers in zip(windows.contexts, found):
        by_text = {}  # neighbouring windows find the same text: its best score counts
        for score, first, end in sorted(answers, key=lambda answer: -answer[0]):
            by_text.setdefault(context[first:end], score)
        best = [{"text": text, "score": score} for text, score in by_text.items()][:N_BEST]
        ranked.append(best or [{"text": "", "score": -math.inf}])
    return ranked, np.array([none - answers[0]["score"] for none, answers in zip(null, ranked)])


# ---------------------------------------------------------------------------------------------------------------------
# Scores, as the official script gives them


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and spare blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def answer_scores(text: str, answers: list[str]) -> tuple[float, float]:
    """(F1, exact match) against the best reference answer; of a question without one, the empty text is right."""
    wanted = [answer for answer in map(normal, answers) if answer] or [""]
    found = normal(text)
    return max(word_f1(found.split(), answer.split()) for answer in wanted), float(found in wanted)


def null_threshold(difference: np.ndarray, answered: np.ndarray, empty: np.ndarray) -> float:
    """The null difference above which no answer is given, for the highest sum of scores.

    difference [questions], scores of having answered and of having said nothing [questions].
    """
    order = np.argsort(difference, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((answered - empty)[order])])  # of answering the first k
    gain[1:-1][difference[order][1:] == difference[order][:-1]] = -np.inf  # ties go together
    k = int(gain.argmax())
    return float(difference[order][k - 1] if k else difference.min() - 1)


def measure_spans(
    outputs: list, windows: Windows, unanswerable: bool, threshold: float | None
) -> tuple[dict[str, float], list[tuple[str, list[dict]]]]:
    """Scores over the questions whose answer is known, and for each question its answer and n-best list.

    unanswerable: SQuAD 2.0's questions, whose answer is empty above `threshold`, or, where there is none yet, above the
    best one.
    """
    ranked, difference = best_answers(outputs, windows)
    known = np.isin(np.arange(len(windows.contexts)), windows.question[windows.known])
    if not known.any():  # no answers to score by: predictions alone
        known[:] = True
    texts = [answers[0]["text"] for answers in ranked]
    scores = np.array([answer_scores(text, answers) for text, answers in zip(texts, windows.answers)])  # [questions, 2]
    if unanswerable:
        empty = np.array([answer_scores("", answers) for answers in windows.answers])
        if threshold is None:
            threshold = null_threshold(difference[known], scores[known, 0], empty[known, 0])
        silent = difference > threshold
        scores = np.where(silent[:, None], empty, scores)
        texts = ["" if quiet else text for quiet, text in zip(silent, texts)]
    f1, exact_match = scores[known].mean(0).tolist()
    metrics = {"f1": f1, "exact_match": exact_match} | ({"null_threshold": threshold} if unanswerable else {})
    return metrics, list(zip(texts, ranked))
