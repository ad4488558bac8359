"""Which parameters decay, what is clipped, Keras' momentum, and that the sums say what happened."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from callbacks import SGDR, Schedule
from depthlab import Classifier, Plain11, ResNet
from depthlab.decay import parameter_groups

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**(quiet | options), enable_model_summary=False, num_sanity_val_steps=0)


class Fixed(list):
    """Batches that do not change from epoch to epoch."""


def batches(n=4, size=8, classes=3):
    g = torch.Generator().manual_seed(1)
    return Fixed((torch.randn(size, 5, generator=g), torch.randint(classes, (size,), generator=g)) for _ in range(n))


def names(net, groups):
    of = {p: name for name, p in net.named_parameters()}
    return [{of[p] for p in group["params"]} for group in groups]


def test_decay_on_kernels():
    net = Plain11(10)
    decayed, spared = names(net, parameter_groups(net, 1e-3))
    assert "hidden.weight" in decayed
    assert len(decayed) == 10  # 9 convolutions and the hidden layer
    assert "classifier.weight" in spared
    assert all(n.endswith("bias") or "bn" in n or n == "classifier.weight" for n in spared)
    net = ResNet(10, 8)
    decayed, spared = names(net, parameter_groups(net, 1e-3))
    assert "classifier.weight" in decayed
    assert len(decayed) == 8
    everything, nothing = parameter_groups(net, 1e-3, "all")
    assert len(everything["params"]) == len(list(net.parameters()))
    assert nothing["params"] == []


def test_refusals():
    with pytest.raises(ValueError, match="decay must be kernels or all, got 'some'"):
        parameter_groups(nn.Linear(1, 1), 0.1, "some")
    with pytest.raises(ValueError, match="momentum_style must be torch or keras, got 'tf'"):
        Classifier(nn.Linear(1, 1), momentum_style="tf")


class Jumping(Schedule):
    """A rate that changes at every step."""

    def lr(self, t, steps_per_epoch):
        return (0.1, 0.02, 0.3, 0.05)[t % 4]


@pytest.mark.parametrize("style", ["torch", "keras"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_by_hand(style, clip):
    """8 steps of the Trainer against the update rules written out in float64, L2 inside the clipped norm."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3).double()
    w = {n: p.detach().clone() for n, p in net.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in w.items()}
    decay = {"weight": 0.3, "bias": 0.0}
    data = Fixed((x.double(), y) for x, y in batches())
    for t in range(8):
        x, y = data[t % 4]
        q = {n: p.clone().requires_grad_() for n, p in w.items()}
        F.cross_entropy(x @ q["weight"].T + q["bias"], y).backward()
        g = {n: q[n].grad + decay[n] * w[n] for n in w}
        if clip is not None:
            norm = sum(x.square().sum() for x in g.values()).sqrt()
            g = {n: x * min(1.0, clip / (norm + 1e-6)) for n, x in g.items()}
        lr = Jumping(2).lr(t, 4)
        for n in w:
            v[n] = 0.9 * v[n] - lr * g[n] if style == "keras" else 0.9 * v[n] + g[n]
            w[n] = w[n] + v[n] if style == "keras" else w[n] - lr * v[n]
    model = Classifier(net, SGD, weight_decay=0.3, momentum_style=style)
    trainer(max_epochs=2, gradient_clip_val=clip, callbacks=[Jumping(2)]).fit(model, data, data)
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), w[n], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [True, False])
def test_fp16_is_clipped_unscaled(fused):
    """The L2 term and the bound are for gradients, not for gradients times the loss scale."""
    from lightning.pytorch.plugins import MixedPrecision

    torch.manual_seed(0)
    start, data, ends = nn.Linear(5, 3).state_dict(), batches(), []
    for plugin in (None, MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))):
        net = nn.Linear(5, 3)
        net.load_state_dict(start)
        optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused)
        fit = trainer(max_epochs=2, gradient_clip_val=0.5, callbacks=[Jumping(2)], plugins=[plugin] if plugin else None)
        fit.fit(Classifier(net, optimizer, weight_decay=0.3), data, data)
        ends.append(net.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0.03, atol=0.01)  # fp16 keeps three digits
    assert (ends[0] - start["weight"]).norm() > 0.2


@pytest.mark.parametrize("clip", [None, 1e9])
def test_adamw_decays_once(clip):
    """Weights apart from the gradient, clipped or not, and what `decay` spares not by AdamW's own default."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    w = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    reference = torch.optim.AdamW(
        [{"params": [w["weight"]], "weight_decay": 0.3}, {"params": [w["bias"]], "weight_decay": 0.0}], lr=0.1
    )
    data = batches()
    for t in range(8):
        reference.zero_grad()
        F.cross_entropy(F.linear(data[t % 4][0], w["weight"], w["bias"]), data[t % 4][1]).backward()
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = Jumping(2).lr(t, 4)
        reference.step()
    model = Classifier(net, torch.optim.AdamW, weight_decay=0.3)
    trainer(max_epochs=2, gradient_clip_val=clip, callbacks=[Jumping(2)]).fit(model, data, data)
    for n, p in net.named_parameters():
        torch.testing.assert_close(p, w[n])


def test_epoch_sums_and_evaluation():
    net, data = nn.Linear(5, 3), batches()
    data.append((torch.randn(3, 5), torch.tensor([0, 1, 2])))  # a smaller last batch counts by its images
    model = Classifier(net, partial(torch.optim.SGD, lr=0.0))
    fit = trainer(max_epochs=1)
    fit.fit(model, data, data)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    loss, error = F.cross_entropy(net(x), y).item(), 100 * (net(x).argmax(1) != y).double().mean().item()
    for split in ("train", "val"):
        assert fit.callback_metrics[f"{split}/loss"].item() == pytest.approx(loss, rel=1e-6)
        assert fit.callback_metrics[f"{split}/error"].item() == pytest.approx(error, rel=1e-6)
    assert model.running() == (pytest.approx(loss), pytest.approx(error))


def test_any_module_takes_a_schedule():
    """SGDR as a Lightning user expects it: no Hydra, no depthlab module."""
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    class Boring(BoringModel):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    schedule = SGDR(epochs=2, cycle=1)
    fit = trainer(max_epochs=1, callbacks=[schedule], limit_train_batches=3, limit_val_batches=0)
    fit.fit(Boring(), torch.utils.data.DataLoader(RandomDataset(32, 8)))
    assert fit.optimizers[0].param_groups[0]["lr"] == schedule.lr(2, 3)
