"""Li et al.'s networks, initialisations and recipe: counts, variances and rates as stated."""

import pytest
import torch
from torch import nn

from configuration import build, network
from conftest import composed
from depthlab.architectures.init import initialise
from depthlab.decay import parameter_groups
from depthlab.records import training_flops


def config(*overrides):
    return composed("train", "data=cifar10", "optim=li2018_sgd", "sched=li2018_step", "augment=crop", *overrides)


COUNTS = {  # parameters, forward MMAC
    "resnet20_projection": (272_474, 40.8),
    "resnet20_noshort": (269_722, 40.6),
    "resnet56_projection": (855_770, 125.7),
    "resnet56_noshort": (853_018, 125.5),
    "resnet110_projection": (1_730_714, 253.2),
    "resnet110_noshort": (1_727_962, 252.9),
    "wrn56_2": (3_412_394, 502),
    "wrn56_2_noshort": (3_401_770, 501),
    "wrn56_4": (13_628_234, 2007),
    "wrn56_4_noshort": (13_586_506, 2003),
    "wrn56_8": (54_470_282, 8023),
    "wrn56_8_noshort": (54_304_906, 8006),
    "vgg9": (2_789_706, 191.6),
}


@pytest.mark.parametrize("arch", COUNTS)
def test_counts(arch):
    net = network(config(f"arch={arch}"), device="meta")
    parameters, mmac = COUNTS[arch]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert training_flops(net, 32) / 6e6 == pytest.approx(mmac, rel=2e-3)


def test_vgg9_layers():
    net = network(config("arch=vgg9")).eval()
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 64, 128, 128, 256, 256, 256]
    assert all(m.bias is not None for m in convolutions)
    assert net.hidden.in_features == 4096
    x = torch.rand(2, 3, 32, 32)
    units = [[m for m in group if not isinstance(m, nn.ReLU)] for group in net.groups]
    y = x
    for group in units:
        for conv, bn in zip(group[::2], group[1::2]):
            y = bn(conv(y)).clamp(min=0)
        y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    y = net.hidden_bn(net.hidden(y.flatten(1))).clamp(min=0)
    torch.testing.assert_close(net(x), net.classifier(y))


@pytest.mark.parametrize(
    ("name", "conv", "linear"),
    [
        ("kaiming_fan_in", 2 / (9 * 64), 1e-6),
        ("kaiming", 2 / (9 * 64), 2 / 512),
        ("xavier", 2 / (9 * (64 + 128)), 2 / (512 + 400)),
        ("orthogonal", 1 / (9 * 64), 1 / 512),
        ("normal", 1e-4, 1e-4),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_initialiser_variances(name, conv, linear, scale):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Linear(512, 400))
    initialise(net, name, scale)
    for module, variance in zip(net, (conv, linear)):
        assert module.weight.var().item() == pytest.approx(scale**2 * variance, rel=0.02)
        assert not module.bias.any()


def test_orthogonal_kernels_keep_lengths():
    conv = nn.Conv2d(16, 32, 3)
    initialise(conv, "orthogonal", 2.0)
    rows = conv.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, 4 * torch.eye(32), rtol=0, atol=1e-5)


def test_scale_is_refused():
    with pytest.raises(ValueError, match=r"arch.init_scale must be > 0, got 0"):
        network(config("arch=vgg9", "arch.init_scale=0.0"))


def test_code_defaults():
    net = network(config("arch=resnet20_projection"))
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}
    assert net.classifier.weight.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("optim", "lr"), [("li2018_sgd", 0.1), ("li2018_adam", 0.001)])
def test_recipe(optim, lr):
    whole = config("arch=vgg9", f"optim={optim}")
    schedule = build(whole, "sched")
    assert schedule.epochs == 300
    for epoch, factor in ((0, 1), (149, 1), (150, 0.1), (224, 0.1), (225, 0.01), (274, 0.01), (275, 1e-3), (299, 1e-3)):
        assert schedule.lr(391 * epoch, 391) == pytest.approx(lr * factor)
    net, optim = network(whole, device="meta"), whole["optim"]
    decayed, spared = parameter_groups(net, optim["weight_decay"], optim["decay"])
    assert decayed["weight_decay"] == 5e-4
    assert sum(p.numel() for p in decayed["params"]) == 2_789_706
    assert not spared["params"]
