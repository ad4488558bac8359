"""Measure finished runs. See conf/analyze.yaml, and --help.

    python src/analyze.py run=runs/resnet110-sgd-cifar10-s0-1a2b3c4d analysis=lesion
    python src/analyze.py run='runs/ml*' analysis=norms analysis.images=1000

Writes analysis-<name>.{json,npz,png} into the run's folder and the scalars into its result.json; what is there already
is not measured again. Several runs are drawn together, too; one that cannot be measured is named, also at the end, and
the exit code is 2. A run broken off is measured as its last.ckpt has it.
"""

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import get_object
from omegaconf import DictConfig

from command_line import answering
from depthlab.problem import Problem


def trained(config: dict[str, Any], checkpoint: dict[str, Any], num_classes: int, device: Any) -> Any:
    """The run's network as its checkpoint has it: shape, weights and precision.

    Raises:
        Problem: the weights are not finite.
    """
    from configuration import network
    from depthlab import growth, records

    net = network(config, num_classes)
    if checkpoint.get("growth") is not None:
        growth.set_depth(net, **checkpoint["growth"])
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    if not all(w.isfinite().all() for w in weights.values()):
        raise Problem(f"run={records.run_name(config)}: it diverged, its weights are not finite; leave it out")
    net.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return net.to(device).eval()


def started(config: dict[str, Any], checkpoint: dict[str, Any], num_classes: int, device: Any) -> Any:
    """The run's network as training began with it: its seed draws the same weights again.

    Raises:
        Problem: the network grew, so that start and end are of different shapes.
    """
    import torch

    from configuration import network

    if config["grow"]["name"] != "none":
        raise Problem(f"grow={config['grow']['name']}: a network that grew has no start of the same shape")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        net = network(config, num_classes)
    dtype = next(v.dtype for k, v in checkpoint["state_dict"].items() if k.startswith("net."))
    return net.to(dtype).to(device).eval()


def analyze(folder: Path, section: dict[str, Any], device: Any, data_dir: str | None, force: bool) -> Any:
    """The analysis of one run: measured and written, or read where that was done before. Returns its Result.

    Raises:
        Problem: the run cannot be measured so, or was measured with other options or at another step.
    """
    from configuration import analysis
    from depthlab.analysis import choose, measure

    config, checkpoint, subject = opened(folder, section)
    if not force and (result := known(folder, section, subject)) is not None:
        return result
    data = images(config, data_dir)
    given = {
        "net": lambda: trained(config, checkpoint, data.num_classes, device),
        "batches": lambda: choose(data, section["split"], section["images"], device),
        "folder": lambda: folder,
        "scratch": lambda: scratch,
    }
    scratch = folder / f".analysis-{section['name']}.part.npz"
    if (folder / "result.json").exists():
        given["record"] = lambda: json.loads((folder / "result.json").read_text())
    began = time.perf_counter()
    result = measure(analysis(section), **given)
    keep(folder, section, result, subject, device, time.perf_counter() - began)
    scratch.unlink(missing_ok=True)
    return result


