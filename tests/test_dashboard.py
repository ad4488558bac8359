"""Dashboards through W&B's own (de)serialisation, and against the .wandb files that offline runs write."""

import json
import struct
import time
from pathlib import Path

import pytest

from conftest import ROOT, TINY
from depthlab.report import gather, load_experiment

pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")
import dashboard
from depthlab.report import dashboard as boards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces on pydantic 2
IDS = ["barz2018/table1", "barz2018/table1_cpu"]


@pytest.fixture
def pages():
    return [gather(load_experiment(ROOT / f"conf/experiment/{id}.yaml", id), []) for id in IDS]


def test_workspace(pages):
    from wandb_workspaces.workspaces import Workspace, internal

    made = boards.workspace("barz2018", pages, "someone", "depthlab")
    spec = internal.WorkspaceViewspec.model_validate(
        boards.specification(type(made)._from_model(made._to_model()))["spec"]
    )
    view = internal.View(entity="someone", project="depthlab", display_name=made.name, name="", id="", spec=spec)
    found = Workspace._from_model(view)
    assert [section.name for section in found.sections][:2] == ["Training curves", "Final numbers"]
    curve = found.sections[0].panels[0]
    assert [metric.name for metric in curve.y] == ["val/error"]
    assert (curve.groupby_aggfunc, curve.groupby_rangefunc) == ("mean", "stddev")
    assert [key.name for key in found.runset_settings.groupby] == list(boards.GROUPS)
    assert all(id in str(found.runset_settings.filters) for id in IDS)
    sent = boards.specification(made)["spec"]["section"]["runSets"][0]["grouping"]
    assert [key["name"] for key in sent] == ["arch.value.name", "sched.value.name"]  # W&B wraps a run's config so


def test_report(pages):
    from wandb_workspaces.reports.v2 import MarkdownBlock, Report
    from wandb_workspaces.reports.v2.internal import ReportViewspec

    made = boards.document("barz2018", "Table I", pages, "someone", "depthlab")
    found = Report._from_model(ReportViewspec.model_validate(boards.specification(made)))
    assert found.title == "barz2018: Table I"
    text = "\n".join(block.text for block in found.blocks if isinstance(block, MarkdownBlock))
    assert "28.48" in text
    assert "**not run**" in text


def test_command_without_a_key(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(ROOT)
    args = ["barz2018/table1_cpu", "--runs", "results/runs", "--out", str(tmp_path / "out")]
    assert dashboard.main(args) == 0
    assert "nothing was sent" in capsys.readouterr().out
    for kind in ("workspace", "report"):
        assert "barz2018/table1_cpu" in json.dumps(json.loads((tmp_path / f"out/barz2018.{kind}.json").read_text()))
    (file,) = (tmp_path / "out/media").rglob("run-report-barz2018.wandb")
    (logged,) = [record.history for record in read(file) if record.HasField("history")]
    keys = {item.key or item.nested_key[0] for item in logged.item}
    assert {"figures/barz2018/table1_cpu", "tables/barz2018/table1_cpu"} <= keys


def test_offline_runs_have_what_the_dashboards_group_by(cli, tmp_path):
    code, output = cli(*TINY, "budget=0.012", "logger=wandb", "study=test/one", env={"WANDB_API_KEY": ""})
    assert code == 0, output
    (file,) = (tmp_path / "runs").glob("resnet8-*/wandb/offline-run-*/run-*.wandb")
    records = read(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_group, run.run_id) == ("test/one", file.parents[2].name)
    config = {}
    for record in records:
        updates = [*(record.run.config.update if record.HasField("run") else []), *record.config.update]
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert config["study"] == "test/one"
    for key in boards.GROUPS:
        section, _, name = key.partition(".")
        assert config[section][name]
    logged = {item.key or "/".join(item.nested_key) for r in records for item in r.history.item}
    assert {"epoch", *boards.CURVES} - {"lr"} <= logged
    final = {item.key or item.nested_key[0] for r in records for item in r.summary.update}
    assert set(boards.FINAL) <= final


def test_a_growing_run_logs_its_depth(cli, tmp_path):
    grown = ["arch=multilevel", "arch.width=4", "sched=multilevel_cosine", "grow=multilevel", "budget=0.02"]
    code, output = cli(*TINY[2:], *grown, "grow.at=[54,107]", "logger=wandb", env={"WANDB_API_KEY": ""})
    assert code == 0, output
    (file,) = (tmp_path / "runs").glob("ml*/wandb/offline-run-*/run-*.wandb")
    rows = [{item.key or item.nested_key[0]: item.value_json for item in r.history.item} for r in read(file)]
    assert [float(row["depth"]) for row in rows if "depth" in row] == [14, 26, 50]  # an epoch each


def read(file: Path) -> list:
    """A finished run's records; W&B's own process may still be writing them when the run is over."""
    until = time.time() + 60
    while not (found := parse(file)) or not found[-1].HasField("exit"):
        assert time.time() < until, "W&B never ended the file"
        time.sleep(0.1)
    return found


def parse(file: Path) -> list:
    """W&B's records of a transaction log: LevelDB's framing (blocks of 32 KiB, a header of 7 bytes: checksum, length,
    first/middle/last), after a header of 7 bytes; the messages are read by W&B's own protocol."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, found, part = file.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            found.append(Record.FromString(part))
            part = b""
    return found
