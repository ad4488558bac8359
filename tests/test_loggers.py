"""Real offline W&B files and TensorBoard events; never a prompt, nothing outside the run's folder."""

import json
import subprocess
import sys

import pytest

from callbacks.loggers import has_key
from conftest import TINY

pytest.importorskip("wandb")


def test_wandb_offline(cli, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "WANDB_API_KEY": ""}
    code, output = cli(*TINY, "budget=0.012", "logger=wandb", "study=test/one", env=env)
    assert code == 0, output
    (run,) = (tmp_path / "runs").glob("resnet8-*")
    (offline,) = (run / "wandb").glob("offline-run-*")
    (file,) = offline.glob("run-*.wandb")
    assert file.name == f"run-{run.name}.wandb"
    content = file.read_bytes()
    for part in ("test/one", run.name, "test_error", "train/loss", "lr_warmup"):
        assert part.encode() in content
    assert not list(home.rglob("*wandb*"))


def test_tensorboard(cli, tmp_path):
    pytest.importorskip("tensorboard")
    code, output = cli(*TINY, "budget=0.012", "logger=tensorboard")
    assert code == 0, output
    (run,) = (tmp_path / "runs").glob("resnet8-*")
    script = (
        "import sys, json\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1]); events.Reload()\n"
        "print(json.dumps(events.Tags()['scalars']))"
    )
    tags = json.loads(subprocess.check_output([sys.executable, "-c", script, str(run)], text=True).splitlines()[-1])
    assert {"train/loss", "val/error", "test/error", "train_clean/loss", "lr"} <= set(tags)
    assert not any(tag.replace("/", "_") in tags for tag in tags if "/" in tag)


def test_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()
