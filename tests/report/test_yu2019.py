"""Yu & Tomasi's tables and figures: every cell published, the recipe per network, numbers from records by hand."""

import csv
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from configuration import build
from depthlab.report import load_experiment, write_report
from depthlab.report.given import Given, Notes
from depthlab.report.tables import cell_key
from depthlab.report.yu2019 import accuracy, after_15, cost, fifteenth, until_15
from depthlab.report.yu2019_start import initial, parting
from report import compose, identities

CONF = Path(__file__).parents[2] / "conf/experiment"


def experiment(name):
    return load_experiment(CONF / f"yu2019/{name}.yaml", f"yu2019/{name}")


@pytest.mark.parametrize(
    ("name", "runs", "published"),
    [("table1", 6, 6), ("table2", 6, 6), ("table5", 7, 7), ("fig2", 26, 2), ("fig6", 2, 2), ("fig9", 60, 4)],
)
def test_cells(name, runs, published):
    found = experiment(name)
    assert len(found.cells()) * len(found.seeds) == runs
    numbers = [found.published(cell) for cell in found.cells()]
    assert sum(found.metric in n for n in numbers) == published
    for n in numbers:  # C = L + penalty, within what the paper prints
        assert "cost" not in n or 4e-4 < n["cost"] - n["train_loss"] < 1.3e-3


def test_recipes():
    for name in ("table1", "table5", "fig9"):
        for key, identity in recipes(name).items():
            slow = {"simple_plain44": 0.001, "dominant44": 0.005}
            assert identity["sched"]["lr"] == slow.get(identity["arch"]["name"], 0.01), key
            assert identity["sched"]["milestones"] == [120, 160]
            assert identity["data"]["batch_size"] == 128
            assert identity["augment"]["name"] == "crop"
            assert (identity["optim"]["weight_decay"], identity["optim"]["wd_norm"]) == (1e-4, "batch")
            transferred = identity["arch"]["name"].startswith("simple_transferred")
            assert identity["optim"]["decay_towards"] == ("identity" if transferred else "zero")
    assert compose(experiment("table2"))["trainer"]["precision"] == "64-true"
    long = compose(experiment("fig2"))["sched"]
    assert (long["epochs"], long["milestones"]) == (1200, [720, 960])


@cache
def recipes(name):
    return identities(experiment(name))


def record(name, cell, seed, loss, error):
    """A finished run of a cell, of 4 epochs."""
    found = experiment(name)
    identity = recipes(name)[cell_key(cell)] | {"seed": seed}
    curves = {"epoch": [0, 1, 2, 3], "train_loss": [loss + 3, loss + 2, loss + 1, loss], "val_error": [error] * 4}
    return {
        "schema": 1, "name": f"{cell['arch']}-s{seed}", "study": found.id, "arch": cell["arch"], "sched": "yu2019",
        "grow": "none", "data": "cifar10", "seed": seed, "budget": 1.0, "precision": found.precision, "epochs": 4,
        "steps": 4, "diverged": False, "test_error": error, "train_loss": loss, "penalty": 0.001, "identity": identity,
        "curves": curves, "folder": "nowhere", "seconds_per_epoch": 1.0, "config": {},
    }  # fmt: skip


def test_table1(tmp_path):
    found = experiment("table1")
    losses = {20: 0.1, 32: 0.2, 44: 0.4}
    records = [
        record("table1", cell, 0, losses[int(cell["arch"][-2:])] / (1 + ("residual" in cell["arch"])), 10.0 + i)
        for i, cell in enumerate(found.cells())
    ]
    text, files = write_report(found, records, [], tmp_path, recipes("table1"))
    rows = (tmp_path / "yu2019/table1.costs.csv").read_text().splitlines()
    assert len(rows) == 7
    assert "simple_residual44,0.07397,0.07459,0.1182,0.2,0.201,0.15" in rows[6]
    assert "PlnNet: L at depth 44 is 4.00 times L at 20 (paper 6.85)." in text
    assert "ResNet: L at depth 44 is 4.00 times L at 20 (paper 1.73)." in text
    assert [path.suffix for path in files].count(".png") == 1


