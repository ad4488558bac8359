"""Convolution, BatchNorm, shortcut, ReLU; in evaluation without gradients one kernel, BatchNorm folded into weights:

    h BN(w * x + b) = (s w) * x + s (b - mean) + h beta,   s = h gamma / sqrt(var + eps)

In training, and where winograd.cpp does not take the convolution, the convolution and then `bn_act`.
"""

import torch
from torch import Tensor, nn

from depthlab.fused import cpu
from depthlab.fused.batch_norm import bn_act, like
from depthlab.fused.winograd import Conv2d, arithmetic, convolve, output


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
        x = x.to(arithmetic(x))
        y = output(x, conv.weight, conv.stride[0])
        if residual is None or like(residual, y):
            scale = step_size * bn.weight * (bn.running_var + bn.eps).rsqrt()
            mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
            w, shift = conv.weight * scale.view(-1, 1, 1, 1), step_size * bn.bias - mean * scale
            return convolve(x, w, shift, y, relu, training=False, residual=residual)
    return bn_act(bn, conv(x), residual, relu, step_size)


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
