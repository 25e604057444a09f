"""Writes the tables and pictures of all records; nobody edits those.

python records/leaderboard.py            the table in README.md and the pictures in records/figures/
python records/leaderboard.py --check    exits with 1 when what is committed is stale
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from records.logs import Log

from dataloading import InputError
from records.plot import COLORS, figure
from records.verify import RECORDS, Record, read_records, read_tracks

BEGIN, END = "<!-- records: written by records/leaderboard.py -->", "<!-- end of records -->"

# Published encoders: pretraining FLOPs (low, high) as estimated from their papers, parameters in millions, MNLI-m on dev in percent.
PUBLISHED = {
    "crammed BERT": (5e18, 5e18, 120, 83.9),
    "BERT-base": (2e19, 8e19, 110, 85.4),
    "MosaicBERT-base": (2.7e19, 2.7e19, 137, 85.6),
    "RoBERTa-base": (1.3e21, 1.3e21, 125, 87.6),
    "Ettin-17M": (1.4e20, 1.4e20, 17, 79.5),
    "Ettin-32M": (3e20, 3e20, 32, 83.4),
    "Ettin-68M": (8e20, 8e20, 68, 87.0),
    "Ettin-150M": (1.8e21, 1.8e21, 149, 89.2),
    "ModernBERT-base": (1.8e21, 1.8e21, 149, 89.1),
    "NeoBERT": (3.4e21, 3.4e21, 250, 88.9),
    "DeBERTa-v3-base": (2e21, 2e21, 184, 90.6),
}

# ---------------------------------------------------------------------------------------------------------------------
# The table


def duration(seconds: float) -> str:
    hours, rest = divmod(seconds, 3600)
    return (
        f"{hours:.0f} h {rest / 60:.0f} min"
        if hours
        else f"{rest // 60:.0f} min {rest % 60:.0f} s"
        if rest >= 60
        else f"{rest:.1f} s"
    )


def matches(mnli: float | None) -> str:
    """The best published model whose MNLI-m this one reaches."""
    reached = [(score, name) for name, (_, _, _, score) in PUBLISHED.items() if mnli is not None and mnli >= score]
    return max(reached)[1] if reached else "-"


def table(root: Path, tracks: dict[str, dict], records: dict[str, list[Record]]) -> str:
    parts = []
    for name, track in tracks.items():
        if not records[name]:
            continue
        parts.append(f"**{name}**: {track['title']}. Target: {track['target']['metric']} {track['target']['value']}.\n")
        parts.append(
            "| # | what | ~matches | parameters | time | FLOPs | hardware | validation loss | test loss | MNLI m / mm | log | contributors |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for number, record in enumerate(records[name], 1):
            said, m, folder = record.said, record.said["measured"], record.path.relative_to(root.parent).as_posix()
            faster = f" ({m['speedup']:.1f} times as fast)" if "speedup" in m else ""
            test = "-" if m["test_loss"] is None else f"{m['test_loss']:.4f}"
            mnli = "-" if m["mnli_matched"] is None else f"{m['mnli_matched']:.1f} / {m['mnli_mismatched']:.1f}"
            parts.append(
                f"| {number} | [{said['name']}]({folder}) | {matches(m['mnli_matched'])} | {m['parameters'] / 1e6:.1f}M | {duration(m['seconds'])}{faster} | "
                f"{m['flops']:.2e} | {m['hardware']} | {m['val_loss']:.4f} (n = {m['n']}) | {test} | {mnli} | [logs]({folder}/logs) | "
                f"{', '.join(said['contributors'])} |"
            )
        parts.append(f"\n![{name}: seconds of each record, and loss against seconds](records/figures/{name}.png)\n")
    return "\n".join(parts) or "No record yet."


def with_table(text: str, content: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"README.md has no place for the table: put the lines {BEGIN!r} and {END!r} back")
    return re.sub(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{content}\n{END}", text, flags=re.DOTALL
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_losses(axis, track: dict, runs: dict[str, list[Log]]) -> None:
    """Validation loss against seconds, every run, and the target."""
    for color, (name, logs) in zip(COLORS * len(runs), runs.items()):
        for number, log in enumerate(logs):
            points = [(line.seconds, line.val_loss) for line in log.lines if line.val_loss is not None]
            axis.plot(
                *zip(*points),
                "o-",
                color=color,
                lw=1.2,
                ms=3,
                alpha=0.8,
                label=f"{name} (n = {len(logs)})" if number == 0 else None,
            )
    if track["target"]["metric"] == "val_loss":
        axis.axhline(
            track["target"]["value"], color="#444444", lw=1, ls=":", label=f"target {track['target']['value']}"
        )
    axis.set(xlabel="training time (seconds)", ylabel="validation loss (nats per masked token)")
    axis.legend(frameon=False, fontsize=8)


def draw_history(axis, records: list[Record]) -> None:
    days = [record.said["date"] for record in records]
    axis.plot(
        range(len(records)),
        [record.said["measured"]["seconds"] for record in records],
        "o-",
        color=COLORS[0],
        drawstyle="steps-post",
    )
    for number, record in enumerate(records):
        axis.annotate(
            record.said["name"],
            (number, record.said["measured"]["seconds"]),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set(xlabel="record", ylabel="time to target (seconds, logarithmic)", yscale="log")
    axis.set_xticks(range(len(records)), days, fontsize=8)
    axis.margins(x=0.25, y=0.2)


def draw_pareto(axis, records: dict[str, list[Record]]) -> None:
    """MNLI against pretraining FLOPs, and the front that nothing published beats."""
    points = [(math.sqrt(low * high), score, name, (low, high)) for name, (low, high, _, score) in PUBLISHED.items()]
    for flops, score, name, (low, high) in points:
        axis.errorbar(
            flops,
            score,
            xerr=[[flops - low], [high - flops]] if high > low else None,
            fmt="o",
            color="#2a6fb0",
            ms=4,
            lw=1,
        )
        below = name in ("BERT-base", "ModernBERT-base")  # their neighbours' names stand above
        axis.annotate(
            name,
            (flops, score),
            xytext=(-5, -4) if below else (5, 3),
            textcoords="offset points",
            fontsize=7,
            ha="right" if below else "left",
            va="top" if below else "bottom",
        )
    for record in (
        record for track in records.values() for record in track if record.said["measured"]["mnli_matched"] is not None
    ):
        m = record.said["measured"]
        axis.plot(m["flops"], m["mnli_matched"], "*", color=COLORS[0], ms=10)
        axis.annotate(
            record.said["name"],
            (m["flops"], m["mnli_matched"]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=7,
            color=COLORS[0],
        )
        points.append((m["flops"], m["mnli_matched"], "", ()))
    front, best = [], -math.inf
    for flops, score, *_ in sorted(points):
        if score > best:
            front, best = [*front, (flops, score)], score
    axis.plot(*zip(*front), color="#444444", lw=1, ls="--", drawstyle="steps-post", label="Pareto front")
    axis.set(
        xlabel="pretraining FLOPs (logarithmic; bars: range of estimates)",
        ylabel="MNLI-m accuracy on dev (%)",
        xscale="log",
    )
    axis.margins(x=0.15, y=0.1)
    axis.legend(frameon=False, fontsize=8)


def save(out: Path, source: str, panels: int, draw: Callable) -> None:
    """A picture that carries the hash of what it was drawn from, by which --check knows whether it is stale."""
    from matplotlib import pyplot

    drawn, axes = figure(range(panels))
    draw(axes)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(out, metadata={"Source": source})
    pyplot.close(drawn)


def source_of(out: Path) -> str | None:
    if not out.exists():
        return None
    from PIL import Image

    with Image.open(out) as image:
        return image.text.get("Source")


def draw_runs(out: Path, track: dict, runs: dict[str, list[Log]]) -> None:
    """A record's curve.png."""
    save(out, "", 1, lambda axes: draw_losses(axes[0], track, runs))


