"""Write a report: a table for the terminal, Markdown with figure, notes and provenance, CSV with every digit.

Files are written beside and renamed, hold no time of writing, and are the same for the same records.
"""

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

from depthlab.report import figures
from depthlab.report.experiments import Experiment
from depthlab.report.given import Given, Notes, draw
from depthlab.report.tables import Block, Row, hardware, ratios, summary, tabulate, training_flops

METRICS = {
    "test_error": "error %", "test_loss": "test loss", "train_error": "training error %", "train_loss": "training loss"
}  # fmt: skip
LEGEND = {
    "†": "† not the recipe's full length (the budget scales every epoch count), so no verdict on it",
    "‡": "‡ reduced precision",
}


def write_report(
    experiment: Experiment,
    records: list[dict[str, Any]],
    problems: list[str],
    out: str | Path,
    expected: dict[str, dict[str, Any]] | None = None,
    compose: Callable[..., dict[str, Any]] | None = None,
    build: Callable[..., Any] | None = None,
) -> tuple[str, list[Path]]:
    """Write `<out>/<experiment id>.{md,csv,png}`, further figures and tables as `<id>.<name>.{png,csv}`.

    Args:
        problems: lines on records that could not be read; they are printed in the report.
        expected: see `tables.tabulate`.
        compose, build: for figures that compute, see `given.Given`.

    Returns:
        The report as plain text, and the files written.
    """
    base, notes = Path(out) / experiment.id, Notes(experiment)
    blocks = tabulate(experiment, records, expected) if experiment.runs else []
    sections, csvs, pngs = [], defaultdict(list), {}
    if blocks:
        csvs[""] = [csv_row(experiment, block, row) for block in blocks for row in [*block.rows, *block.others]]
    for block in blocks or [None]:
        own = [(heading(block), [table(experiment, block, notes), *closing(experiment, block)])] if block else []
        drawn = draw(Given(experiment, notes, block, compose, build))
        about = {"data": block.data, "budget": block.budget, "precision": block.precision} if block else {}
        for name, found in drawn.tables.items():
            title = ", ".join([found.title, f"budget {block.budget:g}, {block.precision}"] if block else [found.title])
            own.append((title, [(found.header, found.lines)]))
            csvs[name] += [about | row for row in found.rows]
        if own:
            own[-1][1].extend(drawn.lines)
        further = slug(block) if pngs else ""
        for name, figure in drawn.figures.items():
            pngs["".join(f".{part}" for part in (name, further) if part)] = figures.png(figure)
        sections += own
    links = [f"{base.name}{end}.png" for end in pngs]
    text = render(experiment, sections, notes, problems, blocks, markdown=False)
    page = render(experiment, sections, notes, problems, blocks, markdown=True, links=links)
    files = {base.with_name(f"{base.name}.md"): page.encode()}
    files |= {base.with_name(f"{base.name}{f'.{name}' * bool(name)}.csv"): as_csv(rows) for name, rows in csvs.items()}
    files |= {base.with_name(link): png for link, png in zip(links, pngs.values(), strict=True)}
    base.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "csv"):
        for stale in {base.with_name(f"{base.name}.{kind}"), *base.parent.glob(f"{base.name}.*.{kind}")} - files.keys():
            stale.unlink(missing_ok=True)  # a figure of other records than the table's would lie
    for path, content in files.items():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(content)
        beside.replace(path)
    return text, list(files)


def heading(block: Block) -> str:
    """`cifar100, budget 0.05 †, bf16-mixed ‡: 3 of 18 runs on AMD EPYC, 2 threads (3)`"""
    budget = f"budget {block.budget:g}" + (" †" if block.budget != 1 else "")
    precision = block.precision + (" ‡" if "‡" in block.marks else "")
    seeds = sum(len(row.wanted) - len(row.missing) for row in block.rows)
    machines = "; ".join(f"{name} ({n})" for name, n in block.hardware.items())
    data = [block.data + ("" if block.own_data else " (not the experiment's data)")] if block.data else []
    runs = f"{seeds} of {block.wanted} runs" + (f" on {machines}" if machines else "")
    return f"{', '.join([*data, budget, precision])}: {runs}"


def table(experiment: Experiment, block: Block, notes: Notes) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a block, as printed."""
    paper = bool(experiment.paper.get("published")) and block.own_data
    metric = METRICS.get(experiment.metric, experiment.metric)
    times = paper and any("seconds_per_epoch" in p for p in experiment.paper["published"])
    header = [experiment.label(axis) for axis in experiment.axes]
    header += [f"paper: {metric}"] * paper + [f"ours: {metric}"] + ["difference"] * paper + ["epochs"]
    header += ["paper: s/epoch"] * times + ["ours: s/epoch", "GFLOP/image", "PFLOP/run"]
    body = []
    for row in [*block.rows, *block.others]:
        number = csv_row(experiment, block, row)
        published = experiment.published(row.cell) if paper else {}
        line = [experiment.label(value) for value in row.cell.values()]
        if row.differs:
            line[-1:] = [(line or [""])[-1] + notes.mark(f"Another recipe, not in the row above: {row.differs}.")]
        if paper:
            line.append(_number(published.get(experiment.metric), 2) + notes.at(row.cell, experiment.metric))
        line.append(ours(experiment, row) + notes.at(row.cell, "ours"))
        if paper:
            difference = number["difference"]
            line.append("" if difference is None else f"{difference:+.2f}{block.marks}")
        line.append(_epochs(row.only("epochs"), published.get("epochs")))
        if times:
            line.append(_number(published.get("seconds_per_epoch"), 0) + notes.at(row.cell, "seconds_per_epoch"))
        line.append(" / ".join(f"{mean:.3g}" for _, mean in seconds(row)))
        line.append(_number(number["flops_per_image"], 3, 1e9))
        line.append("" if number["training_flops"] is None else f"{number['training_flops'] / 1e15:.3g}")
        body.append(line)
    return header, body


def ours(experiment: Experiment, row: Row) -> str:
    """`27.12 ± 0.21 (3)`, `27.12 (1 of 3), 1 diverged`, `- (0 of 3)`."""
    mean, std, n = summary(row.values(experiment.metric))
    count = f"{n} of {len(row.wanted)}" if n < len(row.wanted) else f"{n}"
    diverged = f"{len(row.diverged)} diverged" if row.diverged else ""
    if mean is None:
        return f"- ({count}){', ' * bool(diverged)}{diverged}"
    number = f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
    return f"{number} ({count}){', ' * bool(diverged)}{diverged}"


def seconds(row: Row) -> list[tuple[str, float]]:
    """Seconds per epoch on each machine, in the order of the machines' names: times of two machines have no mean."""
    machines = sorted({hardware(r) for r in row.finished})
    means = [(m, summary(row.values("seconds_per_epoch", lambda r, m=m: hardware(r) == m))[0]) for m in machines]
    return [(machine, mean) for machine, mean in means if mean is not None]


