"""Measure finished runs. See conf/analyze.yaml, and --help.

    python src/analyze.py run=runs/resnet110-sgd-cifar10-s0-1a2b3c4d analysis=lesion
    python src/analyze.py run='runs/ml*' analysis=norms analysis.images=1000

Writes analysis-<name>.{json,npz,png} into the run's folder and the scalars into its result.json; what is there already
is not measured again. Several runs are drawn together, too. A run broken off is measured as its last.ckpt has it.
"""

import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from depthlab.problem import Problem

NO_NUMBERS = ("_target_", "figure", "extra", "check", "workers")  # of an analysis: other options change what comes out


def trained(config: dict[str, Any], checkpoint: dict[str, Any], num_classes: int, device: Any) -> Any:
    """The run's network as its checkpoint has it: shape, weights and precision."""
    from configuration import network
    from depthlab import growth

    net = network(config, num_classes)
    if checkpoint.get("growth") is not None:
        growth.set_depth(net, **checkpoint["growth"])
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    net.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return net.to(device).eval()


def analyze(folder: Path, section: dict[str, Any], device: Any, data_dir: str | None, force: bool) -> Any:
    """The analysis of one run: measured and written, or read where that was done before. Returns its Result.

    Raises:
        Problem: the run cannot be measured so, or was measured with other options or at another step.
    """
    import torch

    from configuration import analysis
    from depthlab import ImageData, records
    from depthlab.analysis import choose, drawing, files, measure

    name, path = section["name"], folder / "last.ckpt"
    config = json.loads((folder / "config.json").read_text())
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        options = {key: value for key, value in section.items() if key not in NO_NUMBERS}
        subject = {"analysis": options, "step": checkpoint["global_step"], "growth": checkpoint.get("growth")}
    except Exception as error:
        raise Problem(f"{path}: not a readable checkpoint of depthlab ({type(error).__name__})") from error
    if not force and (there := files.read(folder, name)) is not None:
        result, about = there
        for key, now in subject.items():
            if about[key] != now:
                way_out = f"{key} was {about[key]} and is {now}; force=true measures anew"
                raise Problem(f"{files.json_path(folder, name)}: another measurement is there, its {way_out}")
        print(f"{folder.name}: {name} is there, see {files.json_path(folder, name)}")
        files.add_to_record(folder, name, result)
        return result

    images = {"dir": data_dir} if data_dir else {}
    data = ImageData(**{k: v for k, v in config["data"].items() if v is not None} | images, seed=config["seed"])
    given = {
        "net": lambda: trained(config, checkpoint, data.num_classes, device),
        "batches": lambda: choose(data, section["split"], section["images"], device),
        "folder": lambda: folder,
        "scratch": lambda: scratch,
    }
    scratch = folder / f".analysis-{name}.part.npz"
    if (folder / "result.json").exists():
        given["record"] = lambda: json.loads((folder / "result.json").read_text())
    began = time.perf_counter()
    result = measure(analysis(section), **given)
    about = {"run": folder.resolve().name, **subject, "seconds": time.perf_counter() - began}
    about |= {"measured": datetime.now(timezone.utc).isoformat(timespec="seconds"), **records.provenance(device)}
    png = drawing.png(get_object(section["figure"])({folder.name: result}))
    for suffix, content in get_object(section["extra"])(folder.name, result).items() if "extra" in section else ():
        files.write_bytes(files.json_path(folder, name).with_suffix(suffix), content)
    files.write(folder, name, result, about, png)
    scratch.unlink(missing_ok=True)
    files.add_to_record(folder, name, result)
    print(f"{folder.name}: {name} measured, see {files.json_path(folder, name)}")
    return result


def run(config: dict[str, Any]) -> None:
    """Every run's analysis, and of several the figure that shows them together."""
    if config.get("analysis") is None:
        known = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/analysis").glob("*.yaml"))
        raise Problem(f"analysis: say which, there is {', '.join(known)}")
    from configuration import analysis
    from depthlab.analysis import device_of, drawing, files
    from train import quieten

    quieten()
    section, device = config["analysis"], device_of(config["device"])
    analysis(section)  # complains before anything is loaded
    folders = files.run_folders(config["run"])
    found = {f.name: analyze(f, section, device, config["data_dir"], config["force"]) for f in folders}
    if len(found) > 1:
        path = Path(config["together"]) / f"{section['name']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, drawing.png(get_object(section["figure"])(found)))
        print(f"{len(found)} runs together: {path}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="analyze")
def main(cfg: DictConfig) -> None:
    from configuration import resolve

    try:
        run(resolve(cfg))
    except (Problem, OSError) as problem:  # here, before Hydra adds words of its own
        sys.exit(refuse(problem))


def refuse(message: object) -> int:
    print(f"analyze.py: {message}", file=sys.stderr)
    return 2


def cli() -> None:
    """`main`, with every refusal in one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    try:
        main()
    except Problem as problem:
        sys.exit(refuse(problem))
    except (HydraException, OmegaConfBaseException) as error:
        from configuration import explain

        sys.exit(refuse(explain(error)))


if __name__ == "__main__":
    cli()
