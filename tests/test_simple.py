"""Simplified networks: what the paper counts, where the identity sits, how kernels start."""

import math

import pytest
import torch
import torch.nn.functional as F

from depthlab.architectures import DominantNet, SimpleNet
from depthlab.equivalence import id_entries


def parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("depth", "count", "kernels", "ids", "dominant"),
    [
        (20, 269_034, 267_696, 624, 7_818),
        (32, 463_018, 461_232, 1072, 12_298),
        (44, 657_002, 654_768, 1520, 16_778),
    ],
)
def test_counts(depth, count, kernels, ids, dominant):
    with torch.device("meta"):
        nets = [SimpleNet(10, depth), SimpleNet(10, depth, residual=True)]
        small = DominantNet(10, depth)
    for net in nets:
        assert parameters(net) == count
        assert sum(layer.conv.weight.numel() for layer in net.layers()) == kernels
        assert sum(id_entries(block.conv.weight).numel() for block in net.blocks()) == ids
        assert net.depth == len(net.layers()) + 1 == depth
    assert parameters(small) == dominant


def test_dense_lower_half():
    assert parameters(DominantNet(10, 20, dense_lower=True)) == 18_906


def test_maps_and_pooling():
    net = SimpleNet(10, 11)
    seen = []
    for layer in net.layers():
        layer.register_forward_hook(lambda m, x, y: seen.append((tuple(x[0].shape[1:]), tuple(y.shape[1:]))))
    pooled = []
    net.classifier.register_forward_pre_hook(lambda m, x: pooled.append(x[0]))
    net(torch.zeros(2, 3, 32, 32))
    a, b, c = (16, 32, 32), (32, 16, 16), (64, 8, 8)
    assert [y for _, y in seen] == [a, a, a, a, b, b, b, c, c, c]
    assert [x for x, _ in seen] == [(3, 32, 32), a, a, a, a, b, b, b, c, c]
    assert pooled[0].shape == (2, 64)


def test_forward_by_hand():
    torch.manual_seed(0)
    net = SimpleNet(10, 5, width=4, residual=True, init="hmwi").double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def conv(layer, x, stride):
        return F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=stride, padding=1)

    y = F.relu(conv(net.stem, x, 1))
    y = F.relu(y + conv(net.stages[0][0], y, 1))
    for stage in net.stages[1:]:
        half = y[:, :, ::2, ::2]
        y = F.relu(torch.cat([half, torch.zeros_like(half)], 1) + conv(stage[0], y, 2))
    torch.testing.assert_close(net(x), net.classifier(y.mean((2, 3))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"lower_identity": False}, {"dense_lower": True}], ids=["both", "upper", "dense"]
)
def test_dominant_is_a_dense_network_with_zeros(options):
    """Each convolution of T' against the dense kernel (D, C, 3, 3) that it stands for."""
    torch.manual_seed(0)
    net = DominantNet(10, 8, width=4, **options).double()
    for block, (c, d) in zip(net.blocks(), [(4, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]):
        kernel, stride = torch.zeros(d, c, 3, 3, dtype=torch.float64), d // c
        if "dense_lower" in options and stride == 2:
            kernel[range(c), range(c)] = block.conv.upper.weight[:, 0]
            kernel[c:] = block.conv.lower.weight
            bias = torch.cat([block.conv.upper.bias, block.conv.lower.bias])
        else:
            kernel[range(d), [o % c for o in range(d)]] = block.conv.weight[:, 0]
            bias = block.conv.bias
        identities = d if not options else c
        kernel[range(identities), [o % c for o in range(identities)], 1, 1] += 1
        assert (kernel != 0).sum() == sum(p.numel() for n, p in block.named_parameters() if n.endswith("weight"))
        x = torch.randn(2, c, 8, 8, dtype=torch.float64)
        expected = F.relu(F.conv2d(x, kernel, bias, stride=stride, padding=1))
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fan", ["out", "in"])
def test_initialisers(fan):
    torch.manual_seed(0)
    plain, residual = SimpleNet(10, 20, init="kwi"), SimpleNet(10, 20, residual=True, init="hmwi", fan=fan)
    for p, r in zip(plain.layers(), residual.layers()):
        d, c = p.conv.weight.shape[:2]
        n = p.conv.weight.numel()
        assert p.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * c)), rel=4 / math.sqrt(2 * n))
        s = 9 * (d if fan == "out" else c)
        assert r.conv.weight.std().item() == pytest.approx(1 / s, rel=4 / math.sqrt(2 * n))
        assert not any(layer.conv.bias.any() for layer in (p, r))
    for values in (plain.classifier.weight, plain.classifier.bias):  # torch's default
        assert 0 < values.abs().max() <= 1 / 8
    assert plain.classifier.bias.any()


def test_parts_of_a_kernel_start_like_the_whole():
    torch.manual_seed(0)
    net = DominantNet(10, 20, width=64, dense_lower=True)
    conv = net.stages[1][0].conv
    assert conv.lower.weight.std().item() == pytest.approx(1 / (9 * 128), rel=0.02)
    assert conv.upper.weight.std().item() == pytest.approx(1 / (9 * 128), rel=0.15)
    assert net.stages[0][0].conv.weight.std().item() == pytest.approx(1 / (9 * 64), rel=0.15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 21}, r"arch.depth must be 3N \+ 2 .* got 21; the nearest is 20"),
        ({"depth": 2}, "the nearest is 5"),
        ({"width": 0}, "arch.width must be >= 1, got 0"),
        ({"kernel": 4}, "arch.kernel must be odd, got 4"),
        ({"start": "one"}, "arch.start must be zero or identity, got 'one'"),
        ({"start": "identity", "residual": True}, "arch.start=identity is for plain networks"),
        ({"fan": "both"}, "arch.fan must be out or in, got 'both'"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(ValueError, match=said):
        SimpleNet(10, **options)
