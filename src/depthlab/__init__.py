"""depthlab: what makes a deep network trainable - depth, skip connections, or the way it is trained?"""

from importlib import import_module
from typing import Any

HOMES = {
    "Classifier": "depthlab.classifier",
    "ImageData": "depthlab.data",
    "Plain11": "depthlab.architectures",
    "ResNet": "depthlab.architectures",
}
__all__ = ["Classifier", "ImageData", "Plain11", "ResNet"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:  # torch and Lightning are imported when they are needed: `--help` need not wait for them
        raise AttributeError(f"module 'depthlab' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
