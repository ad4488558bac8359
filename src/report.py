"""Finished runs beside published numbers.

    python src/report.py barz2018/table1        one experiment of conf/experiment; a folder (barz2018) is all in it
    python src/report.py                        all experiments

Reads finished runs only; figures that need no runs are computed.
Prints the table and writes it, with its figures, to reports/<experiment>.{md,csv,png}.
"""

import argparse
import sys
from difflib import get_close_matches
from functools import partial
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
            expected = identities(experiment) if records and experiment.runs else None
            left_out = problems if experiment.runs else []
            parts = partial(compose, experiment), build
            text, files = write_report(experiment, records, left_out, args.out, expected, *parts)
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


def build(config: dict[str, Any], section: str, **more: Any) -> Any:
    """See `configuration.build`."""
    from configuration import build

    return build(config, section, **more)


if __name__ == "__main__":
    sys.exit(main())
