"""Interlayer cushions against Jacobians written out; what BatchNorm's statistics make of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev

from depthlab.analysis import drawing
from depthlab.analysis.interlayer import cushions, figure, interlayer
from depthlab.architectures import MultilevelResNet, ResNet, SimpleNet
from depthlab.problem import Problem
from tests.analysis.nets import DEVICES, images, untouched

NONE = torch.Generator()


def twins(width=3, depth=14):
    nets = []
    for shortcut in ("none", "subsample"):
        torch.manual_seed(0)
        net = ResNet(10, depth=depth, width=width, shortcut=shortcut, init="kaiming_normal").double().eval()
        for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.running_mean.uniform_(-0.2, 0.2)
            bn.running_var.uniform_(0.5, 2)
            bn.weight.data.uniform_(0.5, 1.5)
        nets.append(net)
    return nets


@pytest.mark.parametrize("shortcut", [0, 1])
@pytest.mark.parametrize("mode", ["running", "batch"])
def test_by_the_whole_jacobian(shortcut, mode):
    net = twins()[shortcut]
    batches = images(net, 2, 1)
    with untouched(net.train()):
        out = interlayer(net, batches, block=3, bn_mode=mode, norm="exact")
    if mode == "batch":
        for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.running_mean = bn.running_var = None  # then evaluation mode takes the batch's, here of one image
    blocks = [block for stage in net.eval().stages for block in stage]
    for x, found in zip(torch.cat([x for x, _ in batches]).split(1), out.arrays[mode], strict=True):
        x = blocks[1](blocks[0](F.relu(net.stem_bn(net.stem(x)))))[0].detach()
        J = jacrev(lambda x: blocks[2](x[None])[0])(x).detach().reshape(-1, x.numel())
        expected = x.numel() ** 0.5 * (J @ x.flatten()).norm() / J.norm() / x.norm()
        assert found == pytest.approx(float(expected), rel=1e-9)


def test_scaling_is_one_and_hutchinson_is_within_2_percent():
    x = torch.rand(3, 2, 8, 8, dtype=torch.double)
    for probes in (None, 1):
        np.testing.assert_allclose(cushions(lambda x: -2.5 * x, x, probes, NONE), 1, rtol=1e-12)
    net = twins(width=16)[1]
    batches = images(net, 2, side=16)
    exact = interlayer(net, batches, norm="exact", bn_mode="both", block=3)
    estimate = interlayer(net, batches, probes=64, bn_mode="both", block=3)
    for mode in ("running", "batch"):
        np.testing.assert_allclose(estimate.arrays[mode], exact.arrays[mode], rtol=0.02)
        assert not np.array_equal(estimate.arrays[mode], exact.arrays[mode])


def test_the_papers_numbers_come_from_statistics_of_the_batch():
    """Sampled before on a random block, 32 x 16 x 16: batch plain 7e-7, residual .59; running 1.15 and 1.20."""
    torch.manual_seed(0)
    means = {}
    for shortcut in ("none", "subsample"):
        net = ResNet(10, depth=20, shortcut=shortcut, init="kaiming_normal", bn_eps=1e-5)
        batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2))]
        means[shortcut] = interlayer(net, batches, probes=8).scalars
    assert 0 < means["none"]["batch_mean"] < 1e-5
    assert 0.3 < means["subsample"]["batch_mean"] < 1
    for shortcut in means:
        assert 0.8 < means[shortcut]["running_mean"] < 1.6


@pytest.mark.parametrize("device", DEVICES)
def test_any_device_same_numbers(device):
    net = twins()[1]
    batches = images(net, 4)
    one, other = interlayer(net, batches, block=2), interlayer(net.float().to(device), batches, block=2)
    for mode in ("running", "batch"):
        np.testing.assert_allclose(one.arrays[mode], other.arrays[mode], rtol=1e-4)


def test_a_simplified_block_what_is_refused_and_the_figure():
    net = SimpleNet(10, depth=8, width=2, residual=True).double()
    out = interlayer(net, images(net, 2), block=6, probes=4)
    np.testing.assert_array_equal(out.arrays["running"], out.arrays["batch"])
    results = dict(zip(("plain", "residual"), (interlayer(net, images(net, 4), block=2, probes=2) for net in twins())))
    assert drawing.png(figure(results)).startswith(b"\x89PNG")
    for option, said in (
        ({"block": 7}, "analysis.block must lie in 1..6, the blocks of this network, got 7"),
        ({"bn_mode": "train"}, "analysis.bn_mode must be one of both, running, batch, got 'train'"),
        ({"norm": "l1"}, "analysis.norm must be one of hutchinson, exact, got 'l1'"),
        ({"probes": 0}, "analysis.probes must be >= 1, got 0"),
    ):
        with pytest.raises(Problem, match=said):
            interlayer(net, [], **option)
    with pytest.raises(Problem, match="no layers of plain or residual blocks"):
        interlayer(MultilevelResNet(), [])
