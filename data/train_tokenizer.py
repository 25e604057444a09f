"""Trains a byte-level BPE tokenizer on fineweb-edu, any text set of the Hugging Face Hub, or files of your own.

    python data/train_tokenizer.py --vocab_size 32768 --max_characters 2_000_000_000 --out data/my_tokenizer
    python data/train_tokenizer.py --files 'corpus/*.jsonl.xz' --vocab_size 16384 --fraction 0.1 --out data/my_tokenizer

The folder loads with `AutoTokenizer.from_pretrained`, and is what the packing scripts take as `--tokenizer`. Only
documents of the train split are learnt from (the split of data/pack_fineweb_edu.py, which takes the same flags for the
text).
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import zlib
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import MAX_VOCAB_SIZE, SPECIAL_TOKENS, InputError, in_background, run_script, sha256_of

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# JSON Lines by the line: the json reader knows no key that the first rows lack
READERS = {".json": "json", ".jsonl": "text", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": gzip, ".xz": lzma, ".bz2": bz2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@contextlib.contextmanager
def reading(what: str, patterns: list[str] | None = None):
    """Turns what goes wrong while reading, an error of any of half a dozen libraries, into one sentence.

    patterns: of the files that are read.
    """
    try:
        yield
    except Exception as error:
        broken = (file for file in matching(patterns or []) if not is_utf8(Path(file)))
        if isinstance(error, UnicodeDecodeError) and (file := next(broken, None)):
            how = f"`iconv -f latin1 -t utf-8 {file}`, if it is latin1"
            raise InputError(f"{file} is not UTF-8 ({error.reason}): convert it, by {how}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {what}: {reason[:300]}") from error


def matching(patterns: list[str]) -> list[str]:
    return sorted({file for pattern in patterns for file in glob.glob(pattern, recursive=True)})


def is_utf8(path: Path) -> bool:
    opened = COMPRESSIONS[path.suffix].open if path.suffix in COMPRESSIONS else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for _ in file:
                pass
    except UnicodeDecodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The source: a stream of texts in an order that never changes, with a position that can be saved


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--dataset", default=FINEWEB_EDU, help="text set on the Hugging Face Hub; its train split is read")
    flag("--name", help="configuration of --dataset (fineweb-edu: sample-10BT unless given)")
    flag("--revision", help="commit, branch or tag of --dataset (its newest commit unless given)")
    files = "read these files instead, all of one type: .jsonl, .json, .txt (each also .gz, .xz, .bz2) or .parquet"
    flag("--files", nargs="+", metavar="GLOB", help=files)
    flag("--text_field", default="text", help="column that holds the text")
    sample_by = "what one document is in a .txt: a paragraph (up to a blank line), a line, or the whole file"
    flag("--sample_by", choices=("paragraph", "line", "document"), default="paragraph", help=sample_by)
    join_lines = "join successive lines (or rows) of a file into documents of about N words: for an utterance a line"
    flag("--join_lines", type=int, metavar="N", help=join_lines)
    batch = "characters read, and tokenized by one process, at a time"
    flag("--batch_characters", type=int, default=1_000_000, help=batch)
    flag("--valid_fraction", type=float, default=0.01, help="share of the documents kept for validation")
    flag("--test_fraction", type=float, default=0.01, help="share of the documents kept for testing")


def unpacked_bytes(path: Path) -> float:
    """Of a compressed file, estimated by how its beginning expands, which differs from one kind of text to another."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        metadata = read_metadata(path)
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    size = path.stat().st_size
    if path.suffix not in COMPRESSIONS:
        return size
    with open(path, "rb") as packed, COMPRESSIONS[path.suffix].open(packed) as unpacked:
        begun = len(unpacked.read(4_000_000))
        return size * begun / max(1, packed.tell())


