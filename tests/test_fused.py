import copy
import re
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from depthlab import MultilevelResNet, Plain11, ResNet, SimpleNet, fused
from depthlab.architectures import VGG9
from depthlab.fused import act_bn, avg_pool, bn_act, cpu, winograd
from depthlab.fused import batch_norm as kernel
from depthlab.problem import Problem

CL, PLANES = torch.channels_last, torch.contiguous_format
# name -> (function of bn, x, residual; whether it has a residual)
OPS = {
    "relu(r + h bn)": (lambda bn, x, r: bn_act(bn, x, r, step_size=0.5), True),
    "r + h bn": (lambda bn, x, r: bn_act(bn, x, r, relu=False, step_size=0.5), True),
    "relu(bn)": (lambda bn, x, r: bn_act(bn, x), False),
    "bn": (lambda bn, x, r: bn_act(bn, x, relu=False), False),
    "bn(relu)": (lambda bn, x, r: act_bn(bn, x), False),
}


@pytest.fixture(scope="session")
def built():
    for name in cpu.KERNELS:
        if isinstance(reason := cpu.library(name), cpu.Missing):
            pytest.skip(str(reason))


@pytest.fixture
def on(built):
    assert fused.enable(True)
    yield
    fused.enable(False)


def batch_norm(channels, **options):
    bn = nn.BatchNorm2d(channels, **{"eps": 1e-3, "momentum": 0.1} | options)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    return bn


def images(*shape, dtype=torch.float32, strides=CL):
    x = (2 * torch.randn(shape) + 0.7).to(dtype).to(memory_format=strides)
    return x.requires_grad_()


def used(y):
    return "BatchNormAct" in str(y.grad_fn)


def everything(op, bn, x, r, dy, dtype=None):
    """y, all gradients, running statistics; in `dtype` if given."""
    bn, x = copy.deepcopy(bn), x.detach().clone()
    r = None if r is None else r.detach().clone()
    if dtype is not None:
        bn, x, r, dy = (None if t is None else t.to(dtype) for t in (bn, x, r, dy))
    leaves = [t.requires_grad_() for t in (x, r, bn.weight, bn.bias) if t is not None]
    y = op(bn, x, r)
    gradients = torch.autograd.grad(y, leaves, dy)
    return y, [y.detach(), *gradients, bn.running_mean, bn.running_var], bn


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((20, 16, 32, 32), CL), ((7, 64, 8, 8), CL), ((4, 10, 16, 8), CL), ((2, 512, 4, 4), CL), ((3, 48, 4, 4), CL),
        ((20, 16, 32, 32), PLANES), ((3, 10, 16, 16), PLANES),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_double(op, shape, strides, dtype, on):
    torch.manual_seed(0)
    op, has_residual = OPS[op]
    bn, x = batch_norm(shape[1]), images(*shape, dtype=dtype, strides=strides)
    r = images(*shape, dtype=dtype, strides=strides) if has_residual else None
    dy = images(*shape, dtype=dtype, strides=strides).detach()
    y, found, after = everything(op, bn, x, r, dy)
    true, expected, _ = everything(op, bn, x, r, dy, torch.float64)
    assert used(y)
    assert not used(true)
    assert y.stride() == x.stride()
    assert after.num_batches_tracked == 1
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        rounded = a.dtype == torch.bfloat16
        # where fp32 and double disagree on a ReLU, gradients differ by one element: allowed once in these sizes
        limit = 4e-3 if rounded else 5e-7 if i in (0, len(found) - 1, len(found) - 2) else 2e-3
        assert (a.double() - b).norm() <= limit * b.norm(), i


