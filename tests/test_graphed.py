"""Steps replayed from a graph end where eager ones do: on a CPU bit for bit, on a GPU to rounding.

Without a GPU the graph is a stand-in: its replay runs the step, and refuses to where what a graph of kernels would use
has moved, or where the step asks for what a capture forbids."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils._python_dispatch import TorchDispatchMode

import callbacks
import ways
from callbacks.checkpoint import last_checkpoint
from callbacks.divergence import Divergence
from callbacks.record import Record
from callbacks.step_losses import StepLosses
from depthlab import Classifier, ImageData, ResNet, SimpleNet
from depthlab.data.augment import Crop, Shift
from depthlab.graphed import WARM_UP, CudaGraph, GraphedClassifier
from depthlab.problem import Problem
from hydra_plugins import side_by_side
from tests import growing
from tests.analysis.nets import DEVICES

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # as in train.py


MADE = []  # the graphs of a test


class Capturable(TorchDispatchMode):
    """Refuses operations that wait for the device or bring numbers from the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.REFUSED
        return func(*args, **(kwargs or {}))


class StandIn:
    device = "cpu"

    def run(self, step):
        step()

    def capture(self, step):
        self.step, self.model = step, step.func.__self__
        self.at = self.addresses()

    def replay(self):
        assert self.addresses() == self.at
        with Capturable():
            self.step()
        assert self.addresses() == self.at

    def addresses(self):
        model, (optimizer,) = self.model, self.model.trainer.optimizers
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.net.parameters()]
        others = [model.sums, model.loss, *model.rates, *(t for t in model.inputs if t is not None)]
        return [t.data_ptr() for t in (*model.net.parameters(), *model.net.buffers(), *momenta, *others)]


def logged(graph):
    """That also writes down what is asked of it."""

    class Logged(graph):
        def __init__(self):
            super().__init__()
            self.log = []
            MADE.append(self)

        def run(self, step):
            self.log.append("run")
            super().run(step)

        def capture(self, step):
            self.log.append("capture")
            super().capture(step)

        def replay(self):
            self.log.append("replay")
            super().replay()

    return Logged


GRAPHS = {"cpu": logged(StandIn), "cuda": logged(CudaGraph)}
ERROR = {"cpu": 0.0, "cuda": 0.01}  # there a graph has its learning rates in single precision


@pytest.fixture(autouse=True)
def fresh():
    torch.set_num_threads(1)
    MADE.clear()


def graphed(net, device="cpu", **options):
    return GraphedClassifier(net, **{"optimizer": SGD, "wanted": True, "graph": GRAPHS[device]} | options)


def state(model, optimizer):
    return [*model.net.state_dict().values(), *(optimizer.state[p]["momentum_buffer"] for p in model.net.parameters())]


def near(a, b, error=0.0):
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (a, b))
    return (a - b).norm() <= error * b.norm()


# ---- growth


def grown(make, folder=None, epochs=growing.EPOCHS, ckpt=None, seed=0, momentum="reset", device="cpu"):
    model = make(growing.network(seed), weight_decay=2e-4)
    more = [] if folder is None else [last_checkpoint(folder)]
    options = {"max_epochs": epochs, "momentum": momentum, "callbacks": more}
    trainer = growing.trainer(folder, accelerator=device, deterministic=True, **options)
    trainer.fit(model, *growing.images(n=40, device=device), ckpt_path=ckpt)
    return state(model, trainer.optimizers[0])


@pytest.mark.parametrize("momentum", ["reset", "copy"])
@pytest.mark.parametrize("device", DEVICES)
def test_captured_anew_at_growth(device, momentum):
    """Two epochs of 12 + 12 + 12 + 4 images at each of three depths; an epoch's last batch is eager."""
    options = {"momentum": momentum, "device": device}
    eager = grown(partial(Classifier, optimizer=SGD), **options)
    assert near(grown(partial(graphed, device=device), **options), eager, ERROR[device])
    assert WARM_UP == 3
    assert [graph.log for graph in MADE] == 3 * [["run"] * 4 + ["capture"] + ["replay"] * 3 + ["run"]]


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_resumed_equals_uninterrupted(device, stop, tmp_path):
    make = partial(graphed, device=device)
    whole = grown(make, device=device)
    grown(make, tmp_path, epochs=stop, device=device)
    resumed = grown(make, tmp_path, ckpt=tmp_path / "last.ckpt", seed=1, device=device)
    assert near(resumed, whole, ERROR[device])


