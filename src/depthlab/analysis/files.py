"""An analysis beside its run: `<folder>/analysis-<name>.npz`, `.png` and, last, `.json`: if that exists, all do."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from depthlab.analysis import Result
from depthlab.problem import Problem
from depthlab.records import write_atomically, write_json


def json_path(folder: Path, name: str) -> Path:
    return folder / f"analysis-{name}.json"


def write(folder: Path, name: str, result: Result, about: Mapping[str, Any], png: bytes | None = None) -> None:
    """Each file is written beside and renamed.

    Args:
        about: where the numbers come from; stands in the JSON before `scalars`.
    """
    path = json_path(folder, name)
    path.unlink(missing_ok=True)  # or, broken off here, it would stand beside arrays that are not its own
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **result.arrays)
    write_atomically(path.with_suffix(".npz"), buffer.getvalue())
    if png is not None:
        write_atomically(path.with_suffix(".png"), png)
    write_json(path, {**about, "scalars": plain(result.scalars)})


def about(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON, None if there is none."""
    try:
        with open(f"{folder}/analysis-{name}.json", encoding="utf-8") as file:  # asked of every run: no Path for it
            return json.load(file)
    except FileNotFoundError:
        return None


def read(folder: Path, name: str) -> tuple[Result, dict[str, Any]] | None:
    """What `write` was given: the result and `about`; None if there is nothing, or half of it."""
    if (said := about(folder, name)) is None:
        return None
    try:
        with np.load(json_path(folder, name).with_suffix(".npz")) as arrays:
            return Result(said.pop("scalars"), dict(arrays)), said
    except FileNotFoundError:
        return None


def add_to_record(folder: Path, name: str, result: Result) -> None:
    """The scalars into `analyses` of result.json, where there is one."""
    path = folder / "result.json"
    if not path.exists():
        return
    locks = folder.parent / ".locks"  # the run's own lock, see src/train.py
    locks.mkdir(exist_ok=True)
    with FileLock(locks / folder.name):
        record = json.loads(path.read_text())
        found = {name: plain(result.scalars)}
        if record["analyses"] | found != record["analyses"]:
            record["analyses"] |= found
            write_json(path, record)


def run_folders(runs: str | Sequence[str] | None) -> list[Path]:
    """The folders of runs that have a checkpoint; of a pattern (`runs/ml*`) those that match it.

    Raises:
        Problem: none is given, or what is given is no run's folder.
    """
    found: list[Path] = []
    for run in [runs] if isinstance(runs, str) else runs or []:
        path = Path(run)
        if set(run) & set("*?"):
            matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            matches = [match for match in matches if (match / "last.ckpt").exists()]
            if not matches:
                raise Problem(f"run={run}: no run's folder with a last.ckpt matches it")
            found += matches
            continue
        for name, way_out in (("config.json", "take a folder that src/train.py made"), ("last.ckpt", "train it first")):
            if not (path / name).exists():
                raise Problem(f"run={run}: there is no {name} in it; {way_out}")
        found.append(path)
    if not found:
        raise Problem("run: say which run's folder, run=runs/<name>")
    return list(dict.fromkeys(found))


def plain(scalars: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """As JSON can hold them."""
    return {key: None if value is None or not math.isfinite(value) else value for key, value in scalars.items()}
