"""W&B dashboards of the papers' experiments: a workspace and a report each, with the report's tables and figures.

    python src/dashboard.py                     all papers
    python src/dashboard.py barz2018            one, or some of its experiments

Without a W&B key nothing is sent: what would be is written to reports/dashboards, and how to publish it is printed.
What would be sent is tested against W&B's own (de)serialisation and transaction logs; the sending itself has not been
tried, there was no account.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import report
from callbacks.loggers import QUIET, has_key
from depthlab.problem import Problem
from depthlab.report import dashboard as boards
from depthlab.report import gather, load_experiment, read_records
from depthlab.report.page import by_paper, cited
from depthlab.report.recipes import Expected, Recipes, kept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python src/dashboard.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="*", help="ids under conf/experiment, or folders of them; default: all")
    parser.add_argument("--runs", nargs="+", type=Path, default=[Path("runs")], metavar="DIR", help="default: runs")
    parser.add_argument("--out", type=Path, default=Path("reports/dashboards"), metavar="DIR")
    parser.add_argument("--entity", help="W&B user or team; default: the key's own")
    parser.add_argument("--project", default="depthlab", help="default: depthlab, as in conf/logger/wandb.yaml")
    args = parser.parse_args(argv)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        online = has_key()
        entity = args.entity or (default_entity() if online else "ENTITY")
        records, problems = read_records(args.runs)
        recipes = Recipes(report.compose, report.build, args.out / ".kept/recipes.json", report.key())
        pages = []
        for id in report.choose(args.experiment):
            experiment = load_experiment(report.CONF / "experiment" / f"{id}.yaml", id)
            expected = Expected(recipes, experiment) if experiment.runs else None
            parts = partial(recipes.config, experiment), report.build
            make = partial(gather, experiment, records, problems, expected, *parts)
            where = args.out / f".kept/{id}.pickle"
            pages.append(make() if experiment.runs else kept(where, recipes.key + report.images_at_hand(), make))
        recipes.keep()
        views = [{"id": p.experiment.id, "cite": p.experiment.paper.get("cite"), "page": p} for p in pages]
        for paper, members in by_paper(views).items():
            name, some = paper or "further", [view["page"] for view in members]
            made = [
                ("workspace", boards.workspace(name, some, entity, args.project)),
                ("report", boards.document(name, cited(members), some, entity, args.project)),
            ]
            files = boards.write_specifications(name, made, args.out)
            mode = "online" if online else "offline"
            boards.log_media(name, some, args.project, args.entity, args.out / "media", mode)
            print(f"{name}: {', '.join(map(str, files))}")
            if online:
                print("".join(f"    {thing.save().url}\n" for _, thing in made), end="")
        if not online:
            print(HOW.format(media=args.out / "media", runs=" ".join(f"{folder}/*" for folder in args.runs)))
    except ModuleNotFoundError as error:
        print(f"dashboard: {boards.EXTRA} ({error})", file=sys.stderr)
        return 2
    except (Problem, OSError) as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    return 0


HOW = """No W&B key was found: nothing was sent. To publish:
    wandb login                                       or set WANDB_API_KEY
    wandb sync {runs}/wandb/offline-run-*             the runs, if they were made with logger=wandb
    python src/dashboard.py                           workspaces, reports, figures (or: wandb sync {media}/wandb/*)"""


def default_entity() -> str:
    import wandb

    return wandb.Api().default_entity


if __name__ == "__main__":
    sys.exit(main())
