"""Measurements after chosen optimiser steps, within an epoch."""

import time

import pytest
from lightning.pytorch import Callback

from callbacks.analyse import Analyse
from callbacks.checkpoint import last_checkpoint
from callbacks.record import Record
from depthlab.analysis import files
from depthlab.analysis.norms import norms
from tests.growing import STEPS, classifier, digest, images, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


def fit(*analyses, until=2, folder=None, **options):
    more = [*analyses, *([last_checkpoint(folder)] if folder else [])]
    model, checkpoint = classifier(), folder and next(iter(folder.glob("last.ckpt")), None)
    trainer(folder, max_epochs=until, callbacks=more, **options).fit(model, *images(), ckpt_path=checkpoint)
    return model


def test_at_steps_and_every_so_many(tmp_path):
    batches = images()[1]
    at = Analyse(norms, at_steps=[1, 5], at=[1], batches=batches, folder=tmp_path)
    every = Analyse(norms, every_steps=2, batches=batches, name="other")
    watched = fit(at, every)
    assert digest(watched.net.state_dict()) == digest(fit().net.state_dict())
    assert [(row["epoch"], row.get("step")) for row in at.rows] == [(1 / 3, 1), (1, None), (1 + 2 / 3, 5)]
    assert [row["step"] for row in every.rows] == [2, 4, 6]
    assert every.rows[-1]["gamma"] == norms(watched.net, batches).scalars["gamma"]
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == [
        "analysis-norms-epoch0001.npz", "analysis-norms-step000001.npz", "analysis-norms-step000005.npz"
    ]  # fmt: skip
    assert files.read(tmp_path, "norms-step000005")[1]["step"] == 5


def test_an_epochs_seconds_are_without_them():
    def slow(net, batches):
        time.sleep(0.2)
        return norms(net, batches)

    record = Record()
    fit(record, Analyse(slow, at_steps=[4], batches=images()[1]), limit_val_batches=0)
    assert record.evaluating[0] >= 0.2


def test_accumulated_gradients_are_one_step():
    analyse = Analyse(norms, every_steps=1, batches=images()[1])
    fit(analyse, accumulate_grad_batches=STEPS)
    assert [(row["epoch"], row["step"]) for row in analyse.rows] == [(1, 1), (2, 2)]


def test_rows_are_resumed(tmp_path):
    whole, first, second = (Analyse(norms, every_steps=2, batches=images()[1]) for _ in range(3))
    fit(whole)
    fit(first, until=1, folder=tmp_path)
    fit(second, folder=tmp_path)
    assert second.rows == whole.rows


def test_ruined_weights_are_not_measured():
    class Ruin(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                next(pl_module.parameters()).data.fill_(float("nan"))

    analyse = Analyse(norms, every_steps=1, batches=images()[1])
    fit(Ruin(), analyse)
    assert [row["step"] for row in analyse.rows] == [1]


@pytest.mark.parametrize("wrong", [{"at_steps": [0]}, {"every_steps": 0}])
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match=r"at_steps and every_steps must be >= 1 .*, got"):
        Analyse(norms, **wrong)
