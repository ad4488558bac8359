"""Dominant gradient flow sigma(l) (Yu & Tomasi 2019, D.2, D.4.2; Eqs. 5 and 13; Figs. 9b and 12).

Theta_ijp = da_j(L)/da_ip(l) dLoss/da_j(L)    what flows from pooled channel j to entry p of channel i of layer l
r_i       = mean_p |Theta_iip| / |sum_{j != i} Theta_ijp|,  sigma = fraction of channels with r_i > 1, mean over images
a(L)      the pooled channels [the text uses it for the last convolution's output, too]; 0/0 counts 0, x/0 infinity

sum_j Theta_ij is the gradient itself, G_i, so only the diagonal of Theta is needed: for each channel j one backward
pass from the sum of a_j(L) over the images, down to the first layer that has a channel j: 64 through the last group, 32
through the middle one, 16 through the first. Theta (64 x C x H W per image and layer) is never formed.

r_i is a mean of ratios that have no finite mean, so that sigma grows with the number P of entries. Beside it:
  sigma_sums     r_i = sum_p |Theta_iip| / sum_p |G_ip - Theta_iip|
  sigma_entries  fraction of the entries whose own ratio is > 1
l = 1..L-1; the last is trivially 1, because pooling is per channel (the paper's range ends at L-2).
Cost      some 29 forward passes' arithmetic per image: 128 images at depth 20, 32, 44 about 3, 4, 6 s of a core;
          memory: one forward pass with its graph, and the gradients of all activations, for a batch.
BatchNorm makes images depend on each other; its statistics are constants here: the batch's, or the running ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, like
from depthlab.analysis.inside import activations, blocks_of, check_one_of, has_seen_no_batch, normalising, progress
from depthlab.architectures import ResNet
from depthlab.problem import Problem

KINDS = ("sigma", "sigma_sums", "sigma_entries")


def flow(net: nn.Module, batches: Images, bn_mode: str = "auto") -> Result:
    """Arrays over the layers 1..L-1: `sigma`, `sigma_sums`, `sigma_entries`, and `layer`, their numbers. Scalars: the
    same of the first and the last two layers that are not trivial, as `sigma_1`, `sigma_17`, `sigma_18`.

    Args:
        bn_mode: "running", "batch", or "auto": batch for a network whose running statistics are still at their start.

    Raises:
        Problem: a network of another kind, or one whose shortcuts move channels.
    """
    check_one_of("bn_mode", bn_mode, ("auto", "running", "batch"))
    check(net)
    mode = ("batch" if has_seen_no_batch(net) else "running") if bn_mode == "auto" else bn_mode
    total, n = 0.0, 0
    with evaluating(net), normalising(net, mode), torch.enable_grad():
        for x, y in batches:
            x = like(net, x)
            with activations(net, cut=True) as seen:
                loss = F.cross_entropy(net.forward(x), y.to(x.device), reduction="sum")
            *a, pooled = seen
            total = total + diagonal(loss, a, pooled).numpy()
            n += len(x)
    found = dict(zip(KINDS, total / n, strict=True))
    layers = np.arange(1, len(found["sigma"]) + 1)
    shown = sorted({1, max(1, layers[-1] - 2), layers[-1] - 1})  # Yu & Tomasi quote 1, 17 and 18 at depth 20
    scalars = {f"{kind}_{layer}": float(found[kind][layer - 1]) for kind in KINDS for layer in shown}
    return Result({"images": n, "layers": len(layers) + 1, **scalars}, {**found, "layer": layers})


def diagonal(loss: Tensor, a: list[Tensor], pooled: Tensor) -> Tensor:
    """(3, L-1): the three kinds of sigma, summed over images, for a loss that is a sum over images."""
    v, *g = torch.autograd.grad(loss, [pooled, *a], retain_graph=True)
    counts = torch.zeros(3, len(a), dtype=torch.long, device=v.device)
    last = pooled.shape[1] - 1
    for j in progress(range(last + 1), "dominant flow"):
        first = next(k for k, activation in enumerate(a) if activation.shape[1] > j)
        own = torch.autograd.grad(pooled[:, j].sum(), a[first:], retain_graph=j < last)
        for k, d in enumerate(own, first):
            theta = (v[:, j, None, None] * d[:, j]).abs()  # (B, H, W)
            rest = (g[k][:, j] - v[:, j, None, None] * d[:, j]).abs()
            ratio = torch.where(theta > 0, theta / rest, 0)
            counts[0, k] += (ratio.mean((1, 2)) > 1).sum()
            counts[1, k] += (theta.sum((1, 2)) > rest.sum((1, 2))).sum()
            counts[2, k] += (ratio > 1).sum()
    entries = torch.tensor([activation[0].numel() for activation in a])
    channels = torch.tensor([activation.shape[1] for activation in a])
    return counts.cpu().double() / torch.stack([channels, channels, entries])


def check(net: nn.Module) -> None:
    """Raises:
    Problem: a network of another kind, or one whose shortcuts move channels.
    """
    for block in blocks_of(net):
        kept = block.shortcut is None or isinstance(block.shortcut, nn.Identity)
        if isinstance(net, ResNet) and not kept and getattr(block.shortcut, "symmetric", True):
            raise Problem("analysis=flow needs channels that stay where they are: arch.shortcut=subsample or none")


def figure(results: Mapping[str, Result]) -> Any:
    """Fig. 12: sigma by layer; the robust variants beside it."""
    from depthlab.analysis.drawing import COLOURS, canvas

    titles = ("mean of ratios (Eq. 13)", "ratio of sums", "fraction of entries")
    drawing = canvas(11.0, 3.8)
    axes = drawing.subplots(1, 3, sharey=True)
    for axis, kind, title in zip(axes, KINDS, titles):
        for (name, result), colour in zip(results.items(), COLOURS * len(results)):
            axis.plot(result.arrays["layer"][:-1], result.arrays[kind][:-1], "o-", ms=3, lw=1, color=colour, label=name)
        axis.set(xlabel=r"layer $\ell$", title=title, ylim=(-0.02, 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25, lw=0.6)
    axes[0].set_ylabel(r"$\sigma^{(\ell)}$")
    axes[0].legend(frameon=False, fontsize=8)
    return drawing
