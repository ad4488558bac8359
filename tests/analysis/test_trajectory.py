"""A path in its plane; its pictures and files."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.checkpoint import last_checkpoint
from callbacks.trajectory import Trajectory, check_path
from depthlab import Classifier
from depthlab.analysis import Result, drawing
from depthlab.analysis.directions import Layout
from depthlab.analysis.evaluator import Resident
from depthlab.analysis.loss_surface import extra, figure, loss_surface
from depthlab.analysis.surface_figures import Scale, side_by_side
from depthlab.analysis.trajectory import degrees, gradient, path_of, principal_plane, step_gradient, step_normal, stored
from depthlab.architectures import ResNet
from depthlab.problem import Problem
from tests.growing import images as tiny


def test_principal_components_of_a_planted_plane():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(500, 2)))
    planted = random.normal(size=(30, 2)) * [3, 1]
    origin, mask = random.normal(size=500), np.ones(500, dtype=bool)
    plane = principal_plane(list(origin + planted @ basis.T), origin, mask)
    assert plane.explained[:2].sum() == pytest.approx(1)
    np.testing.assert_allclose(plane.components @ plane.components.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.components @ basis @ basis.T, plane.components, atol=1e-9)  # in the plane
    np.testing.assert_allclose(plane.coordinates @ plane.components, planted @ basis.T, atol=1e-9)
    assert (plane.coordinates[0] >= 0).all()
    variance = np.var(planted - planted.mean(0), axis=0)
    assert plane.explained[0] > variance[0] / variance.sum() - 0.05


def test_what_is_masked_does_not_count():
    random = np.random.default_rng(1)
    rows, mask = random.normal(size=(6, 40)), np.arange(40) < 25
    rows[:, ~mask] *= 1e6
    plane = principal_plane(list(rows), np.zeros(40), mask)
    assert not plane.components[:, ~mask].any()
    _, s, vt = np.linalg.svd(rows[:, mask] - rows[:, mask].mean(0), full_matrices=False)
    np.testing.assert_allclose(plane.explained[:5], (s**2 / (s**2).sum())[:5])
    np.testing.assert_allclose(np.abs(plane.components[:, mask]), np.abs(vt[:2]), atol=1e-9)


def test_a_line_has_no_plane():
    with pytest.raises(Problem, match="lies on a line"):
        principal_plane([np.zeros(3)] * 4, np.zeros(3), np.ones(3, dtype=bool))


def test_angles():
    assert degrees(np.array([1.0, 0]), np.array([0, 2.0])) == pytest.approx(90)
    assert np.isnan(degrees(np.zeros(2), np.ones(2)))
    axis = np.linspace(-2, 2, 21)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    circles = np.exp(x**2 + y**2)
    inward = step_normal(np.array([[1.5, 1.5], [1.0, 1.0], [0.5, 0.5]]), axis, axis, circles)
    np.testing.assert_allclose(inward, 0, atol=0.5)
    around = step_normal(np.array([[1.0, 0.0], [1.0, 0.001]]), axis, axis, circles)
    np.testing.assert_allclose(around, 90, atol=0.5)
    assert np.isnan(step_normal(np.ones((3, 2)), axis, axis, circles * np.inf)).all()


def test_step_along_the_gradient(tmp_path):
    torch.manual_seed(0)
    net = ResNet(10, depth=8, width=4).double().eval()
    data = Resident(torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 10)
    layout = Layout(net)
    theta = layout.vector(net)
    g = gradient(net, layout, theta, data, chunk=5)
    loss = torch.nn.functional.cross_entropy(net(data.x), data.y)
    there = torch.cat([v.reshape(-1) for v in torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(g[layout.trained], there)
    assert not g[~layout.trained].any()
    path = [theta.numpy(), (theta - 1e-3 * g).numpy(), (theta - 1e-3 * g + 1e-3 * g).numpy()]
    np.testing.assert_allclose(step_gradient(net, path, data)[0], 0, atol=1e-4)
    assert step_gradient(net, path, data)[1] > 150


pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

# ---- stored while training


def fit(folder, until, **options):
    torch.manual_seed(0)
    model, callbacks = (
        Classifier(ResNet(10, depth=8, width=4)),
        [Trajectory(folder, **options), last_checkpoint(folder)],
    )
    checkpoint = next(iter(folder.glob("last.ckpt")), None)
    Trainer(
        accelerator="cpu", max_epochs=until, callbacks=callbacks, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    ).fit(model, *tiny(), ckpt_path=checkpoint)  # fmt: skip
    return model.net


def test_weights_of_every_epoch(tmp_path):
    """Also over a resumption; a surface over them is drawn along the path."""
    fit(tmp_path, 2)
    path_of(tmp_path, 2).write_bytes(b"")  # trained anew
    (tmp_path / "last.ckpt").unlink()
    fit(tmp_path, 3)
    assert {p.name for p in (tmp_path / "trajectory").iterdir()} == {f"epoch{e:04d}.npy" for e in range(4)}
    net = fit(tmp_path, 4).eval()
    found = stored(tmp_path, net)
    assert list(found) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found[4], Layout(net).vector(net).numpy())
    batches = [(x, y) for x, y in tiny()[1]]
    options = {"folder": tmp_path, "scratch": tmp_path / "part.npz", "directions": "pca", "grid": 5}
    result = loss_surface(net, batches, **options, gradients=20)
    assert result.arrays["path"].shape == (5, 2)
    np.testing.assert_allclose(result.arrays["path"][-1], 0, atol=1e-6)  # the last weights are the centre
    assert result.arrays["step_gradient"].shape == result.arrays["step_normal"].shape == (4,)
    assert result.arrays["x"].min() < result.arrays["path"][:, 0].min()
    assert 0 < result.scalars["explained_2"] < result.scalars["explained_1"] < 1
    wide = ResNet(10, depth=8, width=8)
    with pytest.raises(Problem, match="another network's weights"):
        stored(tmp_path, wide)


def test_every_second_epoch_in_half_the_space(tmp_path):
    net = fit(tmp_path, 3, every=2, dtype="float16")
    files = sorted((tmp_path / "trajectory").iterdir())
    assert [f.name for f in files] == ["epoch0000.npy", "epoch0002.npy", "epoch0003.npy"]  # and the last
    last = np.load(files[-1])
    assert last.dtype == np.float16
    np.testing.assert_allclose(last.astype(float), Layout(net).vector(net).numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("wrong", "said"), [({"every": 0}, "every must be >= 1"), ({"dtype": "int8"}, "float16 or")])
def test_arguments(wrong, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Trajectory(tmp_path, **wrong)


# ---- pictures and files


def surface(path=False, high=30.0):
    axis = np.linspace(-1, 1, 7)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    loss = 0.05 + high * (x**2 + y**2) / 2
    arrays = {"x": axis, "y": axis, "loss": loss, "error": np.minimum(100, loss)}
    if path:
        arrays |= {"path": np.array([[0.9, 0.8], [0.3, 0.1], [0, 0]]), "explained": np.array([0.8, 0.15, 0.05])}
        arrays["epochs"] = np.arange(3)
    return Result({"loss_center": 0.05, "error_center": 1.0}, arrays)


def test_pictures():
    line = Result({}, {"x": np.arange(5.0), "loss": np.arange(5.0) + 0.1, "error": np.arange(5.0)})
    for results in ({"a": surface()}, {"a": surface(path=True)}, {"a": surface(), "b": surface(high=3.0)},
                    {"a": line, "b": line}):  # fmt: skip
        assert drawing.png(figure(results)).startswith(b"\x89PNG")
    three = {"a": surface(), "b": surface()}
    panel = side_by_side([["a", None], ["b", "missing"]], three, {"a": "A", "b": "B", "missing": "?"}, Scale.of(three))
    assert drawing.png(panel).startswith(b"\x89PNG")


def test_runs_drawn_together_have_one_scale():
    low, high = surface(high=3.0), surface(high=30.0)
    scale = Scale.of({"a": low, "b": high})
    assert (scale.low, scale.high, scale.log) == (pytest.approx(0.05), pytest.approx(30.05), True)
    assert not Scale.of({"a": Result({}, {"loss": np.array([1.0, 2.0])})}).log
    broken = Result({}, {"loss": np.array([1.0, np.inf, np.nan])})
    np.testing.assert_array_equal(Scale.of({"a": broken}).clean(broken.arrays["loss"])[1:], [1 + 1e-9] * 2)


def test_the_page_loads_nothing():
    pytest.importorskip("plotly")
    page = extra("a <run>", surface(path=True))[".html"].decode()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)\s*=", page)
    assert "@import" not in page.replace("@import\\b", "")
    ours = page[page.rindex("<script") :]  # the figure itself; what stands before is plotly.js
    assert "http" not in ours.replace("https://plotly.com", "")
    assert "epoch 2" in ours
    assert "plotly.js v" in page


def test_paraview_file():
    result = surface()
    root = ElementTree.fromstring(extra("a", result)[".vts"])
    extent = root.find("StructuredGrid").get("WholeExtent")
    assert extent == "0 6 0 6 0 0"
    points = np.array(root.find(".//Points/DataArray").text.split(), dtype=float).reshape(7, 7, 3)
    loss = np.array(root.find(".//PointData/DataArray[@Name='loss']").text.split(), dtype=float).reshape(7, 7)
    np.testing.assert_allclose(loss, result.arrays["loss"].T, rtol=1e-8)
    np.testing.assert_allclose(points[0, :, 0], result.arrays["x"])  # x runs fastest
    np.testing.assert_allclose(points[:, 0, 1], result.arrays["y"])


def test_a_path_has_no_end_in_mid_training(tmp_path):
    check_path(tmp_path, None)
    with pytest.raises(Problem, match=r"trained without trajectory\.every; delete the folder"):
        check_path(tmp_path, 1)
    (tmp_path / "trajectory").mkdir()
    check_path(tmp_path, 1)
    check_path(tmp_path, None, done=True)
    with pytest.raises(Problem, match=r"its path would end here; set trajectory\.every again, or delete .*trajectory"):
        check_path(tmp_path, None)
