"""`python -m depthlab.fused`: each operation, PyTorch's own and the kernel in turn, on one thread.

CPU time of the thread, the least of 12 calls of each: what the code needs on a machine that others may share.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from depthlab import fused, records

CL, PLANES = torch.channels_last, torch.contiguous_format
Case = tuple[str, tuple[int, ...], nn.Module, Callable[..., Tensor]]  # name, shape of x, module, f(module, x, residual)


def cases() -> list[Case]:
    """At batch 100, where they stand in a network."""

    def conv(place: str, channels: int, side: int, outputs: int | None = None, stride: int = 1) -> Case:
        module = fused.Conv2d(channels, outputs or channels, 3, stride=stride, padding=1, bias=False)
        name = f"conv3x3{'/2' * (stride == 2)}"
        return f"{place}, {name}", (100, channels, side, side), module, lambda conv, x, r: conv(x)

    def plain(place: str, channels: int, side: int) -> Case:
        module, shape = fused.Conv2d(channels, channels, 3, padding=1), (100, channels, side, side)
        return f"{place}, relu(conv3x3)", shape, module, lambda conv, x, r: fused.conv_act(conv, x)

    def norm(place: str, channels: int, side: int, name: str, run: Callable[..., Tensor]) -> Case:
        return f"{place}, {name}", (100, channels, side, side), nn.BatchNorm2d(channels), run

    residual = partial(norm, name="relu(r + bn)", run=fused.bn_act)
    after_relu = partial(norm, name="bn(relu)", run=lambda bn, x, r: fused.act_bn(bn, x))
    return [
        conv("resnet, images", 3, 32, 16),
        conv("plain11, images", 3, 32, 64),
        conv("resnet, stage 1", 16, 32),
        norm("resnet, stage 1", 16, 32, "relu(bn)", lambda bn, x, r: fused.bn_act(bn, x)),
        residual("resnet, stage 1", 16, 32),
        plain("simple_plain, stage 1", 16, 32),
        conv("resnet, into stage 2", 16, 32, 32, stride=2),
        conv("resnet, stage 2", 32, 16),
        residual("resnet, stage 2", 32, 16),
        conv("resnet, into stage 3", 32, 16, 64, stride=2),
        conv("resnet, stage 3", 64, 8),
        residual("resnet, stage 3", 64, 8),
        conv("plain11, block 1", 64, 32),
        after_relu("plain11, block 1", 64, 32),
        conv("plain11, block 2", 128, 16),
        after_relu("plain11, block 2", 128, 16),
        conv("plain11, block 3", 256, 8),
        after_relu("plain11, block 3", 256, 8),
        conv("plain11, block 4", 256, 4, 512),
    ]


def least(case: Case, dtype: torch.dtype, strides: torch.memory_format) -> list[float]:
    """Milliseconds: forward of PyTorch's and of the kernel, backward of both."""
    _, shape, module, run = case
    module, of_images = module.to(memory_format=CL), shape[1] == 3
    x, r = (torch.randn(shape).to(dtype).to(memory_format=strides).requires_grad_() for _ in range(2))
    x = x.detach().float() if of_images else x
    wanted = [*([] if of_images else [x]), r, *module.parameters()]
    times: list[list[float]] = [[], [], [], []]
    for _ in range(12):
        for on in (False, True):
            fused.enable(on)
            began = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = run(module, x, r)
            between = time.thread_time()
            torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
            times[on].append(1000 * (between - began))
            times[2 + on].append(1000 * (time.thread_time() - between))
    return [min(values) for values in times]


def main() -> None:
    torch.set_num_threads(1)
    if not fused.enable(True):
        return
    print(f"`python -m depthlab.fused`: {records.hardware()}, torch {torch.__version__}, ms on one thread.")
    print("PyTorch's own in fp32 are in its faster memory format, the kernel in channels_last.\n")
    print("| operation | (B, C, H, W) | type | forward | kernel | backward | kernel | x |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases():
        for dtype in (torch.bfloat16, torch.float32):
            a, b, c, d = least(case, dtype, CL)
            if dtype == torch.float32:
                planes = least(case, dtype, PLANES)
                a, c = min((a, c), (planes[0], planes[2]), key=sum)
            kind = "bf16" if dtype == torch.bfloat16 else "fp32"
            print(
                f"| {case[0]} | {case[1]} | {kind} | {a:.2f} | {b:.2f} | {c:.2f} | {d:.2f} | {(a + c) / (b + d):.2f} |"
            )


if __name__ == "__main__":
    main()
