"""The split of a block's gradient, exact in double precision for every family of blocks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthlab import fused
from depthlab.analysis import drawing
from depthlab.analysis.gradients import figure, gradients
from depthlab.architectures import VGG9, MultilevelResNet, ResNet, SimpleNet
from depthlab.problem import Problem
from tests.analysis.nets import moved

NETS = {
    "pre-activation": lambda: MultilevelResNet(3, blocks=2, width=4, step_size=0.5),
    "post-activation": lambda: ResNet(3, depth=14, width=4),
    "projection": lambda: ResNet(3, depth=8, width=4, shortcut="projection"),
    "noshort": lambda: ResNet(3, depth=8, width=4, shortcut="none"),
    "no BatchNorm": lambda: SimpleNet(3, depth=8, width=4, residual=True, init="kwi"),
    "plain, no BatchNorm": lambda: SimpleNet(3, depth=8, width=4),
}


@pytest.fixture(params=NETS)
def net(request):
    return moved(NETS[request.param], 0.1, 0, torch.float64)


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(1)
    draw = [torch.randn(n, 3, 8, 8, generator=random, dtype=torch.float64) for n in (3, 2)]
    return [(x, torch.randint(3, (len(x),), generator=random)) for x in draw]


def by_hand(net, x, y, training):
    """Per block and image: dL/dx, and dL/dh times the Jacobians of shortcut and branch, each by itself."""
    net.train(training)
    blocks = [block for stage in net.stages for block in stage]
    inputs = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    last = blocks[-1].register_forward_hook(lambda _, args, out: inputs.append(out))
    loss = F.cross_entropy(net(x), y, reduction="sum")
    g = torch.autograd.grad(loss, inputs)
    for handle in (*handles, last):
        handle.remove()
    found = []
    for block, start, whole, after in zip(blocks, inputs, g, g[1:]):
        z = start.detach().requires_grad_()
        branch = block.step_size * block.residual(z)
        carried = torch.zeros_like(branch) if block.shortcut is None else block.shortcut(z)
        if not isinstance(net, MultilevelResNet):  # a ReLU follows the sum
            after = after * (branch + carried > 0)
        parts = [torch.autograd.grad(v, z, after, retain_graph=True)[0] if v.requires_grad else torch.zeros_like(z)
                 for v in (carried, branch)]  # fmt: skip
        torch.testing.assert_close(sum(parts), whole, rtol=1e-9, atol=1e-12)  # dL/dx = dL/dh + dL/dh dF/dx
        found.append(torch.stack([v.flatten(1).norm(dim=1) for v in (whole, *parts)]))
    return torch.stack(found, 1)  # (3, d, B)


@pytest.mark.parametrize("bn_mode", ["batch", "running"])
def test_split_by_hand(net, batches, bn_mode):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, keys = [m.training for m in net.modules()], [set(vars(m)) for m in net.modules()]
    out = gradients(net, batches, batch=5, bn_mode=bn_mode)
    assert [m.training for m in net.modules()] == modes
    assert [set(vars(m)) for m in net.modules()] == keys
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert out.scalars["identity_error"] < 1e-14
    x, y = (torch.cat(tensors) for tensors in zip(*batches))
    expected = by_hand(net, x, y, training=bn_mode == "batch").mean(2)
    for key, value in zip(("input", "shortcut", "block"), expected):
        np.testing.assert_allclose(out.arrays[key], value.detach(), rtol=1e-9, atol=1e-12)
    assert out.scalars["images"] == 5


def test_identity_carries_the_gradient_untouched(batches):
    torch.manual_seed(0)
    net = MultilevelResNet(3, blocks=2, width=4).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)  # rows of the classifier that differ
    out = gradients(net, batches)
    same_shape = ~out.arrays["first"]
    np.testing.assert_allclose(out.arrays["shortcut"][same_shape], out.arrays["output"][same_shape], rtol=1e-12)


def test_dead_branches_leave_only_the_shortcut(batches):
    net = ResNet(3, depth=8, width=4).double()
    for block in (block for stage in net.stages for block in stage):
        nn.init.zeros_(block.bn2.weight)
    out = gradients(net, batches)
    np.testing.assert_allclose(out.arrays["input"], out.arrays["shortcut"])
    assert not out.arrays["block"].any()
    assert out.scalars["shortcut_share"] == 1


def test_plain_networks_have_one_part(batches):
    out = gradients(NETS["noshort"]().double(), batches)
    np.testing.assert_array_equal(out.arrays["input"], out.arrays["block"])
    assert not out.arrays["shortcut"].any()
    assert np.isnan(out.arrays["cosine"]).all()


def test_the_fused_kernel_stays_out_of_it(batches):
    net = NETS["post-activation"]()
    plain = gradients(net, batches)
    try:
        fused.enable(True)
        on = gradients(net, batches)
    finally:
        fused.enable(False)
    np.testing.assert_array_equal(on.arrays["input"], plain.arrays["input"])


def test_batches_without_batch_statistics_do_not_matter(batches):
    net = NETS["pre-activation"]().double()
    one, other = gradients(net, batches, 5, "running"), gradients(net, batches, 2, "running")
    np.testing.assert_allclose(one.arrays["input"], other.arrays["input"], rtol=1e-10)


def test_figure(batches):
    found = {name: gradients(make().double(), batches) for name, make in NETS.items()}
    assert drawing.png(figure(found)) == drawing.png(figure(found))


def test_refusals(batches):
    with pytest.raises(Problem, match="VGG9 has no blocks"):
        gradients(VGG9(3), batches)
    with pytest.raises(Problem, match="analysis.bn_mode must be one of batch, running, got 'train'"):
        gradients(NETS["noshort"](), batches, bn_mode="train")
    with pytest.raises(Problem, match=r"analysis.batch must be >= 1, got 0"):
        gradients(NETS["noshort"](), batches, batch=0)
