"""`python src/train.py` as a user runs it: records, skips, resumes, stops, refuses."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY


def only_run(tmp_path: Path) -> Path:
    (folder,) = [p for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")]
    return folder


def wait_for(path: Path, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_run_from_nothing_to_record(cli, tmp_path):
    code, output = cli(*TINY, "sched=sgdr", "budget=0.012", "seed=0")
    assert code == 0, output
    folder = only_run(tmp_path)
    assert folder.name.startswith("resnet8-sgdr-digits-s0-")
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == 2
    assert result["steps"] == 8
    assert result["seed"] == 0
    assert result["schema"] == 1
    assert len(result["curves"]["val_error"]) == 2
    for key in ("test_error", "test_loss", "train_loss", "seconds_per_epoch", "images_per_second", "flops_per_image"):
        assert result[key] > 0
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    files = {"result.json", "metrics.csv", "losses.npy", "config.json", "last.ckpt"}
    assert {p.name for p in folder.iterdir()} == files
    assert np.load(folder / "losses.npy").shape == (8,)
    assert result["penalty"] > 0
    torch.load(folder / "last.ckpt", weights_only=True)
    again, output = cli(*TINY, "sched=sgdr", "budget=0.012", "seed=0")
    assert again == 0
    assert "done" in output


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_and_continued_is_the_whole(how, start, cli, tmp_path):
    """The same command goes on, and ends with the weights of a run that nobody stopped."""
    options = [*TINY, "budget=0.3"]  # seconds: the signal must come in its midst
    code, output = cli(*options, "runs_dir=whole")
    assert code == 0, output
    process = start(*options)
    wait_for(tmp_path / "runs", process)
    while not list((tmp_path / "runs").glob("*/last.ckpt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], output
    folder = only_run(tmp_path)
    assert not (folder / "result.json").exists()
    if how != signal.SIGKILL:
        assert "the same command goes on" in output
    code, output = cli(*options)
    assert code == 0, output
    (whole,) = (tmp_path / "whole").glob("*/last.ckpt")
    a, b = (torch.load(p, weights_only=True)["state_dict"] for p in (whole, folder / "last.ckpt"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    one, two = (json.loads((p / "result.json").read_text()) for p in (whole.parent, folder))
    for curve in set(one["curves"]) - {"seconds", "cpu_seconds"}:
        assert one["curves"][curve] == two["curves"][curve]
    assert one["test_error"] == two["test_error"]


def test_cut_off_between_fit_and_record(cli, tmp_path):
    """Trained to the end, but killed in the final test: only the test is done again, with the same record."""
    assert cli(*TINY, "sched=sgdr", "budget=0.012")[0] == 0
    path = only_run(tmp_path) / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert cli(*TINY, "sched=sgdr", "budget=0.012")[0] == 0
    after = json.loads(path.read_text())
    assert {k: v for k, v in after.items() if before[k] != v}.keys() <= {"finished", "git"}


def test_divergence_is_a_result(cli, tmp_path):
    code, output = cli(*TINY, "sched=constant", "sched.lr=1e30", "budget=0.02")
    assert code == 0, output
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["diverged"]
    assert result["ended"] == "diverged"
    assert result["test_error"] is None
    assert "diverged at step" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["arch=resnet10"], "arch=resnet10: there is no such arch; did you mean"),
        (["data=null"], "takes a name, not null"),
        (["sched.lr_maxx=1"], "sched.lr_maxx: no such key"),
        (["sched=sgd,clr"], "sched=sgd,clr: several values are a sweep; add -m"),
        (["-m", "seed=0,1", "sched=sgdr", "sched.lr_max=0"], "sched.lr_max must be > lr_min, got 0"),
        (["-m", "arch=resnet20,resnet10"], "arch=resnet10: there is no such arch"),
        (["data=imagefolder", "data.root=/nowhere"], "/nowhere"),
        (["runs_dir=/proc/runs"], "runs_dir=/proc/runs: cannot be written"),
        (["-m", "runs_dir=/proc/runs"], "/proc/runs: cannot be written"),
        (["data=digits", "data_dir=/proc/data"], "/proc/data"),
        (["data=cifar100"], "data=digits, which needs no network"),
    ],
)
def test_refusals(arguments, said, cli, tmp_path):
    """One readable line, exit code 2, nothing written."""
    first = arguments[:1] if arguments[0] == "-m" else []
    tiny = [] if any(a.startswith("data=") for a in arguments) else TINY
    code, output = cli(*first, *tiny, *arguments[len(first) :])
    assert code == 2, output
    assert said in output
    assert "Traceback" not in output
    assert len([line for line in output.splitlines() if line.startswith("train.py:")]) == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name not in (".sweep", ".locks")]


def test_a_tampered_image_is_noticed(cli, tmp_path, data_dir):
    shutil.copytree(data_dir / "digits", tmp_path / "data" / "digits")
    images = np.load(tmp_path / "data/digits/train_images.npy", mmap_mode="r+")
    images[3, 4, 5] ^= 255
    images.flush()
    code, output = cli(*TINY, f"data.dir={tmp_path}/data")
    assert code == 2, output
    assert "train_images.npy" in output
    assert not list((tmp_path / "runs").glob("[!.]*"))


def test_two_at_once_do_not_share_a_run(start, cli, tmp_path):
    process = start(*TINY, "budget=0.5")
    wait_for(tmp_path / "runs", process)
    while not list((tmp_path / "runs").glob("*/config.json")):
        time.sleep(0.02)
    code, output = cli(*TINY, "budget=0.5")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert code == 75, output
    assert "another process is at it" in output


@pytest.mark.slow
def test_compiled_trains_the_same(cli, tmp_path):
    """torch.compile by inductor: the same curves up to rounding, a record of its own."""
    assert cli(*TINY, "sched=sgdr", "budget=0.012")[0] == 0
    code, output = cli(*TINY, "sched=sgdr", "budget=0.012", "trainer.compile=true")
    assert code == 0, output
    plain, compiled = (
        json.loads(p.read_text())
        for p in sorted((tmp_path / "runs").glob("*/result.json"), key=lambda p: '"compile": true' in p.read_text())
    )
    assert plain["name"] != compiled["name"]
    assert compiled["curves"]["train_loss"] == pytest.approx(plain["curves"]["train_loss"], rel=1e-3)


def test_help_is_quick(cli, import_seconds):
    began = os.times().children_user
    code, output = cli("--help")
    assert code == 0
    assert "arch" in output
    assert os.times().children_user - began < import_seconds  # no torch in it
