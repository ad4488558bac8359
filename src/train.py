"""Train one network, or with -m a grid of them. See conf/train.yaml, and --help.

    python src/train.py arch=plain11 sched=sgdr seed=0
    python src/train.py -m arch=plain11,resnet110 sched=sgd,clr,sgdr seed=0,1,2
    python src/train.py experiment=barz2018/table1 budget=0.05

The same command continues what was broken off and skips what is done.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

BUSY = 75  # exit code: another process works on this run


def train(config: dict[str, Any]) -> dict[str, Any]:
    """One run: seed -> data -> architecture -> classifier -> callbacks -> loggers -> Trainer -> fit -> test -> record.

    Args:
        config: resolved and checked, see `configuration.checked`.

    Returns:
        The record, as `result.json` in the run's folder holds it.
    """
    import lightning.pytorch as pl
    import torch

    from callbacks.checkpoint import AtomicCheckpointIO, last_checkpoint
    from callbacks.divergence import Divergence
    from callbacks.progress import RunProgress
    from callbacks.record import Record
    from configuration import build, network
    from depthlab import Classifier, ImageData, records

    name = records.run_name(config)
    folder = Path(config["runs_dir"]).absolute() / name
    settings = dict(config["trainer"])
    channels_last = settings.pop("channels_last")
    if channels_last is None:
        channels_last = settings["precision"] in ("bf16-mixed", "16-mixed", "bf16-true", "16-true")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, for convolutions too

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # we go on from there

    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data = ImageData(
        **{k: v for k, v in config["data"].items() if v is not None},
        augment=build(config, "augment"),
        seed=config["seed"],
        memory_format="channels_last" if channels_last else "contiguous",
    )
    data.prepare_data()  # now, so that what is wrong with the images is said before anything is made
    net = network(config)
    optim = config["optim"]
    model = Classifier(
        net,
        hydra.utils.instantiate(optim["optimizer"]),
        weight_decay=optim["weight_decay"],
        decay=optim["decay"],
        momentum_style=optim["momentum_style"],
        channels_last=channels_last,
    )
    schedule = build(config, "sched")
    record = Record(folder, identity=records.identity_of(config))
    divergence = Divergence()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        **settings,
        max_epochs=schedule.run_epochs,
        gradient_clip_val=config["sched"]["clip"],
        callbacks=[schedule, divergence, record, RunProgress(name), last_checkpoint(folder)],
        plugins=[AtomicCheckpointIO()],
        logger=loggers(config, name, folder),
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        records.write_json(folder / "config.json", config)
    trainer.fit(model, data, ckpt_path=resume_point(folder, record.identity))
    if divergence.step is None:
        trainer.test(model, data, verbose=False)

    result = {
        "schema": records.SCHEMA,
        "name": name,
        "study": config["study"],
        **{key: config[key]["name"] for key in ("arch", "sched", "data")},
        "seed": config["seed"],
        "budget": float(config["budget"]),
        "precision": settings["precision"],
        "device": model.device.type,
        "hardware": records.hardware(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "flops_per_image": records.training_flops(network(config, device="meta"), data.image_size),
        "epochs": len(record.rows),
        "steps": trainer.global_step,
        "evaluated_on": data.evaluated_on,
        **record.summary(),
        "diverged": divergence.step is not None,
        "diverged_step": divergence.step,
        "last_finite_loss": divergence.last_finite_loss,
        "ended": "completed" if divergence.step is None else "diverged",
        "identity": record.identity,
        "config": config,
        "versions": records.versions(),
        "git": records.git_state(),
        "analyses": {},
    }
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({k: result[k] for k in FINAL if result[k] is not None}, step=trainer.global_step)
        records.write_json(folder / "result.json", result)
    return result


FINAL = ("test_error", "test_loss", "train_loss", "train_error", "seconds_per_epoch")


def resume_point(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The run's checkpoint, if it has one.

    Raises:
        Problem: it cannot be read, or another run wrote it.
    """
    import torch

    from depthlab.problem import Problem

    path = folder / "last.ckpt"
    if not path.exists():
        return None
    way_out = "delete it to start this run afresh"
    try:
        written_by = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["depthlab_identity"]
    except Exception as error:
        raise Problem(f"{path}: not a readable checkpoint of depthlab ({type(error).__name__}); {way_out}") from error
    if written_by != identity:
        keys = [k for k in identity if identity[k] != (written_by or {}).get(k)]
        ours, theirs = ({k: source.get(k) for k in keys} for source in (identity, written_by or {}))
        raise Problem(f"{path}: written by another run ({theirs} there, {ours} here); {way_out}")
    return path


