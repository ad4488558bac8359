"""Directions, folded forward passes, grids that go on: against closed forms and the networks' own forward passes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from depthlab.analysis import Result
from depthlab.analysis.directions import Layout, cosine, filter_normalise, random_direction
from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.analysis.folding import Folded, Layer
from depthlab.analysis.grid import Plane, evaluate, fingerprint, write
from depthlab.analysis.loss_surface import barrier, loss_surface
from depthlab.analysis.winograd import Chain, Convolution
from depthlab.architectures import VGG9, MultilevelResNet, Plain11, ResNet
from depthlab.fused.winograd import library
from depthlab.problem import Problem

SMALL = {"depth": 8, "width": 16, "num_classes": 10}
NETS = {
    "projection": lambda: ResNet(**SMALL, shortcut="projection"),
    "subsample": lambda: ResNet(**SMALL),
    "noshort": lambda: ResNet(**SMALL, shortcut="none", conv_bias=True),
    "preactivation": lambda: MultilevelResNet(num_classes=10, blocks=1, step_size=0.5),
    "plain11": lambda: Plain11(10),
    "vgg9": VGG9,
}


def trained(make=NETS["projection"], dtype=torch.float32):
    """With statistics and affine parameters as after training, not 0 and 1."""
    torch.manual_seed(0)
    net = make().to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -0.3), (module.running_var, 0.5), (module.weight, 0.5),
                                (module.bias, -0.2)):  # fmt: skip
                tensor.data.uniform_(low, low + 0.7)
    return net


def images(n=40, size=32, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(n, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return Resident(x, torch.arange(n) % 10)


class Quadratic(nn.Module):
    """Cross-entropy of two logits (q, 0) and label 1 is log(1 + exp(q)): q is recovered from the loss."""

    def __init__(self, hessian):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, len(hessian), dtype=torch.float64))
        self.hessian = hessian

    def forward(self, x):
        q = (self.w @ self.hessian @ self.w.T).reshape(1, 1) / 2
        return torch.cat([q, 0 * q], 1).expand(len(x), 2) + 0 * x.flatten(1)[:, :2]


# ---- directions


def test_a_filters_direction_has_the_filters_norm():
    net = trained()
    layout = Layout(net)
    directions = [layout.views(random_direction(net, 123, draw)) for draw in (0, 1)]
    state = net.state_dict()
    for d in directions:
        for name, v in d.items():
            if v.ndim > 1:
                norms = [t.flatten(1).norm(dim=1) for t in (v, state[name])]
                torch.testing.assert_close(*norms)
            else:
                assert not v.any(), name
    a, b = (random_direction(net, 123, draw) for draw in (0, 1))
    assert abs(cosine(a, b)) < 0.05
    assert torch.equal(a, random_direction(net, 123, 0))
    assert not torch.equal(a, random_direction(net, 124, 0))
    assert cosine(a, a) == pytest.approx(1)


def test_a_filter_of_zeros_has_a_direction_of_zeros():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    d = filter_normalise(torch.tensor([[1.0, 0.0], [2.0, 5.0]]), w)
    torch.testing.assert_close(d, torch.tensor([[5.0, 0.0], [0.0, 0.0]]))


def test_layout():
    net = trained()
    layout = Layout(net)
    vector = layout.vector(net)
    assert len(vector) == len(layout) == sum(v.numel() for v in net.state_dict().values() if v.is_floating_point())
    assert int(layout.trained.sum()) == sum(p.numel() for p in net.parameters())
    assert int(layout.kernels.sum()) == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in layout.views(vector).items())
    with pytest.raises(ValueError, match="stem.weight must have shape .* is missing"):
        layout.vector({})


# ---- the surface


def test_surface_of_a_quadratic():
    hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    net = Quadratic(hessian)
    theta, a, b = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, -1.0], [1.0, 0.0], [0.3, 0.7]))
    data = Resident(torch.zeros(5, 3, 2, 2, dtype=torch.float64), torch.ones(5, dtype=torch.int64))
    x = np.linspace(-1, 1, 5)
    points = [(p, q) for p in x for q in x]
    values = evaluate(points, Plane(theta, [a, b]), Evaluator(net, data))
    loss = np.log(np.expm1(values[:, 0])).reshape(5, 5)  # q again
    for i, p in enumerate(x):
        for j, q in enumerate(x):
            w = theta + p * a + q * b
            assert loss[i, j] == pytest.approx(float(w @ hessian @ w) / 2)
    d = x[1] - x[0]
    curvature = (loss[3, 2] - 2 * loss[2, 2] + loss[1, 2]) / d**2
    assert curvature == pytest.approx(float(a @ hessian @ a))


@pytest.mark.parametrize("name", NETS)
def test_folded_is_unfolded(name):
    net, data = trained(NETS[name]), images(6)
    state = net.state_dict()
    with torch.no_grad():
        there = net(data.x)
        for winograd, bound in ((False, 3e-6), (True, 3e-6)):
            forward = Folded(net, winograd=winograd)
            here = forward(forward.prepare(state, data.x), data.x)
            assert (here - there).abs().max() < bound * there.abs().max()
        exact = trained(NETS[name], torch.float64)
        forward, x = Folded(exact, torch.float64), data.x.double()
        torch.testing.assert_close(forward(forward.prepare(exact.state_dict(), x), x), exact(x), rtol=1e-12, atol=1e-13)
    layers = [step for program in forward.programs.values() for step in program.steps if isinstance(step, Layer)]
    if name in ("projection", "noshort", "subsample"):
        assert all(layer.bn is not None for layer in layers[:-1])
        assert sum(layer.other is not None for layer in layers) == (0 if name == "noshort" else 3)


@pytest.mark.skipif(library() is None, reason="no compiler")
@pytest.mark.parametrize("shape", [(2, 16, 16, 8, 8), (1, 32, 48, 7, 5), (3, 64, 16, 4, 4), (2, 16, 32, 1, 33)])
def test_winograd(shape):
    B, C, K, H, W = shape
    torch.manual_seed(0)
    x, other = torch.randn(B, C, H, W), torch.randn(B, K, H, W)
    w, bias = torch.randn(K, C, 3, 3) / (9 * C) ** 0.5, torch.randn(K)
    chain = Chain([Convolution("x", w, bias, "other", True, "y")], {"y"})
    assert chain.inputs == ["x", "other"]
    (y,) = chain(x, other)
    exact = F.relu(F.conv2d(x.double(), w.double(), bias.double(), padding=1) + other)
    assert (y - exact).abs().max() < 5e-5
    (y,) = Chain([Convolution("x", w, None, None, True, "y")], {"y"})(x * torch.nan)
    assert torch.isnan(y).all()


@pytest.mark.skipif(library() is None, reason="no compiler")
def test_a_chain_of_convolutions(monkeypatch):
    """A residual block and one more layer; two results are wanted; batches of two images, the last one of one."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 16, 8, 8), torch.randn(3, 16, 16, 3, 3) / 12
    links = [("x", None, "a"), ("a", "x", "b"), ("b", None, "c"), ("c", "b", "d")]
    layers = [Convolution(x, w[i % 3], None, other, True, out) for i, (x, other, out) in enumerate(links)]
    chain = Chain(layers, {"b", "d"})
    assert set(chain.slot) == {"a", "c"}
    assert chain.slot["a"] == chain.slot["c"]
    there = {"x": x.double()}
    for i, (source, other, out) in enumerate(links):
        y = F.conv2d(there[source], w[i % 3].double(), padding=1)
        there[out] = F.relu(y if other is None else y + there[other])
    monkeypatch.setattr("depthlab.analysis.winograd.BUFFER", 2 * 4 * 16 * 64)
    for y, name in zip(chain(x), ("b", "d")):
        assert (y - there[name]).abs().max() < 1e-4


