"""One seam for what networks are made of: PyTorch's own operations, or kernels of ours where these are faster.

    Conv2d                                 nn.Conv2d: 3x3 convolutions of stride 1        winograd.py
    bn_act(bn, x, residual, step_size=h)   relu(residual + h BN(x)): He's, Chang's blocks  batch_norm.py
    act_bn(bn, x)                          BN(relu(x)): Plain-11

Same parameters, same state dict, same mathematics. With `enable(True)` a CPU takes winograd.cpp (2.25 times fewer
multiplications in fp32, 4 times in bf16, where its arithmetic is fp32) and, in a training step, batch_norm.cpp (two
passes over memory each way; sums in double, where PyTorch's in channels_last lose three digits). PyTorch's own are
taken in everything else: other devices, types, shapes and strides, functorch's transforms, forward-mode and second
derivatives, torch.compile, SyncBatchNorm, hooks on a BatchNorm, no compiler.

The error of a network's whole gradient against double is at most 1.2 times PyTorch's own: of NCHW in fp32, of
channels_last in bf16 (tests/test_fused.py). What each operation gains: results/benchmark/fused.md. Tried and
left out, for networks without BatchNorm: ReLU in place, in the convolution (each less than 3 % of a step), and its
mask in the convolution's gradients (4 to 7 % slower: overlapping tiles read it 2.25 times).
"""

import torch

from depthlab.fused.batch_norm import act_bn, bn_act
from depthlab.fused.cpu import enable, enabled
from depthlab.fused.winograd import Conv2d, conv_act
from depthlab.problem import Problem

__all__ = ["Conv2d", "act_bn", "bn_act", "conv_act", "enable", "enabled", "switch"]


def switch(wanted: bool | None, precision: str, accelerator: str, compiled: bool) -> bool:
    """`enable` for a run: `wanted` is trainer.fused, None where it helps; the others as in conf/trainer.

    Raises:
        Problem: it is wanted and cannot be had.
    """
    takes = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    takes = takes and precision in ("32-true", "bf16-mixed") and not compiled
    on = enable(takes and wanted is not False)
    if wanted and not on:
        reason = "needs a C++ compiler" if takes else "is for CPUs, precision=32-true or bf16-mixed, compile=false"
        raise Problem(f"trainer.fused=true {reason}; take trainer.fused=null")
    return on
