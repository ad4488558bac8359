"""A network that grows from 2 to 4 to 8 blocks per stage within 6 epochs of 3 steps: what the tests of growth share."""

import hashlib
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from callbacks import GrowDepth, MultilevelCosine
from depthlab import Classifier
from depthlab.architectures import MultilevelResNet
from depthlab.data import Batches

EPOCHS, AT, STEPS = 6, (2, 4), 3


def network(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return MultilevelResNet(**{"blocks": 2, "width": 4} | options)


def images(rank: int = 0, world_size: int = 1, n: int = 12 * STEPS, device: str = "cpu") -> list[Batches]:
    """To train on, in batches of 12, and to evaluate on."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 8, 8, 3), dtype=torch.uint8, generator=random).to(device)
    y = torch.randint(10, (n,), generator=random).to(device)
    options = {"mean": [127.0] * 3, "std": [70.0] * 3, "rank": rank, "world_size": world_size}
    return [Batches(x, y, 12, shuffle=True, **options), Batches(x, y, n, **options)]


def trainer(folder=None, *, max_epochs=EPOCHS, momentum="reset", lr_max=0.1, callbacks=(), **options) -> Trainer:
    """Stops after `max_epochs`; schedule and growth are those of the whole run of 6."""
    schedule = MultilevelCosine(epochs=EPOCHS, at=AT, lr_max=lr_max)
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0} | options,
        max_epochs=max_epochs,
        callbacks=[schedule, GrowDepth(at=AT, epochs=EPOCHS, momentum=momentum), *callbacks],
        enable_checkpointing=folder is not None,
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def classifier(net: nn.Module | None = None, **options) -> Classifier:
    return Classifier(network() if net is None else net, weight_decay=2e-4, **options)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names and bits."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(value.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()
