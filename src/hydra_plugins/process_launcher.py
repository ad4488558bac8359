"""Hydra launcher: every job of a sweep is an operating-system process of its own, started without -m.

So DDP's child processes repeat a single run and not the sweep, a crash costs one job, and device memory, W&B runs and
global flags cannot leak from one job into the next. All jobs are checked before the first one starts; finished ones
are skipped; at the end stands a table, and the exit code is not 0 if a job failed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins import side_by_side
from hydra_plugins.processes import BUSY, StopSignal, command, cores, kill_group, process, share, visible_gpus

TAIL = 12  # lines of a failed job's log that are repeated at the end


@dataclass
class Job:
    """One run of the sweep."""

    number: int
    overrides: list[str]
    name: str
    folder: Path
    devices: int
    on_gpu: bool
    state: str = "waiting"  # skipped, running, done, failed, stopped, busy
    seconds: float = 0.0
    process: subprocess.Popen | None = None
    slots: list[str] = field(default_factory=list)  # GPUs
    shown: int = 0  # bytes of the log already shown

    @property
    def log(self) -> Path:
        return self.folder / "console.log"

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def tail(self) -> str:
        if not self.log.exists():
            return "(no output)"
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        return "\n".join([line for line in text.splitlines() if line.strip()][-TAIL:])


class ProcessLauncher(Launcher):
    """Runs `launcher.jobs` jobs side by side; on GPUs each gets `trainer.devices` of its own, or shares one."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = self.checked_jobs(job_overrides)
        waiting = [job for job in jobs if job.state == "waiting"]
        print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before, {len(waiting)} to run", flush=True)
        failed = True
        try:
            self.work(waiting, total=len(jobs))
            failed = any(job.state != "done" and job.state != "skipped" for job in jobs)
        finally:
            print(table(jobs), flush=True)
        if failed:
            sys.exit(1)
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=0) for job in jobs]

    def checked_jobs(self, job_overrides: Sequence[Sequence[str]]) -> list[Job]:
        """Compose and check every job before the first starts.

        Raises:
            Problem: with a line for each job that cannot run.
        """
        from configuration import data_problems, problems, resolve
        from depthlab.analysis.asked import unmeasured
        from depthlab.problem import Problem
        from depthlab.records import run_name

        jobs: dict[str, Job] = {}
        complaints: dict[str, str] = {}
        looked_at: set[str] = set()
        for overrides in map(list, job_overrides):
            config = resolve(self.hydra_context.config_loader.load_sweep_config(self.config, overrides))
            left_out = (config["paper"] or {}).get("leave_out") or []
            if any(all(config[k]["name"] == v for k, v in cell.items()) for cell in left_out):
                continue
            lines = problems(config)
            images = json.dumps([config["data"], config["seed"] if config["data"]["val_size"] else 0])
            if not lines and images not in looked_at:
                looked_at.add(images)
                lines = data_problems(config)
            for line in lines:
                complaints.setdefault(line, " ".join(overrides))
            if complaints:
                continue
            name = run_name(config)
            folder = Path(config["runs_dir"]) / name
            trainer = config["trainer"]
            on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda")
            job = Job(len(jobs) + 1, overrides, name, folder, trainer["devices"], on_gpu)
            job = jobs.setdefault(name, job)
            job.state = "skipped" if job.finished and not unmeasured(config, folder) else "waiting"
        if complaints:
            raise Problem("\n".join(f"{line}  [in the job {where}]" for line, where in complaints.items()))
        return list(jobs.values())

    def work(self, waiting: list[Job], total: int) -> None:
        """Keep up to `launcher.jobs` processes going until all have ended. No threads: jobs die with this one."""
        load = dict.fromkeys(visible_gpus(), 0)  # jobs on each
        at_once, grace = self.at_once(waiting, list(load)), self.config.launcher.grace
        running: list[Job] = []
        stop = StopSignal()
        todo = list(waiting)
        while (todo and not stop.received) or running:
            while todo and len(running) < at_once and not stop.received:
                job = todo.pop(0)
                if job.on_gpu:  # the least loaded ones; more jobs than GPUs share
                    job.slots = sorted(load, key=load.__getitem__)[: job.devices]
                for gpu in job.slots:
                    load[gpu] += 1
                self.start(job, total, at_once)
                running.append(job)
            for job in list(running):
                if at_once == 1:
                    show(job)
                if job.process.poll() is not None:
                    running.remove(job)
                    for gpu in job.slots:
                        load[gpu] -= 1
                    self.end(job, total, shown=at_once == 1)
            if stop.received and running:
                end_all(running, grace)
            time.sleep(0.1)
        if stop.received:
            raise SystemExit(128 + stop.received)

    def at_once(self, waiting: list[Job], gpus: list[str]) -> int:
        """`launcher.jobs`, measured where it is auto."""
        asked = self.config.launcher.jobs
        if asked != "auto" or len(waiting) < 2:
            return 1 if asked == "auto" else asked
        first = waiting[0]
        places = len(gpus) // first.devices if first.on_gpu and gpus else 1
        most = min(len(waiting), max(1, places) * side_by_side.SHARED if first.on_gpu and gpus else cores())
        candidates = [k for k in (places * 2**i for i in range(20)) if k < most] + [most]

        def start(k: int, folder: Path) -> list[subprocess.Popen]:
            slots = [gpus[i * first.devices % len(gpus) :][: first.devices] if gpus else [] for i in range(k)]
            line = [sys.executable, "-m", side_by_side.__name__, str(folder), *first.overrides]
            here = {"PYTHONPATH": os.pathsep.join(sys.path)}
            with (folder / "log").open("wb") as log:
                return [process(line, share(k, slots[i]) | here, log) for i in range(k)]

        print(f"launcher.jobs=auto: trying {first.name} {candidates} at once", flush=True)
        best, said = side_by_side.choose(start, candidates)
        print(said, flush=True)
        return best

    def start(self, job: Job, total: int, at_once: int) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        more = {"DEPTHLAB_JOB": f"{job.number}/{total}", **share(at_once, job.slots)}
        if at_once == 1 and sys.stdout.isatty():
            more["DEPTHLAB_TERMINAL"] = "1"
        print(f"[{job.number}/{total}] {job.name}: started, log in {job.log}", flush=True)
        job.seconds = -time.monotonic()
        job.state = "running"
        with job.log.open("ab") as log:
            job.shown = log.tell()
            job.process = process(command(job.overrides), more, log)

    def end(self, job: Job, total: int, shown: bool) -> None:
        job.seconds += time.monotonic()
        kill_group(job.process)  # a rank that has not noticed yet must not overlap the next job
        if shown:
            show(job)
        # the record, not the exit code, says done: a run stopped by SIGTERM may exit with 0
        code = job.process.returncode
        ended = job.state if job.state == "stopped" else "failed"
        job.state = "busy" if code == BUSY else "done" if job.finished and code == 0 else ended
        print(f"[{job.number}/{total}] {job.name}: {job.state} after {job.seconds:.0f} s", flush=True)
        if job.state == "failed":
            print(f"exit code {job.process.returncode}; last lines:\n{indented(job.tail())}", flush=True)


