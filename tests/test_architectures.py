"""What the papers state: parameters, layers, feature maps; and the same outputs as a second implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthlab.architectures import Plain11, ResNet


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def layers(net: nn.Module) -> int:
    """Layers with weights; a projection runs beside the block and does not count."""
    return sum(isinstance(m, nn.Conv2d | nn.Linear) and getattr(m, "kernel_size", 3) != (1, 1) for m in net.modules())


def maps(net: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """(C, H, W) of every convolution's output, in order, repeats dropped."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
        for m in net.modules()
        if isinstance(m, nn.Conv2d)
    ]
    net.eval()(x)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(shapes))


def test_plain11():
    net = Plain11(100)
    assert parameters(net) == 3_381_796
    assert layers(net) == 11
    assert maps(net, torch.zeros(1, 3, 32, 32)) == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert net.eval()(torch.zeros(2, 3, 96, 96)).shape == (2, 100)  # any image size


def test_plain11_normalises_after_the_relu():
    unit = Plain11(10).eval().blocks[0][0]
    x = torch.randn(2, 3, 8, 8)
    expected = unit.bn(F.relu(unit.conv(x)))
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_classes": 10, "depth": 20}, 269_722),
        ({"num_classes": 10, "depth": 20, "shortcut": "none"}, 269_722),
        ({"num_classes": 10, "depth": 20, "shortcut": "projection"}, 272_474),
        ({"num_classes": 10, "depth": 56}, 853_018),
        ({"num_classes": 10, "depth": 56, "shortcut": "projection"}, 855_770),
        ({"num_classes": 10, "depth": 110}, 1_727_962),
        ({"num_classes": 10, "depth": 110, "shortcut": "projection"}, 1_730_714),
        ({"num_classes": 100, "depth": 110, "conv_bias": True, "shortcut": "avgpool_symmetric"}, 1_737_860),
    ],
)
def test_resnet_parameters(options, count):
    with torch.device("meta"):
        net = ResNet(**options)
    assert parameters(net) == count
    assert layers(net) == options["depth"]


@pytest.mark.parametrize("shortcut", ["subsample", "avgpool_symmetric", "projection", "none"])
def test_resnet_maps(shortcut):
    net = ResNet(10, 20, shortcut=shortcut)
    assert maps(net, torch.zeros(1, 3, 32, 32)) == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize(("depth", "nearest"), [(21, 20), (7, 8), (100, 98)])
def test_depth_must_be_6n_plus_2(depth, nearest):
    with pytest.raises(ValueError, match=f"arch.depth must be 6n \\+ 2 .* got {depth}; the nearest is {nearest}"):
        ResNet(10, depth)


def test_shortcuts_by_hand():
    x = torch.randn(2, 16, 8, 8)
    subsample = ResNet(10, 8).stages[1][0].shortcut(x)
    assert torch.equal(subsample[:, :16], x[:, :, ::2, ::2])
    assert not subsample[:, 16:].any()
    symmetric = ResNet(10, 8, shortcut="avgpool_symmetric").stages[1][0].shortcut(x)
    torch.testing.assert_close(symmetric[:, 8:24], x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)))
    assert not symmetric[:, :8].any()
    assert not symmetric[:, 24:].any()


def test_glorot_uniform():
    weight = Plain11(10).blocks[1][0].conv.weight  # 64 -> 128
    bound = (6 / (9 * 64 + 9 * 128)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


class HeBlock(nn.Module):
    """The block as public CIFAR ResNets of He et al. write it (option A), names as they are there."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.pad = c_out - c_in

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = torch.cat([x[:, :, ::2, ::2], x.new_zeros(len(x), self.pad, *y.shape[2:])], 1)
        return torch.relu(y + x)


class HeNet(nn.Module):
    def __init__(self, n, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[HeBlock(16, 16, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(*[HeBlock(16 if k == 0 else 32, 32, 2 if k == 0 else 1) for k in range(n)])
        self.layer3 = nn.Sequential(*[HeBlock(32 if k == 0 else 64, 64, 2 if k == 0 else 1) for k in range(n)])
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def ours(name: str) -> str:
    """A public CIFAR ResNet's parameter name as ours."""
    for theirs, mine in (("conv1", "stem"), ("bn1", "stem_bn"), ("linear", "classifier")):
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, mine, 1)
    return f"stages.{int(name[5]) - 1}{name[6:]}"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_public_weights_give_the_same_logits(mode):
    torch.manual_seed(0)
    theirs = HeNet(3, 10)
    for m in theirs.modules():  # as after training
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.2)
            nn.init.normal_(m.bias, 0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
    net = ResNet(10, 20, bn_eps=1e-5, bn_momentum=0.1)
    net.load_state_dict({ours(name): value for name, value in theirs.state_dict().items()})
    x = torch.randn(4, 3, 32, 32)
    for model in (net, theirs):
        getattr(model, mode)()
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-5)
