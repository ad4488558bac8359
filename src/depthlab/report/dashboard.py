"""W&B dashboards as code: a workspace for each paper (curves grouped by arch x sched, mean and band over seeds, the
tables and figures of the report as media) and a report that says the same in words.

Built with wandb-workspaces. Grouped as callbacks/loggers.py does: one W&B run per run, its group the experiment.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthlab.report.page import Page
from depthlab.report.text import OURS, grid, replace, verdict_table

CURVES = {"val/error": "Held-out error (%)", "train/error": "Training error (%)", "val/loss": "Held-out loss",
          "train/loss": "Training loss", "lr": "Learning rate"}  # fmt: skip
FINAL = ("test_error", "test_loss", "train_error", "train_loss", "seconds_per_epoch")
GROUPS = ("arch.name", "sched.name")
EXTRA = "this needs wandb and wandb-workspaces: pip install 'depthlab[loggers,report]'"


def plots() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(
            title=title, x="epoch", y=[key], log_y=key.endswith("loss") or key == "lr",
            groupby_aggfunc="mean", groupby_rangefunc="stddev", max_runs_to_show=100,
        )
        for key, title in CURVES.items()
    ]  # fmt: skip


def workspace(paper: str, pages: Sequence[Page], entity: str, project: str) -> Any:
    """The paper's runs, seen in W&B's runs table and panels. Returns a `wandb_workspaces.workspaces.Workspace`."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    final = [wr.BarPlot(title=key, metrics=[key], orientation="h") for key in FINAL[:2]]
    tables = [wr.MarkdownPanel(markdown=words(page)) for page in pages]
    return ws.Workspace(
        entity=entity, project=project, name=f"depthlab {paper}",
        sections=[
            ws.Section(name="Training curves", panels=plots(), is_open=True),
            ws.Section(name="Final numbers", panels=final, is_open=True),
            ws.Section(name="Tables and verdicts", panels=tables),
            ws.Section(name="Figures", panels=[wr.MediaBrowser(title=key, media_keys=[key]) for key in media(pages)]),
        ],
        runset_settings=ws.RunsetSettings(
            filters=[expr.Config("study").isin([page.experiment.id for page in pages])],
            groupby=[expr.Config(key) for key in GROUPS],
            pinned_columns=["run:displayName", *(f"summary:{key}" for key in FINAL)],
        ),
    )  # fmt: skip


def document(paper: str, title: str, pages: Sequence[Page], entity: str, project: str) -> Any:
    """Every experiment's verdicts, tables, curves and figures. Returns a `wandb_workspaces.reports.v2.Report`."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    blocks: list[Any] = [wr.TableOfContents(), wr.P(OURS)]
    for page in pages:
        study = page.experiment.id
        blocks += [wr.H1(page.experiment.title), wr.MarkdownBlock(text=words(page))]
        if page.experiment.runs:
            runset = wr.Runset(  # without a project of its own it is the report's, and nothing is asked of the server
                name=study, filters=[expr.Config("study") == study],
                groupby=[f"config.{key}" for key in GROUPS],
            )  # fmt: skip
            blocks.append(wr.PanelGrid(runsets=[runset], panels=plots()[:2]))
        if keys := media([page]):
            panels = [wr.MediaBrowser(title=key, media_keys=[key]) for key in keys]
            blocks.append(wr.PanelGrid(runsets=[wr.Runset(name="report")], panels=panels))
    return wr.Report(entity=entity, project=project, title=f"{paper}: {title}"[:128], blocks=blocks)


def words(page: Page) -> str:
    """Tables and verdicts of an experiment in Markdown."""
    lines = [f"**{page.experiment.id}**", ""]
    for section in page.sections:
        lines += [section.title, "", *(grid(section.header, section.body, True) if section.header else []), ""]
    lines += verdict_table(page) if page.verdicts else []
    lines += ["", *(f"[{number}] {note}  " for number, note in enumerate(page.notes.texts, 1))]
    return "\n".join(lines).strip() + "\n"


def media(pages: Sequence[Page]) -> dict[str, bytes]:
    """Key under which `log_media` logs a figure -> its PNG."""
    return {f"figures/{page.experiment.id}{end}": png for page in pages for end, png in page.figures.items()}


def log_media(paper: str, pages: Sequence[Page], project: str, entity: str | None, folder: Path, mode: str) -> None:
    """A W&B run `report-<paper>` with the figures as images and the tables as tables."""
    import wandb
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project, entity=entity, name=f"report-{paper}", id=f"report-{paper}", group="report", job_type="report",
        dir=folder, mode=mode, resume="allow" if mode == "online" else None,
    )  # fmt: skip
    logged: dict[str, Any] = {key: wandb.Image(Image.open(io.BytesIO(png))) for key, png in media(pages).items()}
    for page in pages:
        for number, section in enumerate(page.sections):
            if section.header:
                key = f"tables/{page.experiment.id}{f'.{number}' * bool(number)}"
                logged[key] = wandb.Table(columns=list(section.header), data=section.body)
    run.log(logged)
    run.finish()


def specification(thing: Any) -> dict[str, Any]:
    """What `save` would send of a workspace or a report."""
    return json.loads(thing._to_model().model_dump_json(by_alias=True, exclude_none=True))


def write_specifications(paper: str, made: Sequence[tuple[str, Any]], out: Path) -> list[Path]:
    """`<out>/<paper>.<kind>.json` of each (kind, thing)."""
    files = [out / f"{paper}.{kind}.json" for kind, _ in made]
    for path, (_, thing) in zip(files, made, strict=True):
        replace(path, (json.dumps(specification(thing), indent=1) + "\n").encode())
    return files
