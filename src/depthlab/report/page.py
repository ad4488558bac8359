"""What a report says of one experiment, before it is written in a format: tables, figures, verdicts, notes.

`text` writes it for the terminal, as Markdown and CSV, `html` as a page. It is the same for the same records.
"""

import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from depthlab.problem import Problem
from depthlab.report import claims, figures
from depthlab.report.claims import Verdict
from depthlab.report.experiments import Experiment
from depthlab.report.given import Drawn, Given, Notes, draw
from depthlab.report.tables import (
    Block,
    Row,
    cell_key,
    hardware,
    ratios,
    seconds_per_epoch,
    summary,
    tabulate,
    training_flops,
)  # fmt: skip

KINDS = (claims.SUPPORTED, claims.NOT_SUPPORTED, claims.INCONCLUSIVE, claims.NOT_RUN)
NOT_THEIRS = "Not in the paper: "
RULE = (
    "A claim is judged on the longest, most precise runs that there are for it; lengths and precisions are never mixed."
    " One-sided Welch tests at .1 both ways, unless the claim says otherwise; n: runs per cell."
)
YEAR = re.compile(r".*?(?:\b(?:19|20)\d\d\.|$)", re.DOTALL)
METRICS = {
    "test_error": "error %", "test_loss": "test loss", "train_error": "training error %", "train_loss": "training loss"
}  # fmt: skip
DIGITS = {"test_loss": 4, "train_loss": 4, "parameters": 0, "steps": 0}  # behind the point; 2 of the others
LEGEND = {
    "†": "† not the recipe's full length: the budget scales every epoch count",
    "‡": "‡ reduced precision",
}


@dataclass
class Section:
    """A table with its title and the lines below it; `figures` are names in `Page.figures`."""

    title: str = ""
    header: list[str] = field(default_factory=list)
    body: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    block: Block | None = None
    figures: list[str] = field(default_factory=list)


@dataclass
class Page:
    """`figures` (PNG) and `tables` (rows of a CSV) by the end of their file's name, "" for the first; `problems` are
    lines on records that could not be read; `costs` training FLOPs of one run by `tables.cell_key`, where known."""

    experiment: Experiment
    notes: Notes
    blocks: list[Block] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    lacking: str = ""  # what could not be computed here

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of all tables, other recipes' too."""
        return [r for block in self.blocks for row in [*block.rows, *block.others] for r in row.records]

    def set_cost(self, row: Row, flops: float | None) -> None:
        if flops is not None:
            self.costs[cell_key(row.cell)] = flops


def gather(
    experiment: Experiment,
    records: list[dict[str, Any]],
    problems: list[str] = (),
    expected: Any = None,
    compose: Callable[..., dict[str, Any]] | None = None,
    build: Callable[..., Any] | None = None,
    still: bool = True,
    empty: bool = True,
) -> Page:
    """Everything the report of an experiment says.

    Args:
        problems: lines on records that could not be read.
        expected: see `tables.tabulate`.
        compose, build: for figures that compute, see `given.Given`.
        still: draw training curves, too, of which the HTML page has its own to zoom.
        empty: tables and figures of an experiment without any run, too; else its verdicts only.
    """
    page = Page(experiment, Notes(experiment), problems=list(problems))
    page.blocks = tabulate(experiment, records, expected) if experiment.runs else []
    if not empty and page.blocks and not page.records:
        page.verdicts = judging(experiment, page.blocks)
        return page
    csvs = defaultdict(list)
    for block in page.blocks or [None]:
        own = []
        if block:
            cells = [csv_row(experiment, block, row) for row in [*block.rows, *block.others]]
            csvs[""] += cells
            shown = table(experiment, block, page.notes, cells)
            own.append(Section(heading(block), *shown, closing(experiment, block)))
        given = Given(experiment, page.notes, block, compose, build)
        drawn = drawing(given) if still or experiment.paper.get("figure") else Drawn()
        about = {"data": block.data, "budget": block.budget, "precision": block.precision} if block else {}
        for name, found in drawn.tables.items():
            title = ", ".join([found.title, f"budget {block.budget:g}, {block.precision}"] if block else [found.title])
            own.append(Section(title, found.header, found.lines))
            csvs[name] += [about | row for row in found.rows]
        own = own or [Section()]
        own[-1].lines.extend([*drawn.lines, drawn.lacking] if drawn.lacking else drawn.lines)
        page.lacking = page.lacking or drawn.lacking
        further = slug(block) if page.figures else ""
        for name, figure in drawn.figures.items():
            end = "".join(f".{part}" for part in (name, further) if part)
            page.figures[end] = figures.png(figure)
            own[-1].figures.append(end)
        for section in own:
            section.block = block
        page.sections += own
    page.tables = dict(csvs)
    page.verdicts = judging(experiment, page.blocks)
    for verdict in page.verdicts:
        says(page, verdict)  # numbers its footnote
    return page


