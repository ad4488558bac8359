"""Convolution, BatchNorm, shortcut, ReLU; in evaluation without gradients one kernel, BatchNorm folded into weights:

    BN(w * x + b) = (s w) * x + (b - mean) s + beta,   s = gamma / sqrt(var + eps)

In training, and where winograd.cpp does not take the convolution, the convolution and then `bn_act`.
"""

import torch
from torch import Tensor, nn

from depthlab.fused import cpu
from depthlab.fused.batch_norm import bn_act, like
from depthlab.fused.winograd import Conv2d, convolve, output, taken_as


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    step_size: float = 1.0,
) -> Tensor:
    """[relu]([residual +] step_size bn(conv(x))), (B, C, H, W) -> (B, K, P, Q)."""
    if not torch.is_grad_enabled() and cpu.enabled() and foldable(conv, bn) and conv.taken(x):
        x = taken_as(x, conv.weight)
        y = output(x, conv.weight, conv.stride[0])
        if residual is None or like(residual, y):
            w, b = folded(conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
            return convolve(x, w * step_size, b * step_size, y, relu, training=False, residual=residual)
    return bn_act(bn, conv(x), residual, relu, step_size)


def folded(
    w: Tensor,
    b: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight (K, ...) and bias (K,) with BatchNorm in them."""
    s = (var.clamp_min(0) + eps).rsqrt()  # a point between two runs may have var < 0
    s = s if gamma is None else s * gamma
    b = (-mean if b is None else b - mean) * s
    return w * s.view(-1, *[1] * (w.ndim - 1)), b if beta is None else b + beta


def foldable(conv: nn.Module, bn: nn.Module) -> bool:
    return (
        type(conv) is Conv2d
        and type(bn) is nn.BatchNorm2d
        and not bn.training
        and bn.running_mean is not None
        and bn.weight is not None
        and cpu.floats(bn.weight, bn.bias, bn.running_mean, bn.running_var)
        and not cpu.hooked(conv)
        and not cpu.hooked(bn)
    )
