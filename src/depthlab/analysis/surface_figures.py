"""Pictures of loss surfaces: contours, heat map, relief, profiles, the path of training over them.

Runs that are drawn together have one colour scale. Where the loss spans more than two decades, colours, contours and
heights are logarithmic; else contours are Li et al.'s, 0.1 to 10 in steps of 0.5. What is infinite looks like the
largest finite value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthlab.analysis import Result

MAP = "viridis"
DECADES = 100  # spanned by the loss: then logarithmic


@dataclass(frozen=True)
class Scale:
    """Colours and heights that several surfaces share."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, results: Mapping[str, Result]) -> "Scale":
        finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for r in results.values() for v in [r.arrays["loss"]]])
        if not len(finite):
            return cls(0.1, 1.0, False)
        low, high = float(finite.min()), float(finite.max())
        return cls(low, high if high > low else low + 1e-9, high > DECADES * low)

    def clean(self, loss: np.ndarray) -> np.ndarray:
        return np.clip(np.nan_to_num(loss, nan=self.high, posinf=self.high), self.low, self.high)

    def height(self, loss: np.ndarray) -> np.ndarray:
        return np.log10(self.clean(loss)) if self.log else self.clean(loss)

    @property
    def norm(self) -> Any:
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high)

    @property
    def levels(self) -> np.ndarray:
        """Of contours, rising, inside the scale."""
        if self.log:
            return np.geomspace(self.low, self.high, 22)[1:-1]
        paper = np.arange(0.1, 10.01, 0.5)
        inside = paper[(paper > self.low) & (paper < self.high)]
        return inside if len(inside) >= 5 else np.linspace(self.low, self.high, 17)[1:-1]


def contour(axis: Any, result: Result, scale: Scale, labels: bool = True) -> Any:
    """Contour lines, the path of training over them where there is one."""
    x, y, loss = (result.arrays[key] for key in ("x", "y", "loss"))
    lines = axis.contour(x, y, scale.clean(loss).T, levels=scale.levels, cmap=MAP, norm=scale.norm, linewidths=0.9)
    if labels:
        axis.clabel(lines, lines.levels[::3], fontsize=6, fmt="%.3g")
    over(axis, result)
    return lines


def heat(axis: Any, result: Result, scale: Scale) -> Any:
    x, y, loss = (result.arrays[key] for key in ("x", "y", "loss"))
    mesh = axis.pcolormesh(x, y, scale.clean(loss).T, cmap=MAP, norm=scale.norm, shading="gouraud", rasterized=True)
    over(axis, result)
    return mesh


def over(axis: Any, result: Result) -> None:
    """What both maps share: axes, centre, path."""
    arrays = result.arrays
    if "path" in arrays:
        shares = [f" ({100 * share:.1f} %)" for share in arrays["explained"][:2]]
        axis.plot(*arrays["path"].T, color="#D55E00", lw=0.9, marker="o", ms=2.2, zorder=4)
        names = [f"PCA component {k + 1}{share}" for k, share in enumerate(shares)]
    else:
        axis.set_aspect("equal")
        names = ["direction 1", "direction 2"]
    axis.plot(0, 0, "+", color="black", ms=6, mew=0.9, zorder=5)
    axis.set_xlabel(names[0], fontsize=8)
    axis.set_ylabel(names[1], fontsize=8)
    axis.tick_params(labelsize=7)


def relief(axis: Any, result: Result, scale: Scale) -> None:
    """The surface in three dimensions, seen as in the paper's figures."""
    from matplotlib import colormaps

    x, y = np.meshgrid(result.arrays["x"], result.arrays["y"], indexing="ij")
    z = scale.height(result.arrays["loss"])
    low, high = scale.height(np.array([scale.low, scale.high]))
    colours = colormaps[MAP]((z - low) / (high - low))
    axis.plot_surface(x, y, z, facecolors=colours, rcount=len(x), ccount=len(y), lw=0, antialiased=False, shade=True)
    axis.set_zlim(low, high)
    axis.view_init(elev=32, azim=-52)
    axis.tick_params(labelsize=6, pad=-2)
    axis.locator_params(nbins=5)
    if scale.log:
        ticks = np.arange(np.ceil(low), np.floor(high) + 1)
        axis.set_zticks(ticks, [f"{10.0**t:g}" for t in ticks])
    axis.set_box_aspect((1, 1, 0.75))


