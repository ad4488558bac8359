"""`last.ckpt` at every epoch's end, whole or not at all.

Lightning writes checkpoints through a temporary folder that may lie on another file system: a kill or a full disk in
the middle then destroys the previous good file as well. Here it is written beside its target, flushed and renamed.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from depthlab.problem import Problem


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside, syncs, renames."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            beside.unlink(missing_ok=True)
            raise Problem(f"{path}: the checkpoint could not be written ({error}); is the disk full?") from error


def last_checkpoint(folder: Path) -> ModelCheckpoint:
    """`<folder>/last.ckpt`, replaced at every epoch's end. (`save_last=True` would skip epochs without a new best.)"""
    return ModelCheckpoint(
        dirpath=folder,
        filename="last",
        monitor=None,
        save_top_k=1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def resume_point(folder: Path, identity: dict[str, Any]) -> Path | None:
    """`<folder>/last.ckpt`, if there is one.

    Raises:
        Problem: it cannot be read, or another run wrote it.
    """
    path = folder / "last.ckpt"
    if not path.exists():
        return None
    way_out = "delete it to start this run afresh"
    try:
        written_by = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["depthlab_identity"] or {}
    except Exception as error:
        raise Problem(f"{path}: not a readable checkpoint of depthlab ({type(error).__name__}); {way_out}") from error
    if written_by != identity:
        there, here = leaves(written_by), leaves(identity)
        pairs = {key: (there.get(key, "not set"), here.get(key, "not set")) for key in here | there}
        other = sorted((key for key, (a, b) in pairs.items() if a != b), key=lambda key: not key.endswith("name"))
        said = ["{} is {} there and {} here".format(key, *pairs[key]) for key in other[:3]]
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise Problem(f"{path}: written by another run ({', '.join(said)}{more}); {way_out}")
    return path


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """{"arch.depth": 20, ...}"""
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in leaves(value, f"{path}.{key}" if path else key).items()}
