"""What makes two runs the same run; files that are whole or not there."""

import copy
import json

import pytest
import torch

from conftest import composed
from depthlab import Plain11, ResNet, records


@pytest.fixture(scope="module")
def config():
    return composed("train", "sched=sgdr")


def changed(config, key, value):
    config = copy.deepcopy(config)
    node = config
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    assert last in node
    node[last] = value
    return config


def test_name(config):
    name = records.run_name(config)
    assert name.startswith("plain11-sgdr-cifar100-s0-")
    assert len(name.rpartition("-")[2]) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("budget", 0.5),
        ("trainer.precision", "bf16-mixed"),
        ("trainer.devices", 2),
        ("trainer.compile", True),
        ("trainer.limit_train_batches", 3),
        ("sched.clip", None),
        ("sched.formula", "authors"),
        ("optim.weight_decay", 0.5),
        ("optim.momentum_style", "keras"),
        ("optim.optimizer.momentum", 0.8),
        ("augment.flip", 0.0),
        ("data.batch_size", 128),
        ("data.val_size", 5000),
        ("arch.init", "kaiming_normal"),
        ("sched._target_", "callbacks.Constant"),
    ],
)
def test_what_changes_the_numbers_changes_the_name(config, key, value):
    assert records.run_name(changed(config, key, value)) != records.run_name(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runs_dir", "elsewhere"),
        ("data.dir", "elsewhere"),
        ("data.eval_batch_size", 7),
        ("study", "another"),
        ("launcher.jobs", 4),
        ("logger.name", "wandb"),
        ("trainer.accelerator", "gpu"),
        ("trainer.sync_batchnorm", True),  # on one device
        ("trainer.check_val_every_n_epoch", 5),
        ("optim.optimizer.fused", False),
        ("trainer.limit_val_batches", 3),
        ("sched.clip", 10),
        ("budget", 1),
    ],
)
def test_what_only_watches_or_places_does_not(config, key, value):
    assert records.run_name(changed(config, key, value)) == records.run_name(config)


def test_the_optimisers_own_rate_does_not():
    """The schedule sets it before every step."""
    config = composed("train", "optim=li2018_sgd")
    assert records.run_name(changed(config, "optim.optimizer.lr", 0.5)) == records.run_name(config)


def test_growth_stands_in_the_name(config):
    grown = config | {"grow": {"name": "multilevel", "at": [60]}}
    assert records.run_name(grown).startswith("plain11-sgdr-multilevel-cifar100-s0-")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(("net", "gigaflop"), [(Plain11(100), 1.485), (ResNet(100, 20), 0.2433)])
def test_training_flops(net, gigaflop):
    assert records.training_flops(net, 32) / 1e9 == pytest.approx(gigaflop, rel=1e-3)
    assert net.training


def test_provenance_is_json():
    where = records.provenance(torch.device("cpu"))
    assert json.loads(json.dumps(where)) == where
    assert where["versions"]["torch"] == torch.__version__.split("+")[0]
