"""Collects what a finished run leaves behind: curves per epoch, times, and at the end the numbers of `result.json`.

`metrics.csv` in the run's folder is brought up to date at every epoch's end; the curves travel in the checkpoint, so
a resumed run has all of them.
"""

import csv
import io
import math
import os
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from depthlab import fused
from depthlab.records import provenance, write_atomically


def number(key: str, metrics: dict[str, float]) -> float | None:
    """A metric as JSON can hold it; errors lose the noise of fp32 (4 digits tell a million images apart)."""
    x = metrics.get(key)
    if x is None or not math.isfinite(x):
        return None
    return round(float(x), 4) if key.endswith("error") else float(x)


class Record(Callback):
    """Args:
    folder: the run's folder, or None to keep everything in memory.
    identity: stored in the checkpoint, so that a checkpoint of another run is recognised.
    """

    def __init__(self, folder: Path | None = None, identity: dict[str, Any] | None = None):
        self.folder = folder
        self.identity = identity
        self.rows: list[dict[str, Any]] = []
        self.started: str | None = None
        self.sessions: list[dict[str, Any]] = []  # one per process that trained: where it ran, its first epoch
        self.final: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "started": self.started, "sessions": self.sessions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.started, self.sessions = (state_dict[key] for key in ("rows", "started", "sessions"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["depthlab_identity"] = self.identity

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.started or datetime.now(timezone.utc).isoformat(timespec="seconds")
        session = {
            "first_epoch": trainer.current_epoch,
            "device": pl_module.device.type,
            "devices": trainer.world_size,
            "threads": torch.get_num_threads(),
            "fused": fused.enabled(),
            "side_by_side": int(os.environ.get("DEPTHLAB_SIDE_BY_SIDE", 1)),  # runs sharing the machine: mind its times
            **provenance(trainer.strategy.root_device),
        }
        self.sessions.append(session)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began, self.images, self.evaluating = self.now(pl_module), 0, 0.0
        self.evaluated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: tuple, batch_idx: int
    ) -> None:
        self.images += len(batch[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waited = self.now(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.evaluated = True
            self.evaluating += self.now(pl_module) - self.waited

    @staticmethod
    def now(pl_module: LightningModule) -> np.ndarray:
        """Seconds of the clock, and of this process on all cores, which say more on a machine that others share."""
        if pl_module.device.type != "cpu":
            torch.accelerator.synchronize(pl_module.device)
        return np.array([time.perf_counter(), time.process_time()])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds, cpu_seconds = (self.now(pl_module) - self.began - self.evaluating).tolist()
        row = {
            "epoch": trainer.current_epoch,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images": self.images * trainer.world_size,
        }
        stale = () if trainer.is_last_batch else ("train/",)  # a diverged epoch ends early
        stale += () if self.evaluated else ("val/",)
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(stale)}
        row |= {key.replace("/", "_"): number(key, metrics) for key in metrics}
        self.rows.append(row)
        self.sessions[-1]["fused"] = fused.enabled()  # a GPU is tried in the first step
        for logger in trainer.loggers:
            logger.log_metrics({"seconds_per_epoch": row["seconds"]}, step=trainer.global_step - 1)
        if self.folder is not None and trainer.is_global_zero:
            write_atomically(self.folder / "metrics.csv", self.csv())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.final = dict(trainer.callback_metrics)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns())
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Final numbers, curves and times, as `result.json` holds them."""
        seconds = [row["seconds"] for row in self.rows]
        # speed: of the last process that trained, its first (warming up) epoch left out where it has another
        last = self.rows[self.sessions[-1]["first_epoch"] :] or self.rows
        later = last[1:] or last
        later_seconds = sum(row["seconds"] for row in later)
        return {
            **{key: value for key, value in self.sessions[-1].items() if key != "first_epoch"},
            "sessions": self.sessions,
            "precision": trainer.precision,
            "graph": getattr(pl_module, "replaying", False),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "epochs": len(self.rows),
            "steps": trainer.global_step,
            "test_error": number("test/error", self.final),
            "test_loss": number("test/loss", self.final),
            "train_loss": number("train_clean/loss", self.final),
            "train_error": number("train_clean/error", self.final),
            "curves": {key: [row.get(key) for row in self.rows] for key in self.columns()},
            "train_seconds": sum(seconds),
            "first_epoch_seconds": seconds[0] if seconds else None,
            "seconds_per_epoch": statistics.median(r["seconds"] for r in later) if later else None,
            "images_per_second": sum(r["images"] for r in later) / later_seconds if later_seconds else None,
            "started": self.started,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