def closing(experiment: Experiment, block: Block) -> list[str]:
    """Lines under a block: ratios, what the marks mean, and the commands of what is missing."""
    lines = []
    for ratio in ratios(experiment, block):
        parts = [f"paper {ratio['paper']:.2f}"] if ratio["paper"] else []
        parts += [
            f"ours {of / over:.2f} ({of:.3g} s / {over:.3g} s, {m})" for m, (of, over) in ratio["seconds"].items()
        ]
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


def render(
    experiment: Experiment, sections: list, notes: Notes, problems: list[str], blocks: list[Block],
    markdown: bool, links: list[str] = (),
) -> str:  # fmt: skip
    """The whole report, for a terminal or as Markdown."""
    lines = [("# " if markdown else "") + f"{experiment.id}: {experiment.title}", ""]
    lines += [str(experiment.paper[key]) for key in ("cite", "url") if experiment.paper.get(key)]
    if blocks:
        lines += [
            "",
            "Ours: mean ± sample standard deviation (number of seeds) of the last epoch's weights, no selection.",
        ]
    for title, (first, *closing_lines) in sections:
        lines += ["", *([("## " if markdown else "") + title, ""] if title else []), *grid(*first, markdown)]
        lines += [""] if closing_lines else []
        indented = [line.startswith("    ") for line in closing_lines]
        for line, code, before in zip(closing_lines, indented, [False, *indented], strict=False):
            lines += [""] * (markdown and code != before) + [line] + [""] * (markdown and not code)
    for link in links:
        lines += ["", f"![{link}]({link})"]
    if notes.texts:
        lines += ["", "## Notes" if markdown else "Notes", ""]
        for number, note in enumerate(notes.texts, 1):
            lines += (
                [f"[{number}] {note}", ""] if markdown else wrap(f"[{number}] {note}", 118, subsequent_indent="    ")
            )
    if markdown:
        lines += provenance(blocks)
    if problems:
        lines += ["", "## Left out" if markdown else "Left out", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(line.rstrip() for line in lines).replace("\n\n\n", "\n\n").strip() + "\n"


def provenance(blocks: list[Block]) -> list[str]:
    """Where the numbers come from: software, commits, and every run with its folder."""
    runs = [r for block in blocks for row in [*block.rows, *block.others] for r in row.records]
    if not runs:
        return []
    versions: dict[str, Counter] = {}
    for record in runs:
        for name, version in (record.get("versions") or {}).items():
            versions.setdefault(name, Counter())[str(version)] += 1
    commits = Counter(
        f"{(git.get('commit') or 'unknown')[:12]}{' (with uncommitted changes)' * bool(git.get('dirty'))}"
        for git in ((record.get("git") or {}) for record in runs)
    )
    lines = ["", "## Where the numbers come from", ""]
    lines += [f"- {name}: {', '.join(sorted(found))}" for name, found in sorted(versions.items())]
    lines += [f"- commit: {', '.join(f'{name} ({n} runs)' for name, n in sorted(commits.items()))}", ""]
    header = ["run", "seed", "budget", "precision", "test error %", "hardware", "ended", "folder"]
    body = [
        [r["name"], str(r["seed"]), f"{r['budget']:g}", r["precision"], _number(r.get("test_error"), 2),
         hardware(r), f"diverged at step {r.get('diverged_step')}" if r["diverged"] else "completed",
         r.get("folder", "")]
        for r in runs
    ]  # fmt: skip
    return lines + grid(header, body, markdown=True)


def grid(header: list[str], body: list[list[str]], markdown: bool) -> list[str]:
    """Lines of an aligned table."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    edge, between = ("| ", " | ") if markdown else ("", "  ")
    rule = [("|" if markdown else "") + ("|" if markdown else "  ").join("-" * (w + 2 * markdown) for w in widths)]
    rule[0] += "|" * markdown
    lines = [edge + between.join(map(str.ljust, line, widths)) + edge[::-1] for line in [header, *body]]
    return [lines[0], *rule, *lines[1:]]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def slug(block: Block) -> str:
    return "-".join(str(part) for part in (block.data, f"budget{block.budget:g}", block.precision) if part)


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _epochs(found: int | None, paper: int | None) -> str:
    if found is None:
        return "" if paper is None else f"(paper {paper})"
    return f"{found}" if paper in (None, found) else f"{found} (paper {paper})"
