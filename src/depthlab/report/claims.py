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
    what       the same in words, printed before the number
    as         difference (default); ratio, of the sum over plus to that over minus (`above: 3` is three times);
               slope of log quantity on log `against` over the runs of all `plus`; rank, Spearman's correlation of the
               two; largest or smallest over those runs, an inequality that needs no seeds; apart, the largest distance
               of two runs, by a function of two records; lowest, plus less the lowest of all other cells of `minus`
    least      runs per cell below which nothing is decided; default 2, with `noise` 1
    noise      where each cell has one run of full length: distances to the bound below this decide nothing (CIFAR's
               errors scatter by .15 to .3 points from seed to seed), 0 for what has none; default, and in shorter runs,
               whose scatter nobody knows: one run decides nothing
    diverged   true: a diverged run has this quantity, too; else such runs are left out, and counted
    ours       true: the paper says no such thing, it is a question of ours; not counted with its claims
    parts      several of these together: all must be supported, one that is not supported refutes
    note       a footnote: the paper's slip that touches it

The statistics (`estimates`): Welch's test (Welch-Satterthwaite degrees of freedom) of a sum of means against the bound,
one-sided at .1 both ways; `within` and `between` by two one-sided tests. Each budget, precision and data set is tested
alone; seconds, on the runs of one machine.
"""

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, takewhile
from statistics import fmean
from typing import Any

from scipy import stats

from depthlab.report.estimates import Estimate, difference, rank, ratio, slope
from depthlab.report.experiments import Cell, Experiment, agrees
from depthlab.report.tables import Block, Record, Row, hardware

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = "supported", "not supported", "inconclusive", "not run"
LEVEL = 0.1
MANY = 8  # cells without runs that are not named one by one
BOUNDS = ("above", "below", "within", "between")
KINDS = ("difference", "ratio", "slope", "rank", "largest", "smallest", "apart", "lowest")
KEYS = {"id", "says", "paper", "note", "parts", "plus", "minus", "quantity", "what", "as", "against", "least", "noise",
        "diverged", "ours", *BOUNDS}  # fmt: skip
TIMES = ("seconds_per_epoch", "train_seconds")
POINTS = ("test_error", "train_error")
WORDS = {"ratio": "ratio", "slope": "slope", "rank": "rank correlation", "largest": "at most", "smallest": "at least",
         "apart": "at most"}  # fmt: skip


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
        parts = [verdict(experiment, part, block) for part in parts_of(claim)]
        return replace(joined(claim, parts), block=block, missing=list(chain(*(part.missing for part in parts))))
    claim = {"quantity": experiment.metric} | claim
    plus, minus = ([rows_of(cell, block) for cell in claim.get(side, [])] for side in ("plus", "minus"))
    rows = list(chain(*plus, *minus))
    missing = [row for row in rows if not runs_of(row, claim)]
    if missing:
        names = [experiment.name_of(row.cell) for row in missing]
        lacks = ", ".join(names if len(names) <= MANY else [*names[:3], f"... ({len(names)} cells)"])
        return Verdict(claim, NOT_RUN, f"no finished run of {lacks}", block=block, missing=missing)
    if claim["quantity"] in TIMES:
        machines = [{hardware(record) for record in row.finished} for row in rows]
        if not (both := sorted(set.intersection(*machines))):
            return Verdict(claim, NOT_RUN, "no machine has run all of it", block=block)
        plus, minus = ([[on(row, both) for row in cell] for cell in side] for side in (plus, minus))
    samples = [[[value for row in cell for value in values(row, claim)] for cell in side] for side in (plus, minus)]
    counts, kind = [len(sample) for sample in chain(*samples)], claim.get("as", "difference")
    if kind == "apart":
        runs = [record for row in rows for record in row.finished]
        distances = (function(claim["quantity"])(*two) for two in combinations(runs, 2))
        far = list(takewhile(lambda distance: distance is not None, distances))
        if len(runs) < 2 or len(far) < math.comb(len(runs), 2):
            return Verdict(claim, NOT_RUN, "needs two runs that were measured", block=block)
        guess, counts = Estimate(max(far), 0.0), [len(runs)]
    elif not all(counts):
        return Verdict(
            claim, NOT_RUN, f"{claim.get('what', claim['quantity'])} was not measured", n=counts, block=block
        )
    elif kind in ("slope", "rank"):
        paired = [pair for cell in plus for row in cell for pair in pairs(row, claim)]
        if len(paired) < 3:
            return Verdict(claim, NOT_RUN, f"{len(paired)} points; needs 3", n=[len(paired)], block=block)
        guess, counts = (slope if kind == "slope" else rank)(*zip(*paired, strict=True)), [len(paired)]
    elif kind in ("largest", "smallest"):
        guess, counts = Estimate((max if kind == "largest" else min)(chain(*samples[0])), 0.0), [sum(counts)]
    elif kind == "lowest":
        others = [found for cell in minus for row in cell if row not in chain(*plus) if (found := values(row, claim))]
        guess = difference([list(chain(*samples[0]))], [min(others, key=fmean)])
        counts = [len(sample) for sample in (*samples[0], *others)]
    else:
        guess = ratio(*samples) if kind == "ratio" else difference(*samples)
    found = decide(claim, guess, counts, block)
    out = 0 if claim.get("diverged") else sum(len(row.diverged) for row in rows)
    return replace(found, why=found.why + f"; without {out} diverged run{'s' * (out > 1)}" * bool(out))


def computed(claim: dict[str, Any]) -> Verdict:
    """Of an experiment without runs: `quantity` is a function of nothing, its number exact."""
    if claim.get("parts"):
        return joined(claim, [computed(part) for part in parts_of(claim)])
    value = float(function(claim["quantity"])())
    return decide(claim | {"as": "computed"}, Estimate(value, 0.0), [])


def parts_of(claim: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {key: value for key, value in claim.items() if key not in ("parts", "paper")}
    return [shared | part for part in claim["parts"]]


def joined(claim: dict[str, Any], parts: list[Verdict]) -> Verdict:
    verdicts = [part.verdict for part in parts]
    return Verdict(claim, together(verdicts), "; ".join(part.why for part in parts), parts=parts)


def decide(claim: dict[str, Any], guess: Estimate, counts: list[int], block: Block | None = None) -> Verdict:
    """Hold an estimate against the claim's bound."""
    kind, noise = claim.get("as", "difference"), claim.get("noise")
    if noise and block is not None and block.marks:
        noise = None
    least = claim.get("least", 2 if noise is None else 1)
    few = kind in ("difference", "ratio") and min(counts) < least
    assumed = guess.error is None and not few and noise is not None
    said = describe(claim, guess, counts) + (f"; {noise:g} is left to chance" if assumed and noise else "")
    if assumed:
        guess = Estimate(guess.value, noise / stats.norm.isf(LEVEL))  # at `noise` from the bound p is LEVEL
    log = kind == "ratio"
    low, high = limits(claim)
    below, above = (math.log(x) if log and 0 < x < math.inf else (-math.inf if log and x <= 0 else x)
                    for x in (low, high))  # fmt: skip
    if few or guess.error is None:
        least = max(least, 2 if noise is None else 1)
        return Verdict(claim, INCONCLUSIVE, f"{said}; needs {least} runs per cell", guess, None, counts, block)
    inside = max(guess.tail(below) if below > -math.inf else 0.0, 1 - guess.tail(above) if above < math.inf else 0.0)
    outside = min(1 - guess.tail(below) if below > -math.inf else 1.0, guess.tail(above) if above < math.inf else 1.0)
    found = SUPPORTED if inside < LEVEL else NOT_SUPPORTED if outside < LEVEL else INCONCLUSIVE
    return Verdict(
        claim, found, f"{said}, p = {inside:.2g}" if guess.error and not assumed else said, guess, inside, counts, block
    )


