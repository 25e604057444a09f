"""Trains a byte-level BPE tokenizer on fineweb-edu, any text set of the Hugging Face Hub, or files of your own.

    python data/train_tokenizer.py --vocab_size 32768 --max_characters 2_000_000_000 --out data/my_tokenizer
    python data/train_tokenizer.py --files 'corpus/*.jsonl.xz' --vocab_size 16384 --fraction 0.1 --out data/my_tokenizer

The folder loads with `AutoTokenizer.from_pretrained`, and is what the packing scripts take as `--tokenizer`. Only documents of
the train split are learnt from (the flags of data/pack_fineweb_edu.py, the same split).
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.pack_fineweb_edu import add_source_flags, in_background, open_source, read_texts, split_of  # noqa: E402
from dataloading import MAX_VOCAB_SIZE, SPECIAL_TOKENS, InputError  # noqa: E402


def train_tokenizer(batches, vocab_size: int, out: Path) -> None:
    """Trains on an iterable of lists of texts and saves the tokenizer in Hugging Face form."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not len(alphabet) + len(SPECIAL_TOKENS) <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"--vocab_size {vocab_size:,} is not between {len(alphabet) + len(SPECIAL_TOKENS)} (bytes and special "
                         f"tokens) and {MAX_VOCAB_SIZE:,} (shards are uint16)")
    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    # lstrip: the mask stands for a word together with the space before it
    specials = {kind: AddedToken(token, special=True, normalized=False, lstrip=kind == "mask") for kind, token in SPECIAL_TOKENS.items()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(specials.values()), initial_alphabet=alphabet)
    fast.train_from_iterator(batches, trainer)
    if fast.get_vocab_size() < vocab_size:
        raise InputError(f"the text yields {fast.get_vocab_size():,} entries only: give more text, or --vocab_size {fast.get_vocab_size()}")
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, fast.token_to_id(token)) for token in (cls, sep)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=8192, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **{f"{kind}_token": token for kind, token in specials.items()})
    tokenizer.save_pretrained(out)


def training_texts(batches, fractions: tuple, fraction: float, max_characters: int):
    characters = 0
    with tqdm(total=max_characters, unit="char", unit_scale=True, desc="reading") as bar:
        for texts, _ in batches:
            chosen = [text for text in texts if split_of(text, *fractions) == "train" and zlib.crc32(text.encode()) < fraction * 2**32]
            yield chosen
            read = sum(map(len, chosen))
            characters += read
            bar.update(read)
            if characters >= max_characters:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    parser.add_argument("--vocab_size", type=int, default=32768, help="entries, special tokens included (a multiple of 64 is fastest)")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the documents to learn from, drawn by a hash")
    parser.add_argument("--max_characters", type=int, default=1_000_000_000, help="stop reading after this many characters")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stream, sizes, _ = open_source(args)
    batches = in_background(read_texts(stream, sizes, args.text_field))
    texts = training_texts(batches, (args.valid_fraction, args.test_fraction), args.fraction, args.max_characters)
    train_tokenizer(texts, args.vocab_size, args.out)
    print(f"{args.out}: {args.vocab_size:,} entries")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
