"""How long the runs of an experiment take on this machine, from steps timed now.

    python src/benchmark.py --grid barz2018/table1
    python src/benchmark.py --grid barz2018/table1 budget=0.1 data=digits

Runs that differ in seed, schedule and budget only cost the same per step and are timed once, with the Trainer and all
callbacks; a network that grows is timed at every depth. A run is the steps of its epochs, the validation between them,
the final test in fp32 of test and training images, and the start of its process; one run at a time. Seconds of the
clock and of the processor: other processes on the machine disturb the latter less. What an experiment measures on the
way (`analyses`) is not counted.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from hydra import compose, initialize_config_dir

from configuration import CONF, build, checked, choices
from depthlab import growth
from depthlab.problem import Problem, closest
from depthlab.records import hardware, identity_of
from depthlab.report.experiments import load_experiment
from depthlab.report.missing import duration
from depthlab.timing import Stopwatch
from train import assemble
from ways import WARM_UP

TARGET = 4.0  # seconds of timed steps
BATCHES = 3  # of an evaluation, timed after as many that are not
Cost = np.ndarray  # (seconds of the clock, seconds of the processor)


class Timing(NamedTuple):
    """Of one network: costs of a training step, of a batch of validation and of the final test."""

    step: Cost
    validation: Cost
    test: Cost


class Counts(NamedTuple):
    """Batches: of an epoch, of a validation, of the final test."""

    train: int
    validation: int
    test: int


def predict(id: str, overrides: Sequence[str], device: torch.device, steps: int | None = None) -> str:
    """The table of an experiment's runs and their hours.

    Args:
        id: of an experiment, e.g. "barz2018/table1".
        overrides: as on the command line of `src/train.py`.
        steps: to be timed; None for `TARGET` seconds.

    Raises:
        Problem: there is no such experiment, it trains nothing, or a configuration is wrong.
    """
    found: dict[str, tuple[list[Timing], Counts, Cost]] = {}
    lines: dict[str, list[Cost]] = {}
    for line, config in jobs(id, overrides):
        config["trainer"]["accelerator"] = {"cuda": "gpu"}.get(device.type, device.type)
        names = config["arch"]["name"], config["trainer"]["precision"]
        if (key := kind(config)) not in found:
            print(f"timing {' '.join(names)}", file=sys.stderr)
            timings, counts = timed(config, device, steps)
            found[key] = timings, counts, around(line, config, timings[0])
        what = " ".join([*names, config["sched"]["name"], *growing(config)])
        lines.setdefault(what, []).append(cost(config, *found[key]))
    return table(f"{id} {' '.join(overrides)}".strip(), device, lines)


def jobs(id: str, overrides: Sequence[str]) -> list[tuple[list[str], dict[str, Any]]]:
    """Command line and checked configuration of every run; an override takes the place of a swept key."""
    path = CONF / "experiment" / f"{id}.yaml"
    if not path.exists():
        raise Problem(f"--grid {id}: there is no such experiment; {closest(id, choices('experiment'))}")
    experiment = load_experiment(path, id)
    if not experiment.runs:
        raise Problem(f"--grid {id}: this experiment trains nothing")
    given = {text.partition("=")[0] for text in overrides}
    lines = {
        (f"experiment={id}", *(f"{k}={v}" for k, v in (cell | {"seed": seed}).items() if k not in given), *overrides)
        for cell in experiment.cells()
        for seed in experiment.seeds
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [(list(line), checked(compose("train", list(line)))) for line in sorted(lines)]


def growing(config: dict[str, Any]) -> list[str]:
    return [] if config["grow"]["name"] == "none" else [config["grow"]["name"]]


def kind(config: dict[str, Any]) -> str:
    """What the time of a step depends on."""
    return json.dumps({k: v for k, v in identity_of(config).items() if k not in ("seed", "budget", "sched")})


def timed(config: dict[str, Any], device: torch.device, steps: int | None) -> tuple[list[Timing], Counts]:
    """A run as src/train.py assembles it, at each of its depths."""
    grow, found = build(config, "grow"), []
    plain = config | {"grow": {"name": "none"}, "analyses": {}, "logger": {"name": "csv"}}
    for times_grown in range(1 if grow is None else len(grow.run_at) + 1):
        pace = Pace(device, steps)
        limits = {"limit_val_batches": BATCHES, "limit_test_batches": BATCHES, "check_val_every_n_epoch": 10**9}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # the bar's lines
            parts = assemble(plain, Path(folder), [pace], max_epochs=10**9, **limits)
            for _ in range(times_grown):
                growth.grow(parts.model.net)
            trainer, images = parts.trainer, (parts.model, parts.data)
            trainer.fit(*images)
            for evaluate in (trainer.validate, trainer.test) * 2:
                evaluate(*images, verbose=False)
        if pace.step is None:
            raise Problem(f"--grid: {config['arch']['name']} ended before it could be timed; did the loss diverge?")
        found.append(Timing(pace.step, pace.validation, pace.test))
    data, of = parts.data, config["trainer"]
    return found, Counts(
        trainer.num_training_batches,
        limited([data.val_dataloader()], of["limit_val_batches"]),
        limited(data.test_dataloader(), of["limit_test_batches"]),
    )


def around(line: list[str], config: dict[str, Any], timing: Timing) -> Cost:
    """What a run costs besides batches: of a real one of an epoch, and of everything a single batch, less these.

    Raises:
        Problem: it failed, in its last words.
    """
    little = ["grow=none", f"budget={1 / config['sched']['epochs']}", "hydra.mode=RUN", "logger=csv"]
    little += [f"trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *line, *little, f"runs_dir={folder}"]
        began, used = time.perf_counter(), os.times()
        more = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
        seconds, now = time.perf_counter() - began, os.times()
    if done.returncode:
        raise Problem(f"--grid: {' '.join(line)}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    processor = now.children_user + now.children_system - used.children_user - used.children_system
    return np.maximum(0, np.array([seconds, processor]) - timing.step - timing.validation - 2 * timing.test)


class Pace(pl.Callback):
    """The cost of a step and of an evaluation's batch; ends the fit when it knows."""

    def __init__(self, device: torch.device, steps: int | None) -> None:
        self.device, self.steps = device, steps
        self.step: Cost | None = None
        self.watch = Stopwatch(device)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        done = trainer.global_step - WARM_UP
        if done == 0:
            self.watch.start()
        elif done > 0 and self.step is None and self.enough(done):
            self.step = self.stop(done)
            trainer.should_stop = True

    def enough(self, done: int) -> bool:
        return done >= self.steps if self.steps else done >= 3 and self.watch.running() > TARGET

    def stop(self, count: int) -> Cost:
        self.watch.stop()
        return np.array([self.watch.measured["seconds"], self.watch.measured["cpu_seconds"]]) / count

    def on_validation_start(self, trainer, pl_module) -> None:
        self.watch.start()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validation = self.stop(sum(trainer.num_val_batches))

    def on_test_start(self, trainer, pl_module) -> None:
        self.watch.start()

    def on_test_end(self, trainer, pl_module) -> None:
        self.test = self.stop(sum(trainer.num_test_batches))


