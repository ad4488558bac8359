"""depthlab: what makes a deep network trainable - depth, skip connections, or the way it is trained?"""

from importlib import import_module
from typing import Any

HOMES = {
    "Classifier": "depthlab.classifier:Classifier",
    "ImageData": "depthlab.data:ImageData",
    "MultilevelResNet": "depthlab.architectures:MultilevelResNet",
    "Plain11": "depthlab.architectures:Plain11",
    "ResNet": "depthlab.architectures:ResNet",
    "SimpleNet": "depthlab.architectures:SimpleNet",
    "DominantNet": "depthlab.architectures:DominantNet",
    "plain11": "depthlab.architectures:Plain11",  # torchvision's habit
}
__all__ = ["Classifier", "DominantNet", "ImageData", "MultilevelResNet", "Plain11", "ResNet", "SimpleNet", "plain11"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:  # torch and Lightning are imported when they are needed: `--help` need not wait for them
        raise AttributeError(f"module 'depthlab' has no attribute {name!r}")
    module, _, attribute = HOMES[name].partition(":")
    return getattr(import_module(module), attribute)
