"""Mean loss and error of one network at many points of weight space, each as cheap as it can be.

The images are standardised once and stay where they are; a point is a vector of weights (directions.Layout), folded
(folding.py) and run through them. The network itself is only read.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab import memory
from depthlab.analysis import Images
from depthlab.analysis.directions import Layout
from depthlab.analysis.folding import Folded

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}


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


def chunk_size(device: torch.device, parameters: int) -> int:
    """Images at once: on a CPU so few that two layers' activations stay in the cache, unless the weights do not."""
    if device.type != "cpu":
        return 2500
    return 16 if parameters < 2_000_000 else 64


class Evaluator:
    """`evaluator(vector)` -> (mean cross-entropy, error in percent) at these weights, in evaluation mode.

    Args:
        net: left as it is.
        images: on the device to compute on.
        precision: "32" (the weights' own precision: double stays double) or "bf16".
        recalibrate: so many images, from the first, give the BatchNorm statistics anew at every point; None keeps
            those in the vector.
        winograd: see folding.py.
    """

    def __init__(
        self,
        net: nn.Module,
        images: Resident,
        precision: str = "32",
        recalibrate: int | None = None,
        winograd: bool = True,
    ) -> None:
        memory.keep_freed()
        self.layout, self.images = Layout(net), images
        device = images.x.device
        dtype = self.layout.dtype if precision == "32" else PRECISIONS[precision]
        self.net = copy.deepcopy(net).to(device)
        self.counters = {k: v.to(device) for k, v in net.state_dict().items() if not v.is_floating_point()}
        self.order = list(net.state_dict())
        self.forward = Folded(self.net, dtype, winograd)
        self.chunk = chunk_size(device, len(self.layout))
        self.recalibrate = recalibrate

    @torch.no_grad()
    def __call__(self, vector: Tensor) -> tuple[float, float]:
        views = self.layout.views(vector.to(self.images.x.device))
        if self.recalibrate is not None:
            views = self.recalibrated(views)
        state = {k: views[k] if k in views else self.counters[k] for k in self.order}
        prepared: dict[torch.Size, dict] = {}
        logits = []
        for x in self.images.x.split(self.chunk):
            if x.shape not in prepared:
                prepared[x.shape] = self.forward.prepare(state, x)
            logits.append(self.forward(prepared[x.shape], x))
        z, y = torch.cat(logits).to(self.layout.dtype), self.images.y
        loss = F.cross_entropy(z, y, reduction="none").mean(dtype=torch.float64)
        return float(loss), 100 * float((z.argmax(1) != y).sum()) / len(y)

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
