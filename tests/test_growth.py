import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from callbacks import SGD, GrowDepth, MultilevelCosine
from depthlab import Classifier, growth, schedules
from depthlab.architectures import MultilevelResNet, Plain11, ResNet
from depthlab.architectures.multilevel import PreActivationBlock
from depthlab.data import Batches
from depthlab.problem import Problem
from depthlab.records import training_flops
from tests.growing import AT, EPOCHS, STEPS, classifier, images, network, trainer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def meta(kind=MultilevelResNet, **options):
    with torch.device("meta"):
        return kind(**options)


def size(net):
    return sum(p.numel() for p in net.parameters())


# ---- the mathematics


@pytest.mark.parametrize(("n", "expected"), [(2, [1, 2, 2, 2]), (4, [1, 2, 2, 2, 3, 3, 4, 4])])
def test_sources(n, expected):
    assert growth.sources(n) == expected


@pytest.mark.parametrize(
    ("blocks", "width", "counts"),
    [(2, 16, (172_506, 366_938, 755_802)), (5, 16, (464_154, 950_234, 1_922_394)),
     (2, 32, (685_994, 1_461_930, 3_013_802)), (5, 32, (1_849_898, 3_789_738, 7_669_418))],
)  # fmt: skip
def test_parameters_along_the_growth(blocks, width, counts):
    net = meta(blocks=blocks, width=width)
    for k, expected in enumerate(counts):
        if k:
            growth.grow(net)
        assert size(net) == expected
        assert growth.depth(net) == 3 * (blocks * 2**k,)
        assert {block.step_size for stage in net.stages for block in stage} == {0.5**k}


@pytest.mark.parametrize(
    "net",
    [MultilevelResNet(width=4), ResNet(depth=14, width=4), ResNet(depth=26, width=4, shortcut="projection")],
    ids=["multilevel", "subsample", "projection"],
)
def test_what_is_copied_from_where(net):
    for p in net.parameters():
        nn.init.normal_(p)
    net(torch.randn(4, 3, 8, 8))  # moves running statistics and counters
    before = copy.deepcopy(net.state_dict())
    held = dict(net.named_parameters())
    n = len(net.stages[0])
    origin = growth.grow(net)
    after = net.state_dict()
    assert after.keys() == origin.keys()
    assert all(torch.equal(after[name], before[origin[name]]) for name in after)
    for k in range(3):
        for new, old in enumerate(growth.sources(n)):
            assert origin[f"stages.{k}.{new}.conv1.weight"] == f"stages.{k}.{old - 1}.conv1.weight"
            assert origin[f"stages.{k}.{new}.bn2.running_var"] == f"stages.{k}.{old - 1}.bn2.running_var"
    tensors = [p.data_ptr() for p in net.parameters()]
    assert len(set(tensors)) == len(tensors)
    kept = {name for name, p in net.named_parameters() if p is held[origin[name]]}
    assert {origin[name] for name in kept} == held.keys()  # every old tensor is still there, once
    assert all(int(name.split(".")[2]) % 2 == 0 for name in kept if name.startswith("stages"))


@pytest.mark.parametrize(("scale", "expected"), [(1, 0.040), (0.5, 0.020), (0.25, 0.010), (0.125, 0.005)])
def test_two_half_steps_differ_from_one_by_h_squared(scale, expected):
    torch.manual_seed(0)
    block = PreActivationBlock(16, 16, 1.0, False, True, 1e-3, 0.01).eval()  # torch's own initialisation
    x = torch.randn(8, 16, 16, 16)
    with torch.no_grad():
        block.conv2.weight *= scale
        one = block(x)
        block.step_size = 0.5
        two = block(block(x))
    assert ((two - one).norm() / (one - x).norm()).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("steps", [(4, 2), (2, 8, 2), (8, 4, 4)])
@pytest.mark.parametrize("kind", ["multilevel", "resnet"])
def test_shapes_go_up_and_down(steps, kind):
    def built(blocks):
        return network(blocks=blocks) if kind == "multilevel" else ResNet(depth=6 * blocks + 2, width=4)

    net = built(2)
    for blocks in steps:
        other = built(blocks)
        growth.set_step_size(other, 2 / blocks)
        growth.set_depth(net, **growth.state(other))
        net.load_state_dict(other.state_dict())
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(net.eval()(x), other.eval()(x))


