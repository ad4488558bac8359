"""What a picture of the loss surface says, in numbers: pure functions of a grid of losses.

flat          share of the grid's points with L < L* + 1 [choice]: a wide valley has many
non-convex    share of its inner points at which the smaller eigenvalue of the 2x2 Hessian of finite differences is
              negative; directions are filter-normalised, so it is the curvature of the picture
Points without a finite loss are not flat; points next to one have no Hessian and do not count.
"""

from collections.abc import Mapping

import numpy as np

ROUNDING = 1e-6  # relative, of a loss in single precision


def flat_area(loss: np.ndarray, centre: float, margin: float = 1.0) -> float:
    """Share of points with a loss below `centre` + `margin`."""
    return float(np.mean(np.nan_to_num(loss, nan=np.inf) < centre + margin))


def smallest_eigenvalue(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the Hessian at the inner points (n - 2, m - 2), central differences; nan where a neighbour is not finite. And
    what rounding of the losses alone may make of it, per point.

    Args:
        x, y: (n,) and (m,), evenly spaced, at least 3 each.
        loss: (n, m) at (x_i, y_j).
    """
    a, b = (np.diff(axis).mean() for axis in (x, y))
    loss = np.where(np.isfinite(loss), loss, np.nan)
    here = loss[1:-1, 1:-1]
    xx = (loss[2:, 1:-1] - 2 * here + loss[:-2, 1:-1]) / a**2
    yy = (loss[1:-1, 2:] - 2 * here + loss[1:-1, :-2]) / b**2
    xy = (loss[2:, 2:] - loss[2:, :-2] - loss[:-2, 2:] + loss[:-2, :-2]) / (4 * a * b)
    return (xx + yy) / 2 - np.hypot((xx - yy) / 2, xy), ROUNDING * np.abs(here) / min(a, b) ** 2


def non_convex_area(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> float | None:
    """Share of the inner points whose Hessian has a negative eigenvalue, beyond rounding; None if none is known."""
    least, rounding = smallest_eigenvalue(x, y, loss)
    known = np.isfinite(least)
    return float(np.mean(least[known] < -rounding[known])) if known.any() else None


def areas(
    x: np.ndarray, y: np.ndarray, loss: np.ndarray, centre: float
) -> tuple[Mapping[str, float | None], Mapping[str, np.ndarray]]:
    """Scalars `flat` and `non_convex`; array `curvature`, the map of smallest eigenvalues."""
    scalars = {"flat": flat_area(loss, centre), "non_convex": non_convex_area(x, y, loss)}
    return scalars, {"curvature": smallest_eigenvalue(x, y, loss)[0]}
