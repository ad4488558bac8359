"""Where arrays come from: torchvision's downloads, scikit-learn's digits, a folder of images, random numbers.

A maker gets `Options` and returns the arrays, the names of the classes and a line about their origin; sources.py says
when one is called. Heavy imports stay inside: who has the arrays does not need them.
"""

import http.client
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from depthlab.problem import Problem

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Options:
    """What a maker may need."""

    archives: Path  # where downloads are kept
    work: Path  # an empty folder of its own, removed afterwards
    root: Path | None = None
    size: int | None = None


Made = tuple[dict[str, np.ndarray], list[str], str]  # arrays, names of the classes, where they come from


def _archive(dataset: type, options: Options) -> None:
    """The verified archive of a torchvision data set, kept in `archives`, linked into `work`."""
    from torchvision.datasets.utils import check_integrity, download_url

    path, md5 = options.archives / dataset.filename, dataset.tgz_md5
    if not path.exists():
        options.archives.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)  # torchvision sets none: a network that swallows packets would hang for ever
        try:
            download_url(dataset.url, options.work, dataset.filename, md5)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise Problem(
                f"{dataset.url} could not be downloaded ({error}); save the file as {path.absolute()} (md5 {md5}), "
                "or set data_dir (or DEPTHLAB_DATA) to a folder that has the arrays, "
                "or use data=digits, which needs no network"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        os.replace(options.work / dataset.filename, path)
    elif not check_integrity(path, md5):
        raise Problem(
            f"{path} is truncated or changed: its md5 is not {md5}; "
            f"remove it to have it downloaded from {dataset.url}, or put the right file there"
        )
    (options.work / dataset.filename).symlink_to(path.absolute())


def _torchvision(dataset_name: str, of_split: Callable[[str], dict], options: Options) -> Made:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, dataset_name)
    _archive(dataset, options)
    arrays = {}
    with warnings.catch_warnings():
        # CIFAR's pickles of 2009 and tar archives without a filter: nothing a user could change
        warnings.simplefilter("ignore")
        for split in SPLITS:
            # finds the archive, extracts and checks each file
            part = dataset(options.work, download=True, **of_split(split))
            labels = part.targets if hasattr(part, "targets") else part.labels
            arrays[f"{split}_images"] = part.data
            arrays[f"{split}_labels"] = np.asarray(labels, dtype=np.int64)
    return arrays, list(part.classes), f"torchvision {dataset_name}, {dataset.url}, md5 {dataset.tgz_md5}"


def _cifar10(options: Options) -> Made:
    return _torchvision("CIFAR10", lambda split: {"train": split == "train"}, options)


def _cifar100(options: Options) -> Made:
    return _torchvision("CIFAR100", lambda split: {"train": split == "train"}, options)


def _stl10(options: Options) -> Made:
    """The 5,000 labelled training and 8,000 test images; the unlabelled ones and the folds are left aside."""
    arrays, classes, origin = _torchvision("STL10", lambda split: {"split": split}, options)
    return {a: d.transpose(0, 2, 3, 1) if a.endswith("images") else d for a, d in arrays.items()}, classes, origin


def _digits(options: Options) -> Made:
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, enlarged to 32x32 with 0..255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BILINEAR)) for i in small])
    images, labels = np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)
    n = 1500  # divides by batches of 100 on two devices
    arrays = {
        "train_images": images[:n],
        "train_labels": labels[:n],
        "test_images": images[n:],
        "test_labels": labels[n:],
    }
    return arrays, [str(name) for name in digits.target_names], "scikit-learn load_digits, bilinear to 32x32"


def _imagefolder(options: Options) -> Made:
    """<root>/{train,test}/<class>/<image>; RGB, all of one square size unless `size` says what to make of them."""
    from PIL import ImageOps
    from torchvision.datasets import ImageFolder

    root, size = options.root, options.size
    if root is None:
        raise Problem(
            "data.root must name a folder that holds train/<class>/<image> and test/<class>/<image>, got null"
        )
    arrays, classes, side = {}, None, size
    for split in SPLITS:
        try:
            folder = ImageFolder(str(root / split))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Problem(
                f"data.root={root} must hold train/<class>/<image> and test/<class>/<image>: {error}"
            ) from error
        if classes is not None and classes != folder.classes:
            raise Problem(f"{root / split} has the classes {folder.classes}, but {root / 'train'} has {classes}")
        classes, images = folder.classes, []
        for path, _ in folder.samples:
            try:
                image = folder.loader(path)  # RGB
            except (OSError, ValueError, SyntaxError) as error:
                raise Problem(f"{path} cannot be read as an image ({error}); mend or remove it") from error
            if size is not None:
                image = ImageOps.fit(image, (size, size))  # resized and centre-cropped
            side = image.size[0] if side is None else side  # the first one's
            if image.size != (side, side):
                what = f"{image.size[0]}x{image.size[1]}"
                raise Problem(
                    f"{path} is {what}; all images must be {side}x{side}, or set data.size to have them resized"
                )
            images.append(np.asarray(image))
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = (
            np.stack(images),
            np.asarray(folder.targets, dtype=np.int64),
        )
    return arrays, classes, f"images of {root}"


def _noise(options: Options) -> Made:
    """50,000 images of random pixels and labels of 100 classes: no step's cost depends on what a picture shows."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 50_000), ("test", 10_000)):
        arrays[f"{split}_images"] = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = random.permutation(count) % 100
    return arrays, [str(k) for k in range(100)], "random numbers"


MAKERS: dict[str, Callable[[Options], Made]] = {
    "cifar100": _cifar100,
    "cifar10": _cifar10,
    "stl10": _stl10,
    "digits": _digits,
    "imagefolder": _imagefolder,
    "noise": _noise,
}
