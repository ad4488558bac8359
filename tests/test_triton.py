import itertools
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from depthlab import fused
from depthlab.fused import batch_norm
from depthlab.problem import Problem

triton = pytest.importorskip("triton")
CL = torch.channels_last
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported: a process of their own
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
somewhere = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU; test_interpreted runs it")


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_interpreted():
    options = [__file__, "-k", "double", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert "7 passed" in ran.stdout


def images(*shape, dtype):
    return (torch.randn(shape, device=DEVICE) + 0.5).to(dtype).to(memory_format=CL).requires_grad_()


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@somewhere
@pytest.mark.parametrize("shape", [(3, 16, 5, 7), (2, 24, 8, 8), (20, 3, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_double(shape, dtype, monkeypatch):
    kernels = import_module("depthlab.fused.batch_norm_triton")
    monkeypatch.setattr(batch_norm, "back_end", lambda x: kernels)  # of images on the CPU, too
    torch.manual_seed(0)
    for before, after, add in itertools.product((False, True), repeat=3):
        x, r = images(*shape, dtype=dtype), images(*shape, dtype=dtype) if add else None
        w, b = (torch.rand(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
        running = (torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE))
        double = [t.double() for t in running]
        y = batch_norm.BatchNormAct.apply(x, r, w, b, running, True, 0.1, 1e-5, before, after, 0.5)
        dy = images(*shape, dtype=dtype).detach()
        found = [y, *torch.autograd.grad(y, [t for t in (x, r, w, b) if t is not None], dy), *running]
        x, r, w, b = (None if t is None else t.detach().double().requires_grad_() for t in (x, r, w, b))
        z = 0.5 * F.batch_norm(F.relu(x) if before else x, *double, w, b, True, 0.1, 1e-5)
        z = z if r is None else z + r
        leaves = [t for t in (x, r, w, b) if t is not None]
        passed = dy.double() * (y > 0) if after else dy.double()  # what rounding tips over the ReLU is not counted
        expected = [F.relu(z) if after else z, *torch.autograd.grad(z, leaves, passed), *double]
        errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors[:-4]) < (1e-6 if dtype == torch.float32 else 6e-3)
        assert max(errors[-4:]) < 2e-5  # gradients of weight and bias, running statistics: small sums of large numbers


@somewhere
def test_double_check(monkeypatch):
    """A device is tried before it is trusted."""
    kernels, device = import_module("depthlab.fused.batch_norm_triton"), torch.device(DEVICE)
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), itertools.product((False, True), repeat=3)):
        assert kernels.works(device, dtype, kind)
        assert kernels.difference(device, dtype, kind) < (1e-5 if dtype == torch.float32 else 0.01)
    gradients = kernels.backward
    for factor, percent in ((1.1, "10"), (float("nan"), "nan")):
        kernels.works.cache_clear()
        monkeypatch.setattr(kernels, "backward", lambda *given, f=factor: [f * t for t in gradients(*given)])
        with pytest.warns(UserWarning, match=f"differ from PyTorch's by {percent} %"):
            assert not kernels.works(device, torch.float32, (False, True, True))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter needs no GPU")
def test_without_a_driver():
    kernels = import_module("depthlab.fused.batch_norm_triton")
    kernels.works.cache_clear()
    assert fused.enable(True, "cuda")
    with pytest.warns(UserWarning, match="no Triton on cpu: .*; PyTorch's own are used"):
        assert not kernels.works(torch.device("cpu"), torch.float32, (False, True, True))
    assert not fused.enabled()


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_compiles_for_a_gpu():
    """No GPU is needed to make its machine code: that of an H100 or H200."""
    kernels = import_module("depthlab.fused.batch_norm_triton")
    kinds = dict.fromkeys(("x", "y", "residual", "dy", "dx", "dresidual"), "*bf16")
    kinds |= dict.fromkeys(("sums", "weight", "bias", "stats", "factors", "dweight", "dbias"), "*fp32")
    kinds |= dict.fromkeys(("running_mean", "running_var"), "*fp32") | dict.fromkeys(("h", "eps", "momentum"), "fp32")
    constants = {
        "before": False,
        "after": True,
        "add": True,
        "track": True,
        "rows": 448,
        "R": 64,
        "W": 16,
        "P": 256,
        "N": 1024,
    }
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    for name in ("_statistics", "_coefficients", "_apply", "_reduce", "_factors", "_gradient"):
        kernel = getattr(kernels, name)
        signature = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in kernel.arg_names}
        values = {(i,): constants[a] for i, a in enumerate(kernel.arg_names) if a in constants}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=values)
        assert triton.compile(source, target=target).asm["cubin"]


def test_only_where_it_is_asked_for(monkeypatch):
    try:
        assert not fused.switch(None, "32-true", "cuda", False)
        assert not fused.switch(False, "bf16-mixed", "cuda", False)
        assert fused.switch(True, "32-true", "cuda", False)
        assert fused.switch(None, "bf16-mixed", "gpu", False)
        x, bn = images(2, 16, 4, 4, dtype=torch.float32).cpu(), torch.nn.BatchNorm2d(16)
        assert "BatchNormAct" not in str(fused.bn_act(bn, x).grad_fn)  # an image on the CPU stays PyTorch's
        with pytest.raises(Problem, match=r"trainer\.fused=true is for CPUs and CUDA"):
            fused.switch(True, "16-mixed", "cuda", False)
        monkeypatch.setattr("depthlab.fused.cpu.find_spec", lambda name: None)
        with pytest.raises(Problem, match=r"trainer\.fused=true needs Triton"):
            fused.switch(True, "32-true", "cuda", False)
    finally:
        fused.enable(False)