def lines(axis: Any, results: Mapping[str, Result]) -> None:
    """One-dimensional profiles over each other: loss in full, error dashed on the right."""
    from depthlab.analysis.drawing import COLOURS

    scale, right = Scale.of(results), axis.twinx()
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        x = result.arrays["x"]
        axis.plot(x, scale.clean(result.arrays["loss"]), color=colour, lw=1.5, label=name)
        right.plot(x, result.arrays["error"], color=colour, lw=1, ls="--", alpha=0.6)
    axis.set_yscale("log" if scale.log else "linear")
    axis.set(xlabel="coordinate", ylabel="training loss (line)")
    right.set(ylabel="training error, % (dashed)", ylim=(0, 100))
    axis.grid(alpha=0.25, lw=0.6)
    axis.legend(frameon=False, fontsize=8)


def figure(results: Mapping[str, Result]) -> Any:
    """One run: contours, heat map and relief. Several: a column each on one scale, or profiles over each other."""
    from depthlab.analysis.drawing import canvas

    flat = {name: r for name, r in results.items() if "y" not in r.arrays}
    if flat:
        drawing = canvas(6.8, 4.2)
        lines(drawing.subplots(), flat)
        return drawing
    scale = Scale.of(results)
    if len(results) == 1:
        ((name, result),) = results.items()
        drawing = canvas(13.5, 4.3)
        grid = drawing.add_gridspec(1, 3, width_ratios=(1, 1.18, 1.15))
        contour(drawing.add_subplot(grid[0]), result, scale)
        axis = drawing.add_subplot(grid[1])
        drawing.colorbar(heat(axis, result, scale), ax=axis, label="training loss", fraction=0.046)
        relief(drawing.add_subplot(grid[2], projection="3d"), result, scale)
        about = f"loss {result.scalars['loss_center']:.3g}, error {result.scalars['error_center']:.2f} % at the centre"
        drawing.suptitle(f"{name}: {about}", fontsize=10)
        return drawing
    return side_by_side([list(results)], results, {name: name for name in results}, scale)


def side_by_side(
    rows: list[list[str | None]],
    results: Mapping[str, Result],
    captions: Mapping[str, str],
    scale: Scale,
    kinds: tuple[str, ...] = ("relief", "contour"),
) -> Any:
    """Surfaces in rows and columns on one scale, a caption under each; every row of names is a row per kind.

    Args:
        rows: names of `results`; None, or a name that is not there, leaves its place empty.
        kinds: of relief, contour, heat.
    """
    from matplotlib.cm import ScalarMappable

    from depthlab.analysis.drawing import canvas

    width = max(map(len, rows))
    drawing = canvas(3.1 * width + 0.9, 3.1 * len(rows) * len(kinds))
    axes = []
    for i, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            for j, name in enumerate(row):
                place = (len(rows) * len(kinds), width, (i * len(kinds) + k) * width + j + 1)
                axis = drawing.add_subplot(*place, projection="3d" if kind == "relief" else None)
                axes.append(axis)
                if name not in results:
                    axis.set_axis_off()
                    message = captions.get(name, "") if name is not None else ""
                    (axis.text2D if kind == "relief" else axis.text)(
                        0.5, 0.5, message, transform=axis.transAxes, ha="center", va="center", fontsize=8, color="0.5"
                    )
                    continue
                draw = {"relief": relief, "heat": heat}.get(kind) or (lambda a, r, s: contour(a, r, s, False))
                draw(axis, results[name], scale)
                if k == len(kinds) - 1:
                    if kind == "relief":
                        axis.text2D(0.5, -0.13, captions[name], transform=axis.transAxes, ha="center", fontsize=8)
                    else:
                        axis.set_xlabel(f"{axis.get_xlabel()}\n{captions[name]}", fontsize=8)
    bar = drawing.colorbar(ScalarMappable(scale.norm, MAP), ax=axes, fraction=0.02, pad=0.02)
    bar.set_label("training loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return drawing
