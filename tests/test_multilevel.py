import pytest
import torch

from depthlab.architectures import MultilevelResNet
from depthlab.records import training_flops


def built(**options):
    with torch.device("meta"):
        return MultilevelResNet(**options)


def size(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("width", "blocks", "classes", "expected"),
    [
        (16, 2, 10, 172_506), (16, 2, 100, 178_356), (16, 8, 10, 755_802), (16, 8, 100, 761_652),
        (16, 5, 10, 464_154), (16, 5, 100, 470_004), (16, 20, 10, 1_922_394), (16, 20, 100, 1_928_244),
        (32, 2, 10, 685_994), (32, 2, 100, 697_604), (32, 8, 10, 3_013_802), (32, 8, 100, 3_025_412),
        (32, 5, 10, 1_849_898), (32, 5, 100, 1_861_508), (32, 20, 10, 7_669_418), (32, 20, 100, 7_681_028),
    ],
)  # fmt: skip
def test_parameters_of_table_5(width, blocks, classes, expected):
    net = built(width=width, blocks=blocks, num_classes=classes)
    assert size(net) == expected
    assert net.depth == 6 * blocks + 2


@pytest.mark.parametrize(
    ("blocks", "width", "side", "mmac"),
    [(2, 16, 32, 26.40), (4, 16, 32, 54.71), (8, 16, 32, 111.33), (20, 16, 32, 281.20), (2, 32, 32, 104.70),
     (2, 16, 96, 26.40 * 9), (8, 32, 96, 444.43 * 9)],
)  # fmt: skip
def test_cost_per_image(blocks, width, side, mmac):
    assert training_flops(built(blocks=blocks, width=width), side) / 6e6 == pytest.approx(mmac, rel=1e-3)


@pytest.mark.parametrize("side", [32, 96])
def test_maps_and_channels(side):
    net = MultilevelResNet(blocks=2, width=4)
    shapes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape)))
    assert net(torch.randn(2, 3, side, side)).shape == (2, 10)
    assert shapes == [(2, 4, side, side), (2, 8, side // 2, side // 2), (2, 16, side // 4, side // 4)]


def test_only_the_very_first_block_lacks_a_leading_batchnorm():
    net = built(blocks=3)
    assert [[block.bn1 is None for block in stage] for stage in net.stages] == [[True] + 2 * [False]] + 2 * [
        3 * [False]
    ]
    assert not any("conv" in name and name.endswith("bias") for name, _ in net.named_parameters())


def test_batchnorm():
    norms = [m for m in built().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    assert size(torch.nn.ModuleList(norms)) == 2 * 16 * (14 * 2 + 1)


@pytest.mark.parametrize("stage", [0, 1])
def test_step_size_multiplies_the_residual_branch(stage):
    torch.manual_seed(0)
    net = MultilevelResNet(width=4, step_size=0.25).eval()
    block = net.stages[stage][0]
    x = torch.randn(2, 4, 8, 8)
    y = block(x)
    torch.testing.assert_close(y, block.shortcut(x) + 0.25 * block.residual(x))
    if stage == 1:  # 2x2 averages, zeros on both sides of the channels
        shortcut = block.shortcut(x)
        torch.testing.assert_close(shortcut[:, 2:6], torch.nn.functional.avg_pool2d(x, 2))
        assert shortcut[:, [0, 1, 6, 7]].abs().sum() == 0


def test_residual_is_pre_activation():
    """A block is the identity on what its last convolution ignores: there is no activation after the addition."""
    net = MultilevelResNet(width=4)
    block = net.stages[0][1]
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_initialisation():
    torch.manual_seed(0)
    net = MultilevelResNet(width=16, blocks=2)
    w = net.stages[2][1].conv1.weight.detach()
    sigma = (2 / (9 * 64)) ** 0.5
    assert w.abs().max() <= 2 * sigma
    assert w.std() == pytest.approx(0.8796 * sigma, rel=0.02)  # of a normal distribution cut at 2 sigma
    stem = net.stem.weight.detach()
    assert stem.abs().max() <= 2 * (2 / (9 * 16)) ** 0.5
    fc = net.classifier.weight.detach()
    assert 0.2 < fc.abs().max() <= 0.2166  # sqrt(3 / 64)
    assert net.classifier.bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"blocks": 0}, "arch.blocks"), ({"blocks": 2.5}, "arch.blocks"), ({"width": 0}, "arch.width"),
     ({"step_size": 0}, "arch.step_size"), ({"shortcut": "none"}, "arch.shortcut"), ({"init": "zeros"}, "arch.init")],
)  # fmt: skip
def test_refusals(options, named):
    with pytest.raises(ValueError, match=named):
        MultilevelResNet(**options)
