"""What the function of a figure (`paper.figure`, a dotted path) is given, and what it gives back.

    def figure(given: Given, <options>) -> Drawn

It is called once for each table of runs, which has one budget and one precision, so that numbers of two never meet in a
figure; and once without runs where an experiment sweeps nothing (no `hydra.sweeper.params`) and the function computes.
`paper.options` are its further arguments. Without `paper.figure` the training curves are drawn (`figures.curves`).
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from depthlab.problem import Problem
from depthlab.report.experiments import Experiment
from depthlab.report.tables import Block, Record, Row

CURVES = "depthlab.report.figures.curves"


class Notes:
    """Numbers footnotes in the order in which the report first needs them."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.texts: list[str] = []

    def mark(self, *texts: str) -> str:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        numbers = sorted(self.texts.index(text) + 1 for text in texts)
        return f" [{','.join(map(str, numbers))}]" if numbers else ""

    def at(self, cell: dict[str, Any], column: str) -> str:
        notes = self.experiment.paper.get("notes") or []
        return self.mark(*(" ".join(notes[i]["text"].split()) for i in self.experiment.notes(cell, column)))


class Table(NamedTuple):
    """`header` and `lines` as printed, `rows` with every digit for the CSV."""

    title: str
    header: list[str]
    lines: list[list[str]]
    rows: list[dict[str, Any]]


@dataclass
class Drawn:
    """`figures` and `tables` by name, "" for the first: `<experiment>.png`, `<experiment>.<name>.png` and so on.

    The CSV of an experiment with runs is that of its cells: there a table needs a name. `lines` are printed below, and
    `lacking`: what could not be computed here, for want of images.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    lacking: str = ""


@dataclass(frozen=True)
class Given:
    """What a figure may be drawn from.

    `block` has the runs (`block.rows`: a `Row` per cell, `row.finished` its records; a record is `result.json` and
    `folder`, where it lies), None without. `compose(*overrides)` is the resolved configuration of a run of this
    experiment, `build(config, section)` the object it describes. `notes.at(cell, column)` marks footnotes.
    """

    experiment: Experiment
    notes: Notes
    block: Block | None = None
    compose: Callable[..., dict[str, Any]] | None = None
    build: Callable[..., Any] | None = None

    @property
    def rows(self) -> list[Row]:
        """The cells that have finished runs."""
        return [row for row in (self.block.rows if self.block else []) if row.finished]

    def measured(self, name: str) -> list[tuple[Row, Record, Any]]:
        """(row, record, `depthlab.analysis.Result`) of every finished run that the analysis was made of, after its last
        epoch: during training (`analyses.<name>`) or later (src/analyze.py)."""
        return [(row, r, found) for row in self.rows for r in row.finished if (found := measurement(r, name))]

    def unmeasured(self, name: str) -> list[str]:
        """A line with the command for the finished runs that `measured` leaves out, if there are any."""
        lacking = [r for row in self.rows for r in row.finished if not file_of(r, name)]
        with_other_options = any(file_of(r | {"asked": {}}, name) for r in lacking)
        return self.to_measure(name, [r["folder"] for r in lacking], again=with_other_options)

    def to_measure(self, name: str, runs: list[str], what: str = "runs", again: bool = False) -> list[str]:
        """The line with the command for the runs in these folders; `again` replaces what was measured there."""
        command = self.experiment.analysis_command(name, runs, again)
        return [f"Not measured: {len(runs)} {what}.", f"    {command}"] if runs else []


def measurement(record: Record, name: str) -> Any:
    """The `Result` of an analysis of the run's last weights, None where there is none."""
    from depthlab.analysis import files

    file = file_of(record, name)
    found = files.read(Path(record["folder"]), file) if file else None
    return found and found[0]


def scalar(record: Record, analysis: str, key: str) -> float | None:
    """A number of an analysis of the run's last weights, None where it was not measured."""
    found = measurement(record, analysis)
    return found and found.scalars[key]


def file_of(record: Record, name: str) -> str | None:
    """What it was written as, with the options that the experiment asks for."""
    from depthlab.analysis import asked

    return asked.last_weights(record, Path(record["folder"]), name, record.get("asked", {}).get(name))


def draw(given: Given) -> Drawn:
    """Call the experiment's function.

    Raises:
        Problem: there is no such function, or `paper.options` are not its arguments.
    """
    paper, where = given.experiment.paper, f"experiment={given.experiment.id}"
    path = paper.get("figure") or CURVES
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Problem(f"{where}: paper.figure={path} cannot be imported ({error})") from error
    options = paper.get("options") or {}
    try:
        inspect.signature(function).bind(given, **options)
    except TypeError as error:
        raise Problem(f"{where}: paper.options: {error} ({path})") from error
    return function(given, **options)
