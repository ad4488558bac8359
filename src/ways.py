"""What src/benchmark.py measures: runs as src/train.py assembles them, and the same training in a bare loop."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from depthlab import fused
from depthlab.data import Batches
from depthlab.decay import parameter_groups
from depthlab.report.benchmark import PARTS
from depthlab.timing import Phases, Stopwatch, timed
from train import assemble

WARM_UP = 5  # steps: the four batches that two workers keep ready, the eager ones of a graph and its capture
Way = Callable[[Stopwatch, int], None]  # runs so many steps under the watch


class Ours:
    """A run as src/train.py assembles it, its network kept warm over repetitions."""

    def __init__(self, config: dict[str, Any], net: nn.Module | None = None) -> None:
        self.config = config
        with tempfile.TemporaryDirectory() as folder:
            self.parts = assemble(config, Path(folder))
        self.net = self.parts.model.net if net is None else net

    def __call__(self, watch: Stopwatch, count: int) -> None:
        class Timer(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                if batch_idx + 1 == WARM_UP:
                    watch.start()
                elif batch_idx + 1 == WARM_UP + count:
                    watch.stop()

        flags(conventional=False)
        limits = {"max_epochs": 1, "limit_train_batches": WARM_UP + count, "limit_val_batches": 0}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # the bar's lines
            parts = assemble(self.config, Path(folder), [Timer()], **limits)
            parts.model.net = self.net
            parts.trainer.fit(parts.model, parts.data)
        self.net.to(parts.trainer.strategy.root_device)  # Lightning takes it to the CPU; `bare` goes on with it

    def batches(self, device: torch.device) -> Batches:
        data = self.parts.data
        data.setup()
        batches = data.train_dataloader()
        batches.images, batches.labels = batches.images.to(device), batches.labels.to(device)
        batches.mean, batches.std = batches.mean.to(device), batches.std.to(device)
        return batches

    def bare(self, device: torch.device, mark: Callable[[str], None] = lambda name: None) -> Iterator[None]:
        """The same training without Lightning, on the same network: a step per `next`; `mark` follows each part."""
        model, net = self.parts.model, self.net.to(device)
        of = self.config["trainer"]
        optimizer = model.make_optimizer(parameter_groups(net, model.weight_decay, model.decay), lr=0.01)
        batches, bf16 = endless(self.batches(device)), of["precision"] == "bf16-mixed"
        while True:
            mark("between")
            x, y = next(batches)
            mark("data")
            fused.switch(of["fused"], of["precision"], of["accelerator"], of["compile"])
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(net(x), y)
            mark("forward")
            loss.backward()
            mark("backward")
            optimizer.step()
            mark("optimiser")
            yield

    def in_parts(self, device: torch.device) -> Way:
        """The bare loop, the time of its parts taken: waiting for a GPU at each makes it slower there."""
        phases = Phases(device)
        steps = self.bare(device, phases)

        def way(watch: Stopwatch, count: int) -> None:
            flags(conventional=False)
            timed(steps, watch, WARM_UP, 0)
            phases.clear()
            timed(steps, watch, 0, count)
            watch.measured["phases"] = {name: phases.seconds[name] for name in PARTS}
            watch.measured["evaluation"] = self.evaluation(device)

        return way

    def evaluation(self, device: torch.device) -> float:
        """Seconds to evaluate an image, of the second of two batches."""
        data = self.parts.data
        x = torch.randn(data.evaluated_at_once(device), 3, data.image_size, data.image_size, device=device)
        x = x.contiguous(memory_format=getattr(torch, f"{data.memory_format}_format", torch.channels_last))
        watch, bf16 = Stopwatch(device), self.config["trainer"]["precision"] == "bf16-mixed"
        self.net.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for _ in range(2):
                watch.start()
                self.net(x)
                watch.stop()
        self.net.train()
        return watch.measured["seconds"] / len(x)


def flags(conventional: bool) -> None:
    """Global settings: PyTorch's defaults and cudnn.benchmark as public scripts have them, or src/train.py's."""
    if conventional:
        fused.enable(False)  # back on in `assemble` and `bare`
    torch.use_deterministic_algorithms(not conventional)
    torch.utils.deterministic.fill_uninitialized_memory = conventional
    torch.backends.cudnn.benchmark = conventional
    torch.backends.cudnn.allow_tf32 = conventional


def endless(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def stepping(steps: Iterator[Any], like_public_scripts: bool) -> Way:
    def way(watch: Stopwatch, count: int) -> None:
        flags(conventional=like_public_scripts)
        timed(steps, watch, WARM_UP, count)

    return way
