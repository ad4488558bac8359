"""Sort records into the cells of a table. A cell is one recipe; budgets, precisions and data sets never share a table.

A record belongs to a cell by its names (arch, sched, ...) and by the rest of its `identity`, the seed apart. Records of
a cell's names but another recipe form a row of their own that names the keys in which they differ.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from depthlab.records import mode
from depthlab.report.experiments import Cell, Experiment, agrees

Record = dict[str, Any]
BLOCK_KEYS = {"seed", "budget", "precision"}  # last parts of identity keys that tell runs or tables apart, not recipes
EXACT = {"32-true", "32", "64-true", "64"}


@dataclass
class Row:
    """One cell of the experiment, or (with `differs`) runs of the same names by another recipe."""

    cell: Cell
    wanted: list[Any]
    records: list[Record] = field(default_factory=list)
    differs: str = ""
    bands: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # see `figures.band`

    @property
    def finished(self) -> list[Record]:
        return [r for r in self.records if not r["diverged"]]

    @property
    def diverged(self) -> list[Record]:
        return [r for r in self.records if r["diverged"]]

    @property
    def missing(self) -> list[Any]:
        """Seeds that have not been run. A diverged run is a result, hence not missing."""
        return [] if self.differs else [s for s in self.wanted if s not in {r["seed"] for r in self.records}]

    def values(self, key: str, where: Callable[[Record], bool] = lambda r: True) -> list[float]:
        return [r[key] for r in self.finished if r.get(key) is not None and where(r)]

    def only(self, key: str) -> Any:
        """The one value all finished records of this row have for a key, else None."""
        values = {r.get(key) for r in self.finished}
        return values.pop() if len(values) == 1 else None


@dataclass
class Block:
    """A table of one data set, one budget and one precision: `rows` are the experiment's cells, then the `others`."""

    data: str | None
    budget: float
    precision: str
    own_data: bool = True
    rows: list[Row] = field(default_factory=list)
    others: list[Row] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        return [r for row in self.rows for r in row.records]

    @property
    def wanted(self) -> int:
        return sum(len(row.wanted) for row in self.rows)

    @property
    def count(self) -> str:
        """`3 of 18 runs`; of seeds that the experiment does not ask for `18 of 18 runs and 2 more`."""
        done = self.wanted - sum(len(row.missing) for row in self.rows)
        more = len(self.records) - done
        return f"{done} of {self.wanted} runs" + (f" and {more} more" if more else "")

    @property
    def marks(self) -> str:
        """What keeps these numbers from standing beside the paper's without a word."""
        return ("†" if self.budget != 1 else "") + ("‡" if self.precision not in EXACT else "")

    @property
    def hardware(self) -> dict[str, int]:
        """Machine -> number of runs made on it, most runs first."""
        return dict(Counter(hardware(r) for r in self.records).most_common())


