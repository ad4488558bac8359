"""Golden tests: planted records in, tables out. Every mean and std can be checked by hand."""

import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthlab.analysis import Result, files
from depthlab.problem import Problem
from depthlab.report import load_experiment, read_records, tabulate, write_report
from depthlab.report.figures import canvas
from depthlab.report.given import Drawn, Table
from depthlab.report.tables import cell_key, ratios

ROOT = Path(__file__).parents[2]

EXPERIMENT = """
# @package _global_
defaults: [{override /data: cifar100}]
study: paper/table
hydra: {mode: MULTIRUN, sweeper: {params: {arch: "plain11,resnet110", sched: "sgd,sgdr", seed: "0,1,2"}}}
paper:
  title: A table
  labels: {plain11: Plain-11, resnet110: ResNet-110, sgd: SGD, sgdr: SGDR}
  published:
    - {arch: plain11, seconds_per_epoch: 42}
    - {arch: resnet110, seconds_per_epoch: 175}
    - {arch: plain11, sched: sgd, test_error: 28.48, epochs: 164}
    - {arch: plain11, sched: sgdr, test_error: 27.09, epochs: 180}
    - {arch: resnet110, sched: sgd, test_error: 26.51, epochs: 164}
    - {arch: resnet110, sched: sgdr, test_error: 25.98, epochs: 180}
  ratios: [{of: {arch: resnet110}, over: {arch: plain11}}]
  notes:
    - {at: {sched: sgdr}, text: Known slip.}
    - {at: {arch: plain11}, column: seconds_per_epoch, text: Hardware unknown.}
"""
WEIGHT_DECAY = {"plain11": 0.001, "resnet110": 0.0004}


def record(arch="plain11", sched="sgd", seed=0, error=28.0, budget=1.0, precision="32-true", **other):
    """A whole record; `other` replaces top-level keys, `weight_decay` goes into the recipe."""
    decay = other.pop("weight_decay", WEIGHT_DECAY[arch])
    data = other.get("data", "cifar100")
    epochs = max(1, round({"sgd": 164, "sgdr": 180}[sched] * budget))
    identity = {
        "arch": {"name": arch}, "sched": {"name": sched}, "optim": {"weight_decay": decay}, "data": {"name": data},
        "trainer": {"precision": precision, "devices": 1}, "seed": seed, "budget": budget,
    }  # fmt: skip
    curve = [error + 60 / (1 + e) for e in range(epochs)]
    return {
        "schema": 1, "name": f"{arch}-{sched}-{data}-s{seed}-{budget}{precision}{decay}", "study": "paper/table",
        "identity": identity, "config": {"data": {"batch_size": 100}}, "arch": arch, "sched": sched, "data": data,
        "seed": seed, "budget": budget, "precision": precision, "device": "cuda", "hardware": "H200", "devices": 1,
        "threads": 1, "parameters": 3381796, "flops_per_image": 1_484_700_000 if arch == "plain11" else 1_517_000_000,
        "epochs": epochs, "steps": 500 * epochs, "test_error": error, "evaluated_on": "test", "diverged": False,
        "curves": {"epoch": list(range(epochs)), "val_error": curve, "train_loss": [c / 20 for c in curve]},
        "seconds_per_epoch": 10.0 if arch == "plain11" else 30.0, "ended": "completed",
        "versions": {"torch": "2.15.0"}, "git": {"commit": "0123456789abcdef", "dirty": False},
    } | other  # fmt: skip


def diverged(**what):
    return record(**what) | {"diverged": True, "diverged_step": 7, "test_error": None, "ended": "diverged"}


def plant(folder: Path, *records: dict) -> Path:
    for r in records:
        (folder / r["name"]).mkdir(parents=True)
        (folder / r["name"] / "result.json").write_text(json.dumps(r))
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


THREE = [record(seed=s, error=e) for s, e in enumerate([27.0, 28.0, 29.0])]  # mean 28, sample std 1


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "table.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "table.yaml", "paper/table")