def limited(loaders: Sequence[Any], limit: int | float | None) -> int:
    """Batches of `loaders` under a limit as Lightning takes it."""
    counts = [len(batches) for batches in loaders]
    if limit is None:
        return sum(counts)
    return sum(min(n, limit) if isinstance(limit, int) else int(n * limit) for n in counts)


def cost(config: dict[str, Any], timings: list[Timing], counts: Counts, around: Cost) -> Cost:
    """Of one run."""
    grow, epochs = build(config, "grow"), build(config, "sched").run_epochs
    spans = pairwise([0, *(grow.run_at if grow is not None else ()), epochs])
    often = config["trainer"]["check_val_every_n_epoch"]
    total = around + counts.test * timings[-1].test
    for timing, (begin, end) in zip(timings, spans, strict=True):
        checks = end // often - begin // often
        total = total + (end - begin) * counts.train * timing.step + checks * counts.validation * timing.validation
    return total


def table(what: str, device: torch.device, lines: dict[str, list[Cost]]) -> str:
    said = [f"{what} on {hardware(device)}, {torch.get_num_threads()} threads, one run at a time.", ""]
    said += ["| runs | n | each | together | of processor time |", "|---|---|---|---|---|"]
    everything = [each for costs in lines.values() for each in costs]
    for name, costs in [*lines.items(), ("all", everything)]:
        clock, cpu = sum(costs)
        each = duration(clock / len(costs)) if name != "all" else ""
        said.append(f"| {name} | {len(costs)} | {each} | {duration(clock)} | {duration(cpu)} |")
    return "\n".join(said) + "\n"
