"""Sources -> arrays -> batches on the training device, augmented there."""

from depthlab.data.batches import Batches
from depthlab.data.module import ImageData

__all__ = ["Batches", "ImageData"]