@pytest.fixture
def report(experiment, tmp_path):
    """Plant records, write the report, return (text, Markdown, CSV rows, out folder)."""

    def make(*records, expected=None):
        found, problems = read_records([plant(tmp_path / "runs", *records)])
        text, files = write_report(experiment, found, problems, tmp_path / "out", expected)
        base = tmp_path / "out/paper/table"
        rows = read_csv(base.with_suffix(".csv"))
        return text, base.with_suffix(".md").read_text(), rows, files

    return make


def line(text: str, *starts: str, nth: int = 0) -> list[str]:
    """The cells of the nth Markdown table line that begins with these cells."""
    lines = [[c.strip() for c in row.strip("| ").split(" | ")] for row in text.splitlines() if row.startswith("| ")]
    return [cells for cells in lines if cells[: len(starts)] == list(starts)][nth]


def test_cell(report):
    text, page, rows, files = report(*THREE, record(arch="resnet110", error=26.01))
    assert line(page, "Plain-11", "SGD") == [
        "Plain-11", "SGD", "28.48", "28.00 ± 1.00 (3)", "-0.48", "164", "42 [1]", "10", "1.485", "12.2"
    ]  # fmt: skip
    assert line(page, "ResNet-110", "SGD")[3:6] == ["26.01 (1 of 3)", "-0.50", "164"]
    assert line(page, "ResNet-110", "SGDR")[2:6] == ["25.98 [2]", "- (0 of 3)", "", "(paper 180)"]
    assert "cifar100, budget 1, 32-true: 4 of 12 runs on H200 (4)" in text
    assert "ResNet-110 / Plain-11: paper 4.17; ours 3.00 (30 s / 10 s, H200); training FLOPs 1.02." in text
    assert [f.name for f in files] == ["table.md", "table.csv", "table.png"]
    assert "[1] Hardware unknown." in page
    assert "[2] Known slip." in page
    assert "torch: 2.15.0" in page
    assert "commit: 0123456789ab (4 runs)" in page
    row = rows[0]
    assert (row["paper_test_error"], row["test_error_mean"], row["test_error_std"]) == ("28.48", "28.0", "1.0")
    assert float(row["difference"]) == 28.0 - 28.48
    assert (row["test_errors"], row["seeds"]) == ("27.0 28.0 29.0", "0 1 2")
    assert float(row["training_flops"]) == 1_484_700_000 * 100 * 500 * 164


def test_missing_cells_come_with_their_command(report):
    text, *_ = report(*THREE[:1], *(record(budget=0.1, sched="sgdr", seed=s) for s in (0, 1, 2)))
    command = "    python src/train.py experiment=paper/table"
    assert f"{command} arch=plain11 sched=sgd seed=1,2\n" in text
    assert f"{command} arch=resnet110 sched=sgdr seed=0,1,2\n" in text
    assert f"{command} arch=plain11 sched=sgd seed=0,1,2 budget=0.1\n" in text
    assert f"{command} arch=plain11 sched=sgdr seed=0,1,2 budget=0.1\n" not in text


def test_diverged_runs_are_counted_and_not_averaged(report):
    three = [diverged(sched="sgdr", seed=s) for s in range(3)]
    text, page, rows, _ = report(*THREE[:2], diverged(seed=2), *three)
    assert line(page, "Plain-11", "SGD")[3] == "27.50 ± 0.71 (2 of 3), 1 diverged"
    assert line(page, "Plain-11", "SGDR")[3] == "- (0 of 3), 3 diverged"
    assert (rows[0]["n"], rows[0]["n_diverged"], rows[0]["n_missing"]) == ("2", "1", "0")
    assert "arch=plain11" not in text  # nothing of it is missing
    assert "diverged at step 7" in page