def analyze_each(
    folders: list[Path], section: dict[str, Any], device: Any, data_dir: str | None, force: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same of several runs: the Results by name, and why the others have none.

    Raises:
        Problem: as `analyze`, of a single run.
    """
    found, failed = {}, {}
    for folder, name in zip(folders, names_of(folders)):
        try:
            found[name] = analyze(folder, section, device, data_dir, force)
        except (Problem, OSError) as error:
            if len(folders) == 1:
                raise
            print(f"{name}: not measured: {error}", file=sys.stderr)
            failed[name] = str(error)
    return found, failed


def analyze_together(
    folders: list[Path], section: dict[str, Any], device: Any, data_dir: str | None, force: bool
) -> dict[str, Any]:
    """The same for an analysis of several runs at once. Returns every run's Result by name.

    Raises:
        Problem: as `analyze`; or the runs are not of the same images.
    """
    from configuration import analysis
    from depthlab.analysis import choose, measure
    from depthlab.analysis.minima import Run

    names = names_of(folders)
    all_opened = [opened(folder, section) for folder in folders]
    subjects = [subject | {"together": names} for _, _, subject in all_opened]
    if not force and all((folder / f"analysis-{section['name']}.json").exists() for folder in folders):
        there = [known(folder, section, subject) for folder, subject in zip(folders, subjects)]
        if None not in there:
            return dict(zip(names, there))
    data = images(all_opened[0][0], data_dir)
    for name, (config, *_) in zip(names, all_opened):
        if (other := images(config, data_dir)).name != data.name or (other.mean, other.std) != (data.mean, data.std):
            raise Problem(f"run={name}: other images than {names[0]}'s (data.name, data.mean, data.std)")
    scratch = folders[0] / f".analysis-{section['name']}.part.npz"
    given = {
        "runs": lambda: {
            name: Run(started(config, checkpoint, data.num_classes, device),
                      trained(config, checkpoint, data.num_classes, device))
            for name, (config, checkpoint, _) in zip(names, all_opened)
        },
        "batches": lambda: choose(data, section["split"], section["images"], device),
        "scratch": lambda: scratch,
    }  # fmt: skip
    began = time.perf_counter()
    found = measure(analysis(section), **given)
    for folder, name, subject in zip(folders, names, subjects):
        keep(folder, section, found[name], subject, device, time.perf_counter() - began)
    scratch.unlink(missing_ok=True)
    return found


def names_of(folders: list[Path]) -> list[str]:
    """The runs' names; where two are the same, their folders."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def images(config: dict[str, Any], data_dir: str | None) -> Any:
    """The run's ImageData, perhaps from another folder."""
    from configuration import images

    return images(config, **({"dir": data_dir} if data_dir else {}))


def opened(folder: Path, section: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The run's configuration and checkpoint, and what a measurement of them is one of.

    Raises:
        Problem: one of them cannot be read.
    """
    import torch

    from depthlab.analysis.asked import options

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        path = folder / "last.ckpt"
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        subject = {"analysis": {"name": section["name"], **options(section)}, "step": checkpoint["global_step"]}
        return config, checkpoint, subject | {"growth": checkpoint.get("growth")}
    except Exception as error:
        what = "checkpoint" if path.suffix == ".ckpt" else "configuration"
        raise Problem(f"{path}: not a readable {what} of depthlab ({type(error).__name__})") from error


def known(folder: Path, section: dict[str, Any], subject: dict[str, Any]) -> Any:
    """What this measurement left, None if it has not been made.

    Raises:
        Problem: another one is there.
    """
    from depthlab.analysis import asked, files

    name = section["name"]
    if (there := files.read(folder, name)) is None:
        return None
    result, about = there
    for key, now in subject.items():
        if not (asked.counts(about, now) if key == "analysis" else about.get(key) == now):
            way_out = f"{key} was {about.get(key)} and is {now}; force=true measures anew"
            raise Problem(f"{files.json_path(folder, name)}: another measurement is there, its {way_out}")
    print(f"{folder.name}: {name} is there, see {files.json_path(folder, name)}")
    files.add_to_record(folder, name, result)
    return result


def keep(
    folder: Path, section: dict[str, Any], result: Any, subject: dict[str, Any], device: Any, seconds: float
) -> None:
    """The files beside the run, and the scalars in its record."""
    from depthlab import records
    from depthlab.analysis import drawing, files

    name = section["name"]
    about = {"run": folder.resolve().name, **subject, "seconds": seconds}
    about |= {"measured": datetime.now(timezone.utc).isoformat(timespec="seconds"), **records.provenance(device)}
    png = drawing.png(get_object(section["figure"])({folder.name: result}))
    for suffix, content in get_object(section["extra"])(folder.name, result).items() if "extra" in section else ():
        records.write_atomically(files.json_path(folder, name).with_suffix(suffix), content)
    files.write(folder, name, result, about, png)
    files.add_to_record(folder, name, result)
    print(f"{folder.name}: {name} measured, see {files.json_path(folder, name)}")


def run(config: dict[str, Any]) -> None:
    """Every run's analysis, and of several the figure that shows them together."""
    if config.get("analysis") is None:
        known = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/analysis").glob("*.yaml"))
        raise Problem(f"analysis: say which, there is {', '.join(known)}")
    from configuration import analysis
    from depthlab.analysis import device_of, drawing, files, needs
    from depthlab.records import write_atomically
    from train import quieten

    quieten()
    section, device = config["analysis"], device_of(config["device"])
    function = analysis(section)  # complains before anything is loaded
    folders = files.run_folders(config["run"])
    options = (device, config["data_dir"], config["force"])
    if "runs" in needs(function):
        found, failed = analyze_together(folders, section, *options), {}
    else:
        found, failed = analyze_each(folders, section, *options)
    if len(found) > 1:
        path = Path(config["together"]) / f"{section['name']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawing.png(get_object(section["figure"])(found)))
        print(f"{len(found)} runs together: {path}")
    if failed:
        lines = [f"    {name}: {why}" for name, why in failed.items()]
        raise Problem("\n".join([f"{len(failed)} of {len(folders)} runs were not measured:", *lines]))


@hydra.main(version_base="1.3", config_path="../conf", config_name="analyze")
def main(cfg: DictConfig) -> None:
    from configuration import resolve

    with answering("analyze.py"):
        try:
            run(resolve(cfg))
        except OSError as error:
            raise Problem(str(error)) from error


def cli() -> None:
    with answering("analyze.py"):
        main()


if __name__ == "__main__":
    cli()
