"""What growing saves: Table 2, the paper's split, FLOPs, and planted seconds."""

import json

import numpy as np
import pytest
import torch

from depthlab.analysis import drawing
from depthlab.analysis.time_saved import by_block_steps, by_flops, by_seconds, figure, theoretical, time_saved
from depthlab.architectures import MultilevelResNet, ResNet
from depthlab.problem import Problem


@pytest.mark.parametrize(("k", "saved"), list(enumerate([0, 0.25, 0.416667, 0.53125, 0.6125, 0.671875])))
def test_table_2(k, saved):
    assert theoretical(k) == pytest.approx(100 * saved, abs=1e-4)
    assert theoretical(k) == pytest.approx(100 * (1 - (2 ** (k + 1) - 1) / (2**k * (k + 1))))


def test_block_steps_of_the_papers_split():
    assert by_block_steps([60, 110], 160) == pytest.approx(43.75)
    assert by_block_steps([], 160) == 0


@pytest.mark.parametrize(("blocks", "width", "saved"), [(2, 16, 44.5), (5, 16, 44.05), (2, 32, 44.6), (5, 32, 44.1)])
def test_flops(blocks, width, saved):
    """ResNet-50-i, 122-i, and the wide ones."""
    with torch.device("meta"):
        net = MultilevelResNet(blocks=blocks, width=width)
    assert by_flops(net, [60, 110], 160, 32) == pytest.approx(saved, abs=0.03)
    assert len(net.stages[0]) == blocks  # not grown itself


def test_seconds():
    """The first epoch of a cycle is not taken for full depth's."""
    assert by_seconds([1.0, 1.0, 2.0, 2.0, 9.0, 4.0, 4.0, 4.0], [2, 4]) == pytest.approx(100 * (1 - 27 / 32))
    assert by_seconds([1.0, 2.0], [1]) == pytest.approx(25)


def record(seconds=(1.0, 1.0, 2.0, 4.0, 4.0), grow="multilevel", **other):
    config = {"grow": {"name": grow, "at": [4, 6], "epochs": 10, "budget": 0.5}, "data": {"size": 32}}
    times = {"curves": {"seconds": list(seconds)}, "train_seconds": sum(seconds), "epochs": len(seconds)}
    where = {"hardware": "EPYC", "devices": 1, "threads": 2, "precision": "32-true", "data": "cifar10", "device": "cpu"}
    return {"name": "run", "config": config, "diverged": False, **times, **where} | other


@pytest.mark.parametrize("net", [MultilevelResNet(blocks=8, width=4, step_size=0.25), ResNet(10, depth=50, width=4)])
def test_of_a_record(net, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(record([5.0] * 5, grow="none")))
    out = time_saved(net, record(), against=str(tmp_path))
    assert out.scalars["block_steps"] == by_block_steps([2, 3], 5) == pytest.approx(40)
    assert out.scalars["seconds"] == pytest.approx(40)
    assert out.scalars["seconds_against"] == pytest.approx(100 * (1 - 12 / 25))
    assert out.scalars["growths"] == 2
    assert out.scalars["flops"] == pytest.approx(40, abs=1.5)
    assert list(out.arrays["at"]) == [2, 3]
    np.testing.assert_array_equal(out.arrays["seconds"], [1, 1, 2, 4, 4])
    assert len(net.stages[0]) == 8
    assert drawing.png(figure({"one": out})).startswith(b"\x89PNG")


def test_seconds_of_the_processor(tmp_path):
    """On a busy machine the clock stretches some epochs; of a GPU's runs the processor says nothing."""
    net = MultilevelResNet(blocks=8, width=2)
    cpu = [1.0, 1.0, 2.0, 4.0, 4.0]
    busy = record([9.0, 1.0, 2.0, 4.0, 9.0])
    busy["curves"]["cpu_seconds"] = cpu
    full = record([7.0] * 5, grow="none")
    full["curves"]["cpu_seconds"] = [5.0] * 5
    (tmp_path / "result.json").write_text(json.dumps(full))
    out = time_saved(net, busy, against=str(tmp_path))
    assert out.scalars["cpu_seconds"] == pytest.approx(40)
    assert out.scalars["cpu_seconds_against"] == pytest.approx(100 * (1 - 12 / 25))
    assert out.scalars["seconds_against"] == pytest.approx(100 * (1 - 25 / 35))
    assert list(out.arrays["cpu_seconds"]) == cpu
    assert drawing.png(figure({"one": out})).startswith(b"\x89PNG")
    assert "cpu_seconds" not in time_saved(net, busy | {"device": "cuda"}).scalars


def test_refusals(tmp_path):
    net = MultilevelResNet(blocks=8, width=2)
    with pytest.raises(Problem, match="run: did not grow"):
        time_saved(net, record(grow="none"))
    with pytest.raises(Problem, match="run: diverged"):
        time_saved(net, record(diverged=True))
    with pytest.raises(Problem, match="analysis.against=.*: no finished run there"):
        time_saved(net, record(), against=str(tmp_path))
    (tmp_path / "result.json").write_text(json.dumps(record(threads=16)))
    with pytest.raises(Problem, match="its threads is 16, this run's 2"):
        time_saved(net, record(), against=str(tmp_path))
