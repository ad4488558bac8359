"""Loss surfaces of Li et al. 2018 laid out as on the slides: rows and columns of pictures, test errors under them.

All pictures of a figure have one colour scale. A cell shows its first seed's run. What has no run, or no surface yet,
leaves its place empty; the report prints the command.
"""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from depthlab.analysis import Result
from depthlab.analysis.drawing import canvas
from depthlab.analysis.surface_figures import Scale, lines, side_by_side
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.li2018_numbers import sharpness

Cell = dict[str, Any]
ANGLES = {"step_normal": "contour normal, in the plane", "step_gradient": "minus gradient"}
TITLES = {
    "loss_surface": "Surfaces: training loss at the centre, largest on the grid",
    "loss_trajectory": "Paths: shares of their variance; median angle of steps to normal and gradient, degrees",
}
COLUMNS = {  # scalar of the analysis -> column
    "loss_surface": {
        "loss_center": "loss",
        "loss_max": "largest",
        "finite": "finite",
        "cosine": "cosine",
        "flat": "flat area",
        "non_convex": "non-convex",
    },
    "loss_trajectory": {
        "loss_center": "loss",
        "explained": "2 PCs",
        "explained_random": "2 random",
        "step_normal_early": "normal, early",
        "step_normal_late": "late",
        "step_gradient_early": "gradient, early",
        "step_gradient_late": "late ",
    },
}


def panels(given: Given, cells: list[list[Cell]], analysis: str = "loss_surface", relief: bool = True) -> Drawn:
    """Contours (the experiment's picture), reliefs, profiles through the centre, and a line of numbers per run.

    Args:
        cells: the layout, rows of cells of the experiment, e.g. [[{arch: resnet20_projection}, ...], ...].
        analysis: loss_surface or loss_trajectory.
        relief: whether to draw the surfaces in three dimensions too.
    """
    found, errors = {}, {}
    for row, record, result in given.measured(analysis):
        key = str(row.cell)
        if key not in found:
            found[key], errors[key] = result, record["test_error"]
    if not found:
        return with_sharpness(given, Drawn(lines=given.unmeasured(analysis)))
    layout, captions = [], {}
    for members in cells:
        layout.append([])
        for cell in members:
            key = next((str(row.cell) for row in given.block.rows if cell.items() <= row.cell.items()), str(cell))
            published = given.experiment.published(cell).get("test_error") if given.block.own_data else None
            theirs = "" if published is None else f" (paper {published:g} %)"
            ours = f"test error {errors[key]:.2f} %" if key in found else "no surface yet"
            captions[key] = f"{given.experiment.name_of(cell)}\n{ours}{theirs}"
            layout[-1].append(key)
    wanted = {key: found[key] for row in layout for key in row if key in found}
    scale = Scale.of(wanted)
    figures = {"": side_by_side(layout, wanted, captions, scale, ("contour",))}
    if relief:
        figures["relief"] = side_by_side(layout, wanted, captions, scale, ("relief",))
    figures["profile"] = profiles(wanted, {key: captions[key].split("\n")[0] for key in wanted})
    if analysis == "loss_trajectory":
        figures["angles"] = angles(wanted, layout, captions)
    drawn = Drawn(figures, {"surfaces": numbers(given, analysis)}, given.unmeasured(analysis))
    return with_sharpness(given, drawn)


def with_sharpness(given: Given, drawn: Drawn) -> Drawn:
    """Sharpness against test error as well, where runs have been measured so (analysis=sharpness)."""
    if not given.measured("sharpness"):
        return drawn
    more = sharpness(given)
    return Drawn(drawn.figures | more.figures, drawn.tables | more.tables, drawn.lines + more.lines)


def profiles(results: dict[str, Result], names: dict[str, str]) -> Any:
    """The loss along each surface's first direction, over each other."""
    middle = {}
    for key, result in results.items():
        j = int(np.argmin(np.abs(result.arrays["y"])))
        middle[names[key]] = Result(
            {}, {"x": result.arrays["x"]} | {k: result.arrays[k][:, j] for k in ("loss", "error")}
        )
    drawing = canvas(7.2, 4.6)
    lines(drawing.subplots(), middle)
    return drawing


def angles(results: dict[str, Result], layout: list[list[str]], captions: dict[str, str]) -> Any:
    """Per epoch: between step and contour normal, in the plane; between step and minus gradient, over all weights."""
    drawing = canvas(3.1 * max(map(len, layout)) + 0.4, 2.6 * len(layout) + 0.5)
    axes = drawing.subplots(len(layout), max(map(len, layout)), sharex=False, sharey=True, squeeze=False)
    for row, members in zip(axes, layout):
        for axis, key in zip(row, members):
            axis.set_title(captions[key].split("\n")[0], fontsize=8)
            axis.set(ylim=(0, 180), yticks=(0, 45, 90, 135, 180))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if key not in results:
                axis.text(0.5, 0.5, "no surface yet", transform=axis.transAxes, ha="center", fontsize=8, color="0.5")
            else:
                arrays = results[key].arrays
                for name, label in (
                    ("step_normal", "contour normal, in the plane"),
                    ("step_gradient", "minus gradient"),
                ):
                    if name in arrays:
                        axis.plot(arrays["epochs"][:-1], arrays[name], lw=1, marker=".", ms=3, label=label)
                axis.axhline(90, color="0.6", lw=0.7, ls=":")
            axis.tick_params(labelsize=7)
    drawing.supxlabel("epoch", fontsize=9)
    drawing.supylabel("angle of the step to ... (degrees)", fontsize=9)
    handles, labels = next((h for axis in axes.flat if (h := axis.get_legend_handles_labels())[0]), ([], []))
    if handles:
        drawing.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return drawing


def numbers(given: Given, analysis: str) -> Table:
    """A line per run."""
    columns, text, rows = COLUMNS[analysis], [], []
    for row, record, result in given.measured(analysis):
        values = {key: result.scalars.get(key) for key in columns}
        about = {"seed": record["seed"], "test_error": record["test_error"], "train_loss": record["train_loss"]}
        rows.append({**row.cell, **about, **result.scalars})
        shown = ["-" if value is None else f"{value:.4g}" for value in values.values()]
        text.append([given.experiment.name_of(row.cell), str(record["seed"]), f"{record['test_error']:.2f}", *shown])
    return Table(TITLES[analysis], ["run", "seed", "test error %", *columns.values()], text, rows)