def test_exact_far_from_zero(on):
    """Without a ReLU there is rounding and nothing else, far from zero too, where squares cancel."""
    for strides in (CL, PLANES):
        torch.manual_seed(1)
        bn, x = batch_norm(16), images(20, 16, 32, 32, strides=strides)
        dy = images(20, 16, 32, 32, strides=strides).detach()
        op = OPS["bn"][0]
        for a, b in zip(*(everything(op, bn, x, None, dy, dtype)[1] for dtype in (None, torch.float64)), strict=True):
            assert (a.double() - b).norm() <= 6e-7 * b.norm()
        far = (x + 1000).detach()
        (_, found, _), (_, expected, _) = (everything(op, bn, far, None, dy, d) for d in (None, torch.float64))
        assert (found[-1] - expected[-1]).norm() <= 1e-6 * expected[-1].norm()


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"momentum": 0.01}])
def test_statistics_as_batch_norm_keeps_them(options, on):
    ours, theirs = batch_norm(16, **options), nn.BatchNorm2d(16, **{"eps": 1e-3, "momentum": 0.1} | options)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        x = images(5, 16, 8, 8)
        y = bn_act(ours, x)
        assert used(y)
        torch.testing.assert_close(y, F.relu(theirs(x)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strides", [CL, PLANES])
def test_bits_do_not_depend_on_threads(strides, on):
    bn, x, r = batch_norm(16), *(images(20, 16, 32, 32, strides=strides) for _ in range(2))
    dy = images(20, 16, 32, 32, strides=strides).detach()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(everything(OPS["relu(r + h bn)"][0], bn, x, r, dy)[1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays(on):
    bn, x = batch_norm(16), images(4, 16, 8, 8).detach()
    x[0, 3, 0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        y = bn_act(bn, x.to(dtype))
        assert y[:, 3].isnan().all()
        assert not y[:, :3].isnan().any()


def test_left_to_pytorch(on):
    """Cases that the kernel does not take give what PyTorch gives, bit for bit."""
    bn, x = batch_norm(16), images(4, 16, 8, 8)
    assert used(bn_act(bn, x))
    hooked, frozen = copy.deepcopy(bn), copy.deepcopy(bn).eval()
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    plain = nn.BatchNorm2d(16, affine=False)
    small, odd, strided = images(4, 16, 8, 8, strides=PLANES), images(3, 3, 5, 5), images(4, 16, 8, 16)[..., ::2]
    cases = [
        (hooked, x, None), (frozen, x, None), (plain, x, None), (copy.deepcopy(bn).double(), x.double(), None),
        (bn, small, None),
        (bn, strided, None), (batch_norm(3), odd, None), (bn, x, images(4, 16, 8, 8, strides=PLANES)),
        (bn, x, images(4, 16, 1, 1)), (bn, x.bfloat16(), x),
    ]  # fmt: skip
    for module, image, residual in cases:
        twin = copy.deepcopy(module)
        y = bn_act(module, image, residual)
        assert not used(y)
        z = twin(image)
        assert torch.equal(y, F.relu(z if residual is None else residual + z))
    assert seen == [1, 1]
    with FlopCounterMode(display=False):
        assert not used(bn_act(bn, x))
    with torch.no_grad():
        torch.testing.assert_close(bn_act(bn, x), F.relu(bn(x)))
    with pytest.raises(ValueError, match="more than 1 value"):
        bn_act(batch_norm(64), images(1, 64, 1, 1))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op, on):
    torch.manual_seed(3)
    op, has_residual = OPS[op]
    bn, dy = batch_norm(16), images(2, 16, 8, 8)
    x, r = images(2, 16, 8, 8), images(2, 16, 8, 8) if has_residual else None
    results = []
    for dtype in (torch.float32, torch.float64):
        module = copy.deepcopy(bn).to(dtype)
        xs, rs, d = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, r, dy))
        leaves = [t for t in (xs, rs, module.weight, module.bias) if t is not None]
        y = op(module, xs, rs)
        assert used(y) == (dtype == torch.float32)
        first = torch.autograd.grad(y, leaves, d, create_graph=True)
        results.append(
            [*first, *torch.autograd.grad(sum((g**3).sum() for g in first), [*leaves, d], allow_unused=True)]
        )
    assert module.num_batches_tracked == 1
    for a, b in zip(*results, strict=True):
        a, b = (0 * leaves[0].detach().sum() if t is None else t.double() for t in (a, b))
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # inside torch's forward mode
def test_transforms(on):
    """vmap over networks, jvp, and dual numbers without functorch."""
    nets = [ResNet(4, 8, width=16) for _ in range(2)]
    x = images(2, 3, 8, 8).detach()
    params, buffers = torch.func.stack_module_state(nets)

    def call(p, b, x):
        return torch.func.functional_call(nets[0], (p, b), (x,))

    together = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)
    bn, t = batch_norm(16, track_running_stats=False), images(2, 16, 8, 8).detach()
    assert used(bn_act(bn, images(2, 16, 8, 8)))
    x = images(2, 16, 8, 8).detach()
    _, slope = torch.func.jvp(lambda x: bn_act(bn, x), (x,), (t,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(bn_act(bn, forward_ad.make_dual(x, t))).tangent
    fused.enable(False)
    _, expected = torch.func.jvp(lambda x: bn_act(bn, x), (x,), (t,))
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(dual, expected)


def test_compiled(on):
    net = ResNet(4, 8, width=16)
    x = images(2, 3, 8, 8).detach()
    expected = copy.deepcopy(net)(x)
    net.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


NETS = {
    "resnet": lambda: ResNet(10, 8, width=16),
    "projection": lambda: ResNet(10, 8, width=16, shortcut="projection"),
    "none": lambda: ResNet(10, 8, width=16, shortcut="none"),
    "multilevel": lambda: MultilevelResNet(10, 2, step_size=0.5),
    "plain11": lambda: Plain11(10),
    "simple_plain": lambda: SimpleNet(10, 8),
    "simple_residual": lambda: SimpleNet(10, 8, residual=True),
    "vgg9": lambda: VGG9(10),
}


def fits(conv):
    return conv.kernel_size == (3, 3) and (conv.in_channels % 16 == 0 or conv.in_channels == 3)


@pytest.mark.parametrize("name", NETS)
def test_networks_train_alike(name, on, monkeypatch):
    """Eight steps on a batch: the same losses with and without, in fp32 and bf16; every 2d BatchNorm was taken."""
    calls, convolutions = [], []
    monkeypatch.setattr(kernel, "fused", lambda *a, run=kernel.fused: (calls.append(1), run(*a))[1])
    apply = winograd.Convolution.apply
    monkeypatch.setattr(winograd.Convolution, "apply", lambda *a: (convolutions.append(1), apply(*a))[1])
    torch.manual_seed(0)
    base = NETS[name]().to(memory_format=CL)
    x, y = torch.randn(8, 3, 32, 32).to(memory_format=CL), torch.arange(8)
    for bf16 in (False, True):
        losses = []
        for enabled in (True, False):
            fused.enable(enabled)
            net = copy.deepcopy(base)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
            losses.append([])
            for step in range(8 if name not in ("plain11", "vgg9") else 4):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(net(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
                if enabled and step == 0:
                    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
                    shortcuts = sum(isinstance(m, nn.BatchNorm2d) for m in base.modules() if name == "projection") and 2
                    assert len(calls) == norms - shortcuts
                    fitting = [m for m in net.modules() if isinstance(m, fused.Conv2d) and fits(m)]
                    assert len(convolutions) == len(fitting) > 0
            calls.clear()
            convolutions.clear()
        assert losses[0] == pytest.approx(losses[1], rel=0.05 if bf16 else 2e-3, abs=5e-3 if bf16 else 1e-4)
        assert losses[0][-1] < losses[0][0]


WHOLE = {
    "resnet20": lambda: ResNet(100, 20),
    "resnet14, wide": lambda: ResNet(100, 14, width=64, shortcut="projection"),
    "ml26": lambda: MultilevelResNet(100, 4),
    "simple_plain20": lambda: SimpleNet(100, 20),
    "plain11": lambda: Plain11(100),
    "vgg9": lambda: VGG9(100),
}


@pytest.mark.parametrize("name", WHOLE)
def test_gradient_as_exact_as_pytorchs(name, on):
    """Error of the whole gradient against double with the kernels in channels_last: at most 1.2 times that of PyTorch's
    own operations, in fp32 of those in NCHW. Of few images, so that hardly ever a ReLU tips over, which changes the
    gradient a thousand times more than rounding does."""
    ratios = {False: [], True: []}
    for seed in range(5 if name == "resnet14, wide" else 9):
        torch.manual_seed(seed)
        net, x, y = WHOLE[name](), torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(100, (4,))

        def gradient(dtype, strides, enabled, bf16=False, net=net, x=x, y=y):
            fused.enable(enabled)
            twin = copy.deepcopy(net).to(dtype).to(memory_format=strides)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(twin(x.to(dtype).to(memory_format=strides)), y)
            loss.backward()
            return torch.cat([p.grad.double().flatten() for p in twin.parameters()])

        true = gradient(torch.float64, PLANES, False)
        for bf16, theirs in ((False, PLANES), (True, CL)):
            found, expected = (
                gradient(torch.float32, strides, enabled, bf16) for strides, enabled in ((CL, True), (theirs, False))
            )
            ratios[bf16].append(((found - true).norm() / (expected - true).norm()).item())
    assert max(statistics.median(found) for found in ratios.values()) <= 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_pooling(dtype, on):
    """The same bits as PyTorch's, and a second derivative."""
    for shape, size in (((2, 5, 8, 6), (2, 2)), ((2, 3, 5, 4), (2, 2)), ((2, 16, 6, 3), (6, 3))):
        x = torch.randn(shape).to(dtype).to(memory_format=CL).requires_grad_()
        y, expected = avg_pool(x, size), F.avg_pool2d(x, size)
        assert ("AvgPoolBackward" in str(y.grad_fn)) == (shape[2] % size[0] == 0)
        dy = torch.randn_like(y)
        assert torch.equal(y, expected)
        gradient, theirs = (torch.autograd.grad(z, x, dy)[0] for z in (y, expected))
        assert torch.equal(gradient, theirs)
        assert gradient.is_contiguous(memory_format=CL)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).to(memory_format=CL).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: avg_pool(x) ** 2, x)


# ---- the build


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "compiler failed")])
def test_without_a_compiler(compiler, said, monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    caches = (cpu.library, cpu.complete)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"fused operations: .*{re.escape(said)}.*PyTorch's own"):
            assert fused.enable(True) is False
        assert fused.enable(True) is False  # said once
        assert not fused.enabled()
        assert not used(bn_act(batch_norm(16), images(4, 16, 8, 8)))
        with pytest.raises(Problem, match=r"trainer.fused=true needs a C\+\+ compiler"):
            fused.switch(True, "32-true", "cpu", False)
        assert fused.switch(None, "32-true", "cpu", False) is False
        assert list(tmp_path.iterdir()) == []
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "precision", "accelerator", "compiled", "is_on"),
    [
        (None, "32-true", "cpu", False, True),
        (None, "bf16-mixed", "cpu", False, True),
        (False, "bf16-mixed", "cpu", False, False),
        (None, "64-true", "cpu", False, False),
        (None, "bf16-true", "cpu", False, False),
        (None, "32-true", "gpu", False, False),
        (None, "32-true", "cpu", True, False),
        (True, "64-true", "gpu", False, None),
        (True, "64-true", "cpu", False, None),
    ],
)
def test_the_switch(wanted, precision, accelerator, compiled, is_on, on):
    if is_on is None:
        with pytest.raises(Problem, match="trainer.fused=true is for CPUs"):
            fused.switch(wanted, precision, accelerator, compiled)
    else:
        assert fused.switch(wanted, precision, accelerator, compiled) is is_on is fused.enabled()


@pytest.mark.slow
def test_several_processes_build_at_once(built, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHLAB_CACHE", str(tmp_path))
    code = "from depthlab import fused; assert fused.enable(True)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"] * len(cpu.KERNELS)
