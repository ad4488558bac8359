"""A whole training step as one CUDA graph: augmentation, forward, loss, backward, clipping, fused SGD.

At batch 100 a GPU waits for the kernels of these small networks to be started, about a thousand in a step of
ResNet-110. A graph starts them all in one call. They are the same kernels in the same order; only the learning rate is
read from the device, in single precision, where an eager step is handed a double.

Lightning   Automatic optimisation and public hooks: `training_step` does the whole step, so what Lightning's closure
            does after it (`optimizer_zero_grad`, `backward`) and the optimiser's own step (`optimizer_step`) have
            nothing left to do. Global step, checkpoints, callbacks and progress are counted where they always are.
Addresses   The graph reads and writes what lay somewhere when it was captured: parameters, running statistics,
            momentum, sums of the epoch, images; and its `inputs` (which images, with which draws) and `rates`, which
            are filled before each replay. In between, group["lr"] is the number that schedules and records know.
Warm-up     The first WARM_UP steps run eagerly, on the stream of the capture, where libraries set themselves up. They
            are steps of the run: nothing has to be put back.
Anew        where the optimiser has other parameters or settings (growth), and in every fit.
Eagerly     a batch of another size (an epoch's last); everything, where something stands against it: `obstacle`.

Not yet run on a GPU: tests/test_graphed.py takes `CudaGraph` where there is one, else one whose replay runs the step.
Others do the same by hand: the step's order and warm-up as in PyTorch's notes on CUDA graphs (whole-network capture);
Lightning has nothing of its own (issues 10174, 14213).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from depthlab.classifier import Classifier, rescale_momentum
from depthlab.problem import Problem

WARM_UP = 3
BETWEEN = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
Step = Callable[[], None]


class CudaGraph:
    """A step, captured once and replayed."""

    device = "cuda"

    def __init__(self) -> None:
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def run(self, step: Step) -> None:
        """Eagerly, on the stream of the capture."""
        ours = torch.cuda.current_stream()
        self.stream.wait_stream(ours)
        with torch.cuda.stream(self.stream):
            step()
        ours.wait_stream(self.stream)

    def capture(self, step: Step) -> None:
        """Nothing is computed.

        Raises:
            RuntimeError: something in the step waits for the device, or cannot be captured for another reason.
        """
        ours = torch.cuda.current_stream()
        try:  # threads of others, such as a loader's that pins memory, may go on
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(ours)  # torch 2.11 does not come back from a capture that failed

    def replay(self) -> None:
        self.graph.replay()


class GraphedClassifier(Classifier):
    """A Classifier whose steps are replayed.

    Args:
        wanted: None where it is possible; True refuses to train without.
        graph: makes a graph, see `CudaGraph`.
        **options: of `Classifier`.

    Raises:
        Problem: at the start of a fit, where it is wanted and not possible.
    """

    def __init__(self, *args: Any, wanted: bool | None = None, graph: type = CudaGraph, **options: Any) -> None:
        super().__init__(*args, **options)
        self.wanted, self.make_graph = wanted, graph
        self.graphing = self.refused = False

    @property
    def replaying(self) -> bool:
        """Whether steps are replayed."""
        return self.graphing and not self.refused

    def obstacle(self) -> str | None:
        """Why steps cannot be captured; None if they can."""
        trainer, (optimizer,) = self.trainer, self.trainer.optimizers
        sgd = isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]
        others = [c for c in trainer.callbacks if any(getattr(type(c), h) is not getattr(Callback, h) for h in BETWEEN)]
        reasons = {
            "needs a CUDA GPU": self.device.type != self.make_graph.device,
            "is for a single device without trainer.strategy": not isinstance(trainer.strategy, SingleDeviceStrategy),
            "is for trainer.precision=32-true and bf16-mixed": trainer.precision not in ("32-true", "bf16-mixed"),
            "needs torch.optim.SGD with optim.optimizer.fused=true": not sgd,
            "is for steps without accumulated gradients": trainer.accumulate_grad_batches != 1,
            "goes without trainer.compile": any(m._compiled_call_impl is not None for m in self.modules()),
            f"leaves no room for {[type(c).__name__ for c in others]} in the midst of a step": bool(others),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def on_train_start(self) -> None:
        super().on_train_start()
        reason = self.obstacle()
        if reason and self.wanted:
            raise Problem(f"trainer.graph=true {reason}; take trainer.graph=null")
        self.graphing, self.refused = reason is None, False
        loader = self.trainer.train_dataloader
        self.finish = getattr(loader, "finish", None)
        if self.finish is not None:
            loader.deferred = self.graphing
        self.settings: list[tuple[list, dict]] = []
        self.loss = torch.zeros((), device=self.device)
        # a fused step takes its rate in single precision on a GPU, as a double from the host on a CPU
        exact = torch.float64 if self.device.type == "cpu" else torch.float32
        groups = self.trainer.optimizers[0].param_groups
        self.rates = [torch.zeros((), dtype=exact, device=self.device) for _ in groups]

    def on_train_epoch_start(self) -> None:
        if self.graphing and self.settings:
            self.sums.zero_()  # a graph adds to the sums it was captured with
        else:
            super().on_train_epoch_start()

    def on_train_end(self) -> None:
        self.graph, self.settings, self.inputs = None, [], ()  # its memory, too
        if self.finish is not None:
            self.trainer.train_dataloader.deferred = False

    def training_step(self, batch: Sequence[Tensor | None], batch_idx: int) -> Tensor:
        if not self.graphing:
            return super().training_step(batch, batch_idx)
        (optimizer,) = self.trainer.optimizers
        for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.momentum_style == "keras":
            rescale_momentum(optimizer)
        now = settings(optimizer)
        if not same(now, self.settings):
            self.graph, self.settings, self.runs = self.make_graph(), now, 0
            self.inputs = tuple(None if t is None else t.clone() for t in batch)
        if any(t is not None and t.shape != kept.shape for t, kept in zip(batch, self.inputs)):
            self.graph.run(partial(self.whole_step, batch))
            return self.loss.clone()
        for t, kept in zip(batch, self.inputs):
            if t is not None:
                kept.copy_(t)
        self.advance(partial(self.whole_step, self.inputs))
        return self.loss.clone()

    def advance(self, step: Step) -> None:
        """Run `step`, or the graph that it has become."""
        if self.runs == WARM_UP and not self.refused:
            try:
                self.graph.capture(step)
            except RuntimeError as error:
                warnings.warn(f"trainer.graph: steps stay eager, {str(error).splitlines()[0]}", stacklevel=2)
                self.refused = True
        if self.runs < WARM_UP or self.refused:
            self.graph.run(step)
        else:
            self.graph.replay()
        self.runs += 1

    def whole_step(self, batch: Sequence[Tensor | None]) -> None:
        """What Lightning's loop does in a step of `Classifier`; the loss goes to `self.loss`."""
        (optimizer,), device = self.trainer.optimizers, self.device.type
        cast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        with torch.autocast(device, enabled=False):
            x, y = batch if self.finish is None else self.finish(*batch)
            with torch.autocast(
                device, **cast, cache_enabled=False
            ):  # casts of the warm-up would be captured as results
                loss = super().training_step((x, y), 0)
            optimizer.zero_grad()
            loss.backward()
            self.change_gradients(optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
            numbers = [group["lr"] for group in optimizer.param_groups]
            set_rates(optimizer, self.rates)
            try:
                optimizer.step()
            finally:
                set_rates(optimizer, numbers)
            self.loss.copy_(loss.detach())

    # ---- what whole_step has done already

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.graphing:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.graphing:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.graphing:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


Settings = list[tuple[list[Tensor], dict[str, Any]]]


def settings(optimizer: torch.optim.Optimizer) -> Settings:
    """Of each group the list of its parameters, and what a captured step has in it as a number."""
    return [
        (group["params"], {k: v for k, v in group.items() if k not in ("params", "lr", "lr_before")})
        for group in optimizer.param_groups
    ]


def same(now: Settings, then: Settings) -> bool:
    return len(now) == len(then) and all(a is b and x == y for (a, x), (b, y) in zip(now, then))


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float | Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
