"""winograd.cpp: 3x3 convolutions on a CPU; of stride 1 with 2.25 or 4 times fewer multiplications (Lavin & Gray 2016).

In fp32 F(2x2, 3x3). In bf16 F(4x4, 3x3): what comes in and goes out is bf16; the forward pass multiplies integers of
16 bits, scaled by the range of each image and the size of each kernel, and the gradients multiply bf16, where the
processor can, fp32 elsewhere; sums are fp32. At stride 2 it multiplies what PyTorch does. Images of 3 channels go to
stem.cpp. The error of a network's whole gradient against double is at most 1.2 times that of PyTorch's own, in the
median over seeds (tests/test_fused.py); a single wide layer's in fp32 up to 1.6 times that of NCHW. Where an input is
infinite its tile is NaN, in bf16 its image not finite. Gradients of weights are summed thread by thread: their last
bits depend on the number of threads.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.fused import cpu, stem

CL = torch.channels_last
TILE = {torch.float32: 2, torch.bfloat16: 4}  # side of the output tiles of a training step at stride 1


class Layer(ctypes.Structure):
    """struct Layer of winograd.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "other", "y", "w", "bias")]
    _fields_ += [
        (name, ctypes.c_int64) for name in ("H", "W", "P", "Q", "C", "K", "m", "half", "pairs", "turned", "relu")
    ]
    _fields_ += [("shared", ctypes.c_int64 * 3), ("strides", ctypes.c_int64 * 4)]


class Weight(ctypes.Structure):
    """struct Weight of winograd.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dy", "dw", "db")]
    _fields_ += [(name, ctypes.c_int64) for name in ("N", "H", "W", "P", "Q", "C", "K", "m", "half")]
    _fields_ += [("strides", ctypes.c_int64 * 4)]


@cache
def library() -> ctypes.CDLL | None:
    """winograd.cpp; None where it cannot be built."""
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    return cpu.functions(
        "winograd",
        depthlab_winograd=[pointer, number, number, number, flag],
        depthlab_winograd_backward=[pointer, pointer, number, *[pointer] * 3, number, flag, flag],
    )


def plain(w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution with this kernel (K, C, 3, 3) is one, of stride 1 or 2, its channels apart."""
    usual = (list(padding), list(dilation), groups) == ([1, 1], [1, 1], 1) and list(stride) in ([1, 1], [2, 2])
    return usual and w.shape[2:] == (3, 3) and w.shape[0] % 16 == 0


def fits(w: Tensor, *options: Any) -> bool:
    """Whether winograd.cpp computes it; `options` as for `plain`."""
    return w.shape[1] % 16 == 0 and plain(w, *options)


def run(layers: Sequence[Layer], count: int, batch: int) -> None:
    """`count` images through `layers`, `batch` at a time."""
    library().depthlab_winograd((Layer * len(layers))(*layers), len(layers), count, batch, torch.get_num_threads())


