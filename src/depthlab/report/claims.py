"""A paper's claims, tested on our runs: supported, not supported, inconclusive or not run.

A claim stands in its experiment's file beside the published numbers (`paper.claims`):

    - id: B1
      says: SGDR trains Plain-11 better than SGD by at least a point
      plus: [{arch: plain11, sched: sgd}]        cells of the table: the estimate is the sum over `plus` of their means
      minus: [{arch: plain11, sched: sgdr}]      less the sum over `minus`
      above: 1.0                                 or below: x, within: x (of 0), between: [a, b]
      paper: 1.39                                the paper's value of the same estimate

and has, where it needs them,

    quantity   what is compared: a key of the record, dotted (`analyses.norms.gamma`), or the dotted path of a function
               of the record (of nothing, where an experiment sweeps nothing and computes); default: the table's number
    as         difference (default); ratio, of the sum over plus to that over minus (`above: 3` is three times);
               slope of log quantity on log `against` over the runs of all `plus`; rank, Spearman's correlation of the
               two; largest or smallest over those runs, an inequality that needs no seeds; apart, the largest distance
               of two runs, by a function of two records; lowest, plus less the lowest of all other cells of `minus`
    least      runs per cell below which nothing is decided; default 2
    noise      where each cell has one run: distances to the bound below this decide nothing (CIFAR's errors scatter by
               .15 to .3 points from seed to seed), 0 for what has none; default: nothing is decided
    parts      several of these together: all must be supported, one that is not supported refutes
    note       a footnote: the paper's slip that touches it

The statistics: Welch's test (Welch-Satterthwaite degrees of freedom) of a sum of means against the bound, one-sided at
.1 both ways; `within` and `between` by two one-sided tests. Each budget, precision and data set is tested alone.
"""

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations
from statistics import fmean, variance
from typing import Any

from scipy import stats

from depthlab.report.experiments import Cell, Experiment, agrees
from depthlab.report.tables import Block, Record, Row

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = "supported", "not supported", "inconclusive", "not run"
LEVEL = 0.1
BOUNDS = ("above", "below", "within", "between")
KINDS = ("difference", "ratio", "slope", "rank", "largest", "smallest", "apart", "lowest")
KEYS = {"id", "says", "paper", "note", "parts", "plus", "minus", "quantity", "as", "against", "least", "noise", *BOUNDS}


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


@dataclass(frozen=True)
class Verdict:
    """What one block of runs says of one claim; `why` is one sentence, `missing` the cells that lack runs."""

    claim: dict[str, Any]
    verdict: str
    why: str = ""
    estimate: Estimate | None = None
    p: float | None = None
    n: list[int] = field(default_factory=list)
    block: Block | None = None
    missing: list[Row] = field(default_factory=list)
    parts: list["Verdict"] = field(default_factory=list)


def problems(experiment: Experiment) -> list[str]:
    """What is wrong with `paper.claims`, a line each."""
    lines, seen = [], set()
    for number, claim in enumerate(experiment.paper.get("claims") or []):
        where = f"{experiment.id}: paper.claims[{number}]"
        if not claim.get("id") or not claim.get("says") or claim["id"] in seen:
            lines.append(f"{where}: needs an id of its own and what it says")
        seen.add(claim.get("id"))
        shared = {key: value for key, value in claim.items() if key != "parts"}
        for part in [shared | part for part in claim.get("parts") or [{}]]:
            if unknown := sorted(part.keys() - KEYS):
                lines.append(f"{where}.{unknown[0]} is not known; known are {', '.join(sorted(KEYS))}")
            if sum(key in part for key in BOUNDS) != 1:
                lines.append(f"{where}: needs one of {', '.join(BOUNDS)}")
            if part.get("as", "difference") not in KINDS:
                lines.append(f"{where}.as={part['as']} must be one of {', '.join(KINDS)}")
            for cell in [*part.get("plus", []), *part.get("minus", [])]:
                if not any(cell.keys() <= c.keys() and agrees(cell, c) for c in experiment.cells()):
                    lines.append(f"{where}: {cell} is no cell of the table")
    return lines


