"""Where runs of one network start and end (slides after Li et al. 2018: "Fragmentation requires good initialization").

Distance       Euclidean, over all parameters; and `angle`, root mean square over filters of the distance of filters
               of unit norm, blind to scale as BatchNorm is: 0 the same, sqrt(2) unrelated, 2 opposite
Disagreement   percent of the images that two minima classify differently: blind to permuted channels, too
Plane          the first two principal components of all starts and ends; a point is seen at its foot, `off_*` is how
               far it lies from the plane
Loss           training images without augmentation, evaluation mode, BatchNorm's statistics measured anew at every
               point: a network that has not been trained has none, and between two runs neither's hold
Line           the loss on the straight line from start to end; `bump` is how far it rises above its least value so far
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating
from depthlab.analysis.directions import Layout
from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.analysis.grid import Plane, evaluate
from depthlab.analysis.inside import progress
from depthlab.analysis.surface_figures import MAP, Scale
from depthlab.analysis.trajectory import principal_plane
from depthlab.problem import Problem


class Run(NamedTuple):
    start: nn.Module
    net: nn.Module


def minima(
    runs: Mapping[str, Run], batches: Images, scratch: Path, grid: int = 25, line: int = 11, recalibrate: int = 500
) -> dict[str, Result]:
    """One result per run. Scalars: `loss`, `error` and `start_loss`; `from_start` and `angle_from_start`; the means
    over the other runs `distance`, `angle`, `disagreement`, None if there are none; `bump`; `off_start`, `off_end`;
    `explained`, the share of the points' variance in the plane. Arrays: `others` (R,) and `distances`, `angles`,
    `disagreements` (R,) to each; `path` (2, 2), start and end in the plane; `x`, `y`, `loss` the plane's; `line`.

    Args:
        runs: of the same network, whatever their initialisation and optimiser.
        scratch: where a grid that is broken off leaves what it has.
        grid: points a side of the plane; 0 for none.
        line: points from start to end.
        recalibrate: the first so many images measure BatchNorm's statistics.

    Raises:
        Problem: an option is out of its range, or the runs are of different networks.
    """
    if (grid and grid < 3) or line < 2:
        raise Problem(f"analysis.grid must be >= 3 (or 0) and analysis.line >= 2, got {grid} and {line}")
    names, first = list(runs), next(iter(runs.values())).net
    layout = Layout(first)
    starts, ends = (vectors(layout, runs, which) for which in (0, 1))
    images = Resident.of(batches, ends[0].device, layout.dtype)
    if not 2 <= recalibrate <= len(images.y):
        raise Problem(f"analysis.recalibrate must lie in 2..{len(images.y)} (analysis.images), got {recalibrate}")
    evaluator = Evaluator(first, images, recalibrate=recalibrate)
    theirs = [predictions(run.net, images) for run in runs.values()]
    matrices = {
        "distances": pairwise(ends, lambda a, b: distance(layout, a, b)),
        "angles": pairwise(ends, lambda a, b: angle(layout, a, b)),
        "disagreements": pairwise(theirs, lambda a, b: 100 * float((a != b).double().mean())),
    }
    shared, about, feet, off = {}, {}, None, None
    if grid:
        shared, explained, feet, off = picture(layout, starts, ends, evaluator, grid, scratch)
        about["explained"] = explained
    found = {}
    for i, name in enumerate(progress(names, "lines", len(names))):
        losses, error = along(evaluator, starts[i], ends[i], line)
        scalars = {
            "images": len(images.y),
            "runs": len(names),
            "loss": float(losses[-1]),
            "error": error,
            "start_loss": float(losses[0]),
            "from_start": distance(layout, starts[i], ends[i]),
            "angle_from_start": angle(layout, starts[i], ends[i]),
            "bump": float((losses - np.minimum.accumulate(losses)).max()),
        }
        others = np.arange(len(names)) != i
        for key, one in (("distances", "distance"), ("angles", "angle"), ("disagreements", "disagreement")):
            scalars[one] = float(matrices[key][i, others].mean()) if others.any() else None
        arrays = {"others": np.array(names), "line": losses, **{key: m[i] for key, m in matrices.items()}, **shared}
        if feet is not None:
            scalars |= {"off_start": float(off[0, i]), "off_end": float(off[1, i]), **about}
            arrays["path"] = feet[:, i]
        found[name] = Result(scalars, arrays)
    return found


def vectors(layout: Layout, runs: Mapping[str, Run], which: int) -> list[Tensor]:
    found = []
    for name, run in runs.items():
        try:
            found.append(layout.vector(run[which]))
        except ValueError as error:
            raise Problem(f"run={name}: {error}; runs measured together are of one architecture") from error
    return found


def distance(layout: Layout, a: Tensor, b: Tensor) -> float:
    """Over all parameters."""
    return float((a - b)[layout.trained.to(a.device)].double().norm())


def angle(layout: Layout, a: Tensor, b: Tensor) -> float:
    """Root mean square over the filters of all kernels of the distance between filters of unit norm."""
    squares = []
    kernels = [bool(part[0]) for part in layout.kernels.split(layout.sizes)]
    for kernel, u, v in zip(kernels, layout.views(a).values(), layout.views(b).values()):
        if kernel:
            unit = [torch.nn.functional.normalize(w.flatten(1).double(), dim=1) for w in (u, v)]
            squares.append((unit[0] - unit[1]).square().sum(1))
    return float(torch.cat(squares).mean().sqrt())


def predictions(net: nn.Module, images: Resident) -> Tensor:
    """(N,) labels, with the run's own BatchNorm statistics."""
    with evaluating(net):
        return torch.cat([net.forward(x).argmax(1) for x in images.x.split(250)])


