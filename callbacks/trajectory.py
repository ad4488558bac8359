"""The weights after every n epochs, for the path of training in weight space (Li et al. 2018, Fig. 9).

    Trainer(callbacks=[Trajectory(folder, every=1)])

Writes `<folder>/trajectory/epoch<e>.npy`, e = 0 before training: parameters and running statistics as one vector
(depthlab.analysis.directions.Layout), each file whole or not at all, on rank 0. `analysis=loss_trajectory` draws it.
A run that is resumed overwrites what it trains anew.
"""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from depthlab.analysis.directions import Layout
from depthlab.analysis.trajectory import FOLDER, store
from depthlab.problem import Problem


class Trajectory(Callback):
    """Args:
    folder: the run's.
    every: epochs; the last one is always stored.
    dtype: "float32", or "float16" for half the space: steps below 1/2048 of a weight are lost in it.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, folder: Path, every: int = 1, dtype: str = "float32") -> None:
        if every < 1:
            raise ValueError(f"trajectory.every must be >= 1, got {every}")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"trajectory.dtype must be float16 or float32, got {dtype!r}")
        self.folder, self.every, self.dtype = folder, every, dtype

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.store(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every == 0 or done == trainer.max_epochs:
            self.store(trainer, pl_module, done)

    def store(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if trainer.is_global_zero:
            store(self.folder, epoch, Layout(pl_module.net).vector(pl_module.net), self.dtype)


def check_path(folder: Path, every: int | None, done: bool = False) -> None:
    """Before a run goes on, or is taken for what is asked for.

    Raises:
        Problem: its path would have an end or a beginning in mid-training.
    """
    stored = (folder / FOLDER).exists()
    if every is not None and not stored:
        raise Problem(f"{folder}: trained without trajectory.every; delete the folder to train it once more")
    if every is None and stored and not done:
        way_out = f"set trajectory.every again, or delete {folder / FOLDER}"
        raise Problem(f"{folder}: trained with trajectory.every so far, and its path would end here; {way_out}")
