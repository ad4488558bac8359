"""The loss around, between or along trained weights (Li et al. 2018, Figs. 5, 6, 9; slides "The effect of depth").

Point      theta(a, b) = theta* + a d1 + b d2 directions from directions.py or trajectory.py
Value      mean cross-entropy over training images without augmentation, in evaluation mode, BatchNorm statistics kept
           at theta*'s [authors' code]; `recalibrate` measures them anew at every point, since stale statistics may be
           what makes a surface look chaotic
Paper      51 x 51 points of [-1, 1]^2 on all 50,000 training images; between two runs 401 points of [-.5, 1.5]
Here       25 x 25 on a fixed random 10,000 by default: the same ranking at 1/21 of the cost
The path's plane: unit directions; its box is the path's and a tenth more on each side [choice].
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result
from depthlab.analysis.curvature import areas
from depthlab.analysis.directions import Layout, cosine, random_direction
from depthlab.analysis.evaluator import PRECISIONS, Evaluator, Resident
from depthlab.analysis.grid import Plane, evaluate
from depthlab.analysis.inside import check_one_of
from depthlab.analysis.surface_figures import figure
from depthlab.analysis.surface_files import extra
from depthlab.analysis.trajectory import principal_plane, step_gradient, step_normal, stored
from depthlab.problem import Problem

__all__ = ["extra", "figure", "loss_surface"]
KINDS = ("random", "between", "pca")


def loss_surface(
    net: nn.Module,
    batches: Images,
    folder: Path,
    scratch: Path,
    directions: str = "random",
    dimensions: int = 2,
    grid: int = 25,
    span: float | list[float] | None = None,
    seed: int = 123,
    other: str | None = None,
    precision: str = "32",
    recalibrate: int | None = None,
    gradients: int | None = None,
    workers: int = 1,
) -> Result:
    """Arrays: `x` (n,), in two dimensions `y` (n,), `loss` and `error` (n,) or (n, n), [i, j] at (x_i, y_j).

    Of a path also `epochs` (E,), `path` (E, 2), `explained` (E,), `step_normal` and, with `gradients`,
    `step_gradient` (E - 1,).

    Args:
        folder: the run's.
        scratch: where an evaluation that is broken off leaves what it has.
        directions: "random", "between" (this run and `other`) or "pca" (of the stored path).
        dimensions: 1 or 2; the second direction between two runs is a random one.
        grid: points a side.
        span: a for [-a, a], or [low, high], of both axes; None for 1, for [-.5, 1.5] between two runs, and for the
            path's box.
        seed: of the random directions.
        other: folder of the run at coordinate 1.
        precision: "32" or "bf16", whose error against 32 is then measured at 9 points.
        recalibrate: images that give BatchNorm's statistics anew at each point.
        gradients: images for the gradient along the path; None measures no angles to it.
        workers: processes (CPUs: a thread each), or GPUs.

    Raises:
        Problem: an option is out of its range, or there is no such run or path.
    """
    check(directions, dimensions, grid, precision, workers, other)
    layout = Layout(net)
    theta = layout.vector(net)
    device = theta.device
    images = Resident.of(batches, device, layout.dtype)
    if recalibrate is not None and not 2 <= recalibrate <= len(images.y):
        raise Problem(f"analysis.recalibrate must lie in 2..{len(images.y)} (analysis.images), got {recalibrate}")
    about: dict[str, Any] = {"images": len(images.y)}
    arrays: dict[str, np.ndarray] = {}
    if directions == "pca":
        vectors, axes = along_path(net, folder, layout, theta, arrays)
        shares = arrays["explained"]
        about |= {f"explained_{k + 1}": float(share) for k, share in enumerate(shares[:2])}
        about |= {"explained": float(shares[:2].sum()), "explained_random": random_share(net, seed, folder, arrays)}
    else:
        vectors = [random_direction(net, seed, draw).to(device) for draw in range(dimensions)]
        if directions == "between":
            vectors[0] = other_vector(other, layout).to(device) - theta
        if dimensions == 2:
            about["cosine"] = cosine(*vectors)
        axes = [limits(span, (-0.5, 1.5) if directions == "between" else (-1.0, 1.0))] * dimensions
        if directions == "between" and dimensions == 2 and span is None:
            axes[1] = (-1.0, 1.0)
    if directions == "pca" and span is not None:
        axes = [limits(span, (-1.0, 1.0))] * 2
    vectors, axes = vectors[:dimensions], axes[:dimensions]
    coordinates = [np.linspace(low, high, grid) for low, high in axes]
    points = list(product(*(c.tolist() for c in coordinates)))
    centre = (0.0,) * dimensions
    plane, evaluator = Plane(theta, vectors), Evaluator(net, images, precision, recalibrate)
    values = evaluate([centre, *points], plane, evaluator, workers, scratch, f"{folder.name} {directions}")
    shape = (grid,) * dimensions
    loss, error = (column.reshape(shape) for column in values[1:].T)
    arrays |= {**dict(zip("xy", coordinates)), "loss": loss, "error": error}
    known = loss[np.isfinite(loss)]
    about |= {"points": len(points), "finite": len(known) / len(points), "loss_center": float(values[0, 0]),
              "error_center": float(values[0, 1]), "loss_min": float(known.min()) if len(known) else None,
              "loss_max": float(known.max()) if len(known) else None}  # fmt: skip
    if directions == "random" and dimensions == 2:
        shares, maps = areas(*coordinates, loss, about["loss_center"])
        about, arrays = about | dict(shares), arrays | dict(maps)
    if directions == "between" and dimensions == 1:
        about["barrier"] = barrier(coordinates[0], arrays["loss"])
    if directions == "pca":
        angles(net, folder, images, gradients, arrays, about)
    if precision != "32":
        about |= rounding(net, images, plane, [centre, *points], values, recalibrate)
    return Result(about, arrays)


def check(directions: str, dimensions: int, grid: int, precision: str, workers: int, other: str | None) -> None:
    check_one_of("directions", directions, KINDS)
    check_one_of("dimensions", dimensions, (1, 2))
    check_one_of("precision", precision, PRECISIONS)
    if grid < 3 or workers < 1:
        raise Problem(f"analysis.grid must be >= 3 and analysis.workers >= 1, got {grid} and {workers}")
    if directions == "pca" and dimensions == 1:
        raise Problem("analysis.directions=pca is a plane: analysis.dimensions=2")
    if (other is not None) != (directions == "between"):
        raise Problem("analysis.directions=between and analysis.other=<folder of the other run> belong together")


def limits(span: float | list[float] | None, default: tuple[float, float]) -> tuple[float, float]:
    if span is None:
        return default
    low, high = (-span, span) if isinstance(span, (int, float)) else span if len(span) == 2 else (0, 0)
    if not low < high:
        raise Problem(f"analysis.span must be a number > 0 or [low, high], got {span}")
    return float(low), float(high)


def other_vector(other: str, layout: Layout) -> Tensor:
    """The state of another run of the same network."""
    path = Path(other) / "last.ckpt"
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return layout.vector({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    except ValueError as error:
        raise Problem(f"analysis.other={other}: {error}") from error
    except Exception as error:
        raise Problem(f"analysis.other={other}: no readable last.ckpt in it ({type(error).__name__})") from error


def along_path(
    net: nn.Module, folder: Path, layout: Layout, theta: Tensor, arrays: dict[str, np.ndarray]
) -> tuple[list[Tensor], list[tuple[float, float]]]:
    """Directions and box of the path's plane; the path goes into `arrays`."""
    path = stored(folder, net)
    plane = principal_plane(list(path.values()), theta.cpu().numpy().astype(np.float64), layout.trained.numpy())
    arrays |= {"epochs": np.array(list(path)), "path": plane.coordinates, "explained": plane.explained}
    axes = []
    for c in plane.coordinates.T:
        low, high = min(c.min(), 0.0), max(c.max(), 0.0)
        axes.append((low - 0.1 * (high - low), high + 0.1 * (high - low)))
    return [torch.from_numpy(c).to(theta) for c in plane.components], axes


