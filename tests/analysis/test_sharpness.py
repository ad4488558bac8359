"""Sharpness of networks whose loss is known: an exact quadratic, and a tiny network's explicit Hessian."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthlab.analysis import Result, drawing, files
from depthlab.analysis.curvature import areas, flat_area, non_convex_area
from depthlab.analysis.directions import Layout, random_direction
from depthlab.analysis.evaluator import Resident
from depthlab.analysis.hessian import Hessian, ends, kernels, start_vector
from depthlab.analysis.sharpness import figure, sharpness
from depthlab.architectures import MultilevelResNet, ResNet
from depthlab.problem import Problem


class Quadratic(nn.Module):
    """Cross-entropy of label 0 is 5 + 1/2 sum a (w - t)^2: softplus(log(e^q - 1)) = q."""

    def __init__(self, curvatures, target):
        super().__init__()
        self.register_buffer("a", torch.as_tensor(curvatures, dtype=torch.float64))
        self.register_buffer("target", torch.as_tensor(target, dtype=torch.float64))
        self.w = nn.Parameter(self.target.clone())

    def forward(self, x):
        q = 5 + 0.5 * (self.a * (self.w - self.target) ** 2).sum()
        zero = 0 * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([zero, zero + torch.log(torch.expm1(q))], 1)


IMAGES = [(torch.zeros(n, 3, 2, 2, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)) for n in (3, 2)]
A = np.array([[3.0, 0.5, -0.25, 1.0], [0.1, 2.0, 0.0, 1.5], [0.2, 0.3, 0.4, 0.7]])
TARGET = np.arange(1, 13).reshape(3, 4) / 4


@pytest.mark.parametrize("a", [A, np.abs(A), -A / 12])
def test_quadratic(a, tmp_path):
    net = Quadratic(a, TARGET).train()
    out = sharpness(net, IMAGES, tmp_path, tmp_path / "scratch.npz", tol=1e-9, directions=7, grid=9, seed=4)
    assert out.scalars["loss"] == pytest.approx(5)
    assert out.scalars["lambda_max"] == pytest.approx(a.max(), abs=1e-8)
    assert out.scalars["lambda_min"] == pytest.approx(a.min(), abs=1e-8)
    assert out.scalars["ratio"] == pytest.approx(abs(a.min() / a.max()))
    # theta's state holds the buffers a and target too
    trained = Layout(net).trained.numpy()
    d = np.stack([random_direction(net, 4, k).numpy()[trained] for k in range(7)])
    norms = np.linalg.norm(d.reshape(7, 3, 4), axis=2)
    np.testing.assert_allclose(norms, np.tile(np.linalg.norm(TARGET, axis=1), (7, 1)))
    form = (a.ravel() * d**2).sum(1)
    for rho in (0.25, 0.5, 1.0):
        assert out.scalars[f"S_{rho:g}".replace(".", "_")] == pytest.approx(0.5 * rho**2 * form.mean())
    H = (d[:2] * a.ravel()) @ d[:2].T
    least = np.linalg.eigvalsh(H)[0]
    np.testing.assert_allclose(out.arrays["curvature"], least, rtol=1e-6, atol=1e-8)
    assert out.scalars["non_convex"] == (least < 0)
    points = np.array(list(product(np.linspace(-1, 1, 9), repeat=2)))
    assert out.scalars["flat"] == np.mean(0.5 * ((points @ H) * points).sum(1) < 1)
    assert net.training
    assert torch.equal(net.w.data, net.target)


NETS = {
    "resnet": lambda: ResNet(3, depth=8, width=2, shortcut="projection"),
    "noshort": lambda: ResNet(3, depth=8, width=2, shortcut="none"),
    "multilevel": lambda: MultilevelResNet(3, blocks=1, width=2),
}


@pytest.mark.parametrize("name", NETS)
def test_explicit_hessian(name):
    torch.manual_seed(0)
    net = NETS[name]().double().train()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for b in net.buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    hessian = Hessian(net, Resident(x, y), chunk=4)
    H = torch.stack([hessian(unit) for unit in torch.eye(hessian.n, dtype=torch.float64)[:24]])
    assert [m.training for m in net.modules()] == [True] * len(list(net.modules()))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())

    w = kernels(net)
    assert hessian.n == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    net.eval()

    def loss(flat):
        pieces = flat.split([p.numel() for p in w.values()])
        return F.cross_entropy(
            torch.func.functional_call(net, {k: v.view(w[k].shape) for k, v in zip(w, pieces)}, (x,)), y
        )

    flat = torch.cat([p.detach().reshape(-1) for p in w.values()])
    whole = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    torch.testing.assert_close(H, whole[:24], rtol=1e-8, atol=1e-9)
    values = torch.linalg.eigvalsh(whole)
    found = ends(hessian, start_vector(hessian.n, flat), tol=1e-6)
    assert found.high == pytest.approx(float(values[-1]), rel=1e-5)
    assert found.low == pytest.approx(float(values[0]), rel=1e-4, abs=1e-5 * float(values[-1]))


def test_lanczos_agrees_with_scipy_and_says_how_well():
    from scipy.sparse.linalg import eigsh

    random = torch.Generator().manual_seed(0)
    m = torch.randn(300, 300, generator=random, dtype=torch.float64)
    m = m + m.T + 50 * torch.outer(m[0], m[0]) / 300  # one end stands out
    low, high = (eigsh(m.numpy(), 1, which=which)[0][0] for which in ("SA", "LA"))
    rough, fine = (ends(lambda v: m @ v, start_vector(300, m), tol=tol, steps=range(300)) for tol in (1e-2, 1e-10))
    assert fine.products > rough.products
    assert (fine.low, fine.high) == pytest.approx((low, high), rel=1e-9)
    assert rough.high == pytest.approx(high, rel=1e-2)
    assert low - 1e-9 <= rough.low <= low + rough.low_error
    assert ends(lambda v: m @ v, start_vector(300, m), tol=1e-10, steps=range(5)).products == 5
    exact = ends(lambda v: 2 * v, torch.ones(7), tol=1e-2)
    assert (exact.low, exact.high, exact.products) == pytest.approx((2, 2, 1))


def test_areas_of_known_surfaces():
    x, y = np.linspace(-1, 1, 21), np.linspace(-2, 2, 41)
    a, b = np.meshgrid(x, y, indexing="ij")
    assert non_convex_area(x, y, a**2 + 3 * b**2 + a * b) == 0
    assert non_convex_area(x, y, a**2 + b**2 + 2.1 * a * b) == 1  # only the mixed term makes it a saddle
    assert non_convex_area(x, y, 3 + 0.7 * a - b) == 0  # flat up to rounding
    cubic = non_convex_area(x, y, a**3 + b**2)  # 6a < 0 in the left half, without the line a = 0
    assert cubic == 9 / 19
    assert flat_area(a**2 + b**2, 0.0) == np.mean(a**2 + b**2 < 1)
    broken = a**2 + b**2
    broken[10, 20] = np.inf
    assert flat_area(broken, 0.0) == np.mean((a**2 + b**2 < 1) & (broken < np.inf))
    assert non_convex_area(x, y, broken) == 0
    assert non_convex_area(x, y, np.full_like(a, np.nan)) is None
    assert areas(x, y, broken, 0.0)[1]["curvature"].shape == (19, 39)


def test_surface_that_is_there(tmp_path):
    """Taken only where it is the same."""
    net, options = Quadratic(A, TARGET), {"steps": 0, "directions": 0, "grid": 5, "seed": 4}
    own = sharpness(net, IMAGES, tmp_path, tmp_path / "scratch.npz", **options)
    about = {"directions": "random", "dimensions": 2, "grid": 5, "seed": 4, "precision": "32", "recalibrate": None}
    marked = {"x": own.arrays["x"], "y": own.arrays["y"], "loss": own.arrays["surface"] + 100}
    for scalars, other, taken in (
        ({"images": 5, "loss_center": 5.0}, {}, True),
        ({"images": 5, "loss_center": 5.1}, {}, False),
        ({"images": 4, "loss_center": 5.0}, {}, False),
        ({"images": 5, "loss_center": 5.0}, {"grid": 7}, False),
        ({"images": 5, "loss_center": 5.0}, {"span": 0.5}, False),
    ):
        files.write(tmp_path, "loss_surface", Result(scalars, marked), {"analysis": about | other})
        out = sharpness(net, IMAGES, tmp_path, tmp_path / "scratch.npz", **options)
        assert out.scalars["flat"] == (0 if taken else own.scalars["flat"])
    assert own.scalars["flat"] > 0


def test_figure(tmp_path):
    net = Quadratic(A, TARGET)
    out = sharpness(net, IMAGES, tmp_path, tmp_path / "scratch.npz", directions=2, grid=5)
    bare = sharpness(net, IMAGES, tmp_path, tmp_path / "scratch.npz", directions=0, grid=None, steps=0)
    assert set(bare.scalars) == {"images", "loss", "error"}
    assert drawing.png(figure({"a": out, "b": bare})) == drawing.png(figure({"a": out, "b": bare}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tol": 0.0}, "analysis.tol must lie in"),
        ({"steps": -1}, "analysis.steps must be >= 0, got -1"),
        ({"rho": [0.0]}, "analysis.rho must be numbers > 0"),
        ({"grid": 2}, "analysis.grid must be >= 3"),
        ({"hessian_images": 6}, r"analysis.hessian_images must lie in 1..5"),
        ({"chunk": 0}, "analysis.chunk must be >= 1"),
    ],
)
def test_refusals(options, said, tmp_path):
    with pytest.raises(Problem, match=said):
        sharpness(Quadratic(A, TARGET), IMAGES, tmp_path, tmp_path / "s.npz", **options)
