"""What a run's process is given and how it ends: command line, environment, its share of the machine."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

BUSY = 75  # exit code of a job that another process is working on
# What a parent (DDP, torchrun, Slurm's job step) leaves in the environment and a fresh job must not inherit.
FOREIGN = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(overrides: Sequence[str]) -> list[str]:
    return [sys.executable, os.path.abspath(sys.argv[0]), *overrides, "hydra.mode=RUN"]


def clean_environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in FOREIGN} | more


def run_job(overrides: Sequence[str]) -> int:
    """One job in a process of its own, for launchers that are not ours (submitit, joblib, basic)."""
    return subprocess.run(command(overrides), env=clean_environment(), check=False).returncode


def die_with_parent() -> None:
    """In the child, before it becomes the job: if the sweep is killed outright, its jobs go too (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def share(at_once: int, slots: list[str]) -> dict[str, str]:
    """The environment of one of `at_once` jobs: its GPUs, or its share of the cores."""
    more = {"DEPTHLAB_SIDE_BY_SIDE": str(at_once), "PYTHONUNBUFFERED": "1"}
    if slots:
        more["CUDA_VISIBLE_DEVICES"] = ",".join(slots)
    elif at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
        more["OMP_NUM_THREADS"] = str(max(1, cores() // at_once))
    return more


def process(line: list[str], more: dict[str, str], out: Any) -> subprocess.Popen:
    return subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=clean_environment(**more),
        start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
        preexec_fn=die_with_parent,
    )


class StopSignal:
    """Remembers SIGINT or SIGTERM instead of dying of it."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.received = number


def kill_group(process: subprocess.Popen) -> None:
    """It and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for each GPU that this process sees: numbers, or UUIDs."""
    import torch

    count = torch.cuda.device_count()
    listed = [gpu.strip() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    return listed[:count] if listed else [str(k) for k in range(count)]
