"""What counts as the measurement that is asked for: the last weights, and the same options."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT, TINY, composed
from depthlab.analysis import Result, asked, files
from depthlab.report import load_experiment, tabulate
from depthlab.report.experiments import Experiment
from depthlab.report.given import Given, Notes
from tests.report.test_report import record
from train import measure, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]
NORMS = ("+analysis@analyses.sizes=norms", "+analyses.sizes.at=[164]")


@pytest.fixture(scope="module")
def config(data_dir, tmp_path_factory):
    """config(*overrides) of a run of two epochs."""
    places = [f"data.dir={data_dir}", f"runs_dir={tmp_path_factory.mktemp('made')}/runs"]

    def config(*overrides):
        return composed("train", *TINY, *places, "budget=0.012", *overrides)

    return config


def test_other_options_are_measured_anew(config, capsys):
    during = config(*NORMS, "analyses.sizes.images=20")
    folder = Path(during["runs_dir"]) / train(during)["name"]
    assert files.about(folder, "sizes-epoch0002")["analysis"] == {
        "name": "sizes", "split": "test", "images": 20, "horizon": None
    }  # fmt: skip
    assert asked.unmeasured(during, folder) == []
    other = config(*NORMS, "analyses.sizes.images=30")
    for expected in ("measured", ""):  # and then no more
        assert asked.unmeasured(other, folder) == ["sizes"] * bool(expected)
        capsys.readouterr()
        measure(other, folder)
        assert expected in capsys.readouterr().out
        assert files.about(folder, "sizes")["scalars"]["images"] == 30
    assert asked.unmeasured(during, folder) == []  # as good as ever
    measure(config(*NORMS, "analyses.sizes.images=40"), folder)  # takes the place of the 30
    assert json.loads((folder / "result.json").read_text())["analyses"]["sizes"]["images"] == 40

    early = config("+analysis@analyses.norms=norms", "+analyses.norms.every=82")
    assert asked.missed(early, folder) == ["norms"]
    assert asked.missed(during, folder) == []
    measure(early, folder)
    assert "trained without analyses.norms, only its last epoch is measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("about", "is_there"),
    [
        ({"step": 8}, True),  # of before options were written
        ({"step": 8, "analysis": "norms"}, True),
        ({"step": 8, "analysis": {"name": "norms", "images": 20, "workers": 1}}, True),
        ({"step": 8, "analysis": {"name": "norms", "images": 30}}, False),
        ({"step": 4, "analysis": {"name": "norms", "images": 20}}, False),  # not the last weights
    ],
)
def test_what_counts(about, is_there, tmp_path):
    """Options that only say when, where and how fast make no difference."""
    files.write(tmp_path, "norms", Result({}, {}), about)
    section = {"_target_": "f", "name": "norms", "images": 20, "at": [164], "workers": 2}
    of = {"steps": 8, "epochs": 2}
    assert asked.last_weights(of, tmp_path, "norms", section) == ("norms" if is_there else None)
    assert asked.last_weights(of, tmp_path, "norms") == (None if about["step"] == 4 else "norms")


class Expected(dict):
    """What `tabulate` asks of an experiment."""

    def analyses(self):
        return {"sizes": {"name": "norms", "images": 20, "at": [164]}}


def test_a_figure_takes_what_its_experiment_asks_for(tmp_path):
    experiment = Experiment(
        "x/y",
        {"arch": ["plain11"]},
        [0, 1, 2],
        data="cifar100",
        analyses={"sizes": {"analysis": "norms", "images": 20}},
    )
    made = []
    for seed, images in enumerate((20, 30, None)):
        one = record(seed=seed, sched="sgdr", budget=1.0, precision="32-true")
        folder = tmp_path / str(seed)
        folder.mkdir()
        if images:
            about = {"step": one["steps"], "analysis": {"name": "sizes", "images": images}}
            files.write(folder, "sizes", Result({"images": images}, {}), about)
        made.append(one | {"folder": str(folder), "analyses": {"sizes": {}}, "study": "x/y"})
    (block,) = tabulate(experiment, made, Expected({"arch=plain11": made[0]["identity"]}))
    given = Given(experiment, Notes(experiment), block)
    assert [result.scalars["images"] for *_, result in given.measured("sizes")] == [20]
    folders = f"{tmp_path}/1,{tmp_path}/2"
    options = "analysis=norms analysis.images=20 analysis.name=sizes force=true"
    assert given.unmeasured("sizes") == [
        "Not measured: 2 runs.",
        f"    python src/analyze.py run=[{folders}] {options}",
    ]
    without = replace(given, block=tabulate(experiment, made)[0])
    assert [result.scalars["images"] for *_, result in without.measured("sizes")] == [20, 30]


def test_what_an_experiment_file_asks_for():
    experiment = load_experiment(ROOT / "conf/experiment/chang2018/lesion.yaml", "chang2018/lesion")
    assert experiment.analyses == {"norms": {"analysis": "norms"}, "lesion": {"analysis": "lesion"}}
    assert experiment.analysis_command("lesion", ["a", "b"]) == "python src/analyze.py run=[a,b] analysis=lesion"
    rho = replace(experiment, analyses={"s": {"analysis": "sharpness", "rho": [0.5, 1], "grid": None}})
    command = "python src/analyze.py run=[a] analysis=sharpness analysis.rho=[0.5,1] analysis.grid=null analysis.name=s"
    assert rho.analysis_command("s", ["a"]) == command