def test_shapes_that_cannot_be_given():
    with pytest.raises(ValueError, match="single block"):
        growth.set_depth(meta(blocks=1), [2, 2, 2], 1.0)
    with pytest.raises(ValueError, match="0 stages"):
        growth.set_depth(meta(Plain11), [2, 2, 2], 1.0)


@pytest.mark.parametrize(
    ("net", "said"),
    [(meta(Plain11), "Plain11 has no stages of residual blocks"), (meta(ResNet, shortcut="none"), "no shortcuts"),
     (meta(blocks=1), "arch.blocks >= 2"), (meta(ResNet, depth=8), "arch.depth >= 14")],
    ids=["plain11", "plain20", "n=1", "depth 8"],
)  # fmt: skip
def test_networks_that_cannot_grow(net, said):
    assert said in growth.problems(net)[0]
    assert growth.state(net) is None
    with pytest.raises(ValueError, match=said):
        growth.grow(net)


def test_copies_keep_dtype_and_memory_format():
    net = network().to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    growth.grow(net)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    kernels = [p for p in net.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize(("blocks", "width", "saved"), [(2, 16, 0.445), (5, 16, 0.441), (2, 32, 0.446), (5, 32, 0.441)])
def test_saved_flops(blocks, width, saved):
    net, spent = meta(blocks=blocks, width=width), 0
    for cycle, epochs in enumerate((60, 50, 50)):
        if cycle:
            growth.grow(net)
        flops = training_flops(net, 32)
        spent += epochs * flops
    assert 1 - spent / (160 * flops) == pytest.approx(saved, abs=7e-4)


# ---- when


@pytest.mark.parametrize(
    ("t", "reset", "single"),
    [(0, 0.5, 0.5), (500, 0.499658, 0.499952), (7500, 0.426923, 0.489257), (15000, 0.2505, 0.457952),
     (22500, 0.0740769, 0.408781), (29500, 0.00134193, 0.350487), (29999, 0.001, 0.345989), (30000, 0.5, 0.34598),
     (42500, 0.2505, 0.226045), (54999, 0.001, 0.111893), (55000, 0.5, 0.111885), (67500, 0.2505, 0.0304606),
     (79500, 0.00149233, 0.00104809), (79999, 0.001, 0.001)],
)  # fmt: skip
def test_learning_rate(t, reset, single):
    assert schedules.multilevel_cosine(t, 500) == pytest.approx(reset, rel=2e-5)
    assert schedules.multilevel_cosine(t, 500, reset=False) == pytest.approx(single, rel=2e-5)
    assert MultilevelCosine().run_lr(t, 500) == schedules.multilevel_cosine(t, 500)


@pytest.mark.parametrize("budget", [0.019, 0.02, 0.03, 0.05, 0.1, 0.1234, 0.5, 0.77, 1.0, 2.0])
@pytest.mark.parametrize("at", [(60, 110), (1, 2), (40, 80, 120)])
def test_restart_and_growth_coincide_at_every_budget(budget, at):
    schedule = MultilevelCosine(at=at, budget=budget)
    try:
        points = GrowDepth(at=at, budget=budget).run_at
    except ValueError:
        return  # this budget is refused
    assert len(points) == len(at)
    for p, full in zip(points, at):
        assert abs(p - full * schedule.run_epochs / 160) <= 0.5
        assert schedule.run_lr(p * 7, 7) == 0.5
        assert schedule.run_lr(p * 7 - 1, 7) < 0.5
    restarts = [t for t in range(1, schedule.run_epochs * 7) if schedule.run_lr(t, 7) > schedule.run_lr(t - 1, 7)]
    assert restarts == [7 * p for p in points]


def test_schedule_alone_runs_at_any_budget():
    schedule = MultilevelCosine(budget=0.004)
    assert schedule.run_epochs == 1
    assert [schedule.run_lr(t, 4) for t in range(4)] == sorted((schedule.run_lr(t, 4) for t in range(4)), reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": [110, 60]}, r"grow.at must be rising .* got \[110, 60\]"),
        ({"at": [60, 60]}, "grow.at must be rising"),
        ({"at": []}, "grow.at must be rising"),
        ({"at": [0, 60]}, "grow.at must be rising epochs after 0"),
        ({"at": [60, 160]}, "before the last, 160"),
        ({"at": [60.5]}, "grow.at must be rising"),
        ({"budget": 0.01}, r"budget=0.01 leaves 2 of 160 epochs .* take budget >= 0.0187 \(3 epochs\)"),
        ({"momentum": "keep"}, "grow.momentum must be reset or copy, got 'keep'"),
    ],
)
def test_refused_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        GrowDepth(**options)