def limits(claim: dict[str, Any]) -> tuple[float, float]:
    """The interval in which the claim wants the estimate."""
    if "above" in claim:
        return claim["above"], math.inf
    if "below" in claim:
        return -math.inf, claim["below"]
    return (-claim["within"], claim["within"]) if "within" in claim else tuple(claim["between"])


def describe(claim: dict[str, Any], guess: Estimate, counts: list[int]) -> str:
    """`9.06 points (claimed: above 1; n = 1)`: runs per cell, or of all cells where those count together."""
    kind = claim.get("as", "difference")
    value = math.exp(guess.value) if kind == "ratio" else guess.value
    spread = f" ± {guess.error:.2g}" if guess.error and kind not in ("ratio", "rank") else ""
    unit = " points" * (kind in ("difference", "lowest") and claim.get("quantity") in POINTS) + " apart" * (
        kind == "apart" and "what" not in claim
    )
    bound = next(key for key in BOUNDS if key in claim)
    wanted = " and ".join(f"{x:g}" for x in (claim[bound] if bound == "between" else [claim[bound]]))
    if kind in ("difference", "ratio", "lowest"):
        n = f"; n = {min(counts)}" + f" to {max(counts)}" * (max(counts) > min(counts))
    else:
        n = f"; {counts[0]} run{'s' * (counts[0] > 1)}" if counts else ""
    words = (f"{claim['what']}: " if "what" in claim else "") + (f"{WORDS[kind]} " if kind in WORDS else "")
    return f"{words}{value:.4g}{spread}{unit} (claimed: {bound} {wanted}{n})"


def together(verdicts: list[str]) -> str:
    """All parts must be supported; one that is not refutes; some without runs leave the claim open."""
    if NOT_SUPPORTED in verdicts:
        return NOT_SUPPORTED
    return verdicts[0] if len(set(verdicts)) == 1 else INCONCLUSIVE


# ---- what is in a record


def rows_of(cell: Cell, block: Block) -> list[Row]:
    return [row for row in block.rows if cell.keys() <= row.cell.keys() and agrees(cell, row.cell)]


def runs_of(row: Row, claim: dict[str, Any]) -> list[Record]:
    return row.records if claim.get("diverged") else row.finished


def on(row: Row, machines: list[str]) -> Row:
    """The row's runs on the first of these machines."""
    return replace(row, records=[record for record in row.records if hardware(record) == machines[0]])


def values(row: Row, claim: dict[str, Any]) -> list[float]:
    if claim.get("as") == "apart":  # of two records
        return []
    found = (quantity(record, claim["quantity"]) for record in runs_of(row, claim))
    return [value for value in found if value is not None]


def pairs(row: Row, claim: dict[str, Any]) -> list[tuple[float, float]]:
    found = (tuple(quantity(r, key) for key in (claim["against"], claim["quantity"])) for r in runs_of(row, claim))
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
