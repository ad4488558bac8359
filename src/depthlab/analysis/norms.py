"""How large residual branches are (Chang et al. 2018, sections 3.2 and 3.3, App. C; Figs. 3, 4 and 7).

Block     Y_{j+1} = shortcut(Y_j) + G_j,  G_j = h F(Y_j),  j = 0..d-1 over all stages
||Y_j||   Frobenius norm of an image's (C, H, W), mean over images, in evaluation mode [choice: "L2-norm", "at test
          time"]; Y_j is the block's input as it comes, before its BatchNorm
gamma     mean_j ||G_j|| over all blocks: falls like 1/d if the network discretises an equation (Fig. 3)
time      t_j = j T/d; T = d h unless given, so h = 1, .5, .25 at depths n, 2n, 4n have one time axis (Fig. 7)

Stages differ in elements per image (16384, 8192, 4096 at width 16), which alone changes norms by 2: also given are root
mean squares over elements, `*_rms`. In He's networks (post-activation) the block is ReLU(shortcut(Y_j) + G_j), and
G_j is the branch before the sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, first_blocks, like, residual_stages
from depthlab.problem import Problem


def norms(net: nn.Module, batches: Images, horizon: float | None = None) -> Result:
    """Arrays over the d blocks: `input` ||Y_j||, `residual` ||G_j||, `F` ||G_j||/h, each also as `*_rms`; `relative`
    ||G_j||/||Y_j||; `time` t_j; `first`, whether the block begins a stage.

    Args:
        horizon: T; None for d h.

    Raises:
        Problem: `net` has no residual blocks.
    """
    if horizon is not None and not horizon > 0:
        raise Problem(f"analysis.horizon must be > 0, got {horizon}")
    stages = residual_stages(net)
    blocks = [block for stage in stages for block in stage]
    h = np.array([float(block.step_size) for block in blocks])
    numel = np.zeros((2, len(blocks)))
    total, n = torch.zeros(2, len(blocks), dtype=torch.float64), 0

    def see(j: int, x: Tensor, y: Tensor) -> None:
        for i, tensor in enumerate((x, y)):
            sums[i, j] = norm(tensor).sum()
            numel[i, j] = tensor[0].numel()

    with evaluating(net), watching(blocks, see):
        for x, _ in batches:
            x = like(net, x)
            sums = torch.zeros(2, len(blocks), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            net.forward(x)  # not net(x): a compiled network would be compiled anew
            total += sums.cpu()
            n += len(x)
    size, branch = (total / n).numpy()
    first = first_blocks(net)
    arrays = {"input": size, "residual": h * branch, "F": branch}
    arrays |= {f"{key}_rms": arrays[key] / np.sqrt(numel[int(key != "input")]) for key in ("input", "residual", "F")}
    arrays["relative"] = arrays["residual"] / size
    arrays["time"] = np.arange(len(blocks)) * (h.sum() if horizon is None else horizon) / len(blocks)
    arrays |= {"first": first, "step_size": h}
    return Result(
        {
            "images": n,
            "blocks": len(blocks),
            "step_size": float(h[0]),
            "gamma": float(arrays["residual"].mean()),
            "gamma_rms": float(arrays["residual_rms"].mean()),
            "relative_first_median": float(np.median(arrays["relative"][first])),
            "relative_later_median": float(np.median(arrays["relative"][~first])) if not first.all() else None,
        },
        arrays,
    )


def norm(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,), at least in single precision."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


@contextmanager
def watching(blocks: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """`see(j, Y_j, F(Y_j))` whenever block j runs, without computing anything twice."""

    def watched(j: int, residual: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = residual(x)
            see(j, x, y)
            return y

        return run

    try:
        for j, block in enumerate(blocks):
            block.residual = watched(j, block.residual)  # hides the class's method until it is deleted
        yield
    finally:
        for block in blocks:
            vars(block).pop("residual", None)


# ---- several networks


def slope(results: Sequence[Result]) -> float | None:
    """Of log gamma against log d, least squares; -1 where gamma falls like 1/d. None for fewer than 2 depths."""
    d, gamma = ([r.scalars[key] for r in results] for key in ("blocks", "gamma"))
    return float(np.polyfit(np.log(d), np.log(gamma), 1)[0]) if len(set(d)) > 1 else None


def difference(one: Result, other: Result) -> float:
    """||F1 - F2|| / ||(F1 + F2)/2|| in L2 over the time both curves cover, linear between their points."""
    curves = [(r.arrays["time"], r.arrays["F"]) for r in (one, other)]
    t = np.linspace(0, min(time[-1] for time, _ in curves), 1001)
    a, b = (np.interp(t, time, F) for time, F in curves)
    return float(np.linalg.norm(a - b) / np.linalg.norm((a + b) / 2))


def figure(results: Mapping[str, Result]) -> Any:
    """One network: ||Y_j|| and ||G_j|| by block, Fig. 4. Several: ||F|| by time, Fig. 7, and gamma by d, Fig. 3."""
    from depthlab.analysis.drawing import COLOURS, canvas, stage_lines

    if len(results) == 1:
        ((name, result),) = results.items()
        drawing = canvas(6.4, 4.0)
        axis = drawing.subplots()
        for key, label, mark in (("input", "$||Y_j||$, block input", "o"), ("residual", "$||G(Y_j)||$", "s")):
            axis.plot(result.arrays[key], marker=mark, ms=3, lw=1, label=label)
        stage_lines(axis, result.arrays["first"])
        axis.set(xlabel="residual block j", ylabel="$L^2$-norm, mean over images", title=name, ylim=(0, None))
        axis.legend(frameon=False)
        return drawing
    drawing = canvas(10.5, 4.0)
    left, right = drawing.subplots(1, 2)
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        label = f"{name}, h = {result.scalars['step_size']:g}"
        left.plot(result.arrays["time"], result.arrays["F"], marker="o", ms=3, lw=1, color=colour, label=label)
        right.plot(result.scalars["blocks"], result.scalars["gamma"], "o", color=colour)
    most = max(difference(a, b) for a, b in combinations(results.values(), 2))
    left.set(xlabel="time t", ylabel="$||F(Y_j)||$", ylim=(0, None), title=f"largest relative difference {most:.2f}")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="residual blocks d", ylabel=r"$\gamma$ = mean $||G(Y_j)||$", xlim=(0, None), ylim=(0, None))
    if (k := slope(list(results.values()))) is not None:
        d = np.linspace(*(f(r.scalars["blocks"] for r in results.values()) for f in (min, max)))
        level = np.mean([np.log(r.scalars["gamma"]) - k * np.log(r.scalars["blocks"]) for r in results.values()])
        right.plot(d, np.exp(level) * d**k, color="0.5", lw=1, ls="--", zorder=0)
        right.set_title(rf"$\gamma \propto d^{{{k:.2f}}}$")
    return drawing
