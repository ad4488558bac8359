"""Find and read what finished runs left behind: `<runs_dir>/<name>/result.json`.

Whatever cannot be read is named and passed over.
"""

import contextlib
import gc
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from depthlab.records import SCHEMA
from depthlab.report.tables import recipe_text

NEEDED = {  # what a table cannot do without
    "name": str, "identity": dict, "arch": str, "sched": str, "data": str, "seed": int, "budget": (int, float),
    "precision": str, "epochs": int, "diverged": bool, "curves": dict,
}  # fmt: skip


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector, which would go through all records again and again: half of the time to read them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def read_records(dirs: Iterable[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read every finished run under `dirs` (folders of run folders, or run folders themselves).

    A folder without `result.json` is a run that has not finished and is passed over. A run found twice (same recipe,
    same seed) counts once: the first one read. Each record gets the key `folder`, where it was found.

    Returns:
        The records, in the order of `dirs` and then of the folder names, and one line for each thing left out.
    """
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: dict[tuple, Path] = {}
    for directory in map(Path, dirs):
        if not directory.is_dir():
            problems.append(f"{directory}: no such folder of runs")
            continue
        for path in [directory / "result.json", *sorted(directory.glob("*/result.json"))]:
            try:
                record = check(parse(path.read_bytes()))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {error}")
                continue
            run = recipe_text(record["identity"]), record["seed"], float(record["budget"]), record["precision"]
            if run in seen:
                problems.append(f"{path}: the same run as {seen[run]}, counted once")
                continue
            seen[run] = path
            records.append(record | {"folder": path.parent.as_posix()})
    return records, problems


def parse(content: bytes) -> Any:
    """JSON by pydantic's parser, which takes a third of the time.

    Raises:
        ValueError: it is none; the words are the standard library's.
    """
    try:
        return from_json(content)
    except ValueError:
        return json.loads(content)


def check(record: Any) -> dict[str, Any]:
    """The record itself if a table can use it.

    Raises:
        ValueError: it is not one, naming the key and the value.
    """
    if not isinstance(record, dict):
        raise ValueError(f"not a record: expected an object, got {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"record of schema {record.get('schema')!r}; this version reads schema {SCHEMA}")
    for key, kind in NEEDED.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"not a whole record: {key} is {record.get(key)!r}")
    error = record.get("test_error")
    if not record["diverged"] and not (isinstance(error, (int, float)) and math.isfinite(error)):
        raise ValueError(f"not a whole record: test_error is {error!r} in a run that did not diverge")
    return record
