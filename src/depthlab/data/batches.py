"""An epoch of batches, as a function of (seed, epoch) alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from depthlab.problem import Problem


def generator(seed: int, what: int | str) -> torch.Generator:
    """A CPU generator for (seed, what); neighbouring seeds and epochs get unrelated streams.

    Hashed because torch's CPU generator reads only the low 32 bits of its seed, and seed + epoch would repeat streams.
    """
    digest = hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batches:
    """Iterable over standardised batches of images that already are on the training device; it has a length.

    Order and augmentation draws of an epoch are made at once on the CPU from (seed, epoch), so any number of processes
    sees the same images in the same order with the same draw for each: process `rank` takes its share of every *global*
    batch.

    With `shuffle` or `augment` this is a training loader: shares must be equal, or gradients averaged over processes
    would not be the global batch's. Otherwise it is an evaluation loader: batches of about equal size, at most
    `batch_size`, and every image dealt to exactly one process; all processes have the same number of batches, because
    DistributedDataParallel's forward is a collective.

    Args:
        images: (N, H, W, 3) uint8, on the training device.
        labels: (N,) int64, on the same device.
        batch_size: of all processes together.
        mean, std: per channel, on the 0-255 scale.
        augment: object with `draw(n, size, generator) -> (n, k)`, `__call__(images, draws) -> images` and
            `after_standardising` (see `depthlab.data.augment`), or None.
        shuffle: a new order in every epoch.
        seed: of order and draws.
        rank, world_size: this process, and how many there are.
        drop_last: leave out a last training batch that is not full.
        memory_format: "contiguous" or "channels_last", the strides of x.
        subset: (n,) int64, the only images to use, in this order; None for all.

    Yields:
        x (b, 3, H, W) float32 and y (b,) int64, on the images' device. Where `deferred` is set, what `finish` makes
        them of: draws (b, k) or None, and the images' indices (b,).

    Raises:
        Problem: where the batches cannot be dealt equally over the processes.
    """

    batch_sampler = None  # Lightning looks for it where there is a `sampler`

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        memory_format: str = "contiguous",
        subset: Tensor | None = None,
    ) -> None:
        if memory_format not in ("contiguous", "channels_last"):
            raise Problem(f"memory_format must be contiguous or channels_last, got {memory_format!r}")
        if not 0 <= rank < world_size:
            raise Problem(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise Problem(
                f"images must be (N, H, W, 3) uint8 with N labels, got {tuple(images.shape)} {images.dtype} "
                f"and {len(labels)} labels"
            )
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.augment, self.shuffle, self.seed, self.memory_format = augment, shuffle, seed, memory_format
        self.rank, self.world_size = rank, world_size
        self.subset = None if subset is None else subset.cpu()
        self.count = len(images) if subset is None else len(subset)
        self.epoch, self.deferred = 0, False
        # One row of pixels long: a broadcast over 96 numbers is 5 times faster on a CPU than one over 3.
        self.mean, self.std = (
            torch.as_tensor(v, dtype=torch.float32).repeat(images.shape[2]).to(images.device) for v in (mean, std)
        )
        training = shuffle or augment is not None
        self.bounds = (
            self.deal(self.count, batch_size, world_size, drop_last) if training else self._evaluation_bounds()
        )

    @staticmethod
    def deal(n: int, size: int, ranks: int, drop_last: bool) -> list[tuple[int, int]]:
        """(start, stop) of each training batch of `n` images.

        Raises:
            Problem: the batches cannot be dealt equally over `ranks`, or leave a rank with a single image.
        """
        if size % ranks:
            raise Problem(
                f"data.batch_size={size} is the batch of all devices together and does not divide by "
                f"trainer.devices={ranks}; the next that does is {(size // ranks + 1) * ranks}"
            )
        if size // ranks < 2:
            raise Problem(
                f"data.batch_size={size} gives each of {ranks} device(s) 1 image, too few to normalise a batch"
            )
        if n < size and drop_last:
            raise Problem(f"data.drop_last=true leaves no batch: {n} images are fewer than data.batch_size={size}")
        last = n % size
        if not last or drop_last:
            return [(a, a + size) for a in range(0, n - last, size)]
        way_out = "set data.drop_last=true or another data.batch_size"
        if last % ranks:
            raise Problem(
                f"the last batch has {last} images ({n} in batches of data.batch_size={size}), "
                f"which do not divide by trainer.devices={ranks}; {way_out}"
            )
        if last // ranks < 2:
            raise Problem(
                f"the last batch gives each device 1 image ({n} in batches of data.batch_size={size} on {ranks}), "
                f"which batch normalisation cannot take; {way_out}"
            )
        return [(a, min(a + size, n)) for a in range(0, n, size)]

    def _evaluation_bounds(self) -> list[tuple[int, int]]:
        n = self.count
        if n < self.world_size:
            raise Problem(f"{n} images to evaluate are fewer than trainer.devices={self.world_size}; use fewer devices")
        batches = min(-(-n // self.batch_size), n // self.world_size)  # at least one image for everybody in each
        return [(n * i // batches, n * (i + 1) // batches) for i in range(batches)]

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def sampler(self) -> "Batches":
        """Itself: Lightning calls `loader.sampler.set_epoch(epoch)` before every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: the epoch is read at the first next(), as Lightning may ask for the iterator before it sets it.
        random, device = generator(self.seed, self.epoch), self.images.device
        order = torch.randperm(self.count, generator=random) if self.shuffle else None
        draws = None
        if self.augment is not None:
            draws = self.augment.draw(self.count, self.images.shape[1], random).to(device)
        if self.subset is not None:
            order = self.subset if order is None else self.subset[order]
        if order is None and self.deferred:
            order = torch.arange(self.count)
        if order is not None:
            order = order.to(device)
        for start, stop in self.bounds:
            share = stop - start
            first, end = (start + share * r // self.world_size for r in (self.rank, self.rank + 1))
            here = slice(first, end)
            part = None if draws is None else draws[here], here if order is None else order[here]
            yield part if self.deferred else self.finish(*part)

    def finish(self, draws: Tensor | None, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The batch of the images `index` with their draws."""
        if isinstance(index, slice):
            x, y = self.images[index], self.labels[index]
        else:
            x, y = self.images.index_select(0, index), self.labels.index_select(0, index)
        return self._standardised(x, draws), y

    def _standardised(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """Augment and standardise: (b, H, W, 3) uint8 -> (b, 3, H, W) float32."""
        late = self.augment is not None and self.augment.after_standardising
        if self.augment is not None and not late:
            x = self.augment(x, draws)
        b, h, w, c = x.shape
        x = x.to(torch.float32).reshape(b, h, w * c).sub_(self.mean).div_(self.std).view(b, h, w, c)
        if late:
            x = self.augment(x, draws)
        x = x.permute(0, 3, 1, 2)  # the strides of channels_last, as it is
        return x.contiguous() if self.memory_format == "contiguous" else x
