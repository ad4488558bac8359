"""launcher.jobs=auto: counted while all run at once, stopped when more bring nothing, fail or do not fit."""

import subprocess
import sys

import pytest

from conftest import TINY
from hydra_plugins import side_by_side

TRIAL = """
import json, pathlib, sys, time
folder, name, rate, room = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / f"{name}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
(folder / f"{name}.part").write_text(json.dumps({"images_per_second": float(rate), "room": float(room)}))
(folder / f"{name}.part").rename(folder / f"{name}.report")
time.sleep(60)
"""


def starter(rates, room=9, started=None):
    def start(k, folder):
        line = [sys.executable, "-c", TRIAL, str(folder)]
        trials = [subprocess.Popen([*line, str(i), str(rates[k]), str(room)]) for i in range(k)]
        if started is not None:
            started.extend(trials)
        return trials

    return start


@pytest.mark.parametrize(
    ("rates", "best"),
    [({1: 100, 2: 60, 4: 25}, 2), ({1: 100, 2: 51, 4: 99}, 1), ({1: 100, 2: 90, 4: 80}, 4)],
)
def test_the_most_images_per_second_win(rates, best):
    started = []
    found, said = side_by_side.choose(starter(rates, started=started), [1, 2, 4])
    assert found == best
    assert f"auto: {best} at once (1: 100 images/s; 2: {2 * rates[2]} images/s" in said
    assert all(trial.poll() is not None for trial in started)


def test_what_would_not_fit_is_not_tried():
    found, said = side_by_side.choose(starter({1: 100}, room=1.9), [1, 2])
    assert found == 1
    assert "2: too much memory" in said


def test_a_trial_that_fails_ends_the_search():
    def start(k, folder):
        with (folder / "log").open("wb") as log:
            return [subprocess.Popen([sys.executable, "-c", "raise SystemExit('no more')"], stderr=log)]

    assert side_by_side.choose(start, [1, 2]) == (1, "launcher.jobs=auto: 1 at once (1: did not run, no more)")


@pytest.mark.slow
def test_a_sweep_that_measures(cli):
    code, output = cli("-m", *TINY, "budget=0.012", "seed=0,1", "launcher.jobs=auto")
    assert code == 0, output
    assert "images/s" in output
    assert "did not run" not in output
    assert "2 done" in output
