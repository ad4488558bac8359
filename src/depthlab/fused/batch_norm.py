"""BatchNorm, ReLU and residual as one operation: batch_norm.cpp, on a GPU batch_norm_triton.py; PyTorch's own where
neither takes them."""

import ctypes
import functools
import sys
from importlib import import_module
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.fused import cpu

BLOCK = 64  # as in batch_norm.cpp: elements of x that it takes at once


def bn_act(
    bn: nn.Module, x: Tensor, residual: Tensor | None = None, relu: bool = True, step_size: float = 1.0
) -> Tensor:
    """[relu](residual + step_size bn(x)), (B, C, H, W) each."""
    if cpu.enabled() and taken(bn, x, residual, False, relu):
        return fused(bn, x, residual, False, relu, step_size)
    y = bn(x)
    if residual is not None:
        y = torch.add(residual, y, alpha=step_size)
    elif step_size != 1:
        y = step_size * y
    return F.relu(y) if relu else y


def act_bn(bn: nn.Module, x: Tensor) -> Tensor:
    """bn(relu(x)), (B, C, H, W)."""
    if cpu.enabled() and taken(bn, x, None, True, False):
        return fused(bn, x, None, True, False, 1.0)
    return bn(F.relu(x))


def taken(bn: nn.Module, x: Tensor, residual: Tensor | None, before: bool, after: bool) -> bool:
    """Whether the kernel computes this call."""
    return (
        type(bn) is nn.BatchNorm2d
        and (bn.training or (x.device.type == "cpu" and bn.running_mean is not None and not torch.is_grad_enabled()))
        and x.dtype in (torch.float32, torch.bfloat16)
        and cpu.takes(x)
        and x.shape[1] == bn.num_features
        and x.numel() > x.shape[1]  # PyTorch has words for a single value per channel
        and layout(x) is not None
        and bn.weight is not None
        and cpu.floats(bn.weight, bn.bias, bn.running_mean, bn.running_var)
        and (residual is None or like(residual, x))
        and not cpu.hooked(bn)
        and (x.device.type == "cpu" or back_end(x).works(x.device, x.dtype, (before, after, residual is not None)))
    )


def layout(x: Tensor) -> tuple[int, int] | None:
    """(width, plane) as batch_norm.cpp's Matrix has them; None for what cannot be taken."""
    channels, plane = x.shape[1], x.shape[2] * x.shape[3]
    if x.device.type != "cpu":
        return (channels, 0) if x.is_contiguous(memory_format=torch.channels_last) and x.numel() < 2**31 else None
    if x.is_contiguous(memory_format=torch.channels_last) and x.numel() % lcm(channels, BLOCK) == 0:
        return lcm(channels, BLOCK), 0
    # smaller planes: PyTorch's own is as fast
    return (channels * BLOCK, plane) if x.is_contiguous() and plane % BLOCK == 0 and plane >= 256 else None


def like(residual: Tensor, x: Tensor) -> bool:
    same = type(residual) is Tensor and residual.shape == x.shape and residual.dtype == x.dtype
    return same and residual.stride() == x.stride()


def fused(
    bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, before: bool, after: bool, step_size: float
) -> Tensor:
    momentum = bn.momentum or 0.0
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # a cumulative mean
            momentum = 1 / int(bn.num_batches_tracked)
    running = (bn.running_mean, bn.running_var) if bn.track_running_stats else (None, None)
    return BatchNormAct.apply(
        x, residual, bn.weight, bn.bias, running, bn.training, momentum, bn.eps, before, after, step_size
    )


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """batch_norm.cpp; None where it cannot be built."""
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    head = [ctypes.c_int] * 4 + [number] * 4 + [ctypes.c_int]
    tail = [real, real, real, pointer, pointer, ctypes.c_int, pointer, pointer]
    return cpu.functions(
        "batch_norm",
        depthlab_forward=[*head, *[pointer] * 4, *tail],
        depthlab_backward=[*head, *[pointer] * 5, real, *[pointer] * 5],
    )


Kind = tuple[bool, bool, bool]  # a ReLU before, one after, something added
Running = tuple[Tensor, Tensor] | tuple[None, None]  # mean and variance


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    training: bool,
    momentum: float,
    eps: float,
    kind: Kind,
    h: float,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics that `backward` needs."""
    y, stats = torch.empty_like(x), torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    inputs, outputs = cpu.pointers(x, residual, weight, bias), cpu.pointers(*running, y, stats)
    kernel().depthlab_forward(*head(x, kind), *inputs, h, eps, momentum, *outputs[:2], training, *outputs[2:])
    return y, stats


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor, kind: Kind, h: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias."""
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    passed = dy if y is None else torch.empty_like(x)
    inputs, outputs = cpu.pointers(dy, x, y, weight, bias), cpu.pointers(stats, dx, passed, dweight, dbias)
    kernel().depthlab_backward(*head(x, kind), *inputs, h, *outputs)
    return dx, passed, dweight, dbias


def head(x: Tensor, kind: Kind) -> tuple[int, ...]:
    """The first arguments of both functions of batch_norm.cpp."""
    width, plane = layout(x)
    return (x.dtype == torch.bfloat16, *kind, x.numel(), width, x.shape[1], plane, torch.get_num_threads())


def back_end(x: Tensor) -> Any:
    """The module whose `forward` and `backward` take x."""
    return sys.modules[__name__] if x.device.type == "cpu" else import_module("depthlab.fused.batch_norm_triton")


class BatchNormAct(torch.autograd.Function):
    """[relu](residual + h BN([relu](x)))"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, running: Running, *options: Any
    ) -> Tensor:
        training, momentum, eps, before, after, h = options
        kind = (before, after, residual is not None)
        y, stats = back_end(x).forward(x, residual, weight, bias, running, training, momentum, eps, kind, h)
        if training and running[0] is not None:
            torch.autograd.graph.increment_version(running)
        ctx.kind, ctx.h, ctx.eps = kind, h, eps
        ctx.save_for_backward(x, weight, bias, stats, y if after and residual is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: PyTorch's operations, which can be differentiated once more
            return (*differentiable(ctx, dy, x, weight, bias, y), *[None] * 7)
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        dx, passed, dweight, dbias = back_end(x).backward(dy, x, y, weight, bias, stats, ctx.kind, ctx.h)
        return dx, passed if ctx.kind[2] else None, dweight, dbias, *[None] * 7


def differentiable(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None) -> tuple:
    """The gradients of x, residual, weight and bias, with a graph of their own."""
    before, after, add = ctx.kind
    z = F.batch_norm(F.relu(x) if before else x, None, None, weight, bias, training=True, eps=ctx.eps)
    if y is not None:
        dy = dy * (y > 0)
    elif after:
        z = F.relu(z)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    gradients = iter(torch.autograd.grad(z, inputs, ctx.h * dy, create_graph=True))
    dx, dweight, dbias = (next(gradients) if t.requires_grad else None for t in (x, weight, bias))
    return dx, dy if add else None, dweight, dbias
