"""Every file composes and builds; every mistake gets one line with key, value and way out."""

import pytest
import torch
from hydra.errors import HydraException

from configuration import build, explain, network, problems
from conftest import ROOT, composed
from depthlab.problem import Problem

CONF = ROOT / "conf"


def config(*overrides: str) -> dict:
    return composed("train", *overrides)


def files(group: str) -> list[str]:
    root = CONF / group
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


GROUPS = ("arch", "sched", "grow", "augment", "optim", "data", "trainer", "logger", "experiment")
EVERY_FILE = [(group, name) for group in GROUPS for name in files(group)]


@pytest.mark.parametrize(("group", "name"), EVERY_FILE, ids=["=".join(x) for x in EVERY_FILE])
def test_every_file_composes_and_builds(group, name):
    more = ["arch=ml14", "sched=multilevel_cosine"] if (group, name) == ("grow", "multilevel") else []
    whole = config(f"{group}={name}", *more)
    assert problems(whole) == []
    assert build(whole, "sched").run_epochs >= 1
    assert network(whole, device="meta") is not None
    if group != "experiment":
        assert whole[group]["name"] if group != "trainer" else True


def test_depth_is_an_option():
    assert config("arch=resnet", "arch.depth=44")["arch"]["name"] == "resnet44"
    assert config("arch=plain20")["arch"]["name"] == "plain20"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("budget=0", "budget=0: input should be greater than 0"),
        ("seed=-1", "seed=-1: input should be greater than or equal to 0"),
        ("seed=true", "seed=True: input should be a valid integer"),
        ("sched.epochs=-3", "sched.epochs=-3: input should be greater than or equal to 1"),
        ("sched.epochs=1.5", "sched.epochs=1.5: input should be a valid integer"),
        ("sched.lr_max=abc", "sched.lr_max=abc: input should be a valid number"),
        ("sched.lr_max=1e-7", "sched.lr_max must be > lr_min, got 1e-07 <= 1e-06"),
        ("sched.clip=-1", "sched.clip=-1: input should be greater than 0"),
        ("trainer.devices=3", "data.batch_size=100 is the global batch and does not divide by the 3 devices"),
        ("trainer.precision=banana", "trainer.precision=banana: input should be '64-true', '32-true'"),
        ("data.batch_size=0", "data.batch_size=0: input should be greater than or equal to 1"),
        ("+optim.decay_towards=identity", "optim.decay_towards=identity: no exact map between plain and residual"),
        ("+optim.wd_norm=sum", "optim.wd_norm=sum: input should be 'batch' or 'none'"),
        ("optim.decay=some", "optim.decay=some: input should be 'kernels' or 'all'"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1: input should be greater than or equal to 0"),
        ("augment.flip=2", "augment.flip must lie in [0, 1], got 2"),
        ("+foo=1", "foo: no such key"),
        ("+trainer.precison=32", "trainer.precison: no such key; did you mean precision?"),
        ("+sched.lr_maxx=0.1", "sched.lr_maxx: no such key; did you mean lr_max"),
        ("logger.name=wanb", "logger.name=wanb: input should be 'csv', 'wandb' or 'tensorboard'"),
        ("arch.init=xaver", "arch.init must be one of"),
        ("arch.bn_momentum=-3", "arch.bn_momentum must lie in [0, 1], got -3"),
        ("sched.budget=0.5", "sched.budget=0.5: set budget"),
        ("budget=inf", "budget=inf: input should be a finite number"),
        ("budget=1e-9", "sched.budget must be >= 0.00278"),
        ("seed=99999999999999", "seed=99999999999999: input should be less than 4294967296"),
        ("data.drop_last=no", "data.drop_last=no: input should be a valid boolean"),
        ("+arch.num_classes=5", "arch.num_classes=5: leave it out, it follows from the data"),
        ("launcher.jobs=0", "launcher.jobs=0: input should be greater than or equal to 1 or 'auto'"),
        ("data.size=6", "cannot take images of 6x6 (data.size)"),
        ("data.mean=[nan,1,1]", "data.mean"),
        ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: input should be 'auto' or 'ddp'"),
        ("trainer.accelerator=gpx", "trainer.accelerator=gpx: input should be 'auto', 'cpu'"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches=0: value error, input should be a number of"),
        (
            "trainer.limit_train_batches=1.5",
            "trainer.limit_train_batches=1.5: value error, input should be a number of",
        ),
        ("optim.optimizer.momentum=abc", "optim.optimizer: "),
        ("+optim.optimizer.foo=1", "optim.optimizer: "),
        ("+optim.optimizer.weight_decay=0.1", "optim.optimizer.weight_decay: set optim.weight_decay"),
        ("optim.optimizer._target_=torch.optim.SGDD", "optim.optimizer: "),
        ("sched._target_=callbacks.Foo", "sched._target_=callbacks.Foo: cannot be imported"),
    ],
)
def test_bad_values(override, line):
    found = problems(config("sched=sgdr", override))
    assert len(found) == 1
    assert line in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["arch=plain11"], "grow: Plain11 has no stages of residual blocks, it cannot grow"),
        (["arch=plain20"], "has no shortcuts"),
        (["arch=multilevel", "arch.blocks=1"], "a stage of 1 block cannot grow"),
        (["arch=ml14", "grow.at=[110,60]"], "rising"),
        (["arch=ml14", "grow.at=[60,170]"], "rising"),
        (["arch=ml14", "budget=0.01"], "each depth needs an epoch; take budget >= "),
        (["arch=ml14", "grow.epochs=150"], "grow.epochs=150 must be sched.epochs=160"),
    ],
)
def test_bad_growth(overrides, line):
    found = problems(config("sched=multilevel_cosine", "grow=multilevel", *overrides))
    assert found
    assert all(line in said or "sched." in said for said in found)
    assert any(line in said for said in found)


