"""Pre-activation residual networks with an explicit step size h (Chang et al. 2018, sections 3, 5.1, App. C).

Stem      Conv3x3 -> BatchNorm -> ReLU
Block     Y <- shortcut(Y) + h F(Y),  F = [BN -> ReLU -> Conv3x3] twice; the very first block has no leading BN -> ReLU
Stages    3 of n blocks, widths w, 2w, 4w (w = 16, wide: 32), maps 32, 16, 8 (stages 2 and 3 begin with stride 2)
Head      BatchNorm -> ReLU -> global average pooling -> FC K
Size      6n + 2 layers, 27w + 9w^2 (42n - 10) + 2w (14n + 1) + (4w + 1) K parameters: Table 5 to the last digit
Any image size divisible by 4: STL-10's 96x96 pass through the same network in maps of 96, 48, 24.

h = 1 is the ordinary network; growth halves it (depthlab/growth.py).

The paper says "pre-activation", two BN-ReLU-Conv per block, and gives the parameter counts. They leave two structures;
ours is He et al.'s (2016b) rule for the first unit, which the authors' neighbouring code follows and which explains why
they could not copy the first block of stage 1 (App. B). From that code too: parameter-free shortcut (2x2 average, zeros
on both sides of the channels), no conv biases, BatchNorm eps 1e-3 and running average .99, initialisation (init.py,
truncated_normal). Not known: whether their shortcut averaged (shortcut=subsample takes every second pixel instead).
"""

import torch
from torch import Tensor, nn

from depthlab.architectures.init import check_batch_norm, initialise
from depthlab.architectures.resnet import Subsample, channels
from depthlab.fused import Conv2d, bn_act, conv_bn_act

SHORTCUTS = ("avgpool_symmetric", "subsample")


class PreActivationBlock(nn.Module):
    """shortcut(Y) + step_size * residual(Y). (B, in, H, W) -> (B, out, H/stride, W/stride)

    Args:
        first: leave out the leading BN -> ReLU; the stem has done it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        step_size: float,
        first: bool,
        symmetric: bool,
        eps: float,
        momentum: float,
    ):
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.bn1 = None if first else nn.BatchNorm2d(channels_in, eps=eps, momentum=momentum)
        self.conv1 = Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out, eps=eps, momentum=momentum)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if stride == 1 else Subsample(channels_in, channels_out, symmetric)
        self.step_size = step_size

    def residual(self, x: Tensor) -> Tensor:
        """F(Y), before h."""
        y = x if self.bn1 is None else bn_act(self.bn1, x)
        return self.conv2(conv_bn_act(self.conv1, self.bn2, y))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.shortcut(x), self.residual(x), alpha=self.step_size)


class MultilevelResNet(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes); H and W divisible by 4.

    Args:
        num_classes: K.
        blocks: n, residual blocks in each of the 3 stages.
        width: w, channels of the stem and the first stage.
        step_size: h, multiplies the residual branch of every block.
        shortcut: one of `SHORTCUTS`, where the shape changes.
        init: name of a kernel initialiser, see `depthlab.architectures.init`.
        bn_eps, bn_momentum: of every BatchNorm (torch's meaning of momentum).

    Raises:
        ValueError: a number is out of its range, or a name is unknown.
    """

    no_weight_decay = ()

    def __init__(
        self,
        num_classes: int = 10,
        blocks: int = 2,
        width: int = 16,
        step_size: float = 1.0,
        shortcut: str = "avgpool_symmetric",
        init: str = "truncated_normal",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ):
        super().__init__()
        check_batch_norm(bn_eps, bn_momentum)
        for key, value in (("blocks", blocks), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"arch.{key} must be a whole number >= 1, got {value!r}")
        if not step_size > 0:
            raise ValueError(f"arch.step_size must be > 0, got {step_size}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"arch.shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")

        self.stem = Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width, eps=bn_eps, momentum=bn_momentum)
        symmetric = shortcut == "avgpool_symmetric"
        h, self.stages = float(step_size), nn.ModuleList()
        for k, stage in enumerate(channels(width, blocks)):
            made = (PreActivationBlock(*c, h, k == j == 0, symmetric, bn_eps, bn_momentum) for j, c in enumerate(stage))
            self.stages.append(nn.Sequential(*made))
        self.final_bn = nn.BatchNorm2d(4 * width, eps=bn_eps, momentum=bn_momentum)
        self.classifier = nn.Linear(4 * width, num_classes)
        initialise(self, init)

    @property
    def depth(self) -> int:
        """Layers with weights at present, 6n + 2."""
        return 2 * sum(len(stage) for stage in self.stages) + 2

    def forward(self, x: Tensor) -> Tensor:
        x = bn_act(self.stem_bn, self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.classifier(bn_act(self.final_bn, x).mean(dim=(2, 3)))
