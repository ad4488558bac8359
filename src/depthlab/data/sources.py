"""From a source to arrays on disk: <data_dir>/<name>/{train,test}_{images,labels}.npy, classes.json and meta.json.

Whoever finds the arrays uses them, memory-mapped and therefore shared by all processes of a machine. Whoever does not
makes them once, under a lock, in a folder beside that is renamed when whole. meta.json holds source, counts, shapes,
SHA-256 of the arrays' bytes and the training set's channel means and standard deviations; where it is missing (arrays
made elsewhere) it is measured and written.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from filelock import FileLock

from depthlab.data.makers import MAKERS, SPLITS, Options
from depthlab.problem import Problem
from depthlab.records import write_json

log = logging.getLogger(__name__)

ARRAYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))
FILES = (*(f"{array}.npy" for array in ARRAYS), "classes.json")


@dataclass(frozen=True)
class Arrays:
    """A data set, memory-mapped; pages are private copies once written to, so torch may wrap them without a warning."""

    train_images: np.ndarray  # (N, S, S, 3) uint8, RGB
    train_labels: np.ndarray  # (N,) int64 in 0..K-1
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]  # K names
    mean: tuple[float, ...]  # of the training set per channel, on the 0-255 scale
    std: tuple[float, ...]
    sha256: dict[str, str]  # of the bytes of each array


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    source: str | None = None,
    classes: int | None = None,
    size: int | None = None,
    root: str | Path | None = None,
) -> Arrays:
    """The arrays of <data_dir>/<name>, made first where they do not exist, checked to the last byte always.

    Args:
        name: the folder.
        data_dir: None for the environment variable DEPTHLAB_DATA, or else "data".
        source: a name in MAKERS, None for `name`; only used where the arrays do not exist.
        classes, size: what the caller expects; size also is what `imagefolder` resizes to.
        root: the folder that `imagefolder` reads.

    Raises:
        Problem: naming the file and the way out.
    """
    data_dir = Path(data_dir if data_dir is not None else os.environ.get("DEPTHLAB_DATA", "data")).expanduser()
    root = None if root is None else Path(root).expanduser().resolve()
    folder = data_dir / name
    try:
        if not _present(folder):
            _make(folder, source if source is not None else name, root, size)
        return _read(folder, classes, size, root)
    except OSError as error:
        raise Problem(
            f"{folder}: {error}; set data_dir (or DEPTHLAB_DATA) to a folder that can be read and written"
        ) from error


def _present(folder: Path) -> bool:
    missing = [f for f in FILES if not (folder / f).is_file()]
    if 0 < len(missing) < len(FILES):
        raise Problem(
            f"{folder} has no {', '.join(missing)}; add what is missing, or remove the folder to have it made anew"
        )
    return not missing


# --- reading ---


def _read(folder: Path, classes: int | None, size: int | None, root: Path | None) -> Arrays:
    arrays = {array: _map(folder / f"{array}.npy") for array in ARRAYS}
    names = _classes(folder / "classes.json")
    _check(folder, arrays, names)
    if classes is not None and classes != len(names):
        raise Problem(f"data.classes={classes}, but {folder / 'classes.json'} names {len(names)} classes")
    side = arrays["train_images"].shape[1]
    if size is not None and size != side:
        raise Problem(
            f"data.size={size}, but the images of {folder / 'train_images.npy'} are {side}x{side}; "
            f"set data.size={side}, or another data.name to make a second copy"
        )
    # 0.1 s for the 180 MB of a CIFAR set on a core with SHA instructions, so it is done at every load.
    sha256 = {array: hashlib.sha256(data).hexdigest() for array, data in arrays.items()}
    path = folder / "meta.json"
    if not path.exists():
        meta = _measure(arrays, names, sha256, f"found in {folder.absolute()}", None)
        try:
            write_json(path, meta)
        except OSError as error:  # a shared, read-only folder is as good; it is measured again next time
            log.info("%s not written: %s", path, error)
    else:
        meta = _verified(path, arrays, names, sha256)
    if root is not None and meta.get("root") not in (None, str(root)):
        raise Problem(
            f"{folder} was made from {meta['root']}, not data.root={root}; set another data.name, or remove {folder}"
        )
    return Arrays(**arrays, classes=names, mean=tuple(meta["mean"]), std=tuple(meta["std"]), sha256=sha256)


def _map(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise Problem(
            f"{path} is truncated or no array ({error}); remove {path.parent} to have it made anew"
        ) from error
    if not isinstance(array, np.memmap) or array.offset + array.nbytes != path.stat().st_size:
        raise Problem(f"{path} is longer than its header says; remove {path.parent} to have it made anew")
    return array


def _classes(path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(f"{path} is not JSON ({error}); it must be a list of class names") from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise Problem(f"{path} must be a list of class names")
    return tuple(names)


def _check(folder: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    for array, data in arrays.items():
        images = array.endswith("images")
        dtype, ndim, want = (np.uint8, 4, "(N, S, S, 3) uint8") if images else (np.int64, 1, "(N,) int64")
        square = not images or (data.ndim == 4 and data.shape[1] == data.shape[2] and data.shape[3] == 3)
        if data.dtype != dtype or data.ndim != ndim or not square or not data.flags.c_contiguous:
            order = "" if data.flags.c_contiguous else ", not in C order"
            raise Problem(f"{folder / array}.npy must be {want} in C order, but is {data.shape} {data.dtype}{order}")
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(images) != len(labels):
            raise Problem(
                f"{folder}: {len(images)} images in {split}_images.npy, {len(labels)} labels in {split}_labels.npy"
            )
        if not len(labels):
            raise Problem(f"{folder}: {split}_labels.npy is empty; there is nothing to {split}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(names):
            raise Problem(
                f"{folder / split}_labels.npy has labels {low}..{high}; "
                f"with {len(names)} classes they must lie in 0..{len(names) - 1}"
            )
    train, test = arrays["train_images"].shape[1], arrays["test_images"].shape[1]
    if train != test:
        raise Problem(
            f"{folder}: training images are {train}x{train}, test images {test}x{test}; they must be of one size"
        )


def _verified(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...], sha256: dict[str, str]) -> dict:
    """meta.json, once everything it says is found to be so."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        shapes = {array: tuple(meta["shapes"][array]) for array in ARRAYS}
        hashes = {array: str(meta["sha256"][array]) for array in ARRAYS}
        classes, mean, std = meta["classes"], meta["mean"], meta["std"]
        numbers = all(len(v) == 3 and all(math.isfinite(float(n)) for n in v) for v in (mean, std))
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{path} is damaged ({error!r}); remove it to have it measured anew") from error
    if not numbers:
        raise Problem(f"{path} is damaged (mean {mean}, std {std}); remove it to have it measured anew")
    way_out = f"remove {path.parent} to have it made anew (or only meta.json, if the change was meant)"
    if classes != len(names):
        raise Problem(f"{path.parent / 'classes.json'} names {len(names)} classes, meta.json {classes}; {way_out}")
    for array, data in arrays.items():
        file = path.parent / f"{array}.npy"
        if data.shape != shapes[array]:
            raise Problem(f"{file} is {data.shape}, meta.json says {shapes[array]}; {way_out}")
        if sha256[array] != hashes[array]:
            raise Problem(f"{file} was changed: its SHA-256 is not the one in meta.json; {way_out}")
    return meta


