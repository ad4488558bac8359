"""How sharp a minimum is, in one line of numbers (Li et al. 2018, section 6; slides: "Flatter minima accompanied by
lower test errors").

lambda_max, lambda_min   ends of the Hessian's spectrum, see hessian.py; `ratio` |lambda_min / lambda_max| measures how
                         far from convex the surface is in all directions, where a picture shows two
S_rho                    mean over 20 filter-normalised directions d of L(theta* + rho d) - L(theta*) [choice]
flat, non_convex         shares of the picture's area, see curvature.py
Training images without augmentation, evaluation mode, BatchNorm's statistics as they are.
BatchNorm makes a kernel's scale meaningless, and with it eigenvalues: halving a kernel quadruples them and changes no
output. S_rho and the areas are relative to each filter's norm; compare lambda_max only where weight decay was the same.
Cost     resnet20, 2,000 images: some 30 products of 7 passes each, 60 passes, and 626 for the grid.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from depthlab.analysis import Images, Result, files
from depthlab.analysis.curvature import areas
from depthlab.analysis.directions import Layout, random_direction
from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.analysis.grid import Plane, evaluate
from depthlab.analysis.hessian import Hessian, ends, start_vector
from depthlab.analysis.inside import progress
from depthlab.problem import Problem


def sharpness(
    net: nn.Module,
    batches: Images,
    folder: Path,
    scratch: Path,
    tol: float = 1e-2,
    steps: int = 100,
    hessian_images: int | None = None,
    chunk: int | None = None,
    directions: int = 20,
    rho: Sequence[float] = (0.25, 0.5, 1.0),
    grid: int | None = 25,
    seed: int = 123,
    workers: int = 1,
) -> Result:
    """Scalars as above (S_0_5 for rho = .5), `loss`, `error`, `products`; arrays `rho` (R,), `rise` (directions, R),
    and of the grid on [-1, 1]^2 `x`, `y`, `surface`, `curvature`.

    Args:
        folder: the run's; the surface that analysis=loss_surface left there is taken if it is the same.
        scratch: where a grid that is broken off leaves what it has.
        tol: of the eigenvalues, relative to the larger one.
        steps: Hessian-vector products at most; 0 leaves the eigenvalues out.
        hessian_images: the first so many images for the Hessian; None for all.
        chunk: images at once in a Hessian-vector product; None for what suits the device.
        directions: how many; 0 leaves S_rho out.
        grid: points a side; None leaves the areas out.
        seed: of the directions and of Lanczos' start.
        workers: processes for the grid.

    Raises:
        Problem: an option is out of its range.
    """
    layout = Layout(net)
    theta = layout.vector(net)
    images = Resident.of(batches, theta.device, layout.dtype)
    check(tol, steps, directions, rho, grid, chunk, hessian_images, len(images.y))
    evaluator = Evaluator(net, images)
    loss, error = evaluator(theta)
    scalars: dict[str, Any] = {"images": len(images.y), "loss": loss, "error": error}
    arrays: dict[str, np.ndarray] = {}
    if steps:
        some = Resident(images.x[:hessian_images], images.y[:hessian_images])
        hessian = Hessian(net, some, chunk)
        found = ends(hessian, start_vector(hessian.n, theta, seed), tol, progress(range(steps), "Hessian", steps))
        scalars |= {
            "lambda_max": found.high,
            "lambda_max_error": found.high_error,
            "lambda_min": found.low,
            "lambda_min_error": found.low_error,
            "ratio": abs(found.low / found.high) if found.high else None,
            "products": found.products,
        }
    if directions:
        rise = rises(net, theta, evaluator, loss, directions, rho, seed)
        scalars |= {f"S_{r:g}".replace(".", "_"): float(column.mean()) for r, column in zip(rho, rise.T)}
        arrays |= {"rho": np.array(rho), "rise": rise}
    if grid is not None:
        x, y, surface = drawn(folder, grid, seed, len(images.y), loss) or draw(
            net, theta, evaluator, grid, seed, workers, scratch, f"{folder.name} grid"
        )
        shares, maps = areas(x, y, surface, loss)
        scalars, arrays = scalars | dict(shares), arrays | {"x": x, "y": y, "surface": surface} | dict(maps)
    return Result(scalars, arrays)


def check(
    tol: float, steps: int, directions: int, rho: Sequence[float], grid: int | None, chunk: int | None,
    hessian_images: int | None, images: int,
) -> None:  # fmt: skip
    if not 0 < tol < 1:
        raise Problem(f"analysis.tol must lie in (0, 1), got {tol}")
    for key, value in (("steps", steps), ("directions", directions)):
        if value < 0:
            raise Problem(f"analysis.{key} must be >= 0, got {value}")
    if not all(r > 0 for r in rho) or not rho:
        raise Problem(f"analysis.rho must be numbers > 0, got {list(rho)}")
    if grid is not None and grid < 3:
        raise Problem(f"analysis.grid must be >= 3, or null for no areas, got {grid}")
    if chunk is not None and chunk < 1:
        raise Problem(f"analysis.chunk must be >= 1, or null, got {chunk}")
    if hessian_images is not None and not 1 <= hessian_images <= images:
        raise Problem(f"analysis.hessian_images must lie in 1..{images} (analysis.images), got {hessian_images}")


def rises(
    net: nn.Module, theta: Tensor, evaluator: Evaluator, loss: float, directions: int, rho: Sequence[float], seed: int
) -> np.ndarray:
    """(directions, R): L(theta* + rho d) - L(theta*). One direction in memory at a time."""
    rise = np.empty((directions, len(rho)))
    for k in progress(range(directions), "directions", directions):
        plane = Plane(theta, [random_direction(net, seed, k).to(theta.device)])
        rise[k] = [evaluator(plane.at((r,)))[0] - loss for r in rho]
    return rise


def draw(
    net: nn.Module, theta: Tensor, evaluator: Evaluator, grid: int, seed: int, workers: int, scratch: Path, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y (grid,) and the losses (grid, grid) on [-1, 1]^2."""
    x = np.linspace(-1, 1, grid)
    plane = Plane(theta, [random_direction(net, seed, k).to(theta.device) for k in range(2)])
    values = evaluate(list(product(x.tolist(), repeat=2)), plane, evaluator, workers, scratch, name)
    return x, x, values[:, 0].reshape(grid, grid)


