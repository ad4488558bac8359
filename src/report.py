"""Finished runs beside published numbers.

    python src/report.py barz2018/table1        one experiment of conf/experiment; a folder (barz2018) is all in it
    python src/report.py                        all experiments

Reads finished runs only.
Prints the table and writes it, with the training curves, to reports/<experiment>.{md,csv,png}.
"""

import argparse
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from depthlab.problem import Problem
from depthlab.report import Experiment, load_experiment, read_records, write_report
from depthlab.report.tables import cell_key

CONF = Path(__file__).resolve().parent.parent / "conf"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python src/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="*", help="ids under conf/experiment, e.g. barz2018/table1; default: all")
    parser.add_argument("--runs", nargs="+", type=Path, default=[Path("runs")], metavar="DIR", help="default: runs")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="default: reports")
    args = parser.parse_args(argv)
    try:
        experiments = [load_experiment(CONF / "experiment" / f"{id}.yaml", id) for id in choose(args.experiment)]
        if args.runs != parser.get_default("runs") and not any(folder.is_dir() for folder in args.runs):
            raise Problem(f"--runs {' '.join(map(str, args.runs))}: there is no such folder")
        records, problems = read_records(args.runs)
        for experiment in experiments:
            draws = experiment.paper.get("figure") == "schedules"
            expected = identities(experiment) if records and not draws else None
            text, files = write_report(
                experiment, records, [] if draws else problems, args.out, expected, rates(experiment) if draws else None
            )
            print(f"{text}\nWritten: {', '.join(map(str, files))}\n")
    except (Problem, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def choose(asked: list[str]) -> list[str]:
    """The ids of the experiments asked for: an id, or a folder of them."""
    root = CONF / "experiment"
    known = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    chosen: list[str] = []
    for name in asked:
        found = [id for id in known if id == name or id.startswith(name.rstrip("/") + "/")]
        if not found:
            near = get_close_matches(name, known, 3, 0.5) or known
            raise Problem(f"no experiment {name!r} in {root}; did you mean {' or '.join(near)}?")
        chosen += found
    return list(dict.fromkeys(chosen)) if asked else known


def compose(experiment: Experiment, *overrides: str) -> dict[str, Any]:
    """The resolved configuration of one run of the experiment.

    Raises:
        Problem: Hydra cannot compose it.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from configuration import explain, resolve

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return resolve(compose("train", [f"experiment={experiment.id}", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise Problem(f"experiment={experiment.id} {' '.join(overrides)}: {explain(error)}") from None


def identities(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """What the identity of each cell's runs must be, whatever their seed, budget and precision."""
    from depthlab.records import identity_of

    return {
        cell_key(cell): identity_of(compose(experiment, *(f"{axis}={value}" for axis, value in cell.items())))
        for cell in experiment.cells()
    }


def rates(experiment: Experiment) -> dict[str, tuple[Callable[[int], float], int]]:
    """The learning rate of every schedule that a figure shows, as a function of the step, and its epochs."""
    from configuration import build

    steps, out = experiment.paper["steps_per_epoch"], {}
    for name in experiment.paper["schedules"]:
        schedule = build(compose(experiment, f"sched={name}"), "sched")
        out[name] = (lambda t, schedule=schedule: schedule.lr(t, steps), schedule.epochs)
    return out


if __name__ == "__main__":
    sys.exit(main())
