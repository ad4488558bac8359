"""Measurements on a network, one file each: pure functions that return a `Result`.

A further one is a file here and a YAML in conf/analysis; src/analyze.py (finished runs) and callbacks.Analyse (during
training) do the rest. A function is given what its parameters name, of

    net        the network, in any mode; the function leaves it bit for bit as it was
    batches    (x (B, 3, H, W), y (B,)) as often as it iterates over them
    record     what result.json holds; finished runs only
    folder     where the run lies; not during training
    scratch    a path for what a long measurement wants to find again after it was killed; not during training
    runs       instead of net and folder: {name: (network at the start, network at the end)} of several finished runs; a
               Result for each comes back

and its other parameters are options. `figure(results)` beside it draws one or several {label: Result}.
"""

from __future__ import annotations  # torch is imported where it computes: a report reads results without it

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from depthlab.problem import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from depthlab.data.batches import Batches
    from depthlab.data.module import ImageData

GIVEN = ("net", "batches", "record", "folder", "scratch", "runs")
Images = Iterable[tuple[Any, Any]]  # of tensors, iterable more than once


@dataclass(frozen=True)
class Result:
    """`scalars` by name (None where undefined; errors in percent) and `arrays` by name."""

    scalars: Mapping[str, float | int | None]
    arrays: Mapping[str, np.ndarray]


def needs(analysis: Callable[..., Result]) -> list[str]:
    """Which of `GIVEN` an analysis asks for."""
    return [name for name in GIVEN if name in inspect.signature(analysis).parameters]


def measure(analysis: Callable[..., Result], **given: Callable[[], Any]) -> Result:
    """Call `analysis` with what it asks for; what it does not ask for is not made.

    Args:
        given: name -> function that makes it.

    Raises:
        Problem: it asks for something that is not given.
    """
    if missing := [name for name in needs(analysis) if name not in given]:
        raise Problem(f"this analysis needs the {missing[0]} of a finished run; use src/analyze.py")
    return analysis(**{name: given[name]() for name in needs(analysis)})


def residual_stages(net: nn.Module) -> list[list[nn.Module]]:
    """The residual blocks of each stage: modules with `residual(x)`, `shortcut` and `step_size`.

    Raises:
        Problem: `net` has none.
    """
    stages = [list(stage) for stage in getattr(net, "stages", ())]
    blocks = [block for stage in stages for block in stage]
    if not blocks or not all(hasattr(block, "residual") for block in blocks):
        what = "has no residual blocks"
    elif any(block.shortcut is None for block in blocks):
        what = "has no shortcuts (arch.shortcut=none): its blocks are no residual blocks"
    else:
        return stages
    raise Problem(f"{type(net).__name__} {what}; take a run of a residual network (arch=ml14, arch=resnet20)")


def first_blocks(net: nn.Module) -> np.ndarray:
    """(d,) bool: which of the blocks begin a stage."""
    return np.array([j == 0 for stage in net.stages for j in range(len(stage))])


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, the weights' own precision; afterwards every module has its mode back."""
    import torch

    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad(), torch.autocast(next(net.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def like(net: nn.Module, x: Tensor) -> Tensor:
    """`x` on the network's device and in its precision."""
    p = next(net.parameters())
    return x.to(p.device, p.dtype)


def device_of(name: str) -> torch.device:
    """A device by name; "auto" takes the best there is.

    Raises:
        Problem: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"device={name}: {str(error).splitlines()[0]}; take device=auto or cpu") from error


def choose(data: ImageData, split: str = "test", images: int | None = None, device: Any = "cpu") -> Batches:
    """Batches of `images` images chosen at random, always the same ones (test sets may be sorted by class).

    Args:
        split: "test", "train" (not augmented) or "val" (those held out of training).
        images: how many; None for all.

    Raises:
        Problem: an argument is out of its range.
    """
    import torch

    from depthlab.data.batches import Batches, generator

    if split not in ("test", "train", "val"):
        raise Problem(f"analysis.split must be test, train or val, got {split!r}")
    if split == "val" and not data.val_size:
        raise Problem("analysis.split=val: this run held out no images (data.val_size=0); take test or train")
    arrays = data.arrays
    if split == "test":
        x, y, kept = arrays.test_images, arrays.test_labels, None
    else:
        x, y, kept = arrays.train_images, arrays.train_labels, None
        if data.val_size:
            from depthlab.data.module import held_out

            kept = held_out(torch.from_numpy(y), data.val_size, data.seed)[split == "val"]
    n = len(y) if kept is None else len(kept)
    if images is not None:
        if not 1 <= images <= n:
            has = f"{split} images of {data.name}; null: all of them"
            raise Problem(f"analysis.images must lie in 1..{n} ({has}), got {images}")
        some = torch.randperm(n, generator=generator(0, "analysis"))[:images].sort().values
        kept = some if kept is None else kept[some]
    if kept is not None:
        x, y = x[kept.numpy()], y[kept.numpy()]
    # one size on every device, not `evaluated_at_once`: rounding, and what a batch's statistics enter, depend on it
    size, strides = data.eval_batch_size or 500, data.memory_format
    x, y = (torch.from_numpy(array).to(device) for array in (x, y))
    return Batches(x, y, size, mean=data.mean, std=data.std, memory_format=strides)