def open_source(args: argparse.Namespace):
    """A stream of Arrow tables, the bytes in each of its files (estimated; 1 where unknown), and its description."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    if not (0 <= args.valid_fraction and 0 <= args.test_fraction and args.valid_fraction + args.test_fraction < 1):
        raise InputError(
            f"--valid_fraction {args.valid_fraction} and --test_fraction {args.test_fraction} are no shares that "
            "leave some text to train on: change them"
        )
    if args.join_lines is not None and args.join_lines < 1:
        raise InputError(f"--join_lines {args.join_lines} joins nothing: give a number of words")
    if args.files:
        files = matching(args.files)
        if not files:
            raise InputError(f"no file matches --files {' '.join(args.files)}")
        kinds = {next((s for s in reversed(Path(file).suffixes) if s in READERS), None): file for file in files}
        if None in kinds:
            raise InputError(f"--files: {kinds[None]} does not end in any of {', '.join(READERS)}: rename it")
        if len(kinds) > 1:
            raise InputError(f"--files must be all of one type, found {' and '.join(sorted(kinds))}")
        (kind,) = kinds
        options = {"sample_by": "line" if args.join_lines else args.sample_by} if kind == ".txt" else {}
        with reading(f"--files {' '.join(args.files)}"):
            how = {"sample_by": "line"} if kind == ".jsonl" else options
            stream = load_dataset(READERS[kind], data_files=files, split="train", streaming=True, **how)
            sizes = [unpacked_bytes(Path(file)) for file in files]
        source = {"files": [{"name": Path(file).name, "bytes": os.path.getsize(file)} for file in files], **options}
    else:
        name = args.name or ("sample-10BT" if args.dataset == FINEWEB_EDU else None)
        with reading(f"{args.dataset} on the Hugging Face Hub"):
            revision = HfApi().dataset_info(args.dataset, revision=args.revision).sha
            stream = load_dataset(args.dataset, name, revision=revision, split="train", streaming=True)
        source = {"dataset": args.dataset, "name": name, "revision": revision}
        splits = stream.info.splits or {}
        sizes = [splits["train"].num_bytes / stream.num_shards if "train" in splits else 1] * stream.num_shards
    with reading("the data's first row", args.files):
        by_line = json_lines(args.files)
        first = next((row for row in stream if not by_line or row["text"].strip()), None)
        if first is None:
            raise ValueError("there is none")
        columns = list(row_of(first["text"]) if by_line else first)
    if args.text_field not in columns:
        raise InputError(f"the data has no column {args.text_field!r}: choose --text_field out of {', '.join(columns)}")
    source["text_field"] = args.text_field
    if args.join_lines:
        source["join_lines"] = args.join_lines
    return stream.select_columns("text" if by_line else args.text_field).with_format("arrow"), sizes, source


LANES = 16  # files that are open at once


def read_texts(stream, sizes: list[float], args: argparse.Namespace, part=0, parts=1, position=None):
    """Yields (texts, position after them) of one part of the work; blank texts are no documents.

    Files are read side by side, in up to 16 lanes and in proportion to their sizes: every shard then holds text of all
    files, which a loader that shuffles within shards can mix. Where lines are joined, each file has a lane of its own,
    16 are read to their end before the next 16, and the position holds the lines of the unfinished document.
    """
    share_files = stream.num_shards % parts == 0
    if share_files:
        stream, sizes = stream.shard(parts, part, contiguous=False), sizes[part::parts]
    num_lanes = stream.num_shards if args.join_lines else min(LANES, stream.num_shards)
    lanes = [stream.shard(num_lanes, i, contiguous=False) for i in range(num_lanes)]
    weights = [sum(sizes[i::num_lanes]) or 1 for i in range(num_lanes)]
    position = position or [{"state": None, "characters": 0, "ended": False, "lines": []} for _ in lanes]
    for lane, start in zip(lanes, position):
        if start["state"]:
            lane.load_state_dict(start["state"])
    tables = [lane.iter(batch_size=500) for lane in lanes]
    texts, characters, lines_of_json = [], 0, json_lines(args.files)
    while open_lanes := [i for i in range(num_lanes) if not position[i]["ended"]]:
        together = [i for i in open_lanes if i // LANES == open_lanes[0] // LANES]
        i = min(together, key=lambda i: position[i]["characters"] / weights[i])
        with reading("the next texts", args.files):
            table = next(tables[i], None)
            values = [] if table is None else table[0].to_pylist()
            if lines_of_json:
                values = [row_of(line).get(args.text_field) for line in values if line.strip()]
        position[i]["ended"] = table is None
        found = written_texts(values, args.text_field)
        position[i]["characters"] += sum(map(len, found))
        if args.join_lines:
            found, position[i]["lines"] = join(position[i]["lines"] + found, args.join_lines, whole=table is None)
        for text in found:
            if share_files or int.from_bytes(digest_of(text)[8:], "big") % parts == part:
                texts.append(text)
                characters += len(text)
        position[i]["state"] = lanes[i].state_dict()
        if characters >= args.batch_characters:
            yield texts, copy.deepcopy(position)
            texts, characters = [], 0
    yield texts, position


def json_lines(patterns: list[str] | None) -> bool:
    """Whether a line of these files, all of one type, is a row."""
    return any(".jsonl" in Path(file).suffixes for file in matching(patterns or [])[:1])


def row_of(line: str) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{line[:40]!r} is no row, {{name: value, ...}}")
    return row


def written_texts(values: list, text_field: str) -> list[str]:
    """Those that are not blank. Raises InputError for what is not text."""
    for value in values:
        if value is not None and not isinstance(value, str):
            found = type(value).__name__
            raise InputError(f"column {text_field!r} holds {found}, not text: choose another --text_field")
    return [text for text in values if text and not text.isspace()]


def join(lines: list[str], words: int, whole: bool) -> tuple[list[str], list[str]]:
    """Documents of successive lines, each ended by the line that brings it to `words`, and the lines left over.

    A longer line is cut into several. whole: no more lines follow, so that what is left over is a document too.
    """
    lines = [part for line in lines for part in cut(line, words)]
    documents, start, count = [], 0, 0
    for end, line in enumerate(lines, 1):
        count += len(line.split())
        if count >= words or (whole and end == len(lines)):
            documents.append("\n".join(lines[start:end]))
            start, count = end, 0
    return documents, lines[start:]


def cut(line: str, words: int) -> list[str]:
    found = line.split()
    return [line] if len(found) <= words else [" ".join(found[i : i + words]) for i in range(0, len(found), words)]


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, valid_fraction: float, test_fraction: float) -> str:
    place = int.from_bytes(digest_of(text)[:8], "big") / 2**64
    return "valid" if place < valid_fraction else "test" if place < valid_fraction + test_fraction else "train"


def describe_split(valid_fraction: float, test_fraction: float) -> str:
    rule = f"valid below {valid_fraction}, test {test_fraction} further, else train"
    return f"blake2b-128(text), first 8 bytes / 2^64: {rule}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def backend_of(tokenizer):
    """What encodes texts whole, and takes special tokens in them for plain text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a "[MASK]" that somebody wrote is text
    return backend


