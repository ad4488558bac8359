"""`analysis=transform` on runs of seconds: the same function, and a folder that loads."""

import json

import pytest
import torch

from analyze import run
from conftest import TINY, composed
from depthlab.problem import Problem
from train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as in train.py
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """made(arch, *options) -> the folder of a run."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    quick = [o for o in TINY if not o.startswith("arch=")] + [f"data_dir={data_dir}", f"runs_dir={runs}", "budget=0.01"]

    def made(arch, *options):
        train(composed("train", *quick, f"arch={arch}", "arch.depth=8", "arch.width=4", *options))
        (folder,) = runs.glob(f"{arch}8-*")
        return folder

    return made


def transform(folder):
    run(composed("analyze", "analysis=transform", "device=cpu", f"run={folder}"))
    return json.loads((folder / "analysis-transform.json").read_text())["scalars"]


@pytest.mark.parametrize("arch", ["simple_residual", "simple_plain"])
def test_there_and_back(made, arch):
    folder = made(arch, "optim=yu2019")
    there = transform(folder)
    assert there["images"] == 297
    assert there["changed"] == there["changed_rounded"] == 0
    assert there["error"] == there["error_transformed"] == there["error_rounded"]
    assert 0 < there["difference"] < 1e-12 < there["difference_rounded"] < 1e-4
    assert there["residual"] == (arch == "simple_plain")

    other = folder / "transformed"
    config = json.loads((other / "config.json").read_text())
    assert config["arch"]["name"] == ("simple_residual8" if arch == "simple_plain" else "simple_plain8")
    back = transform(other)  # the transformed network loads, is the other kind, and comes back as the first
    assert back["error"] == there["error"]
    assert back["residual"] == 1 - there["residual"]
    first, last = (
        torch.load(f / "last.ckpt", weights_only=True)["state_dict"] for f in (folder, other / "transformed")
    )
    weights = {name: value.double() for name, value in first.items() if name.startswith("net.")}
    assert weights.keys() == last.keys()
    for name, value in weights.items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-15)


def test_batch_norm(made):
    with pytest.raises(Problem, match="no exact map .* with BatchNorm"):
        transform(made("resnet"))
