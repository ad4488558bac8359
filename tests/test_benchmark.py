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


def test_a_mode_alone_and_where_its_time_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    options = ["--mode", "fast", "--against", "nothing", "--profile", "--data", "noise", "--repetitions", "1"]
    assert benchmark.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["way"] for row in said["rows"] if row["part"] == "training"} == {"ours bf16-mixed"}
    (of,) = said["summary"]["training"]["resnet8"].values()
    assert of["baseline"]
    computed = 3 * 2 * 12.24e6  # forward and backward, two operations per multiply-add
    assert of["of_peak"] == pytest.approx(
        of["images_per_second"]["median"] * computed / said["peak"]["bf16-mixed"], rel=1e-3
    )
    shares = said["summary"]["shares"]["resnet8"]["ours bf16-mixed"]
    assert set(shares) == {*page.PARTS, "Lightning and callbacks", "evaluation"}
    assert all(shares[part] > 0 for part in (*page.PARTS, "evaluation"))
    assert "Shares of a step" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.slow
def test_runs_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    options = ["--mode", "fast", "--against", "nothing", "--data", "digits", "--repetitions", "1", "--processes", "2"]
    assert benchmark.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    said = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["at_once"] for row in said["processes"]] == [2, 2]
    (of,) = said["summary"]["processes"]
    assert of["images_per_second"]["median"] == sum(row["images_per_second"] for row in said["processes"])
    assert 1 < of["first_step_seconds"] < 120
    assert 2e8 < of["memory"] < 8e9


def test_what_runs_together_is_added_up():
    def report(k, repetition, rate, disturbed=False):
        about = {"network": "net", "way": "ours fast", "at_once": k, "repetition": repetition}
        return about | {"images_per_second": rate, "disturbed": disturbed, "first_step_seconds": 4.0, "memory": rate}

    rows = [report(1, 0, 10), report(2, 0, 8), report(2, 0, 9), report(2, 1, 1, True), report(2, 1, 20)]
    base = {"net": {"conventional": {"baseline": True, "images_per_second": Spread(5.0, 5, 5, 1, 1)}}}
    one, two = page.processes(rows, base)
    assert (one["images_per_second"].median, one["ratio"], one["at_once"]) == (10, 2, 1)
    assert (two["images_per_second"], two["ratio"]) == (Spread(19.0, 17, 21, quiet=1, total=2), 3.8)
    assert (two["memory"], two["first_step_seconds"]) == (20, 4.0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--mode", "quick"], "--mode quick: there is exact and fast"),
        (["--arch", "resnet9"], "6n"),
        (["--arch", "plane11"], "plain11"),
        (["--batch", "600"], "--batch 600"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA GPU"),
    ],
)
def test_refusals(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHLAB_DATA", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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
