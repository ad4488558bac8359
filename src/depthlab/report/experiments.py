"""What an experiment file asks for: the sweep's cells and seeds, and the published numbers beside them.

The file is a Hydra configuration; here it is read as plain YAML, so that a report needs no Hydra:

    hydra.sweeper.params    the axes of the table, in this order; `seed` is what a cell averages over
    defaults                `override /data: cifar100` fixes the data set
    budget, trainer.precision    the experiment's own, where it sets them; a swept `trainer` compares precisions
    paper                   title, cite, labels, published, notes, ratios, leave_out (see `Experiment`); figure, a
                            function that draws, and its options (see `given`); padding and rates are for the
                            file's own interpolations
"""

import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from depthlab.problem import Problem
from depthlab.records import WHEN

Cell = dict[str, Any]  # axis -> value, e.g. {"arch": "plain11", "sched": "sgd"}
DURING = "/analysis@analyses."  # an entry of the defaults list

PAPER_KEYS = {
    "title", "cite", "url", "metric", "labels", "published", "notes", "ratios", "leave_out", "padding", "rates",
    "step_sizes", "claims", "figure", "options",
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper.

    `paper["published"]` is a list of cells with their numbers (`{arch: plain11, sched: sgd, test_error: 28.48, ...}`;
    a number holds for every cell that agrees with the axes it names), `paper["notes"]` a list of
    `{at: {sched: sgdr}, column: test_error, text: ...}`, `paper["ratios"]` a list of `{of: {...}, over: {...}}`,
    `paper["labels"]` the printed names of axes and values, `paper["leave_out"]` combinations that are no cells
    (`{arch: ml50, grow: multilevel}`).
    """

    id: str
    axes: dict[str, list[Any]]
    seeds: list[Any]
    paper: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    budget: float = 1.0
    precision: str = "32-true"
    runs: bool = True  # False: nothing is swept, `paper["figure"]` computes
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)  # during training: {analysis: its file, options}

    @property
    def metric(self) -> str:
        return self.paper.get("metric", "test_error")

    @property
    def title(self) -> str:
        return self.paper.get("title") or self.id

    def cells(self) -> list[Cell]:
        cells = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        return [cell for cell in cells if not any(agrees(no, cell) for no in self.paper.get("leave_out") or [])]

    def published(self, cell: Cell) -> dict[str, Any]:
        """The paper's numbers for a cell; {} where the paper has none."""
        numbers: dict[str, Any] = {}
        for entry in self.paper.get("published") or []:
            if agrees(entry, cell):
                numbers |= {key: value for key, value in entry.items() if key not in self.axes}
        return numbers

    def notes(self, cell: Cell, column: str) -> list[int]:
        """Which of `paper.notes` (by position) touch this cell's number in this column."""
        return [
            i
            for i, note in enumerate(self.paper.get("notes") or [])
            if column == note.get("column", self.metric)
            and any(agrees(at, cell) and at.keys() <= cell.keys() for at in as_list(note.get("at", {})))
        ]

    def label(self, value: Any) -> str:
        return str((self.paper.get("labels") or {}).get(value, value))

    def name_of(self, cell: Cell) -> str:
        return " ".join(self.label(value) for value in cell.values()) or self.id

    def command(self, cell: Cell | None = None, seeds: list[Any] = (), **other: Any) -> str:
        """The command that trains a cell's `seeds`; `other` (budget, data, ...) where not the file's own."""
        own = {"budget": self.budget, "data": self.data, "trainer.precision": self.precision}
        choices = dict(cell or {}) | ({"seed": ",".join(map(str, seeds))} if seeds else {})
        choices |= {key: value for key, value in other.items() if value != own.get(key)}
        overrides = [f"{key}={_cli(value)}" for key, value in choices.items()]
        return " ".join(["python src/train.py", f"experiment={self.id}", *overrides])

    def analysis_command(self, name: str, folders: list[str], again: bool = False) -> str:
        """The command that measures finished runs so; `again` where other measurements are in the way."""
        options = {"analysis": name} | self.analyses.get(name, {})
        choice = options.pop("analysis")
        choices = {"run": folders, "analysis": choice} | {f"analysis.{key}": value for key, value in options.items()}
        choices |= {"analysis.name": name} if choice != name else {}
        choices |= {"force": True} if again else {}
        return " ".join(["python src/analyze.py", *(f"{key}={_cli(value)}" for key, value in choices.items())])


def load_experiment(path: str | Path, id: str) -> Experiment:
    """Read an experiment file.

    Raises:
        Problem: it is no experiment file, naming the key.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise Problem(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    paper = raw.get("paper") or {}
    if unknown := sorted(paper.keys() - PAPER_KEYS):
        raise Problem(f"{path}: paper.{unknown[0]} is not known; known are {', '.join(sorted(PAPER_KEYS))}")
    params = ((raw.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    if not params and not paper.get("figure"):
        raise Problem(
            f"{path}: sweeps nothing (hydra.sweeper.params) and names no function that computes (paper.figure)"
        )
    axes = {key: sweep_values(value, f"{path}: hydra.sweeper.params.{key}") for key, value in params.items()}
    seeds = axes.pop("seed", [raw.get("seed", 0)])
    defaults = [item for entry in raw.get("defaults") or [] if isinstance(entry, dict) for item in entry.items()]
    fixed = {key.split("/")[-1]: choice for key, choice in defaults}
    analyses = {key.removeprefix(DURING): {"analysis": choice} for key, choice in defaults if key.startswith(DURING)}
    for key, section in (raw.get("analyses") or {}).items():
        analyses.setdefault(key, {}).update({k: v for k, v in section.items() if k not in WHEN})
    for number, entry in enumerate(paper.get("published") or []):
        for key in entry.keys() & axes.keys():
            if entry[key] not in axes[key]:
                where = f"{path}: paper.published[{number}].{key}"
                raise Problem(f"{where} is {entry[key]!r}, not in the sweep {axes[key]}")
    precision = str((raw.get("trainer") or {}).get("precision", "32-true"))
    return Experiment(
        id=id, axes=axes, seeds=seeds, paper=paper, data=None if "data" in axes else fixed.get("data"),
        budget=float(raw.get("budget", 1.0)),
        precision=" and ".join(axes["trainer"]) if "trainer" in axes else precision,
        runs=bool(params), analyses=analyses,
    )  # fmt: skip


def sweep_values(text: Any, key: str) -> list[Any]:
    """The values of one swept key: Hydra's comma list, or `range(a, b)`."""
    if not isinstance(text, str):
        return [text]
    if whole := re.fullmatch(r"range\((?:(-?\d+),\s*)?(-?\d+)\)", text.strip()):
        return list(range(int(whole[1] or 0), int(whole[2])))
    if set(text) & set("()[]{}"):
        raise Problem(f"{key} is {text!r}; a report reads comma lists (a,b,c) and range(a,b)")
    return [_number(part.strip()) for part in text.split(",")]


def agrees(partial: dict[str, Any], cell: Cell) -> bool:
    """Whether `partial` says nothing else than `cell` on the axes both name."""
    return all(cell[key] == value for key, value in partial.items() if key in cell)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _cli(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_cli, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
