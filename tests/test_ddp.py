"""Two gloo processes on the CPU: the same images, the same losses, one record; a rank that dies costs its job only."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, TINY

DDP = ["trainer=ddp", "trainer.devices=2"]


def fit(out, devices, kind, data_dir):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    worker = [sys.executable, str(ROOT / "tests" / "ddp_worker.py"), str(out), str(devices), kind, str(data_dir)]
    ran = subprocess.run(worker, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return [torch.load(out / f"{devices}-{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module", params=["plain", "batchnorm"])
def fits(request, tmp_path_factory, data_dir):
    out = tmp_path_factory.mktemp(request.param)
    return request.param, *fit(out, 1, request.param, data_dir), *fit(out, 2, request.param, data_dir)


def test_ranks_agree_bit_for_bit(fits):
    _, _, first, second = fits
    assert all(torch.equal(first["parameters"][k], second["parameters"][k]) for k in first["parameters"])
    assert first["losses"] == second["losses"]
    assert first["test"] == second["test"]


def test_two_processes_are_one_without_batch_norm(fits):
    kind, one, two, _ = fits
    if kind == "plain":
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for name, p in one["parameters"].items():
            torch.testing.assert_close(two["parameters"][name], p, rtol=1e-4, atol=1e-5)
        assert two["test"] == pytest.approx(one["test"], rel=1e-4)
        assert two["curves"] == pytest.approx(one["curves"], rel=1e-4)
    else:  # each process normalises its own share of the batch: near, not the same
        assert two["losses"][0] == pytest.approx(one["losses"][0], rel=0.2)
        assert two["losses"] != pytest.approx(one["losses"], rel=1e-5)


AT_EXIT = """
import atexit, sys

@atexit.register
def look():
    if "torch" in sys.modules:
        print("GROUP", sys.modules["torch"].distributed.is_initialized(), flush=True)
"""


def test_one_record_of_one_run(cli, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    env = {"WANDB_API_KEY": "", "PYTHONPATH": str(tmp_path)}
    code, output = cli(*TINY, *DDP, "budget=0.012", "logger=wandb", env=env)
    assert code == 0, output
    assert output.count("GROUP False") == 2  # gloo's threads could abort a process that ends with its group
    (run,) = (tmp_path / "runs").glob("[!.]*")
    result = json.loads((run / "result.json").read_text())
    assert result["devices"] == 2
    assert result["steps"] == 8
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_dies_costs_its_job_only(start, tmp_path):
    """SIGKILL to rank 1 of the first job: it fails, the second is done, no process is left."""
    process = start("-m", *TINY, *DDP, "budget=0.02,0.012", "sched=sgdr", "trainer.limit_train_batches=15")
    mine = f"runs_dir={tmp_path}/runs".encode()

    def ranks(what: bytes) -> list[int]:
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    line = file.read()
            except OSError:
                continue
            if mine in line and what in line:
                found.append(int(pid))
        return found

    deadline = time.monotonic() + 90
    while not (victims := ranks(b"train_ddp_process_1")) or not list((tmp_path / "runs").glob("*/config.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victims[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert "1 failed, 1 done" in output
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1
    assert not ranks(b"")
