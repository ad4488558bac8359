"""fit 4 = fit 2 + resume 2, bit for bit: fp32 on a CPU, real images, every schedule."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import callbacks
from callbacks.checkpoint import AtomicCheckpointIO, last_checkpoint
from callbacks.divergence import Divergence
from callbacks.record import Record
from depthlab import Classifier, ImageData, ResNet
from depthlab.data.augment import Shift
from tests import growing

SCHEDULES = {
    "sgd": callbacks.SGD(epochs=4, warmup=1, milestones=(2, 3)),
    "clr": callbacks.CLR(epochs=4, half_cycle=1),
    "sgdr": callbacks.SGDR(epochs=4, cycle=1),
    "sgdr-step": callbacks.SGDR(epochs=4, cycle=1, granularity="step"),
    "constant": callbacks.Constant(epochs=4),
    "step": callbacks.Step(epochs=4, milestones=(1, 3)),
    "one_cycle": callbacks.OneCycle(epochs=4),
    "sgd at half a budget": callbacks.SGD(epochs=8, warmup=1, milestones=(3, 5), budget=0.5),
}


def fit(folder, data_dir, schedule, epochs, style):
    """Train to `epochs`, from `folder`'s checkpoint if there is one; returns (state of everything, curves)."""
    seed_everything(7, verbose=False)
    net = ResNet(10, depth=8, width=4)
    model = Classifier(net, partial(torch.optim.SGD, lr=1, momentum=0.9), weight_decay=1e-3, momentum_style=style)
    data = ImageData("digits", dir=data_dir, augment=Shift(), seed=3)
    record = Record(folder)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[schedule, record, Divergence(), last_checkpoint(folder)],
        plugins=[AtomicCheckpointIO()],
        gradient_clip_val=10.0,
        logger=False,
        limit_train_batches=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)
    curves = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in record.rows]
    momentum = [trainer.optimizers[0].state[p]["momentum_buffer"] for p in net.parameters()]
    return [*net.state_dict().values(), *momentum], curves


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize("style", ["torch", "keras"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_is_bit_identical(name, style, data_dir, tmp_path):
    whole, curves = fit(tmp_path / "whole", data_dir, SCHEDULES[name], 4, style)
    fit(tmp_path / "parts", data_dir, SCHEDULES[name], 2, style)
    parts, resumed_curves = fit(tmp_path / "parts", data_dir, SCHEDULES[name], 4, style)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert curves == resumed_curves
    assert len(curves) == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_resumed_in_another_memory_format(tmp_path):
    """As on another device or without a compiler; a fused step reads momentum and weights as they lie."""

    def train(channels_last, folder, epochs):
        options = {"weight_decay": 1e-3, "channels_last": channels_last}
        model = Classifier(growing.network(), partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), **options)
        last = folder / "last.ckpt"
        trainer = growing.trainer(folder, max_epochs=epochs, callbacks=[last_checkpoint(folder)])
        trainer.fit(model, *growing.images(), ckpt_path=last if last.exists() else None)
        return torch.cat([p.detach().flatten() for p in model.net.parameters()])

    for channels_last in (False, True):
        whole = train(not channels_last, tmp_path / f"whole{channels_last}", 2)
        train(channels_last, tmp_path / f"parts{channels_last}", 1)
        resumed = train(not channels_last, tmp_path / f"parts{channels_last}", 2)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-5)
