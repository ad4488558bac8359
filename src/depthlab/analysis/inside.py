"""What several measurements of plain and residual networks share: activations, BatchNorm's statistics, progress.

Layers are counted as Yu & Tomasi do: the stem is layer 1, the last convolution L-1, the fully connected layer L. a(l),
the activation of layer l, follows its ReLU; of a block of two convolutions the first's lies inside it, the second's is
the block's output, after the sum.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.architectures import ResNet, SimpleNet
from depthlab.problem import Problem

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """A bar on a terminal, once there is something to wait for (2 seconds)."""
    from tqdm import tqdm

    return tqdm(items, what, total, delay=2, leave=False, disable=None)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network of the kind that Yu & Tomasi compare.

    Raises:
        Problem: it is of another kind.
    """
    if not isinstance(net, SimpleNet | ResNet):
        kinds = "arch=simple_plain20, simple_residual20, plain20 or resnet20"
        raise Problem(f"{type(net).__name__} has no layers of plain or residual blocks; take a run of {kinds}")
    return [block for stage in net.stages for block in stage]


@contextmanager
def activations(net: nn.Module, cut: bool = False) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills: a(1), ..., a(L-1) (B, C, H, W), and the pooled features (B, C).

    Args:
        cut: start the graph at a(1), which then is a leaf that requires a gradient.
    """
    seen: list[Tensor] = []

    def first(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].detach().requires_grad_() if cut else args[0]
        seen.append(x)
        return (x,)

    blocks = blocks_of(net)
    handles = [blocks[0].register_forward_pre_hook(first)]
    for block in blocks:
        if isinstance(net, ResNet):
            handles.append(block.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        handles.append(block.register_forward_hook(lambda _, args, out: seen.append(out)))
    handles.append(net.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def input_of(net: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """What reaches `module` of images x."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        net.forward(x)  # not net(x): a compiled network would be compiled anew
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def normalising(net: nn.Module, mode: str) -> Iterator[None]:
    """BatchNorm in evaluation mode by other statistics than the running ones, which stay as they are.

    Args:
        mode: "running"; "batch": those of the batch at hand, as constants (no gradient flows through them);
            "image": those of each image by itself, a function of it, as of a batch of one in training mode;
            "training": the batch's with gradients through them.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by: Callable[..., Tensor] | None = {"batch": by_batch, "image": by_image, "training": by_training}.get(mode)
    try:
        for bn in norms if by else ():
            bn.forward = partial(by, bn)  # hides the class's method until it is deleted
        yield
    finally:
        for bn in norms:
            vars(bn).pop("forward", None)


def by_batch(bn: nn.Module, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3), correction=0)
    return F.batch_norm(x, mean, var, bn.weight, bn.bias, training=False, eps=bn.eps)


def by_training(bn: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)


def by_image(bn: nn.Module, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + bn.eps) * bn.weight[:, None, None] + bn.bias[:, None, None]


def doubled(net: nn.Module) -> nn.Module:
    """A copy in double precision, on the CPU."""
    return copy.deepcopy(net).cpu().double()


def has_seen_no_batch(net: nn.Module) -> bool:
    """Whether running statistics are still at their start."""
    counts = [m.num_batches_tracked for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return bool(counts) and not any(int(count) for count in counts)


def check_one_of(key: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises:
    Problem: `value` is none of `allowed`.
    """
    if value not in (allowed := list(allowed)):
        raise Problem(f"analysis.{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
