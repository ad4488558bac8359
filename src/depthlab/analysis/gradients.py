"""What shortcuts carry of the gradient (slides after Li et al. 2018, "Residual connections stabilize gradients").

h = x + F(x)                dL/dx = dL/dh + dL/dh dF/dx: `shortcut` and `block`, the two parts, `input` their sum
h = ReLU(s(x) + h F(x))     the same with dL/dh cut to where the sum is positive, and s a projection, or zeros appended
h = F(x), no shortcut       all of it goes through the block
Norms     Frobenius norm over (C, H, W) of the gradient of an image's own loss, mean over images
BatchNorm "batch": normalises with the batch at hand and hands the gradient through its statistics, as in training; the
          running ones are neither used nor changed. "running": evaluation mode, meaningless before the first epoch.
The parts are taken where they arise, on either side of the sum; `identity_error` is how far they are from adding up.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, first_blocks, like
from depthlab.analysis.inside import check_one_of, normalising, progress
from depthlab.analysis.norms import norm
from depthlab.problem import Problem

PARTS = ("input", "shortcut", "block", "output")


def gradients(net: nn.Module, batches: Images, batch: int = 128, bn_mode: str = "batch") -> Result:
    """Arrays over the d blocks: `input` ||dL/dx||, its parts `shortcut` and `block`, `output` ||dL/dh||, `cosine` of
    the two parts (nan without a shortcut), `first`, whether the block begins a stage.

    Args:
        batch: images at once.
        bn_mode: "batch" or "running".

    Raises:
        Problem: `net` has no blocks, or an option is out of its range.
    """
    check_one_of("bn_mode", bn_mode, ("batch", "running"))
    if batch < 1:
        raise Problem(f"analysis.batch must be >= 1, got {batch}")
    blocks = blocks_of(net)
    total, error, loss, n = torch.zeros(5, len(blocks), dtype=torch.float64), 0.0, 0.0, 0
    pairs = [(like(net, x), y) for x, y in batches]
    x, y = (torch.cat(tensors) for tensors in zip(*pairs))
    pieces = list(zip(x.split(batch), y.to(x.device).split(batch)))
    with evaluating(net), torch.enable_grad(), normalising(net, "training" if bn_mode == "batch" else bn_mode):
        for x, y in progress(pieces, "gradients", len(pieces)):
            with splitting(blocks) as seen:
                each = F.cross_entropy(net.forward(x), y, reduction="sum")
                torch.autograd.grad(each, seen["start"])
            total += torch.stack([torch.stack(seen["sums"][j]) for j in range(len(blocks))], 1).cpu()
            error = max(error, float(torch.stack(seen["errors"]).max()))
            loss, n = loss + float(each.detach()), n + len(y)
    mean = (total / n).numpy()
    plain = np.array([block.shortcut is None for block in blocks])
    arrays = dict(zip(PARTS, mean)) | {"cosine": np.where(plain, np.nan, mean[4]), "first": first_blocks(net)}
    share = arrays["shortcut"] / (arrays["shortcut"] + arrays["block"])
    return Result(
        {
            "images": n,
            "blocks": len(blocks),
            "loss": loss / n,
            "input_first": float(arrays["input"][0]),
            "input_last": float(arrays["input"][-1]),
            "first_over_last": float(arrays["input"][0] / arrays["input"][-1]),
            "shortcut_share": float(np.nanmedian(share)) if np.isfinite(share).any() else None,
            "identity_error": error,
        },
        arrays,
    )


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Blocks with or without shortcuts.

    Raises:
        Problem: `net` has none.
    """
    blocks = [block for stage in getattr(net, "stages", ()) for block in stage]
    if not blocks or not all(hasattr(block, "shortcut") for block in blocks):
        raise Problem(
            f"{type(net).__name__} has no blocks; take a run of arch=resnet20, plain20, ml14 or simple_plain20"
        )
    return blocks


@contextmanager
def splitting(blocks: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """What one forward and backward pass leaves: `start`, the first block's input, to differentiate by; `sums`, per
    block the sums over images of the norms of `PARTS` and of the cosine; `errors`, relative, of the parts' sum."""
    seen: dict[str, Any] = {"start": None, "sums": {}, "errors": []}
    parts: dict[tuple[int, str], Tensor] = {}

    def through(j: int, path: str, x: Tensor) -> Tensor:
        """x itself, on a path of its own: what comes back along it is kept."""
        alias = x.view_as(x)
        alias.register_hook(partial(parts.__setitem__, (j, path)))
        return alias

    def whole(j: int, gradient: Tensor) -> None:
        """All that came back to the block's input, after both parts."""
        zero = torch.zeros_like(gradient)
        output = parts.pop((j, "output"))
        if blocks[j].shortcut is None:
            shortcut, block = zero, gradient
        else:
            shortcut, block = parts.pop((j, "shortcut")), parts.pop((j, "block"))
        norms = [norm(part) for part in (gradient, shortcut, block, output)]
        inner = (shortcut * block).flatten(1).sum(1, dtype=norms[0].dtype) / (norms[1] * norms[2]).clamp(min=1e-30)
        seen["sums"][j] = [v.sum(dtype=torch.float64) for v in (*norms, inner)]
        off = norm(shortcut + block - gradient) / norms[0].clamp(min=1e-30)
        seen["errors"].append(off.max())

    def enter(j: int, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0]
        if j == 0:
            x = seen["start"] = x.detach().requires_grad_()
        x = x.view_as(x)
        x.register_hook(partial(whole, j))
        return (x,)

    def leave(j: int, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        return through(j, "output", out)

    handles = []
    try:
        for j, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(partial(enter, j)))
            handles.append(block.register_forward_hook(partial(leave, j)))
            if block.shortcut is not None:
                residual = block.residual
                block.residual = lambda x, j=j, f=residual: f(through(j, "block", x))  # until it is deleted
                hook = lambda _, args, j=j: (through(j, "shortcut", args[0]),)  # noqa: E731
                handles.append(block.shortcut.register_forward_pre_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            vars(block).pop("residual", None)


def figure(results: Mapping[str, Result]) -> Any:
    """Of each network, by block: the whole gradient and its two parts."""
    from depthlab.analysis.drawing import COLOURS, canvas, stage_lines

    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    drawing = canvas(max(6.4, 4.2 * columns), 3.8 * rows)
    axes = drawing.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis, (name, result) in zip(axes, results.items()):
        draw(axis, result.arrays, COLOURS)
        stage_lines(axis, result.arrays["first"])
        axis.set(xlabel="block", title=name, yscale="log")
    for axis in axes[len(results) :]:
        axis.set_axis_off()
    axes[0].set_ylabel(r"gradient norm $||\partial L/\partial x||$, mean over images")
    axes[0].legend(frameon=False, fontsize=8)
    return drawing


def draw(axis: Any, arrays: Mapping[str, np.ndarray], colours: list[str], **style: Any) -> None:
    labels = (("input", "whole"), ("shortcut", "carried by the shortcut"), ("block", "through the block"))
    j = np.arange(1, len(arrays["input"]) + 1)
    for (key, label), colour, mark in zip(labels, ("#000000", colours[0], colours[1]), ".os"):
        if (arrays[key] > 0).any():
            axis.plot(j, arrays[key], marker=mark, ms=3, lw=1, color=colour, label=label, **style)
