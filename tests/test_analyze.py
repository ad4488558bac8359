"""`python src/analyze.py` on a run of seconds; the same analysis during training."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import get_object
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from analyze import analyze, run, trained
from callbacks.analyse import Analyse
from callbacks.checkpoint import last_checkpoint
from configuration import analysis, explain, problems
from conftest import ROOT, TINY, composed
from depthlab import ImageData
from depthlab.analysis import Result, choose, files
from depthlab.analysis.lesion import lesion
from depthlab.analysis.norms import norms
from depthlab.analysis.time_saved import time_saved
from depthlab.problem import Problem
from tests.growing import EPOCHS, classifier, digest, images, trainer
from train import train


def ask(*overrides):
    run(composed("analyze", "device=cpu", *overrides))


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """A network that has grown 2-2-2 -> 4-4-4 -> 8-8-8, and plain11: a few steps each."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    quick = [o for o in TINY if not o.startswith("arch")] + [f"data_dir={data_dir}", f"runs_dir={runs}", "budget=0.02"]
    quick.append("data.eval_batch_size=500")  # all of the test set's images in the one batch that TINY leaves
    grown = ["arch=multilevel", "arch.width=4", "sched=multilevel_cosine", "grow=multilevel", "grow.at=[54,107]"]
    for options in (grown, ["arch=plain11", "trainer.limit_train_batches=1"]):
        train(composed("train", *quick, *options))
    return {name: next(runs.glob(f"{name}*")) for name in ("ml", "plain11")}


