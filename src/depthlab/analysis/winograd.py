"""winograd.cpp: 3x3 convolutions on a CPU with a quarter of the multiplications, where a compiler is found."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthlab.fused import cpu

SOURCE = Path(__file__).with_name("winograd.cpp")
G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # / 24


class Winograd:
    """y = [relu](conv(x) + bias [+ other]) of float32 tensors in channels_last."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.run = library.depthlab_winograd
        self.run.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5 + [ctypes.c_int] * 2
        self.run.restype = None

    @staticmethod
    @functools.cache
    def load() -> "Winograd | None":
        """None where it cannot be compiled: oneDNN's own convolutions then are used."""
        try:
            return Winograd(ctypes.CDLL(str(cpu.build(SOURCE))))
        except (cpu.Missing, OSError):
            return None

    @staticmethod
    def takes(w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
        """Whether a convolution with this kernel (K, C, 3, 3) is one."""
        plain = (list(stride), list(padding), list(dilation), groups) == ([1, 1], [1, 1], [1, 1], 1)
        return plain and w.shape[2:] == (3, 3) and w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0

    @staticmethod
    def weight(w: Tensor) -> tuple[Tensor, int]:
        """G w G^T of a kernel (K, C, 3, 3) as (36, K/16, C, 16), in double, and K."""
        g = torch.tensor(G, dtype=torch.float64) / 24
        u = torch.einsum("ai,kcij,bj->abkc", g, w.double(), g)
        K, C = w.shape[:2]
        return u.reshape(36, K // 16, 16, C).transpose(2, 3).contiguous().float(), K

    def __call__(
        self, x: Tensor, w: tuple[Tensor, int], bias: Tensor | None, other: Tensor | None, relu: bool
    ) -> Tensor:
        """x (B, C, H, W) -> (B, K, H, W), both channels_last."""
        u, K = w
        x = x.contiguous(memory_format=torch.channels_last)
        N, C, H, W = x.shape
        y = torch.empty((N, K, H, W), memory_format=torch.channels_last)
        other = None if other is None else other.contiguous(memory_format=torch.channels_last)
        pointers = [None if v is None else v.data_ptr() for v in (x, u, bias, other, y)]
        self.run(*pointers, N, H, W, C, K, int(relu), torch.get_num_threads())
        return y
