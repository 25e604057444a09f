"""Makes a record of finished runs: recomputes, checks, and writes records/TRACK/DATE_NAME/, or says why it is none.

    python records/submit.py logs/RUN1 logs/RUN2 logs/RUN3 --track sample-cpu --name smaller-heads --contributors you \\
        --what "Heads of 32 instead of 64." [--paired logs/BEFORE1 ...] [--finetuned logs/MNLI1 ...]

--paired: runs of the record before, with its own code, on the machine of these runs; not needed when that record's own logs were made there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from records.logs import read_log

from dataloading import InputError
from records.leaderboard import draw_runs
from records.verify import RECORDS, Record, check_record, measure, paired_logs, read_records, read_tracks

PAGE = """# {name}

{what}

| runs | parameters | training time | model FLOPs | validation loss | target | p |
|---|---|---|---|---|---|---|
| {n} | {parameters:.1f}M | {seconds:.1f} s ± {seconds_std:.1f} | {flops:.3e} | {val_loss:.4f} ± {val_loss_std:.4f} | {target} | {p} |

{hardware}, track [{track}](../../README.md). {against}

![Loss against seconds](curve.png)

Logs: {logs}. The code that ran: [code](code). Command of the first run:

```bash
{command}
```
"""


def write_record(
    into: Path, said: dict, runs: Sequence[Path], finetuned: Sequence[Path], paired: Sequence[Path]
) -> Record:
    """Logs without their code, and the code once. Raises InputError for what is not a log."""
    logs: dict[str, list] = {}
    for folder, paths in (("logs", runs), ("finetuned", finetuned), ("paired", paired)):
        for number, path in enumerate(paths, 1):
            log = read_log(path)
            target = into / folder / f"{number}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(log.text, encoding="utf-8")
            logs.setdefault(folder, []).append(log)
    for name, text in logs["logs"][0].code.items():
        target = into / "code" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if not logs["logs"][0].code:
        raise InputError(f"{runs[0]} has no code in it: give the folder of a run under logs/")
    said["logs"] = [f"logs/{number}.txt" for number in range(1, len(runs) + 1)]
    return Record(
        into,
        said,
        *(
            [read_log(into / folder / f"{number}.txt") for number in range(1, len(logs.get(folder, [])) + 1)]
            for folder in ("logs", "finetuned", "paired")
        ),
    )


def page(record: Record, track: dict, before: Record | None) -> str:
    said, measured = record.said, record.said["measured"]
    against = "The first of its track."
    if before:
        against = (
            f"{measured['speedup']:.2f} times as fast as [{before.said['name']}](../{before.path.name}) on the same machine "
            f"(Welch's t-test, p = {measured['p_faster']:.1e})."
        )
    return PAGE.format(
        **{key: value for key, value in measured.items() if key not in ("parameters",)},
        parameters=measured["parameters"] / 1e6,
        name=said["name"],
        what=said["what"],
        track=said["track"],
        against=against,
        command=record.logs[0].sections["command"].strip(),
        target=f"{track['target']['metric']} {track['target']['value']}",
        p="waived" if said.get("systems_only") else f"{measured['p_target']:.1e}",
        logs=", ".join(f"[{number}]({name})" for number, name in enumerate(said["logs"], 1)),
    )


def submit(
    root: Path, runs: Sequence[Path], said: dict, finetuned: Sequence[Path] = (), paired: Sequence[Path] = ()
) -> Path:
    """Returns the record's folder. Raises InputError, and leaves nothing behind, when it would not pass the verifier."""
    tracks = read_tracks(root)
    if said["track"] not in tracks:
        raise InputError(f"track {said['track']!r} is not declared: choose from {', '.join(tracks)}")
    track = tracks[said["track"]]
    if track["target"] is None:
        raise InputError(f"track {said['track']} is not open yet: {track['why']}")
    folder = root / said["track"] / f"{said['date']}_{said['name']}"
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another --name")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        record = write_record(temporary, said, runs, finetuned, paired)
        before = next(reversed(read_records(root / said["track"])), None)
        if before:
            said["beats"] = before.path.name
        said["declared_runs"] = record.logs[0].named("config", "train", "declared_runs") or 0
        said["measured"] = measure(record, track["target"], paired_logs(record, before))
        (temporary / "record.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        draw_runs(
            temporary / "curve.png",
            track,
            {said["name"]: record.logs} | ({before.said["name"]: before.logs} if before else {}),
        )
        (temporary / "README.md").write_text(page(record, track, before), encoding="utf-8")
        if problems := list(check_record(record, tracks, before)):
            raise InputError("this is no record yet:\n" + "\n".join(problems))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of all declared runs")
    parser.add_argument("--track", required=True, help="track of records/tracks.json")
    parser.add_argument("--name", required=True, help="a few words with dashes")
    parser.add_argument("--contributors", required=True, nargs="+", help="who did it")
    parser.add_argument("--what", required=True, help="what is new, in a sentence or two")
    parser.add_argument(
        "--finetuned", type=Path, nargs="+", default=[], metavar="RUN", help="MNLI finetunings of these runs"
    )
    parser.add_argument(
        "--paired", type=Path, nargs="+", default=[], metavar="RUN", help="runs of the record before on this machine"
    )
    parser.add_argument(
        "--systems-only",
        metavar="WHY",
        help="nothing that the loss depends on has changed: waives the test of the loss",
    )
    arguments = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", arguments.name):
        raise InputError(f"--name {arguments.name!r}: use small letters, digits and dashes")
    started = max(str(read_log(run).named("environment", "started")) for run in arguments.runs)
    said = {
        "track": arguments.track,
        "name": arguments.name,
        "date": started[:10],
        "contributors": arguments.contributors,
        "what": arguments.what,
    }
    if arguments.systems_only:
        said["systems_only"] = arguments.systems_only
    folder = submit(RECORDS, arguments.runs, said, arguments.finetuned, arguments.paired)
    print(f"written: {folder}\nnow run: python records/leaderboard.py")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