def bring_tokenizer(name: str, out: Path, max_vocab_size: int = MAX_VOCAB_SIZE):
    """Checks a tokenizer (a folder or Hub id) and copies its files to out/tokenizer as they are: saved anew, they would
    have another hash. Returns backend_of it, and the manifest's entry.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from transformers import AutoTokenizer

    files = {}
    for file in TOKENIZER_FILES:
        if Path(name).is_dir():
            files[file] = Path(name) / file
        else:
            with reading(f"the tokenizer {name}"), contextlib.suppress(RemoteEntryNotFoundError):
                files[file] = Path(hf_hub_download(name, file))
    files = {file: path for file, path in files.items() if path.exists()}
    if "tokenizer.json" not in files:
        raise InputError(f"{name} has no tokenizer.json: choose a tokenizer that was saved in the fast format")
    with reading(f"the tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(files["tokenizer.json"].parent, trust_remote_code=False)
    if len(tokenizer) > max_vocab_size:
        size = f"a vocabulary of {len(tokenizer):,} entries"
        raise InputError(f"{name} has {size}: shards (uint16) hold {max_vocab_size:,}")
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL_TOKENS}
    if missing := [kind for kind, token_id in ids.items() if token_id is None and kind != "unk"]:
        kinds = ", ".join(missing)
        raise InputError(f"{name} has no {kinds} token: choose another, or run `python data/train_tokenizer.py`")
    backend = backend_of(tokenizer)
    written = backend.encode(" ".join(tokenizer.all_special_tokens), add_special_tokens=False).ids
    if taken := set(written) & {ids["cls"], ids["sep"], ids["mask"]}:
        token = tokenizer.convert_ids_to_tokens(min(taken))
        raise InputError(
            f"{name} makes a special token of the text {token!r} even when told not to: choose another tokenizer, or "
            "run `python data/train_tokenizer.py`"
        )

    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    present, sha256 = out / "tokenizer" / "tokenizer.json", sha256_of(files["tokenizer.json"])
    if present.exists() and sha256_of(present) != sha256:
        raise InputError(f"{out} already holds the tokens of another tokenizer than {name}: choose another --out")
    for file, path in files.items():
        target, temporary = out / "tokenizer" / file, out / "tokenizer" / f"{file}.tmp"
        if not target.exists() or target.read_bytes() != path.read_bytes():
            shutil.copyfile(path, temporary)
            os.replace(temporary, target)
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return backend, {"name": shown, "sha256": sha256, "vocab_size": len(tokenizer), **ids}


def train_tokenizer(batches, vocab_size: int, out: Path) -> None:
    """Trains on an iterable of lists of texts and saves the tokenizer in Hugging Face form."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"--vocab_size {vocab_size:,} is not between {smallest} (bytes and special tokens) and "
            f"{MAX_VOCAB_SIZE:,} (shards are uint16)"
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = {
        kind: AddedToken(token, special=True, normalized=False, lstrip=kind == "mask")  # a mask hides the space too
        for kind, token in SPECIAL_TOKENS.items()
    }
    tokens = list(specials.values())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=tokens, initial_alphabet=alphabet)
    backend.train_from_iterator(batches, trainer)
    if (size := backend.get_vocab_size()) < vocab_size:
        raise InputError(f"the text yields {size:,} entries only: give more, or a smaller --vocab_size")
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{kind}_token": token for kind, token in specials.items()},
    ).save_pretrained(out)


