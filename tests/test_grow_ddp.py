"""Two gloo processes on a CPU grow together. Run as a script, this file is what each of them does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from callbacks.checkpoint import last_checkpoint
from depthlab import growth
from tests.growing import classifier, digest, images, network, trainer

ROOT = Path(__file__).parents[1]
LAST = 5  # of 6 epochs, to be quick
RANK = int(os.environ.get("LOCAL_RANK", 0))


class Ranks(Callback):
    """Every rank's hash of parameters and buffers when an epoch starts, of parameters when it ends, and the losses."""

    def __init__(self):
        self.seen = {"starts": [], "ends": [], "depths": [], "losses": []}

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen["depths"].append(growth.depth(pl_module.net))
        self.seen["starts"].append(gathered(trainer, digest(pl_module.net.state_dict())))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen["ends"].append(gathered(trainer, digest(dict(pl_module.net.named_parameters()))))
        self.seen["losses"].append(trainer.callback_metrics["train/loss"].item())


def gathered(trainer, value):
    everyone = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


def without_batchnorm():
    net = network()
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return net


def fit(folder, net, devices, *, max_epochs=LAST, ckpt=None, **options):
    model, ranks = classifier(net), Ranks()
    strategy = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    watch = [ranks, last_checkpoint(folder)]
    run = trainer(folder, max_epochs=max_epochs, callbacks=watch, **strategy, **options)
    run.fit(model, *images(RANK, devices), ckpt_path=ckpt)
    return ranks.seen | {"end": digest(model.net.state_dict())}


EXACT = {"precision": "64-true", "lr_max": 0.02}  # rounding of 1e-16 instead of 1e-7


CLIPPED = {"gradient_clip_val": 1.0, "momentum": "copy"}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    result = {
        "batchnorm": fit(folder / "a", network(), 2, **CLIPPED),
        "without": fit(folder / "b", without_batchnorm(), 2, **EXACT),
        "bf16-mixed": fit(folder / "d", network(), 2, precision="bf16-mixed", **CLIPPED),
        "broken off": fit(folder / "c", network(), 2, max_epochs=4, **CLIPPED),
    }
    result["resumed"] = fit(folder / "c", network(1), 2, ckpt=folder / "c" / "last.ckpt", **CLIPPED)
    if RANK == 0:
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()  # as train.py


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("run", ["batchnorm", "without", "bf16-mixed"])
def test_ranks_agree(two, run):
    ranks = two[run]
    assert ranks["depths"] == 2 * [[2, 2, 2]] + 2 * [[4, 4, 4]] + [[8, 8, 8]]
    assert all(a == b for a, b in ranks["starts"])  # running statistics too: right after a growth, for one
    assert all(a == b for a, b in ranks["ends"])
    assert len({a for a, _ in ranks["ends"]}) == LAST


def test_losses_are_those_of_one_process_up_to_rounding(two, tmp_path):
    """Without BatchNorm, which normalises each rank's share of the batch."""
    torch.set_num_threads(1)
    one = fit(tmp_path, without_batchnorm(), 1, **EXACT)
    assert two["without"]["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert one["losses"][-1] < one["losses"][0]
    other = fit(tmp_path / "b", network(), 1, **CLIPPED)
    assert two["batchnorm"]["losses"] != pytest.approx(other["losses"], rel=1e-4)


def test_reduced_precision_rounds_and_trains(two):
    exact, rounded = two["batchnorm"]["losses"], two["bf16-mixed"]["losses"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1)


def test_resumed_at_a_growth_equals_uninterrupted(two):
    assert two["resumed"]["depths"] == [[8, 8, 8]]
    assert two["resumed"]["starts"] == two["batchnorm"]["starts"][4:]
    assert two["resumed"]["end"] == two["batchnorm"]["end"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
