"""The path of training seen in a plane (Li et al. 2018, section 7 and Fig. 9; the authors' plot_trajectory.py).

Path       theta_e after e epochs, as callbacks.Trajectory stored it: one vector (directions.Layout) per file
Plane      the first two principal components of the rows theta_e - theta_final over all parameters, rows centred;
           unit vectors, not filter-normalised; a path's coordinates are (theta_e - theta_final) . component
Angles     per epoch, in degrees. `step_gradient`: between the step theta_{e+1} - theta_e and minus the gradient of the
           loss at theta_e, over all parameters. `step_normal`: in the plane, between the step and the normal of the
           contour through its start, folded to 0..90: 0 is perpendicular to the contour, 90 along it; the normal is
           that of the drawn surface, interpolated between its grid points.
The slides say that weight decay turns steps perpendicular to the contours; Li et al. that with weight decay and small
batches the path turns nearly parallel to them late in training. This measures; it asserts no direction.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.analysis import evaluating
from depthlab.analysis.directions import Layout
from depthlab.analysis.evaluator import Resident
from depthlab.problem import Problem
from depthlab.records import write_atomically

FOLDER, CHUNK = "trajectory", 1 << 14


class Plane(NamedTuple):
    components: np.ndarray  # (2, P) unit vectors
    coordinates: np.ndarray  # (E, 2) of the path, the origin being `origin`
    explained: np.ndarray  # (E,) shares of the variance, falling


def path_of(folder: Path, epoch: int) -> Path:
    return folder / FOLDER / f"epoch{epoch:04d}.npy"


def store(folder: Path, epoch: int, vector: Tensor, dtype: str) -> None:
    """Whole or not at all."""
    buffer, path = io.BytesIO(), path_of(folder, epoch)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(buffer, vector.detach().cpu().numpy().astype(dtype))
    write_atomically(path, buffer.getvalue())


def stored(folder: Path, net: nn.Module) -> dict[int, np.ndarray]:
    """Epoch -> vector (P,), memory-mapped; rising.

    Raises:
        Problem: there is no path, or another network's.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("epoch*.npy")):
        if match := re.fullmatch(r"epoch(\d+)", path.stem):
            found[int(match[1])] = np.load(path, mmap_mode="r")
    size = len(Layout(net))
    if wrong := [e for e, v in found.items() if v.shape != (size,)]:
        raise Problem(f"{path_of(folder, wrong[0])}: another network's weights, {size} numbers wanted")
    if len(found) < 3:
        way_out = "train with trajectory.every=1 (a run that is done: delete its folder first)"
        raise Problem(f"{folder / FOLDER}: a plane needs the weights of 3 epochs, there are {len(found)}; {way_out}")
    return found


def principal_plane(rows: Sequence[np.ndarray], origin: np.ndarray, mask: np.ndarray) -> Plane:
    """The plane that holds most of the path's variance.

    From the Gram matrix (E, E) of the centred rows, a block of columns at a time: some 40 MB of a path of 300 epochs.

    Args:
        rows: E vectors (P,).
        origin: (P,), subtracted from every row.
        mask: (P,) bool, the entries that count; components are 0 elsewhere.
    """
    E, P = len(rows), len(origin)
    gram = np.zeros((E, E))
    blocks = [slice(a, min(a + CHUNK, P)) for a in range(0, P, CHUNK)]

    def block(s: slice) -> np.ndarray:
        return np.stack([np.where(mask[s], row[s].astype(np.float64) - origin[s], 0) for row in rows])

    for s in blocks:
        m = block(s)
        m -= m.mean(0)
        gram += m @ m.T
    variance, u = np.linalg.eigh(gram)
    variance, u = np.clip(variance[::-1], 0, None), u[:, ::-1][:, :2]
    if not variance[1] > 0:
        raise Problem("the path lies on a line: no plane to draw")
    components, coordinates = np.zeros((2, P)), np.zeros((E, 2))
    for s in blocks:
        m = block(s)
        components[:, s] = (u / np.sqrt(variance[:2])).T @ (m - m.mean(0))
        coordinates += m @ components[:, s].T
    sign = np.where(coordinates[0] < 0, -1.0, 1.0)  # the path starts at the upper right: a picture that repeats
    return Plane(components * sign[:, None], coordinates * sign, variance / variance.sum())


def gradient(net: nn.Module, layout: Layout, vector: Tensor, images: Resident, chunk: int = 250) -> Tensor:
    """(P,) of the mean loss at these weights in evaluation mode; 0 for running statistics."""
    views = layout.views(vector)
    trained = {name: views[name].clone().requires_grad_() for name, _ in net.named_parameters()}
    total = {name: torch.zeros_like(v) for name, v in trained.items()}
    with evaluating(net), torch.enable_grad():
        for x, y in zip(images.x.split(chunk), images.y.split(chunk)):
            logits = torch.func.functional_call(net, views | trained, (x,))
            loss = F.cross_entropy(logits, y, reduction="sum") / len(images.y)
            for name, g in zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True)):
                if g is not None:
                    total[name] += g
    return torch.cat([total.get(name, torch.zeros_like(view)).reshape(-1) for name, view in views.items()])


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    """Between two vectors, 0..180; nan if one is 0."""
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(float(a @ b) / scale, -1, 1)))) if scale > 0 else float("nan")


def step_gradient(net: nn.Module, path: Sequence[np.ndarray], images: Resident) -> np.ndarray:
    """(E - 1,) angles between each step and minus the gradient where it starts, over all parameters."""
    layout, out = Layout(net), []
    device, trained = images.x.device, layout.trained.numpy()
    for here, there in zip(path, path[1:]):
        vector = torch.from_numpy(np.array(here)).to(device, layout.dtype)
        g = gradient(net, layout, vector, images).cpu().double().numpy()
        step = np.where(trained, there.astype(np.float64) - here, 0)
        out.append(degrees(step, -g))
    return np.array(out)


def step_normal(coordinates: np.ndarray, x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(E - 1,) angles in the plane between each step and the normal of the contour through its start, 0..90.

    nan where the surface is not finite. The surface is log(loss): its contours are the loss's, and it is smoother.

    Args:
        coordinates: (E, 2) of the path; x (n,), y (m,) and loss (n, m) of the surface, n and m >= 4.
    """
    from scipy.interpolate import RectBivariateSpline  # not paid for by every run, whose callback this file serves

    if not (np.isfinite(loss).all() and (loss > 0).all()):
        return np.full(len(coordinates) - 1, np.nan)
    surface = RectBivariateSpline(x, y, np.log(loss), kx=min(3, len(x) - 1), ky=min(3, len(y) - 1))
    out = []
    for here, there in zip(coordinates, coordinates[1:]):
        normal = np.array([surface.ev(*here, dx=1), surface.ev(*here, dy=1)])
        angle = degrees(there - here, normal)
        out.append(min(angle, 180 - angle) if np.isfinite(angle) else angle)
    return np.array(out)