def drawing(given: Given) -> Drawn:
    """What the experiment's function draws; where it stumbles over a record, that in a line: the rest still stands."""
    try:
        return draw(given)
    except Problem:
        raise
    except Exception as error:
        return Drawn(lines=[f"This figure could not be drawn: {stumble(error)}."])


def judging(experiment: Experiment, blocks: list[Block]) -> list[Verdict]:
    """`claims.judge`; a claim whose quantity stumbles over a record is not tested, and says so."""
    found = []
    for claim in experiment.paper.get("claims") or []:
        alone = replace(experiment, paper=experiment.paper | {"claims": [claim]})
        try:
            found += claims.judge(alone, blocks)
        except Exception as error:
            found.append(Verdict(claim, claims.NOT_RUN, f"could not be tested: {stumble(error)}"))
    return found


def stumble(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})".split())


def says(page: Page, verdict: Verdict) -> str:
    """The claim in the paper's sense, with the marks of its footnotes."""
    note = verdict.claim.get("note")
    return plain(verdict) + (page.notes.mark(" ".join(note.split())) if note else "")


def plain(verdict: Verdict) -> str:
    return NOT_THEIRS * bool(verdict.claim.get("ours")) + " ".join(verdict.claim["says"].split())


def paper_value(verdict: Verdict) -> str:
    """The paper's own value of what is estimated, of each part: `1.39`, `0.17; 1.8`."""
    values = [part.claim.get("paper") for part in verdict.parts or [verdict]]
    return "; ".join("-" if value is None else f"{value:g}" for value in values) if any(
        value is not None for value in values
    ) else ""  # fmt: skip


def evidence(verdict: Verdict) -> str:
    """On which runs a verdict rests: `budget 0.05 †, bf16-mixed ‡`, `computed`; "" where there is nothing."""
    block = verdict.block
    if verdict.verdict == claims.NOT_RUN:
        return ""
    return budget(block) if block else "computed"


def budget(block: Block) -> str:
    return f"budget {block.budget:g}{' †' * (block.budget != 1)}, {block.precision}{' ‡' * ('‡' in block.marks)}"


def lacking(page: Page, verdict: Verdict) -> str:
    """`; missing: 9 runs, 12.2 PFLOP`: of the cells of a claim that have none; the cost where it is known."""
    rows = {id(row): row for row in verdict.missing}.values()
    runs = sum(len(row.missing) for row in rows)
    costs = [len(row.missing) * cost for row in rows if (cost := page.costs.get(cell_key(row.cell))) is not None]
    cost = f", {sum(costs) / 1e15:.3g} PFLOP" if runs and len(costs) == len(rows) else ""
    return f"; missing: {runs} run{'s' * (runs > 1)}{cost}" if runs else ""


def judged(page: Page) -> list[dict[str, Any]]:
    """The verdicts in words; `parts` with theirs, `marks` of the runs they rest on."""
    return [
        {
            "id": v.claim["id"], "says": says(page, v), "plain": plain(v), "ours": bool(v.claim.get("ours")),
            "paper": paper_value(v), "why": v.why, "parts": [f"{part.why} ({part.verdict})" for part in v.parts],
            "lacking": lacking(page, v), "evidence": evidence(v), "verdict": v.verdict,
            "marks": v.block.marks if v.block and evidence(v) else "",
        }
        for v in page.verdicts
    ]  # fmt: skip


