"""Whether what is asked of a run has been measured: the same analysis, of its last weights, with the same options.

The file of a measurement holds the options that it was made with (`analysis`). Files from before they did (committed
records have such) count as what is asked for; so does everything where nothing in particular is asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthlab.analysis import files
from depthlab.records import WHEN

# Of a section of conf/analysis: which, how drawn, how fast, when. All other keys change the numbers.
NO_NUMBERS = ("name", "_target_", "figure", "extra", "check", "workers", "chunk", *WHEN)
Options = Mapping[str, Any]


def options(section: Options) -> dict[str, Any]:
    """What of it changes the numbers."""
    return {key: value for key, value in section.items() if key not in NO_NUMBERS}


def counts(about: Mapping[str, Any], section: Options | None) -> bool:
    """Whether a measurement, by what its file says of it, is one with these options."""
    made = about.get("analysis")
    return section is None or not isinstance(made, dict) or options(made) == options(section)


def last_weights(record: Mapping[str, Any], folder: Path, name: str, section: Options | None = None) -> str | None:
    """Under which name the measurement of a finished run's last weights lies, made during training or later."""
    for file in (name, f"{name}-epoch{record['epochs']:04d}"):
        about = files.about(folder, file)
        if about is not None and about.get("step") == record["steps"] and counts(about, section):
            return file
    return None


def unmeasured(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The `analyses` asked for after the last epoch that a finished run in `folder` lacks: another study trained it."""
    record, last = finished(config, folder), config["sched"]["epochs"]
    due = {
        name: of for name, of in config["analyses"].items()
        if last in of.get("at", []) or last % (of.get("every") or last + 1) == 0
    }  # fmt: skip
    return [name for name, of in due.items() if record and last_weights(record, folder, name, of) is None]


def missed(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The `analyses` asked for before the last epoch, too, without which a finished run in `folder` was trained."""
    record, last = finished(config, folder), config["sched"]["epochs"]
    early = [
        name for name, of in config["analyses"].items()
        if of.get("at_steps") or of.get("every_steps") or (of.get("every") or last) < last
        or any(epoch != last for epoch in of.get("at", []))
    ]  # fmt: skip
    return [name for name in early if record and not record["analyses"].get(f"{name}_during")]


def finished(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The record of a run that can be asked for `analyses`, None where none is asked for or there are no weights."""
    path = folder / "result.json"
    if not config["analyses"] or not path.exists() or not (folder / "last.ckpt").exists():
        return None
    record = json.loads(path.read_text())
    return None if record["diverged"] else record
