"""Divergence is a result; checkpoints are whole; another run's checkpoint is refused; the bar says what it should."""

import errno
import io
import math
import os
import re

import pytest
import torch
from torch import nn

from callbacks.checkpoint import AtomicCheckpointIO, resume_point
from callbacks.divergence import Divergence
from callbacks.progress import RunProgress
from callbacks.record import Record
from depthlab import Classifier
from depthlab.problem import Problem
from test_classifier import SGD, batches, trainer


class Poisoned(nn.Linear):
    """Gives NaN from the k-th training step on."""

    def __init__(self, step):
        super().__init__(5, 3)
        self.step, self.calls = step, 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (float("nan") if self.calls > self.step and self.training else 1)


@pytest.mark.parametrize(("step", "every"), [(0, 1), (5, 1), (5, 50), (2, 2)])
def test_divergence_is_recorded(step, every):
    divergence, record, data = Divergence(every), Record(), batches()
    fit = trainer(max_epochs=5, callbacks=[divergence, record])
    model = Classifier(Poisoned(step), SGD)
    fit.fit(model, data, data)
    assert divergence.step == step
    assert (divergence.last_finite_loss is None) == (step == 0)
    assert fit.global_step <= step + max(every, 4) + 1
    summary = divergence.summary() | record.summary(fit, model)
    assert summary["ended"] == "diverged"
    assert summary["test_error"] is None


def test_the_first_divergence_stays():
    """Where something keeps a run going behind it."""
    divergence, data = Divergence(1), batches()
    fit = trainer(min_epochs=3, max_epochs=3, callbacks=[divergence])
    fit.fit(Classifier(Poisoned(2), SGD), data, data)
    assert fit.global_step > 4
    assert divergence.step == 2
    assert math.isfinite(divergence.last_finite_loss)


def test_ruined_in_the_last_step():
    """The last training loss was finite, the weights it led to are not: found by the test."""
    divergence, record, data = Divergence(), Record(), batches(1)
    fit = trainer(max_epochs=1, callbacks=[divergence, record])
    model = Classifier(nn.Linear(5, 3), SGD)
    fit.fit(model, data, data)
    assert divergence.step is None
    nn.init.constant_(model.net.weight, float("nan"))
    fit.test(model, data, verbose=False)
    assert divergence.summary()["diverged_step"] == 1


def test_divergence_in_mid_epoch_has_no_stale_numbers(tmp_path):
    """The cut-off epoch has no training curve of its own, and a resume goes no further."""
    divergence, record, data = Divergence(1), Record(), batches()
    options = {"callbacks": [record, divergence], "enable_checkpointing": False}
    fit = trainer(max_epochs=4, **options)
    model = Classifier(Poisoned(5), SGD)
    fit.fit(model, data, data)
    assert [row.get("train_loss") is None for row in record.rows] == [False, True]
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = Divergence(1)
    fit = trainer(max_epochs=4, callbacks=[Record(), again])
    fit.fit(model, data, data, ckpt_path=tmp_path / "last.ckpt")
    assert again.summary() == divergence.summary()
    assert fit.global_step == 6


def test_a_healthy_run_is_left_alone():
    divergence, data = Divergence(1), batches()
    fit = trainer(max_epochs=2, callbacks=[divergence])
    fit.fit(Classifier(nn.Linear(5, 3), SGD), data, data)
    assert fit.global_step == 8
    assert divergence.summary() == {
        "diverged": False,
        "diverged_step": None,
        "last_finite_loss": None,
        "ended": "completed",
    }


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Problem, match=r"last\.ckpt: the checkpoint could not be written .*No space left.*disk full"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.load(path)["a"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_resume_point(tmp_path):
    path = tmp_path / "last.ckpt"
    assert resume_point(tmp_path, {"seed": 0}) is None
    torch.save({"depthlab_identity": {"seed": 0, "arch": {"name": "plain11"}}}, path)
    assert resume_point(tmp_path, {"seed": 0, "arch": {"name": "plain11"}}) == path
    with pytest.raises(Problem, match="written by another run .*plain11.*resnet20.*delete it"):
        resume_point(tmp_path, {"seed": 0, "arch": {"name": "resnet20"}})
    other = {"seed": 1, "arch": {"depth": 20, "name": "resnet20", "width": 16}}
    with pytest.raises(Problem) as error:
        resume_point(tmp_path, other)
    assert "(arch.name is plain11 there and resnet20 here, seed is 0 there and 1 here, arch.depth" in str(error.value)
    assert "not set there and 20 here and 1 more)" in str(error.value)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(Problem, match="not a readable checkpoint .* delete it"):
        resume_point(tmp_path, {"seed": 0})


def test_progress(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("DEPTHLAB_JOB", "3/18")
    data = batches()
    fit = trainer(max_epochs=2, callbacks=[RunProgress("net-sgd", seconds=0)], enable_progress_bar=True)
    fit.fit(Classifier(nn.Linear(5, 3), SGD), data, data)
    text = screen.getvalue()
    for part in ("[3/18] net-sgd", "epoch 1/2 loss", "epoch 2/2 loss", "error", "lr 0.1", "img/s", "val/error", "100%"):
        assert part in text


def test_the_bar_that_is_left(monkeypatch):
    """Of the last epoch, however seldom the bar is redrawn."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    data = batches()
    fit = trainer(max_epochs=2, callbacks=[RunProgress("net", seconds=1e9)], enable_progress_bar=True)
    fit.fit(Classifier(nn.Linear(5, 3), SGD), data, data)
    assert re.search(r"epoch 2/2 loss \S+ error", screen.getvalue().splitlines()[-1])