def output(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Room (B, K, P, Q) for what becomes of x (B, C, H, W)."""
    (B, _, H, W), K = x.shape, len(w)
    size = (B, K, -(-H // stride), -(-W // stride))
    return torch.empty(size, dtype=arithmetic(x), device="cpu", memory_format=CL)


def taken_as(x: Tensor, w: Tensor) -> Tensor:
    """x as the kernel for w takes it."""
    return x if w.shape[1] == stem.CHANNELS else x.to(arithmetic(x))


def convolve(
    x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, relu: bool, training: bool, residual: Tensor | None = None
) -> Tensor:
    """y (B, K, P, Q) = [relu]([residual +] x (B, C, H, W) * w (K, C, 3, 3) + bias), images in channels_last; unless
    `training`, as fast as it goes."""
    (B, C, H, W), (_, K, P, Q) = x.shape, y.shape
    if C == stem.CHANNELS:
        return stem.convolve(x, w, bias, y, relu, residual)
    m = 1 if (P, Q) != (H, W) else TILE[x.dtype] if training else 4
    sizes = (H, W, P, Q, C, K, m, x.dtype == torch.bfloat16, not training, False, relu)
    layer = Layer(*cpu.pointers(x, residual, y, w, bias), *sizes, (1, 1, 1), w.stride())
    run([layer], B, -(-B // torch.get_num_threads()))
    return y


def gradients(
    x: Tensor, dy: Tensor, w: Tensor, stride: int, y: Tensor | None, has_bias: bool, of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x (B, C, H, W), w (K, C, 3, 3) and bias; dy (B, K, P, Q) and x in channels_last; y where a ReLU made it."""
    if x.shape[1] == stem.CHANNELS:
        return None, *stem.gradients(x, dy, w, y, has_bias)
    dx = layer = work = dw = db = None
    (B, C), K, large, small = x.shape[:2], len(w), x.shape[2:], dy.shape[2:]
    m, half = TILE[x.dtype] if stride == 1 else 1, x.dtype == torch.bfloat16
    passed = dy if y is None else torch.empty_like(dy)
    if of_x:
        dx, (k, c, row, column) = torch.empty_like(x), w.stride()
        last = w.data_ptr() + 2 * (row + column) * w.itemsize
        sizes, turned = (*small, *large, K, C, m, half, True, True, False), (c, k, -row, -column)
        layer = ctypes.byref(Layer(*cpu.pointers(passed, None, dx), last, None, *sizes, (1, 1, 1), turned))
    if of_w:
        dw, db = torch.empty_like(w), w.new_empty(K) if has_bias else None
        sizes = (B, *large, *small, C, K, m, half)
        work = ctypes.byref(Weight(*cpu.pointers(x, passed, dw, db), *sizes, dw.stride()))
    tensors, image = cpu.pointers(dy, y, passed), dy[0].numel()
    library().depthlab_winograd_backward(layer, work, B, *tensors, image, half, torch.get_num_threads())
    return dx, dw, db


class Convolution(torch.autograd.Function):
    """[relu](x * w + bias): x (B, C, H, W) in channels_last, fp32 or bf16; w and bias fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, stride: int, relu: bool) -> Tensor:
        y = convolve(x, w, bias, output(x, w, stride), relu, training=True)
        ctx.save_for_backward(x, w, y if relu else None)
        ctx.has_bias, ctx.stride = bias is not None, stride
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, y = ctx.saved_tensors
        of_x, of_w, of_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: PyTorch's operations, which can be differentiated once more
            dy = dy if y is None else dy * (y > 0)
            one, sizes, wanted = [1, 1], [len(w)] if ctx.has_bias else None, (of_x, of_w, ctx.has_bias)
            dx, dw, db = torch.ops.aten.convolution_backward(
                dy.float(), x.float(), w, sizes, [ctx.stride] * 2, one, one, False, [0, 0], 1, wanted
            )
            return dx if dx is None else dx.to(x.dtype), dw, db, None, None
        dy = dy.contiguous(memory_format=CL)
        return *gradients(x, dy, w, ctx.stride, y, ctx.has_bias, of_x, of_w or of_bias), None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, which takes winograd.cpp where that is switched on and fits; same parameters, same state dict."""

    def forward(self, x: Tensor) -> Tensor:
        if cpu.enabled() and self.taken(x):
            return self.fused(x, False)
        return self._conv_forward(x, self.weight, self.bias)

    def fused(self, x: Tensor, relu: bool) -> Tensor:
        x, w, bias, stride = taken_as(x, self.weight), self.weight, self.bias, self.stride[0]
        if torch.is_grad_enabled():
            return Convolution.apply(x, w, bias, stride, relu)
        return convolve(x, w, bias, output(x, w, stride), relu, training=False)

    def taken(self, x: Tensor) -> bool:
        """Whether the kernel computes this call."""
        w, options = self.weight, (self.stride, self.padding, self.dilation, self.groups)
        return (
            (fits(w, *options) or (stem.fits(x, w, self.stride) and plain(w, *options)))
            and self.padding_mode == "zeros"
            and x.dtype in TILE
            and arithmetic(x) in TILE
            and (x.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))  # else PyTorch has words for it
            and x.device.type == "cpu"
            and cpu.takes(x)
            and cpu.floats(w, self.bias)
            and x.shape[1] == w.shape[1]
            and x.is_contiguous(memory_format=CL)
        )


def conv_act(conv: nn.Module, x: Tensor) -> Tensor:
    """relu(conv(x)), (B, C, H, W) -> (B, K, P, Q)."""
    if type(conv) is Conv2d and cpu.enabled() and not cpu.hooked(conv) and conv.taken(x):
        return conv.fused(x, True)
    return F.relu(conv(x))


def arithmetic(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