def test_values_are_the_networks_own_and_it_is_left_alone():
    net, data = trained(), images()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    theta = Layout(net).vector(net)
    plane = Plane(theta, [random_direction(net, 1, draw) for draw in (0, 1)])
    (loss, error), (there, _) = evaluate([(0.0, 0.0), (0.3, -0.2)], plane, Evaluator(net, data, recalibrate=None))
    with torch.no_grad():
        z = net(data.x)
        assert loss == pytest.approx(float(F.cross_entropy(z, data.y)), rel=1e-5)
        assert error == pytest.approx(100 * float((z.argmax(1) != data.y).float().mean()))
        assert there != loss
        Evaluator(net, data, recalibrate=20)(plane.at((0.1, 0.1)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(theta, Layout(net).vector(net))
    assert not net.training


def test_recalibrated_statistics_are_those_of_the_images():
    """In training mode the network normalises by the same numbers."""
    net, data = trained(), images(20)
    vector = Layout(net).vector(net) * 1.3
    loss, _ = Evaluator(net, data, recalibrate=20)(vector)
    copy = trained()
    copy.load_state_dict(copy.state_dict() | Layout(net).views(vector))
    for m in copy.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    copy.train()
    copy(data.x)  # unbiased variances go in, as in any running statistics
    with torch.no_grad():
        assert loss == pytest.approx(float(F.cross_entropy(copy.eval()(data.x), data.y)), rel=1e-4)


def test_bf16_reports_its_error(tmp_path):
    net, data = trained(), images(20)
    options = {"folder": tmp_path, "scratch": tmp_path / "part.npz", "grid": 3, "span": 0.2}
    full, half = (loss_surface(net, [(data.x, data.y)], **options, precision=p) for p in ("32", "bf16"))
    error = np.abs(full.arrays["loss"] - half.arrays["loss"]).max()
    assert 0 < error < 0.1
    assert error <= half.scalars["rounding_max"] * (1 + 1e-6)  # 9 of the 10 points
    assert "rounding_max" not in full.scalars


def test_line_between_two_networks(tmp_path):
    """Ends are the two networks, running statistics too."""
    net, data = trained(), images(20)
    torch.manual_seed(5)
    other = trained(lambda: NETS["projection"]())
    for p in other.parameters():
        p.data.mul_(1.1)
    state = {f"net.{k}": v for k, v in other.state_dict().items()}
    (tmp_path / "other").mkdir()
    torch.save({"state_dict": state}, tmp_path / "other/last.ckpt")
    options = {"folder": tmp_path, "scratch": tmp_path / "part.npz", "directions": "between", "dimensions": 1}
    result = loss_surface(net, [(data.x, data.y)], **options, other=str(tmp_path / "other"), grid=5, span=[0, 1])
    with torch.no_grad():
        for end, model in ((0, net), (-1, other)):
            loss = float(F.cross_entropy(model(data.x), data.y))
            assert result.arrays["loss"][end] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(Problem, match="no readable last.ckpt"):
        loss_surface(net, [(data.x, data.y)], **options, other=str(tmp_path), grid=5)
    assert barrier(np.array([0, 0.5, 1]), np.array([1.0, 3.0, 2.0])) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"directions": "up"}, "directions must be one of random, between, pca, got 'up'"),
        ({"dimensions": 3}, "dimensions must be one of 1, 2, got 3"),
        ({"grid": 2}, "grid must be >= 3"),
        ({"workers": 0}, "analysis.workers >= 1, got 25 and 0"),
        ({"precision": "16"}, "precision must be one of 32, bf16"),
        ({"directions": "between"}, "analysis.other"),
        ({"span": [1.0, -1.0]}, r"span must be a number > 0 or \[low, high\]"),
        ({"span": -1.0}, "span must be"),
        ({"recalibrate": 1}, "recalibrate must lie in 2..20"),
        ({"directions": "pca"}, "trajectory.every=1"),
    ],
)
def test_refusals(options, said, tmp_path):
    data = images(20)
    with pytest.raises(Problem, match=said):
        loss_surface(trained(), [(data.x, data.y)], folder=tmp_path, scratch=tmp_path / "part.npz", **options)


