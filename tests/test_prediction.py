"""A grid's hours: which runs it has, what they add up to, and whether they come true."""

import os

import numpy as np
import pytest
import torch

import benchmark
import prediction
from depthlab.problem import Problem
from prediction import Counts, Timing, cost, jobs, limited


def cpu(seconds):
    return np.array([2 * seconds, seconds])


def test_the_runs_of_a_table():
    found = jobs("barz2018/table1", ["seed=0"])
    assert len(found) == 6
    assert len({prediction.kind(config) for _, config in found}) == 2  # a network each
    for name, said in (("barz2018/table9", "did you mean barz2018/table1"), ("barz2018/fig2", "trains nothing")):
        with pytest.raises(Problem, match=said):
            jobs(name, [])


def test_a_run_is_the_sum_of_its_parts():
    ((_, config),) = jobs("barz2018/table1", ["seed=0", "arch=plain11", "sched=sgd", "budget=0.0625"])  # 10 epochs
    counts, timing = Counts(train=500, validation=20, test=120), Timing(cpu(1.0), cpu(0.1), cpu(0.2))
    expected = 10 * (500 * 1.0 + 20 * 0.1) + 120 * 0.2 + 7
    assert cost(config, [timing], counts, cpu(7)) == pytest.approx(cpu(expected))
    config["trainer"]["check_val_every_n_epoch"] = 4  # after the epochs 4 and 8
    assert cost(config, [timing], counts, cpu(7)) == pytest.approx(cpu(expected - 8 * 20 * 0.1))


def test_a_network_that_grows_is_timed_at_every_depth():
    what = ["arch=ml14", "grow=multilevel", "sched=multilevel_cosine", "data=cifar10", "seed=0"]
    ((_, config),) = jobs("chang2018/table3", what)  # 160 epochs, growth at 60 and 110
    timings = [Timing(cpu(step), cpu(0), cpu(step)) for step in (1, 2, 4)]
    whole = 10 * (60 * 1 + 50 * 2 + 50 * 4) + 3 * 4
    assert cost(config, timings, Counts(10, 5, 3), cpu(0)) == pytest.approx(cpu(whole))


@pytest.mark.parametrize(("limit", "batches"), [(None, 25), (3, 6), (100, 25), (0.5, 12)])
def test_limits_as_lightning_takes_them(limit, batches):
    assert limited([range(20), range(5)], limit) == batches


def test_a_grid_that_is_none(capsys):
    assert benchmark.main(["--grid", "barz2018/table9"]) == 2
    assert "table9" in capsys.readouterr().err


@pytest.mark.slow
def test_it_comes_true(cli, data_dir, monkeypatch):
    """In processor time, within 15 %: a machine that others use changes that of the clock at will."""
    monkeypatch.setenv("DEPTHLAB_DATA", str(data_dir))
    what = ["sched=sgd", "seed=0", "arch=resnet20", "budget=0.02", "trainer.accelerator=cpu"]
    (line, config), *more = jobs("demo", what)
    assert more == []
    timings, counts = prediction.timed(config, torch.device("cpu"), None)
    assert counts == (15, 2, 8)
    predicted = cost(config, timings, counts, prediction.around(line, config, timings[0]))[1]
    before = os.times()
    code, output = cli("experiment=demo", *what, "hydra.mode=RUN")
    after = os.times()
    assert code == 0, output
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert predicted == pytest.approx(used, rel=0.15)
