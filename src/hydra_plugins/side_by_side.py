"""How many runs at once give the most images per second on this machine: `launcher.jobs=auto`.

The sweep's first job is tried for `SECONDS` as 1, 2, 4 ... processes, with the threads or the share of a GPU that each
would get. All warm up, wait for one another, and only then count, so that each is measured while all are running.
Tried are as many as there are cores (on GPUs: up to `SHARED` on each), as long as the total grows by `GAIN` and they
fit into memory. Nothing of a trial is kept.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 4.0
WARM_UP = 3  # steps
SHARED = 8
GAIN = 1.03
MEMORY = 0.8  # of what is available


def choose(start: Callable[[int, Path], list[subprocess.Popen]], candidates: list[int]) -> tuple[int, str]:
    """The best of `candidates` (rising), and a sentence that says why.

    Args:
        start: starts k trials that report into the given folder.
    """
    best, said = (1, 0.0), []
    for k in candidates:
        with tempfile.TemporaryDirectory() as folder:
            found = together(start(k, Path(folder)), Path(folder))
            last = last_line(Path(folder) / "log") if found is None else ""
        if found is None:
            said.append(f"{k}: did not run, {last}")
            break
        rate = sum(report["images_per_second"] for report in found)
        said.append(f"{k}: {rate:.0f} images/s")
        if rate < GAIN * best[1]:
            break
        best = (k, rate)
        room = candidates[0] * min(report["room"] for report in found)
        if (following := next((c for c in candidates if c > k), 0)) > room:
            said.append(f"{following}: too much memory, there is room for {room:.1f}")
            break
    return best[0], f"launcher.jobs=auto: {best[0]} at once ({'; '.join(said)})"


def together(trials: list[subprocess.Popen], folder: Path) -> list[dict] | None:
    """Let the trials count at the same time, and stop them; None if one of them failed."""
    try:
        for stage in ("ready", "report"):
            while len(list(folder.glob(f"*.{stage}"))) < len(trials):
                if any(trial.poll() is not None for trial in trials):
                    return None
                time.sleep(0.05)
            (folder / "go").touch()
        return [json.loads(path.read_text()) for path in folder.glob("*.report")]
    finally:
        for trial in trials:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(trial.pid, signal.SIGKILL)  # its other ranks, too
            trial.kill()
            trial.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "without a word")


def room(device: Any) -> float:
    """How many processes like this one fit into the memory there is, of the device or of the machine."""
    import torch

    if device.type == "cuda":
        return MEMORY * torch.cuda.mem_get_info(device)[1] / torch.cuda.max_memory_reserved(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    available = [int(line.split()[1]) * 1024 + used for line in lines if line.startswith("MemAvailable")]
    return MEMORY * (available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / used


def trial(overrides: list[str], folder: Path) -> None:
    """One run that counts its images per second, until it is killed."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch import Callback

    from configuration import CONF, checked
    from train import assemble

    class Pace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if not trainer.is_global_zero:  # one report for all ranks
                return
            step, name = trainer.global_step, folder / str(os.getpid())
            if step == WARM_UP:
                name.with_suffix(".ready").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
                self.began, self.images = time.perf_counter(), 0
            elif step > WARM_UP:
                self.images += len(batch[1])
                seconds = time.perf_counter() - self.began
                if seconds > SECONDS and not name.with_suffix(".report").exists():
                    pl_module.running()  # waits for the device
                    seconds = time.perf_counter() - self.began
                    rate = self.images * trainer.world_size / seconds
                    about = {"images_per_second": rate, "room": room(pl_module.device)}
                    name.with_suffix(".part").write_text(json.dumps(about))
                    name.with_suffix(".part").rename(name.with_suffix(".report"))

    with initialize_config_dir(str(CONF), version_base="1.3"):
        watching = {"logger": {"name": "csv"}, "analyses": {}, "trajectory": {"every": None}}
        config = checked(compose("train", overrides)) | watching
    parts = assemble(config, folder / f"run{os.getpid()}", [Pace()], max_epochs=10**6, limit_val_batches=0)
    parts.trainer.fit(parts.model, parts.data)


if __name__ == "__main__":
    trial(sys.argv[2:], Path(sys.argv[1]))
