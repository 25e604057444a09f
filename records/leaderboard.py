"""Writes the tables and pictures of all records; nobody edits those.

python records/leaderboard.py            the table in README.md, records/published.md and records/figures/
python records/leaderboard.py --check    exits with 1 when what is committed is stale
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, read_json, run_script
from records.log import Log
from records.plot import COLORS, figure
from records.verify import RACES, RECORDS, Record, read_records, read_tracks

BEGIN, END = "<!-- records: written by records/leaderboard.py -->", "<!-- end of records -->"


class Published(NamedTuple):
    """A published encoder. FLOPs count a backward as two forwards; scores in percent, on dev, None where unknown."""

    low: float  # pretraining FLOPs, the least that the source allows
    high: float
    parameters: int  # millions
    mnli: float | None  # matched
    glue: float | None  # mean over tasks, each counted as its source does
    source: str


ELECTRA = "Clark et al. 2020; 1.5 x the FLOPs of its flops_computation.py, where a backward counts as one forward"
RELEASED = f"{ELECTRA}; range: embeddings as look-ups or as products; an estimate: 4M steps"
ISSUES = "(its repository's issues 44 and 39)"
CRAMMED = "an estimate: at most an A6000's peak for a day, at least 40% of it"
FROM_MEMORY = "an estimate: tokens and size of the generator from memory"
TOKENS = "6 x (parameters without embeddings, head at masked tokens) x tokens, and attention; with generators"
PUBLISHED = {
    "crammed BERT": Published(5e18, 1.3e19, 120, 83.9, 78.6, f"Geiping and Goldstein 2022; {CRAMMED}"),
    "BERT-base": Published(2e19, 9.6e19, 110, 85.4, 84.7, "Devlin et al. 2018; steps of 128 or of 512 tokens"),
    "MosaicBERT-base": Published(2.7e19, 2.7e19, 137, 85.6, 85.4, "Portes et al. 2023"),
    "RoBERTa-base": Published(1.3e21, 1.3e21, 125, 87.6, 86.4, f"Liu et al. 2019; {TOKENS}"),
    "ELECTRA-small, paper": Published(2.1e18, 2.1e18, 14, None, 79.9, ELECTRA),
    "ELECTRA-base, paper": Published(9.6e19, 9.6e19, 110, None, 85.1, ELECTRA),
    "ELECTRA-small": Published(
        4.1e19, 5.3e19, 14, 81.3, 81.1, f"{RELEASED} of 128 x 512 tokens, generator as wide {ISSUES}"
    ),
    "ELECTRA-base": Published(3.5e20, 5e20, 110, 88.8, 87.5, f"{RELEASED} (from memory) of 256 x 512 tokens"),
    "COCO-LM base++": Published(1.2e21, 1.6e21, 110, 90.2, 88.6, f"Meng et al. 2021; {TOKENS}; {FROM_MEMORY}"),
    "AMOS base++": Published(1.2e21, 1.8e21, 110, 90.5, 89.4, f"Meng et al. 2022; {TOKENS}; {FROM_MEMORY}"),
    "Ettin-17M": Published(1.4e20, 1.4e20, 17, 79.5, 79.2, f"Weller et al. 2025; {TOKENS}"),
    "Ettin-32M": Published(3e20, 3e20, 32, 83.4, 83.5, f"Weller et al. 2025; {TOKENS}"),
    "Ettin-68M": Published(8e20, 8e20, 68, 87.0, 87.2, f"Weller et al. 2025; {TOKENS}"),
    "Ettin-150M": Published(1.8e21, 1.8e21, 149, 89.2, 88.9, f"Weller et al. 2025; {TOKENS}"),
    "ModernBERT-base": Published(1.8e21, 1.8e21, 149, 89.1, 88.4, f"Warner et al. 2024; {TOKENS}"),
    "NeoBERT": Published(3.4e21, 3.4e21, 250, 88.9, 88.8, f"Le Breton et al. 2025; {TOKENS}"),
    "DeBERTa-v3-base": Published(2e21, 2e21, 184, 90.6, 88.1, f"He et al. 2021; {TOKENS}"),
}

NOT_ENTERED = (
    "Not entered: LTG-BERT (Samuel et al. 2023, arXiv 2303.09859) and GPT-BERT (Charpentier and Samuel 2024, arXiv",
    "2410.24159), whose tables could not be looked up when this was written.",
)

# ---------------------------------------------------------------------------------------------------------------------
# The table


def duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def matches(mnli: float | None) -> str:
    """The best published model whose MNLI-m this one reaches."""
    scores = [(model.mnli, name) for name, model in PUBLISHED.items() if model.mnli is not None]
    reached = [(score, name) for score, name in scores if mnli is not None and mnli >= score]
    return max(reached)[1] if reached else "-"


RACED_IN = {"seconds": "time", "flops": "FLOPs", "score": "score"}  # column of what a track is raced by


def row(root: Path, number: int, record: Record, track: dict) -> dict[str, str]:
    """A record's cells by column. What it gained over the record before stands where it is raced."""
    said, m, race = record.said, record.said["measured"], RACES[track["race"]]
    folder = record.path.relative_to(root.parent).as_posix()
    cells = {
        "#": str(number),
        "what": f"[{said['name']}]({folder})",
        "~matches": matches(m["mnli_matched"]),
        "parameters": f"{m['parameters'] / 1e6:.1f}M",
        "time": duration(m.get("seconds_in_all", m["seconds"])),
        "FLOPs": f"{m['flops']:.2e}",
        "hardware": m["hardware"],
        "validation loss": f"{m['val_loss']:.4f} (n = {m['n']})",
        "test loss": "-" if m["test_loss"] is None else f"{m['test_loss']:.4f}",
        "score": score_of(m),
        "log": f"[logs]({folder}/logs)",
        "contributors": ", ".join(said["contributors"]),
    }
    if race.gain in m:
        cells[RACED_IN[track["race"]]] += f" ({m[race.gain]:.1f} {race.by.rsplit(' ', 1)[0]})"
    return cells


