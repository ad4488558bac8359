"""`--missing`: the commands make exactly the runs that are missing; FLOPs and time are those of the recipe."""

import itertools
import re
import shlex

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_report import plant, record

import report
from configuration import build, resolve
from depthlab.records import canonical, hardware, identity_of
from depthlab.report import load_experiment, missing
from depthlab.report.tables import cell_key, flatten


def experiment(id):
    return load_experiment(report.CONF / f"experiment/{id}.yaml", id)


def listed(text: str) -> list[str]:
    """The command of each cell; the first of an experiment is that of all of it."""
    found = [line.split("python src/train.py ")[1] for line in text.splitlines() if "python src/train.py" in line]
    return [command for command in found if " " in command]


def runs_of(command: str) -> list[dict]:
    """Identities of the runs of a command, as src/train.py makes them: Hydra's overrides, swept over commas."""
    choices = [[f"{key}={one}" for one in values.split(",")]
               for key, _, values in (part.partition("=") for part in shlex.split(command))]  # fmt: skip
    with initialize_config_dir(str(report.CONF), version_base="1.3"):
        return [identity_of(resolve(compose("train", list(one)))) for one in itertools.product(*choices)]


def key(identity: dict) -> str:
    return repr(sorted((k, repr(v)) for k, v in flatten(canonical(identity)).items()))


def finished(id: str, cell: dict, seed: int, **more) -> dict:
    """A record of the very recipe, made here."""
    asked = experiment(id)
    identity = report.identities(asked)[cell_key(cell)] | {"seed": seed, "budget": asked.budget}
    about = {"budget": asked.budget, "data": asked.data, "study": id, "hardware": hardware(), "device": "cpu"}
    return (
        record(sched=cell.get("sched", "sgd"), seed=seed)
        | cell
        | about
        | {"identity": identity, "name": f"run-{seed}", **more}
    )


def test_figure_3_stands_before_figure_10():
    figures = [id for id in report.choose(["chang2018"]) if "/fig" in id]
    assert figures == [f"chang2018/fig{n}" for n in (3, 4, 6, 7, 8, 9, 10, 11)]


@pytest.mark.parametrize("id", ["barz2018/table1_cpu", "chang2018/table3_cpu", "li2018/fig9", "yu2019/table1"])
def test_commands_make_what_is_missing(id):
    """Of axes that are groups, options, growth, floats; each cell once, by its seeds."""
    asked = experiment(id)
    recipes = report.Recipes(report.compose, report.build)
    cells = asked.cells()[:2] + asked.cells()[-1:]
    wanted = {
        key(recipes.identity(asked, cell) | {"seed": seed, "budget": asked.budget})
        for cell in cells
        for seed in asked.seeds
    }
    commands = [asked.command(cell, asked.seeds) for cell in cells]
    made = [key(identity) for command in commands for identity in runs_of(command.split("src/train.py ")[1])]
    assert sorted(made) == sorted(wanted)


