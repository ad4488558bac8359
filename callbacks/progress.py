"""One bar for the whole run: epoch, loss, error, learning rate, images/s and the time left; and a line per epoch.

In a sweep the launcher says which job of how many this is (environment variable DEPTHLAB_JOB, "3/18").
The loss is read from the device only when the bar is redrawn, and at the end of an epoch.
"""

import os
import sys
import time

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

BAR = "{{desc}} {{percentage:3.0f}}%|{{bar:12}}| {} [{{elapsed}}<{{remaining}}]"


class RunProgress(ProgressBar):
    """Args:
    label: what stands in front of the bar, e.g. the run's name.
    seconds: between two redraws; default 1 on a terminal, 20 in a file.
    """

    def __init__(self, label: str = "", seconds: float | None = None):
        super().__init__()
        job = os.environ.get("DEPTHLAB_JOB")
        self.label = f"[{job}] {label}" if job else label
        on_terminal = sys.stderr.isatty() or os.environ.get("DEPTHLAB_TERMINAL") == "1"
        self.seconds = seconds if seconds is not None else (1.0 if on_terminal else 20.0)
        self.enabled = True
        self.bar: tqdm | None = None

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        total = int(trainer.num_training_batches) * trainer.max_epochs
        self.bar = tqdm(
            total=total,
            initial=trainer.global_step,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            mininterval=float("inf"),  # we say when
            disable=not self.enabled,
            bar_format=BAR.format(""),
        )
        self.redrawn = time.monotonic()
        self.images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_began, self.epoch_images = time.monotonic(), 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waited = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:  # an epoch's images/s are training's
            self.epoch_began += time.monotonic() - self.waited

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: tuple, batch_idx: int
    ) -> None:
        if self.bar is None or self.bar.disable:
            return
        n = len(batch[1]) * trainer.world_size
        self.images += n
        self.epoch_images += n
        self.bar.n = trainer.global_step
        if (now := time.monotonic()) - self.redrawn >= self.seconds:
            rate = self.images / (now - self.redrawn)
            self.redrawn, self.images = now, 0
            self.describe(trainer, pl_module, rate)
            self.bar.refresh()

    def describe(self, trainer: Trainer, pl_module: LightningModule, rate: float) -> None:
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        if depth := getattr(getattr(pl_module, "net", None), "depth", None):
            parts.append(f"depth {depth}")
        if hasattr(pl_module, "running"):
            loss, error = pl_module.running()
            parts.append(f"loss {loss:.3f} error {error:.1f}%")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2g} {rate:.0f} img/s")
        self.bar.bar_format = BAR.format(" ".join(parts))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or self.bar.disable:
            return
        m = {k: float(v) for k, v in trainer.callback_metrics.items()}
        line = f"{self.label} epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        for key in ("train/loss", "train/error", "val/loss", "val/error"):
            if key in m:
                line += f"  {key} {m[key]:.2f}%" if key.endswith("error") else f"  {key} {m[key]:.4f}"
        rate = self.epoch_images / max(time.monotonic() - self.epoch_began, 1e-9)
        self.bar.clear()
        print(f"{line}  {rate:.0f} img/s", file=sys.stderr)
        self.describe(trainer, pl_module, rate)  # of the last epoch the bar is left standing

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def print(self, *args: object, **kwargs: object) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
