"""The data of one run, for Lightning or for a loop of one's own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from depthlab.data import sources
from depthlab.data.batches import Batches, generator
from depthlab.problem import Problem


class ImageData(LightningDataModule):
    """Images of `<dir>/<name>` as batches on the training device; made from `source` first where they do not exist.

    Args:
        name: the folder's name, and its source where that is not given.
        source: "cifar10", "cifar100", "stl10", "digits" or "imagefolder".
        dir: data folder; None for the environment variable DEPTHLAB_DATA, or else "data".
        classes, size: what the arrays are checked against; None takes what they have. `imagefolder` resizes to `size`.
        batch_size, eval_batch_size: of all devices together; None evaluates 250 at once on a CPU, in whose cache their
            activations stay, else 500.
        val_size: number of training images held out, about equally of every class and chosen by `seed`; 0 holds out
            none, and validation then measures the test set's curve (`evaluated_on` says which).
        drop_last: leave out a last training batch that is not full.
        augment: of the training batches, see `depthlab.data.augment`; None for none.
        mean, std: three numbers on the 0-255 scale in place of the training set's measured ones.
        seed: of order, augmentation and held-out images.
        root: the folder that `imagefolder` reads.
        memory_format: "contiguous" or "channels_last", the strides of the batches.

    Example::

        data = ImageData("cifar100", augment=Shift())
        Trainer(max_epochs=1).fit(Classifier(Plain11(data.num_classes)), data)
    """

    def __init__(
        self,
        name: str = "digits",
        *,
        source: str | None = None,
        dir: str | Path | None = None,
        classes: int | None = None,
        size: int | None = None,
        batch_size: int = 100,
        eval_batch_size: int | None = None,
        val_size: int = 0,
        drop_last: bool = False,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        root: str | Path | None = None,
        memory_format: str = "contiguous",
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("val_size", val_size, 0),
            ("classes", classes, 1),
            ("size", size, 1),
        ):
            optional = key in ("eval_batch_size", "classes", "size") and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise Problem(f"data.{key} must be a whole number >= {least}, got {value!r}")
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise Problem(f"data.{key} must have three numbers, on the 0-255 scale, got {list(values)}")
        self.name, self.dir, self.source, self.root = name, dir, source, root
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.val_size, self.augment, self.seed, self.memory_format = val_size, augment, seed, memory_format
        self.evaluated_on = "val" if val_size else "test"
        self._classes, self._size, self._mean, self._std = classes, size, mean, std
        self._arrays: sources.Arrays | None = None
        self._device: torch.device | None = None

    @property
    def arrays(self) -> sources.Arrays:
        """The verified, memory-mapped arrays."""
        if self._arrays is None:
            self._arrays = sources.load(
                self.name, self.dir, source=self.source, classes=self._classes, size=self._size, root=self.root
            )
        return self._arrays

    @property
    def classes(self) -> tuple[str, ...]:
        return self.arrays.classes

    @property
    def num_classes(self) -> int:
        return len(self.classes) if self._classes is None else self._classes

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.arrays.train_images.shape[1] if self._size is None else self._size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on the 0-255 scale, of the whole training set unless given."""
        return tuple(self.arrays.mean if self._mean is None else self._mean)

    @property
    def std(self) -> tuple[float, ...]:
        std = tuple(self.arrays.std if self._std is None else self._std)
        if min(std) <= 0:
            raise Problem(f"data.std must be > 0 in every channel to divide by it, got {list(std)}; set data.std")
        return std

    def prepare_data(self) -> None:
        """Make the arrays where they do not exist; Lightning calls this in one process only, before `setup`."""
        _ = self.arrays

    def check(self, devices: int = 1) -> None:
        """Everything that can be wrong with the images or with dealing them over `devices`, before any training.

        Raises:
            Problem: naming the file or the keys.
        """
        self.prepare_data()
        kept = len(self.arrays.train_labels) - self.val_size
        if kept <= 0:
            raise Problem(f"data.val_size={self.val_size} leaves none of the {kept + self.val_size} training images")
        Batches.deal(kept, self.batch_size, devices, self.drop_last)

    def setup(self, stage: str | None = None) -> None:
        """Put images (uint8) and labels on the trainer's device, once; a CPU reads the shared memory map, uncopied."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if self._device == device:
            return
        arrays = self.arrays
        if self.val_size >= len(arrays.train_labels):
            raise Problem(f"data.val_size={self.val_size} leaves none of {len(arrays.train_labels)} training images")
        labels = torch.from_numpy(arrays.train_labels)
        self._kept, self._held_out = held_out(labels, self.val_size, self.seed) if self.val_size else (None, None)
        self._train = torch.from_numpy(arrays.train_images).to(device), labels.to(device)
        self._test = torch.from_numpy(arrays.test_images).to(device), torch.from_numpy(arrays.test_labels).to(device)
        self._device = device

    def train_dataloader(self) -> Batches:
        options = {"shuffle": True, "augment": self.augment, "drop_last": self.drop_last}
        return self._batches(self._train, self.batch_size, subset=self._kept, **options)

    def val_dataloader(self) -> Batches:
        """The held-out images, or the test set where there are none."""
        if self.val_size:
            return self._batches(self._train, self.evaluated_at_once(self._device), subset=self._held_out)
        return self._batches(self._test, self.evaluated_at_once(self._device))

    def test_dataloader(self) -> list[Batches]:
        """The test set, and the training images without augmentation."""
        size = self.evaluated_at_once(self._device)
        return [self._batches(self._test, size), self._batches(self._train, size, subset=self._kept)]

    def evaluated_at_once(self, device: torch.device) -> int:
        """Images of a batch of evaluation there."""
        return self.eval_batch_size or (250 if device.type == "cpu" else 500)

    def _batches(self, data: tuple[Tensor, Tensor], batch_size: int, **options) -> Batches:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return Batches(
            *data,
            batch_size,
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            memory_format=self.memory_format,
            **options,
        )


def held_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (N - count,) to train on and (count,) to hold out, both ascending.

    Every n/count-th image of a random order sorted by class, so that a class's share is its due, rounded up or down.
    """
    n = len(labels)
    order = torch.randperm(n, generator=generator(seed, "held-out"))
    order = order[torch.argsort(labels[order], stable=True)]
    out = torch.zeros(n, dtype=torch.bool)
    out[order[(2 * torch.arange(count) + 1) * n // (2 * count)]] = True
    return torch.nonzero(~out).flatten(), torch.nonzero(out).flatten()