def pairwise(points: list[Any], measure: Any) -> np.ndarray:
    """(R, R), symmetric."""
    found = np.zeros((len(points), len(points)))
    for i in range(len(points)):
        for j in range(i):
            found[i, j] = found[j, i] = measure(points[i], points[j])
    return found


def along(evaluator: Evaluator, start: Tensor, end: Tensor, points: int) -> tuple[np.ndarray, float]:
    """Losses (points,) from start to end, and the error in percent at the end."""
    plane = Plane(start, [end - start])
    values = [evaluator(plane.at((t,))) for t in np.linspace(0, 1, points).tolist()]
    return np.array([loss for loss, _ in values]), values[-1][1]


def picture(
    layout: Layout, starts: list[Tensor], ends: list[Tensor], evaluator: Evaluator, grid: int, scratch: Path
) -> tuple[dict[str, np.ndarray], float, np.ndarray, np.ndarray]:
    """x, y, loss of the plane; its share of the variance; feet (2, R, 2) and distances (2, R) of starts and ends."""
    origin = torch.stack([*starts, *ends]).mean(0)
    rows = [v.cpu().numpy() for v in (*starts, *ends)]
    plane = principal_plane(rows, origin.double().cpu().numpy(), layout.trained.numpy())
    feet = plane.coordinates.reshape(2, len(starts), 2)
    full = np.array([distance(layout, v, origin) for v in (*starts, *ends)]).reshape(2, -1)
    off = np.sqrt(np.maximum(full**2 - (feet**2).sum(2), 0))
    low, high = feet.min((0, 1)), feet.max((0, 1))
    axes = [np.linspace(a - 0.15 * (b - a), b + 0.15 * (b - a), grid) for a, b in zip(low, high)]
    components = [torch.from_numpy(c).to(origin) for c in plane.components]
    points = list(product(*(axis.tolist() for axis in axes)))
    values = evaluate(points, Plane(origin, components), evaluator, 1, scratch, "plane of the minima")
    loss = values[:, 0].reshape(grid, grid)
    return {"x": axes[0], "y": axes[1], "loss": loss}, float(plane.explained[:2].sum()), feet, off


def figure(results: Mapping[str, Result]) -> Any:
    """Starts (rings) and ends (dots) over the loss in their plane; losses on the lines between; distances."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(14.0, 4.4)
    left, middle, right = drawing.subplots(1, 3)
    some = next(iter(results.values()))
    if "x" in some.arrays:
        x, y, loss = (some.arrays[key] for key in ("x", "y", "loss"))
        scale = Scale.of({"": some})
        heat = left.pcolormesh(x, y, scale.clean(loss).T, cmap=MAP, norm=scale.norm, shading="gouraud", rasterized=True)
        left.contour(x, y, scale.clean(loss).T, levels=scale.levels, colors="white", linewidths=0.4, alpha=0.6)
        drawing.colorbar(heat, ax=left, label="loss")
        left.set_title(f"the plane has {100 * some.scalars['explained']:.0f} % of the variance", fontsize=9)
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        if "path" in result.arrays:
            (a, b), (c, d) = result.arrays["path"]
            left.plot([a, c], [b, d], "-", color=colour, lw=0.8)
            left.plot(a, b, "o", mfc="white", mec=colour, ms=6)
            left.plot(c, d, "o", color=colour, ms=6, label=name)
        losses = result.arrays["line"]
        middle.plot(np.linspace(0, 1, len(losses)), losses, color=colour, marker=".", lw=1, label=name)
    left.set(xlabel="first principal component", ylabel="second")
    middle.set(xlabel="from start (0) to end (1)", ylabel="loss", ylim=(0, None))
    if len(results) <= 12:
        middle.legend(frameon=False, fontsize=6)
    shown = right.imshow(np.stack([result.arrays["distances"] for result in results.values()]), cmap="viridis")
    drawing.colorbar(shown, ax=right, label="distance between minima")
    numbers = range(0, len(results), max(1, len(results) // 12))
    right.set(xlabel="run", ylabel="run", xticks=numbers, yticks=numbers)
    return drawing