def judge(experiment: Experiment, blocks: Iterable[Block]) -> list[Verdict]:
    """Every claim of the experiment on the best evidence there is: of `blocks`, which `tables.tabulate` sorts by
    falling length and precision, the first that has the runs.
    """
    blocks = [block for block in blocks if block.own_data]
    out = []
    if not experiment.runs:
        return [computed(claim) for claim in experiment.paper.get("claims") or []]
    for claim in experiment.paper.get("claims") or []:
        found = [verdict(experiment, claim, block) for block in blocks]
        out.append(next((one for one in found if one.verdict != NOT_RUN), found[0]))
    return out


def verdict(experiment: Experiment, claim: dict[str, Any], block: Block) -> Verdict:
    """The claim on the runs of one block."""
    if claim.get("parts"):
        shared = {key: value for key, value in claim.items() if key not in ("parts", "paper")}
        parts = [verdict(experiment, shared | part, block) for part in claim["parts"]]
        return Verdict(
            claim, together([part.verdict for part in parts]), "; ".join(part.why for part in parts), block=block,
            missing=list(chain(*(part.missing for part in parts))), parts=parts,
        )  # fmt: skip
    plus, minus = ([rows_of(cell, block) for cell in claim.get(side, [])] for side in ("plus", "minus"))
    rows = list(chain(*plus, *minus))
    missing = [row for row in rows if not row.finished]
    kind = claim.get("as", "difference")
    if kind == "apart" and not missing:
        runs = [record for row in rows for record in row.finished]
        far = [function(claim["quantity"])(*two) for two in combinations(runs, 2)]
        if not far or None in far:
            return Verdict(claim, NOT_RUN, "needs two runs that were measured", block=block)
        guess = Estimate(max(far), 0.0)
        return decide(claim, guess, [len(row.finished) for row in rows], block)
    samples = [[[value for row in cell for value in values(row, claim, experiment)] for cell in side]
               for side in (plus, minus)]  # fmt: skip
    counts = [len(sample) for sample in chain(*samples)]
    if missing or not all(counts):
        lacks = ", ".join(experiment.name_of(row.cell) for row in missing)
        why = f"no finished run of {lacks}" if missing else f"{quantity_name(claim, experiment)} was not measured"
        return Verdict(claim, NOT_RUN, why, n=counts, block=block, missing=missing)
    if kind in ("slope", "rank"):
        paired = [pair for cell in plus for row in cell for pair in pairs(row, claim, experiment)]
        if len(paired) < 3:
            return Verdict(claim, NOT_RUN, f"{len(paired)} points; needs 3", n=[len(paired)], block=block)
        guess, counts = (slope if kind == "slope" else rank)(*zip(*paired, strict=True)), [len(paired)]
    elif kind in ("largest", "smallest"):
        guess = Estimate((max if kind == "largest" else min)(chain(*samples[0])), 0.0)
    elif kind == "lowest":
        others = [fmean(found) for cell in minus for row in cell if row not in chain(*plus)
                  if (found := values(row, claim, experiment))]  # fmt: skip
        guess = Estimate(fmean(chain(*samples[0])) - min(others))
    else:
        guess = ratio(*samples) if kind == "ratio" else difference(*samples)
    return decide(claim, guess, counts, block)


def computed(claim: dict[str, Any]) -> Verdict:
    """Of an experiment without runs: `quantity` is a function of nothing, its number exact."""
    if claim.get("parts"):
        shared = {key: value for key, value in claim.items() if key not in ("parts", "paper")}
        parts = [computed(shared | part) for part in claim["parts"]]
        why = "; ".join(part.why for part in parts)
        return Verdict(claim, together([part.verdict for part in parts]), why, parts=parts)
    value = float(function(claim["quantity"])())
    return decide(claim | {"as": "largest"}, Estimate(value, 0.0), [1])