@pytest.mark.parametrize(
    ("net", "others", "said"),
    [
        (lambda: Plain11(10), [], "Plain11 has no stages"),
        (lambda: network(blocks=1), [], "arch.blocks >= 2"),
        (network, [EMAWeightAveraging()], "EMAWeightAveraging averages weights of one shape"),
        (network, [SGD(epochs=12, milestones=(5, 8))], "set grow.epochs to sched.epochs"),
    ],
    ids=["plain11", "n=1", "EMA", "schedule"],
)
def test_conflicts_are_named_before_training(net, others, said):
    with pytest.raises(Problem, match=said):
        trainer(callbacks=others).fit(classifier(net()), *images())


# ---- in a fit


class Watch(Callback):
    """What stands after each epoch's start, and the work of each step."""

    def __init__(self):
        self.depths, self.momenta, self.order, self.blocks, self.logged = [], [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.depths.append(growth.depth(pl_module.net))
        states = {n: optimizer.state.get(p) or {} for n, p in pl_module.net.named_parameters()}
        self.momenta.append(copy.deepcopy(states))
        buffers = [state["momentum_buffer"].data_ptr() for state in states.values() if state]
        assert len(set(buffers)) == len(buffers)
        fresh = pl_module.configure_optimizers().param_groups
        pairs = zip(optimizer.param_groups, fresh, strict=True)
        self.order.append([list(map(id, a["params"])) == list(map(id, b["params"])) for a, b in pairs])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.blocks.append(0)

    def count(self, module, *args):
        self.blocks[-1] += module.training and isinstance(module, PreActivationBlock)

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append(trainer.callback_metrics["depth"].item())


@pytest.mark.parametrize("momentum", ["reset", "copy"])
def test_a_run_that_grows(momentum):
    watch, model = Watch(), classifier()
    hook = register_module_forward_hook(watch.count)
    try:
        trainer(callbacks=[watch], momentum=momentum).fit(model, *images())
    finally:
        hook.remove()
    assert watch.depths == 2 * [(2, 2, 2)] + 2 * [(4, 4, 4)] + 2 * [(8, 8, 8)]
    assert watch.logged == [14, 14, 26, 26, 50, 50]
    assert watch.blocks == 2 * STEPS * [6] + 2 * STEPS * [12] + 2 * STEPS * [24]  # what is not there costs nothing
    assert all(all(groups) for groups in watch.order)
    assert growth.step_size(model.net) == 0.25
    for epoch in AT:
        states = watch.momenta[epoch]
        if momentum == "reset":
            assert not any(states.values())
        else:
            for k in range(3):
                a, b = (states[f"stages.{k}.{j}.conv1.weight"]["momentum_buffer"] for j in (1, 2))
                assert torch.equal(a, b)
                assert a.abs().sum() > 0
    assert all(state["momentum_buffer"].isfinite().all() for state in watch.momenta[-1].values())


def test_all_parameters_of_a_grown_network_learn():
    before = {}

    class Keep(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            before.update({n: p.detach().clone() for n, p in pl_module.net.named_parameters()})

    model = classifier()
    trainer(callbacks=[Keep()]).fit(model, *images())
    assert all(not torch.equal(p, before[n]) for n, p in model.net.named_parameters())
    pairs = [(model.net.stages[k][2].conv1.weight, model.net.stages[k][3].conv1.weight) for k in range(3)]
    assert all(not torch.equal(a, b) for a, b in pairs)  # copies go their own ways


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"gradient_clip_val": 10.0}, {"gradient_clip_val": 0.1, "momentum_style": "keras"}],
    ids=["bf16", "clip", "clip, keras"],
)
@pytest.mark.parametrize("momentum", ["reset", "copy"])
def test_growth_under(options, momentum):
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.net.parameters() if p.grad is not None]
            norms.append(torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0)

    options = {"momentum_style": "torch"} | options
    model = classifier(momentum_style=options.pop("momentum_style"))
    run = trainer(momentum=momentum, callbacks=[Norms()], **options)
    run.fit(model, *images())
    assert growth.depth(model.net) == (8, 8, 8)
    assert math.isfinite(run.callback_metrics["train/loss"])
    if limit := options.get("gradient_clip_val"):
        assert max(norms) <= limit * 1.001


