"""Sources -> arrays -> batches on the training device, augmented there."""

from typing import Any

from depthlab.data.batches import Batches

__all__ = ["Batches", "ImageData"]


def __getattr__(name: str) -> Any:
    if name != "ImageData":  # Lightning is imported when it is needed: a report need not wait for it
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from depthlab.data.module import ImageData

    return ImageData
