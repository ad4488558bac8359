"""T and its inverse: same function, same training, for kernels of any odd sides; the penalty that goes with them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from configuration import problems
from conftest import TINY, composed
from depthlab import Classifier
from depthlab.architectures import DominantNet, MultilevelResNet, Plain11, ResNet, SimpleNet
from depthlab.decay import penalty
from depthlab.equivalence import T, id_entries, identity_kernels, plain, residual
from depthlab.growth import grow
from depthlab.problem import Problem
from train import train as train_a_run


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (3, 5), (1, 7)])
@pytest.mark.parametrize(("c", "d"), [(4, 4), (4, 8), (8, 4)])
def test_identity_as_a_kernel(kernel, c, d):
    """A convolution by ones at the ID entries and by nothing else is the identity, every second pixel with stride 2."""
    weight = torch.zeros(d, c, *kernel)
    state = T({"w": weight, "b": torch.ones(d)}, ["w"])
    assert state["w"].sum() == min(c, d)
    assert not weight.any()  # the original is not touched
    assert torch.equal(state["b"], torch.ones(d))
    assert torch.equal(T(state, ["w"], inverse=True)["w"], weight)
    x, n = torch.randn(2, c, 9, 9), min(c, d)
    for stride in (1, 2):
        y = F.conv2d(x, state["w"], stride=stride, padding=tuple(side // 2 for side in kernel))
        torch.testing.assert_close(y[:, :n], x[:, :n, ::stride, ::stride], rtol=0, atol=1e-6)
        assert not y[:, n:].any()


@pytest.mark.parametrize("shape", [(4, 4, 2, 3), (4, 4), (4, 4, 3, 4)])
def test_no_id_entries(shape):
    with pytest.raises(ValueError, match="odd U and V, got"):
        id_entries(torch.zeros(shape))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_networks_are_the_same_function(kernel):
    torch.manual_seed(0)
    r = SimpleNet(10, 11, width=4, kernel=kernel, residual=True, init="hmwi").double()
    for p in r.parameters():
        p.data += 0.1 * torch.randn_like(p)
    before = {k: v.clone() for k, v in r.state_dict().items()}
    p = plain(r)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(p(x), r(x), rtol=1e-12, atol=1e-12)
    assert not p.residual
    back = residual(p)
    assert back.residual
    for name, value in r.state_dict().items():
        assert torch.equal(value, before[name])
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=1e-15)
        changed = name in identity_kernels(r)
        assert (p.state_dict()[name] != value).sum() == (id_entries(value).numel() if changed else 0)
    assert all(torch.equal(a, b) for a, b in zip(plain(p).parameters(), p.parameters()))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_same_seed_same_start(precision):
    """start=identity is T(r0) to the last bit, though r0 is drawn in single precision."""
    nets = []
    for options in ({"residual": True}, {"start": "identity"}):
        torch.manual_seed(3)
        nets.append(SimpleNet(10, 11, init="hmwi", **options).to(precision))
    r, p = (net.state_dict() for net in nets)
    assert all(torch.equal(value, T(r, identity_kernels(nets[0]))[name]) for name, value in p.items())
    assert all(torch.equal(value, T(p, identity_kernels(nets[1]), inverse=True)[name]) for name, value in r.items())
    assert r["stages.0.0.conv.weight"].std() == pytest.approx(1 / 144, rel=0.1)


@pytest.mark.parametrize("net", [ResNet(10, 8, 4), ResNet(10, 8, 4, shortcut="none"), MultilevelResNet(), Plain11()])
def test_batch_norm_allows_no_such_map(net):
    with pytest.raises(Problem, match="BatchNorm .*sigma is another for every batch"):
        plain(net)


def test_other_networks():
    with pytest.raises(Problem, match="DominantNet is neither"):
        plain(DominantNet(10, 8, 4))
    with pytest.raises(Problem, match="Linear is neither"):
        residual(torch.nn.Linear(2, 2))
    grow(grown := SimpleNet(10, 8, 4, residual=True))
    with pytest.raises(Problem, match="has grown"):
        plain(grown)


def images():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(160, 3, 8, 8, generator=random, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(10, (160,), generator=random)), batch_size=16)


def train(net, clip=None, **options):
    """20 steps of SGD with momentum in double precision. Returns the Classifier."""
    torch.manual_seed(0)
    model = Classifier(net, lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=2, precision="64-true", gradient_clip_val=clip, **quiet)
    trainer.fit(model, images())
    assert trainer.global_step == 20
    return model


@pytest.fixture
def start():
    torch.manual_seed(0)
    return SimpleNet(10, 11, width=8, residual=True, init="hmwi").double()


def distance(p, r):
    """max |T^-1(p) - r|"""
    return max((a - b).abs().max().item() for a, b in zip(residual(p).parameters(), r.parameters()))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*LeafSpec", "ignore:.*many workers")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_equivalent_training(start, clip):
    """Section 4.1: T^-1(p) stays r. With the penalty on p, or other batches, it does not."""
    wd = 1e-4 / 128
    r = train(copy.deepcopy(start), clip, weight_decay=wd)
    p = train(plain(start), clip, weight_decay=wd, decay_towards="identity")
    assert distance(p.net, r.net) < 1e-12
    assert distance(plain(start), r.net) > 1e-3  # it has learnt
    assert p.penalty() == pytest.approx(r.penalty(), rel=1e-12)
    wrong = train(plain(start), clip, weight_decay=wd)
    assert 1e-8 < distance(wrong.net, r.net) < 1e-4


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The number of training batches", "ignore:.*LeafSpec")
def test_runs_of_one_seed_are_equivalent(data_dir, tmp_path):
    """Table 2's pairs as src/train.py makes them: same start, same augmented batches, same losses at every step."""
    tiny = [option for option in TINY if not option.startswith(("arch=", "augment="))]
    tiny += [f"data_dir={data_dir}", f"runs_dir={tmp_path}", "budget=0.01", "data.batch_size=16", "augment=crop"]
    results, losses = [], []
    for arch in ("simple_residual", "simple_transferred"):
        options = [*tiny, f"arch={arch}", "optim=yu2019", "sched=yu2019", "trainer.precision=64-true", "seed=5"]
        config = composed("train", *options)
        assert problems(config) == []
        results.append(train_a_run(config))
        losses.append(np.load(tmp_path / results[-1]["name"] / "losses.npy"))
    r, p = results
    assert len(losses[0]) == 8
    assert len(set(losses[0])) == 8
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-13)
    assert r["penalty"] == pytest.approx(p["penalty"], rel=1e-10)
    assert r["penalty"] < 5e-5  # the 44 ones of T(r) alone would have 1.4e-4
    assert r["test_error"] == p["test_error"]


