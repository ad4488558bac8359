"""Plain-11: wide, shallow, strictly sequential (Barz & Denzler 2018, section III and Fig. 1).

Unit         Conv3x3 -> ReLU -> BatchNorm (the normalisation comes AFTER the ReLU)
Convolution  2 units of 64, 3 of 128, 3 of 256, 1 of 512 channels; 2x2 average pooling between the blocks
Classifier   global average pooling -> FC 512 -> ReLU -> BatchNorm -> FC K
Size         11 trainable layers, 3,381,796 parameters at K = 100, 247 MMAC per 32x32 image; any image size >= 8
Not in the text, taken from the authors' code: biases in every layer, padding 1, Keras' BatchNorm (eps 1e-3,
running average .99 = torch momentum .01), Glorot-uniform kernels, no L2 penalty on the last layer's kernel.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.architectures.init import check_batch_norm, initialise
from depthlab.fused import Conv2d, act_bn, avg_pool

BLOCKS = ((64, 64), (128, 128, 128), (256, 256, 256), (512,))


class Unit(nn.Module):
    """Conv3x3 -> ReLU -> BatchNorm. (B, in, H, W) -> (B, out, H, W)"""

    def __init__(self, channels_in: int, channels_out: int, eps: float, momentum: float):
        super().__init__()
        self.conv = Conv2d(channels_in, channels_out, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels_out, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return act_bn(self.bn, self.conv(x))


class Plain11(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes); H, W >= 8.

    Args:
        num_classes: K.
        init: name of a kernel initialiser, see `depthlab.architectures.init`.
        bn_eps, bn_momentum: of every BatchNorm (torch's meaning of momentum).
    """

    no_weight_decay = ("classifier.weight",)  # [authors' code]

    def __init__(
        self,
        num_classes: int = 100,
        init: str = "glorot_uniform",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.01,
    ):
        super().__init__()
        check_batch_norm(bn_eps, bn_momentum)
        blocks, channels = [], 3
        for widths in BLOCKS:
            units = []
            for width in widths:
                units.append(Unit(channels, width, bn_eps, bn_momentum))
                channels = width
            blocks.append(nn.Sequential(*units))
        self.blocks = nn.ModuleList(blocks)
        self.hidden = nn.Linear(channels, 512)
        self.hidden_bn = nn.BatchNorm1d(512, eps=bn_eps, momentum=bn_momentum)
        self.classifier = nn.Linear(512, num_classes)
        initialise(self, init)

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            if k > 0:
                x = avg_pool(x)  # 32 -> 16 -> 8 -> 4
            x = block(x)
        x = avg_pool(x, x.shape[2:]).flatten(1)  # (B, 512); not mean: its gradient keeps channels_last
        x = self.hidden_bn(F.relu(self.hidden(x)))
        return self.classifier(x)