def drawn(
    folder: Path, grid: int, seed: int, images: int, loss: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same grid as analysis=loss_surface left it, None if there is none or of other weights, images or options."""
    there = files.read(folder, "loss_surface")
    if there is None:
        return None
    result, about = there
    ours = {"directions": "random", "dimensions": 2, "grid": grid, "seed": seed, "precision": "32", "recalibrate": None}
    same = all(about["analysis"].get(key) == value for key, value in ours.items())
    same = same and about["analysis"].get("span") in (None, 1) and result.scalars["images"] == images
    if not same or not np.isclose(result.scalars["loss_center"], loss, rtol=1e-5):
        return None
    return result.arrays["x"], result.arrays["y"], result.arrays["loss"]


def figure(results: Mapping[str, Result]) -> Any:
    """S_rho over rho; and each run's map of the smaller eigenvalue, where negative red."""
    from depthlab.analysis.drawing import COLOURS, canvas

    maps = {name: r for name, r in results.items() if "curvature" in r.arrays}
    columns = min(1 + len(maps), 4)
    rows = -(-(1 + len(maps)) // columns)
    drawing = canvas(max(6.4, 4.4 * columns), 4.2 * rows + 0.2 * len(results))
    first, *rest = drawing.subplots(rows, columns, squeeze=False).ravel()
    for axis in rest[len(maps) :]:
        axis.set_axis_off()
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        of = result.scalars
        label = name
        if of.get("lambda_max") is not None:
            label += rf": $\lambda$ {of['lambda_min']:.3g} .. {of['lambda_max']:.3g}"
        if "rise" in result.arrays:
            rho, rise = result.arrays["rho"], result.arrays["rise"]
            spread = rise.std(0, ddof=1) if len(rise) > 1 else np.zeros(len(rho))
            first.errorbar(rho, rise.mean(0), spread, marker="o", ms=4, lw=1, capsize=3, color=colour, label=label)
        else:
            first.plot([], [], color=colour, label=label)
    means = [r.arrays["rise"].mean(0) for r in results.values() if "rise" in r.arrays]
    if means and 0 < np.min(means) < np.max(means) / 30:
        first.set_yscale("log")
    first.set(xlabel=r"$\rho$", ylabel=r"$S_\rho$: rise of the loss, mean and std", xlim=(0, None))
    drawing.legend(loc="outside lower center", frameon=False, fontsize=8)
    limit = max((float(np.nanmax(np.abs(r.arrays["curvature"]), initial=0)) for r in maps.values()), default=0) or 1.0
    for axis, (name, result) in zip(rest, maps.items()):
        from matplotlib.colors import SymLogNorm

        x, y = (result.arrays[key][1:-1] for key in "xy")
        norm = SymLogNorm(limit * 1e-3, vmin=-limit, vmax=limit)  # the same colours for all
        drawn = axis.pcolormesh(x, y, result.arrays["curvature"].T, cmap="RdBu", norm=norm, shading="nearest")
        share = result.scalars["non_convex"]
        words = f"flat {100 * result.scalars['flat']:.1f} %"
        words += "" if share is None else f", non-convex {100 * share:.1f} %"
        axis.set_title(f"{name}\n{words}", fontsize=9)
        axis.set_aspect("equal")
        drawing.colorbar(drawn, ax=axis, shrink=0.8, label="smaller eigenvalue")
    return drawing
