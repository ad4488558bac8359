"""Points and directions in weight space (Li et al. 2018, sections 3 and 4).

A network's state is one vector: every floating-point entry of its state_dict, parameters and running statistics.
    random     one N(0, 1) draw per parameter tensor, filter-normalised: every slice d_k along dim 0 (a convolution's
               filter, a row of a fully connected layer) becomes d_k ||w_k|| / (||d_k|| + 1e-10); tensors of one
               dimension (biases, BatchNorm) and running statistics stay 0 [authors' code: ignore=biasbn]
    between    theta_other - theta over the whole state, running statistics too [authors' code: states]
    pca        see trajectory.py
Two random directions are not made orthogonal; their cosine is reported [authors' code].
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from depthlab.data.batches import generator


class Layout:
    """Where each tensor of a network's floating-point state lies in the vector.

    `trained` (P,) tells parameters from running statistics, `kernels` (P,) parameters of more than one dimension.
    """

    def __init__(self, net: nn.Module) -> None:
        state = {name: v for name, v in net.state_dict().items() if v.is_floating_point()}
        parameters = {name for name, _ in net.named_parameters()}
        self.shapes = {name: v.shape for name, v in state.items()}
        self.sizes = [v.numel() for v in state.values()]
        self.dtype = next(iter(state.values())).dtype

        def mask(chosen: Sequence[bool]) -> Tensor:
            return torch.repeat_interleave(torch.tensor(chosen), torch.tensor(self.sizes))

        self.trained = mask([name in parameters for name in state])
        self.kernels = mask([name in parameters and v.ndim > 1 for name, v in state.items()])

    def __len__(self) -> int:
        return sum(self.sizes)

    def vector(self, state: Mapping[str, Tensor] | nn.Module) -> Tensor:
        """(P,), a copy of a network's state or of a state_dict.

        Raises:
            ValueError: another network's.
        """
        state = state.state_dict() if isinstance(state, nn.Module) else state
        for name, shape in self.shapes.items():
            if name not in state or state[name].shape != shape:
                there = "is missing" if name not in state else f"has shape {tuple(state[name].shape)}"
                raise ValueError(f"another network's weights: {name} must have shape {tuple(shape)} and {there}")
        return torch.cat([state[name].detach().to(self.dtype).reshape(-1) for name in self.shapes])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector's pieces in their shapes, sharing its memory."""
        pieces = vector.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}


def filter_normalise(direction: Tensor, weight: Tensor) -> Tensor:
    """Slice by slice along dim 0 the norms of `weight`; 0 where `weight` has one dimension."""
    if weight.ndim <= 1:
        return torch.zeros_like(direction)
    norms = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (weight, direction)]
    return direction * (norms[0] / (norms[1] + 1e-10)).view(-1, *[1] * (weight.ndim - 1))


def random_direction(net: nn.Module, seed: int, draw: int = 0, normalise: bool = True) -> Tensor:
    """(P,) on the CPU, one of the draws of `seed`; without `normalise` the N(0, 1) numbers as they are."""
    layout, random = Layout(net), generator(seed, f"direction {draw}")
    state, parts = net.state_dict(), []
    trained = dict(net.named_parameters())
    for name, shape in layout.shapes.items():
        if name not in trained or len(shape) <= 1:
            parts.append(torch.zeros(math.prod(shape), dtype=layout.dtype))
            continue
        d = torch.randn(shape, generator=random).to(layout.dtype)
        w = state[name].detach().cpu()
        parts.append((filter_normalise(d, w) if normalise else d).reshape(-1))
    return torch.cat(parts)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors; nan if one is 0."""
    a, b = a.double(), b.double()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else math.nan
