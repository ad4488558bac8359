"""The report as one HTML file without network: tables, figures, claims, curves to zoom, all runs to filter and sort.

Jinja fills page.html.j2; Plotly draws the curves, DataTables (in itables' bundle) the table of runs; both stand in it.
"""

import json
import os
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthlab.problem import Problem
from depthlab.report.claims import NOT_RUN
from depthlab.report.figures import COLOURS, band, evaluated_on
from depthlab.report.page import (
    KINDS,
    LEGEND,
    RULE,
    Page,
    Section,
    by_paper,
    cited,
    counts,
    in_order,
    judged,
    provenance,
)
from depthlab.report.tables import Block, Row, hardware
from depthlab.report.text import replace

FURTHER = "further"  # experiments of no paper
EXTRA = "--format html needs jinja2, plotly and itables: pip install 'depthlab[report]'; md and csv need nothing"
LONG = 18  # rows
LONGEST = 5000  # characters of a command: nobody reads the folders of a thousand runs on a page
DASHES = ["solid", "dash", "dot", "dashdot"]
COLUMNS = [  # title, what the filter is, value
    ("run", "text", lambda r: r["name"]),
    ("experiment", "choice", lambda r: r.get("study")),
    ("arch", "choice", lambda r: r["arch"]),
    ("sched", "choice", lambda r: r["sched"]),
    ("grow", "choice", lambda r: r.get("grow")),
    ("data", "choice", lambda r: r["data"]),
    ("seed", "number", lambda r: r["seed"]),
    ("budget", "number", lambda r: r["budget"]),
    ("precision", "choice", lambda r: r["precision"]),
    ("test error %", "number", lambda r: rounded(r.get("test_error"))),
    ("training loss", "number", lambda r: rounded(r.get("train_loss"))),
    ("epochs", "number", lambda r: r["epochs"]),
    ("s/epoch", "number", lambda r: rounded(r.get("seconds_per_epoch"))),
    ("hardware", "choice", hardware),
    ("ended", "choice", lambda r: f"diverged at step {r.get('diverged_step')}" if r["diverged"] else "completed"),
]