def pictures(tracks: dict[str, dict], records: dict[str, list[Record]]) -> dict[str, tuple[str, int, Callable]]:
    """File name -> hash of its source, number of panels, and what draws them."""

    def source(*parts: object) -> str:
        code = "".join(Path(path).read_text(encoding="utf-8") for path in (__file__, RECORDS / "plot.py"))
        return hashlib.sha256(json.dumps([code, *parts], default=str).encode()).hexdigest()

    found = {
        "pareto.png": (
            source([record.said["measured"] for track in records.values() for record in track]),
            1,
            lambda axes: draw_pareto(axes[0], records),
        )
    }
    for name, track in tracks.items():
        if records[name]:

            def draw(axes, track=track, mine=records[name]):
                draw_losses(axes[0], track, {record.said["name"]: record.logs for record in mine})
                draw_history(axes[1], mine)

            found[f"{name}.png"] = (
                source(track, [(record.said, [log.text for log in record.logs]) for record in records[name]]),
                2,
                draw,
            )
    return found


def update(root: Path, check: bool) -> list[Path]:
    """Returns what was stale and, unless only checked, has been written anew."""
    tracks = read_tracks(root)
    records = {name: read_records(root / name) for name in tracks}
    readme, stale = root.parent / "README.md", []
    text = readme.read_text(encoding="utf-8")
    fresh = with_table(text, table(root, tracks, records))
    if fresh != text:
        stale.append(readme)
        if not check:
            readme.write_text(fresh, encoding="utf-8")
    for name, (source, panels, draw) in pictures(tracks, records).items():
        out = root / "figures" / name
        if source_of(out) != source:
            stale.append(out)
            if not check:
                save(out, source, panels, draw)
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    check = parser.parse_args().check
    stale = update(RECORDS, check)
    print(
        f"{'stale' if check else 'written'}: {', '.join(map(str, stale))}"
        if stale
        else "tables and pictures are up to date"
    )
    if check and stale:
        sys.exit("error: run python records/leaderboard.py and commit what it writes")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
