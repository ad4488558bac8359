"""Finished runs beside published numbers: tables, figures, verdicts and where every number comes from.

`experiments` knows what an experiment file asks for, `read` finds the records, `tables` sorts them into cells, `given`
says what a figure's function gets and returns, `figures` draws, `claims` judges, `page` gathers all that; `text`,
`html` and `dashboard` write it. A further table is a further YAML file under `conf/experiment/`; a figure of another
kind is a function that the file names, in a file per paper here.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "Experiment": "experiments",
    "gather": "page",
    "load_experiment": "experiments",
    "read_records": "read",
    "tabulate": "tables",
    "write": "text",
    "write_report": "text",
}
__all__ = ["Experiment", "gather", "load_experiment", "read_records", "tabulate", "write", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:  # analyses draw with `figures`: they need not wait for the statistics
        raise AttributeError(f"module 'depthlab.report' has no attribute {name!r}")
    return getattr(import_module(f"depthlab.report.{HOMES[name]}"), name)
