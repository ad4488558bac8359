"""Average pooling on a CPU, its gradient one copy: PyTorch's of bf16 in channels_last is slower."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthlab.fused import cpu


def avg_pool(x: Tensor, size: Sequence[int] = (2, 2)) -> Tensor:
    """F.avg_pool2d(x, size), the same bits: (B, C, H, W) -> (B, C, floor(H / size[0]), floor(W / size[1]))."""
    even = x.shape[-2] % size[0] == x.shape[-1] % size[1] == 0
    if x.device.type == "cpu" and even and cpu.takes(x) and x.is_contiguous(memory_format=torch.channels_last):
        return AvgPool.apply(x, size)
    return F.avg_pool2d(x, size)


class AvgPool(torch.autograd.Function):
    """F.avg_pool2d(x, size) of sides that `size` divides; its gradient can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Sequence[int]) -> Tensor:
        ctx.size = size
        return F.avg_pool2d(x, size)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (B, C, H, W), (h, w) = dy.shape, ctx.size
        part = (dy / (h * w)).permute(0, 2, 3, 1)[:, :, None, :, None]
        return part.expand(B, H, h, W, w, C).contiguous().view(B, h * H, w * W, C).permute(0, 3, 1, 2), None
