"""The figures of Li et al.'s numbers from runs of seconds: what is measured, what is not, and by which command."""

from dataclasses import replace

import pytest

from analyze import run
from conftest import ROOT, TINY, composed
from depthlab.report import load_experiment
from depthlab.report.given import Given, Notes, draw
from depthlab.report.li2018_numbers import identity_error, rank, trains
from depthlab.report.read import read_records
from depthlab.report.tables import tabulate
from train import train

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
STARTS = [("resnet20_projection", 0), ("resnet20_noshort", 0), ("resnet20_noshort", 1)]


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("made") / "runs"
    quick = [o for o in TINY if o != "arch=resnet"] + [f"data_dir={data_dir}", f"runs_dir={runs}", "budget=0.006"]
    quick += ["experiment=li2018/initialisation", "arch.init=kaiming", "+analysis@analyses.gradients=gradients"]
    quick += ["+analyses.gradients.at=[0,300]", "analyses.gradients.images=20"]
    for arch, seed in STARTS:
        train(composed("train", *quick, f"arch={arch}", f"seed={seed}"))
    return runs


def drawn(name, runs):
    experiment = load_experiment(ROOT / f"conf/experiment/li2018/{name}.yaml", f"li2018/{name}")
    experiment = replace(experiment, data="digits")
    records, _ = read_records([runs])
    block = next(block for block in tabulate(experiment, records) if block.records)
    return draw(Given(experiment, Notes(experiment), block)), records


def test_gradients(runs):
    out, records = drawn("gradients", runs)
    assert set(out.figures) == {"", "training"}
    rows = out.tables["split"].rows
    assert [(row["arch"], row["epoch"]) for row in rows] == [
        ("resnet20_projection", 0), ("resnet20_projection", 2), ("resnet20_noshort", 0), ("resnet20_noshort", 2)
    ]  # fmt: skip
    assert rows[0]["shortcut_share"] > 0
    assert rows[2]["shortcut_share"] == 0
    assert all(0 <= identity_error(record) < 1e-5 for record in records)


def test_sharpness(runs):
    before, _ = drawn("sharpness", runs)
    assert not before.tables
    assert before.lines[0] == "Not measured: 3 runs."
    small = ["analysis.images=40", "analysis.steps=3", "analysis.directions=2", "analysis.grid=3", "device=cpu"]
    run(composed("analyze", f"run={runs}/resnet*", "analysis=sharpness", *small))
    out, records = drawn("sharpness", runs)
    assert len(out.tables["sharpness"].rows) == len(out.tables["sharpness"].lines) == 3
    assert "over 3 runs" in out.lines[-1]
    measured = {row["seed"]: row["S_0_5"] for row in out.tables["sharpness"].rows if row["arch"] == "resnet20_noshort"}
    kept = {r["seed"]: r["analyses"]["sharpness"]["S_0_5"] for r in records if r["arch"] == "resnet20_noshort"}
    assert measured == kept
    assert "sharpness" in drawn("fig5", runs)[0].figures


def test_initialisation(runs):
    before, _ = drawn("initialisation", runs)
    assert [line.split(" of ")[-1] for line in before.lines[::2]] == ["resnet20_projection.", "resnet20_noshort."]
    small = ["analysis.images=40", "analysis.recalibrate=20", "analysis.grid=3", "analysis.line=2", "device=cpu"]
    run(composed("analyze", f"run={runs}/resnet20_noshort*", "analysis=minima", *small))
    out, records = drawn("initialisation", runs)
    assert before.lines[:2] == out.lines
    with_them, without = out.tables["starts"].rows
    assert (with_them["runs"], without["runs"]) == (1, 2)
    assert with_them["distance"] is None
    losses = [record["train_loss"] for record in records if record["arch"] == "resnet20_noshort"]
    assert without["train_loss"] == pytest.approx(sum(losses) / 2)
    assert without["train_loss_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert without["distance"] > 0
    assert without["trained"] == sum(map(trains, [r for r in records if r["arch"] == "resnet20_noshort"]))


def test_what_trains():
    ends = [(False, 0.99), (False, 1.0), (True, None)]
    assert [trains({"diverged": diverged, "train_loss": loss}) for diverged, loss in ends] == [1, 0, 0]


def test_rank():
    rows = [{"S": s, "test_error": e} for s, e in ((1, 5), (2, 6), (30, 7), (None, 1))]
    assert rank(rows, "S") == pytest.approx(1)
    assert rank(rows[:2], "S") is None
    assert rank([row | {"S": 1} for row in rows], "S") is None