def available() -> bool:
    try:
        import itables  # noqa: F401
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def write_page(
    views: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], problems: Sequence[str], path: Path
) -> Path:
    """Write the page of some experiments.

    Args:
        views: what `experiment` made of each.
        records: all that were found, for the table of runs.
        problems: lines on what could not be read.

    Raises:
        Problem: a library it needs is not installed.
    """
    try:
        from itables.utils import read_package_file
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise Problem(f"{EXTRA} ({error})") from error
    here = Path(__file__).parent
    env = Environment(
        loader=PackageLoader("depthlab.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    raw = {
        "css": (here / "page.css").read_text(), "js": (here / "page.js").read_text(), "plotly_js": get_plotlyjs(),
        "tables_css": read_package_file("html/dt_bundle.css"), "tables_js": read_package_file("html/dt_bundle.js"),
    }  # fmt: skip
    text = env.get_template("page.html.j2").render(
        title="depthlab: four papers, and our runs beside them" if len(views) > 1 else f"depthlab: {views[0]['id']}",
        papers=(found := papers(views)),
        cited=sum(paper["anchor"] != FURTHER for paper in found),
        experiments=len(views),
        ran=sum(view["state"] == "" for view in views),
        diverged=sum(r["diverged"] for r in records),
        kinds=KINDS,
        rule=RULE,
        legend=". ".join(f"{line[0].upper()}{line[1:]}" for line in LEGEND.values()) + ".",
        runs=runs(records, path.parent),
        provenance=sources(records),
        problems=problems,
        **{name: Markup(content) for name, content in raw.items()},
    )
    replace(path, text.encode())
    return path


def papers(views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Experiments by the folder of their id: a paper each, what belongs to none at the end."""
    found = []
    for name, members in by_paper(views).items():
        verdicts = in_order([v | {"anchor": view["anchor"]} for view in members for v in view["verdicts"]])
        found.append({
            "short": name or FURTHER, "anchor": name or FURTHER,
            "cite": cited(members) if name else "Further experiments",
            "experiments": members, "verdicts": verdicts,
            "counts": counts(verdicts),
        })  # fmt: skip
    return found


def experiment(page: Page) -> dict[str, Any]:
    """One experiment for the template."""
    asked, anchor = page.experiment, page.experiment.id.replace("/", "-")
    own = asked.paper.get("figure")
    sections = []
    for place, section in enumerate(page.sections):
        first = section.block is not None and section.block is not (page.sections[place - 1].block if place else None)
        charts = curves(page, section.block, f"{anchor}-{place}") if first else []
        sections.append({
            "title": section.title, "header": [cell(text, anchor)["html"] for text in section.header],
            "folded": folded(section),
            "body": [[cell(text, anchor) for text in line] for line in section.body],
            "lines": paragraphs(section), "curves": charts, "drawn_by_curves": not own,
            "figures": [
                {"src": f"data:image/png;base64,{b64encode(page.figures[end]).decode()}", "name": end}
                for end in section.figures
                if own or not charts
            ],
        })  # fmt: skip
    ran = not asked.runs or any(block.records for block in page.blocks)
    return {
        "id": asked.id, "leaf": asked.id.rpartition("/")[2], "anchor": anchor, "title": asked.title,
        "cite": asked.paper.get("cite"), "url": asked.paper.get("url"), "state": "" if ran else NOT_RUN,
        "sections": sections, "notes": page.notes.texts,
        "verdicts": [v | {"says": cell(v["says"], anchor)["html"]} for v in judged(page)],
    }  # fmt: skip


def folded(section: Section) -> str:
    """What stands instead of a long table of cells of which none has been run."""
    empty = section.block is not None and not section.block.records and not section.block.others
    return f"{len(section.body)} cells, none of them run" if empty and len(section.body) > LONG else ""


def cell(text: str, anchor: str) -> dict[str, Any]:
    """A cell's HTML, the marks of footnotes ("27.1 [1,2]") raised and linked to their notes."""
    from markupsafe import Markup, escape

    plain, mark, _ = re.fullmatch(r"(.*?)(?: \[(\d+(?:,\d+)*)\])?(\s*)", text, re.DOTALL).groups()
    links = [Markup('<a href="#{}-n{}">{}</a>').format(anchor, n, n) for n in (mark or "").split(",") if n]
    html = escape(plain) + (Markup("<sup>{}</sup>").format(Markup(",").join(links)) if links else "")
    return {"html": html, "number": bool(re.match(r"[-+(]?\d", plain)) or plain.startswith("- (")}


def paragraphs(section: Section) -> list[dict[str, str]]:
    """The lines below a table; those of commands go into the line before them, to be unfolded."""
    found: list[dict[str, str]] = []
    for line in section.lines:
        if line.startswith("    ") and found:
            cut = f"{line[4:LONGEST]} ... ({len(line) - 4} characters, in the .md)" if len(line) > LONGEST else line[4:]
            found[-1]["code"] += cut + "\n"
        else:
            found.append({"text": line, "code": ""})
    return found


# ---- curves and runs


def curves(page: Page, block: Block, id: str) -> list[dict[str, Any]]:
    """Charts of error and training loss over epochs: one per value of the first axis, or one where that has many."""
    rows = [row for row in block.rows if row.finished]
    first = next(iter(page.experiment.axes), None)
    values = list(dict.fromkeys(row.cell.get(first) for row in rows))
    groups = [[row for row in rows if row.cell.get(first) == value] for value in values]
    groups = [rows] if len(groups) > 3 else groups
    charts = [chart(page, block, group) for group in groups]
    found = [(f"curve-{id}-{place}", made) for place, made in enumerate(charts) if made]
    return [{"id": name, "title": title, "json": made} for name, (title, made) in found]


def chart(page: Page, block: Block, rows: list[Row]) -> tuple[str, Any] | None:
    """Title and Plotly's JSON: mean over seeds with a band of ± std; None where nothing was recorded."""
    from markupsafe import Markup

    traces, varying = [], [axis for axis in page.experiment.axes if len({row.cell[axis] for row in rows}) > 1]
    for number, row in enumerate(rows):
        name = " ".join(page.experiment.label(row.cell[axis]) for axis in varying) or page.experiment.name_of(row.cell)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        for key, axis in (("val_error", "y"), ("train_loss", "y2")):
            x, mean, std = band(row, key)
            if not len(x):
                continue
            x = np.array(x)
            about = {"type": "scatter", "x": packed(x), "yaxis": axis, "legendgroup": str(number)}
            if any(std):
                low, high = np.subtract(mean, std), np.add(mean, std)
                edges = {"x": packed(x, x[::-1]), "y": packed(high, low[::-1])}
                traces.append(about | edges | {"fill": "toself", "fillcolor": faint(colour), "line": {"width": 0},
                                               "hoverinfo": "skip", "showlegend": False, "mode": "lines"})  # fmt: skip
            traces.append(about | {
                "y": packed(mean), "name": f"{name} ({len(row.finished)})", "showlegend": axis == "y",
                "line": {"color": colour, "width": 1.6, "dash": dash}, "hovertemplate": "%{y:.4g}",
                "mode": "lines+markers" if len(x) < 12 else "lines",
            })  # fmt: skip
    if not traces:
        return None
    title = ", ".join(
        page.experiment.label(rows[0].cell[axis]) for axis in page.experiment.axes if axis not in varying
    )  # fmt: skip
    thin = {"gridcolor": "#e6e9ec", "zeroline": False, "linecolor": "#b8c0c8"}
    layout = {
        "hovermode": "x", "margin": {"l": 55, "r": 10, "t": 28, "b": 40}, "dragmode": "zoom",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f24"},
        "xaxis": thin | {"title": {"text": "epoch"}, "anchor": "y2"},
        "yaxis": thin | {"title": {"text": f"{evaluated_on(rows)} error (%)"}, "domain": [0.54, 1]},
        "yaxis2": thin | {"title": {"text": "training loss"}, "domain": [0, 0.46], "type": "log"},
        "legend": {"font": {"size": 11}},
    }  # fmt: skip
    label = title or page.experiment.title
    figure = json.dumps({"data": traces, "layout": layout}, separators=(",", ":"))
    return f"{label}, budget {block.budget:g}, {block.precision}", Markup(figure.replace("</", "<\\/"))


def packed(*parts: Any) -> dict[str, str]:
    """Numbers as Plotly reads them fastest, and in the fewest characters."""
    array = np.concatenate(parts)
    kind = "i2" if array.dtype.kind == "i" else "f4"
    return {"dtype": kind, "bdata": b64encode(array.astype(f"<{kind}").tobytes()).decode()}


def faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def runs(records: Sequence[dict[str, Any]], here: Path) -> dict[str, Any]:
    """Columns and rows of the table of runs; a row's last entry is its folder as seen from `here`."""
    from markupsafe import Markup

    folders = {r["folder"]: os.path.relpath(r["folder"], here).replace(os.sep, "/") for r in records}
    data = [[*(value(r) for _, _, value in COLUMNS), folders[r["folder"]]] for r in records]
    columns = [{"title": title, "kind": kind} for title, kind, _ in COLUMNS]
    text = json.dumps({"columns": columns, "data": data}, separators=(",", ":"))
    return {"count": len(records), "json": Markup(text.replace("</", "<\\/"))}


def sources(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Hardware, commits, versions, budgets and precisions with the number of runs."""
    if not records:
        return {}
    about = provenance(list(records))
    budgets = Counter(f"budget {r['budget']:g}, {r['precision']}" for r in records)
    counted = {"hardware": about["hardware"], "commit": about["commits"], "length and precision": dict(budgets)}
    found = {
        name: "; ".join(f"{what} ({n} run{'s' * (n > 1)})" for what, n in each.items())
        for name, each in counted.items()
    }
    return found | {name: ", ".join(versions) for name, versions in about["versions"].items()}


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
