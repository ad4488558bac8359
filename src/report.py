"""Finished runs beside published numbers.

    python src/report.py                        all experiments
    python src/report.py barz2018/table1        one experiment of conf/experiment; a folder (barz2018) is all in it
    python src/report.py --missing barz2018     the commands of the runs that are missing, with FLOPs and expected time

Reads finished runs only; figures that need no runs are computed. Writes tables, figures and verdicts to
reports/<experiment>.{md,csv,png} and, with `pip install 'depthlab[report]'`, one page of all that was asked for:
reports/index.html, or reports/<asked>.html.
"""

import argparse
import copy
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from depthlab.problem import Problem, closest
from depthlab.report import Experiment, gather, load_experiment, read_records, write
from depthlab.report.recipes import Expected, Recipes, fingerprint, kept

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
FORMATS = ("html", "md", "csv")
FEW = 3  # experiments that are printed in full; of more a line each


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python src/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="*", help="ids under conf/experiment, e.g. barz2018/table1; default: all")
    parser.add_argument("--runs", nargs="+", type=Path, default=[Path("runs")], metavar="DIR", help="default: runs")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="default: reports")
    parser.add_argument("--format", metavar="html,md,csv", help="what to write; default: all that can be")
    parser.add_argument("--missing", action="store_true", help="write nothing; print what is still to be run")
    parser.add_argument("--ran", action="store_true", help="write nothing of what has no results, or lacks its images")
    parser.add_argument("--verdicts", nargs="+", type=Path, default=[], metavar="FILE",
                        help="Markdown files in which the tables of verdicts are to be renewed")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        formats = chosen_formats(args.format)
        experiments = [load_experiment(CONF / "experiment" / f"{id}.yaml", id) for id in choose(args.experiment)]
        for folder in args.runs:
            if not folder.is_dir() and str(folder) in choose([]):
                raise Problem(f"--runs {folder}: this is an experiment; name it first, then --runs DIR")
        if args.runs != parser.get_default("runs") and not any(folder.is_dir() for folder in args.runs):
            raise Problem(f"--runs {' '.join(map(str, args.runs))}: there is no such folder")
        records, problems = read_records(args.runs)
        recipes = Recipes(compose, build, args.out / ".kept/recipes.json", key())
        if args.missing:
            print(missing(experiments, records, recipes), end="")
        else:
            report_all(args, formats, experiments, records, problems, recipes)
        recipes.keep()
    except BrokenPipeError:  # | head
        return 141
    except (Problem, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def report_all(
    args: argparse.Namespace, formats: Sequence[str], experiments: list[Experiment], records: list[dict[str, Any]],
    problems: list[str], recipes: Recipes,
) -> None:  # fmt: skip
    """Every experiment's files and lines, then what holds all of them."""
    one = partial(
        report_one, records=records, problems=problems, recipes=recipes, out=args.out, formats=formats, ran=args.ran
    )
    views = []
    for view in in_processes(one, experiments, enough=4 if len(records) > 1000 else 8):
        few = len(experiments) <= FEW
        print(f"{view['text']}\nWritten: {', '.join(map(str, view['files']))}\n" if few else view["line"])
        recipes.found |= view["recipes"]
        views.append(view)
    if "html" in formats:
        from depthlab.report.html import write_page

        name = args.experiment[0] if len(args.experiment) == 1 else "index"
        print(f"Written: {write_page(views, records, problems, args.out / f'{name}.html')}")
    for path in args.verdicts:
        from depthlab.report.text import renew

        renew(path, views)
        print(f"Written: {path}")
    if len(experiments) > FEW and problems:
        rest = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        print("Left out:", *problems[:20], *rest, sep="\n  ")


def report_one(
    experiment: Experiment, records: list[dict[str, Any]], problems: list[str], recipes: Recipes, out: Path,
    formats: Sequence[str], ran: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One experiment's files, and what the page and the tables of verdicts need of it: nothing that holds records."""
    from depthlab.report.text import overview, summary

    before = set(recipes.found)
    expected = Expected(recipes, experiment) if experiment.runs else None
    left_out = problems if experiment.runs else []
    parts = partial(recipes.config, experiment), build
    make = partial(gather, experiment, records, left_out, expected, *parts, still="md" in formats, empty=not ran)
    page = (
        make() if experiment.runs else kept(out / f".kept/{experiment.id}.pickle", recipes.key + images_at_hand(), make)
    )
    if ran and (page.lacking or (experiment.runs and not page.records)):
        formats = []
    for row in {id(row): row for verdict in page.verdicts for row in verdict.missing}.values() if formats else ():
        page.set_cost(row, recipes.cost(experiment, row.cell).get("flops"))
    text, files = write(page, out, formats)
    view = summary(page) | {"text": text, "files": files, "line": overview(page)}
    if "html" in formats:
        from depthlab.report import html

        view |= html.experiment(page)
    return view | {"recipes": {key: recipes.found[key] for key in recipes.found.keys() - before}}


def in_processes(one: Callable[[Experiment], Any], experiments: Sequence[Experiment], enough: int) -> Iterator[Any]:
    """`one` of each, in order; by as many forks as there are cores, up to four, where there is enough to do.

    Forked, not spawned: the records need not be sent. What computes takes longest, hence begins first.
    """
    gc.freeze()  # or collecting would go through every record again, and copy it in every fork
    try:
        cores = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        fork = len(experiments) >= enough and cores > 1 and sys.platform == "linux"
        yield from forked(one, experiments, cores) if fork else map(one, experiments)
    finally:
        gc.unfreeze()


def forked(one: Callable[[Experiment], Any], experiments: Sequence[Experiment], cores: int) -> Iterator[Any]:
    from multiprocessing import get_context

    global _one
    _one = one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # nothing was computed
        pool = get_context("fork").Pool(cores)
    with pool:
        first = sorted(experiments, key=lambda experiment: experiment.runs)
        found = {experiment.id: pool.apply_async(_call, (experiment,)) for experiment in first}
        for experiment in experiments:
            while not found[experiment.id].ready():
                found[experiment.id].wait(0.5)
                progress(sum(one.ready() for one in found.values()), len(found))
            yield found[experiment.id].get()
    progress(0, 0)


def progress(done: int, of: int) -> None:
    """A line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r{f'{done} of {of} experiments' if of else '':40}\r", end="", file=sys.stderr, flush=True)


def _call(experiment: Experiment) -> Any:
    return _one(experiment)


def key() -> str:
    """Changes when what was found of configurations may no longer hold."""
    return fingerprint([CONF, ROOT / "src", ROOT / "callbacks"]) + os.environ.get("DEPTHLAB_DATA", "")


def images_at_hand() -> str:
    """What is computed may look at images where there are some."""
    folder = Path(os.environ.get("DEPTHLAB_DATA", "data"))
    return " ".join(sorted(path.name for path in folder.glob("*"))) if folder.is_dir() else ""


def missing(experiments: Sequence[Experiment], records: list[dict[str, Any]], recipes: Recipes) -> str:
    """The listing of what is still to be run."""
    from depthlab.analysis import device_of
    from depthlab.records import hardware
    from depthlab.report import missing

    device = device_of("auto")
    found = [
        lack
        for experiment in experiments
        for lack in missing.lacks(experiment, records, recipes, Expected(recipes, experiment))
    ]
    machine = hardware(device)

    def step(config: dict[str, Any]) -> float:
        print(f"timing training steps of {config['arch']['name']}", file=sys.stderr)
        return missing.timed_step(config, build, device)

    missing.estimate(found, records, machine, step)
    return missing.listing(found, machine)


def chosen_formats(asked: str | None) -> list[str]:
    from depthlab.report import html

    if asked is None:
        return [name for name in FORMATS if name != "html" or html.available()]
    chosen = [name.strip() for name in asked.split(",")]
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise Problem(f"--format {unknown[0]}: there is {', '.join(FORMATS)}")
    if "html" in chosen and not html.available():
        raise Problem(html.EXTRA)
    return chosen


def choose(asked: list[str]) -> list[str]:
    """The ids of the experiments asked for: an id, or a folder of them."""
    root = CONF / "experiment"
    known = sorted((path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")), key=natural)
    chosen: list[str] = []
    for name in asked:
        found = [id for id in known if id == name or id.startswith(name.rstrip("/") + "/")]
        if not found:
            raise Problem(f"no experiment {name!r} in {root}; {closest(name, known)}")
        chosen += found
    return list(dict.fromkeys(chosen)) if asked else known


def natural(id: str) -> list[int | str]:
    """Figure 3 before Figure 10."""
    return [int(part) if part.isdigit() else part for part in re.findall(r"\d+|\D+", id)]


def compose(experiment: Experiment, *overrides: str) -> dict[str, Any]:
    """The resolved configuration of one run of the experiment.

    Raises:
        Problem: Hydra cannot compose it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from configuration import explain, resolve

    values = [override for override in overrides if "." in override.partition("=")[0]]
    try:
        cfg = copy.deepcopy(composed(experiment.id, *(choice for choice in overrides if choice not in values)))
        for override in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        return resolve(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise Problem(f"experiment={experiment.id} {' '.join(overrides)}: {explain(error)}") from None


@lru_cache(64)
def composed(id: str, *choices: str) -> Any:
    """Hydra's work, a tenth of a second: once for all values that a sweep sets in it. Without claims and the like."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={id}", *choices])
    with open_dict(cfg):
        for key in ("claims", "published", "notes", "labels", "options"):
            (cfg.paper or {}).pop(key, None)
    return cfg


def identities(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """What the identity of each cell's runs must be, whatever their seed, budget and precision."""
    expected = Expected(Recipes(compose, build), experiment)
    return {key: expected.get(key) for key in expected.cells}


def build(config: dict[str, Any], section: str, **more: Any) -> Any:
    """See `configuration.build`."""
    from configuration import build

    return build(config, section, **more)


if __name__ == "__main__":
    sys.exit(main())
