"""Hessian-vector products of the mean loss, and both ends of the Hessian's spectrum by one Lanczos process.

H    second derivatives of the mean cross-entropy in evaluation mode with respect to all kernels, the parameters of more
     than one dimension [Li et al.'s code]; BatchNorm's parameters and all biases stay fixed
Hv   the gradient of (gradient . v); exact, image by image, so any number of images fits
Li et al.'s code runs scipy's eigsh twice, the second time on the shifted H - .51 lambda_max I, to a tolerance of 1e-2.
One Krylov space holds both ends: half the products. Its estimates lie inside the spectrum; beside each stands the norm
of its residual, within which there is an eigenvalue.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.analysis import evaluating
from depthlab.analysis.evaluator import Resident
from depthlab.data.batches import generator

CHUNK = {"cpu": 64, "cuda": 250}  # images at once: resnet56 takes some 20 MB for each


class Ends(NamedTuple):
    low: float
    high: float
    low_error: float  # norms of the residuals
    high_error: float
    products: int


def kernels(net: nn.Module) -> dict[str, Tensor]:
    """Parameters of more than one dimension."""
    return {name: p for name, p in net.named_parameters() if p.ndim > 1}


class Hessian:
    """`hessian(v)` -> H v, both (n,) on the images' device; `hessian.n` is the number of kernel entries.

    Args:
        net: left as it is.
        chunk: images at once; None for what suits the device.
    """

    def __init__(self, net: nn.Module, images: Resident, chunk: int | None = None) -> None:
        self.net, self.images = net, images
        self.chunk = CHUNK.get(images.x.device.type, 64) if chunk is None else chunk
        self.shapes = {name: p.shape for name, p in kernels(net).items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.n = sum(self.sizes)

    def __call__(self, v: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(v.split(self.sizes), self.shapes.values())]
        total = torch.zeros_like(v)
        w = {name: p.detach().requires_grad_() for name, p in kernels(self.net).items()}
        w_values = list(w.values())
        with evaluating(self.net), torch.enable_grad():
            for x, y in zip(self.images.x.split(self.chunk), self.images.y.split(self.chunk)):
                logits = torch.func.functional_call(self.net, w, (x,))
                loss = F.cross_entropy(logits, y, reduction="sum") / len(self.images.y)
                gradients = torch.autograd.grad(loss, w_values, create_graph=True)
                along = sum((g * piece).sum() for g, piece in zip(gradients, pieces))
                parts = torch.autograd.grad(along, w_values, allow_unused=True, materialize_grads=True)
                total += torch.cat([part.reshape(-1) for part in parts])
        return total


def ends(
    product: Callable[[Tensor], Tensor], start: Tensor, tol: float = 1e-2, steps: Iterable[int] = range(100)
) -> Ends:
    """The smallest and the largest eigenvalue of a symmetric operator, by Lanczos with full reorthogonalisation.

    Ends where both residuals are below `tol` times the larger magnitude of the two; or where `steps` end, a vector
    (n,) of memory each; or where the Krylov space is exhausted, exact.

    Args:
        product: v (n,) -> A v (n,).
        start: (n,), not 0.
    """
    basis, alpha, beta = [start / start.norm()], [], []
    found = Ends(float("nan"), float("nan"), float("inf"), float("inf"), 0)
    for _ in steps:
        w = product(basis[-1])
        alpha.append(float(w @ basis[-1]))
        for _ in range(2):  # once leaves what rounding put back
            for q in basis:
                w -= (w @ q) * q
        beta.append(float(w.norm()))
        T = torch.diag(torch.tensor(alpha, dtype=torch.float64))
        off = torch.tensor(beta[:-1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))
        errors = (beta[-1] * vectors[-1].abs()).tolist()
        low, high = float(values[0]), float(values[-1])
        found = Ends(low, high, errors[0], errors[-1], len(alpha))
        size = max(abs(low), abs(high))
        exhausted = beta[-1] <= 1e-6 * size or len(alpha) == len(start)
        if exhausted or (len(alpha) > 1 and max(errors[0], errors[-1]) <= tol * size):
            break
        basis.append(w / beta[-1])
    return found


def start_vector(n: int, like: Tensor, seed: int = 0) -> Tensor:
    """(n,) N(0, 1), the same on every device."""
    return torch.randn(n, generator=generator(seed, "lanczos")).to(like.device, like.dtype)