def tabulate(experiment: Experiment, records: Iterable[Record], expected: Any = None) -> list[Block]:
    """Sort `records` into one block per (data, budget, precision) found; the experiment's own is there even when empty.

    Args:
        expected: the identity that each cell's runs must have, by `cell_key(cell)`: a dict, or what has its `get`.
            Without it the recipe of this experiment's own runs, or else the one with most runs, is taken.
            The `analyses` that it has go with every record, as `asked`: see `given.measurement`.

    Returns:
        Blocks, the experiment's data set first, then by falling budget, unreduced precision first.
    """
    cells = {cell_key(cell): cell for cell in experiment.cells()}
    found: dict[tuple, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    found[experiment.data, float(experiment.budget), experiment.precision]  # there even when empty
    for record in records:
        if experiment.data not in (None, record["data"]) and record.get("study") != experiment.id:
            continue
        if (key := key_of(record, experiment.axes)) in cells:
            data = experiment.data and record["data"]  # an axis, or not fixed: no reason for a table of its own
            precision = experiment.precision if "trainer" in experiment.axes else record["precision"]
            found[data, float(record["budget"]), precision][key].append(record)
    blocks = []
    for (data, budget, precision), by_cell in found.items():
        block = Block(data, budget, precision, own_data=data == experiment.data)
        for key, cell in cells.items():
            asked = expected is not None and block.own_data and by_cell[key]
            row, others = split(experiment, cell, by_cell[key], expected.get(key) if asked else None)
            block.rows.append(row)
            block.others += others
        if any(r.get("analyses") for row in [*block.rows, *block.others] for r in row.records):
            asked = getattr(expected, "analyses", dict)()
            for row in [*block.rows, *block.others]:
                row.records = [r | {"asked": asked} for r in row.records]
        if block.records or block.others or (data, budget, precision) == (
            experiment.data, float(experiment.budget), experiment.precision
        ):  # fmt: skip
            blocks.append(block)
    return sorted(
        blocks, key=lambda b: (not b.own_data, b.data or "", -b.budget, b.precision not in EXACT, b.precision)
    )


def split(
    experiment: Experiment, cell: Cell, records: list[Record], expected: dict[str, Any] | None
) -> tuple[Row, list[Row]]:
    """The cell's own runs, and rows of other recipes. Runs made for another study by another recipe are left to it."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[recipe_text(record["identity"])].append(record)
    own = Row(cell, experiment.seeds)
    if expected is not None:
        reference = recipe(json.loads(json.dumps(expected)))
    elif groups:
        best = min(groups, key=lambda g: (all(r.get("study") != experiment.id for r in groups[g]), -len(groups[g]), g))
        reference = json.loads(best)
    others = []
    for text, members in sorted(groups.items()):
        differs = differing(json.loads(text), reference)
        if not differs:
            own.records += sorted(members, key=lambda r: r["seed"])
        elif any(r.get("study") in (None, experiment.id) for r in members):
            others.append(Row(cell, experiment.seeds, sorted(members, key=lambda r: r["seed"]), differs))
    return own, others


def recipe(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` with dotted keys, without the seed and without what has a table of its own."""
    return {key: value for key, value in flatten(identity).items() if key.split(".")[-1] not in BLOCK_KEYS}


_texts: dict[int, tuple[dict[str, Any], str]] = {}  # by the identity's own, which is kept beside it


def recipe_text(identity: dict[str, Any]) -> str:
    """`recipe` as text, made once: every experiment looks through all records."""
    kept = _texts.get(id(identity))
    if kept is None:
        kept = _texts[id(identity)] = identity, json.dumps(recipe(identity), sort_keys=True)
    return kept[1]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differing(found: dict[str, Any], reference: dict[str, Any]) -> str:
    """`optim.weight_decay=0.0004 (not 0.001)`, for every key in which two recipes differ; "" if in none."""
    pairs = [(k, found.get(k, "absent"), reference.get(k, "absent")) for k in sorted(found.keys() | reference.keys())]
    return ", ".join(f"{key}={this} (not {that})" for key, this, that in pairs if this != that)


def value_of(record: Record, axis: str) -> Any:
    """A record's value on an axis: a name it carries (arch, sched, data), a key of its configuration, its mode."""
    if axis in record and not isinstance(record[axis], dict):
        return record[axis]
    value: Any = record.get("config") or record["identity"]
    for part in axis.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if axis == "trainer" and isinstance(value, dict):
        return mode(value)
    return value.get("name") if isinstance(value, dict) else value


def key_of(record: Record, axes: dict[str, list[Any]]) -> str | None:
    """`cell_key` of the cell that a record's values make; None as soon as one is no value of its axis."""
    cell = {}
    for axis, values in axes.items():
        cell[axis] = value = value_of(record, axis)
        if isinstance(value, str) and value not in values:
            return None
    return cell_key(cell)


def cell_key(cell: Cell) -> str:
    """A cell as text, so that 1 and 1.0 are one value."""
    return "|".join(f"{k}={float(v) if isinstance(v, (int, float)) else v}" for k, v in cell.items())


def summary(values: list[float]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation (n - 1; None below two values) and n."""
    return (fmean(values) if values else None, stdev(values) if len(values) > 1 else None, len(values))


def hardware(record: Record) -> str:
    """The machine a record's times belong to, with what it used of it."""
    devices, threads = record.get("devices") or 1, record.get("threads")
    used = [f"{devices} devices"] if devices > 1 else []
    used += [f"{threads} thread{'s' * (threads > 1)}"] if record.get("device") == "cpu" and threads else []
    return ", ".join([str(record.get("hardware") or record.get("device") or "unknown hardware"), *used])


def seconds_per_epoch(record: Record) -> float | None:
    """The median epoch; of a network that grew the mean one, for its median is an epoch of the middle depth."""
    grew = len(set(record["curves"].get("depth") or [])) > 1
    return record["train_seconds"] / record["epochs"] if grew else record.get("seconds_per_epoch")


def cpu_seconds_per_epoch(record: Record) -> float | None:
    """Of the processor, which other processes on the machine do not lengthen; None of another device."""
    found = record["curves"].get("cpu_seconds") if record.get("device") == "cpu" else None
    return fmean(found) if found else None


def training_flops(record: Record) -> float | None:
    """FLOPs of the whole run, forward and backward: per image x batch x steps. None where the record cannot tell."""
    config = record.get("config") or {}
    batch = (config.get("data") or {}).get("batch_size") or config.get("batch_size")
    parts = (record.get("flops_per_image"), batch, record.get("steps"))
    return None if None in parts else float(parts[0]) * parts[1] * parts[2]


def ratios(experiment: Experiment, block: Block) -> list[dict[str, Any]]:
    """`paper.ratios`: seconds per epoch, of clock and processor, on each machine that ran both sides; training FLOPs
    per image."""
    out = []
    for ask in experiment.paper.get("ratios") or []:
        sides = [[row for row in block.rows if agrees(ask[side], row.cell)] for side in ("of", "over")]
        paper = [
            [p for row in rows if (p := experiment.published(row.cell).get("seconds_per_epoch"))] for rows in sides
        ]
        entry = {
            "name": " / ".join(experiment.name_of(ask[side]) for side in ("of", "over")),
            "paper": fmean(paper[0]) / fmean(paper[1]) if block.own_data and all(paper) else None,
            "flops": None,
            "seconds": {},
            "cpu_seconds": {},
        }
        flops = [[v for row in rows for v in row.values("flops_per_image")] for rows in sides]
        if all(flops):
            entry["flops"] = fmean(flops[0]) / fmean(flops[1])
        for machine in block.hardware:
            for key, of in (("seconds", seconds_per_epoch), ("cpu_seconds", cpu_seconds_per_epoch)):
                runs = [[r for row in rows for r in row.finished if hardware(r) == machine] for rows in sides]
                on = [[value for r in side if (value := of(r)) is not None] for side in runs]
                if all(on):
                    entry[key][machine] = (fmean(on[0]), fmean(on[1]))
        out.append(entry)
    return out
