"""The one LightningModule: mean cross-entropy, any architecture, any torch optimiser.

Weight decay is an L2 term (depthlab/decay.py).
Where the gradient's norm is clipped, the L2 term is part of what is clipped, as in Keras (Barz & Denzler's code).
`momentum_style="keras"` keeps v <- m v - lr g, the learning rate inside the buffer; torch keeps v <- m v + g. They
differ only where the rate changes, so the one is the other with its buffer scaled by lr_before / lr_now.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from depthlab import growth
from depthlab.decay import parameter_groups, penalty
from depthlab.equivalence import centre_decay

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Classifier(LightningModule):
    """Trains `net` to classify: batches are (images (B, 3, H, W), labels (B,)).

    Logs per epoch `train/loss`, `train/error`, `val/loss`, `val/error`, and in a test `test/...` (first loader) and
    `train_clean/...` (second: the training images without augmentation). Errors are percent.

    Args:
        net: (B, 3, H, W) -> logits (B, K).
        optimizer: takes parameter groups, e.g. `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        weight_decay, decay, decay_towards, momentum_style: see the top of this file.
        channels_last: memory format of the network; changes speed, not the mathematics.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[dict]], torch.optim.Optimizer] = SGD,
        weight_decay: float = 0.0,
        decay: str = "kernels",
        momentum_style: str = "torch",
        channels_last: bool = False,
        decay_towards: str = "zero",
    ):
        super().__init__()
        if decay_towards not in ("zero", "identity"):
            raise ValueError(f"optim.decay_towards must be zero or identity, got {decay_towards!r}")
        if momentum_style not in ("torch", "keras"):
            raise ValueError(f"optim.momentum_style must be torch or keras, got {momentum_style!r}")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.make_optimizer = optimizer
        self.weight_decay = weight_decay
        self.decay = decay
        self.decay_towards = decay_towards
        self.momentum_style = momentum_style
        self.evaluations = nn.ModuleDict(
            {
                split: nn.ModuleDict({key: MeanMetric(nan_strategy="disable") for key in ("loss", "error")})
                for split in ("val", "test", "train_clean")
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    # ---- training: sums stay on the device and are read once per epoch; self.log per step costs more than a small net

    def on_train_start(self) -> None:
        # A checkpoint's momentum has the strides it was saved with; a fused step reads it as it lies, like the weights.
        for optimizer in self.trainer.optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                        state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros(3, device=self.device, dtype=torch.float64 if self.device.type == "cpu" else None)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        with torch.no_grad():
            wrong = (logits.argmax(1) != y).sum()
            self.sums += torch.stack([loss.detach() * len(y), wrong, torch.full_like(wrong, len(y))])
        return loss

    def running(self) -> tuple[float, float]:
        """(mean loss, error in percent) of the epoch so far on this process; waits for the device."""
        loss, wrong, n = self.sums.tolist()
        return loss / max(n, 1), 100 * wrong / max(n, 1)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            loss, wrong, n = self.trainer.strategy.reduce(self.sums, reduce_op="sum").tolist()
            metrics = {"train/loss": loss / n, "train/error": 100 * wrong / n}
            self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True, prog_bar=True)

    # ---- evaluation: exact over any number of devices

    def evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self.net(x)
        self.evaluations[split]["loss"].update(F.cross_entropy(logits, y, reduction="none"))
        self.evaluations[split]["error"].update(100.0 * (logits.argmax(1) != y))

    def log_evaluation(self, split: str) -> None:
        for key, metric in self.evaluations[split].items():
            if metric.update_called:
                self.log(f"{split}/{key}", metric.compute(), add_dataloader_idx=False, sync_dist=True)
                metric.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.autocast(
            self.device.type, enabled=False
        ):  # weights of mixed precision are fp32: so is the final number
            self.evaluate(("test", "train_clean")[dataloader_idx], batch)

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test")
        self.log_evaluation("train_clean")

    # ---- a network may have grown: its shape is in the checkpoint and is restored before the weights are

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["growth"] = growth.state(self.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("growth") is not None:
            growth.set_depth(self.net, **checkpoint["growth"])
        # Lightning makes a network double only after the weights have been restored, rounded to single
        self.net.to(next(v.dtype for k, v in checkpoint["state_dict"].items() if k.startswith("net.")))

    # ---- optimisation

    def penalty(self) -> float:
        """The L2 term of the weights as they are."""
        return penalty(self.net, self.weight_decay, self.decay, self.decay_towards)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(parameter_groups(self.net, self.weight_decay, self.decay))
        # the L2 term is added, then clipped: see below. AdamW's decay is none, and stays its own
        if self.trainer.gradient_clip_val is not None and not optimizer.defaults.get("decoupled_weight_decay"):
            for group in optimizer.param_groups:
                group["l2"], group["weight_decay"] = group["weight_decay"], 0.0
        return optimizer

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.change_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.momentum_style == "keras":
            rescale_momentum(optimizer)

    def change_gradients(self, optimizer: torch.optim.Optimizer, clip: float | None, algorithm: str | None) -> None:
        """Decay towards the identity, and clipping."""
        towards_identity = self.decay_towards == "identity"
        if clip is not None or towards_identity:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            # fp16: a fused optimiser would unscale later, inside its step; for others Lightning has done it
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                scaler.unscale_(optimizer)
        if towards_identity:
            centre_decay(self.net, self.weight_decay)
        if clip is not None:
            for group in optimizer.param_groups:
                if group.get("l2"):
                    params = [p for p in group["params"] if p.grad is not None]
                    torch._foreach_add_([p.grad for p in params], [p.detach() for p in params], alpha=group["l2"])
            if algorithm == "value":
                nn.utils.clip_grad_value_(self.net.parameters(), clip)
            else:  # not self.clip_gradients(): Lightning refuses fused optimisers that have not been unscaled
                nn.utils.clip_grad_norm_(self.net.parameters(), clip)


def rescale_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Scale torch's momentum buffers by lr_before / lr_now, so that the next step is Keras' v <- m v - lr g."""
    for group in optimizer.param_groups:
        before = group.get("lr_before", group["lr"])  # lives in the group: saved and restored with the optimiser
        if before != group["lr"]:
            buffers = [optimizer.state[p]["momentum_buffer"] for p in group["params"] if optimizer.state[p]]
            if buffers:
                torch._foreach_mul_(buffers, before / group["lr"])
        group["lr_before"] = group["lr"]
