"""A report as text: a table for the terminal, Markdown with figures, notes and provenance, CSV with every digit.

Files are written beside and renamed, hold no time of writing, and are the same for the same records.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from depthlab.problem import Problem
from depthlab.records import write_atomically
from depthlab.report.claims import NOT_RUN
from depthlab.report.experiments import Experiment
from depthlab.report.page import (
    KINDS,
    LEGEND,
    RULE,
    Page,
    budget,
    by_paper,
    cited,
    counts,
    gather,
    in_order,
    judged,
    number,
    provenance,
)
from depthlab.report.tables import hardware

OURS = "Ours: mean ± sample standard deviation (number of seeds) of the last epoch's weights, no selection."
VERDICTS = ("claim", "the paper says", "paper", "ours", "evidence", "verdict")


def write_report(
    experiment: Experiment,
    records: list[dict[str, Any]],
    problems: list[str],
    out: str | Path,
    *more: Any,
    **named: Any,
) -> tuple[str, list[Path]]:
    """`page.gather` and `write` in one."""
    return write(gather(experiment, records, problems, *more), out)


def write(page: Page, out: str | Path, formats: tuple[str, ...] = ("md", "csv")) -> tuple[str, list[Path]]:
    """Write `<out>/<experiment id>.{md,csv,png}`, further figures and tables as `<id>.<name>.{png,csv}`.

    Returns:
        The report as plain text, and the files written.
    """
    base = Path(out) / page.experiment.id
    links = [f"{base.name}{end}.png" for end in page.figures]
    files: dict[Path, bytes] = {}
    if "md" in formats:
        files[base.with_name(f"{base.name}.md")] = render(page, markdown=True, links=links).encode()
    if "csv" in formats:
        ends = {name: f".{name}" * bool(name) for name in page.tables}
        files |= {base.with_name(f"{base.name}{ends[name]}.csv"): as_csv(rows) for name, rows in page.tables.items()}
    if "md" in formats:
        files |= {base.with_name(link): png for link, png in zip(links, page.figures.values(), strict=True)}
    base.parent.mkdir(parents=True, exist_ok=True)
    for kind in {"png" if form == "md" else form for form in formats} & {"png", "csv"}:
        for stale in {base.with_name(f"{base.name}.{kind}"), *base.parent.glob(f"{base.name}.*.{kind}")} - files.keys():
            stale.unlink(missing_ok=True)  # a figure of other records than the table's would lie
    for path, content in files.items():
        replace(path, content)
    return render(page, markdown=False), list(files)


def replace(path: Path, content: bytes) -> None:
    """Write beside and rename; the folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def render(page: Page, markdown: bool, links: Sequence[str] = ()) -> str:
    """The whole report, for a terminal or as Markdown."""
    experiment = page.experiment
    lines = [("# " if markdown else "") + f"{experiment.id}: {experiment.title}", ""]
    lines += [str(experiment.paper[key]) for key in ("cite", "url") if experiment.paper.get(key)]
    if page.blocks:
        lines += ["", OURS]
    for section in page.sections:
        lines += ["", *([("## " if markdown else "") + section.title, ""] if section.title else [])]
        lines += grid(section.header, section.body, markdown) if section.header else []
        lines += [""] if section.lines else []
        indented = [line.startswith("    ") for line in section.lines]
        for line, code, before in zip(section.lines, indented, [False, *indented], strict=False):
            lines += [""] * (markdown and code != before) + [line] + [""] * (markdown and not code)
    if page.verdicts:
        lines += ["", f"{'## ' * markdown}What the paper claims", ""]
        lines += verdict_table(page) if markdown else verdict_lines(page)
    for link in links:
        lines += ["", f"![{link}]({link})"]
    if page.notes.texts:
        lines += ["", "## Notes" if markdown else "Notes", ""]
        for number, note in enumerate(page.notes.texts, 1):
            lines += (
                [f"[{number}] {note}", ""] if markdown else wrap(f"[{number}] {note}", 118, subsequent_indent="    ")
            )
    if markdown:
        lines += where_from(page.records)
    if page.problems:
        lines += ["", "## Left out" if markdown else "Left out", "", *(f"- {problem}" for problem in page.problems)]
    return "\n".join(line.rstrip() for line in lines).replace("\n\n\n", "\n\n").strip() + "\n"


def verdict_table(page: Page) -> list[str]:
    body = [
        [v["id"], v["says"], v["paper"], v["why"] + v["lacking"], v["evidence"], f"**{v['verdict']}**"]
        for v in judged(page)
    ]
    return grid(list(VERDICTS), body, markdown=True)


