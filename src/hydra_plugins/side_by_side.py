"""How many runs at once give the most images per second on this machine: `launcher.jobs=auto`.

The sweep's first job is tried for `SECONDS` as 1, 2, 4 ... processes, with the threads or the share of a GPU that each
would get. All warm up, wait for one another, and only then count, so that each is measured while all are running.
Tried are as many as there are cores (on GPUs: up to `SHARED` on each), as long as the total grows by `GAIN` and they
fit into memory. Nothing of a trial is kept.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra_plugins.processes import kill_group, process, share

SECONDS = 4.0
WARM_UP = 5  # steps: a graph's eager ones and its capture are among them
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
            kill_group(trial)  # its other ranks, too
            trial.kill()
            trial.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "without a word")


def memory(device: Any) -> int:
    """Bytes that this process has held at most, of the device or of the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def room(device: Any) -> float:
    """How many processes like this one fit into the memory there is, of the device or of the machine."""
    import torch

    used = memory(device)
    if device.type == "cuda":
        return MEMORY * torch.cuda.mem_get_info(device)[1] / used
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    available = [int(line.split()[1]) * 1024 + used for line in lines if line.startswith("MemAvailable")]
    return MEMORY * (available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / used


def at_once(k: int, overrides: list[str], threads: int) -> list[dict[str, Any]]:
    """What k processes report that train the same run at the same time and share so many threads.

    Raises:
        RuntimeError: one of them failed, in its last words.
    """
    from depthlab.timing import QUIET

    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", __name__, folder, *overrides]
        with (Path(folder) / "log").open("wb") as log:
            more = {"OMP_NUM_THREADS": str(max(1, threads // k)), "PYTHONPATH": os.pathsep.join(sys.path)}
            trials = [process(line, share(k, []) | more, log) for _ in range(k)]
        found = together(trials, Path(folder))
        if found is None:
            raise RuntimeError(last_line(Path(folder) / "log"))
    ours = sum(report["cpu_seconds"] for report in found)
    for report in found:  # each has counted its siblings among the others
        if report["others"] is not None:
            whole = report["seconds"] * os.cpu_count()
            report["others"] = max(0.0, report["others"] - (ours - report["cpu_seconds"]) / whole)
            report["disturbed"] = report["others"] > QUIET
    return found


def trial(overrides: list[str], folder: Path) -> None:
    """One run that counts its images per second, until it is killed."""
    from hydra import compose, initialize_config_dir

    from quick_start import import_torchmetrics

    import_torchmetrics()
    from lightning.pytorch import Callback

    from configuration import CONF, checked
    from depthlab.timing import Stopwatch, age
    from train import assemble

    class Pace(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if not trainer.is_global_zero:  # one report for all ranks
                return
            step, name = trainer.global_step, folder / str(os.getpid())
            if step == 1:
                self.first = age()
            if step == WARM_UP:
                name.with_suffix(".ready").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
                self.watch, self.images = Stopwatch(pl_module.device), 0
                self.watch.start()
            elif step > WARM_UP:
                self.images += len(batch[1])
                if self.watch.running() > SECONDS and self.watch.measured is None:
                    self.watch.stop()
                    took = self.watch.measured
                    rate = self.images * trainer.world_size / took["seconds"]
                    held = {"room": room(pl_module.device), "memory": memory(pl_module.device)}
                    about = {"images_per_second": rate, "first_step_seconds": self.first, **held, **took}
                    name.with_suffix(".part").write_text(json.dumps(about))
                    name.with_suffix(".part").rename(name.with_suffix(".report"))

    with initialize_config_dir(str(CONF), version_base="1.3"):
        watching = {"logger": {"name": "csv"}, "analyses": {}, "trajectory": {"every": None}}
        config = checked(compose("train", overrides)) | watching
    parts = assemble(config, folder / f"run{os.getpid()}", [Pace()], max_epochs=10**6, limit_val_batches=0)
    parts.trainer.fit(parts.model, parts.data)


if __name__ == "__main__":
    trial(sys.argv[2:], Path(sys.argv[1]))
