import json

import numpy as np
import pytest
import torch

import benchmark
from depthlab import conventional
from depthlab.data import Batches
from depthlab.data.augment import Crop
from depthlab.data.sources import Arrays
from depthlab.report import benchmark as page
from depthlab.timing import Spread, Stopwatch, busy_seconds, timed

TINY = ["--arch", "resnet8", "--repetitions", "2", "--steps", "2", "--threads", "1", "--device", "cpu", "--batch", "50"]
TINY += ["--processes"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    out = tmp_path / "out"
    assert benchmark.main([*TINY, "--data", "digits", "--workers", "0", "--out", str(out)]) == 0
    said = json.loads((out / "benchmark.json").read_text())
    ways = [page.conventional(0), "ours 32-true", "bare loop 32-true", "ours bf16-mixed"]
    rows = [row for row in said["rows"] if row["part"] == "training"]
    assert [row["way"] for row in rows] == ways * 2  # interleaved
    assert {row["part"] for row in said["rows"]} == {"training", "lightning", "data"}
    assert all(row["seconds"] > 0 and row["steps"] == 2 and "disturbed" in row for row in said["rows"])
    assert set(said["summary"]["training"]["resnet8"]) == set(ways)
    assert said["summary"]["training"]["resnet8"][ways[0]]["ratio"]["median"] == 1
    assert {"torch", "lightning"} <= set(said["versions"])
    assert (said["threads"], said["hardware"] != "") == (1, True)
    assert (out / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "benchmark.md").read_text()
    assert all(way in text and way in capsys.readouterr().out + text for way in ways)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--arch", "resnet9"], "6n"), (["--arch", "plane11"], "plain11"), (["--batch", "600"], "--batch 600")],
)
def test_refusals(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    arguments = [*TINY, "--data", "digits", *arguments, "--out", str(tmp_path)]
    assert benchmark.main(arguments) == 2
    assert word in capsys.readouterr().err


def noise(count):
    images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    return Arrays(images, labels, images, labels, tuple("0123456789"), (127.5,) * 3, (73.9,) * 3, {})


def test_both_ways_see_the_same_kind_of_batch():
    arrays = noise(count=400)
    images, labels = torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels)
    options = {"mean": arrays.mean, "std": arrays.std}
    ours = Batches(images, labels, 200, shuffle=True, augment=Crop(pad=4), **options)
    theirs = conventional.loader(arrays, 200, workers=0)
    assert len(ours) == len(theirs)
    (x, y), (u, v) = (next(iter(batches)) for batches in (ours, theirs))
    assert (x.shape, x.dtype, y.shape, y.dtype) == (u.shape, u.dtype, v.shape, v.dtype)
    assert x.stride() == u.stride()
    for statistic in (torch.mean, torch.std):  # over the padding too, which is black in both
        assert statistic(x).item() == pytest.approx(statistic(u).item(), abs=0.03)
    plain = Batches(images, labels, 200, **options)
    image, label = conventional.PILImages(arrays, augment=False)[3]
    x, y = next(iter(plain))
    torch.testing.assert_close(x[3], image, atol=1e-6, rtol=1e-5)
    assert y[3] == label


def test_workers_give_the_same_kind_of_batch():
    arrays = noise(count=20)
    x, y = next(iter(conventional.loader(arrays, 10, workers=1)))
    assert x.shape == (10, 3, 32, 32)
    assert y.dtype == torch.int64


def test_disturbed_repetitions_are_kept_and_marked():
    noisy = [(1.0, True), (10.0, False), (11.0, False), (12.0, False)]
    assert Spread.of(noisy) == Spread(11.0, 10.0, 12.0, quiet=3, total=4)
    assert Spread.of(noisy).trusted
    few = Spread.of(noisy[:3])
    assert (few.median, few.total, few.trusted) == (10.0, 3, False)
    assert Spread.of([(1.0, False)]).trusted


def test_a_stopwatch():
    taken = []
    watch = Stopwatch(torch.device("cpu"))
    timed((taken.append(i) for i in range(10)), watch, warm_up=2, count=3)
    assert len(taken) == 5
    assert watch.measured["seconds"] > 0
    assert (watch.measured["others"] is None) == (busy_seconds() is None)
