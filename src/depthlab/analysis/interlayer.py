"""Per-sample interlayer cushion of a block (Yu & Tomasi 2019, section 5; Arora et al. 2018).

mu(x)    = sqrt(n) |J x| / (|J|_F |x|), x the block's input (n numbers) for one image, J the block's Jacobian there,
           last ReLU included; J = c I gives 1, and a random J about 1
J x      one Jacobian-vector product, by two reverse passes
|J|_F^2  exact: the squared norms of J^T e_u, one vector-Jacobian product for each output entry u; or Hutchinson's
         estimate, the mean of |J^T v|^2 over `probes` random sign vectors v (64: .2 to .5 % off)
BatchNorm
  running  the running statistics: every image by itself
  batch    the statistics of each image by itself, a function of it, as of a batch of one in training mode. Then
           BN(conv(c x)) = BN(conv(x)), the plain block does not feel the scale of x and J x = 0 up to eps / variance,
           whatever the weights: this gives the paper's 2.7e-7 for the plain block. A residual block's J x is its
           identity's alone. Only `running` compares networks.
  the same in the layers before, so that x is what reaches the block.
In double precision where the device has it: J x in `batch` is a difference of equal numbers.
Cost     block 5 of depth 20 (n = 8192): Hutchinson, 256 images, both ways, 12 s of a core; exact, 8192 backward passes
         of the block, 3 s per image and way: take few. Memory: a few activations of the block for a batch.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, like
from depthlab.analysis.inside import blocks_of, check_one_of, input_of, normalising, progress
from depthlab.data.batches import generator
from depthlab.problem import Problem

MODES = {"running": "running", "batch": "image"}  # our names and what `normalising` calls them


def interlayer(
    net: nn.Module,
    batches: Images,
    block: int = 5,
    bn_mode: str = "both",
    norm: str = "hutchinson",
    probes: int = 64,
    seed: int = 0,
) -> Result:
    """Arrays `running` and `batch`: the cushions of all images, as far as `bn_mode` asks for them.

    Args:
        block: which, counted from 1 (Yu & Tomasi: the 5th of 9).
        bn_mode: "running", "batch" or "both"; without BatchNorm they are the same.
        norm: "hutchinson" or "exact".
        probes: random vectors of Hutchinson's estimate, of this `seed`.

    Raises:
        Problem: a network of another kind, or an argument out of its range.
    """
    check(net, block, bn_mode, norm, probes)
    blocks = blocks_of(net)
    modes = list(MODES) if bn_mode == "both" else [bn_mode]
    module = copy.deepcopy(blocks[block - 1]).eval().requires_grad_(False)
    if next(module.parameters()).device.type != "mps":
        module.double()
    found: dict[str, list[Tensor]] = {mode: [] for mode in modes}
    for x, _ in batches:
        for mode in modes:
            random = generator(seed, f"interlayer/{len(found[mode])}")
            with evaluating(net), normalising(net, MODES[mode]):
                inside = like(module, input_of(net, blocks[block - 1], like(net, x)))
            with normalising(module, MODES[mode]), torch.enable_grad():
                found[mode].append(cushions(module, inside, None if norm == "exact" else probes, random).cpu())
    arrays = {mode: torch.cat(values).double().numpy() for mode, values in found.items()}
    scalars: dict[str, float | int | None] = {"images": len(arrays[modes[0]]), "block": block}
    for mode, mu in arrays.items():
        scalars |= {f"{mode}_mean": float(np.nanmean(mu)), f"{mode}_std": float(np.nanstd(mu))}
    return Result(scalars, arrays)


def check(net: nn.Module, block: int, bn_mode: str, norm: str, probes: int) -> None:
    """Raises:
    Problem: see `interlayer`.
    """
    check_one_of("bn_mode", bn_mode, ("both", *MODES))
    check_one_of("norm", norm, ("hutchinson", "exact"))
    if not 1 <= block <= (n := len(blocks_of(net))):
        raise Problem(f"analysis.block must lie in 1..{n}, the blocks of this network, got {block}")
    if probes < 1:
        raise Problem(f"analysis.probes must be >= 1, got {probes}")


def cushions(f: Callable[[Tensor], Tensor], x: Tensor, probes: int | None, random: torch.Generator) -> Tensor:
    """mu(x) of every image, (B,), for f: (B, ...) -> (B, ...) that takes images one by one; NaN for x = 0 and J = 0.

    Args:
        probes: of Hutchinson's estimate; None for the exact norm.
        random: on the CPU, so that any device has the same probes.
    """
    x = x.detach().requires_grad_()
    y = f(x)
    v = torch.zeros_like(y, requires_grad=True)
    (jt,) = torch.autograd.grad(y, x, v, create_graph=True)  # J^T v is linear in v, and its derivative towards x is J x
    (jx,) = torch.autograd.grad(jt, v, x, retain_graph=True)
    squares = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    if probes is None:
        units = torch.zeros_like(y).flatten(1)
        for u in progress(range(units.shape[1]), "Jacobian's norm"):
            units[:, u] = 1
            squares += torch.autograd.grad(y, x, units.view_as(y), retain_graph=True)[0].flatten(1).square().sum(1)
            units[:, u] = 0
    else:
        for _ in progress(range(probes), "Jacobian's norm"):
            signs = torch.randint(2, y.shape, generator=random).to(y).mul_(2).sub_(1)
            squares += torch.autograd.grad(y, x, signs, retain_graph=True)[0].flatten(1).square().sum(1) / probes
    x = x.detach()
    sizes = x.flatten(1).norm(dim=1) * squares.sqrt()
    return math.sqrt(x[0].numel()) * jx.flatten(1).norm(dim=1) / sizes


def figure(results: Mapping[str, Result]) -> Any:
    """Histograms, the two ways of BatchNorm beside each other."""
    from depthlab.analysis.drawing import COLOURS, canvas

    modes = [mode for mode in MODES if all(mode in result.arrays for result in results.values())]
    drawing = canvas(4.8 * len(modes), 3.8)
    for axis, mode in zip(drawing.subplots(1, len(modes), squeeze=False)[0], modes):
        values = {name: result.arrays[mode][result.arrays[mode] > 0] for name, result in results.items()}
        low, high = (f([f(v) for v in values.values() if len(v)], default=1.0) for f in (min, max))
        wide = high > 30 * low
        bins = np.logspace(np.log10(low) - 0.1, np.log10(high) + 0.1, 80) if wide else 40
        for (name, v), colour in zip(values.items(), COLOURS * len(values)):
            axis.hist(v, bins, color=colour, alpha=0.6, label=f"{name}: {v.mean():.3g} ± {v.std():.2g}")
        axis.set(xscale="log" if wide else "linear", xlabel=r"$\mu(x)$", ylabel="images")
        axis.set_title(f"BatchNorm by {mode} statistics", fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    return drawing
