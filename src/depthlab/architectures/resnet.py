"""Residual networks for small images, depth 6n + 2 (He et al. 2016, section 4.2; Barz & Denzler 2018 use depth 110).

Stem      Conv3x3 -> BatchNorm -> ReLU
Block     ReLU(shortcut(x) + h BN(Conv3x3(ReLU(BN(Conv3x3(x)))))), h = 1 unless the network grows (depthlab/growth.py)
Stages    3 of n blocks, widths w, 2w, 4w (w = 16), maps 32, 16, 8 (the first block of stages 2 and 3 has stride 2)
Head      global average pooling -> FC K
Size      depth 20: 269,722 parameters at K = 10; depth 110: 1,727,962 at K = 10; 1,737,860 as in Barz & Denzler's
          code (K = 100, conv biases); 253 MMAC per 32x32 image at depth 110
Shortcut where the shape changes:
  subsample           every second pixel, zeros appended to the channels (He's option A; the default)
  avgpool_symmetric   2x2 average, zeros on both sides of the channels (Barz & Denzler's code)
  projection          1x1 convolution with stride 2 -> BatchNorm (He's option B)
  none                no shortcut anywhere, projections dropped too: the plain twin
Li et al. 2018 (conf/arch/li2018.yaml) take `projection` and, "noshort", `none`: 2,752 parameters fewer, so not only the
identity is gone. Their wide ResNet-56-k is this network with w = 16k, stem included: no pre-activation WRN.
Convolutions have no biases (He); Barz & Denzler's code has them: conv_bias=true.
BatchNorm and initialisation default to Barz & Denzler's code (Keras' defaults), see plain11.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.architectures.init import check_batch_norm, initialise
from depthlab.fused import Conv2d, avg_pool, bn_act, conv_bn_act

SHORTCUTS = ("subsample", "avgpool_symmetric", "projection", "none")


def channels(width: int, blocks: int) -> list[list[tuple[int, int]]]:
    """(in, out) of each of `blocks` blocks in 3 stages of w, 2w and 4w channels."""
    return [[(width * 2 ** (k - (j == 0 < k)), width * 2**k) for j in range(blocks)] for k in range(3)]


class Subsample(nn.Module):
    """Parameter-free shortcut to `channels` channels at half the size. (B, C, H, W) -> (B, channels, H/2, W/2)"""

    def __init__(self, channels_in: int, channels_out: int, symmetric: bool):
        super().__init__()
        extra = channels_out - channels_in
        self.symmetric = symmetric
        self.before, self.after = (extra // 2, extra - extra // 2) if symmetric else (0, extra)

    def forward(self, x: Tensor) -> Tensor:
        # kernel 1 takes every second pixel; unlike x[:, :, ::2, ::2] its gradient keeps the strides of channels_last,
        # and a gradient of other strides than its activation's makes ReLU's backward 30 times slower on a CPU
        x = avg_pool(x) if self.symmetric else F.avg_pool2d(x, 1, stride=2)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Post-activation basic block. (B, in, H, W) -> (B, out, H/stride, W/stride)"""

    def __init__(self, channels_in: int, channels_out: int, shortcut: str, conv: Callable, bn: Callable):
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.conv1 = conv(channels_in, channels_out, 3, stride=stride, padding=1)
        self.bn1 = bn(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3, padding=1)
        self.bn2 = bn(channels_out)
        self.shortcut: nn.Module | None
        if shortcut == "none":
            self.shortcut = None
        elif stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "projection":
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), bn(channels_out)
            )
        else:
            self.shortcut = Subsample(channels_in, channels_out, symmetric=shortcut == "avgpool_symmetric")
        self.step_size = 1.0

    def residual(self, x: Tensor) -> Tensor:
        """What is added to the shortcut, before h."""
        return self.bn2(self.conv2(self.inner(x)))

    def inner(self, x: Tensor) -> Tensor:
        """Between the two convolutions."""
        return conv_bn_act(self.conv1, self.bn1, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return conv_bn_act(self.conv2, self.bn2, self.inner(x))
        if "residual" in vars(self):  # an analysis watches or replaces it
            return F.relu(torch.add(self.shortcut(x), self.residual(x), alpha=self.step_size))
        return conv_bn_act(self.conv2, self.bn2, self.inner(x), self.shortcut(x), step_size=self.step_size)


class ResNet(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes); H and W divisible by 4.

    Args:
        num_classes: K.
        depth: layers with weights, 6n + 2.
        width: channels of the stem and the first stage.
        shortcut: one of `SHORTCUTS`.
        conv_bias: whether 3x3 convolutions have a bias.
        init, init_scale: a kernel initialiser (see `depthlab.architectures.init`) and what multiplies its draws.
        bn_eps, bn_momentum: of every BatchNorm (torch's meaning of momentum).

    Raises:
        ValueError: the depth is not 6n + 2, the width is below 1, or a name is unknown.
    """

    no_weight_decay = ()

    def __init__(
        self,
        num_classes: int = 100,
        depth: int = 20,
        width: int = 16,
        shortcut: str = "subsample",
        conv_bias: bool = False,
        init: str = "glorot_uniform",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
        init_scale: float = 1.0,
    ):
        super().__init__()
        check_batch_norm(bn_eps, bn_momentum)
        if depth < 8 or depth % 6 != 2:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise ValueError(f"arch.depth must be 6n + 2 (8, 14, 20, ...), got {depth}; the nearest is {near}")
        if width < 1:
            raise ValueError(f"arch.width must be >= 1, got {width}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"arch.shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")

        def conv(*args, **kwargs) -> Conv2d:
            return Conv2d(*args, bias=conv_bias, **kwargs)

        def bn(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum)

        self.stem = conv(3, width, 3, padding=1)
        self.stem_bn = bn(width)
        stages = channels(width, (depth - 2) // 6)
        self.stages = nn.ModuleList(nn.Sequential(*(Block(*c, shortcut, conv, bn) for c in stage)) for stage in stages)
        self.classifier = nn.Linear(4 * width, num_classes)
        initialise(self, init, init_scale)

    @property
    def depth(self) -> int:
        """Layers with weights at present, 6n + 2."""
        return 2 * sum(len(stage) for stage in self.stages) + 2

    def forward(self, x: Tensor) -> Tensor:
        x = bn_act(self.stem_bn, self.stem(x))
        for stage in self.stages:
            x = stage(x)
        x = avg_pool(x, x.shape[2:]).flatten(1)  # not mean: its gradient keeps the strides, see Subsample
        return self.classifier(x)
