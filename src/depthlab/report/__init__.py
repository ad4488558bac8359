"""Finished runs beside published numbers: tables, figures and where every number comes from.

`experiments` knows what an experiment file asks for, `read` finds the records, `tables` sorts them into cells, `given`
says what a figure's function gets and returns, `figures` draws, `page` writes. A further table is a further YAML file
under `conf/experiment/`; a figure of another kind is a function that the file names, in a file per paper here.
"""

from depthlab.report.experiments import Experiment, load_experiment
from depthlab.report.page import write_report
from depthlab.report.read import read_records
from depthlab.report.tables import tabulate

__all__ = ["Experiment", "load_experiment", "read_records", "tabulate", "write_report"]
