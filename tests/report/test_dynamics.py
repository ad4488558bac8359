"""Chang et al.'s figures from planted records: what they measure can be said beforehand."""

from pathlib import Path

import numpy as np
import pytest

from depthlab.analysis import Result, files
from depthlab.report import chang2018, dynamics, load_experiment, tabulate
from depthlab.report.given import Given, Notes, draw
from tests.report.test_report import record

CONF = Path(__file__).parents[2] / "conf/experiment/chang2018"


def planted(folder, name, cell, seed=0, curves=None, **norms):
    """A record of `cell`, in a folder of its own with norms after its last step."""
    one = record(seed=seed, study=f"chang2018/{name}", data="cifar10")
    config = {}
    for key, value in cell.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[last] = {"name": value} if key == "arch" else value
    of = {key: value for key, value in cell.items() if key in ("arch", "data")}
    path = folder / "-".join(map(str, [*cell.values(), seed]))
    path.mkdir(parents=True)
    if norms:
        arrays = {key: np.asarray(value) for key, value in norms.items() if np.ndim(value)}
        scalars = {key: value for key, value in norms.items() if not np.ndim(value)}
        files.write(path, "norms", Result(scalars, arrays), {"step": one["steps"]})
    return one | {"config": config, "folder": str(path), "curves": curves or one["curves"]} | of


def drawn(name, records):
    experiment = load_experiment(CONF / f"{name}.yaml", f"chang2018/{name}")
    (block,) = (block for block in tabulate(experiment, records) if block.records)
    return draw(Given(experiment, Notes(experiment), block))


def test_gamma_like_one_over_d(tmp_path):
    depths = (2, 5, 9, 20)
    made = [
        planted(tmp_path, "fig3", {"arch.blocks": n}, blocks=3 * n, gamma=30.0 / (3 * n), gamma_rms=0.1) for n in depths
    ]
    found = drawn("fig3", [*made, planted(tmp_path, "fig3", {"arch.blocks": 3})])
    assert found.lines[0] == "Slope of log gamma against log d: -1.00 (1/d would be -1)."
    assert found.lines[1] == "Not measured: 1 runs."
    assert [row["blocks"] for row in found.tables["norms"].rows] == [6, 15, 27, 60]
    assert {line[4] for line in found.tables["norms"].lines} == {"30.00"}
    assert dynamics.gamma(made[0]) == 5.0
    assert dynamics.blocks(made[3]) == 60


def test_one_equation_in_three_step_sizes(tmp_path):
    """F(t) = 1 + t in steps of 1, 1/2 and, twice as large, 1/4."""
    made = []
    for arch, h, size in (("ml32", 1.0, 1), ("ml62", 0.5, 1), ("ml122", 0.25, 2)):
        time = np.arange(0, 15, h)
        cell = {"data": "cifar10", "arch": arch}
        made.append(planted(tmp_path, "fig7", cell, time=time, F=size * (1 + time), step_size=h))
    rows = drawn("fig7", made).tables["F"].rows
    assert [row["difference"] for row in rows] == pytest.approx([0, 2 / 3, 2 / 3], abs=1e-9)


ERRORS = [90, 50, 40, 60, 30, 20, 35, 10]  # grown after 3 and after 6 epochs
GROWN = {"epoch": list(range(8)), "val_error": ERRORS, "train_error": ERRORS, "depth": [14] * 3 + [26] * 3 + [50] * 2}


def test_around_growth(tmp_path):
    grown = planted(tmp_path, "fig6", {"data": "cifar10", "arch": "ml14"}, curves=GROWN)
    rows = drawn("fig6", [grown]).tables["growth"].rows
    assert [[row[k] for k in ("epoch", "before", "after", "best_before", "best_after")] for row in rows] == [
        [3, 60, 40, 60, 80], [6, 80, 65, 80, 90],
    ]  # fmt: skip
    assert (chang2018.drop(grown), chang2018.gain(grown)) == (15, 10)
    alone = planted(tmp_path, "fig11", {"data": "cifar10", "arch": "ml50"}, curves={**GROWN, "depth": [50.0] * 8})
    assert (chang2018.drop(alone), chang2018.gain(alone)) == (None, None)


@pytest.mark.parametrize(("n", "low", "high"), [(2, 88, 90), (5, 88, 92)])
def test_spread_over_seeds(n, low, high):
    """Of two runs their range; of five 90 ± t(.025, 4) s / sqrt(5)."""
    figure = chang2018.canvas(2, 2)
    values = [88, 90, 90, 90, 92] if n == 5 else [88, 90]
    chang2018.band(axis := figure.subplots(), [[v] for v in values], "", "b", dashed=False)
    (spread,) = axis.collections
    y = spread.get_paths()[0].vertices[:, 1]
    half = 2.7764451 * 2**0.5 / 5**0.5
    assert (y.min(), y.max()) == pytest.approx((low, high) if n == 2 else (90 - half, 90 + half))


def test_best_pair_of_rates(tmp_path):
    made = []
    for high, low, error in ((0.1, 0.001, 9.0), (0.5, 0.001, 7.0), (0.5, 0.01, 8.0)):
        cell = {"data": "cifar10", "sched.lr_max": high, "sched.lr_min": low}
        made.append(planted(tmp_path, "fig9", cell) | {"test_error": error})
    found = drawn("fig9", made)
    assert found.lines == ["CIFAR-10: best at sched.lr_max=0.5, sched.lr_min=0.001, error 7.00 %, of 3 pairs."]
