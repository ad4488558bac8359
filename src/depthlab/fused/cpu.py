"""batch_norm.cpp: compiled on first use where there is a compiler, and called.

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
from pathlib import Path

SOURCE = Path(__file__).with_name("batch_norm.cpp")
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


def build(source: Path = SOURCE) -> Path:
    """The path of the library that `source` makes, compiled unless it is there.

    Raises:
        Missing: no compiler, no place to write, or the compiler's own words.
    """
    command = [compiler(), *FLAGS]
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout
        said = "\n".join([*command, version, processor(), source.read_text(encoding="utf-8")])
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


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The library, loaded; None where it cannot be had, which is said once per process."""
    try:
        library = ctypes.CDLL(str(build()))
    except (Missing, OSError) as error:
        warnings.warn(f"fused operations: {error}; PyTorch's own are used, which are slower", stacklevel=2)
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    head = [ctypes.c_int] * 4 + [number] * 4 + [ctypes.c_int]
    library.depthlab_forward.argtypes = [*head, *[pointer] * 4, real, real, real, *[pointer] * 4]
    library.depthlab_backward.argtypes = [*head, *[pointer] * 5, real, *[pointer] * 5]
    library.depthlab_forward.restype = library.depthlab_backward.restype = None
    return library
