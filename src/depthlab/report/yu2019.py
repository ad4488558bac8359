"""Tables and figures of Yu & Tomasi 2019 from finished runs, drawn like theirs: plain networks blue, residual ones red.

L is the mean cross-entropy over the training images as they are (not augmented), C = L + the weight penalty, E the test
error, all of the last epoch's weights. Curves of L over epochs are running means over the augmented images [choice: an
evaluation of 50,000 images per epoch would cost a third of the training]. For what a figure is given, see `given`.
"""

import re
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.ticker import MaxNLocator

from depthlab.report.figures import COLOURS, band, canvas, logarithmic
from depthlab.report.figures import curves as training_curves
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.tables import Record, Row, summary

PLAIN, RESIDUAL = COLOURS[:2]
STYLES = {20: ":", 32: "-", 44: "--"}


def family(row: Row) -> str:
    """`simple_plain` of simple_plain32."""
    return re.sub(r"\d+", "", str(row.cell["arch"]))


def depth(row: Row) -> int:
    return int(re.search(r"\d+", str(row.cell["arch"]))[0])


def colour(row: Row) -> str:
    return PLAIN if family(row) == "simple_plain" else RESIDUAL


def cost(record: Record) -> float | None:
    """C"""
    both = record["train_loss"], record.get("penalty")
    return None if None in both else sum(both)


def accuracy(record: Record) -> float | None:
    """Percent of the test images."""
    return None if record["test_error"] is None else 100 - record["test_error"]


def until_15(record: Record) -> float:
    """By how much the running loss changes from the first epoch to the recipe's 15th of 200."""
    losses = record["curves"]["train_loss"]
    return losses[fifteenth(losses)] - losses[0]


def after_15(record: Record) -> float:
    """By how much it changes from there to the last epoch."""
    losses = record["curves"]["train_loss"]
    return losses[-1] - losses[fifteenth(losses)]


def fifteenth(losses: list[float]) -> int:
    return max(0, round(15 * len(losses) / 200) - 1)


# ---- Tables 1, 2 and 5


def costs(given: Given) -> Drawn:
    """Training curves, and L, C, E beside the paper's; how L grows with depth."""
    drawn = training_curves(given)
    paper, lines, rows = given.block.own_data, [], []
    for row in given.rows:
        mine = {
            "train_loss": summary(row.values("train_loss"))[0],
            "cost": fmean(found) if (found := [c for r in row.finished if (c := cost(r)) is not None]) else None,
            "error": summary(row.values("test_error"))[0] / 100,
        }
        published = given.experiment.published(row.cell) if paper else {}
        theirs = {key: published.get(key) for key in ("train_loss", "cost")}
        theirs["error"] = published["test_error"] / 100 if "test_error" in published else None
        name = given.experiment.name_of(row.cell) + given.notes.at(row.cell, "train_loss")
        lines.append([name, *(four(value) for key in mine for value in (theirs[key], mine[key]))])
        rows.append(row.cell | {f"paper_{key}": theirs[key] for key in theirs} | mine)
    header = ["network", *(f"{who}: {what}" for what in "LCE" for who in ("paper", "ours"))]
    if lines:
        drawn.tables["costs"] = Table("Loss L, cost C, error E", header, lines, rows)
    drawn.lines += [*growth(given), *accuracies(given)]
    return drawn


def growth(given: Given, least: int = 20) -> list[str]:
    """How many times larger L is at the largest depth than at the smallest (from `least` on), a line per family."""
    lines = []
    for kind in dict.fromkeys(map(family, given.rows)):
        by_depth = sorted((r for r in given.rows if family(r) == kind and depth(r) >= least), key=depth)
        if len(by_depth) > 1:
            shallow, deep = by_depth[0], by_depth[-1]
            over, of = (summary(row.values("train_loss"))[0] for row in (shallow, deep))
            theirs = [given.experiment.published(row.cell).get("train_loss") for row in (shallow, deep)]
            paper = f" (paper {theirs[1] / theirs[0]:.2f})" if all(theirs) and given.block.own_data else ""
            name = re.sub(r"-?\d+", "", given.experiment.label(shallow.cell["arch"]), count=1)
            lines.append(f"{name}: L at depth {depth(deep)} is {of / over:.2f} times L at {depth(shallow)}{paper}.")
    return lines


def accuracies(given: Given) -> list[str]:
    """Of T' networks, the accuracy as a fraction of the residual network's of the same depth (D.3)."""
    lines, reference = [], {depth(row): row for row in given.rows if family(row) == "simple_transferred"}
    for row in given.rows:
        if family(row) == "dominant" and (other := reference.get(depth(row))):
            ours = [fmean(map(accuracy, r.finished)) for r in (row, other)]
            paper = [100 - given.experiment.published(r.cell).get("test_error", 100) for r in (row, other)]
            theirs = f" (paper {100 * paper[0] / paper[1]:.2f} %)" if all(paper) and given.block.own_data else ""
            lines.append(
                f"Depth {depth(row)}: the accuracy of T' is {100 * ours[0] / ours[1]:.2f} % of the residual's{theirs}."
            )
    return lines


def four(value: float | None) -> str:
    """Four significant digits, as in the paper."""
    return "" if value is None else f"{value:.4g}"


def ten(value: float | None) -> float | None:
    """Ten significant digits: what follows hangs on the number of threads that summed."""
    return None if value is None else float(f"{value:.10g}")


# ---- Figs. 2 = 8, 6 and 9


