"""What growing the depth saves against full depth throughout, in percent (Chang et al. 2018, section 4.2, Table 2).

Theory       k growths, k + 1 cycles of equal length, half the cost in each cycle before:
             1 - (2^(k+1) - 1) / (2^k (k + 1)) = 0, 25, 41.7, 53.1, 61.3, 67.2 % for k = 0..5 (the exponent in the
             printed formula is mis-set; these are the numbers of Table 2)
Block steps  the same for cycles of any length: 43.75 % for 60, 50 and 50 epochs
FLOPs        with stem and head, and first blocks of stages that cost less: 44.5 % for ResNet-50-i, 44.05 % for 122-i
Seconds      measured. Against the same run's epochs at full depth (the median of its last cycle), or against a finished
             run of the full depth on the same machine: the paper's 38 to 42 %. A shallow network's step costs more
             than its share of FLOPs. On a CPU the same in seconds of the processor, which other processes there
             do not lengthen.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from depthlab import growth
from depthlab.analysis import Result
from depthlab.problem import Problem
from depthlab.records import training_flops

CLOCKS = ("seconds", "cpu_seconds")
MARKS = {"block_steps": "_", "flops": "x", "seconds": "D", "seconds_against": "s"}
MARKS |= {"cpu_seconds": "d", "cpu_seconds_against": "p"}


def saved(costs: Sequence[float], at: Sequence[int], epochs: int) -> float:
    """Percent saved against the last cost throughout.

    Args:
        costs: of an epoch in each cycle.
        at: the epochs at whose start the next cycle begins.
    """
    lengths = [b - a for a, b in pairwise([0, *at, epochs])]
    return 100 * (1 - sum(c * n for c, n in zip(costs, lengths, strict=True)) / (costs[-1] * epochs))


def theoretical(k: int) -> float:
    """Table 2: k growths, cycles of equal length."""
    return by_block_steps(range(1, k + 1), k + 1)


def by_block_steps(at: Sequence[int], epochs: int) -> float:
    """Blocks double at each of `at`."""
    return saved([2**i for i in range(len(at) + 1)], at, epochs)


def by_flops(net: nn.Module, at: Sequence[int], epochs: int, size: int) -> float:
    """`net` as it is in the first cycle, on any device; images of size x size pixels."""
    net = copy.deepcopy(net).to("meta")
    mean = growth.mean_flops(net, size, at, epochs)  # leaves it grown
    return 100 * (1 - mean / training_flops(net, size))


def by_seconds(seconds: Sequence[float], at: Sequence[int]) -> float:
    """Seconds of each epoch of one run; full depth is its last cycle, without that cycle's first epoch (warm-up)."""
    last = seconds[at[-1] :]
    return 100 * (1 - sum(seconds) / (median(last[1:] or last) * len(seconds)))


def time_saved(net: nn.Module, record: Mapping[str, Any], against: str | None = None) -> Result:
    """Scalars in percent: `theoretical` (equal cycles), `block_steps`, `flops` (None where the image size is unknown),
    `seconds` (within the run) and, with `against`, `seconds_against`; of runs on a CPU also `cpu_seconds` and
    `cpu_seconds_against`. Arrays: `seconds` and, on a CPU, `cpu_seconds` of each epoch, `at`.

    Args:
        against: folder of a finished run of the full depth.

    Raises:
        Problem: the run did not grow, did not reach its last epoch, or `against` cannot be compared with it.
    """
    config, curves = record["config"], record["curves"]
    clocks = {key: curves[key] for key in CLOCKS if key in curves and (key == "seconds" or record["device"] == "cpu")}
    grow = config["grow"]
    if grow["name"] == "none":
        raise Problem(f"{record['name']}: did not grow (grow=none), nothing was saved; take a run with grow=multilevel")
    at = growth.growth_epochs(grow["at"], grow["epochs"], grow["budget"])
    if record["diverged"]:
        raise Problem(f"{record['name']}: diverged, its times are not those of a whole run")
    depth, times, size = growth.depth(net), 2 ** len(at), config["data"]["size"]
    start = copy.deepcopy(net).to("meta")
    growth.set_depth(start, [n // times for n in depth], growth.step_size(net) * times)
    scalars = {
        "growths": len(at),
        "theoretical": theoretical(len(at)),
        "block_steps": by_block_steps(at, record["epochs"]),
        "flops": by_flops(start, at, record["epochs"], size) if size else None,
        **{clock: by_seconds(seconds, at) for clock, seconds in clocks.items()},
        "train_seconds": float(sum(curves["seconds"])),
    }
    if against is not None:
        full = comparable(record, against)
        for clock, seconds in clocks.items():
            if there := full["curves"].get(clock):
                scalars[f"{clock}_against"] = 100 * (1 - sum(seconds) / sum(there))
        scalars["train_seconds_against"] = full["train_seconds"]
    return Result(scalars, {"at": np.array(at)} | {clock: np.array(seconds) for clock, seconds in clocks.items()})


def comparable(record: Mapping[str, Any], against: str) -> dict[str, Any]:
    """The record in the folder `against`.

    Raises:
        Problem: there is none, or its machine, precision or number of epochs is another.
    """
    path = Path(against) / "result.json"
    try:
        full = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"analysis.against={against}: no finished run there ({error})") from error
    for key in ("hardware", "devices", "threads", "precision", "data", "epochs"):
        if full[key] != record[key]:
            raise Problem(f"analysis.against={against}: its {key} is {full[key]}, this run's {record[key]}")
    return full


def figure(results: Mapping[str, Result]) -> Any:
    """Seconds of each epoch; and Table 2's curve with what the runs saved."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(10.5, 4.0)
    left, right = drawing.subplots(1, 2)
    ks = range(6)
    right.plot(ks, [theoretical(k) for k in ks], "o-", color="0.5", label="theory, equal cycles (Table 2)")
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        seconds, of = result.arrays["seconds"], result.scalars
        left.stairs(seconds, np.arange(len(seconds) + 1), baseline=None, color=colour, label=name)
        for epoch in result.arrays["at"]:
            left.axvline(epoch, color="0.6", lw=0.8, ls=":", zorder=0)
        for key, mark in MARKS.items():
            if of.get(key) is not None:
                label = f"{name}: {key.replace('_', ' ')} {of[key]:.1f} %"
                right.plot(of["growths"], of[key], mark, ms=7, mfc="none", color=colour, label=label)
    left.set(xlabel="epoch", ylabel="seconds per epoch", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="growths k", ylabel="saved against full depth (%)", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return drawing
