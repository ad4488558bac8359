"""Grows the network in mid-training (Chang et al. 2018, section 4; the mathematics is depthlab/growth.py).

    Trainer(max_epochs=160, callbacks=[MultilevelCosine(), GrowDepth()]).fit(Classifier(MultilevelResNet()), data)

When      at the start of the epochs 60 and 110 of 160 (`at`), scaled by the budget and rounded to whole epochs, exactly
          where MultilevelCosine restarts the learning rate: 2-2-2 -> 4-4-4 -> 8-8-8 blocks. Any other schedule works.
Saves     43.75 % of the block steps of the deepest network trained throughout, 44.5 % of the FLOPs (ResNet-50, width
          16): blocks that are not there yet cost nothing.
Momentum  "reset" forgets it, for all parameters [choice: the paper says nothing; "each cycle itself can be regarded as
          a training process", and the rate jumps by 500]; "copy" keeps it, a new block inherits that of the block it
          copies. Whatever else an optimiser keeps per parameter goes the same way.
How       the same optimiser object is given the parameters in the order in which a fresh one would list them: appended
          at its end, they would meet one another's momentum after a resume, in silence. The depth is a function of the
          epoch alone; a resumed run's network gets its shape from the checkpoint, by Classifier, before the weights.
Devices   under DDP the model is wrapped anew at every growth: gradients of parameters that DDP has not been told of are
          not averaged, and the ranks drift apart in silence. BatchNorm normalises each rank's share of the batch
          (trainer.sync_batchnorm=true: all of it); running statistics are rank 0's, sent to all before every forward
          pass and at every growth. So with BatchNorm two processes do not give the numbers of one, growth or not.
Compiled  a compiled network is compiled anew at growth, once per cycle for training and once for evaluation.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from callbacks.schedule import Schedule
from depthlab import growth
from depthlab.problem import Problem
from depthlab.schedules import run_length


class GrowDepth(Callback):
    """Doubles the blocks of every stage of `pl_module.net` at given epochs and halves the step size.

    Logs `depth`, the network's layers, once per epoch.

    Args:
        at: epochs of the recipe, rising.
        epochs: length of the recipe.
        budget: the fraction of it that is run, as in the schedule.
        momentum: "reset" or "copy".

    Raises:
        ValueError: an argument is out of its range, or the budget leaves a depth without an epoch.
        Problem: at the start of a fit, where the network cannot grow or something in the trainer does not go with it.
    """

    def __init__(self, at: Sequence[int] = (60, 110), epochs: int = 160, budget: float = 1.0, momentum: str = "reset"):
        if momentum not in ("reset", "copy"):
            raise ValueError(f"grow.momentum must be reset or copy, got {momentum!r}")
        self.run_at = growth.growth_epochs(at, epochs, budget)
        self.run_epochs = run_length(epochs, budget)
        self.momentum = momentum
        self.start: tuple[int, ...] | None = None  # blocks per stage in the first epoch

    def state_dict(self) -> dict[str, Any]:
        return {"start": list(self.start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = tuple(state_dict["start"])

    def blocks(self, epoch: int) -> tuple[int, ...]:
        """Blocks per stage in `epoch` of the run."""
        return tuple(n * 2 ** sum(epoch >= p for p in self.run_at) for n in self.start)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if lines := growth.problems(pl_module.net):
            raise Problem("; ".join(lines))
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise Problem(f"grow: works on one device and with DDP, not with {type(trainer.strategy).__name__}")
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise Problem(
                    f"grow: {type(callback).__name__} averages weights of one shape; leave it out, or grow=none"
                )
            if isinstance(callback, Schedule) and callback.run_epochs != self.run_epochs:
                raise Problem(
                    f"grow.epochs with its budget gives {self.run_epochs} epochs, the schedule {callback.run_epochs}; "
                    "set grow.epochs to sched.epochs"
                )
        if trainer.current_epoch == 0:  # else: another fit of the same trainer, which goes on
            self.start = growth.depth(pl_module.net)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        want = self.blocks(trainer.current_epoch)
        while (have := growth.depth(pl_module.net)) != want:
            if sum(have) > sum(want):
                raise Problem(f"grow: the network has {have} blocks, epoch {trainer.current_epoch} should have {want}")
            self.grow(trainer, pl_module)
        pl_module.log("depth", float(pl_module.net.depth), on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def grow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.zero_grad(set_to_none=True)  # or the copies would have gradients
        states = {name: optimizer.state.get(p) for name, p in pl_module.net.named_parameters()}
        origin = growth.grow(pl_module.net)
        relist(optimizer, pl_module.configure_optimizers())
        if self.momentum == "reset":
            optimizer.state.clear()
        else:
            for name, p in pl_module.net.named_parameters():
                if not optimizer.state.get(p) and states[origin[name]]:
                    optimizer.state[p] = copy.deepcopy(states[origin[name]])
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):  # not a public surface: lightning 2.6; tests/test_grow_ddp.py holds it
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()
        if any(module._compiled_call_impl is not None for module in pl_module.modules()):
            torch.compiler.reset()  # code for old depths counts towards dynamo's limit of recompilations


def relist(optimizer: Optimizer, fresh: Optimizer) -> None:
    """Give `optimizer` the parameters of `fresh`, group by group and in that order; everything else it keeps."""
    for group, listed in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group["params"] = listed["params"]
