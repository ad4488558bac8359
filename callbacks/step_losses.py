"""`losses.npy` in a run's folder: the mean loss of every step (float64), from which two runs on the same batches can be
compared step by step (Yu & Tomasi 2019, Fig. 6).

Nothing is read back from the device before an epoch's end, when the file is written beside and renamed. A resumed run
keeps the steps before its checkpoint; those of an epoch that was cut off it makes again.
"""

import io
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from depthlab.records import write_atomically

NAME = "losses.npy"


class StepLosses(Callback):
    """Args:
    folder: where to write.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first, self.seen = trainer.global_step, []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: object, batch_idx: int
    ) -> None:
        self.seen.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = trainer.strategy.reduce(torch.stack(self.seen), reduce_op="mean")
        if not trainer.is_global_zero:
            return
        earlier = np.load(self.path)[: self.first] if self.first and self.path.exists() else np.empty(0)
        missing = np.full(self.first - len(earlier), np.nan)  # a folder from before this file was kept
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([earlier, missing, losses.cpu().double().numpy()]))
        write_atomically(self.path, buffer.getvalue())
