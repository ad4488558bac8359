"""2x2 average pooling on a CPU, its gradient one copy: PyTorch's of bf16 in channels_last takes three times as long."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthlab.fused import cpu


def avg_pool(x: Tensor) -> Tensor:
    """F.avg_pool2d(x, 2), the same bits: (B, C, H, W) -> (B, C, floor(H / 2), floor(W / 2))."""
    even = x.shape[-1] % 2 == x.shape[-2] % 2 == 0
    if x.device.type == "cpu" and even and cpu.takes(x) and x.is_contiguous(memory_format=torch.channels_last):
        return AvgPool.apply(x)
    return F.avg_pool2d(x, 2)


class AvgPool(torch.autograd.Function):
    """F.avg_pool2d(x, 2) of even sides; its gradient can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        B, C, H, W = dy.shape
        quarter = (dy / 4).permute(0, 2, 3, 1)[:, :, None, :, None]
        return quarter.expand(B, H, 2, W, 2, C).contiguous().view(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
