"""Training curves of a table's runs, and learning rates over epochs. The same input gives the same bytes."""

import io
from collections import defaultdict
from collections.abc import Iterable
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from depthlab.report.given import Drawn, Given, Table
from depthlab.report.tables import Row

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito
STYLES = ["-", "--", ":", "-."]  # of further ones
SAMPLES = 20  # learning rates drawn per epoch; 500 steps / 20 = 25 divides every CLR peak


def curves(given: Given) -> Drawn:
    """One column of panels per value of the first axis (all in one where there is no other), one colour per cell in it:
    mean over seeds and a band of ± std.

    Above the error on held-out images, below the training loss (logarithmic). Diverged runs are counted, not drawn.
    Nothing if no run has finished.
    """
    experiment, block = given.experiment, given.block
    rows = [row for row in block.rows if row.records]
    comparable = block.own_data and block.budget == 1  # with the paper's final numbers
    if not any(row.finished for row in rows):
        return Drawn()
    first, *rest = experiment.axes if len(experiment.axes) > 1 else [None, *experiment.axes]
    panels: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        panels[row.cell.get(first)].append(row)
    names = list(dict.fromkeys(_rest(row, rest) for row in block.rows))
    figure = canvas(max(5.2, 4.6 * len(panels)), 6.4)
    axes = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for column, (value, members) in enumerate(panels.items()):
        top, bottom = axes[:, column]
        top.set_title(experiment.label(value) if value is not None else fill(experiment.title, 48))
        for row in members:
            turn, place = divmod(names.index(_rest(row, rest)), len(COLOURS))
            colour, style = COLOURS[place], STYLES[turn % len(STYLES)]
            count = f"{len(row.finished)}" + (f", {len(row.diverged)} diverged" if row.diverged else "")
            name = " ".join(experiment.label(row.cell[axis]) for axis in rest) or experiment.name_of(row.cell)
            _band(top, row, "val_error", colour, style, f"{name} ({count})")
            _band(bottom, row, "train_loss", colour, style, None)
            paper = experiment.published(row.cell)
            if comparable and {experiment.metric, "epochs"} <= paper.keys():
                point = paper["epochs"], paper[experiment.metric]
                top.plot(*point, "D", ms=5, mfc="white", mec=colour, mew=1.4, zorder=5)
        top.legend(
            loc="upper right",
            fontsize=8,
            framealpha=0.7,
            edgecolor="none",
            title="runs (n): mean, band ± std",
            title_fontsize=8,
        )
        bottom.set_xlabel("epoch")
        logarithmic(bottom)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (top, bottom):
            axis.grid(alpha=0.25, lw=0.6)
            axis.set_xlim(left=0)
    axes[0, 0].set_ylabel(f"{evaluated_on(rows)} error (%)")
    axes[1, 0].set_ylabel("training loss (running mean)")
    note = "    ◇ the paper's final error" if comparable and experiment.paper.get("published") else ""
    figure.suptitle(f"{block.data or experiment.id}, budget {block.budget:g}, {block.precision}{note}", fontsize=10)
    return Drawn({"": figure})