def random_share(net: nn.Module, seed: int, folder: Path, arrays: dict[str, np.ndarray]) -> float:
    """Of the path's variance, what two random directions hold."""
    basis, _ = np.linalg.qr(np.stack([random_direction(net, seed, draw).double().numpy() for draw in (0, 1)], axis=1))
    shadow = np.stack([row.astype(np.float64) @ basis for row in stored(folder, net).values()])
    whole = arrays["path"][:, 0].var() / arrays["explained"][0]
    return float(shadow.var(axis=0).sum() / whole)


def angles(
    net: nn.Module, folder: Path, images: Resident, gradients: int | None, arrays: dict[str, np.ndarray],
    about: dict[str, Any],
) -> None:  # fmt: skip
    arrays["step_normal"] = step_normal(arrays["path"], arrays["x"], arrays["y"], arrays["loss"])
    if gradients is not None:
        some = Resident(images.x[:gradients], images.y[:gradients])
        arrays["step_gradient"] = step_gradient(net, list(stored(folder, net).values()), some)
    for key in ("step_normal", "step_gradient"):
        if key in arrays:
            for part, half in zip(("early", "late"), np.array_split(arrays[key], 2)):
                known = half[np.isfinite(half)]
                about[f"{key}_{part}"] = float(np.median(known)) if len(known) else None


def barrier(x: np.ndarray, loss: np.ndarray) -> float | None:
    """How far the loss between the two runs rises above the straight line between theirs."""
    inside = (x >= 0) & (x <= 1)
    ends = np.interp([0, 1], x, loss)
    over = loss[inside] - (ends[0] + (ends[1] - ends[0]) * x[inside])
    return float(over.max()) if np.isfinite(over).all() else None


def rounding(
    net: nn.Module, images: Resident, plane: Plane, points: list[tuple], values: np.ndarray, recalibrate: int | None
) -> dict[str, float]:
    """What reduced precision changed, at the centre and 8 points spread over the grid."""
    exact = Evaluator(net, images, "32", recalibrate)
    some = np.linspace(0, len(points) - 1, 9).astype(int)
    there = np.array([exact(plane.at(points[i])) for i in some])
    error = np.abs(values[some, 0] - there[:, 0])
    with np.errstate(invalid="ignore"):
        relative = error / there[:, 0]
    return {"rounding_max": float(error.max()), "rounding_relative_max": float(relative.max()),
            "rounding_error_points": float(np.abs(values[some, 1] - there[:, 1]).max())}  # fmt: skip
