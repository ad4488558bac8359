"""The experiment files of Chang et al. 2018 ask for the paper's cells, no more, by the paper's recipe."""

import csv
from pathlib import Path

import pytest

import report
from depthlab.records import run_name
from depthlab.report import load_experiment
from depthlab.report.tables import cell_key
from report import identities

CONF = Path(__file__).parents[2] / "conf/experiment"


def experiment(name):
    return load_experiment(CONF / f"{name}.yaml", name)


@pytest.mark.parametrize(("table", "runs"), [("table3", 18), ("table4", 18)])
def test_every_cell_is_published(table, runs):
    cells = (found := experiment(f"chang2018/{table}")).cells()
    assert len(cells) == runs
    assert all(found.published(cell)[found.metric] > 0 for cell in cells)
    deep = [cell for cell in cells if cell["arch"].endswith(("50", "122"))]
    assert not [cell for cell in deep if cell.get("grow") == "multilevel"]


def test_recipe_of_every_data_set():
    found = experiment("chang2018/fig10")
    assert [cell["sched.reset"] for cell in found.cells()] == [True, False] * 3
    assert "sched.reset=false" in found.command(found.cells()[1])
    recipes = identities(found)
    for cell in found.cells():
        identity = recipes[cell_key(cell)]
        stl = cell["data"] == "stl10"
        assert identity["augment"]["pad"] == (12 if stl else 4)
        assert identity["data"]["batch_size"] == (32 if stl else 100)
        assert identity["sched"]["reset"] == cell["sched.reset"]
        assert identity["grow"]["at"] == identity["sched"]["at"] == [60, 110]
        assert identity["optim"]["weight_decay"] == 2e-4


@pytest.mark.parametrize(
    ("one", "cell", "other", "same"),
    [
        ("fig4", "data=cifar10", "fig3", "arch.blocks=18"),
        ("fig4", "data=cifar100", "lesion", "data=cifar100"),
        ("fig6", "data=cifar100 arch=wml14", "table4", "data=cifar100 arch=wml14 grow=multilevel"),
        ("fig8", "arch=ml14", "table3", "data=stl10 arch=ml14 grow=multilevel"),
        ("fig11", "data=cifar10 arch=ml50 grow=none", "table3", "data=cifar10 arch=ml50 grow=none"),
    ],
)
def test_a_run_that_two_experiments_share_is_one(one, cell, other, same):
    configs = [report.compose(experiment(f"chang2018/{id}"), *of.split()) for id, of in ((one, cell), (other, same))]
    assert run_name(configs[0]) == run_name(configs[1])


def test_step_sizes():
    one = experiment("chang2018/fig7")
    found = {name: report.compose(one, f"arch={name}")["arch"] for name in one.axes["arch"]}
    assert {name: (of["blocks"], of["step_size"]) for name, of in found.items()} == {
        "ml32": (5, 1), "ml62": (10, 0.5), "ml122": (20, 0.25),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "said"), [("table2", 6, "43.75 %"), ("table5", 24, "0 differ from the pap")])
def test_tables_without_runs(name, rows, said, tmp_path, capsys):
    assert report.main([f"chang2018/{name}", "--runs", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    found = list(csv.DictReader((tmp_path / f"chang2018/{name}.csv").read_text().splitlines()))
    assert len(found) == rows
    key = "saved" if name == "table2" else "parameters"
    assert all(round(float(row[key])) == int(row[f"paper_{key}"]) for row in found)
