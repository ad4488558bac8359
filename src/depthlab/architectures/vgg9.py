"""VGG-9 with BatchNorm: no shortcuts, and few enough layers to train without (Li et al. 2018, Fig. 9).

Unit         Conv3x3 -> BatchNorm -> ReLU
Convolution  2 units of 64, 2 of 128, 3 of 256 channels; 2x2 maximum pooling after each group
Classifier   flatten 4096 -> FC 256 -> BatchNorm -> ReLU -> FC K
Size         7 + 2 layers, 2,789,706 parameters at K = 10, 192 MMAC per 32x32 image; this image size only
The slides name the network; layers, biases in every layer and the initialisation are those of the authors' code.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from depthlab.architectures.init import check_batch_norm, initialise
from depthlab.fused import Conv2d, conv_bn_act

GROUPS = ((64, 64), (128, 128), (256, 256, 256))


class VGG9(nn.Module):
    """(B, 3, 32, 32) -> logits (B, num_classes).

    Args:
        num_classes: K.
        init, init_scale: a kernel initialiser (see `depthlab.architectures.init`) and what multiplies its draws.
        bn_eps, bn_momentum: of every BatchNorm (torch's meaning of momentum).
    """

    no_weight_decay = ()

    def __init__(
        self,
        num_classes: int = 10,
        init: str = "kaiming_fan_in",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        init_scale: float = 1.0,
    ):
        super().__init__()
        check_batch_norm(bn_eps, bn_momentum)
        groups, channels = [], 3
        for widths in GROUPS:
            units = nn.Sequential()
            for width in widths:
                units.append(Conv2d(channels, width, 3, padding=1))
                units.append(nn.BatchNorm2d(width, eps=bn_eps, momentum=bn_momentum))
                units.append(nn.ReLU())
                channels = width
            groups.append(units)
        self.groups = nn.ModuleList(groups)
        self.hidden = nn.Linear(channels * 4 * 4, 256)
        self.hidden_bn = nn.BatchNorm1d(256, eps=bn_eps, momentum=bn_momentum)
        self.classifier = nn.Linear(256, num_classes)
        initialise(self, init, init_scale)

    def forward(self, x: Tensor) -> Tensor:
        for group in self.groups:
            units = list(group)
            for conv, bn in zip(units[::3], units[1::3]):  # each with its ReLU
                x = conv_bn_act(conv, bn, x)
            x = F.max_pool2d(x, 2)  # 32 -> 16 -> 8 -> 4
        return self.classifier(F.relu(self.hidden_bn(self.hidden(x.flatten(1)))))
