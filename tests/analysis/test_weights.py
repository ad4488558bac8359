"""Statistics of weights by hand, and the paper's columns before training."""

import numpy as np
import pytest
import torch

from depthlab.analysis import drawing
from depthlab.analysis.gradient import EDGES, gradient
from depthlab.analysis.gradient import figure as figure_of_gradients
from depthlab.analysis.weights import figure, weights
from depthlab.architectures import ResNet, SimpleNet
from depthlab.equivalence import plain
from depthlab.problem import Problem
from tests.analysis.nets import DEVICES, images, untouched


def made(depth, residual, seed=0):
    torch.manual_seed(seed)
    return SimpleNet(10, depth=depth, residual=residual, init="hmwi" if residual else "kwi")


@pytest.mark.parametrize("residual", [False, True])
def test_by_hand(residual):
    net = made(8, residual).double()
    with untouched(net):
        out = weights(net, weight_decay=0.5, batch_size=2)
    values, ids, squares, others = [], [], 0.0, 0.0
    for k, layer in enumerate(net.layers()):
        w = layer.conv.weight.detach().numpy().copy()
        squares += (w**2).sum()
        other = w.copy()
        for c in range(min(w.shape[:2]) if k else 0):
            other[c, c, 1, 1] += 1 if residual else -1
            ids.append((other if residual else w)[c, c, 1, 1])
        others += (other**2).sum()
        values.append((other if residual else w).ravel())
    t, ids = np.concatenate(values), np.array(ids)
    head = float(net.classifier.weight.detach().square().sum())
    expected = {
        "weights": t.size, "id_entries": ids.size, "mean": t.mean(), "std": t.std(), "mass": abs(t).sum(),
        "mass_large": abs(t)[abs(t) >= 0.25].sum(), "mass_id": abs(ids).sum(), "above_07": (abs(t) > 0.7).sum(),
        "penalty": 0.125 * (squares + head), "penalty_residual": 0.125 * ((squares if residual else others) + head),
    }  # fmt: skip
    for key, value in expected.items():
        assert out.scalars[key] == pytest.approx(value, rel=1e-9), key
    assert out.arrays["counts"].sum() == t.size
    assert out.arrays["id_counts"].sum() == ids.size


def test_a_twin_has_the_same_weights_as_they_act():
    net = made(8, True).double()
    one, other = weights(net), weights(plain(net))
    for key in one.scalars.keys() - {"penalty"}:
        assert one.scalars[key] == pytest.approx(other.scalars[key], rel=1e-12), key
    assert one.scalars["penalty"] == pytest.approx(other.scalars["penalty_residual"])
    assert other.scalars["penalty"] > 5 * one.scalars["penalty"]


def test_table_3_before_training():
    """Depth 32; the paper prints two digits."""
    p, t = weights(made(32, False)).scalars, weights(made(32, True)).scalars
    assert p["weights"] == 461_232
    assert p["id_entries"] == 1072
    assert p["mean"] == pytest.approx(0, abs=4e-4)
    assert p["std"] == pytest.approx(0.070, abs=5e-4)
    assert p["mass"] == pytest.approx(25_000, abs=100)
    assert p["mass_large"] == pytest.approx(420, abs=40)
    assert p["mass_id"] == pytest.approx(67, abs=9)
    assert t["mean"] == pytest.approx(0.0023, abs=5e-5)
    assert t["std"] == pytest.approx(0.048, abs=5e-4)
    assert t["mass"] == pytest.approx(1927, abs=5)
    assert t["mass_large"] == pytest.approx(1072, abs=2)
    assert t["mass_id"] == pytest.approx(1072, abs=2)
    assert t["id_mode"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("depth", "plain", "residual"), [(20, 5.393e-4, 2.014e-6), (32, 8.878e-4, 2.559e-6), (44, 1.238e-3, 3.118e-6)]
)
def test_table_4_before_training(depth, plain, residual):
    """The paper's numbers; the fully connected layer alone scatters by 5e-8."""
    assert weights(made(depth, False)).scalars["penalty"] == pytest.approx(plain, rel=0.01)
    assert weights(made(depth, True)).scalars["penalty"] == pytest.approx(residual, abs=1.5e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_any_device_same_numbers(device):
    net = made(8, True)
    one, other = weights(net), weights(net.to(device))
    assert one.scalars == other.scalars
    batches = images(net, 16)
    one, other = gradient(net.double().cpu(), batches), gradient(net.float().to(device), batches)
    np.testing.assert_allclose(one.arrays["moments"], other.arrays["moments"], rtol=1e-3, atol=1e-5)


def test_gradient_by_autograd():
    net = made(8, True).double()
    batches = images(net, 5, 4)
    with untouched(net.train()):
        out = gradient(net, batches)
    seen = []
    net.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = sum(torch.nn.functional.cross_entropy(net(x), y, reduction="sum") for x, y in batches)
    g = torch.cat(torch.autograd.grad(loss, seen)).numpy().ravel()
    assert out.scalars["mean"] == pytest.approx(g.mean(), rel=1e-9)
    assert out.scalars["std"] == pytest.approx(g.std(), rel=1e-9)
    assert out.scalars["kurtosis"] == pytest.approx(((g - g.mean()) ** 4).mean() / g.var() ** 2 - 3, rel=1e-6)
    np.testing.assert_array_equal(out.arrays["counts"], np.histogram(g, EDGES)[0])
    assert out.arrays["moments"][0] == 9 * 64


def test_what_is_refused_and_figures():
    net = made(8, False)
    out = weights(net)
    assert drawing.png(figure({"a": out, "b": out})).startswith(b"\x89PNG")
    out = gradient(net, images(net, 4))
    assert drawing.png(figure_of_gradients({"a": out})).startswith(b"\x89PNG")
    with pytest.raises(Problem, match="no exact map between plain and residual networks with BatchNorm"):
        weights(ResNet(10, depth=8))
    with pytest.raises(Problem, match="batch_size >= 1, got 0.0001 and 0"):
        weights(net, batch_size=0)
    with pytest.raises(Problem, match="pooled channels, not Identity"):
        gradient(torch.nn.Identity(), [])
