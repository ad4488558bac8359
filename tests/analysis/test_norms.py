"""Norms against a computation by hand, on networks of either family."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from depthlab import growth
from depthlab.analysis import Result, drawing
from depthlab.analysis.norms import difference, figure, norms, slope
from depthlab.architectures import MultilevelResNet, Plain11, ResNet
from depthlab.problem import Problem
from tests.analysis.nets import moved

NETS = {
    "multilevel": lambda: MultilevelResNet(blocks=2, width=4, step_size=0.5),
    "resnet": lambda: ResNet(10, depth=14, width=4),
    "projection": lambda: ResNet(10, depth=8, width=4, shortcut="projection"),
}


@pytest.fixture(params=NETS)
def net(request):
    return moved(NETS[request.param], 0.1, 1)


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 8, 8, generator=random), torch.randint(10, (n,), generator=random)) for n in (3, 3, 2)]


def by_hand(net, batches):
    """Images one by one, block by block."""
    sizes = []
    net = net.eval()
    with torch.no_grad():
        for x in torch.cat([x for x, _ in batches]).split(1):
            y = F.relu(net.stem_bn(net.stem(x)))
            for block in (block for stage in net.stages for block in stage):
                g = block.step_size * block.residual(y)
                sizes.append([y.pow(2).sum().sqrt(), g.pow(2).sum().sqrt(), y.numel() ** 0.5, g.numel() ** 0.5])
                y = block(y)
    return np.array(sizes).reshape(-1, sum(growth.depth(net)), 4).mean(0).T


def test_by_hand_and_the_network_untouched(net, batches):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, keys = [m.training for m in net.modules()], [set(vars(m)) for m in net.modules()]
    out = norms(net, batches)
    assert [m.training for m in net.modules()] == modes
    assert [set(vars(m)) for m in net.modules()] == keys
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    y, g, root_y, root_g = by_hand(net, batches)
    h = growth.step_size(net)
    expected = {"input": y, "residual": g, "F": g / h, "relative": g / y}
    expected |= {"input_rms": y / root_y, "residual_rms": g / root_g, "F_rms": g / h / root_g}
    for key, value in expected.items():
        np.testing.assert_allclose(out.arrays[key], value, rtol=1e-5)
    assert out.scalars["gamma"] == pytest.approx(g.mean(), rel=1e-5)
    assert out.scalars["images"] == 8
    np.testing.assert_allclose(out.arrays["time"], h * np.arange(len(y)))  # T = d h
    assert out.arrays["first"].sum() == 3


def test_batches_do_not_matter_and_double_precision_stays(net, batches):
    net = net.double()
    whole = [tuple(map(torch.cat, zip(*batches)))]
    one, other = norms(net, batches), norms(net, whole)
    for key, value in one.arrays.items():
        np.testing.assert_allclose(value, other.arrays[key], rtol=1e-12)


def test_time_axis_of_a_grown_network(batches):
    net = NETS["multilevel"]()
    before = norms(net, batches, horizon=60).arrays["time"]
    growth.grow(net)
    after = norms(net, batches, horizon=60).arrays
    np.testing.assert_allclose(after["time"][::2], before)
    np.testing.assert_allclose(after["step_size"], 0.25)
    assert after["time"][-1] == pytest.approx(55)


def result(d, gamma, F, time):
    return Result({"blocks": d, "gamma": gamma, "step_size": 1.0}, {"F": np.array(F), "time": np.array(time)})


def test_several_networks():
    reciprocal = [result(d, 30 / d, [1, 2, 3], [0, 1, 2]) for d in (6, 9, 54)]
    assert slope(reciprocal) == pytest.approx(-1)
    assert slope(reciprocal[:1]) is None
    fine = result(6, 1, [1, 1.5, 2, 2.5, 3], [0, 0.5, 1, 1.5, 2])  # the same line
    assert difference(reciprocal[0], fine) == pytest.approx(0, abs=1e-12)
    assert difference(result(1, 1, [3, 3], [0, 1]), result(1, 1, [1, 1], [0, 1])) == pytest.approx(1)
    assert drawing.png(figure(dict(zip("abc", reciprocal)))).startswith(b"\x89PNG")


def test_figure_4_has_the_same_bytes_for_the_same_numbers(net, batches):
    out = norms(net, batches)
    assert drawing.png(figure({"a": out})) == drawing.png(figure({"a": out}))


@pytest.mark.parametrize(
    ("net", "said"), [(Plain11(), "no residual blocks"), (ResNet(depth=8, width=2, shortcut="none"), "no shortcuts")]
)
def test_networks_without_residual_blocks(net, said, batches):
    with pytest.raises(Problem, match=said):
        norms(net, batches)
