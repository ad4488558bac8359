import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from depthlab import fused
from depthlab.fused import Conv2d, conv_act, conv_bn_act, cpu, stem, winograd

CL = torch.channels_last
# (B, C, K, H, W); the wide ones sum their weights' gradient row by row of the transformed kernel
SHAPES = [
    (20, 16, 16, 32, 32),
    (7, 32, 16, 8, 8),
    (3, 48, 32, 5, 7),
    (2, 64, 128, 4, 4),
    (2, 16, 16, 1, 3),
    (9, 128, 96, 8, 6),
]


@pytest.fixture
def on():
    for name in cpu.KERNELS:
        if isinstance(reason := cpu.library(name), cpu.Missing):
            pytest.skip(str(reason))
    assert fused.enable(True)
    yield
    fused.enable(False)


def images(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=CL).requires_grad_()


def used(y):
    return "ConvolutionBackward" in str(y.grad_fn) and "ConvolutionBackward0" not in str(y.grad_fn)


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def errors(shape, bf16, bias=True, stride=1, relu=False):
    """Relative errors of y and the gradients of x, weight and bias against double."""
    B, C, K, H, W = shape
    conv = Conv2d(C, K, 3, padding=1, bias=bias, stride=stride).to(memory_format=CL)
    x = images(B, C, H, W, dtype=torch.bfloat16 if bf16 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = conv_act(conv, x) if relu else conv(x)
    assert used(y)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=CL)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, [x, *conv.parameters()], dy)]
    assert [t.dtype for t in found[2:]] == [torch.float32] * (1 + bias)
    twin, x = copy.deepcopy(conv).double(), x.detach().double().requires_grad_()
    expected = twin(x)
    dy = dy.double() * (y > 0) if relu else dy.double()  # what rounding tips over the ReLU is not counted
    gradients = torch.autograd.grad(expected, [x, *twin.parameters()], dy)
    expected = F.relu(expected) if relu else expected
    return [error(a, b) for a, b in zip(found, [expected, *gradients], strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_against_double(shape, stride, bias, relu, on):
    torch.manual_seed(0)
    assert max(errors(shape, False, bias, stride, relu)) < 1e-6
    y, *gradients = errors(shape, True, bias, stride, relu)
    assert y < 4e-3
    # what is multiplied is rounded: dx and dw in the transformed domain, at stride 2 only dx, where it is stored
    assert max(gradients[:2]) < 2e-2 if stride == 1 else gradients[0] < 4e-3 and gradients[1] < 1e-6
    assert max(gradients[2:], default=0) < 1e-6


@pytest.mark.parametrize("shape", [(20, 16, 32, 32), (5, 48, 7, 9), (3, 80, 5, 33), (2, 64, 1, 1)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("relu", [True, False])
def test_images_against_double(shape, bf16, relu, on):
    """stem.cpp, on several threads; images are fp32 in bf16, too, and rounded only when they leave."""
    torch.manual_seed(0)
    B, K, H, W = shape
    conv, x = Conv2d(3, K, 3, padding=1).to(memory_format=CL), images(B, 3, H, W).detach()
    twin, before = copy.deepcopy(conv).double(), torch.get_num_threads()
    expected = F.relu(twin(x.double())) if relu else twin(x.double())
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = conv_act(conv, x) if relu else conv(x)
            assert used(y)
            assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
            assert error(y, expected) < (3e-3 if bf16 else 5e-7)
            dy = torch.randn_like(y)
            dw, db = torch.autograd.grad(y, [*conv.parameters()], dy)
            passed = dy.double() * (y > 0) if relu else dy.double()
            assert error(dw, torch.nn.grad.conv2d_weight(x.double(), conv.weight.shape, passed, padding=1)) < 5e-7
            assert error(db, passed.sum((0, 2, 3))) < 5e-7
    finally:
        torch.set_num_threads(before)
    assert not used(conv(x.requires_grad_()))  # PyTorch's has the gradient of images


def test_several_threads(on):
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for shape in SHAPES:
                for stride in (1, 2):
                    assert max(errors(shape, bf16=False, stride=stride, relu=True)) < 1e-6
    finally:
        torch.set_num_threads(before)


def test_nan_stays_where_it_is_seen(on):
    conv, x = Conv2d(16, 16, 3, padding=1).to(memory_format=CL), images(2, 16, 8, 8).detach()
    x[0, 3, 0, 0] = float("nan")
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = conv(x)
            assert y[0, :, :2, :2].isnan().all()
            assert not y[1].isnan().any()
            broken = copy.deepcopy(conv)
            with torch.no_grad():
                broken.weight[5, 2, 1, 1] = float("nan")
            assert broken(x[1:]).isnan().any(dim=3).any(dim=2).tolist() == [[k == 5 for k in range(16)]]


def test_integers_hold_the_largest_sums(on):
    """Images in which a point of the transformed tile is as large as it can be, in all channels, by weights of one
    sign: sums of 64 channels come as near to 2^31 as they can. And nothing at all."""
    p, q = 2 / 3, 3 / 2
    rows = torch.tensor([
        [1, 0, -p * p - q * q, 0, 1, 0],
        [0, -p * q * q, -q * q, p, 1, 0], [0, p * q * q, -q * q, -p, 1, 0],
        [0, -q * p * p, -p * p, q, 1, 0], [0, q * p * p, -p * p, -q, 1, 0],
        [0, 1, 0, -p * p - q * q, 0, 1],
    ])  # fmt: skip
    signs = torch.einsum("ia,jb->ijab", rows, rows).sign().reshape(36, 1, 6, 6)
    cases = torch.cat([signs, -signs, signs.relu(), (-signs).relu(), 0 * signs])
    x = 1e3 * F.pad(cases, (3, 3, 3, 3)).expand(-1, 128, -1, -1).contiguous(memory_format=CL).bfloat16()
    for size in (1e-3, 1.0, 0.0):
        conv = Conv2d(128, 16, 3, padding=1, bias=False).to(memory_format=CL)
        with torch.no_grad():
            conv.weight.copy_(size * (1 + torch.arange(9.0).view(3, 3)))
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x).double()
        assert (y - conv.double()(x.double())).abs().max() <= 5e-3 * y.abs().max()


def test_left_to_pytorch(on):
    """What the kernel does not take gives what nn.Conv2d gives, bit for bit; it does so for each reason by itself."""
    x = images(2, 16, 8, 8)
    same = {"kernel_size": 3, "padding": 1}
    assert used(Conv2d(16, 16, **same)(x))
    other = [
        {**same, "stride": 3}, {**same, "stride": (1, 2)}, {**same, "dilation": 2}, {**same, "groups": 2},
        {**same, "padding": 0}, {**same, "padding_mode": "reflect"}, {**same, "out_channels": 24},
        {"kernel_size": 5, "padding": 1},
    ]  # fmt: skip
    cases = [(Conv2d(**{"in_channels": 16, "out_channels": 16} | options), x) for options in other]
    cases += [(Conv2d(3, 16, **same), images(2, 3, 8, 8)), (Conv2d(16, 16, **same).double(), x.double())]
    cases += [(Conv2d(16, 16, **same), x.contiguous()), (Conv2d(16, 16, **same).bfloat16(), x.bfloat16())]
    for conv, image in cases:
        y = conv(image)
        assert not used(y)
        assert torch.equal(y, nn.Conv2d.forward(conv, image))
    conv = Conv2d(16, 16, **same)
    for wrong in (images(2, 32, 8, 8), x.bfloat16()):
        with pytest.raises(RuntimeError):
            conv(wrong)
    assert conv(images(0, 16, 8, 8)).shape == (0, 16, 8, 8)
    strided = Conv2d(16, 16, **same)
    strided.bias = nn.Parameter(torch.randn(32)[::2])
    assert not used(strided(x))
    with FlopCounterMode(display=False):
        assert not used(conv(x))
    with torch.autocast("cpu", torch.float16):
        assert not used(conv(x))
    for pre_dispatch in (False, True):
        graph = make_fx(lambda x: conv(x), pre_dispatch=pre_dispatch)(x.detach())
        assert torch.equal(graph(x), nn.Conv2d.forward(conv, x))
    fused.enable(False)
    assert not used(conv(x))


def test_hooks_evaluation_and_no_gradient(on):
    conv, x, seen = Conv2d(16, 16, 3, padding=1).eval(), images(2, 16, 8, 8), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    y = conv(x)
    assert used(y)
    assert seen == [1]
    for bf16 in (False, True):  # F(4x4) in both
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert error(conv(x), y.double()) < (2e-2 if bf16 else 3e-6)
    hooked = len(seen)
    assert torch.equal(conv_act(conv, x), F.relu(y))
    assert len(seen) == hooked + 1
    assert list(conv.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_batch_norm_in_the_weights(channels, stride, bias, relu, add, on, monkeypatch):
    torch.manual_seed(0)
    conv, bn = Conv2d(channels, 32, 3, padding=1, stride=stride, bias=bias), nn.BatchNorm2d(32)
    x, r = images(2, channels, 8, 8).detach(), images(2, 32, 8 // stride, 8 // stride).detach() if add else None
    with torch.no_grad():
        for values in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            values.copy_(torch.rand(32) + 0.5)
        bn.eval()
        z = 0.5 * copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x.double()))
        z = z if r is None else z + r.double()
        expected, calls = F.relu(z) if relu else z, []
        monkeypatch.setattr(bn, "forward", lambda x: calls.append(1))
        for bf16 in (False, True):
            inputs = [t if t is None or not bf16 or t.shape[1] == 3 else t.bfloat16() for t in (x, r)]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = conv_bn_act(conv, bn, *inputs, relu, 0.5)
            assert error(y, expected) < (2e-2 if bf16 else 3e-6)
        assert not calls
    monkeypatch.undo()
    assert "BatchNorm" in str(conv_bn_act(conv, bn, x, None, False).grad_fn)  # with gradients, PyTorch's


def test_second_derivatives_of_images(on):
    torch.manual_seed(0)
    ours = Conv2d(3, 16, 3, padding=1).to(memory_format=CL)
    x, results = images(2, 3, 8, 8).detach(), []
    for conv in (ours, copy.deepcopy(ours).double()):
        y = conv_act(conv, x.to(conv.weight.dtype))
        first = torch.autograd.grad((y**3).sum(), [*conv.parameters()], create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**3).sum() for g in first), conv.weight)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives(stride, on):
    torch.manual_seed(0)
    ours = Conv2d(16, 16, 3, padding=1, stride=stride).to(memory_format=CL)
    x, dy, results = images(2, 16, 8, 8), images(2, 16, 8 // stride, 8 // stride), []
    for conv in (ours, copy.deepcopy(ours).double()):
        a, d = (t.detach().to(conv.weight.dtype).requires_grad_() for t in (x, dy))
        leaves = [a, *conv.parameters()]
        first = torch.autograd.grad(conv_act(conv, a), leaves, d, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**3).sum() for g in first), [a, conv.weight, d])])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # inside torch's forward mode