def score_of(measured: dict) -> str:
    """Accuracies of the tracks that are judged by them."""
    if measured["mnli_matched"] is not None:
        both = (measured["mnli_matched"], measured["mnli_mismatched"])
        return "MNLI " + " / ".join(f"{score:.1f}" for score in both if score is not None)
    scores = [(name, measured.get(metric)) for metric, name in (("blimp", "BLiMP"), ("pairs", "pairs"))]
    return ", ".join(f"{name} {score:.1f}" for name, score in scores if score is not None) or "-"


def table(root: Path, tracks: dict[str, dict], records: dict[str, list[Record]]) -> str:
    """A table for each track that has records, and its picture; closed ones, which are history, at the end."""
    parts = []
    for name, track in sorted(tracks.items(), key=lambda item: "closed" in item[1]):
        if not records[name]:
            continue
        target, closed = track["target"], track.get("closed")
        history = f" Closed since {closed['on']}, kept as history: {closed['why']}" if closed else ""
        parts.append(f"**{name}**: {track['title']}. Target: {target['metric']} {target['value']}.{history}\n")
        rows = [row(root, number, record, track) for number, record in enumerate(records[name], 1)]
        parts += [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
        parts += [f"| {' | '.join(cells.values())} |" for cells in rows]
        parts.append(
            f"\n![{name}: {track['race']} of each record, and loss against seconds](records/figures/{name}.png)\n"
        )
    return "\n".join(parts) or "No record yet."


def with_table(text: str, content: str) -> str:
    """A page with the table between its marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"README.md has no place for the table: put the lines {BEGIN!r} and {END!r} back")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_losses(axis, track: dict, runs: dict[str, list[Log]]) -> None:
    """Validation loss against seconds, every run, and the target."""
    for color, (name, logs) in zip(itertools.cycle(COLORS), runs.items()):
        for number, log in enumerate(logs):
            points = [(line.seconds, line.val_loss) for line in log.lines if line.val_loss is not None]
            label = f"{name} (n = {len(logs)})" if number == 0 else None
            axis.plot(*zip(*points), "o-", color=color, lw=1.2, ms=3, alpha=0.8, label=label)
    target = track["target"]
    if target["metric"] == "val_loss":
        axis.axhline(target["value"], color="#444444", lw=1, ls=":", label=f"target {target['value']}")
    axis.set(xlabel="training time (seconds)", ylabel="validation loss (nats per masked token)")
    axis.legend(frameon=False, fontsize=8)


def draw_history(axis, track: dict, records: list[Record]) -> None:
    """What each record is compared by, the oldest first."""
    metric = track["target"]["metric"]
    key = metric if track["race"] == "score" else track["race"]
    values = [record.said["measured"][key] for record in records]
    axis.plot(range(len(records)), values, "o-", color=COLORS[0], drawstyle="steps-post")
    for place, record in zip(enumerate(values), records):
        axis.annotate(record.said["name"], place, xytext=(4, 6), textcoords="offset points", fontsize=8)
    label = {"seconds": "time to target (seconds, logarithmic)", "flops": "FLOPs to target (logarithmic)"}
    axis.set(xlabel="record", ylabel=label.get(key, f"{metric} (%)"), yscale="linear" if key == metric else "log")
    axis.set_xticks(range(len(records)), [record.said["date"] for record in records], fontsize=8)
    axis.margins(x=0.25, y=0.2)


def draw_track(axes, track: dict, records: list[Record]) -> None:
    draw_losses(axes[0], track, {record.said["name"]: record.logs for record in records})
    draw_history(axes[1], track, records)


def draw_published(axes, records: dict[str, list[Record]]) -> list[tuple]:
    """Published encoders and records, by both scores. Returns what spread_names was given."""
    panels = [(axis, *draw_pareto(axis, score, records)) for axis, score in zip(axes, ("mnli", "glue"))]
    axes[0].figure.canvas.draw()  # places and sizes in pixels are known from here on
    for panel in panels:
        spread_names(*panel)
    return panels


def draw_pareto(axis, score: str, records: dict[str, list[Record]]) -> tuple[list, list, list]:
    """A score, "mnli" or "glue", against pretraining FLOPs, and the front that nothing beats.

    Returns what spread_names takes, once all of the figure is drawn.
    """
    points, names, lines = [], [], []
    for name, model in PUBLISHED.items():
        if (value := getattr(model, score)) is None:
            continue
        flops = math.sqrt(model.low * model.high)
        points.append((flops, value))
        names.append(axis.text(*points[-1], name, fontsize=7, in_layout=False))
        reach = [[flops - model.low], [model.high - flops]]
        axis.errorbar(*points[-1], xerr=reach, fmt="o", color=COLORS[1], ms=4, lw=1)
        lines.append([(model.low, value), (model.high, value)])
    for record in itertools.chain(*records.values()):
        m = record.said["measured"]
        if score == "mnli" and m["mnli_matched"] is not None:
            points.append((m["flops"], m["mnli_matched"]))
            name = record.said["name"]
            names.append(axis.text(*points[-1], name, fontsize=7, color=COLORS[0], in_layout=False))
            axis.plot(*points[-1], "*", color=COLORS[0], ms=10)
            lines.append([points[-1]] * 2)
    front: list[tuple[float, float]] = []
    for flops, value in sorted(points):
        if not front or value > front[-1][1]:
            front.append((flops, value))
    axis.plot(*zip(*front), color="#444444", lw=1, ls="--", drawstyle="steps-post", label="Pareto front")
    axis.set(xlabel="pretraining FLOPs (logarithmic; bars: range of estimates)", xscale="log")
    axis.set(ylabel={"mnli": "MNLI-m, accuracy on dev (%)", "glue": "GLUE, mean over tasks on dev (%)"}[score])
    axis.margins(x=0.2, y=0.1)
    axis.legend(frameon=False, fontsize=8)
    for (left, low), (right, high) in itertools.pairwise(front):
        lines += [[(left, low), (right, low)], [(right, low), (right, high)]]
    return names, points, lines


def spread_names(axis, names: list, points: list[tuple[float, float]], lines: list[list[tuple[float, float]]]) -> None:
    """Puts each name near its point, where it covers no line and no other name; a far one is tied to its point.

    lines: all that a name must not lie on, level or upright, from end to end.
    """
    from matplotlib.transforms import Bbox

    back = axis.transData.inverted().transform
    at, inside = axis.transData.transform(points), axis.get_window_extent()  # pixels
    taken = [Bbox(axis.transData.transform(line)).padded(CLEAR) for line in lines]
    taken.append(axis.get_legend().get_window_extent())
    moves = sorted(itertools.product(range(-100, 101, 5), repeat=2), key=lambda move: math.hypot(*move))
    for name, (x, y) in sorted(zip(names, at), key=lambda pair: -pair[1][0]):
        width, height = name.get_window_extent().size
        corners = [(x + dx - width * (dx < 0), y + dy - height / 2) for dx, dy in moves]
        boxes = [Bbox.from_bounds(*corner, width, height) for corner in corners]
        boxes = [box for box in boxes if inside.contains(*box.min) and inside.contains(*box.max)]
        box = next((box for box in boxes if not box.count_overlaps(taken)), boxes[0])
        taken.append(box)
        name.set_position(back(box.min))
        nearest = np.clip((x, y), box.min, box.max)
        if math.dist(nearest, (x, y)) > 2 * CLEAR:
            axis.plot(*back([(x, y), nearest]).T, color="#999999", lw=0.6, zorder=0)


COMPARISONS = {  # of KBERT with the baseline, measured here: in NAME.json; what they are drawn against, and by what
    "race": (("minutes", "flops"), "mnli_matched", "LingNLI -> MNLI-m, accuracy (%)"),
    "babylm": (("words", "flops"), "blimp", "BLiMP, 36 x 100 pairs, accuracy (%)"),
}
UNITS = {"minutes": "minutes on one CPU core", "flops": "FLOPs", "words": "words shown"}


def draw_comparison(axes, name: str, sides: dict[str, list[dict]]) -> None:
    """What pretraining buys: a score against what was spent on it."""
    spent, score, label = COMPARISONS[name]
    for axis, key in zip(axes, spent):
        for color, (side, runs) in zip(COLORS, sides.items()):
            points = sorted((run[key], 100 * run[score]) for run in runs)
            if points[0][0] == 0:  # never pretrained
                axis.axhline(points[0][1], color=color, lw=1, ls="--", label=side)
            else:
                axis.plot(*zip(*points), "o-", color=color, lw=1.3, ms=4, label=side)
        axis.set(xscale="log", xlabel=f"pretraining: {UNITS[key]} (logarithmic)", ylabel=label)
        axis.xaxis.get_major_locator().set_params(subs=(1, 3))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    axes[0].legend(frameon=False, fontsize=8)


CLEAR = 6  # pixels between a name and what it must not cover


def published_table() -> str:
    """What pareto.png is drawn from."""
    lines = ["# Published encoders, as drawn in figures/pareto.png", "", "Written by records/leaderboard.py."]
    lines += ["Scores are percentages, as the sources give them; FLOPs count a backward as two forwards.", ""]
    lines += [
        "| encoder | parameters (M) | pretraining FLOPs | MNLI-m | GLUE mean | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in PUBLISHED.items():
        flops = f"{model.low:.1e}" if model.low == model.high else f"{model.low:.1e} to {model.high:.1e}"
        mnli, glue = ("-" if score is None else f"{score:.1f}" for score in (model.mnli, model.glue))
        lines.append(f"| {name} | {model.parameters} | {flops} | {mnli} | {glue} | {model.source} |")
    lines += ["", *NOT_ENTERED]
    return "\n".join(lines) + "\n"


def save(out: Path, source: str, panels: int, draw: Callable) -> None:
    """A picture that carries the hash of what it was drawn from, by which --check knows whether it is stale."""
    from matplotlib import pyplot

    drawn, axes = figure(panels)
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


def source_hash(*parts: object) -> str:
    """Of what a picture is drawn from, and of the code that draws it."""
    code = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__), RECORDS / "plot.py"))
    return hashlib.sha256(json.dumps([code, *parts], default=str).encode()).hexdigest()


def pictures(
    root: Path, tracks: dict[str, dict], records: dict[str, list[Record]]
) -> Iterator[tuple[str, str, int, Callable]]:
    """File name, hash of its source, number of panels, and what draws them."""
    measured = [record.said["measured"] for record in itertools.chain(*records.values())]
    for name in COMPARISONS:
        if (root / f"{name}.json").exists():
            sides = read_json(root / f"{name}.json")
            yield f"{name}.png", source_hash(sides), 2, partial(draw_comparison, name=name, sides=sides)
    yield "pareto.png", source_hash(measured), 2, lambda axes: draw_published(axes, records)
    for name, track in tracks.items():
        if not (mine := records[name]):
            continue
        said = [(record.said, [log.text for log in record.logs]) for record in mine]
        yield f"{name}.png", source_hash(track, said), 2, partial(draw_track, track=track, records=mine)


def update(root: Path, check: bool) -> list[Path]:
    """Returns what was stale and, unless only checked, has been written anew."""
    tracks = read_tracks(root)
    records = {name: read_records(root / name) for name in tracks}
    readme, stale = root.parent / "README.md", []
    try:
        page = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{readme}: missing or not text ({error})") from error
    texts = {readme: with_table(page, table(root, tracks, records)), root / "published.md": published_table()}
    for path, fresh in texts.items():
        if not path.exists() or fresh != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for name, source, panels, draw in pictures(root, tracks, records):
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
    names = ", ".join(map(str, stale))
    print(f"{'stale' if check else 'written'}: {names}" if stale else "tables and pictures are up to date")
    if check and stale:
        sys.exit("error: run python records/leaderboard.py and commit what it writes")


if __name__ == "__main__":
    run_script(main)
