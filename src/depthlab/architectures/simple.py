"""Simplified plain and residual networks (Yu & Tomasi 2019, sections 2, 3, D.3, App. A; Figs. 4, 5; Table 5).

Stem      ReLU(Conv3x3(x)), no identity
Block     one convolution: plain ReLU(conv(x)), residual ReLU(ID(x) + conv(x)); no BatchNorm anywhere, biases everywhere
Groups    3 of N blocks, widths 16, 32, 64, maps 32, 16, 8 (the first convolution of groups 2 and 3 has stride 2)
Head      global average pooling -> FC K
Size      L = 3N + 2 layers; depth 20, 32, 44: 269,034, 463,018, 657,002 parameters at K = 10, of them 624, 1072, 1520
          ID entries, which the map between the two networks (depthlab/equivalence.py) changes by 1
Identity where channels double: every second pixel, zeros appended to the channels. This is what ones at the ID entries
(c, c, centre), c = 1..min(C, D), of a stride-2 kernel compute.

start="identity" is a plain network that starts at T(r0), r0 the start of the residual network of the same seed: the two
draw the same numbers, and r0's ID entries are those of T(r0) less 1, so that neither start is rounded against the other
(1 + r0 in fp32 would lose r0's last digits).

DominantNet, T' in the paper, keeps what signals need to stay in their channel: of a C x C convolution only the kernels
(c, c), of a doubling one (c, c) and (c + n, c), beside identities there too. 7,818, 12,298, 16,778 parameters.
  lower_identity=False   no identity at (c + n, c) [the paper: "defined in a similar way", which we read as with it]
  dense_lower=True       that half dense, without identity (18,906 parameters at depth 20; error 31.5 -> 21.3 %)
Their kernels start with the standard deviation of the full kernel [choice: "initialized by HMWI"].
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.architectures.init import initialise
from depthlab.architectures.resnet import Subsample, channels
from depthlab.equivalence import id_entries
from depthlab.fused import Conv2d, avg_pool, conv_act


class Layer(nn.Module):
    """A convolution and its ReLU, around it perhaps an identity. (B, in, H, W) -> (B, out, H/stride, W/stride)

    Args:
        conv: (B, in, H, W) -> (B, out, H/stride, W/stride).
        shortcut: the identity, or None.
    """

    def __init__(self, conv: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.conv = conv
        self.shortcut = shortcut
        self.step_size = 1.0

    def residual(self, x: Tensor) -> Tensor:
        """What is added to the identity, before h."""
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return conv_act(self.conv, x)
        return F.relu(torch.add(self.shortcut(x), self.residual(x), alpha=self.step_size))


class SimpleNet(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes); H and W divisible by 4.

    Args:
        num_classes: K.
        depth: layers with weights, 3N + 2.
        width: channels of the stem and the first group.
        kernel: side of the kernels, odd.
        residual: whether blocks have identities.
        init: name of a kernel initialiser, see `depthlab.architectures.init`; the paper's kwi (plain), hmwi (residual).
        fan: of hmwi, "out" or "in".
        start: "zero", or "identity": a plain network at T(r0).

    Raises:
        ValueError: an argument is out of its range.
    """

    no_weight_decay = ()

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 20,
        width: int = 16,
        kernel: int = 3,
        residual: bool = False,
        init: str = "kwi",
        fan: str = "out",
        start: str = "zero",
    ):
        super().__init__()
        if start not in ("zero", "identity"):
            raise ValueError(f"arch.start must be zero or identity, got {start!r}")
        if residual and start == "identity":
            raise ValueError("arch.start=identity is for plain networks; arch.residual=true has the identity built in")
        self.build(num_classes, depth, width, kernel)
        if residual:
            self.set_identity(True)
        initialise(self, init, fan=fan)
        with torch.no_grad():
            for block in self.blocks() if residual or start == "identity" else ():
                id_entries(block.conv.weight).add_(1)
            for block in self.blocks() if residual else ():
                id_entries(block.conv.weight).sub_(1)  # exact: see the top of this file

    def build(self, num_classes: int, depth: int, width: int, kernel: int) -> None:
        if depth < 5 or depth % 3 != 2:
            near = max(5, 3 * round((depth - 2) / 3) + 2)
            raise ValueError(f"arch.depth must be 3N + 2 (5, 8, 11, ...), got {depth}; the nearest is {near}")
        if width < 1:
            raise ValueError(f"arch.width must be >= 1, got {width}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"arch.kernel must be odd, got {kernel}")
        self.stem = Layer(Conv2d(3, width, kernel, padding=kernel // 2))
        stages = channels(width, (depth - 2) // 3)
        self.stages = nn.ModuleList(nn.Sequential(*(self.block(*c, kernel) for c in stage)) for stage in stages)
        self.classifier = nn.Linear(4 * width, num_classes)

    def block(self, channels_in: int, channels_out: int, kernel: int) -> Layer:
        stride = channels_out // channels_in
        return Layer(Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2))

    def set_identity(self, residual: bool) -> None:
        """Give every block its identity, or take it away; the weights stay."""
        for block in self.blocks():
            channels = block.conv.in_channels, block.conv.out_channels
            block.shortcut = identity(*channels) if residual else None

    @property
    def residual(self) -> bool:
        return self.stages[0][0].shortcut is not None

    @property
    def depth(self) -> int:
        """Layers with weights at present, 3N + 2."""
        return sum(len(stage) for stage in self.stages) + 2

    def blocks(self) -> list[Layer]:
        """The 3N blocks."""
        return [block for stage in self.stages for block in stage]

    def layers(self) -> list[Layer]:
        """The convolutional layers 1..L-1, the stem first; a layer's output is its activation, after the ReLU."""
        return [self.stem, *self.blocks()]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return self.classifier(avg_pool(x, x.shape[2:]).flatten(1))  # not mean, see resnet.py


def identity(channels_in: int, channels_out: int) -> nn.Module:
    same = channels_in == channels_out
    return nn.Identity() if same else Subsample(channels_in, channels_out, symmetric=False)


# ---- T': only the dominant paths


class Diagonal(nn.Conv2d):
    """Kernels (o, o mod n) only: output o sees input o mod n. (B, n, H, W) -> (B, D, H/stride, W/stride)"""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int):
        super().__init__(channels_out, channels_out, kernel, stride=stride, padding=kernel // 2, groups=channels_out)
        self.repeats = channels_out // channels_in

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.repeats == 1 else x.repeat(1, self.repeats, 1, 1))


class DenseLower(nn.Module):
    """Of 2n x n kernels the upper half diagonal, the lower dense. (B, n, H, W) -> (B, 2n, H/2, W/2)"""

    def __init__(self, n: int, kernel: int):
        super().__init__()
        self.upper = Diagonal(n, n, kernel, stride=2)
        self.lower = nn.Conv2d(n, n, kernel, stride=2, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.upper(x), self.lower(x)], dim=1)


class Twice(nn.Module):
    """Every second pixel, in both halves of the channels. (B, n, H, W) -> (B, 2n, H/2, W/2)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 1, stride=2).repeat(1, 2, 1, 1)  # strides: see Subsample


class DominantNet(SimpleNet):
    """(B, 3, H, W) -> logits (B, num_classes): T', in its residual form (weights decay to the identity).

    Args:
        num_classes, depth, width, kernel, init, fan: as of `SimpleNet`.
        lower_identity, dense_lower: of the doubling convolutions, see the top of this file.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 20,
        width: int = 16,
        kernel: int = 3,
        lower_identity: bool = True,
        dense_lower: bool = False,
        init: str = "hmwi",
        fan: str = "out",
    ):
        nn.Module.__init__(self)
        self.block = partial(dominant_block, lower_identity=lower_identity and not dense_lower, dense=dense_lower)
        self.build(num_classes, depth, width, kernel)
        initialise(self, init, fan=fan)


def dominant_block(channels_in: int, channels_out: int, kernel: int, lower_identity: bool, dense: bool) -> Layer:
    stride = channels_out // channels_in
    if stride == 1:
        return Layer(Diagonal(channels_in, channels_out, kernel, 1), nn.Identity())
    conv = DenseLower(channels_in, kernel) if dense else Diagonal(channels_in, channels_out, kernel, stride)
    for module in conv.modules():
        module.full = (channels_in, channels_out)  # what initialisers measure
    return Layer(conv, Twice() if lower_identity else identity(channels_in, channels_out))
