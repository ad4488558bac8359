"""Steps replayed from a graph end bit for bit where eager ones do.

The graph is a stand-in: its replay runs the step, and refuses to where what a graph of kernels would use has moved."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

import callbacks
from callbacks.checkpoint import last_checkpoint
from callbacks.divergence import Divergence
from callbacks.record import Record
from callbacks.step_losses import StepLosses
from depthlab import Classifier, ImageData, ResNet, SimpleNet
from depthlab.data.augment import Crop, Shift
from depthlab.graphed import WARM_UP, GraphedClassifier
from depthlab.problem import Problem
from tests import growing

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # as in train.py


class StandIn:
    device = "cpu"
    made: list["StandIn"]

    def __init__(self):
        self.log = []
        StandIn.made.append(self)

    def run(self, step):
        self.log.append("run")
        step()

    def capture(self, step):
        self.log.append("capture")
        self.step, self.model = step, step.func.__self__
        self.at = self.addresses()

    def replay(self):
        self.log.append("replay")
        assert self.addresses() == self.at
        self.step()
        assert self.addresses() == self.at

    def addresses(self):
        model, (optimizer,) = self.model, self.model.trainer.optimizers
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.net.parameters()]
        others = [model.sums, model.loss, *model.rates, *(t for t in model.inputs if t is not None)]
        return [t.data_ptr() for t in (*model.net.parameters(), *model.net.buffers(), *momenta, *others)]


@pytest.fixture(autouse=True)
def fresh():
    torch.set_num_threads(1)
    StandIn.made = []


def graphed(net, **options):
    return GraphedClassifier(net, SGD, wanted=True, graph=StandIn, **options)


def state(model, optimizer):
    return [*model.net.state_dict().values(), *(optimizer.state[p]["momentum_buffer"] for p in model.net.parameters())]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- growth


def grown(make, folder=None, epochs=growing.EPOCHS, ckpt=None, seed=0, momentum="reset"):
    model = make(growing.network(seed), weight_decay=2e-4)
    more = [] if folder is None else [last_checkpoint(folder)]
    trainer = growing.trainer(folder, max_epochs=epochs, momentum=momentum, callbacks=more)
    trainer.fit(model, *growing.images(n=40), ckpt_path=ckpt)
    return state(model, trainer.optimizers[0])


@pytest.mark.parametrize("momentum", ["reset", "copy"])
def test_captured_anew_at_growth(momentum):
    """Two epochs of 12 + 12 + 12 + 4 images at each of three depths; an epoch's last batch is eager."""
    eager = grown(lambda net, **options: Classifier(net, SGD, **options), momentum=momentum)
    assert equal(grown(graphed, momentum=momentum), eager)
    assert WARM_UP == 3
    assert [graph.log for graph in StandIn.made] == 3 * [["run"] * 4 + ["capture"] + ["replay"] * 3 + ["run"]]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted(stop, tmp_path):
    whole = grown(graphed)
    grown(graphed, tmp_path, epochs=stop)
    assert equal(grown(graphed, tmp_path, ckpt=tmp_path / "last.ckpt", seed=1), whole)


# ---- everything else that a step may have


def fit(make, data_dir, folder, net, schedule, augment, style="torch", epochs=2, precision="32-true", **options):
    seed_everything(5, verbose=False)
    data = ImageData("digits", dir=data_dir, augment=augment, seed=3, batch_size=70, memory_format="channels_last")
    record, seen = Record(folder), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.global_step, outputs["loss"].item(), trainer.optimizers[0].param_groups[0]["lr"]))

    model = make(net(), momentum_style=style, weight_decay=1e-3, channels_last=True, **options)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=precision,
        callbacks=[schedule, record, Divergence(), StepLosses(folder), Watch()],
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
    return state(model, trainer.optimizers[0]), rows, seen, (folder / "losses.npy").read_bytes()


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (lambda: ResNet(10, 8, width=4), {"augment": Shift(), "style": "keras"}),
        (lambda: ResNet(10, 8, width=4), {"augment": Crop(), "precision": "bf16-mixed"}),
        (lambda: SimpleNet(10, 5, width=4), {"augment": None, "decay_towards": "identity"}),
    ],
)
def test_a_run_like_any_other(net, options, data_dir, tmp_path):
    """Rates that change at every step, clipping, Keras' momentum, bf16, curves, losses and global step."""
    schedule = callbacks.CLR(epochs=2, half_cycle=1)
    eager = fit(lambda net, **o: Classifier(net, SGD, **o), data_dir, tmp_path, net, schedule, **options)
    replayed = fit(graphed, data_dir, tmp_path, net, schedule, **options)
    assert equal(replayed[0], eager[0])
    assert replayed[1:] == eager[1:]
    (graph,) = StandIn.made
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
        made = GraphedClassifier(ResNet(10, 8, width=4), **({"optimizer": SGD} | model), wanted=wanted, graph=StandIn)
        trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)
        if wanted:
            with pytest.raises(Problem, match=f"trainer.graph=true .*{said}.*take trainer.graph=null"):
                trainer.fit(made, *growing.images())
        else:
            trainer.fit(made, *growing.images())
            assert trainer.global_step > 0
    assert StandIn.made == []


def test_a_step_that_cannot_be_captured_stays_eager(monkeypatch):
    def refuse(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    eager = grown(lambda net, **options: Classifier(net, SGD, **options), epochs=2)
    monkeypatch.setattr(StandIn, "capture", refuse)
    with pytest.warns(UserWarning, match="trainer.graph: steps stay eager, operation not permitted"):
        assert equal(grown(graphed, epochs=2), eager)
    assert set(StandIn.made[0].log) == {"run"}
