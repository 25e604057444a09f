"""Draws any runs: loss, learning rate, masking rate and tokens a second of pretrainings; loss, score and rate of finetunings.

python records/plot.py logs/RUN [logs/RUN ...] [--out curves.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataloading import InputError
from records.logs import Log, read_log
from trainer import TrainConfig, lr_factor, mask_rate

COLORS = ("#c1272d", "#2a6fb0", "#3a8a4f", "#b8860b", "#7b4fa3", "#444444")  # told apart on white by most eyes
PANELS = {
    "loss": "loss (nats per masked token; points: validation)",
    "score": "score on the validation split",
    "lr": "learning rate",
    "mask": "masking rate (fraction of a row)",
    "rate": "tokens per second",
}


def series(log: Log) -> dict[str, list[tuple[list[float], list[float], str]]]:
    """What to draw of a log: panel -> curves of minutes, values and style."""
    found: dict[str, list] = {panel: [] for panel in PANELS}

    def add(panel: str, points: list[tuple[float, float]], style: str) -> None:
        if points:
            found[panel].append(([seconds / 60 for seconds, _ in points], [value for _, value in points], style))

    for run in sorted({line.run for line in log.lines}, key=lambda run: run or 0):
        lines = [line for line in log.lines if line.run == run]
        add("loss", [(line.seconds, line.train_loss) for line in lines if line.train_loss is not None], "-")
        add("loss", [(line.seconds, line.val_loss) for line in lines if line.val_loss is not None], "o--")
        add("score", [(line.seconds, line.dev_score) for line in lines if line.dev_score is not None], "o-")
        add("lr", [(line.seconds, line.lr) for line in lines if line.lr is not None], "-")
        trained = [line for line in lines if line.tokens is not None and line.train_loss is not None]
        add(
            "rate",
            [
                (b.seconds, (b.tokens - a.tokens) / (b.seconds - a.seconds))
                for a, b in itertools.pairwise(trained)
                if b.seconds > a.seconds
            ],
            "-",
        )
    if not log.finetuning:
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        train = TrainConfig(**{name: value for name, value in log.named("config", "train").items() if name in known})
        peak = log.sections["config"].get("adamw_lr", train.muon_lr)
        progress = [
            (
                line.seconds,
                min(
                    1.0,
                    line.seconds / (60 * train.max_minutes)
                    if train.max_minutes is not None
                    else line.step / train.steps,
                ),
            )
            for line in log.lines
        ]
        add("lr", [(seconds, peak * lr_factor(p, train)) for seconds, p in progress], "-")
        add("mask", [(seconds, mask_rate(p, train)) for seconds, p in progress], "-")
    return found


def figure(panels: Sequence[str], columns: int = 2):
    """A figure on white, which reads on light and dark pages alike, and its axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    drawn, axes = pyplot.subplots(
        rows,
        min(columns, len(panels)),
        figsize=(5.2 * min(columns, len(panels)), 3.4 * rows),
        dpi=130,
        facecolor="white",
        layout="constrained",
        squeeze=False,
    )
    for number, axis in enumerate(axes.flat):
        axis.set_visible(number < len(panels))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes.flat


def draw(runs: Sequence[Path], out: Path) -> None:
    """Writes a picture of the runs' logs. Raises InputError for what is not a log."""
    from matplotlib import pyplot

    logs = {path: read_log(path) for path in runs}
    found = {path: series(log) for path, log in logs.items()}
    panels = [panel for panel in PANELS if any(curves[panel] for curves in found.values())]
    drawn, axes = figure(panels)
    for axis, panel in zip(axes, panels):
        for color, (path, curves) in zip(itertools.cycle(COLORS), found.items()):
            for number, (minutes, values, style) in enumerate(curves[panel]):
                marked = "o" in style
                axis.plot(
                    minutes,
                    values,
                    style,
                    color=color,
                    lw=1.3,
                    ms=3.5,
                    alpha=1.0 if marked or panel != "loss" else 0.55,
                    label=path.name if number == 0 and len(found) > 1 else None,
                )
        axis.set(xlabel="training time (minutes)", title=PANELS[panel])
        axis.title.set_fontsize(10)
    if len(found) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    drawn.savefig(out)
    pyplot.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a log")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write [curves.png]")
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