def test_budgets_and_precisions_have_tables_of_their_own(report):
    _, page, rows, files = report(
        *THREE, record(error=50.0, budget=0.05), record(error=60.0, precision="bf16-mixed"),
        record(error=70.0, data="digits"),
    )  # fmt: skip
    assert [row for row in page.splitlines() if row.startswith("## ")][:4] == [
        "## cifar100, budget 1, 32-true: 3 of 12 runs on H200 (3)",
        "## cifar100, budget 1, bf16-mixed ‡: 1 of 12 runs on H200 (1)",
        "## cifar100, budget 0.05 †, 32-true: 1 of 12 runs on H200 (1)",
        "## digits (not the experiment's data), budget 1, 32-true: 1 of 12 runs on H200 (1)",
    ]
    cells = [line(page, "Plain-11", "SGD", nth=n) for n in range(4)]
    assert [c[3] for c in cells[:3]] == ["28.00 ± 1.00 (3)", "60.00 (1 of 3)", "50.00 (1 of 3)"]
    assert [c[4] for c in cells[:3]] == ["-0.48", "+31.52‡", "+21.52†"]
    assert cells[2][5] == "8 (paper 164)"
    assert cells[3][2] == "70.00 (1 of 3)"  # nothing of the paper's beside another data set
    assert {r["budget"] + r["precision"] for r in rows} == {"1.032-true", "0.0532-true", "1.0bf16-mixed"}
    assert len([f for f in files if f.suffix == ".png"]) == 4


@pytest.mark.parametrize("expected", [False, True])
def test_another_recipe_never_enters_the_cell(report, experiment, expected):
    other = [record(seed=s, error=40.0, weight_decay=0.0004) for s in range(3)]
    identities = {cell_key(c): record(**c)["identity"] for c in experiment.cells()} if expected else None
    # without the expected identities, this study's own runs decide, though fewer
    other = other if expected else [r | {"study": None} for r in other]
    _, page, rows, _ = report(*THREE[:2], *other, expected=identities)
    assert line(page, "Plain-11", "SGD")[3] == "27.50 ± 0.71 (2 of 3)"
    assert line(page, "Plain-11", "SGD [3]")[3] == "40.00 ± 0.00 (3)"
    assert "[3] Another recipe, not in the row above: optim.weight_decay=0.0004 (not 0.001)." in page
    assert [r["test_errors"] for r in rows if r["other_recipe"]] == ["40.0 40.0 40.0"]


def test_only_the_experiments_own_recipe_fills_its_cell(report, experiment):
    identities = {cell_key(c): record(**c)["identity"] for c in experiment.cells()}
    _, page, *_ = report(record(weight_decay=0.5), expected=identities)
    assert line(page, "Plain-11", "SGD")[3] == "- (0 of 3)"


def test_runs_of_another_study(report):
    """The same recipe counts wherever it was run; another study's other recipe is that study's affair."""
    _, page, rows, _ = report(
        record(error=20.0, study=None), record(seed=1, error=22.0, study="grid"),
        record(seed=2, error=90.0, study="ablation", weight_decay=0.9),
        record(seed=2, error=90.0, study="x", data="stl10"),
    )  # fmt: skip
    assert line(page, "Plain-11", "SGD")[3] == "21.00 ± 1.41 (2 of 3)"
    assert len(rows) == 4
    assert "90.0" not in page


def test_times_of_two_machines_are_not_averaged(report, experiment):
    slow = record(seed=1, device="cpu", hardware="EPYC", threads=2, seconds_per_epoch=400.0)
    records = [record(), slow, record(arch="resnet110")]
    _, page, rows, _ = report(*records)
    assert line(page, "Plain-11", "SGD")[7] == "400 / 10"
    assert (rows[0]["seconds_per_epoch"], rows[0]["hardware"]) == ("400.0; 10.0", "EPYC, 2 threads; H200")
    assert ratios(experiment, tabulate(experiment, records)[0])[0]["seconds"] == {"H200": (30.0, 10.0)}


def test_a_grown_networks_epoch_is_its_mean_one(report, experiment):
    """Its median epoch is one of the middle depth; seconds of the processor are compared, too."""

    def timed(cpu, depth, **of):
        one = record(device="cpu", hardware="EPYC", **of)
        one["curves"] |= {"cpu_seconds": [cpu] * 164, "depth": depth}
        return one | {"train_seconds": 164 * 25.0}

    grown = timed(8.0, [14] * 82 + [26] * 82, arch="resnet110", seconds_per_epoch=7.0)
    records = [grown, timed(2.0, [26] * 164, seconds_per_epoch=10.0)]
    _, page, *_ = report(*records)
    found = ratios(experiment, tabulate(experiment, records)[0])[0]
    assert found["seconds"] == {"EPYC, 1 thread": (25.0, 10.0)}
    assert found["cpu_seconds"] == {"EPYC, 1 thread": (8.0, 2.0)}
    assert "ours 2.50 (25 s / 10 s, EPYC, 1 thread); of the processor 4.00 (EPYC, 1 thread); training" in page
    assert line(page, "ResNet-110", "SGD")[7] == "25"


