"""Learning-rate schedules as callbacks over the pure functions of `depthlab.schedules`.

    Trainer(max_epochs=180, callbacks=[SGDR()]).fit(Classifier(Plain11(100)), data)

The rate is set before every step from the step's number alone, so a resumed run needs no state and no schedule can get
out of step. `epochs` is the recipe's length and `budget` stretches all of it together: `budget=0.05` runs
`run_epochs` = round(0.05 * epochs) epochs with the same curve, every milestone and cycle in its place.

To add one: a class with `lr(t, steps_per_epoch)`, and a YAML file in conf/sched that names it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from lightning.pytorch import Callback, LightningModule, Trainer

from depthlab import schedules


def check(condition: bool, key: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"sched.{key} must be {rule}, got {got}")


def check_rates(lr_min: float, lr_max: float) -> None:
    check(lr_min >= 0, "lr_min", ">= 0", lr_min)
    check(lr_max > lr_min, "lr_max", "> lr_min", f"{lr_max} <= {lr_min}")


def check_milestones(milestones: Sequence[int], epochs: int, after: int = 0) -> None:
    points = [after, *milestones, epochs]
    rising = all(a < b for a, b in pairwise(points))
    check(rising, "milestones", f"rising epochs between {after} and sched.epochs = {epochs}", list(milestones))


class Schedule(Callback):
    """Sets the learning rate of every parameter group before each step.

    Args:
        epochs: length of the recipe, a whole number >= 1.
        budget: the fraction of it that is run; stretches the schedule's time axis.
    """

    def __init__(self, epochs: int, budget: float = 1.0):
        check(isinstance(epochs, int) and epochs >= 1, "epochs", "a whole number >= 1", epochs)
        check(budget > 0, "budget", "> 0", budget)
        least = math.ceil(5e4 / epochs) / 1e5
        check(epochs * budget >= 0.5, "budget", f">= {least:g}, or no epoch of {epochs} is left", f"{budget:g}")
        self.epochs = epochs
        self.budget = budget
        self.run_epochs = schedules.run_length(epochs, budget)

    def lr(self, t: int, steps_per_epoch: int) -> float:
        """The rate used by step `t` (0-based) of the full recipe."""
        raise NotImplementedError("a schedule defines lr(t, steps_per_epoch)")

    def run_lr(self, t: int, steps_per_epoch: int) -> float:
        """The rate used by step `t` (0-based) of the budgeted run."""
        common = math.gcd(self.epochs, self.run_epochs)  # the whole recipe: t as it is
        return self.lr(t * (self.epochs // common), steps_per_epoch * (self.run_epochs // common))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not trainer.num_training_batches at each step: a resumed or limited run must agree with the whole one
        self.steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        lr = self.run_lr(trainer.global_step, self.steps_per_epoch)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"lr": lr}, step=trainer.global_step)


class Constant(Schedule):
    """One rate throughout."""

    def __init__(self, epochs: int = 164, lr: float = 0.1, budget: float = 1.0):
        super().__init__(epochs, budget)
        check(lr > 0, "lr", "> 0", lr)
        self.rate = lr

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return self.rate


class Step(Schedule):
    """`lr` times `gamma` after each milestone (epochs): the usual baseline."""

    def __init__(
        self,
        epochs: int = 200,
        lr: float = 0.1,
        milestones: Sequence[int] = (100, 150),
        gamma: float = 0.1,
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check(lr > 0, "lr", "> 0", lr)
        check(0 < gamma <= 1, "gamma", "in (0, 1]", gamma)
        check_milestones(milestones, epochs)
        self.options = {"lr": lr, "milestones": tuple(milestones), "gamma": gamma}

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.step_decay(t, steps_per_epoch, **self.options)


class SGD(Schedule):
    """He et al.'s hand-made steps: warm-up, then `lr`, times `gamma` after each milestone (Barz & Denzler's "SGD")."""

    def __init__(
        self,
        epochs: int = 164,
        lr: float = 0.1,
        lr_warmup: float = 0.01,
        warmup: int = 1,
        milestones: Sequence[int] = (80, 120),
        gamma: float = 0.1,
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check(lr > 0, "lr", "> 0", lr)
        check(lr_warmup > 0, "lr_warmup", "> 0", lr_warmup)
        check(warmup >= 0, "warmup", ">= 0", warmup)
        check(0 < gamma <= 1, "gamma", "in (0, 1]", gamma)
        check_milestones(milestones, epochs, after=warmup)
        self.options = {
            "lr": lr,
            "lr_warmup": lr_warmup,
            "warmup": warmup,
            "milestones": tuple(milestones),
            "gamma": gamma,
        }

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.handmade_steps(t, steps_per_epoch, **self.options)


class CLR(Schedule):
    """Cyclical learning rates with a global decay by `delta` (Barz & Denzler 2018, eq. 1 and 2)."""

    def __init__(
        self,
        epochs: int = 160,
        half_cycle: int = 10,
        lr_min: float = 1e-5,
        lr_max: float = 0.1,
        delta: float = 10.0,
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check_rates(lr_min, lr_max)
        check(half_cycle >= 1, "half_cycle", ">= 1 epoch", half_cycle)
        check(delta >= 1, "delta", ">= 1", delta)
        self.options = {"half_cycle": half_cycle, "lr_min": lr_min, "lr_max": lr_max, "delta": delta}

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.clr(t, steps_per_epoch, epochs=self.epochs, **self.options)


class SGDR(Schedule):
    """Warm restarts with half a cosine per cycle (Barz & Denzler 2018, eq. 3 and 4)."""

    def __init__(
        self,
        epochs: int = 180,
        cycle: int = 12,
        factor: int = 2,
        lr_min: float = 1e-6,
        lr_max: float = 0.1,
        formula: str = "paper",
        granularity: str = "epoch",
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check_rates(lr_min, lr_max)
        check(cycle >= 1, "cycle", ">= 1 epoch", cycle)
        check(isinstance(factor, int) and factor >= 1, "factor", "a whole number >= 1", factor)
        check(formula in ("paper", "authors"), "formula", "paper or authors", formula)
        check(granularity in ("epoch", "step"), "granularity", "epoch or step", granularity)
        authors_per_step = formula == "authors" and granularity == "step"
        check(not authors_per_step, "granularity", "epoch where formula=authors, which counts epochs", granularity)
        self.options = {
            "cycle": cycle,
            "factor": factor,
            "lr_min": lr_min,
            "lr_max": lr_max,
            "formula": formula,
            "granularity": granularity,
        }

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.sgdr(t, steps_per_epoch, **self.options)


class OneCycle(Schedule):
    """One cosine up and one down over the whole run (Smith & Topin 2019)."""

    def __init__(
        self,
        epochs: int = 160,
        lr_max: float = 0.1,
        warmup: float = 0.3,
        div: float = 25.0,
        final_div: float = 1e4,
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check(lr_max > 0, "lr_max", "> 0", lr_max)
        check(0 <= warmup < 1, "warmup", "in [0, 1)", warmup)
        check(div >= 1, "div", ">= 1", div)
        check(final_div >= 1, "final_div", ">= 1", final_div)
        self.options = {"lr_max": lr_max, "warmup": warmup, "div": div, "final_div": final_div}

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.one_cycle(t, steps_per_epoch, epochs=self.epochs, **self.options)


class MultilevelCosine(Schedule):
    """Cosine cycles that restart at the epochs `at`, where a network may grow (Chang et al. 2018, eq. 9).

    Under a budget the restarts fall on whole epochs, the very ones at which `GrowDepth(at, epochs, budget)` grows;
    a cycle shorter than half an epoch is left out.

    Args:
        reset: False for one cosine over all epochs (their Fig. 10).
    """

    def __init__(
        self,
        epochs: int = 160,
        at: Sequence[int] = (60, 110),
        lr_min: float = 0.001,
        lr_max: float = 0.5,
        reset: bool = True,
        budget: float = 1.0,
    ):
        super().__init__(epochs, budget)
        check_rates(lr_min, lr_max)
        points = [0, *at, epochs]
        rising = all(isinstance(b, int) and a < b for a, b in zip(points, points[1:]))
        check(rising, "at", f"rising epochs between 0 and sched.epochs = {epochs}", list(at))
        check(isinstance(reset, bool), "reset", "true or false", reset)
        self.at = tuple(at)
        self.run_at = schedules.run_points(at, epochs, self.run_epochs)
        self.options = {"lr_min": lr_min, "lr_max": lr_max, "reset": reset}

    def lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.multilevel_cosine(t, steps_per_epoch, epochs=self.epochs, at=self.at, **self.options)

    def run_lr(self, t: int, steps_per_epoch: int) -> float:
        return schedules.multilevel_cosine(t, steps_per_epoch, epochs=self.run_epochs, at=self.run_at, **self.options)
