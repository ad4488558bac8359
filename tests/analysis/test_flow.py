"""sigma(l) against the whole Theta, entry by entry."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import jacrev

from depthlab.analysis import drawing
from depthlab.analysis.flow import figure, flow
from depthlab.analysis.inside import activations
from depthlab.architectures import MultilevelResNet, ResNet, SimpleNet
from depthlab.problem import Problem
from tests.analysis.nets import DEVICES, images, moved, untouched

NETS = {
    "plain": lambda: SimpleNet(10, depth=8, width=3),
    "residual": lambda: SimpleNet(10, depth=8, width=3, residual=True, init="hmwi"),
    "plain twin": lambda: ResNet(10, depth=8, width=3, shortcut="none"),
    "residual twin": lambda: ResNet(10, depth=8, width=3),
}


@pytest.fixture(params=NETS)
def net(request):
    return moved(NETS[request.param], 0.05, 1, torch.float64)


def pooled_from(net, k, a, before):
    """The pooled channels as a function of activation k (0 is the stem's); `before` is the one before it."""
    blocks = [block for stage in net.stages for block in stage]
    if isinstance(net, ResNet) and k % 2:  # inside a block: what its shortcut carries does not come through a
        block = blocks[k // 2]
        a = block.bn2(block.conv2(a))
        a = F.relu(a if block.shortcut is None else block.shortcut(before) + a)
    for block in blocks[(k + 1) // 2 if isinstance(net, ResNet) else k :]:
        a = block(a)
    return a.mean((2, 3))


def by_whole_theta(net, x, y):
    """(3, L-1), as Eq. 13 and its variants are written."""
    net.eval()
    with activations(net) as seen:
        net.forward(x)
    *a, pooled = (tensor.detach() for tensor in seen)
    v = jacrev(lambda v: F.cross_entropy(net.classifier(v), y, reduction="sum"))(pooled)  # (B, J)
    sigma = np.zeros((3, len(a)))
    for k in range(len(a)):
        for b in range(len(x)):
            J = jacrev(lambda t, k=k, before=a[k - 1][b : b + 1]: pooled_from(net, k, t, before)[0])(a[k][b : b + 1])
            theta = (v[b, :, None, None, None] * J[:, 0]).detach().numpy()  # (J, C, H, W)
            for i in range(C := theta.shape[1]):
                own = abs(theta[i, i])
                rest = abs(theta[:, i].sum(0) - theta[i, i])
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = np.where(own > 0, own / rest, 0)
                sigma[:, k] += np.array([ratio.mean() > 1, own.sum() > rest.sum(), (ratio > 1).mean()]) / C
    return sigma / len(x)


def test_by_the_whole_theta(net):
    batches = images(net, 3, 2)
    expected = by_whole_theta(net, *map(torch.cat, zip(*batches)))
    with untouched(net.train()):
        out = flow(net, batches, bn_mode="running")
    found = np.stack([out.arrays[key] for key in ("sigma", "sigma_sums", "sigma_entries")])
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], atol=1e-9)
    np.testing.assert_array_equal(out.arrays["sigma"][-1], 1.0)  # pooling is per channel
    assert out.scalars["layers"] == 8
    assert list(out.arrays["layer"]) == list(range(1, 8))
    assert 0 < out.scalars["sigma_1"] < 1
    assert [out.scalars[f"sigma_{k}"] for k in (5, 6)] == list(out.arrays["sigma"][[4, 5]])


def test_statistics_of_the_batch_as_constants():
    torch.manual_seed(1)
    net = ResNet(10, depth=8, width=3).double()
    (batch,) = batches = images(net, 6)
    with untouched(net):
        by_batch = flow(net, batches, bn_mode="batch").arrays["sigma"]
        np.testing.assert_array_equal(flow(net, batches).arrays["sigma"], by_batch)  # auto: before any step

    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    sizes = []
    handles = [bn.register_forward_hook(lambda bn, args, out: sizes.append(out[:, 0].numel())) for bn in norms]
    for bn in norms:
        bn.momentum = 1.0
    net.train().forward(batch[0])  # running statistics become those of the batch, but for n / (n - 1)
    for bn, size, handle in zip(norms, sizes, handles, strict=True):  # modules run in the order in which they stand
        bn.running_var *= 1 - 1 / size
        handle.remove()
    np.testing.assert_allclose(flow(net, batches).arrays["sigma"], by_batch, atol=1e-9)  # auto: running


def test_before_training_as_sampled():
    """Sampled before on 64 images, 3 seeds; the residual network's move by .1 with the images' scale."""
    expected = {1: (0.189, 0.623), 7: (0.210, 0.718), 11: (0.144, 0.840), 14: (0.126, 0.888), 18: (0.114, 0.979)}
    random = torch.Generator().manual_seed(2)
    x = F.interpolate(torch.rand(16, 3, 8, 8, generator=random), 32, mode="bilinear")  # neighbours alike, as in images
    for residual, init in enumerate(("kwi", "hmwi")):
        sigma = np.zeros(19)
        for seed in (1, 2):
            torch.manual_seed(seed)
            net = SimpleNet(10, depth=20, residual=bool(residual), init=init)
            sigma += flow(net, [(x, torch.arange(16) % 10)]).arrays["sigma"] / 2
        for layer, values in expected.items():
            assert sigma[layer - 1] == pytest.approx(values[residual], abs=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_any_device_same_numbers(device):
    torch.manual_seed(1)
    net = SimpleNet(10, depth=8, width=8, residual=True)
    batches = images(net, 16)
    one = flow(net.double(), batches)
    other = flow(net.float().to(device), batches)
    for key in one.arrays:
        np.testing.assert_allclose(one.arrays[key], other.arrays[key], atol=0.01)


def test_what_is_refused_and_the_figure():
    net = SimpleNet(10, depth=5, width=2)
    with pytest.raises(Problem, match="analysis.bn_mode must be one of auto, running, batch, got 'all'"):
        flow(net, images(net, 2), bn_mode="all")
    with pytest.raises(Problem, match="MultilevelResNet has no layers of plain or residual blocks"):
        flow(MultilevelResNet(), [])
    for shortcut in ("projection", "avgpool_symmetric"):
        with pytest.raises(Problem, match="arch.shortcut=subsample or none"):
            flow(ResNet(10, depth=8, width=2, shortcut=shortcut), [])
    results = {name: flow(net, images(net, 2)) for name in "ab"}
    assert drawing.png(figure(results)).startswith(b"\x89PNG")
