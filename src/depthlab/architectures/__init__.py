"""Network families, one file each: plain `nn.Module`s that map (B, 3, H, W) to logits (B, K)."""

from depthlab.architectures.multilevel import MultilevelResNet
from depthlab.architectures.plain11 import Plain11
from depthlab.architectures.resnet import ResNet
from depthlab.architectures.simple import DominantNet, SimpleNet
from depthlab.architectures.vgg9 import VGG9

__all__ = ["VGG9", "DominantNet", "MultilevelResNet", "Plain11", "ResNet", "SimpleNet"]
