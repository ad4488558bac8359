"""Shared by all tests: one thread (bits depend on it), the digits made once, the commands as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# A run of seconds: 26 k parameters, 4 steps an epoch.
TINY = ["arch=resnet", "arch.depth=8", "arch.width=4", "data=digits", "trainer.limit_train_batches=4"]
TINY += ["trainer.limit_test_batches=1", "trainer.limit_val_batches=1", "trainer.accelerator=cpu", "augment=none"]

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def composed(name: str, *overrides: str) -> dict:
    """The resolved configuration of conf/<name>.yaml."""
    from hydra import compose, initialize_config_dir

    from configuration import resolve

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(compose(name, list(overrides)))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A data folder that has the digits."""
    from depthlab.data import sources

    folder = tmp_path_factory.mktemp("data")
    sources.load("digits", folder)
    return folder


@pytest.fixture(scope="session")
def import_seconds() -> float:
    """Processor time to import torch in a new process: what is quick on this machine."""
    say = [sys.executable, "-c", "import time, torch; print(time.process_time())"]
    return float(subprocess.check_output(say, text=True))


@pytest.fixture
def start(data_dir, tmp_path):
    """start(*arguments, env={}) -> Popen of `python src/train.py` with runs in tmp_path/runs."""

    def start(*arguments: str, env: dict[str, str] | None = None, script: str = "train.py") -> subprocess.Popen:
        given = {a.partition("=")[0] for a in arguments}
        places = [f"data_dir={data_dir}", f"runs_dir={tmp_path}/runs"] if script == "train.py" else []
        places = [place for place in places if place.partition("=")[0] not in given]
        return subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", str(ROOT / "src" / script), *arguments, *places],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def cli(start):
    """cli(*arguments) -> (exit code, output) of `python src/train.py`."""

    def cli(*arguments: str, **options) -> tuple[int, str]:
        process = start(*arguments, **options)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    return cli
