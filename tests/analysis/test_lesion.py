"""Lesions against networks really rebuilt without the block."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from depthlab.analysis import drawing
from depthlab.analysis.lesion import exchanged, figure, lesion, spearman
from depthlab.architectures import MultilevelResNet, ResNet
from depthlab.problem import Problem
from tests.analysis.nets import moved

NETS = {
    "multilevel": lambda: MultilevelResNet(blocks=4, width=4, step_size=0.5),
    "resnet": lambda: ResNet(10, depth=20, width=4),
    "projection": lambda: ResNet(10, depth=14, width=4, shortcut="projection"),
}


@pytest.fixture(params=NETS)
def net(request):
    return moved(NETS[request.param], 0.3, 1)


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 8, 8, generator=random), torch.randint(10, (n,), generator=random)) for n in (40, 24)]


def error(net, batches, without=(), order=None):
    """Of a copy whose chosen blocks have convolutions of nothing, or whose blocks stand in another order; in full."""
    net = copy.deepcopy(net).eval()
    blocks = [block for stage in net.stages for block in stage]
    for j in without:
        last = blocks[j].bn2 if isinstance(net, ResNet) else blocks[j].conv2
        for p in last.parameters():
            p.data.zero_()
    if order is not None:
        net.stages = torch.nn.ModuleList([torch.nn.Sequential(*(blocks[j] for j in order))])
    with torch.no_grad():
        wrong = sum((net(x).argmax(1) != y).sum().item() for x, y in batches)
    return 100 * wrong / sum(len(y) for _, y in batches)


def test_every_lesion_is_that_of_a_rebuilt_network(net, batches):
    with torch.no_grad():  # the whole network's own answers, so that a lesion shows
        batches = [(x, copy.deepcopy(net).eval()(x).argmax(1)) for x, _ in batches]
    out = lesion(net, batches, remove=[1, 3, 99], shuffle=[1, 2], draws=2, seed=5)
    d = out.scalars["blocks"]
    assert out.scalars["error"] == error(net, batches) == 0
    assert list(out.arrays["removed_one"]) == [error(net, batches, [j]) for j in range(d)]
    assert len(set(out.arrays["removed_one"])) > 2  # it matters which
    assert list(out.arrays["remove"]) == [1, 3]  # there are no 99
    first = out.arrays["first"]
    for m, row, gone in zip((1, 3), out.arrays["removed"], out.arrays["without"]):
        assert [error(net, batches, np.flatnonzero(g)) for g in gone] == list(row)
        assert all(g.sum() == m and not (g & first).any() for g in gone)
    for row, orders, taus in zip(out.arrays["shuffled"], out.arrays["order"], out.arrays["tau"]):
        assert [error(net, batches, order=order) for order in orders] == list(row)
        assert [kendalltau(range(d), order).statistic for order in orders] == pytest.approx(list(taus))


def test_the_network_is_bit_for_bit_as_before(net, batches):
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    modules = [(name, id(module), module.training, set(vars(module))) for name, module in net.named_modules()]
    random = torch.get_rng_state()
    lesion(net, batches, remove=[2], shuffle=[1], draws=1)
    assert modules == [(name, id(m), m.training, set(vars(m))) for name, m in net.named_modules()]
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert list(weights) == list(net.state_dict())
    assert torch.equal(random, torch.get_rng_state())


def test_an_error_on_the_way_leaves_it_whole_too(net, batches):
    names = [name for name, _ in net.named_modules()]
    with pytest.raises(RuntimeError):
        lesion(net, [*batches, (torch.randn(2, 4, 8, 8), torch.zeros(2))], draws=1)
    assert names == [name for name, _ in net.named_modules()]
    assert not any("residual" in vars(m) for m in net.modules())


def test_draws_are_seeded(batches):
    net = NETS["multilevel"]()
    one, same, other = (lesion(net, batches, [3], [4], draws=3, seed=s) for s in (0, 0, 1))
    for key in ("without", "order"):
        assert np.array_equal(one.arrays[key], same.arrays[key])
        assert not np.array_equal(one.arrays[key], other.arrays[key])


def test_exchanges_stay_inside_stages_and_leave_the_first():
    stages = [[None] * n for n in (3, 5, 2, 1)]
    rng = np.random.default_rng(0)
    seen = np.array([exchanged(stages, k, rng) for k in range(1, 40)])
    assert (seen[:, [0, 3, 8, 9, 10]] == [0, 3, 8, 9, 10]).all()
    for a, b in pairwise((0, 3, 8, 10, 11)):
        assert (np.sort(seen[:, a:b], axis=1) == np.arange(a, b)).all()
    assert sorted(exchanged(stages, 1, rng)) == list(range(11))
    assert (exchanged(stages, 1, rng) != np.arange(11)).sum() == 2


@pytest.mark.parametrize("blocks", [1, 2])
def test_networks_too_short_to_shuffle(blocks, batches):
    out = lesion(MultilevelResNet(blocks=blocks, width=2), batches, draws=2)
    assert out.arrays["order"].shape == (0, 2, 3 * blocks)
    assert len(out.arrays["remove"]) == 3 * (blocks - 1)
    assert (out.scalars["rise_later_median"] is None) == (blocks == 1)
    assert drawing.png(figure({"short": out})).startswith(b"\x89PNG")


def test_spearman():
    assert spearman(np.array([1.0, 2, 3, 9]), np.array([1.0, 10, 11, 12])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])) is None
    assert spearman(np.array([]), np.array([])) is None


def test_relative_norms_and_figure(net, batches):
    out = lesion(net, batches, remove=[1], shuffle=[], draws=1)
    assert out.arrays["relative"].shape == out.arrays["removed_one"].shape
    rise = out.arrays["removed_one"] - out.scalars["error"]
    assert out.scalars["spearman"] == spearman(rise, out.arrays["relative"])
    assert out.scalars["rise_first_mean"] == pytest.approx(rise[out.arrays["first"]].mean())
    assert out.scalars["spearman_shuffled_tau"] is None
    assert drawing.png(figure({"a": out, "b": out})).startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"remove": [0]}, {"shuffle": [2, -1]}])
def test_arguments(wrong, batches):
    with pytest.raises(Problem, match=rf"analysis.{next(iter(wrong))} must be >= 1"):
        lesion(NETS["multilevel"](), batches, **wrong)