@pytest.mark.parametrize("at", ["[110,60]", "60", "[1.5,60]", "null"])
def test_bad_points_of_growth_are_named_once(at):
    (line,) = problems(config("sched=multilevel_cosine", "grow=multilevel", "arch=ml14", f"grow.at={at}"))
    assert line.startswith("grow.at")


def test_bad_depth():
    assert problems(config("arch=resnet", "arch.depth=21")) == [
        "arch.depth must be 6n + 2 (8, 14, 20, ...), got 21; the nearest is 20"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("arch=resnet10", "arch=resnet10: there is no such arch; did you mean"),
        ("sched=sgdrr", "sched=sgdrr: there is no such sched; did you mean sgdr or sgd?"),
        ("data=cifar", "data=cifar: there is no such data; did you mean cifar10 or cifar100?"),
        (
            "experiment=barz2018/tabel1",
            "experiment=barz2018/tabel1: there is no such experiment; did you mean barz2018/",
        ),
        ("sched.lr_maxx=0.1", "sched.lr_maxx: no such key; did you mean lr_max"),
        ("budgt=0.1", "budgt: no such key; did you mean budget"),
        ("optim.optimizer.lr=3", "optim.optimizer.lr: no such key; the schedule sets the rate: see sched.lr"),
        ("trainer.max_epochs=3", "trainer.max_epochs: no such key; set budget"),
        ("arhc=plain11", "arhc"),
        ("sched.lr_max=[1", "sched.lr_max=[1"),
    ],
)
def test_bad_names(override, line):
    with pytest.raises(HydraException) as error:
        config("sched=sgdr", override)
    said = explain(error.value)
    assert line in said
    assert "\n" not in said


class Unannotated(torch.nn.Module):
    def __init__(self, num_classes=10, width=8):
        super().__init__()
        self.fc = torch.nn.Linear(3 * width, num_classes)


def test_a_constructor_without_annotations():
    arch = {"_target_": f"{__name__}.Unannotated", "name": "mine", "width": 4}
    found = {"arch": arch, "data": {"classes": 5}}
    assert network(found).fc.weight.shape == (5, 12)
    with pytest.raises(Problem, match=r"arch\.wdth: no such key; did you mean width\?"):
        network(found | {"arch": arch | {"wdth": 4}})
