"""What a finished run leaves behind, and what makes two runs the same run.

`result.json` in the run's folder is written last, beside and renamed: its existence means *done*.
"""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = 1
SECTIONS = ("arch", "sched", "augment", "optim", "data", "trainer")
# Keys that only place or watch a run. Everything else changes the numbers and belongs to its identity.
NOT_IDENTITY = {
    "budget": "stands at the top",
    "dir": "where the arrays lie",
    "root": "where the image folder lies",
    "eval_batch_size": "evaluation is exact at any size",
    "accelerator": "a place",
    "strategy": "a place",
    "num_nodes": "counted in devices",
    "channels_last": "changes rounding only",
    "fused": "changes rounding only; the record says whether it was on",
    "graph": "changes rounding only; the record says whether steps were replayed",
    "check_val_every_n_epoch": "watches",
    "limit_val_batches": "watches",
    "classes": "checks the arrays",
}
WHEN = ("at", "every", "at_steps", "every_steps")  # of `analyses`: when to measure


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that changes a run's numbers."""
    identity: dict[str, Any] = {
        section: {k: v for k, v in config[section].items() if k not in NOT_IDENTITY} for section in SECTIONS
    }
    optimizer = config["optim"]["optimizer"]
    beside_the_point = ("fused", "_partial_", "lr")  # lr: the schedule sets it before every step
    identity["optim"]["optimizer"] = {k: v for k, v in optimizer.items() if k not in beside_the_point}
    trainer = identity["trainer"]
    trainer["devices"] *= config["trainer"].get("num_nodes", 1)
    if trainer["devices"] == 1:  # BatchNorm sees each device's share: more than one device changes the numbers
        del trainer["sync_batchnorm"]
    if not trainer.get("compile"):
        trainer.pop("compile", None)
    identity["trainer"] = {k: v for k, v in trainer.items() if v is not None}
    if config["grow"]["name"] != "none":
        identity["grow"] = {k: v for k, v in config["grow"].items() if k not in NOT_IDENTITY}
    return canonical(identity | {"seed": config["seed"], "budget": config["budget"]})


def mode(trainer: dict[str, Any]) -> str:
    """ "exact", single or double precision and deterministic, as trainer=exact; or "fast"."""
    whole = trainer.get("precision") in ("32-true", "64-true")
    return "exact" if whole and trainer.get("deterministic") is True and not trainer.get("compile") else "fast"


def canonical(value: Any) -> Any:
    """10 and 10.0 are one number."""
    if isinstance(value, dict):
        return {key: canonical(v) for key, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_name(config: dict[str, Any]) -> str:
    """`<arch>-<sched>[-<grow>]-<data>-s<seed>-<8 hex of the identity>`, the name of the run's folder."""
    identity = identity_of(config)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    names = [identity[section]["name"] for section in ("arch", "sched", "grow", "data") if section in identity]
    return "-".join([*names, f"s{config['seed']}", digest])


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside and rename: a reader sees the whole file or the old one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics", "numpy", "depthlab")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # importlib.metadata.PackageNotFoundError: used from a copy, not installed
            continue
    return found


def provenance(device: Any = "cpu") -> dict[str, Any]:
    """Where and with what a number was measured."""
    return {"hardware": hardware(device), "versions": versions(), "git": git_state()}


def git_state() -> dict[str, Any] | None:
    """{"commit", "dirty"} of the source tree, None outside of git."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: Any = "cpu") -> str:
    """The name of the processor or GPU behind a torch device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


def training_flops(net: Any, size: int) -> int:
    """Floating-point operations to train `net` on one image: 3 x forward, 2 per multiply-add.

    `net` may lie on the meta device, where counting costs nothing.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    was_training = net.training
    net.eval()
    p = next(net.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, size, size, device=p.device, dtype=p.dtype))
    net.train(was_training)
    return 3 * counter.get_total_flops()
