"""Layer cushions against matrices made explicitly, image by image."""

import numpy as np
import pytest
import torch

from depthlab.analysis import drawing
from depthlab.analysis.cushion import cushion, figure, per_sample
from depthlab.architectures import DominantNet, ResNet, SimpleNet
from depthlab.equivalence import plain
from depthlab.problem import Problem
from tests.analysis.nets import DEVICES, images, untouched


def matrix(layer, shape):
    """What a layer does before its bias and ReLU, as a matrix: one column per input entry."""
    units = torch.eye(int(np.prod(shape)), dtype=torch.double).reshape(-1, *shape)
    y = layer.conv(units) - layer.conv.bias[:, None, None]
    return (y if layer.shortcut is None else y + layer.shortcut(units)).flatten(1).T.detach().numpy()


@pytest.mark.parametrize("residual", [False, True])
def test_by_matrices(residual):
    torch.manual_seed(0)
    net = SimpleNet(10, depth=8, width=2, residual=residual).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    batches = images(net, 2, 1)
    with untouched(net.train()):
        out = cushion(net, batches, layer=3)
    y = torch.cat([x for x, _ in batches])
    for k, layer in enumerate(net.layers()):
        A = matrix(layer, y.shape[1:])
        r = float(layer.conv.weight.detach().norm())
        identity = torch.zeros_like(layer.conv.weight)
        for c in range(min(identity.shape[:2]) if k else 0):
            identity[c, c, 1, 1] = 1
        full = float((layer.conv.weight + identity).detach().norm()) if residual else r
        reduced = r if residual else float((layer.conv.weight - identity).detach().norm())
        norms = {"own": r, "full": full, "reduced": reduced}
        for key, norm in norms.items():
            expected = [np.linalg.norm(A @ x) / norm / np.linalg.norm(x) for x in y.flatten(1).numpy()]
            np.testing.assert_allclose(per_sample(out, k + 1, key), expected, rtol=1e-6)
        y = layer(y).detach()
    assert out.scalars["own_min"] == pytest.approx(per_sample(out, 3).min())
    assert out.scalars["images"] == 3


def test_a_residual_network_and_its_plain_twin_differ_in_the_papers_norm_only():
    torch.manual_seed(0)
    net = SimpleNet(10, depth=8, width=4, residual=True, init="hmwi").double()
    batches = images(net, 4)
    one, twin = cushion(net, batches, layer=2), cushion(plain(net), batches, layer=2)
    np.testing.assert_allclose(one.arrays["gain"], twin.arrays["gain"], rtol=1e-6)
    for key in ("full", "reduced"):
        np.testing.assert_allclose(one.arrays[f"norm_{key}"], twin.arrays[f"norm_{key}"], rtol=1e-9)
    assert one.scalars["own_mean"] > 3 * twin.scalars["own_mean"]
    assert twin.scalars["own_mean"] == twin.scalars["full_mean"]


def test_before_training_as_sampled():
    """Layer 10, depth 20: plain .16 to .23 by seed, residual 3.0, with the full norm .18: the norm decides."""
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    means = {}
    for init, residual in (("kwi", False), ("hmwi", True)):
        torch.manual_seed(1)
        net = SimpleNet(10, depth=20, residual=residual, init=init)
        means[init] = cushion(net, [(x, None)], layer=10).scalars
    assert 0.1 < means["kwi"]["own_mean"] < 0.25
    assert means["hmwi"]["own_mean"] == pytest.approx(3.0, abs=0.1)
    assert means["hmwi"]["full_mean"] == pytest.approx(0.175, abs=0.005)


@pytest.mark.parametrize("device", DEVICES)
def test_any_device_same_numbers(device):
    torch.manual_seed(1)
    net = SimpleNet(10, depth=8, width=8, residual=True)
    batches = images(net, 16)
    one, other = cushion(net.double(), batches, 3), cushion(net.float().to(device), batches, 3)
    for key, value in one.arrays.items():
        np.testing.assert_allclose(value, other.arrays[key], rtol=1e-4)


def test_a_black_image_is_left_out_and_what_is_refused():
    net = SimpleNet(10, depth=5, width=2)
    ((x, y),) = images(net, 3)
    x[1] = 0
    out = cushion(net, [(x, y)], layer=1)
    assert len(per_sample(out, 1)) == 2
    assert np.isfinite(out.scalars["own_mean"])
    assert drawing.png(figure({"a": out, "b": out})).startswith(b"\x89PNG")
    with pytest.raises(Problem, match="analysis.layer must lie in 1..4, the convolutions of this network, got 5"):
        cushion(net, [(x, y)], layer=5)
    for other, said in ((ResNet(10, depth=8), "BatchNorm"), (DominantNet(10, depth=5), "neither")):
        with pytest.raises(Problem, match=said):
            cushion(other, [])


def test_a_dead_network_has_none():
    net = SimpleNet(10, depth=8, width=2)
    net.stages[0][0].conv.bias.data -= 1e3
    out = cushion(net, images(net, 2, 1), layer=3)
    assert np.isnan(out.scalars["own_min"])
    assert out.scalars["images"] == 3
    assert drawing.png(figure({"dead": out}))[:4] == b"\x89PNG"
