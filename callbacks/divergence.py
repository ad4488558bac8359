"""A loss that is not finite ends the run as a recorded divergence: a result, not a crash.

The losses stay on the device and are read every `every_n_steps` steps, on all ranks alike (a rank whose loss went bad
spoils the others' weights within a step).
"""

import itertools
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Divergence(Callback):
    """Stops training after the first non-finite loss.

    Attributes:
        step: 0-based step of the first non-finite loss, None while all were finite.
        last_finite_loss: the mean loss of the step before it.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.step: int | None = None
        self.last_finite_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "last_finite_loss": self.last_finite_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.last_finite_loss = state_dict["step"], state_dict["last_finite_loss"]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step's weights may be ruined though its loss was still finite."""
        if not all(math.isfinite(v) for v in trainer.callback_metrics.values()):
            self.step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = self.step is not None  # resumed after its divergence: there is nothing to go on with
        self.losses: list[Tensor] = []  # not looked at yet
        self.looked_at, self.latest = trainer.global_step, None  # steps, and the loss of the last of them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: object, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        losses = torch.stack(self.losses).tolist()
        finite = list(itertools.takewhile(math.isfinite, losses))
        if self.step is None and not trainer.strategy.reduce_boolean_decision(len(finite) == len(losses), all=True):
            # ranks differ by at most a step; rank 0's account is the record's
            self.step = self.looked_at + len(finite)
            self.last_finite_loss = finite[-1] if finite else self.latest
            trainer.should_stop = True
        self.losses, self.looked_at, self.latest = [], self.looked_at + len(losses), losses[-1]

    def summary(self) -> dict[str, Any]:
        """As `result.json` holds it."""
        return {
            "diverged": self.step is not None,
            "diverged_step": self.step,
            "last_finite_loss": self.last_finite_loss,
            "ended": "completed" if self.step is None else "diverged",
        }