# ---- everything else that a step may have


def fit(make, device, data_dir, folder, net, augment, style="torch", precision="32-true", **options):
    seed_everything(5, verbose=False)
    data = ImageData("digits", dir=data_dir, augment=augment, seed=3, batch_size=70, memory_format="channels_last")
    record, steps, losses = Record(folder), [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
            losses.append(outputs["loss"].item())

    model = make(net(), momentum_style=style, weight_decay=1e-3, channels_last=True, **options)
    trainer = Trainer(
        max_epochs=2,
        accelerator=device,
        devices=1,
        deterministic=True,
        precision=precision,
        callbacks=[callbacks.CLR(epochs=2, half_cycle=1), record, Divergence(), StepLosses(folder), Watch()],
        gradient_clip_val=0.5,
        logger=False,
        limit_train_batches=8,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in record.rows]
    kept = np.load(folder / "losses.npy")
    return {"state": state(model, trainer.optimizers[0]), "rows": rows, "steps": steps, "losses": [*losses, *kept]}


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (lambda: ResNet(10, 8, width=4), {"augment": Shift(), "style": "keras"}),
        (lambda: ResNet(10, 8, width=4), {"augment": Crop(), "precision": "bf16-mixed"}),
        (lambda: SimpleNet(10, 5, width=4), {"augment": None, "decay_towards": "identity"}),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_like_any_other(device, net, options, data_dir, tmp_path):
    """Rates that change at every step, clipping, Keras' momentum, bf16, curves, losses and global step."""
    places, e = {"device": device, "data_dir": data_dir, "folder": tmp_path, "net": net}, ERROR[device]
    eager = fit(partial(Classifier, optimizer=SGD), **places, **options)
    replayed = fit(partial(graphed, device=device), **places, **options)
    assert near(replayed["state"], eager["state"], e)
    assert replayed["rows"] == [pytest.approx(row, rel=e, abs=e) for row in eager["rows"]]
    assert replayed["losses"] == pytest.approx(eager["losses"], rel=e, abs=e)
    assert replayed["steps"] == eager["steps"]
    (graph,) = MADE
    assert graph.log == ["run"] * WARM_UP + ["capture"] + ["replay"] * (2 * 8 - WARM_UP)


class Between(Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ({}, {"accumulate_grad_batches": 2}, "accumulated"),
        ({}, {"precision": "bf16-true"}, "32-true and bf16-mixed"),
        ({}, {"callbacks": [Between()]}, "Between"),
        ({"optimizer": partial(SGD, fused=False)}, {}, "fused=true"),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1)}, {}, "fused=true"),
    ],
)
def test_eager_where_something_stands_against_it(model, options, said):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    for wanted in (None, True):
        made = graphed(ResNet(10, 8, width=4), wanted=wanted, **model)
        trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)
        if wanted:
            with pytest.raises(Problem, match=f"trainer.graph=true .*{said}.*take trainer.graph=null"):
                trainer.fit(made, *growing.images())
        else:
            trainer.fit(made, *growing.images())
            assert trainer.global_step > 0
    assert MADE == []


def test_a_step_that_cannot_be_captured_stays_eager(monkeypatch):
    def refuse(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    models = []
    eager = grown(partial(Classifier, optimizer=SGD), epochs=2)
    monkeypatch.setattr(StandIn, "capture", refuse)
    with pytest.warns(UserWarning, match="trainer.graph: steps stay eager, operation not permitted"):
        assert near(grown(lambda *a, **o: models.append(graphed(*a, **o)) or models[0], epochs=2), eager)
    assert set(MADE[0].log) == {"run", "capture"}
    assert models[0].graphing
    assert not models[0].replaying


def test_not_under_ddp():
    """Not of one process either: `backward` would run inside DDP's forward."""
    model = graphed(ResNet(10, 8, width=4))
    trainer = Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.optimizers, model.trainer = [model.make_optimizer(model.parameters())], trainer
    assert "is for a single device" in model.obstacle()


def test_what_is_timed_comes_after_the_capture():
    assert min(side_by_side.WARM_UP, ways.WARM_UP) >= WARM_UP + 1
