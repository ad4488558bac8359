"""Weights & Biases and TensorBoard, beside the metrics.csv that every run writes.

W&B: one W&B run per run, `id` and name = the run's name, `group` = the experiment. Without a key it is offline and
never asks (`wandb sync <folder>/wandb/offline-run-*` sends it later); nothing is written outside the run's folder.
"""

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from depthlab.problem import Problem

# Defaults a user's own environment overrides: no chatter, no error reports, no copy of the code.
QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_CONSOLE": "off",
}


def has_key() -> bool:
    """Whether W&B would find an API key: in WANDB_API_KEY or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_loggers(config: dict[str, Any], name: str, folder: Path) -> list[Logger]:
    """What `logger=` asks for.

    Args:
        config: resolved; reads `logger`, `study`, `arch`, `sched`.
        name: the run's name.
        folder: the run's folder, where the logger's files go.

    Raises:
        Problem: the package that it needs is not installed.
    """
    kind = config["logger"]["name"]
    if kind == "csv":
        return []
    try:
        logger = tensorboard(folder) if kind == "tensorboard" else wandb_run(config, name, folder)
    except ModuleNotFoundError as error:
        raise Problem(f"logger={kind}: {error}; pip install 'depthlab[loggers]', or logger=csv") from error
    logger.log_hyperparams(config)
    return [logger]


def tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(save_dir=folder, name="", version="")


def wandb_run(config: dict[str, Any], name: str, folder: Path) -> WandbLogger:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    for key in ("CACHE", "DATA", "CONFIG", "ARTIFACT"):
        os.environ.setdefault(f"WANDB_{key}_DIR", str(folder / "wandb"))
    (folder / "wandb").mkdir(parents=True, exist_ok=True)  # W&B would fall back to the system's temporary folder
    mode = config["logger"]["mode"] or ("online" if has_key() else "offline")
    logger = WandbLogger(
        project=config["logger"]["project"],
        name=name,
        id=name,
        group=config["study"],
        job_type="train",
        tags=[config["arch"]["name"], config["sched"]["name"], config["data"]["name"]],
        save_dir=folder,
        offline=mode == "offline",
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning hands it on though unset, and W&B warns of it
    return logger


def log_final(loggers: list[Logger], numbers: dict[str, float]) -> None:
    """The run's final numbers for W&B's summary; TensorBoard has them as test/... and train_clean/..."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
