"""Makes a record of finished runs: recomputes, checks, and writes records/TRACK/DATE_NAME/, or says why it is none.

    python records/submit.py logs/RUN1 logs/RUN2 logs/RUN3 --track sample-cpu --name smaller-heads --contributors you \\
        --what "Heads of 32 instead of 64." [--paired logs/BEFORE1 ...] [--finetuned logs/MNLI1 ...]
    python records/submit.py --extract records/TRACK/DATE_NAME --out DIR

--finetuned: runs of finetuner.py on these runs' models, one of each, where the track is judged by them. --paired: runs
of the record before, with its own code, on the machine of these runs (--paired-finetuned: their finetunings, where the
score is raced); not needed when that record's own logs were made there, nor where FLOPs are raced. --extract lays that
code out to run again (records/README.md says how).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, run_script
from records.leaderboard import draw_runs
from records.log import read_log
from records.verify import (
    FOLDERS,
    KEEP_CODE,
    MALFORMED,
    NAME,
    RECORDS,
    check_code,
    check_complete,
    check_names,
    check_record,
    measure,
    page,
    read_records,
    read_tracks,
    refusal,
    with_logs,
)


def write_logs(into: Path, said: dict, *runs: Sequence[Path]) -> dict[str, str]:
    """runs: those of each of FOLDERS. A first log stays as it was written, the others lose the code that it keeps.

    Returns what each log was copied from.
    """
    sources = {}
    for folder, paths in zip(FOLDERS, runs):
        for number, path in enumerate(paths, 1):
            log, target = read_log(path), into / folder / f"{number}.txt"
            if log.finetuning != folder.endswith("finetuned"):
                kind = "finetuning: give it to --finetuned" if log.finetuning else "pretraining: give it as a run"
                raise InputError(f"{path} is a {kind}, or, of the record before, to --paired and its kin")
            sources[str(target)] = str(log.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = folder in KEEP_CODE and number == 1
            target.write_bytes(log.path.read_bytes() if whole else log.text.encode())
    said["logs"] = [f"logs/{number}.txt" for number in range(1, len(runs[0]) + 1)]
    return sources | {str(into): "this record"}


def submit(root: Path, runs: Sequence[Path], said: dict, *others: Sequence[Path]) -> Path:
    """Returns the record's folder. Raises InputError, and leaves nothing behind, when the verifier would refuse it.

    others: runs of the rest of FOLDERS, in its order, as far as there are any.
    """
    tracks = read_tracks(root)
    if said["track"] not in tracks:
        raise InputError(f"track {said['track']!r} is not declared: choose from {', '.join(tracks)}")
    check_names(said["contributors"], "--contributors")
    track = tracks[said["track"]]
    if why := refusal(track, said["date"]):
        raise InputError(f"track {said['track']} {why}")
    folder = root / said["track"] / f"{said['date']}_{said['name']}"
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another --name")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    sources = {}
    try:
        sources = write_logs(temporary, said, runs, *others)
        record = with_logs(temporary, said)
        before = next(reversed(read_records(root / said["track"])), None)
        if before:
            said["beats"] = before.path.name
        said["declared_runs"] = record.logs[0].named("config", "train", "declared_runs") or 0
        refuse(check_complete(record, track, before))
        said["measured"] = measure(record, track, before)
        (temporary / "record.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        drawn = {said["name"]: record.logs} | ({before.said["name"]: before.logs} if before else {})
        draw_runs(temporary / "curve.png", track, drawn)
        (temporary / "README.md").write_text(page(record, track, before), encoding="utf-8")
        refuse(check_record(record, tracks, before))
        os.replace(temporary, folder)
    except InputError as error:
        raise InputError(named_by_source(str(error), sources)) from error
    except MALFORMED as error:
        raise InputError(
            f"a value of these logs is missing or of the wrong kind ({error!r}): give runs as they were written"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def named_by_source(message: str, sources: dict[str, str]) -> str:
    """With the logs that were given, not their copies, whose lines have other numbers without the code."""
    for target, source in sources.items():
        message = re.sub(rf"{re.escape(target)}(:\d+)?", lambda _, source=source: source, message)
    return message


def refuse(found: Iterator[str]) -> None:
    if problems := list(found):
        raise InputError("this is no record yet:\n" + "\n".join(problems))


def extract(path: Path, out: Path) -> str:
    """Lays out the code of a run's log, or of a record: of its first run and, if there is one, its first finetuning.

    Returns the commands that these logs open with, a line each.
    """
    logs, code = [path], {}
    if (path / "record.json").exists():
        logs = [log for folder in KEEP_CODE if (log := path / folder / "1.txt").exists()]
    logs = [read_log(log) for log in logs]
    for log in logs:
        code |= log.code
    for name in code:
        if not (out / name).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{path} names a module {name}, which would lie outside {out}: this is not a run's log")
    for problem in (problem for log in logs for problem in check_code(log)):
        raise InputError(problem)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already, and is not an empty folder: choose another --out")
    for name, text in code.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())
    return "\n".join(str(log.named("command")).strip() for log in logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="folders of all declared runs")
    add("--track", help="track of records/tracks.json")
    add("--name", help="a few words with dashes")
    add("--contributors", nargs="+", help="who did it")
    add("--what", help="what is new, in a sentence or two")
    add("--finetuned", type=Path, nargs="+", default=[], metavar="RUN", help="finetuner.py on the models of these runs")
    add("--paired", type=Path, nargs="+", default=[], metavar="RUN", help="runs of the record before on this machine")
    again = "finetunings of those of --paired"
    add("--paired-finetuned", type=Path, nargs="+", default=[], metavar="RUN", help=again)
    add("--systems-only", metavar="WHY", help="nothing that the loss depends on has changed: waives its test")
    add("--extract", type=Path, metavar="RECORD", help="lay out the code of a record, or of a run, in --out")
    add("--out", type=Path, metavar="DIR", help="folder for --extract")
    arguments = parser.parse_args()
    if arguments.extract:
        if not arguments.out:
            parser.error("--extract needs --out DIR")
        commands = extract(arguments.extract, arguments.out)
        print(f"written: {arguments.out}\nbring its data/ there, then run:\n{commands}")
        return
    said = {name: getattr(arguments, name) for name in ("track", "name", "contributors", "what")}
    if missing := [f"--{name}" for name, value in said.items() if not value]:
        parser.error(f"a record needs {', '.join(missing)}")
    if not arguments.runs:
        parser.error("a record needs the folders of its runs")
    if not NAME.fullmatch(arguments.name):
        raise InputError(f"--name {arguments.name!r}: use small letters, digits and dashes")
    said["date"] = max(str(read_log(run).named("environment", "started")) for run in arguments.runs)[:10]
    if arguments.systems_only:
        said["systems_only"] = arguments.systems_only
    others = arguments.finetuned, arguments.paired, arguments.paired_finetuned
    folder = submit(RECORDS, arguments.runs, said, *others)
    print(f"written: {folder}\nnow run: python records/leaderboard.py")


if __name__ == "__main__":
    run_script(main)
