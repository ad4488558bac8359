"""An analysis beside its run: `<folder>/analysis-<name>.npz`, `.png` and, last, `.json`: if that exists, all do."""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from depthlab.analysis import Result
from depthlab.records import write_json


def write(folder: Path, name: str, result: Result, about: Mapping[str, Any], png: bytes | None = None) -> Path:
    """Each file is written beside and renamed. Returns the JSON's path.

    Args:
        about: where the numbers come from; stands in the JSON beside `scalars`.
    """
    path = folder / f"analysis-{name}.json"
    path.unlink(missing_ok=True)  # or, broken off, it would stand beside arrays that are not its own
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **result.arrays)
    write_bytes(path.with_suffix(".npz"), buffer.getvalue())
    if png is not None:
        write_bytes(path.with_suffix(".png"), png)
    scalars = {key: None if value is None or not math.isfinite(value) else value for key, value in result.scalars.items()}
    write_json(path, {**about, "scalars": scalars})
    return path


def read(folder: Path, name: str) -> tuple[Result, dict[str, Any]] | None:
    """What `write` was given: the result and `about`; None if there is nothing whole."""
    path = folder / f"analysis-{name}.json"
    try:
        about = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            return Result(about.pop("scalars"), dict(arrays)), about
    except FileNotFoundError:
        return None


def write_bytes(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
