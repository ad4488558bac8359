"""The experiment files of Chang et al. 2018 ask for the paper's cells, no more, by the paper's recipe."""

from pathlib import Path

import pytest

from depthlab.report import load_experiment
from depthlab.report.tables import cell_key
from report import identities

CONF = Path(__file__).parents[2] / "conf/experiment"


def experiment(name):
    return load_experiment(CONF / f"{name}.yaml", name)


@pytest.mark.parametrize(("table", "runs"), [("table3", 18), ("table4", 18), ("table5", 24)])
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