def end_all(running: list[Job], grace: float) -> None:
    """SIGTERM to each job (its rank 0, which takes the others along), SIGKILL to what is left of it after `grace` s."""
    print(f"stopping {len(running)} job(s); the same command goes on where they stop", flush=True)
    for job in running:
        if job.process.poll() is None:
            job.state = "stopped"
        job.process.terminate()
    deadline = time.monotonic() + grace
    while any(job.process.poll() is None for job in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    for job in running:
        kill_group(job.process)
        job.process.wait()


def show(job: Job, out: BinaryIO | None = None) -> None:
    """Pass on what the job has written to its log since the last look."""
    with job.log.open("rb") as log:
        log.seek(job.shown)
        news = log.read()
    job.shown += len(news)
    out = out or sys.stdout.buffer
    out.write(news)
    out.flush()


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def table(jobs: list[Job]) -> str:
    width = max((len(job.name) for job in jobs), default=3)
    lines = [f"{'job':>5}  {'run':{width}}  {'state':8}  seconds"]
    for job in jobs:
        took = f"{job.seconds:8.0f}" if job.seconds > 0 else ""
        lines.append(f"{job.number:>5}  {job.name:{width}}  {job.state:8}  {took}".rstrip())
    counts = {state: sum(job.state == state for job in jobs) for state in dict.fromkeys(job.state for job in jobs)}
    lines.append(", ".join(f"{n} {state}" for state, n in counts.items()))
    for job in jobs:
        if job.state == "failed":
            lines.append(f"\n{job.name} failed, {job.log}:\n{indented(job.tail())}")
    return "\n".join(lines)
