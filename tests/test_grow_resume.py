"""A run that grows, broken off anywhere, ends bit for bit where the uninterrupted one does (on a CPU, one thread)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import last_checkpoint
from depthlab import growth
from depthlab.architectures import ResNet
from tests.growing import EPOCHS, classifier, images, network, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # as in train.py

WAYS = {
    "reset": {},
    "copy": {"momentum": "copy"},
    "bf16": {"precision": "bf16-mixed"},
    "clip, keras, copy": {"gradient_clip_val": 10.0, "momentum": "copy"},
    "He": {"momentum": "copy"},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def model(way, seed=0):
    torch.manual_seed(seed)
    net = ResNet(num_classes=10, depth=14, width=4) if way == "He" else network(seed)
    return classifier(net, momentum_style="keras" if "keras" in way else "torch")


def fit(way, folder, epochs=EPOCHS, ckpt=None, seed=0):
    """The network and what the optimiser remembers of each of its parameters, after `epochs`."""
    trained = model(way, seed)
    run = trainer(folder, max_epochs=epochs, callbacks=[last_checkpoint(folder)], **WAYS[way])
    momenta = {}

    def keep(*_):
        optimizer = run.optimizers[0]
        momenta.update({n: optimizer.state[p]["momentum_buffer"].clone() for n, p in trained.net.named_parameters()})

    trained.on_train_end = keep
    run.fit(trained, *images(), ckpt_path=ckpt)
    return trained.net, momenta


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = {}

    def of(way):
        if way not in made:
            made[way] = fit(way, tmp_path_factory.mktemp("whole"))
        return made[way]

    return of


@pytest.mark.parametrize(
    ("way", "stop"),
    [*(("reset", k) for k in range(1, EPOCHS)), *((way, k) for way in list(WAYS)[1:] for k in (2, 5))],
)
def test_resumed_equals_uninterrupted(way, stop, whole, tmp_path):
    fit(way, tmp_path, epochs=stop)
    shape = torch.load(tmp_path / "last.ckpt", weights_only=True)["growth"]
    cycle = (stop > 2) + (stop > 4)  # stop = 2 and 4: exactly at a point of growth, which is yet to come
    assert shape == {"blocks": 3 * [2 * 2**cycle], "step_size": 0.5**cycle}

    net, momenta = fit(way, tmp_path, ckpt=tmp_path / "last.ckpt", seed=1)  # other weights: all must come from the file
    expected, expected_momenta = whole(way)
    assert growth.state(net) == growth.state(expected) == {"blocks": [8, 8, 8], "step_size": 0.25}
    assert net.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in expected.state_dict().items())
    assert all(torch.equal(v, momenta[k]) for k, v in expected_momenta.items())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_checkpoint_of_another_depth_is_tested_at_its_own(stop, tmp_path):
    """Down: a grown model loads a shallower file. Up: a fresh model loads a deeper one."""
    fit("reset", tmp_path, epochs=stop)
    results = []
    for source in (model("reset", seed=2), grown()):
        run = trainer(tmp_path, callbacks=[last_checkpoint(tmp_path)])
        run.test(source, images()[1], ckpt_path=tmp_path / "last.ckpt", verbose=False)
        results.append(run.callback_metrics["test/loss"].item())
        assert growth.depth(source.net) == 3 * (2 * 2 ** (stop > 2),)
    assert results[0] == results[1]


def grown():
    deep = model("reset", seed=3)
    growth.grow(deep.net)
    growth.grow(deep.net)
    return deep


def test_a_grown_model_can_be_resumed_from_an_early_checkpoint(whole, tmp_path):
    fit("reset", tmp_path, epochs=1)
    deep = grown()
    run = trainer(tmp_path, callbacks=[last_checkpoint(tmp_path)])
    run.fit(deep, *images(), ckpt_path=tmp_path / "last.ckpt")
    expected, _ = whole("reset")
    assert all(torch.equal(v, deep.net.state_dict()[k]) for k, v in expected.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_five_times_equals_never_killed(tmp_path):
    """SIGKILL at random moments, by the command line; the same command goes on."""
    train = [sys.executable, Path(__file__).parents[1] / "src" / "train.py", f"data_dir={tmp_path}"]
    train += ["data=digits", "arch=ml14", "arch.width=4", "sched=multilevel_cosine", "optim=chang2018", "augment=crop"]
    train += ["grow=multilevel", "budget=0.1"]

    def start(folder):
        return subprocess.Popen(
            [*train, f"runs_dir={folder}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def final(folder):
        assert start(folder).wait() == 0
        assert list(folder.glob("*/result.json"))
        (file,) = folder.glob("*/last.ckpt")
        return torch.load(file, weights_only=True)

    began = time.monotonic()
    whole = final(tmp_path / "whole")
    took = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(5):
        process = start(tmp_path / "killed")
        with pytest.raises(subprocess.TimeoutExpired):  # still running
            process.wait(timeout=moments.uniform(0.1, 0.4) * took)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = final(tmp_path / "killed")
    assert killed["growth"] == whole["growth"] == {"blocks": [8, 8, 8], "step_size": 0.25}
    assert all(torch.equal(v, killed["state_dict"][k]) for k, v in whole["state_dict"].items())
