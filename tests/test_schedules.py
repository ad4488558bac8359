"""Every value of SPEC section 2, to 6 digits; budgets; refusals."""

import pytest
import torch
import yaml

from callbacks import CLR, SGD, SGDR, Constant, OneCycle, Step
from conftest import ROOT

SPE = 500  # 50,000 images in batches of 100


def six(x: float):
    return pytest.approx(x, rel=5e-6)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.01), (1, 0.1), (79, 0.1), (80, 0.01), (119, 0.01), (120, 0.001), (163, 0.001)],
)
def test_handmade(epoch, lr):
    assert SGD().lr(epoch * SPE, SPE) == six(lr) == SGD().lr(epoch * SPE + SPE - 1, SPE)


CLR_TABLE = [
    (0, 1e-05, 1e-05),
    (1, 2.9998e-05, 2.99946e-05),
    (500, 0.010009, 0.00947598),
    (2500, 0.050005, 0.0390283),
    (5000, 0.1, 0.064),
    (7500, 0.050005, 0.0271214),
    (10000, 1e-05, 4.70588e-06),
    (15000, 0.1, 0.0372093),
    (20000, 1e-05, 3.07692e-06),
    (25000, 0.1, 0.0262295),
    (40000, 1e-05, 1.81818e-06),
    (45000, 0.1, 0.0164948),
    (75000, 0.1, 0.010596),
    (79500, 0.010009, 0.00100656),
    (79999, 2.9998e-05, 2.99983e-06),
]


@pytest.mark.parametrize(("t", "plain", "decayed"), CLR_TABLE)
def test_clr(t, plain, decayed):
    assert CLR(delta=1).lr(t, SPE) == six(plain)
    assert CLR().lr(t, SPE) == six(decayed)


SGDR_TABLE = [
    (0, 0.1, 0.1),
    (1, 0.0982963, 0.0933013),
    (5, 0.0629413, 0.0500005),
    (6, 0.0500005, 0.0370597),
    (11, 0.00170469, 1e-06),
    (12, 0.1, 0.1),
    (13, 0.0995722, 0.0982963),
    (24, 0.0500005, 0.0434743),
    (35, 0.000428753, 1e-06),
    (36, 0.1, 0.1),
    (37, 0.0998929, 0.0995722),
    (60, 0.0500005, 0.0467304),
    (83, 0.000108053, 1e-06),
    (84, 0.1, 0.1),
    (85, 0.0999732, 0.0998929),
    (132, 0.0500005, 0.0483646),
    (178, 0.000108053, 2.77704e-05),
    (179, 2.77704e-05, 1e-06),
]


@pytest.mark.parametrize(("epoch", "paper", "authors"), SGDR_TABLE)
def test_sgdr(epoch, paper, authors):
    for t in (epoch * SPE, epoch * SPE + SPE - 1):
        assert SGDR().lr(t, SPE) == six(paper)
        assert SGDR(formula="authors").lr(t, SPE) == six(authors)


@pytest.mark.parametrize(
    ("t", "lr"), [(3000, 0.0500005), (5999, 1.00685e-06), (6000, 0.1), (17999, 1.00171e-06), (89999, 1.00011e-06)]
)
def test_sgdr_per_step(t, lr):
    assert SGDR(granularity="step").lr(t, SPE) == six(lr)


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=7, steps_per_epoch=10, cycle_momentum=False)
    ours = OneCycle(epochs=7)
    for t in range(70):
        assert ours.lr(t, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step() if t < 69 else None


def test_yu2019():
    """Sections 2.5: 1e-2, divided by 10 after epochs 120 and 160; for fully-fledged networks .1, after 90 and 135."""
    for name, lr, epochs in (("yu2019", 0.01, (120, 160, 200)), ("yu2019_full", 0.1, (90, 135, 180))):
        options = yaml.safe_load((ROOT / f"conf/sched/{name}.yaml").read_text())
        schedule = Step(**{key: options[key] for key in ("epochs", "lr", "milestones", "gamma")})
        a, b, end = epochs
        assert schedule.run_epochs == end
        for first, after, rate in ((0, a, lr), (a, b, lr / 10), (b, end, lr / 100)):
            assert schedule.lr(first * 391, 391) == pytest.approx(rate, rel=1e-12)
            assert schedule.lr(after * 391 - 1, 391) == pytest.approx(rate, rel=1e-12)


def test_step_and_constant():
    step = Step(epochs=300, milestones=(150, 225, 275))
    assert [step.lr(e * SPE, SPE) for e in (149, 150, 225, 299)] == [six(x) for x in (0.1, 0.01, 0.001, 1e-4)]
    assert Constant(lr=0.3).lr(12345, SPE) == 0.3


@pytest.mark.parametrize("schedule", [SGD, CLR, SGDR, Step])
@pytest.mark.parametrize("budget", [0.1, 0.05, 2.0])
def test_budget_stretches_the_axis(schedule, budget):
    """Step t of the budgeted run uses the rate at the same fraction of the whole one, exactly."""
    whole, part = schedule(), schedule(budget=budget)
    assert part.run_epochs == max(1, round(whole.epochs * budget))
    total, part_total = whole.epochs * SPE, part.run_epochs * SPE
    compared = [t for t in range(part_total) if t * total % part_total == 0]
    assert len(compared) >= 100
    for t in compared:
        assert part.run_lr(t, SPE) == pytest.approx(whole.lr(t * total // part_total, SPE), rel=1e-12)


def test_budget_keeps_every_restart():
    rates = [SGDR(budget=0.05).run_lr(t, SPE) for t in range(9 * SPE)]
    restarts = [t for t in range(1, len(rates)) if rates[t] > rates[t - 1]]
    assert restarts == [300, 900, 2100]  # 12/20, 36/20, 84/20 epochs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGDR(lr_max=0.001, lr_min=0.01), "sched.lr_max must be > lr_min, got 0.001 <= 0.01"),
        (lambda: CLR(half_cycle=0), "sched.half_cycle must be >= 1 epoch, got 0"),
        (lambda: SGD(epochs=-3), "sched.epochs must be a whole number >= 1, got -3"),
        (lambda: SGD(epochs=1.5), "sched.epochs must be a whole number >= 1, got 1.5"),
        (lambda: SGD(milestones=(120, 80)), "sched.milestones must be rising"),
        (lambda: SGD(milestones=(80, 200)), "sched.milestones must be rising"),
        (lambda: SGDR(formula="mine"), "sched.formula must be paper or authors, got mine"),
        (lambda: SGDR(formula="authors", granularity="step"), "sched.granularity must be epoch where"),
        (lambda: SGDR(budget=0), "sched.budget must be > 0, got 0"),
    ],
)
def test_refusals_quote_what_they_got(make, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.").replace("(", r"\(")):
        make()