def test_records_that_cannot_be_read_are_named(report, tmp_path):
    runs = tmp_path / "runs"
    for name, content in {
        "broken": '{"schema": 1, "na', "list": "[]", "future": json.dumps(record() | {"schema": 99}),
        "half": json.dumps({k: v for k, v in record().items() if k != "budget"}),
        "nan": json.dumps(record() | {"test_error": float("nan")}), "copy": json.dumps(THREE[0]),
    }.items():  # fmt: skip
        (runs / name).mkdir(parents=True)
        (runs / name / "result.json").write_text(content)
    (runs / "unfinished").mkdir()
    text, page, rows, _ = report(*THREE)
    for words in ("broken/result.json: ", "list/result.json: not a record", "schema 99", "budget is None",
                  "test_error is nan", "the same run as"):  # fmt: skip
        assert sum(words in row for row in text.splitlines()) == 1, words
        assert words in page
    assert "unfinished" not in text
    assert rows[0]["n"] == "3"
    assert read_records([tmp_path / "nowhere"]) == ([], [f"{tmp_path / 'nowhere'}: no such folder of runs"])


def test_the_same_records_give_the_same_bytes(experiment, tmp_path):
    written = [
        {f.name: f.read_bytes() for f in write_report(experiment, records, [], tmp_path / str(n))[1]}
        for n, records in enumerate([THREE, copy.deepcopy(THREE)])
    ]
    assert written[0] == written[1]
    assert b"\x89PNG" in written[0]["table.png"]