def test_table5(tmp_path):
    found = experiment("table5")
    records = [record("table5", cell, 0, 1.0, 40.0 if "dominant" in cell["arch"] else 20.0) for cell in found.cells()]
    text, _ = write_report(found, records, [], tmp_path, recipes("table5"))
    assert "Depth 20: the accuracy of T' is 75.00 % of the residual's (paper 77.13 %)." in text
    assert "Depth 44: the accuracy of T' is 75.00 % of the residual's (paper 77.11 %)." in text


@pytest.mark.parametrize("name", ["fig2", "fig9"])
def test_figures(name, tmp_path):
    found = experiment(name)
    losses = {"simple_plain": 0.1, "simple_residual": 0.05, "simple_transferred": 0.05}
    records = [
        record(name, cell, seed, losses[cell["arch"][:-2]] * int(cell["arch"][-2:]) + 0.001 * seed, 9.0)
        for cell in found.cells()
        for seed in (0, 1)
    ]
    text, files = write_report(found, records, [], tmp_path, recipes(name))
    assert (tmp_path / f"yu2019/{name}.png") in files
    if name == "fig9":
        assert "PlnNet: L at depth 44 is 1.37 times L at 32 (paper 3.54)." in text
        assert "Depth 44: L_P - L_R is largest after epoch 1, 2.2." in text


def test_divergence(tmp_path):
    """Fig. 6 from the losses of every step."""
    found, losses = experiment("fig6"), np.linspace(2, 1, 50)
    records = []
    for cell, shift in zip(found.cells(), (0, 1e-9)):
        folder = tmp_path / cell["arch"]
        folder.mkdir()
        np.save(folder / "losses.npy", losses + shift * (np.arange(50) >= 30))
        records.append(record("fig6", cell, 0, 1.0, 9.0) | {"folder": str(folder)})
    assert (tmp_path / "yu2019/fig6.png") in write_report(found, records, [], tmp_path, recipes("fig6"))[1]
    with (tmp_path / "yu2019/fig6.divergence.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["first_20"]) == 0
    assert row["first_100"] == ""  # there are 50
    assert float(row["largest"]) == pytest.approx(1e-9, rel=1e-6)
    (tmp_path / "simple_residual20/losses.npy").unlink()
    assert "No losses.npy in" in write_report(found, records, [], tmp_path, recipes("fig6"))[0]


def test_of_a_record():
    losses = [3.0, 2.0, 1.0, 0.5] * 5  # 20 epochs: 15 of 200 is between the first and the second
    assert fifteenth(losses) == 1
    assert until_15({"curves": {"train_loss": losses}}) == -1
    assert after_15({"curves": {"train_loss": losses}}) == -1.5
    assert fifteenth([0.0] * 200) == 14
    assert cost({"train_loss": 1.0, "penalty": 0.5}) == 1.5
    assert cost({"train_loss": 1.0}) is None
    assert accuracy({"test_error": 12.5}) == 87.5


def test_before_training(tmp_path, monkeypatch):
    """Committed numbers are those of the command; without images L is left out."""
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    found = experiment("initial")
    given = Given(found, Notes(found), None, partial(compose, found), build)
    drawn = initial(given, **found.paper["options"], train=False)
    results = Path(__file__).parents[2] / "results/yu2019"
    for name, table in drawn.tables.items():
        path = results / f"initial{'.' * bool(name)}{name}.csv"
        with path.open() as file:
            committed = list(csv.DictReader(file))
        kept = [key for key in table.rows[0] if not key.startswith("train_loss")]
        ours = [{key: "" if row[key] is None else str(row[key]) for key in kept} for row in table.rows]
        assert ours == [{key: row[key] for key in kept} for row in committed]
    assert drawn.lacking == "No CIFAR-10 in data_dir: L not computed."


def test_parting():
    """Fig. 6's beginning; the committed numbers have 20 steps."""
    assert 0 < parting(steps=2) < 1e-15
    assert 1e-9 < parting(centred=False, steps=2) < 1e-5
