import functools
import hashlib
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from depthlab.data import ImageData, sources
from depthlab.data.sources import ARRAYS, channel_statistics, load
from depthlab.problem import Problem


def small(folder: Path, classes: int = 3, side: int = 8) -> Path:
    """Arrays as someone else would put them there, without meta.json."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 12)):
        np.save(folder / f"{split}_images.npy", rng.integers(256, size=(n, side, side, 3), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(n) % classes)
    (folder / "classes.json").write_text(json.dumps([f"c{k}" for k in range(classes)]))
    return folder


def rewrite(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def test_arrays_without_meta_are_measured(tmp_path):
    folder = small(tmp_path / "mine")
    arrays = load("mine", tmp_path, classes=3, size=8)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"] == {"train": 30, "test": 12}
    assert meta["sha256"] == arrays.sha256
    assert arrays.sha256["test_images"] == hashlib.sha256(arrays.test_images.tobytes()).hexdigest()
    flat = arrays.train_images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(arrays.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(arrays.std, flat.std(0), rtol=1e-12)
    assert isinstance(arrays.train_images, np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(arrays.train_images)
    again = load("mine", tmp_path)
    assert (again.mean, again.std, again.classes) == (arrays.mean, arrays.std, ("c0", "c1", "c2"))


def test_statistics_of_more_than_one_chunk():
    images = np.random.default_rng(1).integers(256, size=(2300, 4, 4, 3), dtype=np.uint8)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, images.astype(float).std((0, 1, 2)), rtol=1e-12)


def truncate(folder):
    path = folder / "train_images.npy"
    os.truncate(path, path.stat().st_size - 7)


BAD = {
    "truncated": (truncate, r"train_images.npy is truncated .*remove"),
    "empty": (lambda f: (f / "train_labels.npy").write_bytes(b""), r"train_labels.npy is truncated"),
    "rubbish": (
        lambda f: (f / "test_images.npy").write_bytes(b"hello" * 99),
        r"test_images.npy is truncated or no array",
    ),
    "longer": (lambda f: os.truncate(f / "test_labels.npy", 999), r"test_labels.npy is longer"),
    "float images": (
        lambda f: rewrite(f / "train_images.npy", lambda a: a.astype(np.float32)),
        r"train_images.npy must be \(N, S, S, 3\) uint8 .* float32",
    ),
    "grey": (lambda f: rewrite(f / "train_images.npy", lambda a: a[..., 0]), r"train_images.npy must be"),
    "oblong": (lambda f: rewrite(f / "train_images.npy", lambda a: a[:, :4]), r"train_images.npy must be"),
    "fortran": (lambda f: rewrite(f / "train_images.npy", np.asfortranarray), r"not in C order"),
    "int32 labels": (lambda f: rewrite(f / "test_labels.npy", lambda a: a.astype(np.int32)), r"\(N,\) int64 .* int32"),
    "counts": (lambda f: rewrite(f / "train_labels.npy", lambda a: a[1:]), r"30 images in .*, 29 labels in"),
    "label too high": (lambda f: rewrite(f / "test_labels.npy", lambda a: a + 1), r"labels 1\.\.3; .* lie in 0\.\.2"),
    "label negative": (lambda f: rewrite(f / "train_labels.npy", lambda a: a - 1), r"labels -1\.\.1"),
    "two sizes": (lambda f: rewrite(f / "test_images.npy", lambda a: a[:, 1:, 1:]), r"8x8, test images 7x7"),
    "missing": (lambda f: (f / "test_labels.npy").unlink(), r"has no test_labels.npy"),
    "classes": (lambda f: (f / "classes.json").write_text('["a", "b"'), r"classes.json is not JSON"),
    "names": (lambda f: (f / "classes.json").write_text('{"a": 1}'), r"classes.json must be a list"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("measured", [False, True])
def test_bad_arrays(tmp_path, what, measured):
    folder = small(tmp_path / "mine")
    if measured:
        load("mine", tmp_path)
    break_it, says = BAD[what]
    break_it(folder)
    with pytest.raises(Problem, match=says) as caught:
        load("mine", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", ARRAYS)
def test_one_changed_bit_is_found(tmp_path, array):
    folder = small(tmp_path / "mine", classes=300)  # every label stays in range
    load("mine", tmp_path)
    if array.endswith("labels"):
        rewrite(folder / f"{array}.npy", lambda a: a[::-1].copy())
    else:
        flip_a_byte(folder / f"{array}.npy")
    with pytest.raises(Problem, match=f"{array}.npy was changed"):
        load("mine", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"shapes": {}}'])
def test_damaged_meta(tmp_path, content):
    folder = small(tmp_path / "mine")
    (folder / "meta.json").write_text(content)
    with pytest.raises(Problem, match=r"meta.json is damaged .*remove it"):
        load("mine", tmp_path)


def test_shorter_arrays_than_meta_says(tmp_path):
    folder = small(tmp_path / "mine")
    load("mine", tmp_path)
    for what in ("images", "labels"):
        rewrite(folder / f"train_{what}.npy", lambda a: a[:10])
    with pytest.raises(Problem, match=r"train_images.npy is \(10, 8, 8, 3\), meta.json says \(30, 8, 8, 3\)"):
        load("mine", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"), [({"classes": 4}, "data.classes=4, .* 3"), ({"size": 32}, "data.size=32, .* 8x8")]
)
def test_other_than_configured(tmp_path, options, says):
    small(tmp_path / "mine")
    with pytest.raises(Problem, match=says):
        load("mine", tmp_path, **options)


def test_unknown_source(tmp_path):
    with pytest.raises(Problem, match=r"'cifar1000' is unknown, did you mean cifar100\?"):
        load("cifar1000", tmp_path)
    with pytest.raises(Problem, match=r"train_images\.npy"):
        load("mine", tmp_path)


def test_meta_that_cannot_be_written_is_not_fatal(tmp_path):
    folder = small(tmp_path / "mine")
    # Permission bits do not bind root, so the name that would be written beside is taken by a folder.
    (folder / f".meta.json.{os.getpid()}").mkdir()
    assert load("mine", tmp_path).classes == ("c0", "c1", "c2")
    assert not (folder / "meta.json").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(Problem, match=r"taken/digits: .*set data_dir \(or DEPTHLAB_DATA\)"):
        load("digits", tmp_path / "taken")
    (tmp_path / "digits").write_text("a file")
    with pytest.raises(Problem, match="set data_dir"):
        load("digits", tmp_path)


def test_digits(tmp_path):
    arrays = load("digits", tmp_path, classes=10, size=32)
    assert arrays.train_images.shape == (1500, 32, 32, 3)
    assert arrays.test_images.shape == (297, 32, 32, 3)
    assert arrays.classes == tuple("0123456789")
    assert arrays.train_images.min() == 0
    assert arrays.train_images.max() > 240
    assert (np.bincount(arrays.train_labels) > 140).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".digits.lock", "digits"]


# A writer that stops after half of the second file and waits to be killed.
HALF = """
import time
import numpy as np
from depthlab.data import sources
save, done = np.save, []
def half(path, data):
    save(path, data)
    done.append(path)
    if len(done) == 2:
        with open(path, "r+b") as file:
            file.truncate(data.nbytes // 2)
        print("half", flush=True)
        time.sleep(60)
sources.np.save = half
sources.load("digits", sys.argv[1])
"""
WHOLE = (
    "import sys; from depthlab.data import sources; print(sources.load('digits', sys.argv[1]).sha256['train_images'])"
)


# depthlab.data without its __init__, whose Lightning takes seconds to import.
BARE = f"""
import sys, types
package = sys.modules["depthlab.data"] = types.ModuleType("depthlab.data")
package.__path__ = [{str(Path(sources.__file__).parent)!r}]
"""


def python(code, *args):
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    command = [sys.executable, "-c", BARE + code, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_writer(tmp_path):
    with python(HALF, tmp_path) as writer:
        assert writer.stdout.readline() == "half\n"
        assert list(tmp_path.glob(".digits.making-*/arrays/*.npy"))
        assert not (tmp_path / "digits").exists()
        writer.send_signal(signal.SIGKILL)
    assert len(load("digits", tmp_path).train_labels) == 1500
    assert sorted(p.name for p in tmp_path.iterdir()) == [".digits.lock", "digits"]


def test_two_writers_at_once(tmp_path):
    writers = [python(WHOLE, tmp_path) for _ in range(2)]
    said = {writer.communicate(timeout=100)[0].strip() for writer in writers}
    assert [w.returncode for w in writers] == [0, 0]
    assert said == {load("digits", tmp_path).sha256["train_images"]}


def test_the_lock_is_waited_for_and_the_work_not_repeated(tmp_path, monkeypatch):
    def not_again(_):
        raise AssertionError("made twice")

    monkeypatch.setitem(sources.MAKERS, "digits", not_again)
    lock = sources.FileLock(tmp_path / ".digits.lock")

    class Meanwhile:
        def __init__(self, _):
            pass

        def __enter__(self):
            with lock:
                small(tmp_path / "digits")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sources, "FileLock", Meanwhile)
    assert len(load("digits", tmp_path).classes) == 3


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """A real archive in CIFAR-10's format, served over HTTP, and torchvision's own class pointed at it."""
    rng, batches = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    batches.mkdir()

    def put(name, content):
        (batches / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((batches / name).read_bytes()).hexdigest()]

    def batch(n):
        return {"data": rng.integers(256, size=(n, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(n)]}

    train, test = [batch(20), batch(10)], batch(10)
    lists = [put(f"data_batch_{i}", b) for i, b in enumerate(train)], [put("test_batch", test)]
    names, names_md5 = put("batches.meta", {"label_names": [f"name{k}" for k in range(10)]})
    archive = tmp_path / "server" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)

    handler = functools.partial(Quiet, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Tiny(torchvision.datasets.CIFAR10):
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        train_list, test_list = lists
        meta = {"filename": names, "key": "label_names", "md5": names_md5}  # noqa: RUF012

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Tiny)
    yield archive, np.concatenate([b["data"] for b in train])
    server.shutdown()
    server.server_close()


def test_torchvision_archive(tiny_cifar, tmp_path):
    archive, pixels = tiny_cifar
    data = tmp_path / "data"
    arrays = load("cifar10", data, classes=10, size=32)
    assert np.array_equal(arrays.train_images, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert arrays.train_labels.tolist() == [*(k % 10 for k in range(20)), *range(10)]
    assert len(arrays.test_labels) == 10
    assert arrays.classes[3] == "name3"
    assert sorted(p.name for p in data.iterdir()) == [".cifar10.lock", "archives", "cifar10"]
    kept = data / "archives" / archive.name
    assert kept.read_bytes() == archive.read_bytes()
    archive.unlink()  # from here on without a network
    (data / "cifar10").rename(data / "before")
    assert load("cifar10", data).sha256 == arrays.sha256
    (data / "cifar10").rename(data / "before2")
    kept.write_bytes(kept.read_bytes()[:-20])
    with pytest.raises(
        Problem, match=r"archives/cifar-10-python.tar.gz is truncated or changed: its md5 is not \w{32}"
    ):
        load("cifar10", data)
    assert kept.exists()
    assert not list(data.glob(".cifar10.making-*"))


def test_broken_download(tiny_cifar, tmp_path):
    archive, _ = tiny_cifar
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(Problem, match="could not be downloaded"):
        load("cifar10", tmp_path / "data")
    assert not list((tmp_path / "data" / "archives").iterdir())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", r"cifar-10-python.tar.gz \(md5 c58f30108f718f92721af3b95e74349a\)"),
        ("cifar100", r"cifar-100-python.tar.gz \(md5 eb9058c3a382ffc7106e4002c42a8d85\)"),
        ("stl10", r"stl10_binary.tar.gz \(md5 91f7769df0f17e558f3565bffb0c7dfb\)"),
    ],
)
def test_no_network(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "url", "http://127.0.0.1:9/nobody-listens-here")
    with pytest.raises(Problem, match=rf"could not be downloaded .*archives/{file}.*data=digits") as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / name).exists()


def test_stl10(tmp_path, monkeypatch):
    """A real archive in STL-10's format: columns first, labels from 1."""
    rng, folder = np.random.default_rng(0), tmp_path / "stl10_binary"
    folder.mkdir()
    images = {"train": rng.integers(256, size=(6, 3, 96, 96), dtype=np.uint8)}
    images["test"] = rng.integers(256, size=(4, 3, 96, 96), dtype=np.uint8)
    contents = {f"{s}_X.bin": x.tobytes() for s, x in images.items()} | {"unlabeled_X.bin": b"none"}
    contents |= {f"{s}_y.bin": bytes(range(1, len(x) + 1)) for s, x in images.items()}
    contents["class_names.txt"] = b"\n".join(b"k%d" % k for k in range(10))
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    archives = tmp_path / "data" / "archives"
    archives.mkdir(parents=True)
    with tarfile.open(archives / "stl10_binary.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    dataset = torchvision.datasets.STL10
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5((archives / "stl10_binary.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [[n, md5[n]] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")])
    monkeypatch.setattr(dataset, "test_list", [[n, md5[n]] for n in ("test_X.bin", "test_y.bin")])
    arrays = load("stl10", tmp_path / "data", classes=10, size=96)
    assert np.array_equal(arrays.train_images, images["train"].transpose(0, 3, 2, 1))
    assert arrays.test_labels.tolist() == [0, 1, 2, 3]


def paint(root, split, name, index, size=(8, 8), mode="RGB"):
    path = root / split / name / f"{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 10 * index if mode == "L" else (index, 50, 100)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for split, n in (("train", 3), ("test", 2)):
        for name in ("ants", "bees"):
            for i in range(n):
                paint(root, split, name, i)
    return root


def test_imagefolder(pictures, tmp_path):
    paint(pictures, "train", "bees", 3, mode="L")
    data = tmp_path / "data"
    arrays = load("mine", data, source="imagefolder", root=pictures)
    assert arrays.classes == ("ants", "bees")
    assert arrays.train_images.shape == (7, 8, 8, 3)
    assert arrays.train_labels.tolist() == [0] * 3 + [1] * 4
    assert arrays.train_images[1, 0, 0].tolist() == [1, 50, 100]
    assert arrays.train_images[6, 0, 0].tolist() == [30, 30, 30]
    assert load("mine", data, source="imagefolder", root=pictures).sha256 == arrays.sha256
    with pytest.raises(Problem, match=r"was made from .*pictures, not data.root=.*other"):
        load("mine", data, source="imagefolder", root=tmp_path / "other")


def test_images_of_different_sizes(pictures, tmp_path):
    odd = paint(pictures, "test", "ants", 7, size=(10, 8))
    with pytest.raises(Problem, match=rf"{odd} is 10x8; all images must be 8x8, or set data.size"):
        load("imagefolder", tmp_path, root=pictures)
    arrays = load("imagefolder", tmp_path, root=pictures, size=6)
    assert arrays.test_images.shape == (5, 6, 6, 3)
    assert (arrays.test_images[2] == [7, 50, 100]).all()


def test_bad_image_folders(pictures, tmp_path):
    with pytest.raises(Problem, match=r"data\.root must name a folder"):
        load("imagefolder", tmp_path)
    with pytest.raises(Problem, match=r"data.root=.*nowhere must hold train"):
        load("imagefolder", tmp_path, root=tmp_path / "nowhere")
    broken = pictures / "train" / "bees" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    with pytest.raises(Problem, match=rf"{broken} cannot be read as an image"):
        load("imagefolder", tmp_path, root=pictures)
    broken.write_bytes(whole)
    paint(pictures, "test", "cats", 0)
    with pytest.raises(Problem, match=r"has the classes \['ants', 'bees', 'cats'\], but"):
        load("imagefolder", tmp_path, root=pictures)


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    small(tmp_path / "mine")
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    assert ImageData("mine").num_classes == 3


def test_slow_imports_wait_for_their_makers():
    slow = ["torch", "torchvision", "sklearn", "PIL"]
    code = f"import depthlab.data.sources; print([m for m in {slow} if m in sys.modules])"
    with python(code) as process:
        assert process.communicate()[0] == "[]\n"


REAL = os.environ.get("DEPTHLAB_DATA", "")
HAS = {name: bool(REAL) and (Path(REAL) / name / "train_images.npy").exists() for name in ("cifar10", "cifar100")}


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        # What every CIFAR repository prints, for the 0..1 scale.
        ("cifar100", (0.5070751592, 0.4865488733, 0.4409178433), (0.2673342858, 0.2564384629, 0.2761504713)),
        ("cifar10", (0.4913996, 0.4821584, 0.4465309), (0.2470322, 0.2434851, 0.2615878)),
    ],
)
def test_real_cifar(name, mean, std):
    if not HAS[name]:
        pytest.skip(f"DEPTHLAB_DATA has no {name}")
    arrays = load(name, REAL, classes=int(name[5:]), size=32)
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (50_000, 10_000)
    assert len(set(np.bincount(arrays.train_labels))) == 1
    np.testing.assert_allclose(np.array(arrays.mean) / 255, mean, rtol=2e-5)
    np.testing.assert_allclose(np.array(arrays.std) / 255, std, rtol=2e-5)