def decide(claim: dict[str, Any], guess: Estimate, counts: list[int], block: Block | None = None) -> Verdict:
    """Hold an estimate against the claim's bound."""
    kind = claim.get("as", "difference")
    few = kind in ("difference", "ratio") and min(counts) < claim.get("least", 2)
    if guess.error is None and not few and claim.get("noise") is not None:
        guess = Estimate(guess.value, claim["noise"] / stats.norm.isf(LEVEL))  # at `noise` from the bound p is LEVEL
    log = kind == "ratio"
    low, high = limits(claim)
    below, above = (math.log(x) if log and 0 < x < math.inf else (-math.inf if log and x <= 0 else x)
                    for x in (low, high))  # fmt: skip
    said = describe(claim, guess, counts)
    if few or guess.error is None:
        least = max(claim.get("least", 2), 1 if claim.get("noise") is not None else 2)
        return Verdict(claim, INCONCLUSIVE, f"{said}; needs {least} runs per cell", guess, None, counts, block)
    inside = max(guess.tail(below) if below > -math.inf else 0.0, 1 - guess.tail(above) if above < math.inf else 0.0)
    outside = min(1 - guess.tail(below) if below > -math.inf else 1.0, guess.tail(above) if above < math.inf else 1.0)
    found = SUPPORTED if inside < LEVEL else NOT_SUPPORTED if outside < LEVEL else INCONCLUSIVE
    return Verdict(claim, found, f"{said}, p = {inside:.2g}" if guess.error else said, guess, inside, counts, block)


def limits(claim: dict[str, Any]) -> tuple[float, float]:
    """The interval in which the claim wants the estimate."""
    if "above" in claim:
        return claim["above"], math.inf
    if "below" in claim:
        return -math.inf, claim["below"]
    return (-claim["within"], claim["within"]) if "within" in claim else tuple(claim["between"])


def describe(claim: dict[str, Any], guess: Estimate, counts: list[int]) -> str:
    value = math.exp(guess.value) if claim.get("as") == "ratio" else guess.value
    spread = f" ± {guess.error:.2g}" if guess.error and claim.get("as") != "ratio" else ""
    bound = next(f"{key} {claim[key]}" for key in BOUNDS if key in claim)
    runs = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{value:.4g}{spread} (claimed: {bound}; n = {runs})"


def together(verdicts: list[str]) -> str:
    """All parts must be supported; one that is not refutes; some without runs leave the claim open."""
    if NOT_SUPPORTED in verdicts:
        return NOT_SUPPORTED
    return verdicts[0] if len(set(verdicts)) == 1 else INCONCLUSIVE


# ---- estimates


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


def slope(x: tuple[float, ...], y: tuple[float, ...]) -> Estimate:
    """Least squares of log y on log x."""
    fit = stats.linregress([math.log(v) for v in x], [math.log(v) for v in y])
    return Estimate(float(fit.slope), float(fit.stderr), len(x) - 2)


def rank(x: tuple[float, ...], y: tuple[float, ...]) -> Estimate:
    """Spearman's rho; the error by which rho / error is the usual t statistic."""
    rho = float(stats.spearmanr(x, y).statistic)
    return Estimate(rho, math.sqrt(max(0.0, 1 - rho**2) / (len(x) - 2)), len(x) - 2)


# ---- what is in a record


def rows_of(cell: Cell, block: Block) -> list[Row]:
    return [row for row in block.rows if cell.keys() <= row.cell.keys() and agrees(cell, row.cell)]


def quantity_name(claim: dict[str, Any], experiment: Experiment) -> str:
    return claim.get("quantity") or experiment.metric


def values(row: Row, claim: dict[str, Any], experiment: Experiment) -> list[float]:
    found = (quantity(record, quantity_name(claim, experiment)) for record in row.finished)
    return [value for value in found if value is not None]


def pairs(row: Row, claim: dict[str, Any], experiment: Experiment) -> list[tuple[float, float]]:
    found = (tuple(quantity(r, key) for key in (claim["against"], quantity_name(claim, experiment)))
             for r in row.finished)  # fmt: skip
    return [pair for pair in found if None not in pair]


def quantity(record: Record, name: str) -> float | None:
    """A number of a record by its dotted key, or what the function of that name makes of the record; None if absent."""
    if name.startswith("depthlab."):
        return function(name)(record)
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
