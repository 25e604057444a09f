"""Minimal pairs, as BLiMP asks them: which of two sentences does a masked language model find likelier?

A sentence scores its pseudo-log-likelihood (Salazar et al. 2020, "Masked Language Model Scoring"): the sum over its
tokens of the log-probability of each where it alone is masked. So an example is a sentence with one token masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerFast

from data.examples import Split
from dataloading import InputError

EQUAL = 1e-4  # nats: sentences of the same tokens, or of the same under a model blind to order, differ by rounding


@dataclass
class Pairs(Split):
    """Examples are sentences with one token masked; labels [examples, 2] are its position and the token itself.

    Where nothing is masked, an example is a sentence as it is; labels, of all its tokens, are then of no use.
    """

    sentence: np.ndarray  # [examples] number of the sentence
    good: np.ndarray  # [pairs] number of the acceptable sentence
    bad: np.ndarray  # [pairs] number of the other
    table: pd.DataFrame  # [pairs] UID, field ("": none), pair (its number in the file), good, bad (the sentences)

    @property
    def examples(self) -> int:
        return len(self.table)

    def scores(self, log_probabilities: list[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of both sentences [pairs], in nats. log_probabilities: of each example's masked token."""
        scores = np.bincount(self.sentence, weights=log_probabilities)  # [sentences]
        return scores[self.good], scores[self.bad]

    def closer_than(self, band: float, log_probabilities: np.ndarray) -> np.ndarray:
        """[examples] whether a sentence belongs to a pair whose scores are less than `band` nats apart."""
        good, bad = self.scores(log_probabilities)
        close = np.abs(good - bad) < band
        return np.isin(self.sentence, np.concatenate([self.good[close], self.bad[close]]))

    def contents(self) -> Iterator[bytes]:
        for row in self.table[["UID", "good", "bad"]].itertuples(index=False):
            yield "\0".join(row).encode()


def encode_pairs(
    tables: dict, columns: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int, masked: bool = True
) -> tuple[Pairs, int]:
    """The pairs of all tables, and how many sentences were cut. Without a UID, a pair's paradigm is its table's name.

    columns: of the acceptable sentence and of the other. masked: whether an example is a sentence with a token masked.
    """
    if masked and tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no mask token: "
            "give --train.base_model a masked language model"
        )
    table = pd.concat([tabulate(name, rows, columns) for name, rows in tables.items()], ignore_index=True)
    numbers, sentences = pd.factorize(pd.concat([table.good, table.bad]))
    tokens, labels, counts, cut = [], [], [], 0
    encoded = tokenizer(list(sentences), truncation=True, max_length=max_length, return_special_tokens_mask=True)
    for ids, special, encoding in zip(encoded["input_ids"], encoded["special_tokens_mask"], encoded.encodings):
        at = np.flatnonzero(np.array(special) == 0)  # [n] neither [CLS] nor [SEP]
        ids = np.array(ids, np.int32)
        labels.append(np.stack([at, ids[at]], axis=1))
        copies = np.tile(ids, (len(at), 1))  # [n, S]
        if masked:
            copies[np.arange(len(at)), at] = tokenizer.mask_token_id
        tokens.append(copies if masked else copies[:1])
        counts.append(len(tokens[-1]))
        cut += bool(encoding.overflowing)
    if empty := [sentences[i] for i in np.flatnonzero(np.array(counts) == 0)]:
        row = table[(table.good == empty[0]) | (table.bad == empty[0])].iloc[0]
        raise InputError(f"pair {row.pair} of {row.UID} has a sentence without words: write it or take the pair away")
    lengths = np.repeat([copies.shape[1] for copies in tokens], counts)
    good, bad = np.split(numbers, 2)
    flat, known, idx = np.concatenate([x.ravel() for x in tokens]), np.ones(len(lengths), bool), range(len(lengths))
    sentence = np.repeat(np.arange(len(sentences)), counts)
    ends, labels = np.cumsum(lengths), np.concatenate(labels)
    return Pairs(flat, None, ends, labels, known, idx, sentence, good, bad, table), cut


def tabulate(name: str, rows, columns: list[str]) -> pd.DataFrame:
    """Pairs.table of one file's rows."""
    read = rows.to_pandas()
    fresh = pd.DataFrame({"UID": name, "field": "", "pair": range(len(read))})
    for column in ("UID", "field"):
        if column in read:
            fresh[column] = read[column].fillna(fresh[column]).astype(str)
    fresh["field"] = fresh["field"].str.replace("/", "_")  # BLiMP writes syntax/semantics both ways
    good, bad = (read[column].fillna("").astype(str) for column in columns)
    return fresh.assign(good=good, bad=bad)


def measure_pairs(log_probabilities: list[float], pairs: Pairs) -> tuple[dict[str, float], pd.DataFrame]:
    """Accuracy in the mean over paradigms, of each field and of each paradigm, and Pairs.table with its scores.

    log_probabilities: of each example's masked token, in nats. Pairs whose scores are equal count half; `equal` is
    their share.
    """
    good, bad = pairs.scores(log_probabilities)
    equal = np.abs(good - bad) < EQUAL
    table = pairs.table.assign(score_good=good, score_bad=bad, correct=np.where(equal, 0.5, good > bad))
    paradigms = table.groupby("UID", sort=False).agg({"field": "first", "correct": "mean"})
    fields = paradigms.groupby("field").correct.mean().drop("", errors="ignore")
    metrics = {"accuracy": paradigms.correct.mean(), "equal": equal.mean()}
    metrics |= {f"field {name}": value for name, value in fields.items()}
    metrics |= {f"paradigm {name}": value for name, value in paradigms.correct.items()}
    return {name: float(value) for name, value in metrics.items()}, table