def test_penalty_by_hand(start):
    kernels = [p for p in start.parameters() if p.ndim > 1]
    by_hand = 0.01 / 2 * sum(p.square().sum().item() for p in kernels)
    assert penalty(start, 0.01) == pytest.approx(by_hand, rel=1e-12)
    assert penalty(plain(start), 0.01, decay_towards="identity") == pytest.approx(by_hand, rel=1e-12)
    assert penalty(plain(start), 0.01) > 10 * by_hand


@pytest.mark.parametrize(
    ("depth", "plain_wd", "residual_wd"),
    [(20, 5.388e-4, 2.048e-6), (32, 8.888e-4, 2.569e-6), (44, 1.2388e-3, 3.090e-6)],
)
def test_weight_penalty_before_training(depth, plain_wd, residual_wd):
    """Table 4, first three rows: lambda / (2 * 128) ||w||^2, within 3 sigma of its expectation."""
    n, scale = (depth - 2) // 3, 1e-4 / 256
    assert plain_wd == pytest.approx(scale * (32 + 224 * n + 10 / 3), rel=1e-3)
    assert residual_wd == pytest.approx(scale * (1 / 48 + (3 * n - 1) / 9 + 10 / 3), rel=1e-3)
    torch.manual_seed(depth)
    fc = 3 * scale * 0.118  # the fully connected layer's is the larger part of the residual network's scatter
    start = SimpleNet(10, depth, init="hmwi", start="identity")
    assert penalty(SimpleNet(10, depth), 1e-4 / 128) == pytest.approx(plain_wd, rel=0.01)
    assert penalty(start, 1e-4 / 128, decay_towards="identity") == pytest.approx(residual_wd, abs=fc + 1e-8)
