"""`python -m depthlab.fused`: each operation, PyTorch's own and the kernel in turn, on one thread.

CPU time of the thread, the least of 12 calls of each: what the code needs on a machine that others may share.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from depthlab import fused, records

# where it stands in a network at batch 100, shape, function of (bn, x, residual)
CASES: list[tuple[str, tuple[int, ...], Callable[..., Tensor]]] = [
    ("resnet, stage 1, relu(bn)", (100, 16, 32, 32), lambda bn, x, r: fused.bn_act(bn, x)),
    ("resnet, stage 1, relu(r + bn)", (100, 16, 32, 32), fused.bn_act),
    ("resnet, stage 2, relu(r + bn)", (100, 32, 16, 16), fused.bn_act),
    ("resnet, stage 3, relu(r + bn)", (100, 64, 8, 8), fused.bn_act),
    ("plain11, block 1, bn(relu)", (100, 64, 32, 32), lambda bn, x, r: fused.act_bn(bn, x)),
    ("plain11, block 2, bn(relu)", (100, 128, 16, 16), lambda bn, x, r: fused.act_bn(bn, x)),
    ("plain11, block 3, bn(relu)", (100, 256, 8, 8), lambda bn, x, r: fused.act_bn(bn, x)),
]
KINDS = [
    ("bf16, channels_last", torch.bfloat16, torch.channels_last),
    ("fp32, channels_last", torch.float32, torch.channels_last),
    ("fp32, planes", torch.float32, torch.contiguous_format),
]


def least(run: Callable, shape: tuple[int, ...], dtype: torch.dtype, strides: torch.memory_format) -> list[float]:
    """Milliseconds: forward of PyTorch's and of the kernel, backward of both."""
    bn = nn.BatchNorm2d(shape[1])
    x, r, dy = (torch.randn(shape).to(dtype).to(memory_format=strides).requires_grad_() for _ in range(3))
    times: list[list[float]] = [[], [], [], []]
    for _ in range(12):
        for on in (False, True):
            fused.enable(on)
            began = time.thread_time()
            y = run(bn, x, r)
            between = time.thread_time()
            torch.autograd.grad(y, [x, r, bn.weight, bn.bias], dy.detach(), allow_unused=True)
            times[on].append(1000 * (between - began))
            times[2 + on].append(1000 * (time.thread_time() - between))
    return [min(values) for values in times]


def main() -> None:
    torch.set_num_threads(1)
    if not fused.enable(True):
        return
    print(f"`python -m depthlab.fused`: {records.hardware()}, torch {torch.__version__}, ms on one thread\n")
    print("| operation | (B, C, H, W) | type | forward | kernel | backward | kernel | x |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape, run in CASES:
        for kind, dtype, strides in KINDS:
            a, b, c, d = least(run, shape, dtype, strides)
            print(f"| {name} | {shape} | {kind} | {a:.2f} | {b:.2f} | {c:.2f} | {d:.2f} | {(a + c) / (b + d):.2f} |")


if __name__ == "__main__":
    main()