def mean_curve(row: Row, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(epochs completed, mean over runs, sample standard deviation; 0 for one run)."""
    return tuple(map(np.array, band(row, key)))


def risk(given: Given) -> Drawn:
    """Figs. 2 and 8: L (left) and E (right) over epochs, mean and standard deviation of several runs."""
    if not given.rows:
        return Drawn()
    figure = canvas(10, 3.8)
    axes = figure.subplots(1, 2)
    for row in given.rows:
        for axis, key in zip(axes, ("train_loss", "val_error")):
            label = f"{given.experiment.name_of(row.cell)} ({runs(row)})"
            bars(axis, *mean_curve(row, key), color=colour(row), label=label)
    axes[0].set(xlabel="epoch", ylabel=r"risk $\mathcal{L}$")
    logarithmic(axes[0])
    axes[1].set(xlabel="epoch", ylabel=r"error $\mathcal{E}$ (%)")
    axes[0].legend(frameon=False, fontsize=8)
    return Drawn({"": figure})


def runs(row: Row) -> str:
    n = len(row.finished)
    return f"{n} run{'s' * (n > 1)}"


def bars(axis, x, mean, std, **style) -> None:
    """A line, and on it up to 25 bars whose half length is the standard deviation."""
    every = max(1, len(x) // 25)
    axis.plot(x, mean, lw=1.4, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.errorbar(x, mean, yerr=std, errorevery=every, fmt="none", ecolor=style["color"], elinewidth=0.7, alpha=0.5)


def degradation(given: Given) -> Drawn:
    """Fig. 9: L of depths 32 and 44 with its last mean (left), L_P - L_R by depth (right)."""
    if not given.rows:
        return Drawn()
    figure = canvas(10, 3.8)
    left, right = figure.subplots(1, 2)
    by_depth, lines = {}, []
    for row in given.rows:
        by_depth.setdefault(depth(row), {})[family(row)] = row
        if depth(row) != 20:
            x, mean, std = mean_curve(row, "train_loss")
            label = f"{given.experiment.name_of(row.cell)} ({runs(row)})"
            bars(left, x, mean, std, color=colour(row), ls=STYLES.get(depth(row), "-."), label=label)
            left.annotate(f"{mean[-1]:.2g}", (x[-1], mean[-1]), fontsize=8, color=colour(row))
    for d, rows in sorted(by_depth.items()):
        if {"simple_plain", "simple_transferred"} <= rows.keys():
            (x, plain, plain_std), (_, residual, residual_std) = (
                mean_curve(rows[key], "train_loss") for key in ("simple_plain", "simple_transferred")
            )
            gap, std = plain - residual, np.hypot(plain_std, residual_std)
            bars(right, x, gap, std, color=COLOURS[2 + list(STYLES).index(d)], label=f"depth {d}")
            lines.append(f"Depth {d}: L_P - L_R is largest after epoch {x[gap.argmax()]}, {gap.max():.3g}.")
    left.set(xlabel="epoch", ylabel=r"risk $\mathcal{L}$")
    logarithmic(left)
    apart = any((line.get_ydata() > 0).any() for line in right.lines)
    right.set(xlabel="epoch", ylabel=r"$\mathcal{L}_P - \mathcal{L}_R$", yscale="log" if apart else "linear")
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    return Drawn({"": figure}, lines=[*growth(given, least=32), *lines])


def divergence(given: Given) -> Drawn:
    """Fig. 6: L of equivalently started networks (left), and by how much it differs, at every step (right).

    Reads `losses.npy` from the runs' folders (callbacks/step_losses.py).
    """
    figure = canvas(10, 3.8)
    left, right = figure.subplots(1, 2)
    lines, rows = [], []
    for one, other in combinations(sorted(given.rows, key=family), 2):  # simple_residual before simple_transferred
        if depth(one) != depth(other):
            continue
        pairs = [(a, b) for a in one.finished for b in other.finished if a["seed"] == b["seed"]]
        for a, b in pairs:
            losses = [steps(record) for record in (a, b)]
            if any(found is None for found in losses):
                lines.append(f"No losses.npy in {a['folder']} or {b['folder']}.")
                continue
            n = min(map(len, losses))
            x, difference = np.arange(1, n + 1), np.abs(losses[0][:n] - losses[1][:n])
            for y, row, style in zip(losses, (one, other), ("-", "--")):
                shade = RESIDUAL if family(row) == "simple_residual" else PLAIN
                label = f"{given.experiment.name_of(row.cell)}, seed {a['seed']}"
                left.plot(x, y[:n], color=shade, ls=style, lw=0.8, label=label)
            right.plot(x, np.maximum(difference, 1e-17), lw=0.8, label=f"depth {depth(one)}, seed {a['seed']}")
            first = {f"first_{k}": difference[:k].max() if k <= n else None for k in (20, 100, 1000)}
            rows.append({"depth": depth(one), "seed": a["seed"], "steps": n, **first, "largest": difference.max()})
    if not rows:
        return Drawn(lines=lines)
    left.set(xlabel="step", ylabel=r"$\mathcal{L}$ of the batch")
    logarithmic(left)
    right.set(xlabel="step", ylabel=r"$|\mathcal{L}_P - \mathcal{L}_R|$", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=7)
    header = ["depth", "seed", "steps", "first 20", "first 100", "first 1000", "all"]
    printed = [["" if v is None else f"{v:.1e}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    table = Table("Largest difference of L", header, printed, rows)
    return Drawn({"": figure}, {"divergence": table}, lines)


def steps(record: Record) -> np.ndarray | None:
    """The loss of every step."""
    path = Path(record["folder"]) / "losses.npy"
    return np.load(path) if path.exists() else None
