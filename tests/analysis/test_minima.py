"""Starts and ends of several runs: distances by hand, a plane that is known, and the command on runs of seconds."""

import json

import numpy as np
import pytest
import torch

from analyze import run, started
from configuration import network
from conftest import TINY, composed
from depthlab.analysis import drawing
from depthlab.analysis.directions import Layout
from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.analysis.minima import Run, figure, minima
from depthlab.analysis.trajectory import stored
from depthlab.architectures import ResNet
from depthlab.problem import Problem
from train import train


def net(seed=0, **options):
    torch.manual_seed(seed)
    return ResNet(**{"num_classes": 3, "depth": 8, "width": 2, "shortcut": "none"} | options).double()


def moved(net, *steps):
    """A copy with the kernel of the stem moved along two fixed unit vectors."""
    random = torch.Generator().manual_seed(7)
    units = torch.linalg.qr(torch.randn(net.stem.weight.numel(), 2, generator=random, dtype=torch.float64))[0].T
    other = ResNet(3, depth=8, width=2, shortcut="none").double()
    other.load_state_dict(net.state_dict())
    for step, unit in zip(steps, units):
        other.stem.weight.data += step * unit.view_as(net.stem.weight)
    return other


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=random, dtype=torch.float64), torch.arange(8) % 3)] * 2


def test_planted_plane(batches, tmp_path):
    at = {"a": ((0, 0), (3, 1)), "b": ((0, 2), (-1, 0)), "c": ((0, 0), (0, -2))}
    base = net()
    runs = {name: Run(moved(base, *start), moved(base, *end)) for name, (start, end) in at.items()}
    before = [{k: v.clone() for k, v in part.state_dict().items()} for pair in runs.values() for part in pair]
    out = minima(runs, batches, tmp_path / "scratch.npz", grid=3, line=3, recalibrate=16)
    for part, old in zip((part for pair in runs.values() for part in pair), before):
        assert all(torch.equal(old[k], v) for k, v in part.state_dict().items())
    points = np.array([at[name] for name in at], dtype=float)  # (3, 2, 2)
    for i, result in enumerate(out.values()):
        expected = np.linalg.norm(points[i, 1] - points[:, 1], axis=1)
        np.testing.assert_allclose(result.arrays["distances"], expected, atol=1e-12)
        assert result.scalars["distance"] == pytest.approx(expected.sum() / 2)
        assert result.scalars["from_start"] == pytest.approx(np.linalg.norm(points[i, 1] - points[i, 0]))
        assert result.scalars["explained"] == pytest.approx(1)
        assert result.scalars["off_start"] == pytest.approx(0, abs=1e-6)
        assert result.scalars["off_end"] == pytest.approx(0, abs=1e-6)
        assert list(result.arrays["others"]) == list(at)
    feet = np.stack([result.arrays["path"] for result in out.values()])
    between = lambda p: np.linalg.norm(p.reshape(-1, 1, 2) - p.reshape(1, -1, 2), axis=2)  # noqa: E731
    np.testing.assert_allclose(between(feet), between(points), atol=1e-9)  # the plane is a picture true to scale

    some = out["a"].arrays
    layout, images = Layout(base), Resident.of(batches, torch.device("cpu"), torch.float64)
    evaluator = Evaluator(base, images, recalibrate=16)
    assert some["line"][0] == pytest.approx(evaluator(layout.vector(runs["a"].start))[0])
    assert some["line"][-1] == pytest.approx(evaluator(layout.vector(runs["a"].net))[0]) == out["a"].scalars["loss"]
    middle = (layout.vector(runs["a"].start) + layout.vector(runs["a"].net)) / 2
    assert some["line"][1] == pytest.approx(evaluator(middle)[0])
    assert out["a"].scalars["bump"] == max(
        0, some["line"][1] - some["line"][0], some["line"][2] - some["line"][:2].min()
    )
    assert some["loss"].shape == (3, 3)
    assert drawing.png(figure(out)) == drawing.png(figure(out))


def test_angles_are_blind_to_scale(batches, tmp_path):
    one, other = net(), net()
    for k, p in enumerate(p for p in other.parameters() if p.ndim > 1):
        p.data *= k + 2
    third = net()
    for p in third.parameters():
        if p.ndim > 1:
            p.data *= -1
    runs = {"a": Run(one, one), "b": Run(one, other), "c": Run(one, third)}
    out = minima(runs, batches, tmp_path / "s.npz", grid=0, line=2, recalibrate=16)
    np.testing.assert_allclose(out["a"].arrays["angles"], [0, 0, 2], atol=1e-7)
    assert out["b"].scalars["angle_from_start"] == pytest.approx(0, abs=1e-7)
    assert out["b"].scalars["from_start"] > 1
    assert "x" not in out["a"].arrays
    wrong = [part.eval()(batches[0][0]).argmax(1) for part in (one, third)]
    assert out["a"].arrays["disagreements"][2] == pytest.approx(100 * (wrong[0] != wrong[1]).double().mean())
    assert drawing.png(figure(out)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"grid": 2}, "analysis.grid must be >= 3"), ({"line": 1}, "analysis.line >= 2"), ({"recalibrate": 17}, "2..16")],
)
def test_refusals(options, said, batches, tmp_path):
    with pytest.raises(Problem, match=said):
        minima({"a": Run(net(), net())}, batches, tmp_path / "s.npz", **{"recalibrate": 16} | options)


def test_different_networks_are_refused(batches, tmp_path):
    runs = {"a": Run(net(), net()), "b": Run(net(width=4), net(width=4))}
    with pytest.raises(Problem, match=r"run=b: another network's weights.*of one architecture"):
        minima(runs, batches, tmp_path / "s.npz", recalibrate=16)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("made") / "runs"
    quick = [o for o in TINY if o != "arch=resnet"] + [f"data_dir={data_dir}", f"runs_dir={runs}", "budget=0.006"]
    quick += ["arch=li2018", "optim=li2018_sgd", "sched=li2018_step", "trajectory.every=1"]
    for more in (["arch.init=kaiming", "seed=1"], ["arch.init=normal", "arch.init_scale=3.0", "seed=2"]):
        train(composed("train", *quick, *more))
    return sorted(runs.glob("li*"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_command(runs, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ask = [
        f"run={runs[0].parent}/li*",
        "analysis=minima",
        "analysis.images=60",
        "analysis.recalibrate=40",
        "device=cpu",
    ]
    run(composed("analyze", *ask))
    records = [json.loads((folder / "result.json").read_text()) for folder in runs]
    scalars = [record["analyses"]["minima"] for record in records]
    assert scalars[0]["distance"] == scalars[1]["distance"] > 0
    assert (tmp_path / "reports/minima.png").exists()
    assert not list(runs[0].parent.rglob("*.part.npz"))
    capsys.readouterr()
    run(composed("analyze", *ask))
    assert capsys.readouterr().out.count("minima is there") == 2
    with pytest.raises(Problem, match="together was .* force=true"):
        run(composed("analyze", f"run={runs[0]}", *ask[1:]))
    for folder, record in zip(runs, records):
        config, checkpoint = record["config"], torch.load(folder / "last.ckpt", weights_only=True)
        start = started(config, checkpoint, 10, "cpu")
        layout = Layout(start)
        np.testing.assert_array_equal(stored(folder, start)[0], layout.vector(start))
        end = network(config, 10)
        end.load_state_dict({k[4:]: v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")})
        apart = (layout.vector(end) - layout.vector(start))[layout.trained].double().norm()
        assert record["analyses"]["minima"]["from_start"] == pytest.approx(float(apart))