def test_a_figure_does_not_outlive_its_records(experiment, tmp_path):
    write_report(experiment, THREE, [], tmp_path)
    write_report(experiment, [], [], tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_without_published_numbers(tmp_path):
    (tmp_path / "demo.yaml").write_text(
        "defaults: [{override /data: digits}]\nstudy: demo\nbudget: 0.05\npaper: {title: Demo}\n"
        'hydra: {sweeper: {params: {arch: "plain11,resnet110", sched: "sgd,sgdr", seed: "range(2)"}}}\n'
    )
    demo = load_experiment(tmp_path / "demo.yaml", "demo")
    made = [record(seed=s, error=3.0 + s, budget=0.05, data="digits", study="demo") for s in (0, 1)]
    text, _ = write_report(demo, made, [], tmp_path)
    assert "paper" not in text
    assert "plain11 sgd 3.50 ± 0.71 (2) 8 10 1.485 0.594" in " ".join(text.split())
    # the demo's own budget and data need no mention
    assert "experiment=demo arch=plain11 sched=sgdr seed=0,1\n" in text


class Down:
    epochs = 4

    @staticmethod
    def lr(t, steps_per_epoch):
        return 1.0 / (1 + t)


def test_schedules_figure(tmp_path):
    (tmp_path / "fig.yaml").write_text(
        "paper: {figure: depthlab.report.figures.schedules, labels: {down: Down},\n"
        "  options: {schedules: [down], steps_per_epoch: 5},\n"
        "  published: [{sched: down, epochs: 4}], notes: [{at: {sched: down}, text: A slip.}]}\n"
    )
    fig = load_experiment(tmp_path / "fig.yaml", "fig")
    overrides = []
    parts = lambda *given: overrides.append(given), lambda config, section: Down
    text, files = write_report(fig, [], [], tmp_path, None, *parts)
    assert overrides == [("sched=down",)]
    rows = read_csv(tmp_path / "fig.csv")
    assert [r["lr_max"] for r in rows] == ["1.0", str(1 / 6), str(1 / 11), str(1 / 16)]
    assert text.splitlines()[4].split() == ["Down", "[1]", "4", "1", "0.05", "1", "0.05"]
    with Image.open(tmp_path / "fig.png") as image:
        assert image.size[0] > 700
        assert len(files) == 3


def spectrum(given, analysis, digits=1):
    """A figure of measured runs, as a paper's file would have it."""
    figure = canvas(2, 2)
    axis, lines, rows = figure.subplots(), [], []
    for row, one, result in given.measured(analysis):
        axis.plot(result.arrays["sizes"])
        lines.append([given.experiment.name_of(row.cell), f"{result.scalars['gamma']:.{digits}f}"])
        rows.append({"seed": one["seed"], "gamma": result.scalars["gamma"]})
    table = Table("Norms", ["network", "gamma"], lines, rows)
    return Drawn({"": figure, "twice": figure}, {"norms": table}, given.unmeasured(analysis))


def measure(folder, name, gamma, step):
    files.write(folder, name, Result({"gamma": gamma}, {"sizes": np.arange(3)}), {"step": step})


def test_a_papers_own_figure(tmp_path):
    """Drawn from what was measured after the last step, block by block; in place of the curves."""
    (tmp_path / "fig.yaml").write_text(
        EXPERIMENT + "  figure: test_report.spectrum\n  options: {analysis: norms, digits: 2}\n"
    )
    experiment = load_experiment(tmp_path / "fig.yaml", "fig")
    made = [*THREE, record(budget=0.5, seed=0)]
    runs = plant(tmp_path / "runs", *made)
    steps = 500 * 164
    measure(runs / made[0]["name"], "norms-epoch0164", 0.125, steps)  # during training
    measure(runs / made[1]["name"], "norms", 0.25, steps)  # afterwards
    measure(runs / made[2]["name"], "norms-epoch0080", 9, 500 * 80)  # not the last weights
    measure(runs / made[2]["name"], "norms", 9, 7)  # when the run was not finished
    measure(runs / made[3]["name"], "norms", 0.5, 500 * 82)
    text, written = write_report(experiment, *read_records([runs]), tmp_path / "out")
    assert [row for row in text.splitlines() if re.fullmatch(r"Plain-11 SGD  \d\S+", row)] == [
        "Plain-11 SGD  0.12",
        "Plain-11 SGD  0.25",
        "Plain-11 SGD  0.50",
    ]
    assert text.count("Not measured: 1 runs.") == 1
    assert f"    python src/analyze.py run=[{(runs / made[2]['name']).as_posix()}] analysis=norms\n" in text
    slug = "cifar100-budget0.5-32-true"
    names = [
        "fig.md",
        "fig.csv",
        "fig.norms.csv",
        "fig.png",
        "fig.twice.png",
        f"fig.{slug}.png",
        f"fig.twice.{slug}.png",
    ]
    assert [f.name for f in written] == names
    assert [(r["budget"], r["seed"], r["gamma"]) for r in read_csv(tmp_path / "out/fig.norms.csv")] == [
        ("1.0", "0", "0.125"), ("1.0", "1", "0.25"), ("0.5", "0", "0.5"),
    ]  # fmt: skip
    write_report(experiment, [], [], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "fig.csv", "fig.md", "fig.norms.csv", "fig.png", "fig.twice.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "options", "words"),
    [
        ("nowhere.figure", {}, "paper.figure=nowhere.figure cannot be imported (No module named 'nowhere')"),
        ("curves", {}, "paper.figure=curves cannot be imported"),
        ("test_report.spectrum", {}, "paper.options: missing a required argument: 'analysis' (test_report.spectrum)"),
        ("test_report.spectrum", {"analysis": "a", "x": 1}, "unexpected keyword argument 'x'"),
    ],
)
def test_a_figure_that_is_none(experiment, tmp_path, figure, options, words):
    experiment.paper.update(figure=figure, options=options)
    with pytest.raises(Problem) as problem:
        write_report(experiment, THREE, [], tmp_path)
    assert words in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("published:", "publishd:"), "paper.publishd is not known"),
        (("arch: plain11, sched: sgd,", "arch: plain12, sched: sgd,"), "published[2].arch is 'plain12'"),
        (('"sgd,sgdr"', '"glob(*)"'), "hydra.sweeper.params.sched is 'glob(*)'"),
        (("study: paper/table", "study: ["), "cannot be read"),
        (("params:", "parms:"), "sweeps nothing (hydra.sweeper.params) and "),
    ],
)
def test_bad_experiment_file(tmp_path, change, words):
    (tmp_path / "table.yaml").write_text(EXPERIMENT.replace(*change))
    with pytest.raises(Problem) as problem:
        load_experiment(tmp_path / "table.yaml", "paper/table")
    assert words in str(problem.value)
    assert "\n" not in str(problem.value)


