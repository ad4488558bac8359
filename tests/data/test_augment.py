import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import functional as F

from depthlab.data.augment import Crop, Shift, crop, none, shift
from depthlab.problem import Problem


@pytest.fixture
def images():
    return torch.randint(256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws_of(augment, n, size=32, seed=0):
    return augment.draw(n, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_is_torchvisions(images, pad):
    augment = Crop(pad=pad)
    draws = draws_of(augment, len(images), 16)
    out = augment(images, draws)
    assert out.dtype == torch.uint8
    for image, (top, left, flip), mine in zip(images, draws.tolist(), out, strict=True):
        want = F.crop(F.pad(image.permute(2, 0, 1), [pad]), top, left, 16, 16)
        want = F.hflip(want) if flip else want
        assert torch.equal(mine.permute(2, 0, 1), want)


def test_every_window_of_a_crop():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1).repeat(9, 1, 1, 3)
    top, left = torch.arange(9) // 3, torch.arange(9) % 3
    out = crop(image, top, left, torch.zeros(9, dtype=torch.bool), 1)
    padded = torch.nn.functional.pad(image[0, :, :, 0], [1, 1, 1, 1])
    for i in range(9):
        assert torch.equal(out[i, :, :, 0], padded[i // 3 : i // 3 + 3, i % 3 : i % 3 + 3])


def reference(image, down, right, flip):
    """Pixel by pixel, in float64."""
    h, w, _ = image.shape
    out = np.empty(image.shape)
    for y in range(h):
        for x in range(w):
            v, u = np.clip(y - down, 0, h - 1), np.clip(x - right, 0, w - 1)
            j, i = int(v), int(u)
            b, a = v - j, u - i
            below, beside = min(j + 1, h - 1), min(i + 1, w - 1)
            above = (1 - a) * image[j, i] + a * image[j, beside]
            out[y, x] = (1 - b) * above + b * ((1 - a) * image[below, i] + a * image[below, beside])
    return out[:, ::-1] if flip else out


SHIFTS = [
    (0, 0, 0),
    (0, 0, 1),
    (0.25, -0.5, 0),
    (-4.8, 4.8, 1),
    (3, -2, 1),
    (-0.999, 2.4, 0),
    (15.5, -20, 1),
    (1e-6, -1e-6, 0),
]


@pytest.mark.parametrize(("down", "right", "flip"), SHIFTS)
def test_bilinear_shift_against_a_reference_per_pixel_and_scipy(images, down, right, flip):
    image = images[:1]
    out = shift(image, torch.tensor([float(down)]), torch.tensor([float(right)]), torch.tensor([bool(flip)]))[0]
    assert out.dtype == torch.float32
    exact = image[0].double().numpy()
    down, right = float(np.float32(down)), float(np.float32(right))
    np.testing.assert_allclose(out, reference(exact, down, right, flip), atol=1e-4)
    want = ndimage.shift(exact, (down, right, 0), order=1, mode="nearest")
    np.testing.assert_allclose(out, want[:, ::-1] if flip else want, atol=1e-4)


@pytest.mark.parametrize(("down", "right", "flip"), SHIFTS)
def test_nearest_shift_is_scipys(images, down, right, flip):
    image = images[:1]
    tensors = torch.tensor([float(down)]), torch.tensor([float(right)]), torch.tensor([bool(flip)])
    out = shift(image, *tensors, "nearest")[0]
    want = ndimage.shift(image[0].double().numpy(), (down, right, 0), order=0, mode="nearest")
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out, want[:, ::-1] if flip else want)


@pytest.mark.parametrize("augment", [Shift(), Shift(interpolation="nearest"), Crop(), Crop(fill="mean")])
def test_each_image_has_its_own_draw(images, augment):
    draws = draws_of(augment, len(images), 16)
    together = augment(images, draws)
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], augment(images[i : i + 1], draws[i : i + 1]))


@pytest.mark.parametrize("augment", [Shift(max_shift=0, flip=0), Crop(pad=0, flip=0)])
def test_nothing_asked_nothing_done(images, augment):
    out = augment(images, draws_of(augment, len(images), 16))
    assert torch.equal(out, images.to(out.dtype))


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_shift_draws(flip):
    n = 40_000
    down, right, flips = draws_of(Shift(0.15, flip=flip), n).double().unbind(1)
    for offset in (down, right):
        assert offset.abs().max() <= 4.8
        assert offset.abs().max() > 4.79
        assert abs(offset.mean()) < 5 * 4.8 / (3 * n) ** 0.5
        assert offset.std() == pytest.approx(4.8 / 3**0.5, rel=0.02)  # uniform
    assert abs(torch.corrcoef(torch.stack([down, right]))[0, 1]) < 5 / n**0.5
    assert abs(flips.mean() - flip) <= 5 * (flip * (1 - flip) / n) ** 0.5


def test_crop_draws_are_uniform():
    n = 81_000
    top, left, flips = draws_of(Crop(pad=4), n).unbind(1)
    counts = torch.bincount(9 * top + left, minlength=81)
    assert len(counts) == 81
    assert ((counts - n / 81) ** 2 / (n / 81)).sum() < 80 + 5 * (2 * 80) ** 0.5  # chi square, 5 sd
    assert abs(flips.double().mean() - 0.5) < 5 * 0.5 / n**0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Shift(flip=1.5), r"augment\.flip must lie in \[0, 1\], got 1\.5"),
        (lambda: Crop(flip=float("nan")), r"augment\.flip must lie in \[0, 1\], got nan"),
        (lambda: Crop(flip="half"), r"augment\.flip .* got 'half'"),
        (lambda: Shift(max_shift=-0.1), r"augment\.max_shift .* got -0\.1"),
        (lambda: Shift(max_shift=1), r"augment\.max_shift .* got 1"),
        (lambda: Shift(interpolation="cubic"), r"augment\.interpolation .* got 'cubic'"),
        (lambda: Crop(pad=-1), r"augment\.pad .* got -1"),
        (lambda: Crop(pad=1.5), r"augment\.pad .* got 1\.5"),
        (lambda: Crop(fill="grey"), r"augment\.fill .* got 'grey'"),
    ],
)
def test_bad_arguments_are_quoted(make, says):
    with pytest.raises(Problem, match=says):
        make()


def test_none():
    assert none() is None