# ---- going on


def test_only_what_is_missing_is_evaluated(tmp_path, monkeypatch):
    net, data = trained(), images(10)
    plane, scratch = Plane(Layout(net).vector(net), [random_direction(net, 1)]), tmp_path / "part.npz"
    points = [(c,) for c in np.linspace(-1, 1, 6).tolist()]
    whole = evaluate(points, plane, Evaluator(net, data), scratch=scratch)
    with np.load(scratch) as found:
        key, values, done = str(found["key"]), found["values"], found["done"]
    done[[1, 4]], values[[1, 4]] = False, np.nan
    write(scratch, key, values, done)
    seen = []
    original = Plane.at
    monkeypatch.setattr(Plane, "at", lambda self, point: seen.append(point) or original(self, point))
    again = evaluate(points, plane, Evaluator(net, data), scratch=scratch)
    assert seen == [points[1], points[4]]
    np.testing.assert_array_equal(again, whole)
    evaluate(points[:5], plane, Evaluator(net, data), scratch=scratch)  # another measurement: nothing is taken over
    assert len(seen) == 7
    assert fingerprint(1, torch.ones(2)) != fingerprint(1, torch.zeros(2))


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{src!r}, {root!r}, {tests!r}]
if __name__ == "__main__":
    import numpy as np
    from depthlab.analysis import grid
    from depthlab.analysis.directions import Layout, random_direction
    from depthlab.analysis.evaluator import Evaluator
    from analysis.test_surface import images, trained
    torch.set_num_threads(1)
    grid.EVERY = 0.0
    net, data = trained(), images({images})
    plane = grid.Plane(Layout(net).vector(net), [random_direction(net, 1)])
    points = [(c,) for c in np.linspace(-1, 1, 60).tolist()]
    values = grid.evaluate(points, plane, Evaluator(net, data), workers=int(sys.argv[2]), scratch=Path(sys.argv[1]))
    np.save(sys.argv[3], values)
