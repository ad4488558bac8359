"""Grids as a user runs them: every job a process, nothing twice, one crash costs one job."""

import json
import os
import signal
import sys
import time

import pytest

from conftest import TINY

GRID = ["-m", *TINY, "budget=0.012", "sched=sgd,sgdr", "seed=0,1"]


def results(tmp_path):
    return {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}


def test_grid_killed_and_continued(start, cli, tmp_path):
    """SIGKILL to the sweep in the middle: its job dies too; the same command finishes without running a job twice."""
    process = start(*GRID)
    deadline = time.monotonic() + 120
    while len(results(tmp_path)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    time.sleep(0.5)
    before = results(tmp_path)
    time.sleep(3)
    assert results(tmp_path) == before  # no orphan goes on
    code, output = cli(*GRID, "launcher.jobs=2")
    assert code == 0, output
    after = results(tmp_path)
    assert len(after) == 4
    assert before.items() <= after.items()
    assert f"4 jobs, {len(before)} of them done before" in output
    code, output = cli(*GRID)
    assert code == 0
    assert "4 skipped" in output
    assert results(tmp_path) == after


def test_a_failing_job_is_named(cli, tmp_path):
    """A broken checkpoint is found by its job, which fails alone, with its last lines; nobody's work is thrown away."""
    assert cli(*TINY, "budget=0.012", "seed=0")[0] == 0
    (run,) = (tmp_path / "runs").glob("resnet8-*")
    (run / "result.json").unlink()
    (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:500])
    code, output = cli("-m", *TINY, "budget=0.012", "seed=0,1")
    assert code == 1, output
    assert len(results(tmp_path)) == 1
    assert "1 failed, 1 done" in output
    assert "not a readable checkpoint of depthlab" in output.split("1 failed, 1 done")[1]
    assert "Traceback" not in output


def test_bad_images_are_found_before_the_first_job(cli, tmp_path):
    code, output = cli("-m", *TINY, "data.batch_size=100,1499")
    assert code == 2, output
    assert "which batch normalisation cannot take" in output
    assert not list((tmp_path / "runs").glob("[!.]*"))


def test_experiment_is_a_grid_and_options_replace_its_axes(cli, tmp_path):
    small = [a for a in TINY if not a.startswith(("arch", "augment", "data"))]
    code, output = cli("experiment=demo", "arch=resnet20", "sched=sgd", "seed=5", "budget=0.007", *small)
    assert code == 0, output
    ((name, _),) = results(tmp_path).items()
    assert name.startswith("resnet20-sgd-digits-s5-")
    assert json.loads((tmp_path / "runs" / name / "result.json").read_text())["study"] == "demo"


def test_other_launchers_also_get_processes(cli, tmp_path):
    code, output = cli("-m", "hydra/launcher=basic", *TINY, "budget=0.012", "seed=0,1")
    assert code == 0, output
    assert len(results(tmp_path)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stopping_a_sweep_stops_its_job(start, tmp_path):
    process = start("-m", *TINY, "budget=1", "seed=0,1")
    deadline = time.monotonic() + 150
    while not list((tmp_path / "runs").glob("*/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "1 stopped, 1 waiting" in output
    assert "failed" not in output
    mine = f"runs_dir={tmp_path}/runs".encode()
    left = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                left += [pid] if mine in file.read() else []
        except OSError:
            continue
    assert not left