def test_command_tells_runs_flops_and_time(tmp_path, monkeypatch, capsys):
    """1 ms an image, as the finished runs took: 50,000 images x 164, 160 or 180 epochs."""
    monkeypatch.setattr("depthlab.analysis.device_of", lambda name: torch.device("cpu"))
    ids = ["barz2018/table1"]
    seconds = {"plain11": 1e-3, "resnet110": 4e-3}
    done = [finished(*ids, {"arch": arch, "sched": "sgd"}, 1, name=arch, train_seconds=164 * 50_000 * each)
            for arch, each in seconds.items()]  # fmt: skip
    short = {"trainer": {"limit_train_batches": 2}}  # its epochs say nothing about those of the recipe
    done.append(finished(*ids, {"arch": "plain11", "sched": "sgd"}, 9, name="short", train_seconds=9.0, config=short))
    plant(tmp_path / "runs", *done)
    out = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert report.main(["--missing", *ids, *out]) == 0
    text = capsys.readouterr().out
    lines = [re.sub(" +", " ", line.strip()) for line in text.splitlines()]
    train = "python src/train.py experiment=barz2018/table1"
    flops = {"sgd": (12.2, 12.4), "clr": (11.9, 12.1), "sgdr": (13.4, 13.7)}  # SPEC, computed by hand
    hours = {"sgd": ("2.3 h", "9.1 h"), "clr": ("2.2 h", "8.9 h"), "sgdr": ("2.5 h", "10 h")}
    for sched in flops:
        for arch, pflop, time in zip(seconds, flops[sched], hours[sched], strict=True):
            n, seeds = (2, "0,2") if sched == "sgd" else (3, "0,1,2")
            assert f"{n} runs x {pflop} PFLOP, {time} {train} arch={arch} sched={sched} seed={seeds}" in lines
    assert lines[0].startswith("barz2018/table1: 16 runs missing, 202 PFLOP, ")  # of 227
    assert "~" not in lines[0]  # nothing was timed here
    made = [key(run) for command in listed(text)[:1] for run in runs_of(command)]
    assert len(set(made)) == 2
    assert not (tmp_path / "out/barz2018").exists()  # it prints, no more


def test_nothing_is_missing(tmp_path, capsys):
    every = [finished("demo", cell, seed, name=f"{number}-{seed}", train_seconds=1.0)
             for number, cell in enumerate(experiment("demo").cells()) for seed in (0, 1)]  # fmt: skip
    plant(tmp_path / "runs", *(one | {"arch": one["identity"]["arch"]["name"]} for one in every))
    assert report.main(["--missing", "demo", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "Nothing is missing.\n"


def test_steps_are_timed_where_no_run_was():
    """Once per network, batch and precision; what the steps took, times the images of a run."""
    asked, recipes, timed = experiment("demo"), report.Recipes(report.compose, report.build), []

    def step(config):
        timed.append(config["arch"]["name"])
        return 0.5

    found = missing.lacks(asked, [], recipes)
    missing.estimate(found, [], hardware(), step)
    assert sorted(timed) == ["plain11", "resnet20"]
    assert {(lack.seconds, lack.images) for lack in found if "sgdr" not in lack.command} == {(0.5 * 1500 * 8, 1500 * 8)}
    text = missing.listing(found, "a machine")
    assert text.startswith("demo: 8 runs missing, ")
    assert "~" in text.splitlines()[0]
    assert "Time: on a machine; from finished runs, or (~) 3 training steps made now on noise." in text


@pytest.mark.parametrize("more", [[], ["trainer.precision=bf16-mixed"], ["trainer.precision=64-true"]])
def test_a_timed_step(more):
    with initialize_config_dir(str(report.CONF), version_base="1.3"):
        tiny = ["arch=resnet", "arch.depth=8", "arch.width=4", "data=digits", "data.batch_size=4"]
        config = resolve(compose("train", [*tiny, *more]))
    assert 0 < missing.timed_step(config, build, torch.device("cpu")) < 60


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "time unknown"), (59.4, "59 s"), (120, "2.0 min"), (3600 * 3.21, "3.2 h"),
                           (3600 * 50, "2.1 days"), (86400 * 12, "12 days")],
)  # fmt: skip
def test_duration(seconds, words):
    assert missing.duration(seconds) == words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_printed_command_fills_its_cell(cli, tmp_path, monkeypatch, capsys):
    """Through the real src/train.py, on digits: then that cell is no longer missing."""
    asked = ["--missing", "demo", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    (tmp_path / "runs").mkdir()
    assert report.main(asked) == 0
    before = listed(capsys.readouterr().out)
    code, output = cli(*shlex.split(before[0].replace("seed=0,1", "seed=0")), "trainer.accelerator=cpu")
    assert code == 0, output
    assert report.main(asked) == 0
    after = listed(capsys.readouterr().out)
    assert after == [before[0].replace("seed=0,1", "seed=1"), *before[1:]]