@pytest.mark.parametrize(
    ("kind", "epochs", "expected"),
    [
        ("multilevel", 3, [13, 13, 25, 25]),
        pytest.param("multilevel", EPOCHS, [13, 13, 25, 25, 49, 49], marks=pytest.mark.slow),
        pytest.param("resnet", EPOCHS, [13, 13, 25, 25, 49, 49], marks=pytest.mark.slow),
    ],
)
def test_compiled_anew_once_per_cycle(kind, epochs, expected):
    """Once to train and once to evaluate; the numbers are the convolutions in each graph."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model = classifier(network() if kind == "multilevel" else ResNet(depth=14, width=4))
    model.net.compile(backend=backend, fullgraph=True)
    trainer(max_epochs=epochs).fit(model, *images())
    assert compiled == expected


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_by_inductor_trains_the_same():
    """The real compiler, once per cycle; the losses are those without it."""
    inductor, compiled, losses = torch._dynamo.lookup_backend("inductor"), [], {}

    def backend(graph, inputs):
        compiled.append(sum("conv2d" in str(node.target) for node in graph.graph.nodes))
        return inductor(graph, inputs)

    for way in ("eager", "inductor"):
        model = classifier()
        if way == "inductor":
            model.net.compile(backend=backend, fullgraph=True)
        run = trainer(max_epochs=3, limit_val_batches=0)
        run.fit(model, *images())
        losses[way] = run.callback_metrics["train/loss"].item()
        assert growth.depth(model.net) == (4, 4, 4)
    assert compiled == [13, 25]
    assert losses["inductor"] == pytest.approx(losses["eager"], rel=1e-3)


def test_growth_goes_with_any_schedule():
    model = Classifier(network())
    run = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[SGD(epochs=8, lr=0.01, milestones=(4, 6), budget=0.5), GrowDepth(at=[2, 5], epochs=8, budget=0.5)],
    )  # fmt: skip
    run.fit(model, *images())
    assert growth.depth(model.net) == (8, 8, 8)


def test_a_second_fit_goes_on_from_where_the_first_stopped():
    model, run = classifier(), trainer(max_epochs=3)
    run.fit(model, *images())
    assert growth.depth(model.net) == (4, 4, 4)
    run.fit_loop.max_epochs = EPOCHS
    run.fit(model, *images())
    assert growth.depth(model.net) == (8, 8, 8)


def test_loss_right_after_growth_is_near_the_old_one():
    digits = load_digits()
    x = torch.tensor(digits.images * 15.9, dtype=torch.uint8)[..., None].repeat(1, 1, 1, 3)
    y = torch.tensor(digits.target)
    options = {"mean": [78.0] * 3, "std": [96.0] * 3}
    train = Batches(x[:1000], y[:1000], 50, shuffle=True, **options)
    test = Batches(x[1500:], y[1500:], 297, **options)
    torch.manual_seed(0)
    net = MultilevelResNet(blocks=3, width=8, bn_momentum=0.1)
    run = Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[MultilevelCosine(epochs=5, at=(), lr_max=0.2)],
    )  # fmt: skip
    run.fit(Classifier(net, weight_decay=2e-4), train, test)

    @torch.no_grad()
    def loss():
        return sum(nn.functional.cross_entropy(net.eval()(images), labels).item() for images, labels in test)

    old = loss()
    growth.grow(net)
    new = loss()
    net.train()
    with torch.no_grad():  # running statistics of the grown network, nothing learnt
        for batch, _ in train:
            net(batch)
    settled = loss()
    assert old < 0.4
    assert old < new < math.log(10)  # the first blocks of the stages, and statistics of the old step size
    assert settled < old + 0.2