def loggers(config: dict[str, Any], name: str, folder: Path) -> list | bool:
    """What watches besides metrics.csv: nothing, W&B or TensorBoard."""
    kind = config["logger"]["name"]
    if kind == "csv":
        return False
    from callbacks.loggers import tensorboard, wandb_run

    if kind == "tensorboard":
        return [tensorboard(folder)]
    return [wandb_run(config, name, folder)]


def run(config: dict[str, Any]) -> int:
    """`train`, unless it is done or another process is at it. Returns the exit code."""
    from filelock import FileLock, Timeout
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from depthlab import records

    name = records.run_name(config)
    folder = Path(config["runs_dir"]) / name
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    if first and (folder / "result.json").exists():
        print(f"{name}: done, see {folder / 'result.json'}")
        return 0
    lock = FileLock(folder.parent / ".locks" / name)
    failed = True
    try:
        if first:
            make_writable(folder.parent / ".locks")
            lock.acquire(timeout=0)
        result = train(config)
        failed = False
    except Timeout:
        print(f"{name}: another process is working on it", file=sys.stderr)
        return BUSY
    except SIGTERMException:
        print(f"{name}: stopped (SIGTERM); the same command goes on from {folder / 'last.ckpt'}", file=sys.stderr)
        return 143
    except SystemExit:  # Lightning's answer to Ctrl-C
        print(f"{name}: stopped; the same command goes on from {folder / 'last.ckpt'}", file=sys.stderr)
        return 130
    finally:
        if config["logger"]["name"] == "wandb":
            import wandb

            wandb.finish(exit_code=int(failed))
        lock.release()
    if first:
        if result["diverged"]:
            print(f"{name}: diverged at step {result['diverged_step']}; recorded in {folder / 'result.json'}")
        else:
            print(f"{name}: test error {result['test_error']:.2f}%, recorded in {folder / 'result.json'}")
    return 0


def make_writable(runs_dir: Path) -> None:
    from depthlab.problem import Problem

    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        (runs_dir / ".lock-test").touch()
        (runs_dir / ".lock-test").unlink()
    except OSError as error:
        raise Problem(f"runs_dir={runs_dir}: cannot be written ({error.strerror}); set runs_dir to another folder") from error


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    from configuration import checked
    from depthlab.problem import Problem

    if HydraConfig.get().mode == RunMode.MULTIRUN:  # another launcher (submitit, joblib, basic): still a process per job
        from hydra_plugins.process_launcher import run_job

        code = run_job(list(HydraConfig.get().overrides.task))
    else:
        try:
            code = run(checked(cfg))
        except Problem as problem:  # here, before Hydra adds its own words
            code = refuse(problem)
    if code:
        sys.exit(code)


def refuse(message: object) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return 2


def cli() -> None:
    """`main` with every refusal in one line and exit code 2."""
    from depthlab.problem import Problem

    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the exception instead of printing it
    try:
        main()
    except Problem as problem:
        sys.exit(refuse(problem))
    except (HydraException, OmegaConfBaseException) as error:
        from configuration import explain

        sys.exit(refuse(explain(error)))


if __name__ == "__main__":
    cli()
