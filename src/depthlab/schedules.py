"""Learning rates as pure functions of the optimiser step.

Every function takes `t`, the 0-based step that the value is used BY, and `steps_per_epoch`, both integers; lengths are
given in epochs. Restart boundaries are integer arithmetic. A budget b stretches the time axis: the run's step t of
b*E epochs stands at t/b on the recipe's axis, which integers express exactly as (t * E, steps_per_epoch * b*E).

handmade_steps   He et al. 2016, used as "SGD" by Barz & Denzler 2018, V.A
clr              cyclical learning rates, Smith 2017; Barz & Denzler 2018, eq. 1 and 2
sgdr             warm restarts, Loshchilov & Hutter 2017; Barz & Denzler 2018, eq. 3 and 4
one_cycle        Smith & Topin 2019, as torch.optim.lr_scheduler.OneCycleLR (cosine, two phases)
multilevel_cosine   cosine cycles between points of growth, Chang et al. 2018, eq. 9
"""

import math
from collections.abc import Sequence


def piecewise(t: int, steps_per_epoch: int, *, milestones: Sequence[int], values: Sequence[float]) -> float:
    """`values[k]` from epoch `milestones[k - 1]` on; one value more than milestones."""
    return values[sum(t >= m * steps_per_epoch for m in milestones)]


def handmade_steps(
    t: int,
    steps_per_epoch: int,
    *,
    lr: float = 0.1,
    lr_warmup: float = 0.01,
    warmup: int = 1,
    milestones: Sequence[int] = (80, 120),
    gamma: float = 0.1,
) -> float:
    """`lr_warmup` for `warmup` epochs, then `lr`, times `gamma` after each milestone (epochs)."""
    decayed = [lr * gamma**k for k in range(len(milestones) + 1)]
    return piecewise(t, steps_per_epoch, milestones=[warmup, *milestones], values=[lr_warmup, *decayed])


def step_decay(t: int, steps_per_epoch: int, *, lr: float, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """`lr` times `gamma` for each milestone (epochs) passed."""
    return lr * gamma ** sum(t >= m * steps_per_epoch for m in milestones)


def triangular(t: int, half_cycle: int, *, lr_min: float, lr_max: float) -> float:
    """Eq. 1: from `lr_min` up to `lr_max` in `half_cycle` = s steps and down again."""
    position = (t % (2 * half_cycle)) / half_cycle  # t/s - 2 floor(t/2s), exact
    return lr_min + (lr_max - lr_min) * (1 - abs(position - 1))


def clr(
    t: int,
    steps_per_epoch: int,
    *,
    epochs: int,
    half_cycle: int = 10,
    lr_min: float = 1e-5,
    lr_max: float = 0.1,
    delta: float = 10.0,
) -> float:
    """Eq. 2: eq. 1 with s = `half_cycle` epochs, divided by 1 + (delta - 1) t / t_max, t_max = `epochs` epochs."""
    rate = triangular(t, half_cycle * steps_per_epoch, lr_min=lr_min, lr_max=lr_max)
    return rate / (1 + (delta - 1) * t / (epochs * steps_per_epoch))


def restarts(position: int, first: int, factor: int) -> tuple[int, int]:
    """(position within the current cycle, the cycle's length) where cycles last first, first*factor, ... (eq. 4)."""
    while position >= first:
        position -= first
        first *= factor
    return position, first


def cosine(fraction: float, *, lr_min: float, lr_max: float) -> float:
    """`lr_max` at 0, `lr_min` at 1, half a cosine between."""
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * fraction))


def sgdr(
    t: int,
    steps_per_epoch: int,
    *,
    cycle: int = 12,
    factor: int = 2,
    lr_min: float = 1e-6,
    lr_max: float = 0.1,
    formula: str = "paper",
    granularity: str = "epoch",
) -> float:
    """Eq. 3: half a cosine from `lr_max` towards `lr_min` over cycles of S_0 = `cycle`, S_i = `factor` S_{i-1} epochs.

    Args:
        formula: "paper", the printed equation (the last epoch of a cycle is still above lr_min); "authors", what
            their code ran: after a cycle's first epoch the index is one ahead, so its last epoch runs at lr_min.
        granularity: "epoch", constant within an epoch (Barz & Denzler); "step" (Loshchilov & Hutter).
    """
    if granularity == "step":
        position, length = restarts(t, cycle * steps_per_epoch, factor)
    else:
        position, length = restarts(t // steps_per_epoch, cycle, factor)
        if formula == "authors" and position > 0:
            position += 1
    return cosine(position / length, lr_min=lr_min, lr_max=lr_max)


def one_cycle(
    t: int,
    steps_per_epoch: int,
    *,
    epochs: int,
    lr_max: float = 0.1,
    warmup: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
) -> float:
    """Cosine from lr_max/div up to lr_max over the first `warmup` (fraction) of the run, then down to
    lr_max/(div * final_div) at the last step."""
    last = epochs * steps_per_epoch - 1
    peak = warmup * (last + 1) - 1
    start, end = lr_max / div, lr_max / (div * final_div)
    if t <= peak:
        return cosine(t / peak if peak > 0 else 1.0, lr_min=lr_max, lr_max=start)
    return cosine(min(1.0, (t - peak) / (last - peak)), lr_min=end, lr_max=lr_max)


def run_length(epochs: int, budget: float) -> int:
    """Epochs of a run: those of the recipe, scaled by the budget, at least one."""
    return max(1, round(epochs * budget))


def run_points(points: Sequence[int], epochs: int, run_epochs: int) -> tuple[int, ...]:
    """Epochs of a recipe of `epochs` as epochs of a run of `run_epochs`, to the nearest whole one (halves go up)."""
    return tuple((2 * p * run_epochs + epochs) // (2 * epochs) for p in points)


def multilevel_cosine(
    t: int,
    steps_per_epoch: int,
    *,
    epochs: int = 160,
    at: Sequence[int] = (60, 110),
    lr_min: float = 0.001,
    lr_max: float = 0.5,
    reset: bool = True,
) -> float:
    """Eq. 9: half a cosine from `lr_max` to `lr_min` in each cycle; cycles end at the epochs `at` and at `epochs`.

    Args:
        reset: False for a single cosine over all epochs (Fig. 10).
    """
    bounds = [b * steps_per_epoch for b in ((0, *at, epochs) if reset else (0, epochs))]
    cycle = sum(t >= b for b in bounds[1:-1])
    start, end = bounds[cycle : cycle + 2]
    return cosine((t - start) / (end - start), lr_min=lr_min, lr_max=lr_max)
