"""What batch_norm.cpp computes, in Triton for a GPU: y = relu(residual + h BN(f(x))) over the batch, and its gradient.

x (B, C, H, W) in channels_last is a matrix of B H W rows and C columns. Three kernels each way: sums over parts of the
rows (no atomics: the same bits every time), their total per channel, and one pass that applies it. Sums are of
differences from the first row, fp32 over a part, double over parts.

Not yet run on a GPU: tests/test_triton.py runs it where there is one, else in Triton's interpreter, and compiles it for
compute capability 9.0. A device must first get small images right (`works`).
"""

import functools
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from depthlab.fused import cpu
from depthlab.fused.batch_norm import Kind, Running

ROWS, COLUMNS, PARTS = 64, 16, 256  # of x at once; parts of the rows at most, as a power of two
BLOCK = 1024  # elements that are written at once


@triton.jit
def _values(x, at, inside, before: tl.constexpr):
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) if before else v


@triton.jit
def _statistics(x, sums, M, C, rows: tl.constexpr, before: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    part, c = tl.program_id(0), tl.program_id(1) * W + tl.arange(0, W)
    origin = _values(x, c, c < C, before)
    s, q = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for begin in range(0, rows, R):
        r = part * rows + begin + tl.arange(0, R)
        inside = (r < M)[:, None] & (c < C)[None, :]
        d = tl.where(inside, _values(x, r[:, None] * C + c[None, :], inside, before) - origin[None, :], 0.0)
        s += d
        q += d * d
    tl.store(sums + part * C + c, tl.sum(s, 0), mask=c < C)
    tl.store(sums + (tl.num_programs(0) + part) * C + c, tl.sum(q, 0), mask=c < C)


@triton.jit
def _totals(sums, parts, c, C, P: tl.constexpr):
    p = tl.arange(0, P)[:, None]
    inside = (p < parts) & (c < C)[None, :]
    at = p * C + c[None, :]
    s = tl.sum(tl.load(sums + at, mask=inside, other=0.0).to(tl.float64), 0)
    return s, tl.sum(tl.load(sums + parts * C + at, mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def _coefficients(
    x, sums, weight, bias, running_mean, running_var, stats, M, C, parts, h, eps, momentum,
    before: tl.constexpr, track: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """stats (4, C) fp32: scale and shift of h BN(x) = scale x + shift, mean, 1/sqrt(variance + eps)"""
    c = tl.program_id(0) * W + tl.arange(0, W)
    there = c < C
    s, q = _totals(sums, parts, c, C, P)
    mean = _values(x, c, there, before).to(tl.float64) + s / M
    variance = tl.maximum(q / M - (s / M) * (s / M), 0.0, propagate_nan=tl.PropagateNan.ALL)
    invstd = 1.0 / tl.sqrt(variance + eps)
    if track:
        m = tl.load(running_mean + c, mask=there, other=0.0).to(tl.float64)
        v = tl.load(running_var + c, mask=there, other=0.0).to(tl.float64)
        tl.store(running_mean + c, m + momentum * (mean - m), mask=there)
        tl.store(running_var + c, v + momentum * (variance * M / (M - 1) - v), mask=there)
    gain = h * tl.load(weight + c, mask=there, other=0.0).to(tl.float64) * invstd
    tl.store(stats + c, gain, mask=there)
    tl.store(stats + C + c, h * tl.load(bias + c, mask=there, other=0.0) - mean * gain, mask=there)
    tl.store(stats + 2 * C + c, mean, mask=there)
    tl.store(stats + 3 * C + c, invstd, mask=there)


@triton.jit
def _factors(sums, weight, stats, factors, dweight, dbias, M, C, parts, h, P: tl.constexpr, W: tl.constexpr):
    """factors (3, C): dx = factors[0] g + factors[1] (x - mean) + factors[2]"""
    c = tl.program_id(0) * W + tl.arange(0, W)
    there = c < C
    total, inner = _totals(sums, parts, c, C, P)
    invstd = tl.load(stats + 3 * C + c, mask=there, other=0.0).to(tl.float64)
    by_g = h * tl.load(weight + c, mask=there, other=0.0) * invstd
    tl.store(factors + c, by_g, mask=there)
    tl.store(factors + C + c, -by_g * inner * invstd * invstd / M, mask=there)
    tl.store(factors + 2 * C + c, -by_g * total / M, mask=there)
    tl.store(dweight + c, h * inner * invstd, mask=there)
    tl.store(dbias + c, h * total, mask=there)


@triton.jit
def _apply(x, residual, stats, y, n, C, before: tl.constexpr, after: tl.constexpr, add: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    inside = i < n
    z = _values(x, i, inside, before) * tl.load(stats + i % C) + tl.load(stats + C + i % C)
    if add:
        z += tl.load(residual + i, mask=inside, other=0.0).to(tl.float32)
    if after:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + i, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _passed(dy, x, y, stats, at, c, C, inside, before: tl.constexpr, after: tl.constexpr, add: tl.constexpr):
    """What the last ReLU lets through of dy, and f(x): seen in y where something was added, else in x."""
    v, g = _values(x, at, inside, before), tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if after and add:
        g = tl.where(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, g)
    elif after:
        g = tl.where(v * tl.load(stats + c) + tl.load(stats + C + c) <= 0, 0.0, g)
    return v, g


@triton.jit
def _reduce(
    dy, x, y, stats, sums, M, C,
    rows: tl.constexpr, before: tl.constexpr, after: tl.constexpr, add: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    part, c = tl.program_id(0), tl.program_id(1) * W + tl.arange(0, W)
    there = tl.minimum(c, C - 1)
    middle = tl.load(stats + 2 * C + there)
    s, q = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for begin in range(0, rows, R):
        r = part * rows + begin + tl.arange(0, R)
        inside = (r < M)[:, None] & (c < C)[None, :]
        at = r[:, None] * C + c[None, :]
        v, g = _passed(dy, x, y, stats, at, there[None, :], C, inside, before, after, add)
        s += g
        q += g * (v - middle[None, :])
    tl.store(sums + part * C + c, tl.sum(s, 0), mask=c < C)
    tl.store(sums + (tl.num_programs(0) + part) * C + c, tl.sum(q, 0), mask=c < C)


@triton.jit
def _gradient(
    dy, x, y, stats, factors, dx, dresidual, n, C,
    before: tl.constexpr, after: tl.constexpr, add: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * N + tl.arange(0, N)
    inside, c = i < n, i % C
    v, g = _passed(dy, x, y, stats, i, c, C, inside, before, after, add)
    if after and add:
        tl.store(dresidual + i, g.to(dresidual.dtype.element_ty), mask=inside)
    middle = tl.load(stats + 2 * C + c)
    out = g * tl.load(factors + c) + ((v - middle) * tl.load(factors + C + c) + tl.load(factors + 2 * C + c))
    if before:
        out = tl.where(tl.load(x + i, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, out)
    tl.store(dx + i, out.to(dx.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running: Running,
    training: bool,
    momentum: float,
    eps: float,
    kind: Kind,
    h: float,
) -> tuple[Tensor, Tensor]:
    """As of batch_norm.py, in training: y and the statistics. Images fp32 or bf16 in channels_last, the others fp32."""
    (M, C, n), y = sizes(x), torch.empty_like(x)
    stats = torch.empty(4, C, dtype=torch.float32, device=x.device)
    sums, rows, parts = partial_sums(M, x)
    _statistics[parts, columns(C)](x, sums, M, C, rows, kind[0], ROWS, COLUMNS)
    options = (h, eps, momentum, kind[0], running[0] is not None, PARTS, COLUMNS)
    _coefficients[columns(C),](x, sums, weight, bias, *running, stats, M, C, parts, *options)
    _apply[triton.cdiv(n, BLOCK),](x, residual, stats, y, n, C, *kind, BLOCK)
    return y, stats


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor, kind: Kind, h: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As of batch_norm.py: gradients of x, residual, weight and bias."""
    M, C, n = sizes(x)
    dx, dweight, dbias, factors = (torch.empty_like(t) for t in (x, weight, bias, stats))
    passed = dy if y is None else torch.empty_like(x)
    sums, rows, parts = partial_sums(M, x)
    _reduce[parts, columns(C)](dy, x, y, stats, sums, M, C, rows, *kind, ROWS, COLUMNS)
    _factors[columns(C),](sums, weight, stats, factors, dweight, dbias, M, C, parts, h, PARTS, COLUMNS)
    _gradient[triton.cdiv(n, BLOCK),](dy, x, y, stats, factors, dx, passed, n, C, *kind, BLOCK)
    return dx, passed, dweight, dbias


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, columns and elements of x."""
    return x.numel() // x.shape[1], x.shape[1], x.numel()


def columns(C: int) -> int:
    return triton.cdiv(C, COLUMNS)


def partial_sums(M: int, x: Tensor) -> tuple[Tensor, int, int]:
    """Room for (2, parts, C) sums, the rows of a part, and how many parts."""
    rows = triton.cdiv(triton.cdiv(M, PARTS), ROWS) * ROWS
    parts = triton.cdiv(M, rows)
    return torch.empty(2, parts, x.shape[1], dtype=torch.float32, device=x.device), rows, parts


@functools.cache
def works(device: torch.device, dtype: torch.dtype, kind: Kind) -> bool:
    """Whether the device computes what PyTorch's operations do, tried on small images. Says once where it does not."""
    try:
        if (found := difference(device, dtype, kind)) < 0.02:  # bf16: 0.004
            return True
        reason = f"its results differ from PyTorch's by {100 * found:.0f} %"
    except Exception as error:  # no driver, no C compiler, no place to write, a GPU too old: Triton's words for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(f"fused operations: no Triton on {device}: {reason}; PyTorch's own are used", stacklevel=4)
    cpu.enable(False)
    return False


def difference(device: torch.device, dtype: torch.dtype, kind: Kind) -> float:
    """The largest norm of an output's difference from PyTorch's in fp32, relative to the output's."""
    before, after, add = kind
    wave = torch.arange(4 * 16 * 8 * 8, dtype=torch.float32, device=device)
    images = [(f * wave).sin().view(4, 16, 8, 8).to(dtype) for f in (0.7, 1.3, 2.9)]
    x, residual, dy = (image.contiguous(memory_format=torch.channels_last) for image in images)
    w, b, mean, var = wave[:16] / 8 - 1, wave[16:32] / 32, wave[:16] / 16, wave[1:17] / 16
    running = mean.clone(), var.clone()
    y, stats = forward(x, residual if add else None, w, b, running, True, 0.1, 1e-5, kind, 0.5)
    ours = [y, *backward(dy, x, y if after and add else None, w, b, stats, kind, 0.5), *running]
    with torch.enable_grad():
        x, residual, w, b = leaves = [t.detach().float().requires_grad_() for t in (x, residual, w, b)]
        z = 0.5 * F.batch_norm(F.relu(x) if before else x, mean, var, w, b, True, 0.1, 1e-5)
        z = z + residual if add else z
        z = F.relu(z) if after else z
        gradients = torch.autograd.grad(z, leaves, dy.float(), allow_unused=True)
    pairs = [(a, b) for a, b in zip(ours, [z, *gradients, mean, var], strict=True) if b is not None]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()  # NaN where there is one
