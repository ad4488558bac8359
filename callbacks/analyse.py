"""An analysis of depthlab.analysis during training.

    from depthlab.analysis.norms import norms
    Trainer(callbacks=[Analyse(norms, at=(0, 60, 110, 160), images=1000)])

Measured before the first epoch (0) and after the epochs asked for, on rank 0, in evaluation mode; the weights, every
module's mode and the random numbers of training stay as they are, so a run with it ends where one without it does.
At optimiser steps, too, where an epoch is too long to wait: at_steps=(1, 10, 100) or every_steps=50.
Scalars go to the loggers as `<name>/<key>` and into `rows`, which travel in the checkpoint; with a folder also to
`analysis-<name>-epoch<e>.{npz,json}`, and `analysis-<name>-step<s>.{npz,json}`. A row has its `epoch`, one of a step a
broken one beside its `step`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.record import Record
from depthlab.analysis import Images, Result, asked, choose, files, measure, needs
from depthlab.problem import Problem
from depthlab.schedules import run_length, run_points


class Analyse(Callback):
    """Args:
    analysis: function of `net` and `batches`, its options bound (`functools.partial`).
    at: epochs of the recipe after which to measure; 0 is before the first.
    every: and after every so many.
    at_steps, every_steps: optimiser steps after which to measure, counted from 1; no budget scales them.
    epochs: length of the recipe, which the budget scales with all its epochs; None takes `at` and `every` as they are.
    budget: the fraction of the recipe that is run, as in the schedule.
    split, images: which images, see `depthlab.analysis.choose`.
    batches: other images than the trainer's datamodule has.
    name: of the analysis; None for the function's.
    folder: for the arrays; None keeps scalars only.

    Raises:
        ValueError: an argument is out of its range.
        Problem: at the start of a fit, where there are no images to measure on.
    """

    def __init__(
        self,
        analysis: Callable[..., Result],
        at: Sequence[int] = (),
        every: int | None = None,
        epochs: int | None = None,
        budget: float = 1.0,
        split: str = "test",
        images: int | None = None,
        batches: Images | None = None,
        name: str | None = None,
        folder: Path | None = None,
        at_steps: Sequence[int] = (),
        every_steps: int | None = None,
    ):
        self.name = name or getattr(analysis, "func", analysis).__name__
        where = f"analyses.{self.name}"
        if not at and every is None and not at_steps and every_steps is None:
            ways = f"{where}.at=[...] (epochs of the recipe) or {where}.every=..."
            raise ValueError(f"{where}: say when, {ways}, or at_steps=[...] or every_steps=... (optimiser steps)")
        if any(s < 1 for s in at_steps) or (every_steps is not None and every_steps < 1):
            got = f"at_steps={list(at_steps)} and every_steps={every_steps}"
            raise ValueError(f"{where}: at_steps and every_steps must be >= 1 (at=[0] is before the first), got {got}")
        last = float("inf") if epochs is None else epochs
        if any(not 0 <= e <= last for e in at) or (every is not None and not 1 <= every <= last):
            allowed = "epochs" if epochs is None else f"epochs up to the recipe's last, {epochs} (sched.epochs)"
            raise ValueError(f"{where}: at >= 0 and every >= 1 must be {allowed}, got at={list(at)} and every={every}")
        if set(needs(analysis)) - {"net", "batches"}:
            raise ValueError(f"{where}: this analysis needs a finished run; use src/analyze.py")
        points = sorted({*at, *(range(every, epochs + 1, every) if every and epochs else ())})
        run_epochs = epochs and run_length(epochs, budget)
        self.run_at = set(run_points(points, epochs, run_epochs) if epochs else points)
        self.every = None if epochs else every
        self.at_steps, self.every_steps, self.step = set(at_steps), every_steps, 0
        self.analysis, self.split, self.images, self.batches, self.folder = analysis, split, images, batches, folder
        choice = {"split": split, "images": images} if batches is None and "batches" in needs(analysis) else {}
        options = asked.options(getattr(analysis, "keywords", {}) | choice)
        self.about = {"name": self.name, **json.loads(json.dumps(options, default=repr))}
        self.rows: list[dict[str, Any]] = []

    @property
    def state_key(self) -> str:
        return f"Analyse({self.name})"  # there may be several

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.batches is None and not hasattr(trainer.datamodule, "arrays"):
            raise Problem("analyse: the trainer has no ImageData to take images from; give Analyse(batches=...)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batches is None:
            self.batches = choose(trainer.datamodule, self.split, self.images, pl_module.device)
        self.step = trainer.global_step
        if trainer.current_epoch == 0 and 0 in self.run_at:
            self.measure(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if self.step in self.at_steps or (self.every_steps is not None and self.step % self.every_steps == 0):
            epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
            began = Record.now(pl_module)
            self.measure(trainer, pl_module, epoch, self.step)
            for callback in trainer.callbacks:
                if isinstance(callback, Record):  # an epoch's seconds are training's
                    callback.evaluating += Record.now(pl_module) - began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done in self.run_at or (self.every is not None and done % self.every == 0):
            self.measure(trainer, pl_module, done)

    def measure(self, trainer: Trainer, pl_module: LightningModule, epoch: float, step: int | None = None) -> None:
        if not trainer.is_global_zero:  # all ranks have the same weights
            return
        if not all(p.isfinite().all() for p in pl_module.net.parameters()):  # diverged: there is nothing to measure
            return
        with isolate_rng():
            result = measure(self.analysis, net=lambda: pl_module.net, batches=lambda: self.batches)
        scalars = files.plain(result.scalars)
        self.rows.append({"epoch": epoch, **({} if step is None else {"step": step}), **scalars})
        numbers = {f"{self.name}/{key}": value for key, value in scalars.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=max(0, trainer.global_step - 1))
        if self.folder is not None:
            about = {"analysis": self.about, "epoch": epoch, "step": trainer.global_step}
            when = f"epoch{epoch:04d}" if step is None else f"step{step:06d}"
            files.write(self.folder, f"{self.name}-{when}", result, about)
