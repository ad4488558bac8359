"""One seam for what networks are made of: PyTorch's own operations, or kernels of ours where these are faster.

    Conv2d                                 nn.Conv2d: 3x3 convolutions                     winograd.py, stem.py
    conv_act(conv, x)                      relu(conv(x)): plain networks
    bn_act(bn, x, residual, step_size=h)   relu(residual + h BN(x)): He's, Chang's blocks  batch_norm.py
    act_bn(bn, x)                          BN(relu(x)): Plain-11
    conv_bn_act(conv, bn, x, ...)          bn_act(bn, conv(x), ...)                        conv_bn.py
    avg_pool(x, size=(2, 2))               F.avg_pool2d(x, size)                           pool.py

Same parameters, same state dict, same mathematics. With `enable(True)` a CPU takes winograd.cpp (at stride 1 2.25 times
fewer multiplications in fp32, 4 times in bf16) and, in training and without gradients, batch_norm.cpp (two passes over
memory each way; sums in double, where PyTorch's in channels_last lose three digits). A GPU takes batch_norm_triton.py:
in bf16 (trainer=fast), or with trainer.fused=true; once it has got small images right. PyTorch's own are taken in
everything else: other devices, types, shapes and strides, functorch's transforms, forward-mode and second derivatives,
torch.compile, SyncBatchNorm, hooks, no compiler.

The error of a network's whole gradient against double is at most 1.2 times PyTorch's own: of NCHW in fp32, of
channels_last in bf16 (tests/test_fused.py). In bf16 nearly all of it comes from the forward pass, which therefore
multiplies integers of 16 bits (bf16 has 8); the two gradients multiply pairs of bf16. Both take half as many
instructions.
What each operation gains: results/benchmark/fused.md.
"""

import torch

from depthlab.fused.batch_norm import act_bn, bn_act
from depthlab.fused.conv_bn import conv_bn_act
from depthlab.fused.cpu import enable, enabled
from depthlab.fused.pool import avg_pool
from depthlab.fused.winograd import Conv2d, conv_act
from depthlab.problem import Problem

__all__ = ["Conv2d", "act_bn", "avg_pool", "bn_act", "conv_act", "conv_bn_act", "enable", "enabled", "switch"]


def switch(wanted: bool | None, precision: str, accelerator: str, compiled: bool) -> bool:
    """`enable` for a run: `wanted` is trainer.fused, None where it helps; the others as in conf/trainer.

    Raises:
        Problem: it is wanted and cannot be had.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    here = ("cpu" if found is None else found.type) if accelerator == "auto" else accelerator
    device = "cuda" if here in ("cuda", "gpu") else here
    takes = device in ("cpu", "cuda") and precision in ("32-true", "bf16-mixed") and not compiled
    helps = device == "cpu" or precision == "bf16-mixed"
    on = enable(takes and (helps if wanted is None else wanted), device)
    if on and wanted and torch.cuda.is_available() and device == "cuda":
        on = on_a_gpu(torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    if wanted and not on:
        needed = "needs a C++ compiler" if device == "cpu" else "needs Triton, on a GPU that it works on"
        reason = needed if takes else "is for CPUs and CUDA, precision=32-true or bf16-mixed, compile=false"
        raise Problem(f"trainer.fused=true {reason}; take trainer.fused=null")
    return on


def on_a_gpu(dtype: torch.dtype) -> bool:
    """Whether the GPU gets small images right. Says why where it does not."""
    from depthlab.fused import batch_norm_triton  # not everywhere: Triton

    return batch_norm_triton.works(torch.device("cuda", torch.cuda.current_device()), dtype, (False, True, True))
