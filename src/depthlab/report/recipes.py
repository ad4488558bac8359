"""What the configuration makes of a cell: the identity that its runs must have, and what one of them costs.

Hydra takes a tenth of a second for a cell, so answers are kept in a file for as long as configuration and code stay.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from depthlab.records import identity_of, write_atomically
from depthlab.report.experiments import Cell, Experiment
from depthlab.report.tables import cell_key

IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 5_000, "digits": 1_500, "noise": 50_000}  # for training
Compose = Callable[..., dict[str, Any]]  # (experiment, *overrides) -> resolved configuration
Build = Callable[..., Any]  # see `configuration.build`


class Recipes:
    """Answers, from `path` where it has them.

    Args:
        compose, build: how to find them.
        path: where they are kept; None keeps nothing.
        key: changes when they may no longer hold, see `fingerprint`.
    """

    def __init__(self, compose: Compose, build: Build, path: Path | None = None, key: str = "") -> None:
        self.compose, self.build, self.path, self.key = compose, build, path, key
        self.found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            kept = json.loads(path.read_text()) if path else {}
            self.found = kept["found"] if kept.get("key") == key else {}
        self.kept = len(self.found)

    def config(self, experiment: Experiment, *overrides: str) -> dict[str, Any]:
        """The resolved configuration of a run; what is given out is the caller's own."""
        key = " ".join(["config", experiment.id, *overrides])
        found = self._answer(key, lambda: self.compose(experiment, *overrides))
        return json.loads(json.dumps(found))

    def identity(self, experiment: Experiment, cell: Cell) -> dict[str, Any]:
        """Of the cell's runs, whatever their seed, budget and precision."""
        return self._of_cell("identity", experiment, cell, identity_of)

    def analyses(self, experiment: Experiment) -> dict[str, dict[str, Any]]:
        """What its runs measure during training, with all options."""
        return (
            self._of_cell("analyses", experiment, {}, lambda config: config["analyses"]) if experiment.analyses else {}
        )

    def cost(self, experiment: Experiment, cell: Cell) -> dict[str, float]:
        """`flops` and `images` of one run, to train; {} where the number of images is not known."""
        return self._of_cell("cost", experiment, cell, lambda config: cost(config, self.build))

    def _of_cell(self, what: str, experiment: Experiment, cell: Cell, find: Callable[[dict], Any]) -> Any:
        key = f"{what} {experiment.id} {cell_key(cell)}"
        return self._answer(key, lambda: find(self.compose(experiment, *overrides(cell))))

    def _answer(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]

    def keep(self) -> None:
        """Write what was found; where that is not possible it will be found again."""
        if self.path and len(self.found) > self.kept:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps({"key": self.key, "found": self.found}))


def overrides(cell: Cell) -> list[str]:
    """What the command line says of it."""
    return [f"{axis}={value}" for axis, value in cell.items()]


class Expected:
    """What `tables.tabulate` asks of an experiment: its cells' identities and its analyses, found when it asks."""

    def __init__(self, recipes: Recipes, experiment: Experiment) -> None:
        self.recipes, self.experiment = recipes, experiment
        self.cells = {cell_key(cell): cell for cell in experiment.cells()}

    def get(self, key: str) -> dict[str, Any]:
        return self.recipes.identity(self.experiment, self.cells[key])

    def analyses(self) -> dict[str, dict[str, Any]]:
        return self.recipes.analyses(self.experiment)


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from `path` where it was left under the same key: what is computed can take minutes."""
    with contextlib.suppress(OSError, pickle.PickleError, EOFError, AttributeError, ImportError, ValueError):
        found, value = pickle.loads(path.read_bytes())
        if found == key:
            return value
    value = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, pickle.dumps((key, value)))
    return value


def fingerprint(folders: Iterable[Path]) -> str:
    """Of all Python and YAML files in `folders`."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def cost(config: dict[str, Any], build: Build) -> dict[str, float]:
    """FLOPs and images of one run; counted on the meta device, nothing is computed."""
    import torch

    from depthlab import growth, records

    data, sched = config["data"], build(config, "sched")
    if (images := epoch_images(config)) is None:
        return {}
    with torch.device("meta"):
        net = build(config, "arch", num_classes=data["classes"] or 2)
    grow = build(config, "grow")
    if grow is None:
        flops = records.training_flops(net, data["size"])
    else:
        flops = growth.mean_flops(net, data["size"], grow.run_at, grow.run_epochs)
    images *= sched.run_epochs
    return {"flops": float(flops) * images, "images": float(images)}


def epoch_images(config: dict[str, Any]) -> int | None:
    """Training images of one epoch; None for data that is not known here."""
    data = config["data"]
    if data["source"] not in IMAGES or data["size"] is None:
        return None
    images, limit = IMAGES[data["source"]] - data["val_size"], config["trainer"]["limit_train_batches"]
    return min(images, limit * data["batch_size"]) if isinstance(limit, int) else images
