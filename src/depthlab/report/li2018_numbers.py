"""Numbers beside the pictures of Li et al. 2018: sharpness against test error, gradients, initialisations.

sharpness        a line per run, and each measure of sharpness against the test error with Spearman's rank correlation
gradients        what shortcuts carry of the gradient, over depth and over training
initialisation   which starts train, how far their final losses spread, how far apart they end
Networks with shortcuts are drawn blue, those without red.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from depthlab.report.figures import COLOURS, canvas
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.tables import Record, Row

TRAINS_BELOW = 1.0  # final training loss; of 10 classes chance has 2.30 [choice]
MEASURES = {  # scalar of analysis=sharpness -> column
    "S_0_25": "S .25",
    "S_0_5": "S .5",
    "S_1": "S 1",
    "flat": "flat area",
    "non_convex": "non-convex area",
    "lambda_max": "lambda max",
    "lambda_min": "lambda min",
    "ratio": "|min/max|",
}
SHOWN = ("S_0_5", "S_1", "flat", "non_convex", "lambda_max", "ratio")


def has_shortcuts(record: Record) -> bool:
    return record["config"]["arch"].get("shortcut", "none") != "none"


def colour(record: Record) -> str:
    return COLOURS[0] if has_shortcuts(record) else COLOURS[1]


def text(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


# ---- sharpness


def sharpness(given: Given) -> Drawn:
    """A table with a line per run, and scatter plots against the test error."""
    measured = [(row, record, found.scalars) for row, record, found in given.measured("sharpness")]
    said = given.unmeasured("sharpness")
    if not measured:
        return Drawn(lines=said)
    lines, rows = [], []
    for row, record, scalars in measured:
        numbers = {key: scalars.get(key) for key in ("images", "loss", *MEASURES)}
        rows.append({**row.cell, "seed": record["seed"], "test_error": record["test_error"], **numbers})
        name = given.experiment.name_of(row.cell)
        values = [text(numbers["loss"], ".4f"), *(text(numbers[key]) for key in MEASURES)]
        lines.append([name, str(record["seed"]), f"{record['test_error']:.2f}", *values])
    header = ["network", "seed", "test error %", "training loss", *MEASURES.values()]
    ranks = {key: rank(rows, key) for key in MEASURES}
    n = len(rows)
    words = [f"{MEASURES[key]} {value:+.2f}" for key, value in ranks.items() if value is not None]
    if words:
        said.append(f"Spearman's rank correlation with the test error over {n} runs: {', '.join(words)}.")
    figure = canvas(11.0, 6.6)
    for axis, key in zip(figure.subplots(2, 3).ravel(), SHOWN):
        scatter(axis, key, measured, ranks[key], given)
    return Drawn({"sharpness": figure}, {"sharpness": Table("Sharpness of the minima", header, lines, rows)}, said)


def rank(rows: list[dict[str, Any]], key: str) -> float | None:
    """Spearman's correlation of a measure with the test error; None below three runs, or if one does not vary."""
    from scipy.stats import spearmanr

    pairs = [(row[key], row["test_error"]) for row in rows if row[key] is not None]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs)):
        return None
    return float(spearmanr(*zip(*pairs)).statistic)


def scatter(
    axis: Any, key: str, measured: list[tuple[Row, Record, Mapping[str, Any]]], correlation: float | None, given: Given
) -> None:
    there = [(row, record, scalars[key]) for row, record, scalars in measured if scalars.get(key) is not None]
    for _, record, value in there:
        axis.plot(value, record["test_error"], "o", color=colour(record), ms=6)
    values = [value for *_, value in there]
    wide = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    axis.set_xscale("log" if wide else "linear")
    axis.margins(0.12, 0.14)
    middle = (min(values) * max(values)) ** 0.5 if wide else (min(values) + max(values)) / 2 if values else 0
    for row, record, value in there:  # names grow towards the middle: none leaves the panel
        name, left = given.experiment.name_of(row.cell), value <= middle
        about = {"ha": "left" if left else "right", "textcoords": "offset points", "fontsize": 7}
        axis.annotate(name, (value, record["test_error"]), (5 if left else -5, 4), **about)
    axis.set(xlabel=MEASURES[key], ylabel="test error (%)")
    axis.set_title("" if correlation is None else f"rank correlation {correlation:+.2f}", fontsize=9)
    axis.grid(alpha=0.25, lw=0.6)


