"""Mean loss and error of one network at many points of weight space, each as cheap as it can be.

The images are standardised once and stay where they are; a point is a vector of weights (directions.Layout), folded
(folding.py) and run through them. The network itself is only read.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.analysis import Images
from depthlab.analysis.directions import Layout
from depthlab.analysis.folding import Folded

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
CHUNK = {"cpu": 32, "cuda": 2500}  # images at once: on a CPU two layers' activations stay in the cache


@dataclass
class Resident:
    """Standardised images (N, 3, H, W), channels_last, and labels (N,), on the device."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, batches: Images, device: torch.device, dtype: torch.dtype = torch.float32) -> "Resident":
        pairs = [(x.to(device, dtype), y.to(device)) for x, y in batches]
        x, y = (torch.cat(tensors) for tensors in zip(*pairs))
        return cls(x.contiguous(memory_format=torch.channels_last), y)


class Evaluator:
    """`evaluator(vector)` -> (mean cross-entropy, error in percent) at these weights, in evaluation mode.

    Args:
        net: left as it is.
        images: on the device to compute on.
        precision: "32" (the weights' own precision: double stays double) or "bf16".
        recalibrate: so many images, from the first, give the BatchNorm statistics anew at every point; None keeps
            those in the vector.
    """

    def __init__(self, net: nn.Module, images: Resident, precision: str = "32", recalibrate: int | None = None) -> None:
        self.layout, self.images = Layout(net), images
        device = images.x.device
        dtype = self.layout.dtype if precision == "32" else PRECISIONS[precision]
        self.net = copy.deepcopy(net).to(device)
        self.counters = {k: v.to(device) for k, v in net.state_dict().items() if not v.is_floating_point()}
        self.order = list(net.state_dict())
        self.forward: Callable = Folded(self.net, dtype)
        self.chunk = CHUNK.get(device.type, 500)
        self.recalibrate = recalibrate

    @torch.no_grad()
    def __call__(self, vector: Tensor) -> tuple[float, float]:
        views = self.layout.views(vector.to(self.images.x.device))
        if self.recalibrate is not None:
            views = self.recalibrated(views)
        state = {k: views[k] if k in views else self.counters[k] for k in self.order}
        prepared: dict[torch.Size, dict] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.images.x.device)
        wrong = torch.zeros((), dtype=torch.int64, device=loss.device)
        for x, y in zip(self.images.x.split(self.chunk), self.images.y.split(self.chunk)):
            if x.shape not in prepared:
                prepared[x.shape] = self.forward.prepare(state, x)
            logits = self.forward(prepared[x.shape], x)
            logits = logits.float() if logits.dtype == torch.bfloat16 else logits
            loss += F.cross_entropy(logits, y, reduction="sum")
            wrong += (logits.argmax(1) != y).sum()
        n = len(self.images.y)
        return float(loss) / n, 100 * float(wrong) / n

    def recalibrated(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with every BatchNorm's running mean and variance measured at these weights."""
        norms = [m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.net.load_state_dict(views | self.counters)
        before = [m.momentum for m in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
        self.net.train()
        for x in self.images.x[: self.recalibrate].split(500):
            self.net.forward(x)
        self.net.eval()
        for module, momentum in zip(norms, before):
            module.momentum = momentum
        return {k: v for k, v in self.net.state_dict().items() if k in views}
