"""Draws any runs: loss and tokens a second, learning and masking rates where metrics.jsonl stands beside the log.

python records/plot.py logs/RUN [logs/RUN ...] [--out curves.png]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError, run_script
from records.log import Log, read_log

COLORS = ("#c1272d", "#2a6fb0", "#3a8a4f", "#b8860b", "#7b4fa3", "#444444")  # told apart on white by most eyes
PANELS = {
    "loss": "loss (nats per masked token; points: validation)",
    "score": "score on the validation split",
    "lr": "learning rate (of the matrices)",
    "mask": "masking rate (fraction of a row)",
    "rate": "tokens per second",
}
DRAWN = {"train_loss": ("loss", "-"), "val_loss": ("loss", "o--"), "dev_score": ("score", "o-"), "lr": ("lr", "-")}
Points = list[tuple[float, float]]


def series(log: Log) -> dict[str, list[tuple[Points, str]]]:
    """What to draw of a log: panel -> curves of (minutes, value), each with its style."""
    found: dict[str, list] = {panel: [] for panel in PANELS}

    def add(panel: str, points: Points, style: str = "-") -> None:
        if points:
            found[panel].append(([(seconds / 60, value) for seconds, value in points], style))

    for part in dict.fromkeys((line.task, line.run) for line in log.lines):  # a run of each task, or the one there is
        lines = [line for line in log.lines if (line.task, line.run) == part]
        for name, (panel, style) in DRAWN.items():
            values = [(line.seconds, getattr(line, name)) for line in lines]
            add(panel, [(seconds, value) for seconds, value in values if value is not None], style)
        trained = [line for line in lines if line.tokens is not None and line.train_loss is not None]
        pairs = [(a, b) for a, b in itertools.pairwise(trained) if b.seconds > a.seconds]
        add("rate", [(b.seconds, (b.tokens - a.tokens) / (b.seconds - a.seconds)) for a, b in pairs])
    beside = log.path.with_name("metrics.jsonl")
    if not log.finetuning and beside.exists():
        try:
            metrics = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
            if not all(isinstance(values, dict) for values in metrics):
                raise ValueError("a line is no {name: value, ...}")
        except ValueError as error:
            raise InputError(f"{beside} is damaged ({error}): move it away to draw the log alone") from error
        for panel, name in (("lr", "lr"), ("mask", "mask_rate")):
            add(panel, [(values["seconds"], values[name]) for values in metrics if {name, "seconds"} <= values.keys()])
    return found


def figure(panels: int):
    """A figure of so many panels, two side by side, on white, which reads on light and dark pages, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = -(-panels // 2), min(2, panels)
    size = 5.2 * columns, 3.4 * rows
    drawn, axes = pyplot.subplots(
        rows, columns, figsize=size, dpi=130, facecolor="white", layout="constrained", squeeze=False
    )
    for number, axis in enumerate(axes.flat):
        axis.set_visible(number < panels)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes.flat


def draw(runs: Sequence[Path], out: Path) -> None:
    """Writes a picture of the runs' logs. Raises InputError for what is not a log."""
    from matplotlib import pyplot

    found = {path: series(read_log(path)) for path in runs}
    panels = [panel for panel in PANELS if any(curves[panel] for curves in found.values())]
    if not panels:
        raise InputError(f"{', '.join(map(str, runs))}: no line with a number to draw yet")
    drawn, axes = figure(len(panels))
    for axis, panel in zip(axes, panels):
        for color, (path, curves) in zip(itertools.cycle(COLORS), found.items()):
            name = path.parent.name if path.name == "log.txt" else path.name
            for number, (points, style) in enumerate(curves[panel]):
                alpha = 1.0 if "o" in style or panel != "loss" else 0.55
                label = name if number == 0 and len(found) > 1 else None
                axis.plot(*zip(*points), style, color=color, lw=1.3, ms=3.5, alpha=alpha, label=label)
        axis.set_xlabel("training time (minutes)")
        axis.set_title(PANELS[panel], fontsize=10)
    if len(found) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    drawn.savefig(out)
    pyplot.close(drawn)


def draw_curves(run: Path) -> None:
    """curves.png beside a run's log; a picture that cannot be drawn ends nothing."""
    try:
        draw([run], run / "curves.png")
    except Exception as error:  # no matplotlib, a line cut in half by a kill, a font that is missing
        print(f"no curves.png ({type(error).__name__}: {error}): try python records/plot.py {run}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a log")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write [curves.png]")
    arguments = parser.parse_args()
    if arguments.out.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {arguments.out} is no .png, .svg or .pdf file: name it so")
    draw(arguments.runs, arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