def verdict_lines(page: Page) -> list[str]:
    """Two or more lines per claim: the verdict and what is claimed, then what was found and on which runs."""
    lines = []
    for v in judged(page):
        paper = f"Paper: {v['paper']}. " if v["paper"] else ""
        on = f" [{v['evidence']}]" if v["evidence"] else ""
        lines += wrap(f"{v['id']:4} {v['verdict'].upper()}: {v['says']}", 118, subsequent_indent=" " * 5)
        lines += wrap(f"{paper}{v['why']}{on}{v['lacking']}", 118, initial_indent=" " * 5, subsequent_indent=" " * 5)
    return lines


def overview(page: Page) -> str:
    """A line: `barz2018/table1         3 of 18 runs (budget 0.05 †, bf16-mixed ‡), B1 inconclusive, B3 not run`."""
    runs = [
        block.count + (f" ({budget(block)})" if block.marks else "")
        for block in page.blocks if block.own_data and block.records
    ]  # fmt: skip
    state = "; ".join(runs) or page.lacking.rstrip(".") or (NOT_RUN if page.experiment.runs else "computed")
    verdicts = [f"{v['id']} {v['verdict']}{' ' * bool(v['marks'])}{v['marks']}" for v in judged(page)]
    return f"{page.experiment.id:24} {'. '.join([state, ', '.join(verdicts)]) if verdicts else state}"


def summary(page: Page) -> dict[str, Any]:
    """What the tables of verdicts need of an experiment."""
    return {"id": page.experiment.id, "cite": page.experiment.paper.get("cite"), "verdicts": judged(page)}


BEGIN, END = "<!-- verdicts: `make results` writes from here -->", "<!-- to here -->"
COUNTED = "<!-- verdicts, counted: `make results` writes from here -->"


def renew(path: Path, views: Sequence[dict[str, Any]]) -> None:
    """Write the verdicts between the marks in a Markdown file: those of every claim, or `COUNTED`, a line per paper.

    Raises:
        Problem: it has no such marks.
    """
    text = path.read_text(encoding="utf-8")
    mark = COUNTED if COUNTED in text else BEGIN
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Problem(f"{path}: the verdicts stand between the lines\n{BEGIN}\n{END}\nor, counted, after\n{COUNTED}")
    papers = {cited(members): in_order([v for view in members for v in view["verdicts"]])
              for members in by_paper(views).values() if any(view["verdicts"] for view in members)}  # fmt: skip
    lines = counted(papers) + (every_verdict(papers) if mark == BEGIN else [])
    replace(path, "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"]).encode())


def counted(papers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How many claims of each paper came to what."""
    found = [(paper, counts(verdicts)) for paper, verdicts in papers.items()]
    body = [[paper, *(str(count[kind]) for kind in KINDS)] for paper, count in found]
    return grid(["paper", *KINDS], body, markdown=True)


def every_verdict(papers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How claims are judged, and a table per paper of those that were."""
    lines = ["", RULE, "", f"{'. '.join(LEGEND.values())}."]
    for paper, verdicts in papers.items():
        tested = [v for v in verdicts if v["verdict"] != NOT_RUN]
        body = [[v["id"], v["plain"], v["paper"], v["why"], v["evidence"], f"**{v['verdict']}**"] for v in tested]
        lines += ["", f"### {paper}", "", *(grid(list(VERDICTS), body, markdown=True) if body else [])]
        if rest := [v["id"] for v in verdicts if v["verdict"] == NOT_RUN]:
            lines += [""] * bool(body) + [f"Not run: {', '.join(rest)}."]
    return lines


def where_from(records: list[dict[str, Any]]) -> list[str]:
    """Where the numbers come from: software, commits, and every run with its folder."""
    if not records:
        return []
    about = provenance(records)
    lines = ["", "## Where the numbers come from", ""]
    lines += [f"- {name}: {', '.join(found)}" for name, found in about["versions"].items()]
    lines += [f"- commit: {', '.join(f'{name} ({n} runs)' for name, n in about['commits'].items())}", ""]
    header = ["run", "seed", "budget", "precision", "test error %", "hardware", "ended", "folder"]
    body = [
        [r["name"], str(r["seed"]), f"{r['budget']:g}", r["precision"], number(r.get("test_error"), 2),
         hardware(r), f"diverged at step {r.get('diverged_step')}" if r["diverged"] else "completed",
         r.get("folder", "")]
        for r in records
    ]  # fmt: skip
    return lines + grid(header, body, markdown=True)


def grid(header: list[str], body: list[list[str]], markdown: bool) -> list[str]:
    """Lines of an aligned table."""
    if markdown:
        header, *body = ([cell.replace("|", "\\|") for cell in line] for line in (header, *body))
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
