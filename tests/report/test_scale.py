"""Ten thousand records: in seconds, on a page that a browser opens."""

import json
import os
import time
from collections import Counter
from itertools import product
from random import Random

import pytest
from test_report import record

import report
from depthlab.report import html, load_experiment

ID = "barz2018/table1"
CURVES = ("val_error", "val_loss", "train_error", "train_loss", "lr", "seconds", "cpu_seconds", "images_per_second")
TIMES = 10  # as long as the standard library takes to read the JSON: 6 on an AMD EPYC, 1.9 s; two cores share it


@pytest.mark.slow
def test_ten_thousand_records(tmp_path, capsys):
    experiment = load_experiment(report.CONF / f"experiment/{ID}.yaml", ID)
    expected = report.identities(experiment)
    whole = {key: record() | {"study": ID, "identity": identity} for key, identity in expected.items()}
    for number, (seed, key) in enumerate(product(range(1667), whole)):
        one = whole[key]
        names = {section: one["identity"][section]["name"] for section in ("arch", "sched")}
        identity = one["identity"] | {"seed": seed}
        about = {"name": f"run{number}", "seed": seed, "identity": identity, "test_error": 25 + seed % 7, **names}
        (tmp_path / f"runs/run{number}").mkdir(parents=True)
        (tmp_path / f"runs/run{number}/result.json").write_text(json.dumps(one | about))
    (tmp_path / "runs/run0/result.json").write_text("{")
    started = time.process_time()
    assert report.main([ID, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert time.process_time() - started < 60  # 4 on an AMD EPYC
    text = capsys.readouterr().out
    assert "(1666)" in text  # seeds in a cell, one of them broken
    assert "run0/result.json: Expecting" in text
    if html.available():
        assert (tmp_path / f"out/{ID}.html").stat().st_size < 20e6


def over_all_experiments(folder, count):
    """Records of every cell, their curves as long as the recipe."""
    recipes, random, seeds = report.Recipes(report.compose, report.build), Random(0), Counter()
    asked = [load_experiment(report.CONF / f"experiment/{id}.yaml", id) for id in report.choose([])]
    cells = [(experiment, cell) for experiment in asked if experiment.runs for cell in experiment.cells()]
    for number in range(count):
        experiment, cell = cells[number % len(cells)]
        identity = recipes.identity(experiment, cell)
        recipe = json.dumps(identity)
        seed, seeds[recipe] = seeds[recipe], seeds[recipe] + 1
        epochs = max(1, round(identity["sched"]["epochs"] * experiment.budget))
        names = {key: identity[key]["name"] for key in ("arch", "sched", "data", "optim")}
        about = {"name": f"run{number}", "study": experiment.id, "seed": seed, "budget": experiment.budget, **names}
        about |= {
            "identity": identity | {"seed": seed, "budget": experiment.budget},
            "config": identity,
            "analyses": {},
        }
        curves = {key: [random.random() for _ in range(epochs)] for key in CURVES} | {"epoch": list(range(epochs))}
        numbers = {
            "precision": experiment.precision,
            "epochs": epochs,
            "train_loss": 0.1,
            "train_seconds": 1.0,
            "analyses": {},
        }
        one = record() | about | numbers | {"curves": curves, "test_error": random.uniform(5, 30)}
        (folder / f"run{number}").mkdir(parents=True)
        (folder / f"run{number}/result.json").write_text(json.dumps(one, indent=1))


def seconds(do) -> float:
    """Of the processor, in forks, too."""
    before = os.times()
    do()
    return sum(os.times()[:4]) - sum(before[:4])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_experiments(tmp_path):
    """Beside reading the JSON, which any machine has to; when configurations are known and the computed is computed."""
    runs = tmp_path / "runs"
    over_all_experiments(runs, 10_000)
    command = ["--runs", str(runs), "--out", str(tmp_path / "out")]
    assert report.main(command) == 0
    reading = seconds(lambda: [json.loads(path.read_bytes())["seed"] for path in runs.glob("*/result.json")])
    assert seconds(lambda: report.main(command)) < TIMES * reading
    if html.available():
        assert (tmp_path / "out/index.html").stat().st_size < 20e6