def schedules(given: Given, schedules: list[str], steps_per_epoch: int) -> Drawn:
    """Learning rate over epochs, a panel per schedule; nothing is trained.

    Args:
        schedules: names in conf/sched.
    """
    steps, experiment = steps_per_epoch, given.experiment
    parts = {name: given.build(given.compose(f"sched={name}"), "sched") for name in schedules}
    figure = canvas(7.2, 1.9 * len(parts) + 0.7)
    axes = figure.subplots(len(parts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    lines, rows = [], []
    for axis, colour, (name, schedule) in zip(axes, COLOURS * len(parts), parts.items(), strict=False):
        epochs, lr = schedule.epochs, [schedule.lr(t, steps) for t in range(schedule.epochs * steps)]
        every = max(1, steps // SAMPLES)
        x, y = [t / steps for t in range(0, len(lr), every)] + [epochs], lr[::every]
        axis.stairs(y, x, baseline=None, color=colour, lw=1.5)  # a rate holds until the next step
        axis.fill_between(x[:-1], y, step="post", color=colour, alpha=0.12, lw=0)
        axis.axvline(epochs, color="0.6", lw=0.8, ls=":")
        axis.set_title(f"{experiment.label(name)}, {epochs} epochs", fontsize=10, loc="left")
        axis.set_ylabel("learning rate")
        axis.grid(alpha=0.25, lw=0.6)
        axis.set_ylim(bottom=0)
        used = [lr[e * steps : (e + 1) * steps] for e in range(epochs)]
        rows += [
            {"sched": name, "epoch": e, "lr_first": u[0], "lr_min": min(u), "lr_max": max(u)}
            for e, u in enumerate(used)
        ]
        paper = experiment.published({"sched": name}).get("epochs")
        lines.append([
            experiment.label(name) + given.notes.at({"sched": name}, experiment.metric),
            str(epochs) if paper in (None, epochs) else f"{epochs} (paper {paper})",
            *(f"{value:.6g}" for value in (lr[0], min(lr), max(lr), lr[-1])),
        ])  # fmt: skip
    axes[-1].set_xlabel("epoch")
    axes[-1].set_xlim(0, max(schedule.epochs for schedule in parts.values()) * 1.01)
    header = ["schedule", "epochs", "first lr", "lowest lr", "highest lr", "last lr"]
    return Drawn({"": figure}, {"": Table("", header, lines, rows)})


def _rest(row: Row, axes: list[str]) -> tuple:
    return tuple(row.cell[axis] for axis in axes)


def evaluated_on(rows: Iterable[Row]) -> str:
    """`test` or `validation`: the images of the curves' errors."""
    sets = {"test": "test", "val": "validation"}
    return " / ".join(sorted({sets.get(r.get("evaluated_on"), "held-out") for row in rows for r in row.finished}))


def band(row: Row, key: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs completed, mean and sample standard deviation (0 of one) over the seeds that measured `key` there.

    Kept with the row: a picture and a chart to zoom are drawn of it.
    """
    if key not in row.bands:
        row.bands[key] = _over_seeds(row, key)
    return row.bands[key]


def _over_seeds(row: Row, key: str) -> tuple[list[int], list[float], list[float]]:
    found = [(r["curves"].get("epoch") or [], r["curves"].get(key) or []) for r in row.finished]
    epochs = np.array([e for at, these in found for e in at[: len(these)]], dtype=int)
    values = np.array([v for at, these in found for v in these[: len(at)]], dtype=float)  # None becomes NaN
    there = ~np.isnan(values)
    epochs, values = epochs[there], values[there]
    if not len(values):
        return [], [], []
    x, at, n = np.unique(epochs, return_inverse=True, return_counts=True)
    mean = np.bincount(at, values) / n
    std = np.sqrt(np.bincount(at, (values - mean[at]) ** 2) / np.maximum(n - 1, 1))
    return (x + 1).tolist(), mean.tolist(), std.tolist()


def _band(axis: Any, row: Row, key: str, colour: str, style: str, label: str | None) -> None:
    x, mean, std = band(row, key)
    low, high = [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)]
    axis.plot(x, mean, style, color=colour, lw=1.5, label=label, marker="o" if len(x) < 12 else None, ms=3)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def logarithmic(axis: Any) -> None:
    """y in logarithms, with numbers that one reads: 0.2, 0.5, 1 instead of powers of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def canvas(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot: nothing global, no display needed. Sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """`savefig` would lay it out and draw it twice, and write matplotlib's version."""
    buffer = io.BytesIO()
    figure.canvas.draw()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).save(buffer, "PNG", dpi=(figure.dpi, figure.dpi))
    return buffer.getvalue()
