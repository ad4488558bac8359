"""Gradient of the loss with respect to the pooled channels a(L) (Yu & Tomasi 2019, D.4.1; Fig. 10).

The trivial case (trivial.py) takes it for normal with mean 0; the paper shows a bell of mean 1.44e-4 and deviation
.011, collected over 4 epochs of training. Its scale is not said: the loss is that of each image here, a mean over a
batch of B divides all by B (at the start .069 against 5e-4 at B = 128). Mean, shape (excess kurtosis; 0 if normal) and
histogram do not depend on it but for the axis.

During training at chosen steps, on images of its own: the network is the same, the images are not the step's.
Cost     a forward pass.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from depthlab.analysis import Images, Result, evaluating, like
from depthlab.analysis.inside import has_seen_no_batch, normalising
from depthlab.problem import Problem

EDGES = np.linspace(-0.5, 0.5, 401)


def gradient(net: nn.Module, batches: Images) -> Result:
    """Scalars `mean`, `std`, `kurtosis` (excess); arrays `counts` (400,) between `edges` (401,), -.5 to .5, what lies
    outside in the ends, and `moments`: count, and sums of g, g^2, g^3, g^4, which add up over measurements.

    Raises:
        Problem: a network of another kind.
    """
    if not isinstance(getattr(net, "classifier", None), nn.Linear):
        raise Problem(f"analysis=gradient needs a network with pooled channels, not {type(net).__name__}")
    counts, moments = np.zeros(len(EDGES) - 1, np.int64), np.zeros(5)
    with evaluating(net), normalising(net, "batch" if has_seen_no_batch(net) else "running"):
        for x, y in batches:
            likely = net.forward(like(net, x)).softmax(1)
            wrong = likely - F.one_hot(y.to(likely.device), likely.shape[1])  # d loss / d logits
            g = (wrong @ net.classifier.weight).double().cpu().numpy().ravel()
            counts += np.histogram(g.clip(EDGES[0], EDGES[-1]), EDGES)[0]
            moments += [(g**k).sum() for k in range(5)]
    return Result(of_moments(moments), {"counts": counts, "edges": EDGES, "moments": moments})


def of_moments(moments: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and excess kurtosis of `gradient`'s moments."""
    m1, m2, m3, m4 = moments[1:] / moments[0]
    variance = m2 - m1**2
    fourth = m4 - 4 * m3 * m1 + 6 * m2 * m1**2 - 3 * m1**4
    return {"mean": float(m1), "std": float(np.sqrt(variance)), "kurtosis": float(fourth / variance**2 - 3)}


def figure(results: Mapping[str, Result]) -> Any:
    """Fig. 10, with the normal density of the same mean and deviation."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(6.4, 4.0)
    axis = drawing.subplots()
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        edges, n = result.arrays["edges"], result.arrays["moments"][0]
        m = of_moments(result.arrays["moments"])
        label = f"{name}: mean {m['mean']:.2g}, std {m['std']:.2g}, excess kurtosis {m['kurtosis']:.2g}"
        axis.stairs(result.arrays["counts"], edges, fill=True, alpha=0.6, color=colour, label=label)
        z = (edges - m["mean"]) / m["std"]
        axis.plot(
            edges, n * np.diff(edges)[0] * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / m["std"], color=colour, lw=1
        )
    axis.set(xlabel=r"$\partial \mathcal{L} / \partial a^{(L)}$, of each image's loss", ylabel="count")
    axis.legend(frameon=False, fontsize=8)
    return drawing