def _measure(
    arrays: dict[str, np.ndarray], names: tuple[str, ...], sha256: dict[str, str], source: str, root: Path | None
) -> dict:
    mean, std = channel_statistics(arrays["train_images"])
    return {
        "source": source,
        "root": None if root is None else str(root),
        "counts": {split: len(arrays[f"{split}_labels"]) for split in SPLITS},
        "shapes": {array: list(data.shape) for array, data in arrays.items()},
        "classes": len(names),
        "sha256": sha256,
        "mean": mean,
        "std": std,
    }


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation per channel of (N, H, W, C) uint8, exact: computed from the histograms."""
    counts = np.zeros((images.shape[3], 256), dtype=np.int64)
    for start in range(0, len(images), 1000):  # bincount widens its input to 8 bytes
        chunk = images[start : start + 1000]
        for channel, count in enumerate(counts):
            count += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values, n = np.arange(256), counts.sum(1)
    mean = counts @ values / n
    variance = np.array([count @ (values - m) ** 2 for count, m in zip(counts, mean, strict=True)]) / n
    return mean.tolist(), np.sqrt(variance).tolist()


# --- making ---


def _make(folder: Path, source: str, root: Path | None, size: int | None) -> None:
    if source not in MAKERS:
        near = get_close_matches(source, MAKERS, 1)
        raise Problem(
            f"data.source={source!r} is unknown{f', did you mean {near[0]}?' if near else ''}; "
            f"there are {', '.join(MAKERS)}, or put {', '.join(FILES)} into {folder}"
        )
    data_dir = folder.parent
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{folder.name}.lock"):
        if _present(folder):  # another process was faster
            return
        # Whoever holds the lock is alone, so what lies here is a killed writer's.
        for leftover in data_dir.glob(f".{folder.name}.making-*"):
            shutil.rmtree(leftover)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.making-", dir=data_dir))
        try:
            (making / "work").mkdir()
            log.info("making %s from %s", folder, source)
            options = Options(data_dir / "archives", making / "work", root, size)
            arrays, classes, origin = MAKERS[source](options)
            arrays = {array: np.ascontiguousarray(data) for array, data in arrays.items()}
            _check(folder, arrays, tuple(classes))
            ready = making / "arrays"
            ready.mkdir()
            for array, data in arrays.items():
                np.save(ready / f"{array}.npy", data)
            sha256 = {array: hashlib.sha256(data).hexdigest() for array, data in arrays.items()}
            write_json(ready / "classes.json", list(classes))
            write_json(ready / "meta.json", _measure(arrays, tuple(classes), sha256, origin, root))
            os.replace(ready, folder)  # also takes the place of an empty folder
        finally:
            shutil.rmtree(making, ignore_errors=True)
