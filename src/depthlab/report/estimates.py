"""The statistics of claims: an estimate with its standard error, and how likely it lies beyond a bound."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean, variance

from scipy import stats

EXACT = 7  # ranks of up to so many runs are tested by all their orders, 5,040


@dataclass(frozen=True)
class Estimate:
    """`error` is the standard error, with `freedom` degrees of freedom: 0 for what has none, None if it is unknown."""

    value: float
    error: float | None = None
    freedom: float = math.inf

    def tail(self, bound: float) -> float:
        """One-sided p-value of "greater than `bound`"."""
        if not self.error:
            return float(self.value <= bound)
        return float(stats.t.sf((self.value - bound) / self.error, self.freedom))


def difference(plus: list[list[float]], minus: list[list[float]]) -> Estimate:
    """Sum of means less sum of means, with Welch's standard error; unknown where a cell has one run."""
    return welch([*((1.0, sample) for sample in plus), *((-1.0, sample) for sample in minus)])


def ratio(plus: list[list[float]], minus: list[list[float]]) -> Estimate:
    """log of sum over sum; the error by the delta method, each cell's relative to its side's sum."""
    sides = [sum(map(fmean, side)) for side in (plus, minus)]
    spread = welch([*((1 / sides[0], sample) for sample in plus), *((-1 / sides[1], sample) for sample in minus)])
    return Estimate(math.log(sides[0] / sides[1]), spread.error, spread.freedom)


def welch(terms: list[tuple[float, list[float]]]) -> Estimate:
    """sum of w_i mean_i with its standard error and Welch-Satterthwaite's degrees of freedom."""
    value = sum(w * fmean(sample) for w, sample in terms)
    if any(len(sample) < 2 for _, sample in terms):
        return Estimate(value)
    parts = [(w**2 * variance(sample) / len(sample), len(sample) - 1) for w, sample in terms]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / f for part, f in parts) if total else math.inf
    return Estimate(value, math.sqrt(total), freedom)


def slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Least squares of log y on log x."""
    fit = stats.linregress([math.log(v) for v in x], [math.log(v) for v in y])
    return Estimate(float(fit.slope), float(fit.stderr), len(x) - 2)


def rank(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's rho; the error by which rho / error has the p-value of rho against 0.

    That is the usual t statistic's; of few runs, of which it would make too much (a perfect order of three has
    p = 1/6), the share of all orders that are as good.
    """
    n = len(x)
    a, b = stats.rankdata(x), stats.rankdata(y)
    rho = float(stats.spearmanr(a, b).statistic)
    if n > EXACT or not rho:
        return Estimate(rho, math.sqrt(max(0.0, 1 - rho**2) / (n - 2)), n - 2)
    found = abs((a - a.mean()) @ (b - b.mean()))
    orders = [(a - a.mean()) @ (order - b.mean()) for order in permutations(b)]
    sign = math.copysign(1, rho)
    p = sum(sign * value >= found - 1e-9 for value in orders) / len(orders)
    return Estimate(rho, rho / (sign * max(stats.t.isf(p, n - 2), 1e-9)), n - 2)