FILES = sorted((ROOT / "conf/experiment").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_experiment_files(path, tmp_path):
    """Every experiment of the repository is readable, and carries the id of its place."""
    import yaml

    id = path.relative_to(ROOT / "conf/experiment").with_suffix("").as_posix()
    assert yaml.safe_load(path.read_text())["study"] == id
    experiment = load_experiment(path, id)
    if experiment.runs:
        assert write_report(experiment, [], [], tmp_path)[0].startswith(f"{id}: ")


def test_barz2018_table1():
    experiment = load_experiment(ROOT / "conf/experiment/barz2018/table1.yaml", "barz2018/table1")
    errors = {tuple(c.values()): experiment.published(c)["test_error"] for c in experiment.cells()}
    assert errors == {
        ("resnet110", "sgd"): 26.51, ("resnet110", "clr"): 27.78, ("resnet110", "sgdr"): 25.98,
        ("plain11", "sgd"): 28.48, ("plain11", "clr"): 27.26, ("plain11", "sgdr"): 27.09,
    }  # fmt: skip
    assert experiment.seeds == [0, 1, 2]


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "src/report.py"), *args], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_command_with_an_unknown_name(tmp_path):
    done = run("barz2018/tabel1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean barz2018/table1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_command(tmp_path):
    """On the real configuration: a run of the very recipe fills its cell, another does not; Figure 2 is drawn."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        import report as command
    finally:
        sys.path.remove(str(ROOT / "src"))
    table = load_experiment(ROOT / "conf/experiment/barz2018/table1.yaml", "barz2018/table1")
    identity = command.identities(table)[cell_key({"arch": "plain11", "sched": "sgd"})]
    own = record(error=28.0, study=None) | {"identity": identity}
    other = record(error=99.0, study=None) | {"identity": identity | {"augment": {"name": "none"}}, "name": "other"}
    plant(tmp_path / "here", own, other)
    done = run("barz2018", "--runs", "here", "--out", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "28.00 (1 of 3)" in done.stdout
    assert "augment.name=none (not shift)" in done.stdout
    names = sorted(p.name for p in (tmp_path / "there/barz2018").iterdir())
    assert {"fig2.csv", "fig2.md", "fig2.png", "table1.csv", "table1.md", "table1.png"} <= set(names)
    rates = {(r["sched"], r["epoch"]): float(r["lr_first"]) for r in read_csv(tmp_path / "there/barz2018/fig2.csv")}
    assert (rates["sgd", "0"], rates["sgd", "163"]) == (0.01, pytest.approx(0.001))
    assert rates["clr", "10"] == pytest.approx(0.064)
    assert rates["sgdr", "179"] == pytest.approx(2.77704e-5, rel=1e-5)


def test_a_folder_of_runs_is_no_experiment(tmp_path):
    """`--runs runs demo` would take the experiment for a folder; a folder of that name is one."""
    (tmp_path / "runs").mkdir()
    done = run("--missing", "--runs", "runs", "demo", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "report: --runs demo: this is an experiment; name it first, then --runs DIR\n",
    )
    (tmp_path / "demo").mkdir()
    assert run("barz2018/fig2", "--runs", "demo", cwd=tmp_path).returncode == 0


def test_what_lacks_its_images_is_left_as_it_was(tmp_path):
    """`make results` where CIFAR-10 is not."""
    for asked, written in ((["--ran"], []), ([], ["untrained.weights.csv"])):
        done = run("yu2019/untrained", "--runs", ".", "--out", "out", "--format", "csv", *asked, cwd=tmp_path)
        assert "No CIFAR-10 in data_dir: sigma and cushions not computed" in done.stdout, done.stderr
        assert [path.name for path in tmp_path.glob("out/yu2019/*")] == written
