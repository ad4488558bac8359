"""Figs. 5 and 9 of Li et al. from runs of seconds."""

from dataclasses import replace

import pytest

from analyze import run
from conftest import ROOT, TINY, composed
from depthlab.problem import Problem
from depthlab.report import load_experiment
from depthlab.report.figures import png
from depthlab.report.given import Given, Notes, draw
from depthlab.report.read import read_records
from depthlab.report.tables import tabulate
from train import train

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def made(runs, data_dir, experiment, *overrides):
    quick = [o for o in TINY if o != "arch=resnet"] + [f"data_dir={data_dir}", f"runs_dir={runs}", "data.batch_size=50"]
    train(composed("train", f"experiment=li2018/{experiment}", *quick, *overrides))


def drawn(id, runs):
    experiment = load_experiment(ROOT / f"conf/experiment/li2018/{id}.yaml", f"li2018/{id}")
    experiment = replace(experiment, data="digits")
    records, _ = read_records([runs])
    block = next(block for block in tabulate(experiment, records) if block.records)
    return draw(Given(experiment, Notes(experiment), block))


def test_surfaces(data_dir, tmp_path):
    for arch in ("resnet20_projection", "resnet20_noshort"):
        made(tmp_path, data_dir, "fig5", f"arch={arch}", "budget=0.003")
    before = drawn("fig5", tmp_path)
    assert not before.figures
    assert before.lines[0] == "Not measured: 2 runs."
    small = ["analysis=loss_surface", "analysis.images=20", "analysis.grid=5", "device=cpu"]
    run(composed("analyze", f"run={tmp_path}/resnet20_projection*", *small))
    assert len(drawn("fig5", tmp_path).lines) == 2  # the other one
    run(composed("analyze", f"run={tmp_path}/resnet20_noshort*", *small))
    out = drawn("fig5", tmp_path)
    assert set(out.figures) == {"", "relief", "profile"}
    assert all(png(figure).startswith(b"\x89PNG") for figure in out.figures.values())
    rows = out.tables["surfaces"].rows
    assert [row["arch"] for row in rows] == ["resnet20_projection", "resnet20_noshort"]
    assert all(row["points"] == 25 and row["loss_min"] <= row["loss_max"] for row in rows)
    folder = next(tmp_path.glob("resnet20_noshort*"))
    assert {f"analysis-loss_surface{end}" for end in (".npz", ".json", ".png", ".vts", ".html")} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(folder.glob(".*"))


def test_paths(data_dir, tmp_path):
    tiny = ["arch=li2018", "arch.depth=8", "arch.width=4", "optim=li2018_sgd", "budget=0.01"]
    for decay in ("5.0e-4", "0"):
        made(tmp_path, data_dir, "fig9", *tiny, f"optim.weight_decay={decay}")
    small = ["analysis.images=20", "analysis.grid=5", "analysis.gradients=10", "device=cpu"]
    run(composed("analyze", f"run={tmp_path}/li*", "analysis=loss_trajectory", *small))
    experiment = load_experiment(ROOT / "conf/experiment/li2018/fig9.yaml", "li2018/fig9")
    cells = [{k: 50 if k == "data.batch_size" else v for k, v in cell.items()} for cell in experiment.cells()]
    assert len(cells) == 8
    options = experiment.paper["options"] | {"cells": [[c for c in cells if c["optim"] == "li2018_sgd"]]}
    experiment = replace(experiment, data="digits", axes=experiment.axes | {"data.batch_size": [50]},
                         paper=experiment.paper | {"options": options})  # fmt: skip
    records, _ = read_records([tmp_path])
    block = next(block for block in tabulate(experiment, records) if block.records)
    out = draw(Given(experiment, Notes(experiment), block))
    assert set(out.figures) == {"", "profile", "angles"}
    assert all(png(figure).startswith(b"\x89PNG") for figure in out.figures.values())
    rows = out.tables["surfaces"].rows
    assert [row["optim.weight_decay"] for row in rows] == [5e-4, 0]
    for row in rows:
        assert 0 < row["explained_random"] < row["explained"] <= 1
        assert 0 <= row["step_normal_late"] <= 90
        assert 0 <= row["step_gradient_late"] <= 180


def test_a_network_that_grows_has_no_path(data_dir, tmp_path):
    from configuration import problems

    config = composed("train", "arch=ml14", "sched=multilevel_cosine", "grow=multilevel", "trajectory.every=1")
    assert problems(config) == [
        "trajectory.every: a network that grows has no path in one weight space; take grow=none"
    ]
    made(tmp_path, data_dir, "fig5", "arch=resnet20_projection", "budget=0.003")
    with pytest.raises(Problem, match=r"trajectory.every=1"):
        run(composed("analyze", f"run={tmp_path}/res*", "analysis=loss_trajectory", "analysis.images=20", "device=cpu"))