def counts(verdicts: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Verdict -> number of the paper's claims that came to it; `claims`, all of them. Questions of ours apart."""
    theirs = [v["verdict"] for v in verdicts if not v["ours"]]
    return {"claims": len(theirs)} | {kind: theirs.count(kind) for kind in KINDS}


def by_paper(views: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Things with the `id` of an experiment by its folder, a paper's; those of no paper, "", at the end."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for view in views:
        groups.setdefault(view["id"].rpartition("/")[0], []).append(view)
    return dict(sorted(groups.items(), key=lambda group: (not group[0], group[0])))


def cited(views: Sequence[dict[str, Any]]) -> str:
    """The paper's citation, as most of its experiments have it, to the year; what follows is of each."""
    found = Counter(YEAR.match(view["cite"] or view["id"])[0].removeprefix("After ") for view in views)
    return found.most_common(1)[0][0]


def in_order(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By id, B2 before B10."""
    return sorted(verdicts, key=lambda v: [(len(part), part) for part in re.findall(r"\d+|\D+", v["id"])])


def provenance(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`versions`: package -> those found; `commits` and `hardware`: name -> number of runs."""
    versions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            versions[name].add(str(version))
    gits = [record.get("git") or {} for record in records]
    dirty = " (with uncommitted changes)"
    commits = Counter(f"{(git.get('commit') or 'unknown')[:12]}{dirty * bool(git.get('dirty'))}" for git in gits)
    machines = Counter(hardware(record) for record in records)
    return {
        "versions": {name: sorted(found) for name, found in sorted(versions.items())},
        "commits": dict(sorted(commits.items())),
        "hardware": dict(machines.most_common()),
    }


def heading(block: Block) -> str:
    """`cifar100, budget 0.05 †, bf16-mixed ‡: 3 of 18 runs on AMD EPYC, 2 threads (3)`"""
    machines = "; ".join(f"{name} ({n})" for name, n in block.hardware.items())
    data = [block.data + ("" if block.own_data else " (not the experiment's data)")] if block.data else []
    return f"{', '.join([*data, budget(block)])}: {block.count}" + (f" on {machines}" if machines else "")


def table(
    experiment: Experiment, block: Block, notes: Notes, numbers: list[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a block, as printed; `numbers` are its rows of the CSV."""
    published = experiment.paper.get("published") or []
    paper = block.own_data and any(experiment.metric in entry for entry in published)
    metric, digits = METRICS.get(experiment.metric, experiment.metric), DIGITS.get(experiment.metric, 2)
    times = block.own_data and any("seconds_per_epoch" in entry for entry in published)
    header = [experiment.label(axis) for axis in experiment.axes]
    header += [f"paper: {metric}"] * paper + [f"ours: {metric}"] + ["difference"] * paper + ["epochs"]
    header += ["paper: s/epoch"] * times + ["ours: s/epoch", "GFLOP/image", "PFLOP/run"]
    body = []
    for row, found in zip([*block.rows, *block.others], numbers, strict=True):
        published = experiment.published(row.cell) if block.own_data else {}
        line = [experiment.label(value).rstrip(",") for value in row.cell.values()]
        if row.differs:
            line[-1:] = [(line or [""])[-1] + notes.mark(f"Another recipe, not in the row above: {row.differs}.")]
        if paper:
            line.append(number(published.get(experiment.metric), digits) + notes.at(row.cell, experiment.metric))
        line.append(ours(experiment, row, found) + notes.at(row.cell, "ours"))
        if paper:
            difference = found["difference"]
            line.append("" if difference is None else f"{difference:+.{digits}f}{block.marks}")
        line.append(_epochs(row.only("epochs"), published.get("epochs")))
        if times:
            line.append(number(published.get("seconds_per_epoch"), 0) + notes.at(row.cell, "seconds_per_epoch"))
        line.append(" / ".join(f"{mean:.3g}" for _, mean in seconds(row)))
        line.append(number(found["flops_per_image"], 3, 1e9))
        line.append("" if found["training_flops"] is None else f"{found['training_flops'] / 1e15:.3g}")
        body.append(line)
    return header, body


def ours(experiment: Experiment, row: Row, found: dict[str, Any]) -> str:
    """`27.12 ± 0.21 (3)`, `27.12 (1 of 3), 1 diverged`, `- (0 of 3)`."""
    mean, std, n = (found[key] for key in (f"{experiment.metric}_mean", f"{experiment.metric}_std", "n"))
    count = f"{n} of {len(row.wanted)}" if n < len(row.wanted) else f"{n}"
    diverged = f"{len(row.diverged)} diverged" if row.diverged else ""
    if mean is None:
        return f"- ({count}){', ' * bool(diverged)}{diverged}"
    digits = DIGITS.get(experiment.metric, 2)
    number = f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")
    return f"{number} ({count}){', ' * bool(diverged)}{diverged}"


def seconds(row: Row) -> list[tuple[str, float]]:
    """Seconds per epoch on each machine, in the order of the machines' names: times of two machines have no mean."""
    machines = sorted({hardware(r) for r in row.finished})
    found = {m: [s for r in row.finished if hardware(r) == m and (s := seconds_per_epoch(r))] for m in machines}
    return [(machine, fmean(values)) for machine, values in found.items() if values]


def closing(experiment: Experiment, block: Block) -> list[str]:
    """Lines under a block: ratios, what the marks mean, and the commands of what is missing."""
    lines = []
    for ratio in ratios(experiment, block):
        parts = [f"paper {ratio['paper']:.2f}"] if ratio["paper"] else []
        parts += [
            f"ours {of / over:.2f} ({of:.3g} s / {over:.3g} s, {m})" for m, (of, over) in ratio["seconds"].items()
        ]
        parts += [f"of the processor {of / over:.2f} ({m})" for m, (of, over) in ratio["cpu_seconds"].items()]
        parts += [] if ratio["seconds"] else ["ours not measured on one machine"]
        parts += [f"training FLOPs {ratio['flops']:.2f}"] if ratio["flops"] else []
        lines.append(f"Seconds per epoch, {ratio['name']}: {'; '.join(parts)}.")
    if any(len(seconds(row)) > 1 for row in block.rows):
        lines.append("Seconds per epoch a / b: on " + " / ".join(sorted(block.hardware)) + ", where measured.")
    lines += [f"{LEGEND[mark]}." for mark in block.marks]
    missing = [row for row in block.rows if row.missing]
    if missing:
        other = {"budget": block.budget, "trainer.precision": block.precision, "data": block.data}
        lines.append(f"Missing: {sum(len(row.missing) for row in missing)} runs. All that is missing, or cell by cell:")
        lines.append("    " + experiment.command(**other))
        lines += ["    " + experiment.command(row.cell, row.missing, **other) for row in missing]
    return lines


def csv_row(experiment: Experiment, block: Block, row: Row) -> dict[str, Any]:
    """One row of the CSV: every number in full precision, None where there is none."""
    mean, std, n = summary(row.values(experiment.metric))
    published = experiment.published(row.cell) if block.own_data else {}
    paper = published.get(experiment.metric)
    times = seconds(row)
    return {
        "experiment": experiment.id, "data": block.data, "budget": block.budget, "precision": block.precision,
        **row.cell, "other_recipe": row.differs or None,
        f"paper_{experiment.metric}": paper, f"{experiment.metric}_mean": mean, f"{experiment.metric}_std": std,
        "n": n, "n_diverged": len(row.diverged), "n_missing": len(row.missing),
        "difference": None if mean is None or paper is None else mean - paper,
        "paper_epochs": published.get("epochs"), "epochs": row.only("epochs"),
        "paper_seconds_per_epoch": published.get("seconds_per_epoch"),
        "seconds_per_epoch": "; ".join(repr(mean) for _, mean in times) or None,
        "hardware": "; ".join(machine for machine, _ in times) or None,
        "parameters": row.only("parameters"), "flops_per_image": row.only("flops_per_image"),
        "training_flops": summary([f for r in row.finished if (f := training_flops(r)) is not None])[0],
        "seeds": " ".join(str(r["seed"]) for r in row.finished) or None,
        f"{experiment.metric}s": " ".join(repr(v) for v in row.values(experiment.metric)) or None,
    }  # fmt: skip


def slug(block: Block) -> str:
    return "-".join(str(part) for part in (block.data, f"budget{block.budget:g}", block.precision) if part)


def number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _epochs(found: int | None, paper: int | None) -> str:
    if found is None:
        return "" if paper is None else f"(paper {paper})"
    return f"{found}" if paper in (None, found) else f"{found} (paper {paper})"
