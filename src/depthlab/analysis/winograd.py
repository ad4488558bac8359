"""winograd.cpp: 3x3 convolutions on a CPU with a quarter of the multiplications, where a compiler is found."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthlab.fused import cpu

SOURCE = Path(__file__).with_name("winograd.cpp")
G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # / 24
BUFFER = 256 << 10  # bytes of a layer's output that the second-level cache has room for, thrice


@dataclass
class Convolution:
    """out = [relu](conv(x) + bias [+ other]) by name."""

    x: str
    u: Tensor  # (36, K/16, C, 16)
    bias: Tensor | None
    other: str | None
    relu: bool
    out: str

    @property
    def channels(self) -> tuple[int, int]:
        """C, K."""
        return self.u.shape[2], 16 * self.u.shape[1]


class Raw(ctypes.Structure):
    """struct Layer of winograd.cpp"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "u", "bias", "other", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in ("H", "W", "C", "K", "relu")]
    _fields_ += [("shared", ctypes.c_int64 * 3)]


@functools.cache
def library() -> Any:
    """The function of winograd.cpp; None where it cannot be compiled: oneDNN's own convolutions then are used."""
    try:
        run = ctypes.CDLL(str(cpu.build(SOURCE))).depthlab_winograd
    except (cpu.Missing, OSError):
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    run.restype = None
    return run


def takes(w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution with this kernel (K, C, 3, 3) is one."""
    plain = (list(stride), list(padding), list(dilation), groups) == ([1, 1], [1, 1], [1, 1], 1)
    return plain and w.shape[2:] == (3, 3) and w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0


def transformed(w: Tensor) -> Tensor:
    """G w G^T of a kernel (K, C, 3, 3) as (36, K/16, C, 16), in double on the way."""
    g = torch.tensor(G, dtype=torch.float64) / 24
    u = torch.einsum("ai,kcij,bj->abkc", g, w.double(), g)
    K, C = w.shape[:2]
    return u.reshape(36, K // 16, 16, C).transpose(2, 3).contiguous().float()


class Chain:
    """Convolutions one after the other, a few images at a time, so that what lies between them stays in the cache.

    `chain(*inputs)` takes the tensors named by `inputs` and returns those named by `outputs`, (B, K, H, W) float32 in
    channels_last.

    Args:
        layers: in order; each takes what is given or what an earlier one made.
        wanted: names of outputs that are needed afterwards.
    """

    def __init__(self, layers: Sequence[Convolution], wanted: set[str]) -> None:
        self.layers = layers
        made = {layer.out for layer in layers}
        used = [name for layer in layers for name in (layer.x, layer.other) if name is not None]
        self.inputs = list(dict.fromkeys(name for name in used if name not in made))
        self.outputs = [layer.out for layer in layers if layer.out in wanted]
        self.slot = self.slots()

    def slots(self) -> dict[str, int]:
        """Which buffer each inner result lies in; one is used again as soon as nobody needs what it holds."""
        last = {name: i for i, layer in enumerate(self.layers) for name in (layer.x, layer.other)}
        slot: dict[str, int] = {}
        free: list[int] = []
        for i, layer in enumerate(self.layers):
            if layer.out not in self.outputs:
                slot[layer.out] = free.pop() if free else len(set(slot.values()))
            free += [slot[name] for name in {layer.x, layer.other} if name in slot and last[name] == i]
        return slot

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {n: t.contiguous(memory_format=torch.channels_last) for n, t in zip(self.inputs, tensors)}
        B, _, H, W = given[self.layers[0].x].shape
        threads, most = torch.get_num_threads(), max(layer.channels[1] for layer in self.layers)
        batch = -(-B // threads)
        if len(self.layers) > 1 and most <= 64:  # more channels: the kernels would leave the cache instead
            batch = min(batch, max(1, BUFFER // (4 * H * W * most)))
        inner = [torch.empty(threads * batch * H * W * most) for _ in set(self.slot.values())]
        for layer in self.layers:
            if layer.out in self.outputs:
                given[layer.out] = torch.empty((B, layer.channels[1], H, W), memory_format=torch.channels_last)

        def pointer(name: str | None) -> int | None:
            if name is None:
                return None
            return (given[name] if name in given else inner[self.slot[name]]).data_ptr()

        raw = (Raw * len(self.layers))()
        for r, layer in zip(raw, self.layers):
            r.x, r.other, r.y = pointer(layer.x), pointer(layer.other), pointer(layer.out)
            r.u, r.bias = layer.u.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()
            r.H, r.W, (r.C, r.K), r.relu = H, W, layer.channels, layer.relu
            r.shared[:] = [name in given for name in (layer.x, layer.other, layer.out)]
        library()(ctypes.byref(raw), len(self.layers), B, batch, threads)
        return tuple(given[name] for name in self.outputs)