def test_transforms(on):
    conv, x, t = Conv2d(16, 16, 3, padding=1), images(3, 16, 8, 8).detach(), images(3, 16, 8, 8).detach()
    expected = nn.Conv2d.forward(conv, x).detach()
    each = torch.func.vmap(lambda x: conv(x[None])[0])(x)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)
    slope = F.conv2d(t, conv.weight, padding=1)
    torch.testing.assert_close(torch.func.jvp(conv, (x,), (t,))[1], slope, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(conv(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(dual, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_avx512(on, monkeypatch, tmp_path):
    """Vectors of eight, as most laptops have them."""
    if "avx512f" not in cpu.processor():
        pytest.skip("these are the vectors of this processor")
    monkeypatch.setenv("DEPTHLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", tuple(flag.replace("native", "haswell") for flag in cpu.FLAGS))
    caches = (cpu.library, cpu.complete, winograd.library, stem.library)
    try:
        for cache in caches:
            cache.cache_clear()
        assert fused.enable(True)
        for shape in SHAPES:
            for stride in (1, 2):
                assert max(errors(shape, bf16=False, stride=stride)) < 1e-6
                assert max(errors(shape, bf16=True, stride=stride)) < 4e-3
        conv, x = Conv2d(3, 48, 3, padding=1).to(memory_format=CL), images(2, 3, 7, 9).detach()
        (dw,) = torch.autograd.grad(conv(x).sum(), conv.weight)
        ones = torch.ones(2, 48, 7, 9, dtype=torch.double)
        assert error(dw, torch.nn.grad.conv2d_weight(x.double(), conv.weight.shape, ones, padding=1)) < 5e-7
    finally:
        for cache in caches:
            cache.cache_clear()
