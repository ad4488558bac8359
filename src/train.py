"""Train one network, or with -m a grid of them. See conf/train.yaml, and --help.

    python src/train.py arch=plain11 sched=sgdr seed=0
    python src/train.py -m arch=plain11,resnet110 sched=sgd,clr,sgdr seed=0,1,2
    python src/train.py experiment=barz2018/table1 budget=0.05

The same command continues what was broken off and skips what is done.
"""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from command_line import answering
from depthlab.problem import Problem
from hydra_plugins.processes import BUSY, run_job
from quick_start import import_torchmetrics

# Before torch is imported: OpenMP threads that spin while they wait take a shared machine's cores from one another,
# half the images/s on two busy cores; on a quiet machine a thousand rounds of spinning are as good as endless ones.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

FINAL = ("test_error", "test_loss", "train_loss", "train_error", "seconds_per_epoch")


class Parts(NamedTuple):
    """What a run consists of, ready to fit."""

    model: Any
    data: Any
    trainer: Any
    record: Any
    divergence: Any
    analyses: list[Any]


def assemble(config: dict[str, Any], folder: Path, more: Iterable[Any] = (), **settings: Any) -> Parts:
    """Seed -> data -> architecture -> classifier -> callbacks -> loggers -> Trainer.

    Args:
        config: resolved and checked, see `configuration.checked`.
        folder: the run's; made if needed.
        more: further callbacks.
        settings: of the Trainer, in place of the configuration's.

    Raises:
        Problem: something is wrong with the images, before anything is written.
    """
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from callbacks.checkpoint import AtomicCheckpointIO, last_checkpoint
    from callbacks.divergence import Divergence
    from callbacks.loggers import make_loggers
    from callbacks.progress import RunProgress
    from callbacks.record import Record
    from callbacks.step_losses import StepLosses
    from callbacks.trajectory import Trajectory
    from configuration import analyses, build, images, network
    from depthlab import Classifier, fused, records
    from depthlab.graphed import GraphedClassifier

    quieten()
    settings = config["trainer"] | settings
    choices = ("channels_last", "compile", "fused", "graph")
    channels_last, compiled, wanted, graph = (settings.pop(key) for key in choices)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data = images(config, augment=build(config, "augment"))
    data.check(settings["devices"] * settings["num_nodes"])
    net = network(config, data.num_classes)
    fast = fused.switch(wanted, settings["precision"], settings["accelerator"], compiled)
    if channels_last is None:
        channels_last = fast or not settings["precision"].endswith(("32-true", "64-true"))
    data.memory_format = "channels_last" if channels_last else "contiguous"
    optim = config["optim"]
    model = (Classifier if graph is False else partial(GraphedClassifier, wanted=graph))(
        net,
        hydra.utils.instantiate(optim["optimizer"]),
        weight_decay=optim["weight_decay"] / (data.batch_size if optim.get("wd_norm") == "batch" else 1),
        decay=optim["decay"],
        decay_towards=optim.get("decay_towards", "zero"),
        momentum_style=optim["momentum_style"],
        channels_last=channels_last,
    )
    if compiled:
        model.net.compile()
    schedule, grow = build(config, "sched"), build(config, "grow")
    record, divergence = Record(folder, identity=records.identity_of(config)), Divergence()
    measured = analyses(config, folder)  # after `record`: the clock of an epoch does not count them
    folder.mkdir(parents=True, exist_ok=True)
    watchers = [divergence, StepLosses(folder)]
    if config["trajectory"]["every"] is not None:
        watchers.append(Trajectory(folder, **config["trajectory"]))
    callbacks = [record, schedule, grow, *watchers, RunProgress(folder.name), *measured, last_checkpoint(folder)]
    try:
        trainer = pl.Trainer(
            **{"max_epochs": schedule.run_epochs} | settings,
            gradient_clip_val=config["sched"]["clip"],
            callbacks=[callback for callback in [*callbacks, *more] if callback is not None],
            plugins=[AtomicCheckpointIO()],
            logger=make_loggers(config, folder.name, folder),
            default_root_dir=folder,
            use_distributed_sampler=False,  # ImageData deals the images over the devices itself
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        place = " ".join(f"trainer.{key}={settings[key]}" for key in ("accelerator", "devices", "strategy"))
        raise Problem(f"{place}: {' '.join(str(error).split())}") from error
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and settings["sync_batchnorm"]:
        raise Problem("trainer.sync_batchnorm=true needs GPUs; on CPUs each process normalises its own share")
    if trainer.precision != settings["precision"]:
        raise Problem(f"trainer.precision={settings['precision']} does not exist on this device; take bf16-mixed")
    return Parts(model, data, trainer, record, divergence, measured)


def quieten() -> None:
    """What Lightning would say that means nothing here; and settings of PyTorch and of the C library."""
    import torch

    from depthlab import memory

    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # we go on from there
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # between Lightning and torch, not ours
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # the same between Triton and torch
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, for convolutions too
    torch.utils.deterministic.fill_uninitialized_memory = False  # with trainer.deterministic: 2 to 5 % of a CPU step
    memory.keep_freed()


def train(config: dict[str, Any]) -> dict[str, Any]:
    """One run: `assemble` -> fit (from `last.ckpt` where there is one) -> test -> record.

    Returns:
        The record, as `result.json` in the run's folder holds it.
    """
    from torch import distributed

    from callbacks.checkpoint import resume_point
    from callbacks.loggers import log_final
    from callbacks.trajectory import check_path
    from depthlab import records

    name = records.run_name(config)
    folder = Path(config["runs_dir"]).absolute() / name
    model, data, trainer, record, divergence, analyses = assemble(config, folder)
    if checkpoint := resume_point(folder, record.identity):
        check_path(folder, config["trajectory"]["every"])
        if trainer.is_global_zero:
            print(f"{name}: goes on from {checkpoint}")
    if trainer.is_global_zero:
        records.write_json(folder / "config.json", config)
    trainer.fit(model, data, ckpt_path=checkpoint)
    if divergence.step is None:
        if trainer.current_epoch < trainer.max_epochs:
            raise RuntimeError(f"{name}: training ended after {trainer.current_epoch} of {trainer.max_epochs} epochs")
        trainer.test(model, data, verbose=False)

    result = {
        "schema": records.SCHEMA,
        "name": name,
        "study": config["study"],
        **{section: config[section]["name"] for section in ("arch", "sched", "grow", "data")},
        "seed": config["seed"],
        "budget": float(config["budget"]),
        "mode": records.mode(config["trainer"]),
        "flops_per_image": flops_per_image(config, data),
        "evaluated_on": data.evaluated_on,
        **record.summary(trainer, model),
        **divergence.summary(),
        "penalty": None if divergence.step is not None else model.penalty(),  # + train_loss is what was minimised
        "analyses": {f"{analyse.name}_during": analyse.rows for analyse in analyses},
        "identity": record.identity,
        "config": config,
    }
    if trainer.is_global_zero:
        log_final(trainer.loggers, {key: result[key] for key in FINAL if result[key] is not None})
        records.write_json(folder / "result.json", result)
    if distributed.is_initialized():  # a thread of gloo may else abort the process as it ends (pytorch#179291)
        distributed.destroy_process_group()
    return result


def flops_per_image(config: dict[str, Any], data: Any) -> float:
    """To train on one image; of a growing network the mean over the run's epochs."""
    from configuration import build, network
    from depthlab import growth, records

    net, grow = network(config, data.num_classes, "meta"), build(config, "grow")
    if grow is None:
        return records.training_flops(net, data.image_size)
    return growth.mean_flops(net, data.image_size, grow.run_at, grow.run_epochs)


def run(config: dict[str, Any]) -> int:
    """`train`, unless the run is done or another process is at it. Returns the exit code."""
    from filelock import FileLock, Timeout
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from callbacks.trajectory import check_path
    from depthlab import records

    name = records.run_name(config)
    folder = Path(config["runs_dir"]) / name
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0":
        train(config)  # one more rank of a run that rank 0 answers for
        return 0
    lock = FileLock(writable(folder.parent / ".locks") / name)
    last = folder / "last.ckpt"
    code = 1
    try:
        lock.acquire(timeout=0)
        if (folder / "result.json").exists():
            lock.release()  # which analyses take, to add to the record
            measure(config, folder)
            check_path(folder, config["trajectory"]["every"], done=True)
            print(f"{name}: done, see {folder / 'result.json'}")
            return 0
        result = train(config)
        code = 0
    except Timeout:
        print(f"{name}: another process is at it", file=sys.stderr)
        return BUSY
    except SIGTERMException:
        print(f"{name}: stopped by SIGTERM; {how_to_go_on(last)}", file=sys.stderr)
        return 143
    except (KeyboardInterrupt, SystemExit):  # SystemExit is what Lightning makes of Ctrl-C
        print(f"{name}: stopped; {how_to_go_on(last)}", file=sys.stderr)
        return 130
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=code)
        lock.release()
    ending = (
        f"test error {result['test_error']:.2f} %"
        if not result["diverged"]
        else (f"diverged at step {result['diverged_step']}")
    )
    print(f"{name}: {ending}, recorded in {folder / 'result.json'}")
    return 0


