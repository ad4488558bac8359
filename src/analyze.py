"""Measure finished runs. See conf/analyze.yaml, and --help.

    python src/analyze.py run=runs/resnet110-sgd-cifar10-s0-1a2b3c4d analysis=lesion
    python src/analyze.py run='runs/ml*' analysis=norms analysis.images=1000

Writes analysis-<name>.{json,npz,png} into the run's folder and the scalars into its result.json; what is there already
is not measured again. Several runs are also drawn together. A run broken off is measured as its last.ckpt has it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from depthlab.problem import Problem

ABOUT = ("name", "figure", "split", "images")  # keys of an analysis besides its function's options


def options_of(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in (*ABOUT, "_target_")}


def function(section: dict[str, Any]) -> Callable[..., Any]:
    """The analysis with its options bound.

    Raises:
        Problem: an option that it does not know, or of another type.
    """
    from configuration import check_arguments

    check_arguments("analysis", {"_target_": section["_target_"]} | options_of(section))
    return partial(get_object(section["_target_"]), **options_of(section))


def folders(runs: str | list[str] | None) -> list[Path]:
    """Raises:
    Problem: none is given, or what is given is no run's folder.
    """
    found: list[Path] = []
    for run in [runs] if isinstance(runs, str) else runs or []:
        path = Path(run)
        if any(c in run for c in "*?"):
            matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            found += (new := [p for p in matches if (p / "last.ckpt").exists()])
            if not new:
                raise Problem(f"run={run}: matches no run's folder with a last.ckpt")
            continue
        for name, way_out in (("config.json", "take a folder that src/train.py made"), ("last.ckpt", "train it first")):
            if not (path / name).exists():
                raise Problem(f"run={run}: there is no {name} in it; {way_out}")
        found.append(path)
    if not found:
        raise Problem("run: say which run's folder, run=runs/<name>")
    return list(dict.fromkeys(found))


def device(name: str) -> Any:
    """Raises:
    Problem: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"device={name}: {str(error).splitlines()[0]}; take device=auto or cpu") from error


def trained(config: dict[str, Any], checkpoint: dict[str, Any], on: Any) -> Any:
    """The run's network as its checkpoint has it: shape, weights and precision."""
    from configuration import network
    from depthlab import growth

    prefix = "net."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    net = network(config, len(state[max(k for k in state if k.startswith("classifier."))]), "cpu")
    if checkpoint.get("growth"):
        growth.set_depth(net, **checkpoint["growth"])
    net = net.to(next(v.dtype for v in state.values() if v.is_floating_point()))
    net.load_state_dict(state)
    return net.to(on).eval()


def analyze(folder: Path, section: dict[str, Any], on: Any, data_dir: str | None = None, force: bool = False) -> Any:
    """Measure one run and write what was found; or read it where it was measured before.

    Raises:
        Problem: the run has no use for this analysis, or what was measured before has other options or weights.
    """
    import torch

    from depthlab import ImageData, records
    from depthlab.analysis import choose, files, measure, needs

    config = json.loads((folder / "config.json").read_text())
    try:
        checkpoint = torch.load(folder / "last.ckpt", map_location="cpu", mmap=True, weights_only=True)
        subject = {"run": records.run_name(config), "step": checkpoint["global_step"], "growth": checkpoint["growth"]}
    except Exception as error:
        raise Problem(f"{folder / 'last.ckpt'}: not a readable checkpoint of depthlab ({error!r})") from error
    name, analysis = section["name"], function(section)
    subject |= {"analysis": {k: v for k, v in section.items() if k not in ("figure", "_target_")}}
    old = None if force else files.read(folder, name)
    if old is not None:
        result, about = old
        if differs := [f"{k}={about.get(k)} (now {v})" for k, v in subject.items() if about.get(k) != v]:
            raise Problem(f"{folder / f'analysis-{name}.json'}: is there with {', '.join(differs)}; set force=true")
        print(f"{folder.name}: {name} is there already")
    else:
        path = folder / "result.json"

        def record() -> dict[str, Any]:
            if not path.exists():
                raise Problem(f"{folder}: has not finished, and analysis={name} needs its result.json")
            return json.loads(path.read_text())

        def batches() -> Any:
            options = {k: v for k, v in config["data"].items() if v is not None}
            data = ImageData(**options | ({"dir": data_dir} if data_dir else {}), seed=config["seed"])
            return choose(data, section["split"], section["images"], on)

        began = time.perf_counter()
        result = measure(
            analysis, net=lambda: trained(config, checkpoint, on), batches=batches, record=record
        )
        about = subject | {
            "needs": needs(analysis),
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - began,
            **records.provenance(on),
        }
        files.write(folder, name, result, about, drawn(section, {folder.name: result}))
        print(f"{folder.name}: {name} measured, see {folder / f'analysis-{name}.json'}")
    note(folder, name, result)
    return result


def drawn(section: dict[str, Any], results: dict[str, Any]) -> bytes | None:
    if section.get("figure") is None:
        return None
    from depthlab.analysis.drawing import png

    return png(get_object(section["figure"])(results))


def note(folder: Path, name: str, result: Any) -> None:
    """The scalars into result.json, if the run has finished."""
    from filelock import FileLock

    from depthlab.records import write_json
    ...


@hydra.main(version_base="1.3", config_path="../conf", config_name="analyze")
def main(cfg: DictConfig) -> None:
    ...
