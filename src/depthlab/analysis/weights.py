"""Distribution of weights, mass of ID entries, weight regularisation (Yu & Tomasi 2019, App. C; Tables 3, 4, Fig. 7).

t        = T(r) of a residual network, p of a plain one: the kernels as they act, identity included
Tensors  kernels of all convolutions, stem included; fully connected layer and biases excluded [what reproduces Table 3]
Mass     L1 norm: of all weights, of those with magnitude >= .25, of the ID entries
Penalty  (lambda / 2B) sum of w^2 over kernels and the fully connected layer's weights, lambda = 1e-4, B = 128 [what
         reproduces Table 4 and every C - L of Tables 1 and 2]; of the network's own weights, and of T^-1(t), which is
         what a plain network that started at T(r0) is held to
Cost     none to speak of; needs no images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Result
from depthlab.analysis.inside import doubled
from depthlab.equivalence import id_entries, plain, residual
from depthlab.problem import Problem

BINS, LOW, HIGH = 200, -1.2, 1.6  # Fig. 7


def weights(net: nn.Module, weight_decay: float = 1e-4, batch_size: int = 128) -> Result:
    """Scalars as above; arrays `counts` and `id_counts` (200,) between `edges` (201,), what lies outside in the ends.

    Args:
        weight_decay, batch_size: lambda and B of the penalty; B = 1 for one that is not divided by the batch.

    Raises:
        Problem: a network of another kind, or an argument out of its range.
    """
    if weight_decay < 0 or batch_size < 1:
        raise Problem(f"analysis needs weight_decay >= 0 and batch_size >= 1, got {weight_decay} and {batch_size}")
    t, r = kernels(plain(doubled(net))), kernels(residual(doubled(net)))
    ids = torch.cat([id_entries(kernel).flatten() for kernel in t[1:]])
    head = float(net.classifier.weight.detach().double().square().sum())
    penalties = [
        weight_decay / (2 * batch_size) * (float(sum(w.square().sum() for w in form)) + head) for form in (t, r)
    ]
    t = torch.cat([kernel.flatten() for kernel in t])
    size = t.abs()
    edges = np.linspace(LOW, HIGH, BINS + 1)
    return Result(
        {
            "weights": t.numel(),
            "id_entries": ids.numel(),
            "mean": float(t.mean()),
            "std": float(t.std(correction=0)),
            "mass": float(size.sum()),
            "mass_large": float(size[size >= 0.25].sum()),
            "mass_id": float(ids.abs().sum()),
            "id_share": float(ids.abs().sum() / size[size >= 0.25].sum()),
            "above_07": int((size > 0.7).sum()),
            "id_mode": float(mode(ids, edges)),
            "penalty": penalties[net.residual],
            "penalty_residual": penalties[True],
        },
        {"counts": histogram(t, edges), "id_counts": histogram(ids, edges), "edges": edges},
    )


def kernels(net: nn.Module) -> list[Tensor]:
    return [layer.conv.weight.detach() for layer in net.layers()]


def histogram(values: Tensor, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values.numpy().clip(edges[0], edges[-1]), edges)[0]


def mode(values: Tensor, edges: np.ndarray) -> float:
    """Where the histogram, smoothed over 5 bins, is highest."""
    counts = np.convolve(histogram(values, edges), np.ones(5), "same")
    return float((edges[:-1] + edges[1:])[counts.argmax()] / 2)


def figure(results: Mapping[str, Result]) -> Any:
    """Fig. 7: above all weights, counts cut at 800; below the ID entries."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(6.4, 6.0)
    top, bottom = drawing.subplots(2, 1, sharex=True)
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        for axis, key in ((top, "counts"), (bottom, "id_counts")):
            axis.stairs(result.arrays[key], result.arrays["edges"], fill=True, alpha=0.6, color=colour, label=name)
    top.set(ylim=(0, 800), ylabel="weights")
    bottom.set(xlabel="z", ylabel="ID entries", xlim=(LOW, HIGH))
    top.legend(frameon=False, fontsize=8)
    return drawing