# ---- gradients


def gradients(given: Given) -> Drawn:
    """The split by block at the first and last measured epoch, and the first block's gradient over training."""
    from depthlab.analysis import files

    runs = []
    for row in given.rows:
        record = row.finished[0]
        curve = record["analyses"].get("gradients_during") or []
        found = [(r["epoch"], files.read(Path(record["folder"]), f"gradients-epoch{r['epoch']:04d}")) for r in curve]
        if any(result is not None for _, result in found):
            runs.append((row, record, curve, [(e, f[0].arrays) for e, f in found if f is not None]))
    if not runs:
        return Drawn(lines=given.unmeasured("gradients"))
    from depthlab.analysis.drawing import stage_lines
    from depthlab.analysis.gradients import draw

    split = canvas(3.6 * len(runs), 6.4)
    axes = split.subplots(2, len(runs), squeeze=False, sharey=True)
    training = canvas(9.6, 3.8)
    left, right = training.subplots(1, 2)
    lines, rows = [], []
    styles = dict(zip(dict.fromkeys(r["config"]["arch"].get("depth") for _, r, *_ in runs), ("-", "--", ":", "-.")))
    for column, (row, record, curve, found) in zip(axes.T, runs):
        name = given.experiment.name_of(row.cell)
        for axis, (epoch, arrays) in zip(column, (found[0], found[-1])):
            draw(axis, arrays, COLOURS)
            stage_lines(axis, arrays["first"])
            axis.set(yscale="log", title=f"{name}, epoch {epoch}", xlabel="block")
        style = {"color": colour(record), "ls": styles[record["config"]["arch"].get("depth")], "marker": ".", "lw": 1}
        epochs = [r["epoch"] for r in curve]
        left.plot(epochs, [r["input_first"] for r in curve], label=name, **style)
        right.plot(epochs, [r["first_over_last"] for r in curve], **style)
        for numbers in curve:
            rows.append({**row.cell, "seed": record["seed"], **numbers})
            keys = ("input_first", "input_last", "first_over_last", "shortcut_share", "identity_error")
            lines.append([name, f"{numbers['epoch']:g}", *(text(numbers.get(key)) for key in keys)])
    axes[0, 0].legend(frameon=False, fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$||\partial L/\partial x||$, mean over images")
    left.set(yscale="log", xlabel="epoch", ylabel="gradient norm at the first block")
    right.set(yscale="log", xlabel="epoch", ylabel="first block's over last block's")
    left.legend(frameon=False, fontsize=7)
    header = ["network", "epoch", "first block", "last block", "first / last", "carried by shortcuts", "identity error"]
    table = Table("Gradient norms at block inputs", header, lines, rows)
    return Drawn({"": split, "training": training}, {"split": table}, given.unmeasured("gradients"))


def identity_error(record: Record) -> float | None:
    """The largest of a run's epochs."""
    errors = [row["identity_error"] for row in record["analyses"].get("gradients_during") or []]
    return max(errors, default=None)


# ---- initialisation


def trains(record: Record) -> float:
    """1 if the run trained, 0 if it diverged or its final training loss is not below `TRAINS_BELOW`."""
    loss = record.get("train_loss")
    return float(not record["diverged"] and loss is not None and math.isfinite(loss) and loss < TRAINS_BELOW)


def initialisation(given: Given) -> Drawn:
    """Per cell: how many runs train, their final losses, and where they start and end (analysis=minima)."""
    cells = [row for row in given.block.rows if row.records] if given.block else []
    if not cells:
        return Drawn()
    measured = [record["folder"] for _, record, _ in given.measured("minima")]
    lines, rows = [], []
    for row in cells:
        numbers = of_cell(row, measured)
        rows.append({**row.cell, **numbers})
        trained = f"{numbers['trained']}/{numbers['runs']}"
        loss = text(numbers["train_loss"]) + (
            f" ± {numbers['train_loss_std']:.2g}" if numbers["train_loss_std"] else ""
        )
        keys = ("test_error", "start_loss", "from_start", "distance", "angle", "disagreement", "bump")
        lines.append([given.experiment.name_of(row.cell), trained, loss, *(text(numbers[key]) for key in keys)])
    header = ["start", "trained", "training loss", "test error %", "loss at start", "from start", "between minima"]
    header += ["angle", "disagreement %", "bump"]
    title = f"Starts that train: final training loss below {TRAINS_BELOW:g}"
    said = []
    for arch, runs in unmeasured(given, measured).items():
        said += given.to_measure("minima", runs, f"runs of {arch}")
    return Drawn({"": picture(given, cells)}, {"starts": Table(title, header, lines, rows)}, said)


def unmeasured(given: Given, measured: list[str]) -> dict[str, list[str]]:
    """Architecture -> all its runs' folders, where one of them lacks analysis=minima, which takes them together."""
    found: dict[str, list[str]] = {}
    for row in given.rows:
        for record in row.finished:
            found.setdefault(record["arch"], []).append(record["folder"])
    return {arch: runs for arch, runs in found.items() if not set(runs) <= set(measured)}


def of_cell(row: Row, measured: list[str]) -> dict[str, Any]:
    """Counts, means over the finished runs, and the standard deviation of the final loss."""
    losses = [v for v in row.values("train_loss") if math.isfinite(v)]
    places = [r["analyses"]["minima"] for r in row.finished if r["folder"] in measured]

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return fmean(known) if known else None

    keys = ("start_loss", "from_start", "distance", "angle", "disagreement", "bump")
    return {
        "runs": len(row.records),
        "trained": int(sum(map(trains, row.records))),
        "diverged": len(row.diverged),
        "train_loss": mean(losses),
        "train_loss_std": stdev(losses) if len(losses) > 1 else None,
        "train_loss_min": min(losses, default=None),
        "train_loss_max": max(losses, default=None),
        "test_error": mean(row.values("test_error")),
        **{key: mean([place.get(key) for place in places]) for key in keys},
    }


def picture(given: Given, cells: list[Row]) -> Any:
    """Above, the share of runs that train; below, each run's final loss. A column of panels per architecture."""
    names = list(dict.fromkeys(row.cell.get("arch") for row in cells))
    starts = list(dict.fromkeys(start_of(given, row) for row in cells))
    figure = canvas(max(4.2, 0.28 * len(starts) + 1.6) * len(names), 6.6)
    axes = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for (above, below), name in zip(axes.T, names):
        for row in (row for row in cells if row.cell.get("arch") == name):
            x, mark = starts.index(start_of(given, row)), colour(row.records[0])
            above.bar(x, fmean(map(trains, row.records)), color=mark, width=0.7)
            losses = [v for v in row.values("train_loss") if math.isfinite(v)]
            below.plot([x] * len(losses), losses, "o", ms=4, mfc="none", color=mark)
            if row.diverged:
                below.plot([x] * len(row.diverged), [10] * len(row.diverged), "x", color=mark)
        below.axhline(TRAINS_BELOW, color="0.6", lw=0.8, ls=":")
        above.set(title=given.experiment.label(name), ylim=(0, 1.02))
        below.set(yscale="log", xticks=range(len(starts)))
        below.set_xticklabels(starts, rotation=90, fontsize=7)
    axes[0, 0].set_ylabel("share of runs that train")
    axes[1, 0].set_ylabel("final training loss (x: diverged)")
    return figure


def start_of(given: Given, row: Row) -> str:
    """The cell without its architecture, as printed."""
    return " ".join(given.experiment.label(value) for axis, value in row.cell.items() if axis != "arch")
