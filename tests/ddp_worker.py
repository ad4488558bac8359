"""One rank of a fit, started by tests/test_ddp.py: trains and writes what it has to <out>/<world>-<rank>.pt."""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from callbacks import SGDR
from depthlab import Classifier, ImageData, ResNet
from depthlab.data.augment import Shift


class Losses(Callback):
    """The loss of the global batch after every step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].double(), reduce_op="mean").item())


if __name__ == "__main__":
    out, devices, kind, data_dir = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
    )
    net = plain if kind == "plain" else ResNet(10, 8, width=4)
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        callbacks=[SGDR(epochs=2, cycle=1), losses],
        limit_train_batches=5,
        gradient_clip_val=10.0,
        use_distributed_sampler=False,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9), weight_decay=1e-3)
    data = ImageData("digits", dir=data_dir, augment=Shift(), batch_size=100, eval_batch_size=100)
    trainer.fit(model, data)
    curves = {k: v.item() for k, v in trainer.callback_metrics.items()}
    trainer.test(model, data, verbose=False)
    state = {
        "parameters": {k: v.detach() for k, v in net.named_parameters()},
        "losses": losses.losses,
        "curves": curves,
        "test": {k: v.item() for k, v in trainer.callback_metrics.items()},
    }
    torch.save(state, out / f"{devices}-{trainer.global_rank}.pt")
    if devices > 1:
        torch.distributed.destroy_process_group()  # as train.py
