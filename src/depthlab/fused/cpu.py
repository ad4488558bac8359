"""The kernels' common ground: compiled on first use where there is a compiler, switched on and off, what they may take.

A library per source, compiler and processor in `$DEPTHLAB_CACHE`, else `~/.cache/depthlab` (`$XDG_CACHE_HOME`). It is
made under another name and renamed: processes that build at the same time do not see one another. It has a C interface
and no header of PyTorch in it, so it takes seconds to build and fits every version.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

HERE = Path(__file__).parent
# No -ffast-math: NaN must stay NaN, and the order of sums is ours. -fopenmp finds the runtime that torch has loaded.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")


class Missing(RuntimeError):
    """Why there is no kernel, in one line."""


def compiler() -> str:
    """Path of $CXX, g++, c++ or clang++.

    Raises:
        Missing: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise Missing(f"no C++ compiler ({', '.join(names)})")


def processor() -> str:
    """What -march=native may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}))
    except OSError:
        return platform.processor() + platform.machine()


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DEPTHLAB_CACHE") or Path(base, "depthlab")).expanduser()


def build(source: Path) -> Path:
    """The path of the library that `source`, which may include what lies beside it, makes; compiled unless it is there.

    Raises:
        Missing: no compiler, no place to write, or the compiler's own words.
    """
    command = [compiler(), *FLAGS]
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout
        text = [file.read_text(encoding="utf-8") for file in (*sorted(HERE.glob("*.h")), source)]
        said = "\n".join([*command, version, processor(), *text])
        library = cache() / f"{source.stem}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
        if library.exists():
            return library
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            beside = Path(folder) / library.name
            made = subprocess.run(
                [*command, str(source), "-o", str(beside)], capture_output=True, text=True, timeout=300
            )
            if made.returncode:
                raise Missing((made.stderr.strip().splitlines() or ["the compiler failed"])[0])
            os.replace(beside, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(" ".join(str(error).split())) from error
    return library


KERNELS = ("batch_norm", "stem", "winograd")
_device: str | None = None  # where kernels are on


@functools.cache
def library(name: str) -> ctypes.CDLL | Missing:
    """`name`.cpp, built and loaded; or why it cannot be had."""
    try:
        return ctypes.CDLL(str(build(HERE / f"{name}.cpp")))
    except Missing as reason:
        return reason
    except OSError as error:
        return Missing(str(error))


def functions(name: str, **arguments: list[Any]) -> ctypes.CDLL | None:
    """`name`.cpp with the types of its functions' arguments, which return nothing; None where it cannot be had."""
    found = library(name)
    if isinstance(found, Missing):
        return None
    for function, types in arguments.items():
        getattr(found, function).argtypes, getattr(found, function).restype = types, None
    return found


@functools.cache
def complete() -> bool:
    """Whether all kernels can be had; they are built side by side. Says once what is missing."""
    with ThreadPoolExecutor() as pool:
        reasons = [found for found in pool.map(library, KERNELS) if isinstance(found, Missing)]
    if reasons:
        warnings.warn(f"fused operations: {reasons[0]}; PyTorch's own are used, which are slower", stacklevel=3)
    return not reasons


def enable(on: bool, device: str = "cpu") -> bool:
    """Switch the kernels of a device, "cpu" or "cuda", on or off for this process. Returns whether they are on: False
    without a compiler, or without Triton."""
    global _device
    found = on and (complete() if device == "cpu" else find_spec("triton") is not None)
    _device = device if found else None
    return found


def enabled() -> bool:
    return _device is not None


def takes(x: Tensor) -> bool:
    """Whether `x` is a tensor (B, C, H, W) of that device under nothing that a kernel does not know: not fake nor
    wrapped, no torch.compile, tracing, functorch's vmap, jvp and grad, dual numbers, FlopCounterMode and its like."""
    return (
        x.device.type == _device
        and x.dim() == 4
        and x.numel() > 0
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # private, for want of a public way to ask
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._ops._len_torch_dispatch_stack_pre_dispatch()  # make_fx(pre_dispatch=True)
    )


def floats(*tensors: Tensor | None) -> bool:
    """Whether parameters and statistics are what kernels read: fp32 on that device, vectors without gaps."""
    given = [t for t in tensors if t is not None]
    return all(
        t.device.type == _device and t.dtype == torch.float32 and (t.dim() > 1 or t.is_contiguous()) for t in given
    )


def hooked(module: nn.Module) -> bool:
    here = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(here) or any(
        (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks,
         everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks)
    )  # fmt: skip


def pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
