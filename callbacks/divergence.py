"""A loss that is not finite ends the run as a recorded divergence: a result, not a crash.

The check costs no read-back: step and value of the last finite loss stay on the device and are looked at every
`every_n_steps` steps, on all ranks alike (a rank whose loss went bad spoils the others' weights within a step).
"""

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
        self.seen: Tensor | None = None  # (steps with a finite loss in this fit, the last such loss)

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
        self.first_step = trainer.global_step
        self.seen = torch.tensor([0.0, float("nan")], device=pl_module.device)
        self.fine = torch.tensor(True, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: object, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach().float()
        self.fine &= loss.isfinite()
        self.seen = torch.where(self.fine, torch.stack([self.seen[0] + 1, loss]), self.seen)
        if (batch_idx + 1) % self.every_n_steps == 0 or trainer.is_last_batch:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self.fine), all=True):
            return
        steps, loss = self.seen.tolist()
        # ranks differ by at most a step; rank 0's account is the record's
        self.step = self.first_step + int(steps)
        self.last_finite_loss = loss if steps > 0 else None
        trainer.should_stop = True

    def summary(self) -> dict[str, Any]:
        """As `result.json` holds it."""
        return {
            "diverged": self.step is not None,
            "diverged_step": self.step,
            "last_finite_loss": self.last_finite_loss,
            "ended": "completed" if self.step is None else "diverged",
        }
