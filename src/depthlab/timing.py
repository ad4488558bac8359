"""Timing side by side: warm, interleaved, every repetition kept, and a word on how quiet the machine was.

A repetition is disturbed where other processes used more than `QUIET` of all cores' time while it ran: two OpenMP
threads on two cores collapse when anything else runs, so such a time says nothing about the code.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

QUIET = 0.08  # share of the machine that others may use
ENOUGH = 3  # quiet repetitions for a median of their own


def busy_seconds() -> float | None:
    """CPU seconds that all processes of the machine have used since it started; None where nothing says so.

    From /proc/stat: user, nice, system, irq, softirq and steal (what a virtual machine's neighbours took).
    """
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


def own_seconds() -> float:
    """CPU seconds of this process and its living children (a loader's workers)."""
    used = time.process_time()
    for child in multiprocessing.active_children():
        try:  # utime and stime, counted behind the name, which may hold spaces
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):
            continue
    return used


class Stopwatch:
    """Measures from `start()` to `stop()`, waiting for the device at both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began: tuple[float, float, float | None] | None = None
        self.measured: dict[str, Any] | None = None

    def running(self) -> float:
        """Seconds since `start()`; does not wait."""
        return time.perf_counter() - self.began[0]

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        busy, own = busy_seconds(), own_seconds()
        self.began = time.perf_counter(), own, busy

    def stop(self) -> None:
        """Fills `measured`: seconds, cpu_seconds of this process family, others' share of the machine, disturbed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        own, busy = own_seconds(), busy_seconds()
        began, own_before, busy_before = self.began
        seconds, cpu = now - began, own - own_before
        others = None
        if busy is not None and busy_before is not None:
            others = max(0.0, busy - busy_before - cpu) / (seconds * os.cpu_count())
        self.measured = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "others": None if others is None else round(others, 3),
            "disturbed": others is not None and others > QUIET,
        }


def timed(steps: Iterator[Any], watch: Stopwatch, warm_up: int, count: int) -> None:
    """Take `warm_up` steps unmeasured, then `count` steps under the watch."""
    for _ in range(warm_up):
        next(steps)
    watch.start()
    for _ in range(count):
        next(steps)
    watch.stop()


class Phases:
    """Seconds between marks: `phases(name)` adds what passed since the last mark to `name`, waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def peak(precision: str, device: torch.device, rounds: int = 20) -> float:
    """FLOP/s of a large matrix product, the fastest of `rounds`: the most that this machine does in a precision."""
    n = 2048 if device.type == "cpu" else 8192
    dtype = {"bf16": torch.bfloat16, "16-m": torch.float16, "64-t": torch.float64}.get(precision[:4], torch.float32)
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    watch, rates = Stopwatch(device), []
    for _ in range(rounds + 1):
        watch.start()
        a @ b
        watch.stop()
        rates.append(2 * n**3 / watch.measured["seconds"])
    return max(rates)


def age() -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    try:  # the 22nd field, counted behind the name, which may hold spaces
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, AttributeError):
        return None


@dataclass(frozen=True)
class Spread:
    """Median and range, over the quiet repetitions where there are at least `ENOUGH`, else over all."""

    median: float
    low: float
    high: float
    quiet: int
    total: int

    @classmethod
    def of(cls, values: list[tuple[float, bool]]) -> "Spread":
        """Of (value, disturbed) pairs."""
        quiet = [value for value, disturbed in values if not disturbed]
        chosen = quiet if len(quiet) >= ENOUGH else [value for value, _ in values]
        return cls(statistics.median(chosen), min(chosen), max(chosen), len(quiet), len(values))

    @property
    def trusted(self) -> bool:
        """Whether all that entered the median was quiet, or nothing was disturbed at all."""
        return self.quiet >= ENOUGH or self.quiet == self.total

    def text(self, form: str = ".0f") -> str:
        return f"{self.median:{form}} [{self.low:{form}}-{self.high:{form}}]"