def training_texts(batches, fractions: tuple[float, float], fraction: float, max_characters: int):
    """Yields lists of the texts to learn from: the share `fraction` of train, until max_characters of it are read.

    fractions: of the documents, the shares of valid and test.
    """
    characters = 0
    with tqdm(total=max_characters, unit="char", unit_scale=True, desc="reading", mininterval=1) as bar:
        for texts, _ in batches:
            texts = [text for text in texts if zlib.crc32(text.encode()) < fraction * 2**32]
            texts = [text for text in texts if split_of(text, *fractions) == "train"]
            yield texts
            read = sum(map(len, texts))
            characters += read
            bar.update(read)
            if characters >= max_characters:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    flag = parser.add_argument
    flag("--vocab_size", type=int, default=32768, help="entries, special tokens included (64 should divide it)")
    flag("--fraction", type=float, default=1.0, help="share of the documents to learn from, drawn by a hash")
    flag("--max_characters", type=int, default=1_000_000_000, help="stop after this many characters learnt from")
    flag("--out", type=Path, required=True, help="folder for the tokenizer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stream, sizes, _ = open_source(args)
    batches = in_background(read_texts(stream, sizes, args))
    with contextlib.closing(batches):
        texts = training_texts(batches, (args.valid_fraction, args.test_fraction), args.fraction, args.max_characters)
        train_tokenizer(texts, args.vocab_size, args.out)
    print(f"{args.out}: {args.vocab_size:,} entries")


if __name__ == "__main__":
    run_script(main)
