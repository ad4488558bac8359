"""winograd.cpp: 3x3 convolutions on a CPU with 2.25 or 4 times fewer multiplications (Lavin & Gray 2016).

In fp32 F(2x2, 3x3); in bf16 F(4x4, 3x3), where what comes in and goes out is bf16, weights and all between fp32. The
error of a network's whole gradient against double is at most 1.2 times that of PyTorch's own, in the median over seeds
(tests/test_fused.py); a single wide layer's in fp32 up to 1.6 times that of NCHW. Where an input is infinite its tile
is NaN. Gradients of weights are summed thread by thread: their last bits depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthlab.fused import cpu

CL = torch.channels_last
TILE = {torch.float32: 2, torch.bfloat16: 4}  # side of the output tiles


class Layer(ctypes.Structure):
    """struct Layer of winograd.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "other", "y", "u", "bias")]
    _fields_ += [(name, ctypes.c_int64) for name in ("H", "W", "C", "K", "relu", "m", "half")]
    _fields_ += [("shared", ctypes.c_int64 * 3)]


class Weight(ctypes.Structure):
    """struct Weight of winograd.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dy", "dw", "db")]
    _fields_ += [(name, ctypes.c_int64) for name in ("N", "H", "W", "C", "K", "m", "half")]
    _fields_ += [("strides", ctypes.c_int64 * 4)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """winograd.cpp; None where it cannot be built."""
    found = cpu.library("winograd")
    if isinstance(found, cpu.Missing):
        return None
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.depthlab_winograd_kernel.argtypes = [pointer, pointer, number, number, number, flag, pointer, flag]
    found.depthlab_winograd.argtypes = [pointer, number, number, number, flag]
    found.depthlab_winograd_backward.argtypes = [pointer, pointer, number, flag]
    for function in (found.depthlab_winograd_kernel, found.depthlab_winograd, found.depthlab_winograd_backward):
        function.restype = None
    return found


def fits(w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution with this kernel (K, C, 3, 3) is one."""
    plain = (list(stride), list(padding), list(dilation), groups) == ([1, 1], [1, 1], [1, 1], 1)
    return plain and w.shape[2:] == (3, 3) and w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0


def transformed(w: Tensor, m: int, turned: bool = False) -> Tensor:
    """U = G w G^T of a kernel (K, C, 3, 3), fp32; `turned`: of the one that takes dy to dx."""
    K, C = w.shape[:2]
    u = torch.empty((m + 2) ** 2 * K * C, dtype=torch.float32, device="cpu")
    strides = (ctypes.c_int64 * 4)(*w.stride())
    library().depthlab_winograd_kernel(w.data_ptr(), strides, C, K, m, turned, u.data_ptr(), torch.get_num_threads())
    return u


def run(layers: Sequence[Layer], count: int, batch: int) -> None:
    """`count` images through `layers`, `batch` at a time."""
    library().depthlab_winograd((Layer * len(layers))(*layers), len(layers), count, batch, torch.get_num_threads())


def described(x: Tensor, y: Tensor, u: Tensor, bias: Tensor | None) -> Layer:
    """y (B, K, H, W) = x (B, C, H, W) * u + bias, both in channels_last."""
    (_, C, H, W), K = x.shape, y.shape[1]
    pointers = cpu.pointers(x, None, y, u, bias)
    return Layer(*pointers, H, W, C, K, False, TILE[x.dtype], x.dtype == torch.bfloat16, (1, 1, 1))


def convolve(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) in channels_last * w (K, C, 3, 3) + bias."""
    B, _, H, W = x.shape
    y = torch.empty((B, len(w), H, W), dtype=x.dtype, device="cpu", memory_format=CL)
    u = transformed(w, TILE[x.dtype])
    run([described(x, y, u, bias)], B, -(-B // torch.get_num_threads()))
    return y


def gradients(
    x: Tensor, dy: Tensor, w: Tensor, has_bias: bool, of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x (B, C, H, W), w (K, C, 3, 3) and bias; dy (B, K, H, W) and x in channels_last."""
    dx = layer = work = dw = db = None
    (B, C, H, W), K, m = x.shape, len(w), TILE[x.dtype]
    if of_x:
        dx, u = torch.empty_like(x), transformed(w, m, turned=True)
        layer = ctypes.byref(described(dy, dx, u, None))
    if of_w:
        dw, db = torch.empty_like(w), w.new_empty(K) if has_bias else None
        strides, half = dw.stride(), x.dtype == torch.bfloat16
        work = ctypes.byref(Weight(*cpu.pointers(x, dy, dw, db), B, H, W, C, K, m, half, strides))
    library().depthlab_winograd_backward(layer, work, B, torch.get_num_threads())
    return dx, dw, db


class Convolution(torch.autograd.Function):
    """x (B, C, H, W) in channels_last, fp32 or bf16; w and bias fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.has_bias = bias is not None
        return convolve(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: PyTorch's operation, which can be differentiated once more
            one, sizes = [1, 1], [len(w)] if ctx.has_bias else None
            wanted = (of_x, of_w, ctx.has_bias)
            dx, dw, db = torch.ops.aten.convolution_backward(
                dy.float(), x.float(), w, sizes, one, one, one, False, [0, 0], 1, wanted
            )
            return dx if dx is None else dx.to(x.dtype), dw, db
        return gradients(x, dy.contiguous(memory_format=CL), w, ctx.has_bias, of_x, of_w or of_bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, which takes winograd.cpp where that is switched on and fits; same parameters, same state dict."""

    def forward(self, x: Tensor) -> Tensor:
        w, bias = self.weight, self.bias
        if cpu.enabled() and self.taken(x, w, bias):
            return Convolution.apply(x.to(arithmetic(x)), w, bias)
        return self._conv_forward(x, w, bias)

    def taken(self, x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernel computes this call."""
        return (
            fits(w, self.stride, self.padding, self.dilation, self.groups)
            and self.padding_mode == "zeros"
            and x.dtype in TILE
            and arithmetic(x) in TILE
            and (x.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))  # else PyTorch has words for it
            and cpu.takes(x)
            and cpu.floats(w, bias)
            and x.shape[1] == w.shape[1]
            and x.is_contiguous(memory_format=CL)
        )


def arithmetic(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
