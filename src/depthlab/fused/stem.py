"""stem.cpp: the first 3x3 convolution, of images of 3 channels with stride 1, and its gradients, on a CPU.

What comes in is fp32, also in bf16, where what goes out is rounded: PyTorch's own rounds images and weights as well. It
computes what PyTorch does, but on all threads, and the ReLU, its mask and the bias's gradient within.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from depthlab.fused import cpu

CHANNELS = 3


class Stem(ctypes.Structure):
    """struct Stem of stem.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "w", "bias", "other", "y", "dw", "db", "dy")]
    _fields_ += [(name, ctypes.c_int64) for name in ("N", "H", "W", "K", "half", "relu")]
    _fields_ += [("strides", ctypes.c_int64 * 4)]


@cache
def library() -> ctypes.CDLL | None:
    """stem.cpp; None where it cannot be built."""
    arguments = [ctypes.c_void_p, ctypes.c_int]
    return cpu.functions("stem", depthlab_stem=arguments, depthlab_stem_backward=arguments)


def fits(x: Tensor, w: Tensor, stride: Any) -> bool:
    """Whether a `winograd.plain` convolution of x (B, C, H, W) is one; nobody asks for the gradient of x."""
    return w.shape[1] == CHANNELS and list(stride) == [1, 1] and x.dtype == torch.float32 and not x.requires_grad


def sizes(x: Tensor, y: Tensor, w: Tensor, relu: bool) -> tuple:
    (B, _, H, W), K = x.shape, len(w)
    return B, H, W, K, y.dtype == torch.bfloat16, relu, w.stride()


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """y (B, K, H, W) = [relu]([residual +] x (B, 3, H, W) * w (K, 3, 3, 3) + bias), images in channels_last."""
    layer = Stem(*cpu.pointers(x, w, bias, residual, y, None, None, None), *sizes(x, y, w, relu))
    library().depthlab_stem(ctypes.byref(layer), torch.get_num_threads())
    return y


def gradients(x: Tensor, dy: Tensor, w: Tensor, y: Tensor | None, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Of w (K, 3, 3, 3) and bias; dy (B, K, H, W) and x in channels_last; y where a ReLU made it."""
    dw, db = torch.empty_like(w), w.new_empty(len(w)) if has_bias else None
    layer = Stem(*cpu.pointers(x, None, None, None, y, dw, db, dy), *sizes(x, dy, dw, y is not None))
    library().depthlab_stem_backward(ctypes.byref(layer), torch.get_num_threads())
    return dw, db