def measure(config: dict[str, Any], folder: Path) -> None:
    """What `analyses` asks for of the last epoch and a finished run lacks, because it was trained without."""
    from analyze import analyze
    from depthlab.analysis import asked, device_of
    from depthlab.records import WHEN

    for name in asked.unmeasured(config, folder):
        quieten()
        section = {k: v for k, v in config["analyses"][name].items() if k not in WHEN} | {"name": name}
        device = device_of("cpu" if config["trainer"]["accelerator"] == "cpu" else "auto")
        analyze(folder, section, device, config["data"]["dir"], force=True)  # what is there has other options
    for name in asked.missed(config, folder):
        said = "only its last epoch is measured; delete the folder to train it once more"
        print(f"{folder.name}: trained without analyses.{name}, {said}")


def how_to_go_on(last: Path) -> str:
    if not last.exists():
        return "no epoch was finished, the same command starts anew"
    return f"the same command goes on from {last}"


def writable(folder: Path) -> Path:
    """`folder`, made if needed.

    Raises:
        Problem: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Problem(f"runs_dir={folder.parent}: cannot be written ({error.strerror}); set runs_dir") from error
    return folder


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    import_torchmetrics()
    from configuration import checked

    if HydraConfig.get().mode == RunMode.MULTIRUN:  # another launcher (submitit, joblib): still a process per job
        code = run_job(list(HydraConfig.get().overrides.task))
    elif cfg.paper is not None and not HydraConfig.get().sweeper.params:  # an experiment without runs
        code = subprocess.call([sys.executable, str(Path(__file__).with_name("report.py")), cfg.study])
    else:
        with answering("train.py"):
            code = run(checked(cfg))
    if code:
        sys.exit(code)


def cli() -> None:
    if "-m" in sys.argv[2:]:  # argparse wants it before the overrides
        sys.argv.remove("-m")
        sys.argv.insert(1, "-m")
    with answering("train.py"):
        main()


if __name__ == "__main__":
    cli()
