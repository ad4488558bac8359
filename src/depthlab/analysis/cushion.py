"""Per-sample layer cushion of simplified networks (Yu & Tomasi 2019, section 5; Fig. 3; Arora et al. 2018).

mu_l(x)  = |A x| / (|A|_F |x|), x the input of layer l after the ReLU before it, A x the convolution without its bias;
           the layer's cushion is its least over x
|A|_F    of the kernels, not of the matrix they unroll to (a constant per layer, about sqrt(H W)) [choice]
Identity what a residual layer does is A = r + ID. The paper takes A with its identity above, and |r|_F, without it,
         below. This decides who has more: with |A|_F below as above, residual networks lie where plain ones do (before
         training, layer 10: paper's 3.0 against .16, same norm .18 against .16, depth 20). So both, for every network:
           own        |r|_F of a residual, |p|_F of a plain network    the paper's
           full       |r + ID|_F or |p|_F, of what acts
           reduced    |r|_F or |p - ID|_F: the paper's norm for a plain network that started at T(r0)
Cost     a forward pass; 10,000 images at depth 20, 32, 44: 13, 20, 28 s of a core, memory of one batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, like
from depthlab.analysis.inside import doubled, progress
from depthlab.analysis.norms import norm
from depthlab.equivalence import identity_kernels, plain, residual
from depthlab.problem import Problem

DENOMINATORS = ("own", "full", "reduced")


def cushion(net: nn.Module, batches: Images, layer: int = 10) -> Result:
    """Arrays: `gain` |A x| / |x| (layers 1..L-1, images), NaN where x is 0; `norm_own`, `norm_full`, `norm_reduced`
    (layers,). A cushion is the gain over one of the norms (`per_sample`).

    Args:
        layer: whose statistics the scalars are, and which the figure shows.

    Raises:
        Problem: a network of another kind, or a layer that it does not have.
    """
    check(net, layer)
    full, reduced = plain(doubled(net)), residual(doubled(net))
    layers = net.layers()
    gains: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        x = args[0]
        y = module.conv(x) - module.conv.bias[:, None, None]
        if module.shortcut is not None:
            y = module.shortcut(x) + y
        gains.append(norm(y) / norm(x))

    rows = []
    handles = [module.register_forward_hook(see) for module in layers]
    try:
        with evaluating(net):
            for x, _ in progress(batches, "layer cushion"):
                gains.clear()
                net.forward(like(net, x))
                rows.append(torch.stack(gains).cpu())
    finally:
        for handle in handles:
            handle.remove()
    arrays = {"gain": torch.cat(rows, 1).float().numpy()}
    for key, form in zip(DENOMINATORS, (reduced if net.residual else full, full, reduced), strict=True):
        arrays[f"norm_{key}"] = np.array([float(module.conv.weight.detach().norm()) for module in form.layers()])
    scalars: dict[str, float | int | None] = {"images": arrays["gain"].shape[1], "layer": layer}
    for key in DENOMINATORS:
        mu = per_sample(Result({}, arrays), layer, key)
        if not len(mu):  # nothing reaches the layer: the network is dead, or its weights are not finite
            mu = np.array([np.nan])
        scalars |= {f"{key}_mean": float(mu.mean()), f"{key}_std": float(mu.std()), f"{key}_min": float(mu.min())}
    return Result(scalars | {"residual": int(net.residual)}, arrays)


def check(net: nn.Module, layer: int) -> None:
    """Raises:
    Problem: see `cushion`.
    """
    identity_kernels(net)
    if not 1 <= layer <= (n := len(net.layers())):
        raise Problem(f"analysis.layer must lie in 1..{n}, the convolutions of this network, got {layer}")


def per_sample(result: Result, layer: int, denominator: str = "own") -> np.ndarray:
    """The cushions of a layer's images, those whose input is 0 left out."""
    mu = result.arrays["gain"][layer - 1] / result.arrays[f"norm_{denominator}"][layer - 1]
    return mu[np.isfinite(mu)]


def figure(results: Mapping[str, Result]) -> Any:
    """Fig. 3 for each denominator; below, the median of every layer."""
    from depthlab.analysis.drawing import COLOURS, canvas

    titles = {"own": "the norm of the network's own weights (the paper's)", "full": "the norm of A as it acts"}
    drawing = canvas(9.6, 6.4)
    for (top, bottom), (key, title) in zip(drawing.subplots(2, 2).T, titles.items()):
        shown = [per_sample(result, result.scalars["layer"], key) for result in results.values()]
        bins = np.histogram_bin_edges(np.concatenate(shown), 120)
        for (name, result), mu, colour in zip(results.items(), shown, COLOURS * len(results)):
            top.hist(mu, bins, color=colour, alpha=0.6, label=f"{name}, layer {result.scalars['layer']}")
            layers = range(1, len(result.arrays["gain"]) + 1)
            known = [per_sample(result, at, key) for at in layers]
            medians = [np.median(mu) if len(mu) else np.nan for mu in known]
            bottom.semilogy(layers, medians, "o-", ms=3, lw=1, color=colour)
        top.set(title=f"over {title}", xlabel=r"$\mu_\ell(x)$", ylabel="images")
        bottom.set(xlabel=r"layer $\ell$", ylabel="median cushion")
        top.legend(frameon=False, fontsize=8)
    return drawing
