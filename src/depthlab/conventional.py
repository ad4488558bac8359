"""What ours is measured against: training as public CIFAR scripts do it, written anew.

PIL transforms image by image, `DataLoader`, fp32, NCHW, eager, plain SGD, loss and accuracy read back in every step:
the habits of akamaster/pytorch_resnet_cifar10 and kuangliu/pytorch-cifar.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from depthlab.data.sources import Arrays


class PILImages(Dataset):
    """Training images as torchvision's CIFAR classes give them: in memory, a PIL image each, then transforms.

    Args:
        arrays: their training images and labels, mean and std.
        augment: crop (pad 4) and flip as well.
    """

    def __init__(self, arrays: Arrays, augment: bool = True) -> None:
        self.images, self.labels = np.array(arrays.train_images), arrays.train_labels.tolist()
        size = self.images.shape[1]
        moves = [transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()] if augment else []
        normalize = transforms.Normalize([m / 255 for m in arrays.mean], [s / 255 for s in arrays.std])
        self.transform = transforms.Compose([*moves, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(arrays: Arrays, batch_size: int, workers: int, pin_memory: bool = False) -> DataLoader:
    """Batches (x (B, 3, H, W) float32, y (B,) int64) in a new order each epoch."""
    return DataLoader(
        PILImages(arrays),
        batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def training(net: nn.Module, batches: DataLoader, device: torch.device) -> Iterator[tuple[float, float]]:
    """One training step per `next`, without end; yields the batch's loss and accuracy in percent."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    net.train()
    while True:
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss = loss.item()
            accuracy = 100 * (logits.argmax(1) == y).float().mean().item()
            yield total_loss, accuracy
