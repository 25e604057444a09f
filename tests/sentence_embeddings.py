"""Finetunes a trained encoder into an embedding model, and shows retrieval before and after.

    python tests/sentence_embeddings.py --model logs/RUN/model --out logs/RUN/embeddings

Summaries and descriptions of one documentation string, from the embedded sample, are each other's positives, and the
others of a batch the negatives (MultipleNegativesRankingLoss). Retrieval: which of all validation descriptions is a
summary's own? It needs `pip install -r requirements-export.txt`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"


def read_positives(file: Path) -> Dataset:
    examples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"anchor": x["text"], "positive": x["text_pair"]} for x in examples if x["label"] == 1])


def retrieval(model: SentenceTransformer, pairs: Dataset) -> tuple[float, float]:
    """Share of summaries whose own description comes first, and mean reciprocal rank."""
    summaries, descriptions = (model.encode(pairs[side], convert_to_tensor=True) for side in ("anchor", "positive"))
    scores = model.similarity(summaries, descriptions)  # [pairs, pairs]
    rank = (scores >= scores.diag()[:, None]).sum(1).float()
    return float((rank == 1).float().mean()), float((1 / rank).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained encoder")
    parser.add_argument("--pairs", type=Path, default=SAMPLE / "pairs", help="folder of train.jsonl, validation.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the embedding model")
    parser.add_argument("--steps", type=int, default=80, help="training steps [80]")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a step [16]")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW [1e-3]")
    arguments = parser.parse_args()
    model = SentenceTransformer(str(arguments.model), trust_remote_code=True)
    validation = read_positives(arguments.pairs / "validation.jsonl")
    settings = SentenceTransformerTrainingArguments(
        output_dir=arguments.out / "training",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.lr,
        warmup_steps=arguments.steps // 10,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    before = retrieval(model, validation)
    train, loss = read_positives(arguments.pairs / "train.jsonl"), MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=settings, train_dataset=train, loss=loss).train()
    after = retrieval(model, validation)
    model.save(str(arguments.out))
    for when, (first, reciprocal) in (("before", before), ("after", after)):
        print(f"{when}: own description first {first:.3f}, mean reciprocal rank {reciprocal:.3f}, of {len(validation)}")


if __name__ == "__main__":
    main()