def test_command(runs, tmp_path):
    folder = runs["ml"]
    small = ["analysis.images=60", "analysis.draws=2", "analysis.remove=[1,2]", "analysis.shuffle=[1]"]
    line = [f"run={folder}", "analysis=lesion", *small]
    script = [sys.executable, str(ROOT / "src/analyze.py"), *line, "device=cpu"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((folder / "analysis-lesion.json").read_text())
    assert about["scalars"]["blocks"] == 24  # the grown depth
    assert about["scalars"]["images"] == about["analysis"]["images"] == 60
    assert about["growth"] == {"blocks": [8, 8, 8], "step_size": 0.25}
    assert {"hardware", "versions", "git", "measured", "run", "step"} <= about.keys()
    with np.load(folder / "analysis-lesion.npz") as arrays:
        assert arrays["removed"].shape == (2, 2)
        assert arrays["removed_one"].shape == (24,)
    assert (folder / "analysis-lesion.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert result["analyses"]["lesion"] == about["scalars"]
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]  # nothing half-written is left

    first = (folder / "analysis-lesion.json").stat().st_mtime_ns
    ask(*line)
    assert (folder / "analysis-lesion.json").stat().st_mtime_ns == first
    with pytest.raises(Problem, match="'draws': 2.*force=true"):
        ask(*line, "analysis.draws=3")


def test_a_refused_command(tmp_path):
    script = [sys.executable, str(ROOT / "src/analyze.py"), "run=nowhere", "analysis=lesion"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "analyze.py: run=nowhere: there is no config.json in it; take a folder that src/train.py made"
    ]


def test_error_is_the_records_and_force_measures_anew(runs):
    """On the same images, the whole network's error is the one that training ended with."""
    folder = runs["ml"]
    config = json.loads((folder / "config.json").read_text())
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    net = trained(config, checkpoint, 10, "cpu")
    assert all(torch.equal(v, checkpoint["state_dict"][f"net.{k}"]) for k, v in net.state_dict().items())
    section = composed("analyze", "analysis=lesion")["analysis"] | {"name": "other", "remove": [], "shuffle": []}
    result = analyze(folder, section, torch.device("cpu"), None, force=False)
    record = json.loads((folder / "result.json").read_text())
    assert result.scalars["error"] == pytest.approx(record["test_error"], abs=1e-4)
    again = analyze(folder, section | {"draws": 2}, torch.device("cpu"), None, force=True)
    assert again.scalars == result.scalars
    assert json.loads((folder / "analysis-other.json").read_text())["analysis"]["draws"] == 2


def test_several_runs_and_time_saved(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask(f"run={runs['ml'].parent}/ml*", "analysis=time_saved")
    scalars = json.loads((runs["ml"] / "result.json").read_text())["analyses"]["time_saved"]
    assert scalars["block_steps"] == pytest.approx(100 * (1 - (1 / 4 + 1 / 2 + 1) / 3))  # an epoch each
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "last.ckpt"):
        (copy / name).write_bytes((runs["ml"] / name).read_bytes())
    ask(f"run=[{runs['ml']},{copy}]", "analysis=norms", "analysis.images=20")
    assert (tmp_path / "reports/norms.png").read_bytes().startswith(b"\x89PNG")
    assert not (copy / "result.json").exists()  # unfinished: measured all the same


def test_one_refusal_does_not_stop_the_list(runs, capsys):
    """It is named when it happens and at the end."""
    pattern = f"run=[{runs['plain11']},{runs['ml']}]"
    with pytest.raises(Problem) as refused:
        ask(pattern, "analysis=norms", "analysis.name=listed", "analysis.images=20")
    first, second = str(refused.value).splitlines()
    assert first == "1 of 2 runs were not measured:"
    assert second.startswith(f"    {runs['plain11'].name}: Plain11 has no residual blocks")
    assert f"{runs['plain11'].name}: not measured: Plain11 has no residual blocks" in capsys.readouterr().err
    assert files.read(runs["ml"], "listed")[0].scalars["images"] == 20


def test_weights_that_are_not_finite(runs):
    config = json.loads((runs["ml"] / "config.json").read_text())
    checkpoint = torch.load(runs["ml"] / "last.ckpt", weights_only=True)
    next(v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")).fill_(float("nan"))
    with pytest.raises(Problem, match="run=ml.* it diverged, its weights are not finite; leave it out"):
        trained(config, checkpoint, 10, "cpu")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run=no*", "analysis=norms"], "run=no*: no run's folder"),
        (["analysis=norms"], "run: say which run's folder"),
        (["run=bare", "analysis=norms"], "run=bare: there is no last.ckpt in it; train it first"),
        (["run=broken", "analysis=norms"], "last.ckpt: not a readable checkpoint"),
        (["run=torn", "analysis=norms"], "config.json: not a readable configuration"),
        (["run=PLAIN", "analysis=norms"], "Plain11 has no residual blocks"),
        (["run=PLAIN", "analysis=time_saved"], "did not grow"),
        (["run=ML"], "analysis: say which, there is "),
        (["run=ML", "analysis=lesions"], "analysis=lesions: there is no such analysis; did you mean lesion"),
        (["run=ML", "analysis=lesion", "+analysis.drawz=2"], "analysis.drawz: no such key; did you mean draws?"),
        (["run=ML", "analysis=lesion", "analysis.draws=few"], "analysis.draws=few: input should be a valid integer"),
        (["run=ML", "analysis=norms", "analysis.images=9999", "force=true"], "analysis.images must lie in 1..297"),
        (["run=ML", "analysis=norms", "analysis.split=val", "force=true"], "this run held out no images"),
        (["run=ML", "analysis=norms", "device=cuda:77"], "device=cuda:77"),
    ],
)
def test_refusals(overrides, said, runs, tmp_path, monkeypatch):
    """In one line."""
    for name in ("bare", "broken", "torn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((runs["ml"] / "config.json").read_text())
    (tmp_path / "broken/last.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "torn/last.ckpt").touch()
    (tmp_path / "torn/config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    places = {"run=PLAIN": f"run={runs['plain11']}", "run=ML": f"run={runs['ml']}"}
    with pytest.raises((Problem, HydraException)) as refused:
        ask(*(places.get(override, override) for override in overrides))
    line = str(refused.value) if isinstance(refused.value, Problem) else explain(refused.value)
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/analysis").glob("*.yaml")))
def test_every_analysis_file(name):
    section = composed("analyze", f"analysis={name}")["analysis"]
    assert section["name"] == name
    assert callable(analysis(section))
    assert callable(get_object(section["figure"]))


# ---- during training

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


class Remember(Logger):
    """Keeps what it is given."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(*more, folder=None, until=EPOCHS, **options):
    callbacks = [*more, *([last_checkpoint(folder)] if folder else [])]
    run = trainer(folder, max_epochs=until, callbacks=callbacks, **options)
    model = classifier()
    checkpoint = folder and next(iter(folder.glob("last.ckpt")), None)
    run.fit(model, *images(), ckpt_path=checkpoint)
    return model


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path):
    log, analyse = Remember(), Analyse(norms, at=(0, 2), every=3, batches=images()[1], folder=tmp_path)
    watched = fit(analyse, logger=log)
    assert digest(watched.net.state_dict()) == digest(fit().net.state_dict())
    assert watched.training
    assert [(row["epoch"], row["blocks"]) for row in analyse.rows] == [(0, 6), (2, 6), (3, 12), (6, 24)]
    seen = [(step, m["norms/gamma"]) for step, m in log.seen if "norms/gamma" in m]
    assert seen == list(zip([0, 5, 8, 17], [row["gamma"] for row in analyse.rows]))
    assert len(list(tmp_path.glob("analysis-norms-epoch*.npz"))) == 4
    assert files.read(tmp_path, "norms-epoch0003")[0].arrays["F"].shape == (12,)
    grown = norms(watched.net, images()[1])
    assert analyse.rows[-1]["gamma"] == grown.scalars["gamma"]


def careless(net, batches, scale: float = 1.0):
    torch.rand(7)
    return Result({"scale": scale, "undefined": None, "infinite": float("inf")}, {})


def test_random_numbers_and_what_is_undefined():
    class AtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            self.state = torch.get_rng_state()

    analyse, with_it, without = Analyse(partial(careless, scale=2.0), every=6, batches=[]), AtTheEnd(), AtTheEnd()
    torch.manual_seed(0)
    fit(with_it, analyse)
    torch.manual_seed(0)
    fit(without)
    assert torch.equal(with_it.state, without.state)
    assert analyse.rows == [{"epoch": 6, "scale": 2.0, "undefined": None, "infinite": None}]


def test_rows_are_resumed(tmp_path):
    whole, first, second = (Analyse(norms, at=(1, 4), batches=images()[1]) for _ in range(3))
    a = fit(whole)
    fit(first, folder=tmp_path, until=3)
    b = fit(second, folder=tmp_path)
    assert [row["epoch"] for row in first.rows] == [1]
    assert second.rows == whole.rows
    assert digest(a.net.state_dict()) == digest(b.net.state_dict())


MEASURED = ["+analysis@analyses.sizes=norms", "+analyses.sizes.at=[0,164]", "analyses.sizes.images=20"]


def test_a_run_with_analyses(data_dir, tmp_path):
    """Its record has their rows, its folder their arrays; its name and numbers are those of the run without."""
    places = [f"data_dir={data_dir}", "budget=0.02"]
    plain, watched = (
        train(composed("train", *TINY, *places, f"runs_dir={tmp_path}/{place}", *more))
        for place, more in (("plain", []), ("watched", MEASURED))
    )
    assert watched["name"] == plain["name"]
    assert watched["curves"]["train_loss"] == plain["curves"]["train_loss"]
    assert watched["test_loss"] == plain["test_loss"]
    assert plain["analyses"] == {}
    rows = watched["analyses"]["sizes_during"]
    assert [(row["epoch"], row["images"]) for row in rows] == [(0, 20), (3, 20)]
    folder = tmp_path / "watched" / watched["name"]
    found, about = files.read(folder, "sizes-epoch0003")
    assert found.scalars == {key: value for key, value in rows[1].items() if key != "epoch"}
    assert about["step"] == watched["steps"] == 12


def test_a_run_trained_without_is_measured_when_asked_again(cli, tmp_path):
    """Once, alone and in a sweep, and not trained again."""
    last, some = "+analyses.norms.at=[164]", "analyses.norms.images=20"
    assert cli(*TINY, "budget=0.006")[0] == 0
    (folder,) = (tmp_path / "runs").glob("resnet8*")
    before = (folder / "last.ckpt").stat().st_mtime_ns
    code, output = cli(*TINY, "budget=0.006", "+analysis@analyses.norms=norms", last, some)
    assert code == 0, output
    assert "norms measured" in output
    code, output = cli("-m", *TINY, "budget=0.006", "+analysis@analyses.sizes=norms", last.replace("norms", "sizes"))
    assert code == 0, output
    assert "1 to run" in output
    code, output = cli("-m", *TINY, "budget=0.006", "+analysis@analyses.norms=norms", last, some)
    assert "0 to run" in output
    assert (folder / "last.ckpt").stat().st_mtime_ns == before
    code, output = cli(*TINY, "budget=0.006", "trajectory.every=1")
    assert code == 2, output
    assert "trained without trajectory.every; delete the folder" in output
    record = json.loads((folder / "result.json").read_text())
    assert record["analyses"]["norms"]["images"] == 20
    assert record["analyses"]["sizes"]["images"] == 297


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+analyses.sizes.at=[200]"], "analyses.sizes: at >= 0 and every >= 1 must be epochs up to the recipe's last"),
        (["+analyses.sizes.every=0"], "analyses.sizes.every=0: input should be greater than or equal to 1"),
        (["+analyses.sizes.at=[soon]"], "analyses.sizes.at=soon: input should be a valid integer"),
        ([], "analyses.sizes: say when, analyses.sizes.at=[...] (epochs of the recipe) or analyses.sizes.every=..."),
        (["+analyses.sizes.at=[1]", "+analyses.sizes.horizn=2.0"], "analyses.sizes.horizn: no such key; did you mean"),
        (["+analyses.sizes.at=[1]", "analyses.sizes.horizon=far"], "analyses.sizes.horizon=far: input should be a"),
        (["+analyses.sizes.at=[1]", "analyses.sizes.split=tets"], "analyses.sizes.split=tets: input should be 'test'"),
        (["+analyses.sizes.at=[1]", "analyses.sizes.split=val"], "analyses.sizes.split=val: no images are held out"),
        (
            ["+analyses.sizes.at=[1]", "+analysis@analyses.i=interlayer", "+analyses.i.at=[1]", "analyses.i.block=99"],
            "analysis.block must lie in 1..",
        ),
        (["+analyses.sizes.at=[1]", "arch.shortcut=none"], "has no shortcuts (arch.shortcut=none)"),
        (["+analyses.sizes.at=[1]", "+analysis@analyses.t=time_saved", "+analyses.t.at=[1]"], "t: this analysis needs"),
    ],
)
def test_analyses_are_checked_before_anything_starts(overrides, line):
    found = problems(composed("train", *TINY, "+analysis@analyses.sizes=norms", *overrides))
    assert len(found) == 1
    assert line in found[0]
    assert "\n" not in found[0]


def test_epochs_scale_with_the_budget():
    assert Analyse(norms, at=(0, 60, 110, 160), epochs=160, budget=0.05).run_at == {0, 3, 6, 8}
    assert Analyse(norms, every=40, epochs=160, budget=0.1).run_at == {4, 8, 12, 16}
    assert Analyse(lesion, at=[7]).run_at == {7}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "say when"),
        ({"every": 0}, "analyses.norms: .* every >= 1 .*every=0"),
        ({"at": [-1]}, r"at=\[-1\]"),
        ({"at": [161], "epochs": 160}, r"up to the recipe's last, 160 .*at=\[161\]"),
        ({"at": [1], "analysis": time_saved}, "needs a finished run"),
    ],
)
def test_arguments(wrong, said):
    with pytest.raises(ValueError, match=said):
        Analyse(**{"analysis": norms} | wrong)


def test_without_images():
    with pytest.raises(Problem, match="no ImageData"):
        fit(Analyse(norms, every=1))


def test_chosen_images(data_dir):
    """A random choice, always the same; of what a run trained on or held out."""
    data = ImageData("digits", dir=data_dir, val_size=100)
    labels = [torch.cat([y for _, y in choose(data, split, 50)]) for split in ("test", "test", "train", "val")]
    assert torch.equal(labels[0], labels[1])
    assert len(set(labels[0].tolist())) == 10
    assert all(len(y) == 50 for y in labels)
    everything = {split: len(choose(data, split).labels) for split in ("test", "train", "val")}
    assert everything == {"test": 297, "train": 1400, "val": 100}
    x, y = next(iter(choose(data, "test")))
    np.testing.assert_array_equal(y, data.arrays.test_labels[: len(y)])
    assert x.dtype == torch.float32