"""


def start(folder, workers, name, images):
    script = folder / "grid.py"
    places = {"src": str(ROOT / "src"), "root": str(ROOT), "tests": str(ROOT / "tests"), "images": images}
    script.write_text(SCRIPT.format(**places))
    line = [sys.executable, str(script), str(folder / "part.npz"), str(workers), str(folder / f"{name}.npy")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_killed_grid_goes_on(tmp_path, monkeypatch):
    process = start(tmp_path, 1, "never", 100)
    part, known = tmp_path / "part.npz", 0
    until = time.monotonic() + 120
    while not known and time.monotonic() < until:
        time.sleep(0.05)
        if part.exists():
            with np.load(part) as found:
                known = int(found["done"].sum())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "never.npy").exists()
    with np.load(part) as found:
        before, done = found["values"], found["done"]
    assert 0 < done.sum() < 60
    net, data, seen = trained(), images(100), []
    plane = Plane(Layout(net).vector(net), [random_direction(net, 1)])
    points = [(c,) for c in np.linspace(-1, 1, 60).tolist()]
    whole, original = evaluate(points, plane, Evaluator(net, data)), Plane.at
    monkeypatch.setattr(Plane, "at", lambda self, point: seen.append(point) or original(self, point))
    resumed = evaluate(points, plane, Evaluator(net, data), scratch=part)
    assert len(seen) == 60 - done.sum()
    np.testing.assert_array_equal(resumed, whole)
    np.testing.assert_array_equal(resumed[done], before[done])


@pytest.mark.slow
def test_two_workers_find_the_same(tmp_path):
    values = []
    for workers in (1, 2):
        process = start(tmp_path, workers, f"w{workers}", 50)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        (tmp_path / "part.npz").unlink()
        values.append(np.load(tmp_path / f"w{workers}.npy"))
    np.testing.assert_array_equal(*values)


def test_result_has_what_the_figure_needs(tmp_path):
    data = images(20)
    result = loss_surface(trained(), [(data.x, data.y)], folder=tmp_path, scratch=tmp_path / "p.npz", grid=3)
    assert isinstance(result, Result)
    assert result.arrays["loss"].shape == result.arrays["error"].shape == (3, 3)
    assert result.arrays["loss"][1, 1] == pytest.approx(result.scalars["loss_center"], rel=1e-6)
    assert result.scalars["points"] == 9
