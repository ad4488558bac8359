"""Experiments of Yu & Tomasi's measurements, from configuration over runs of seconds to figures and verdicts."""

import csv
import json

import pytest

from conftest import ROOT, composed
from depthlab.report import load_experiment, read_records, write_report
from depthlab.report.yu2019_flow import simulated
from report import build, compose
from train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]
SMALL = ["arch.width=2", "data=digits", "trainer.accelerator=cpu", "trainer.limit_train_batches=2"]
SMALL += ["trainer.limit_test_batches=1", "trainer.limit_val_batches=1"]
RUNS = {  # an epoch of 2 steps each
    "fig3": ["budget=0.005", "analyses.cushion.images=8"],
    "fig10": ["budget=0.25", "analyses.gradient.images=8", "analyses.gradient.every_steps=1"],
    "fig12": ["budget=0.005", "analyses.flow.images=8"],
    "fig12_full": ["budget=0.006", "analyses.flow.images=8"],
    "interlayer": ["budget=0.006", "analyses.interlayer.images=8", "analyses.interlayer.probes=2"],
}


def experiment(name):
    return load_experiment(ROOT / f"conf/experiment/yu2019/{name}.yaml", f"yu2019/{name}")


def report(name, runs, out):
    """The files of a report on the runs of that experiment's study."""
    records = [r for r in read_records([runs])[0] if r["study"] == f"yu2019/{name}"] if runs else []
    found = experiment(name)
    compose_it = lambda *overrides: compose(found, *overrides)  # noqa: E731
    text, files = write_report(found, records, [], out, None, compose_it, build)
    return text, {file.name: file for file in files}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Two tiny runs of each experiment that measures during training."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    for name, small in RUNS.items():
        for cell in experiment(name).cells()[:2]:
            options = [f"experiment=yu2019/{name}", f"arch={cell['arch']}", *small, *SMALL]
            train(composed("train", *options, f"data_dir={data_dir}", f"runs_dir={runs}/{name}"))
    return runs


def rows(file):
    with open(file) as lines:
        return list(csv.DictReader(lines))


def test_flow(runs, tmp_path):
    for name, archs in (("fig12", ("simple_plain20", "simple_residual20")), ("fig12_full", ("plain20", "resnet20"))):
        text, files = report(name, runs / name, tmp_path)
        found = rows(files[f"{name}.flow.csv"])
        assert {(r["arch"], r["iteration"]) for r in found} == {(a, i) for a in archs for i in ("first", "last")}
        assert {int(r["layer"]) for r in found} == set(range(1, 19))
        assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert "Residual over plain at layer 18: " in text
        record = json.loads(next((runs / name).glob("*/result.json")).read_text())
        assert [(r["epoch"], r.get("step")) for r in record["analyses"]["flow_during"]] == [
            (0, None), (0.5, 1), (1, None)
        ]  # fmt: skip


def test_cushion(runs, tmp_path):
    text, files = report("fig3", runs / "fig3", tmp_path)
    found = rows(files["fig3.layers.csv"])
    assert len(found) == 2 * 19
    assert {r["network"] for r in found} == {"plain", "residual"}
    assert {"fig3.png", "fig3.full_norm.png"} <= files.keys()
    below = sum(
        float(r["own"]) <= float(p["own"])
        for p, r in zip(*([x for x in found if x["network"] == kind] for kind in ("plain", "residual")), strict=True)
    )
    assert f"Depth 20, norm without the identity (the paper's): residual below plain in {below} layers" in text


def test_interlayer(runs, tmp_path):
    text, files = report("interlayer", runs / "interlayer", tmp_path)
    plain, residual = rows(files["interlayer.cushions.csv"])
    assert float(plain["batch_mean"]) < 0.1 < float(residual["batch_mean"])
    assert float(plain["paper_mean"]) == 2.7e-7
    assert "ours: running statistics" in text


def test_gradient(runs, tmp_path):
    text, files = report("fig10", runs / "fig10", tmp_path)
    (row,) = rows(files["fig10.gradient.csv"])
    assert int(row["steps"]) == 2
    assert "of the mean over a batch of 128" in text
    assert "0.000144" in text
    assert files["fig10.png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["table3", "table4", "fig7"])
def test_before_training_without_runs(name, tmp_path):
    text, files = report(name, None, tmp_path)
    if name == "table3":
        found = {r["statistic"]: r for r in rows(files["table3.weights.csv"])}
        assert float(found["mass"]["ours: p0"]) == pytest.approx(25_000, abs=100)
        assert float(found["mass"]["paper: t200"]) == 20_000
        assert found["mass"]["ours: t200"] == ""
    elif name == "table4":
        found = rows(files["table4.penalty.csv"])
        assert len(found) == 6
        for row in found:
            assert float(row["penalty_before"]) == pytest.approx(float(row["paper_penalty_before"]), rel=0.06)
    else:
        assert files["fig7.png"].read_bytes().startswith(b"\x89PNG")
    assert "no finished run" in text or name == "fig7"


def test_claims_of_the_trivial_case(monkeypatch, tmp_path):
    few = simulated(4000)
    monkeypatch.setattr("depthlab.report.yu2019_flow.simulated", lambda draws=0: few)
    text, files = report("fig11", None, tmp_path)
    assert len(rows(files["fig11.csv"])) == 57
    assert "Y12c NOT SUPPORTED" in text
    text, files = report("fig13", None, tmp_path)
    assert "off by 0.0081 at most, at r = 2.07" in text
    assert "F13  SUPPORTED" in text
