"""Random shifts, crops and flips of a whole batch at once, on the device where the images are.

An augmentation has two halves. `draw` makes the random numbers of a whole epoch, on the CPU, so that they depend on the
generator alone and not on the device or the number of processes; calling it applies one row of them to each image.
A crop, a flip and the integer part of a shift are one `index_select` of pixels: measured the fastest on a CPU (batch
100, 32x32, one thread: 0.2 ms; windows by `as_strided` and `where` 0.4, three-index gather 0.8, a loop of slices 0.4).
"""

import math
from numbers import Real

import torch
from torch import Tensor

from depthlab.problem import Problem


def pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of each image at its own rows and columns.

    Args:
        images: (B, H, W, C), any dtype.
        rows: (B, h) int64 in 0..H-1.
        columns: (B, w) int64 in 0..W-1.

    Returns:
        (B, h, w, C).
    """
    b, h, w, c = images.shape
    rows = rows + h * torch.arange(b, device=images.device)[:, None]
    index = (rows * w)[:, :, None] + columns[:, None, :]  # (B, h, w), into all pixels of the batch
    return images.reshape(-1, c).index_select(0, index.reshape(-1)).view(*index.shape, c)


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad every side with `pad` zeros, cut out a window of the old size, mirror it where `flip`.

    Args:
        images: (B, H, W, C), any dtype, which the result keeps.
        top, left: (B,) int64 in 0..2*pad, the window's corner in the padded image.
        flip: (B,) bool.
    """
    b, h, w, c = images.shape
    padded = images.new_zeros(b, h + 2 * pad, w + 2 * pad, c)
    padded[:, pad : pad + h, pad : pad + w] = images
    y, x = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    return pixels(padded, top[:, None] + y, left[:, None] + torch.where(flip[:, None], w - 1 - x, x))


def shift(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Move each image by a real number of pixels, repeating the pixels of its border, then mirror it where `flip`.

    out[y, x] = image[y - down, x - right], read between pixels and clamped to the border.

    Args:
        images: (B, H, W, C).
        down, right: (B,) float, in pixels.
        flip: (B,) bool.
        interpolation: "bilinear", or "nearest" (halves round up, as in scipy.ndimage with order=0).

    Returns:
        (B, H, W, C) float32.
    """
    if interpolation == "nearest":
        rows, _ = _taps(images.shape[1], 1, torch.floor(0.5 - down), torch.zeros_like(flip))
        columns, _ = _taps(images.shape[2], 1, torch.floor(0.5 - right), flip)
        return pixels(images, rows, columns).float()
    # An image has one shift, so its weights are the same at all pixels: one row and one column more, then two lerps.
    rows, weight_y = _taps(images.shape[1], 2, -down, torch.zeros_like(flip))
    columns, weight_x = _taps(images.shape[2], 2, -right, flip)
    near = pixels(images, rows, columns).float()  # (B, H + 1, W + 1, C)
    near = torch.lerp(near[:, :-1], near[:, 1:], weight_y.view(-1, 1, 1, 1))
    return torch.lerp(near[:, :, :-1], near[:, :, 1:], weight_x.view(-1, 1, 1, 1))


def _taps(side: int, taps: int, offset: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, side + taps - 1) that a line reads, mirrored where `flip`; the weight (B,) of the later tap."""
    whole = torch.floor(offset)
    along = torch.arange(side + taps - 1, device=offset.device)
    along = torch.where(flip[:, None], side + taps - 2 - along, along)
    weight = offset - whole
    return (along + whole.long()[:, None]).clamp_(0, side - 1), torch.where(flip, 1 - weight, weight)


class Shift:
    """Barz & Denzler's augmentation: independent real-valued shifts in x and y, and a horizontal flip.

    The paper does not say how values between pixels are read; the authors' Keras had "nearest" in older versions and
    "bilinear" in newer ones. The border's pixels are repeated (Keras' fill_mode="nearest").

    Args:
        max_shift: largest shift as a fraction of the image's side, 0 <= max_shift < 1; uniform in both directions.
        interpolation: "bilinear" or "nearest".
        flip: probability of a mirrored image.

    Example: ``ImageData("cifar100", augment=Shift())``
    """

    after_standardising = False

    def __init__(self, max_shift: float = 0.15, interpolation: str = "bilinear", flip: float = 0.5) -> None:
        if not _real(max_shift) or not 0 <= max_shift < 1:
            raise Problem(f"augment.max_shift is a fraction of the side and must lie in [0, 1), got {max_shift!r}")
        if interpolation not in ("bilinear", "nearest"):
            raise Problem(f"augment.interpolation must be bilinear or nearest, got {interpolation!r}")
        self.max_shift, self.interpolation, self.flip = float(max_shift), interpolation, _probability(flip)

    def draw(self, n: int, size: int, generator: torch.Generator) -> Tensor:
        """Draws (n, 3) float32 for n images of side `size`: pixels down, pixels right, flip (0 or 1)."""
        draws = torch.rand(n, 3, generator=generator)
        draws[:, :2] = (2 * draws[:, :2] - 1) * (self.max_shift * size)
        draws[:, 2] = draws[:, 2] < self.flip
        return draws

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, H, W, C) uint8 and their draws (B, 3) -> (B, H, W, C) float32, on the scale of the images."""
        return shift(images, draws[:, 0], draws[:, 1], draws[:, 2] > 0, self.interpolation)


class Crop:
    """He et al.'s augmentation: pad, crop a random window of the old size, and a horizontal flip.

    Args:
        pad: pixels added on each side, >= 0.
        flip: probability of a mirrored image.
        fill: "black" pads the raw image with zeros (as torchvision's RandomCrop before Normalize does); "mean" pads the
            standardised image with zeros, that is with the mean colour.

    Example: ``ImageData("cifar10", augment=Crop(pad=4))``
    """

    def __init__(self, pad: int = 4, flip: float = 0.5, fill: str = "black") -> None:
        if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
            raise Problem(f"augment.pad must be a whole number of pixels >= 0, got {pad!r}")
        if fill not in ("black", "mean"):
            raise Problem(f"augment.fill must be black or mean, got {fill!r}")
        self.pad, self.flip, self.fill = pad, _probability(flip), fill
        self.after_standardising = fill == "mean"

    def draw(self, n: int, size: int, generator: torch.Generator) -> Tensor:
        """Draws (n, 3) int64: top and left of the window in the padded image (0..2*pad), flip (0 or 1)."""
        corner = torch.randint(2 * self.pad + 1, (n, 2), generator=generator)
        return torch.cat([corner, (torch.rand(n, 1, generator=generator) < self.flip).long()], 1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, H, W, C) and their draws (B, 3) -> (B, H, W, C), of the same dtype."""
        return crop(images, draws[:, 0], draws[:, 1], draws[:, 2] > 0, self.pad)


def none() -> None:
    """No augmentation, for `augment=none`."""


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _probability(value: float) -> float:
    if not _real(value) or not 0 <= value <= 1:
        raise Problem(f"augment.flip must lie in [0, 1], got {value!r}")
    return float(value)
