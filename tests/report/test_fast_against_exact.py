"""trainer as an axis of a table: runs of two precisions side by side, and their paired differences."""

import json

from depthlab.report import load_experiment, read_records, write_report

EXPERIMENT = """
defaults: [{override /data: cifar10}]
hydra: {sweeper: {params: {arch: resnet20, trainer: "exact,fast", seed: "0,1,2"}}}
study: modes
paper: {title: Modes, figure: depthlab.report.modes.paired}
"""


def plant(folder, mode, seed, error, loss):
    precision = {"exact": "32-true", "fast": "bf16-mixed"}[mode]
    trainer = {"precision": precision, "deterministic": True, "devices": 1}  # no more, as of an older version
    identity = {"arch": {"name": "resnet20"}, "data": {"name": "cifar10"}, "trainer": {"precision": precision}}
    record = {
        "schema": 1, "name": f"{mode}{seed}", "study": "modes", "arch": "resnet20", "sched": "sgd", "data": "cifar10",
        "identity": identity | {"seed": seed, "budget": 1}, "config": {"trainer": trainer}, "seed": seed, "budget": 1,
        "precision": precision, "epochs": 2, "steps": 2, "diverged": False, "test_error": error, "train_loss": loss,
        "curves": {"epoch": [0, 1], "val_error": [50, error], "train_loss": [2, loss]}, "ended": "completed",
    }  # fmt: skip
    (folder / record["name"]).mkdir(parents=True)
    (folder / record["name"] / "result.json").write_text(json.dumps(record))


def test_paired_differences(tmp_path):
    (tmp_path / "modes.yaml").write_text(EXPERIMENT)
    for seed, (exact, fast) in enumerate([(10, 11), (20, 23), (30, 32)]):
        plant(tmp_path / "runs", "exact", seed, exact, 0.5)
        plant(tmp_path / "runs", "fast", seed, fast, 0.5)
    plant(tmp_path / "runs", "fast", 9, 99, 0.5)  # no pair
    records, problems = read_records([tmp_path / "runs"])
    assert not problems
    experiment = load_experiment(tmp_path / "modes.yaml", "modes")
    text, _ = write_report(experiment, records, problems, tmp_path / "out", None)
    assert "budget 1, exact and fast ‡: 6 of 6 runs and 1 more" in text
    table = (tmp_path / "out/modes.pairs.csv").read_text().splitlines()
    assert table[0] == "data,budget,precision,arch,number,exact,fast,difference,standard_error,ratio,n"
    # differences 1, 3, 2: mean 2, sd 1, standard error 1 / sqrt(3)
    error, loss = (dict(zip(table[0].split(","), line.split(","))) for line in table[1:])
    assert (error["exact"], error["fast"], error["difference"], error["n"]) == ("20.0", "22.0", "2.0", "3")
    assert abs(float(error["standard_error"]) - 3**-0.5) < 1e-12
    assert abs(float(error["ratio"]) - 2 * 3**0.5) < 1e-12
    assert (loss["difference"], loss["ratio"]) == ("0.0", "")
