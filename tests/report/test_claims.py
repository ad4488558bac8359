"""Verdicts on planted runs: they support, contradict, leave open, diverge, are missing or reduced."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from conftest import ROOT
from depthlab.analysis import Result, files
from depthlab.report import claims
from depthlab.report.claims import INCONCLUSIVE, NOT_RUN, NOT_SUPPORTED, SUPPORTED, Estimate
from depthlab.report.experiments import Experiment, load_experiment
from depthlab.report.tables import tabulate

AXES = {"arch": ["plain11", "resnet110"], "sched": ["sgd", "sgdr"]}
BETTER = {"id": "B1", "says": "SGDR is better", "plus": [{"arch": "plain11", "sched": "sgd"}],
          "minus": [{"arch": "plain11", "sched": "sgdr"}], "above": 1.0}  # fmt: skip


def experiment(*stated):
    return Experiment("barz2018/table1", AXES, [0, 1, 2], {"claims": list(stated)}, data="cifar100")


def record(arch, sched, seed, error, budget=1.0, **more):
    about = {"arch": arch, "sched": sched, "data": "cifar100", "seed": seed, "budget": budget}
    identity = {"arch": {"name": arch}, "sched": {"name": sched}, "data": {"name": "cifar100"}, "seed": seed}
    return {**about, "precision": "32-true", "identity": identity, "config": identity, "diverged": error is None,
            "test_error": error, "study": "barz2018/table1", **more}  # fmt: skip


def planted(sgd, sgdr, budget=1.0):
    return [record("plain11", name, seed, error, budget)
            for name, errors in (("sgd", sgd), ("sgdr", sgdr)) for seed, error in enumerate(errors)]  # fmt: skip


def judge(records, *stated):
    about = experiment(*(stated or (BETTER,)))
    assert claims.problems(about) == []
    return claims.judge(about, tabulate(about, records))[0]


@pytest.mark.parametrize(
    ("sgd", "sgdr", "said"),
    [
        ((30.0, 30.1, 29.9), (28.0, 28.1, 27.9), SUPPORTED),
        ((28.0, 28.1, 27.9), (30.0, 30.1, 29.9), NOT_SUPPORTED),
        ((30.0, 30.1, 29.9), (29.5, 29.6, 29.4), NOT_SUPPORTED),  # better, but not by a point
        ((30.0, 29.0, 31.0), (28.0, 29.5, 28.6), INCONCLUSIVE),
        ((30.0,), (28.0,), INCONCLUSIVE),  # no spread is known
        ((30.0, 30.1, None), (28.0, 28.1), SUPPORTED),  # a diverged run has no error
        ((30.0, 30.1), (None, None), NOT_RUN),
        ((30.0, 30.1), (), NOT_RUN),
    ],
)
def test_difference(sgd, sgdr, said):
    assert judge(planted(sgd, sgdr)).verdict == said


def test_p_is_welchs():
    sgd, sgdr = (30.0, 29.0, 30.5), (28.0, 28.4, 27.5)
    found = judge(planted(sgd, sgdr))
    shifted = [x - 1.0 for x in sgd]
    assert found.p == pytest.approx(stats.ttest_ind(shifted, sgdr, equal_var=False, alternative="greater").pvalue)
    assert found.n == [3, 3]


def test_full_length_runs_speak_first_and_are_never_mixed():
    reduced, full = planted((50, 51, 52), (40, 41, 42), budget=0.1), planted((30, 31, 32), (29, 31, 33))
    assert judge(reduced).block.budget == 0.1
    found = judge(reduced + full)
    assert (found.block.budget, found.verdict) == (1.0, INCONCLUSIVE)


def test_missing_cells_are_named():
    found = judge(planted((30, 31), ()))
    assert "plain11 sgdr" in found.why
    assert [row.cell["sched"] for row in found.missing] == ["sgdr"]


def test_of_many_missing_cells_a_few_are_named():
    path = ROOT / "conf/experiment/li2018/initialisation.yaml"
    asked = load_experiment(path, "li2018/initialisation")
    (found,) = claims.judge(asked, tabulate(asked, []))
    assert found.why.endswith("ResNet-56 SGD kaiming 10.0, ... (48 cells)")
    assert len(found.missing) == 48


def test_noise_lets_single_runs_speak_beyond_it():
    claim = BETTER | {"least": 1, "noise": 0.5}
    for sgd, said in ((31.6, SUPPORTED), (31.4, INCONCLUSIVE), (30.6, INCONCLUSIVE), (30.4, NOT_SUPPORTED)):
        assert judge(planted((sgd,), (30.0,)), claim).verdict == said


@pytest.mark.parametrize(
    ("bound", "said"),
    [({"within": 3.0}, SUPPORTED), ({"within": 1.0}, NOT_SUPPORTED), ({"within": 2.05}, INCONCLUSIVE),
     ({"between": [1, 3]}, SUPPORTED), ({"below": 1}, NOT_SUPPORTED), ({"below": 3}, SUPPORTED)],
)  # fmt: skip
def test_bounds(bound, said):
    claim = {key: value for key, value in BETTER.items() if key != "above"} | bound
    assert judge(planted((30.0, 30.1, 29.9), (28.0, 28.1, 27.9)), claim).verdict == said


def test_ratio_against_the_ratio_of_its_bound():
    claim = BETTER | {"as": "ratio", "above": 1.5}
    assert judge(planted((30.0, 30.1), (15.0, 15.1)), claim).verdict == SUPPORTED
    assert judge(planted((30.0, 30.1), (25.0, 25.1)), claim).verdict == NOT_SUPPORTED
    found = claims.ratio([[30.0, 31.0]], [[15.0, 15.2]])
    eps = 1e-6  # the delta method is the derivative
    for run in ([30.0 + eps, 31.0], [30.0, 31.0 + eps]):
        assert (claims.ratio([run], [[15.0, 15.2]]).value - found.value) / eps == pytest.approx(0.5 / 30.5, rel=1e-4)


def test_parts_stand_and_fall_together():
    up, down = {k: BETTER[k] for k in ("plus", "minus", "above")}, {"plus": BETTER["minus"], "minus": BETTER["plus"]}
    both = {"id": "B5", "says": "both", "parts": [up, down | {"above": -5}]}
    assert judge(planted((30.0, 30.1), (28.0, 28.1)), both).verdict == SUPPORTED
    both["parts"][1] = {"plus": [{"arch": "resnet110", "sched": "sgd"}], "minus": BETTER["minus"], "above": 0}
    assert judge(planted((30.0, 30.1), (28.0, 28.1)), both).verdict == INCONCLUSIVE
    assert judge(planted((), ()), both).verdict == NOT_RUN
    both["parts"][1] = down | {"above": 0}
    assert judge(planted((30.0, 30.1), (28.0, 28.1)), both).verdict == NOT_SUPPORTED


def test_slope_and_rank_over_runs():
    gammas = [(d, 3 / d * (1 + 0.01 * (-1) ** d)) for d in (6, 9, 15, 30)]
    runs = [
        record("plain11", "sgd", seed, 1.0, depth=d, analyses={"norms": {"gamma": gamma}})
        for seed, (d, gamma) in enumerate(gammas)
    ]
    over = {"id": "C1", "says": "1/d", "plus": [{"arch": "plain11", "sched": "sgd"}], "against": "depth",
            "quantity": "analyses.norms.gamma"}  # fmt: skip
    found = judge(runs, over | {"as": "slope", "between": [-1.3, -0.7]})
    assert found.verdict == SUPPORTED
    assert found.estimate.value == pytest.approx(-1, abs=0.02)
    assert judge(runs, over | {"as": "slope", "above": 0}).verdict == NOT_SUPPORTED
    assert judge(runs, over | {"as": "rank", "below": 0}).verdict == SUPPORTED
    assert judge(runs, over | {"as": "largest", "below": 0.6}).verdict == SUPPORTED
    assert judge(runs, over | {"as": "largest", "below": 0.5}).verdict == NOT_SUPPORTED


def apart(one, other):
    return abs(one["test_error"] - other["test_error"])


def test_distance_of_any_two_runs():
    claim = {"id": "C4", "says": "one curve", "as": "apart", "quantity": f"{__name__}.apart",
             "plus": [{"sched": "sgd", "arch": "plain11"}, {"sched": "sgdr", "arch": "plain11"}]}  # fmt: skip
    assert judge(planted((30, 31), (28,)), claim | {"below": 3.1}).verdict == SUPPORTED
    assert judge(planted((30, 31), (28,)), claim | {"below": 2.9}).verdict == NOT_SUPPORTED
    assert judge(planted((30, 31), ()), claim | {"below": 2.9}).verdict == NOT_RUN


def test_lowest_of_a_grid():
    best = {"id": "C11", "says": "best", "as": "lowest", "below": 0, "noise": 0.5, "least": 1}
    best |= {"plus": [{"arch": "plain11", "sched": "sgdr"}], "minus": [{}]}
    grid = [record("resnet110", name, 0, 30.0) for name in ("sgd", "sgdr")]
    for error, said in ((29.4, SUPPORTED), (29.6, INCONCLUSIVE), (30.6, NOT_SUPPORTED)):
        assert judge(planted((31.0,), (error,)) + grid, best).verdict == said
    assert judge(planted((31.0,), (29.4,)), best).verdict == NOT_RUN  # the others are not there


def test_quantity_from_a_function_of_the_record():
    assert claims.quantity({"a": {"b": 2}}, "a.b") == 2
    assert claims.quantity({"a": None}, "a.b") is None
    assert claims.quantity({"hardware": "EPYC", "devices": 2}, "depthlab.report.tables.hardware") == "EPYC, 2 devices"


def test_tail_of_an_exact_number_is_an_inequality():
    assert (Estimate(2.0, 0.0).tail(1.0), Estimate(1.0, 0.0).tail(2.0)) == (0.0, 1.0)
    assert Estimate(1.0, 1.0, math.inf).tail(1.0) == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [({"abov": 1}, "abov is not known"), ({"below": 1}, "needs one of"), ({"as": "sum"}, "as=sum"),
     ({"plus": [{"arch": "vgg"}]}, "no cell"), ({"id": None}, "needs an id")],
)  # fmt: skip
def test_a_claim_that_cannot_be_tested_is_refused(change, said):
    assert any(said in line for line in claims.problems(experiment(BETTER | change)))


EXPERIMENTS = sorted((ROOT / "conf/experiment").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_stated_claim_can_be_tested(path):
    assert claims.problems(load_experiment(path, path.stem)) == []


ALL = {
    id: claim
    for path in EXPERIMENTS
    for claim in load_experiment(path, path.stem).paper.get("claims") or []
    for id in [f"{path.parent.name}/{claim['id']}"]
}
HYPOTHESES = [  # of the four papers, as numbered in their experiments' files
    *(f"barz2018/B{n}" for n in range(1, 10)),
    *(f"yu2019/Y{n}" for n in range(1, 14)),
    *(f"li2018/L{n}" for n in range(1, 8)),
    *(f"chang2018/C{n}" for n in range(1, 12)),
]


@pytest.mark.parametrize("id", HYPOTHESES)
def test_every_hypothesis_is_stated(id):
    """As itself or in parts of its own, C9a and C9b; the papers' own, not questions of ours."""
    found = [ALL[name] for name in ALL if re.fullmatch(f"{id}[a-z]?", name)]
    assert [claim for claim in found if not claim.get("ours")]


def test_an_id_names_one_claim():
    every = [claim["id"] for path in EXPERIMENTS for claim in load_experiment(path, "x").paper.get("claims") or []]
    assert len(every) == len(set(every)) == len(ALL)


# ---- what single runs, clocks and diverged runs can say


def test_noise_is_known_of_full_length_only():
    """Nobody knows how far runs of a twentieth of the epochs scatter: one of each decides nothing."""
    claim = BETTER | {"least": 1, "noise": 0.5}
    found = judge(planted((40.0,), (30.0,), budget=0.05), claim)
    assert (found.verdict, found.why) == (INCONCLUSIVE, "10 points (claimed: above 1; n = 1); needs 2 runs per cell")
    assert judge(planted((40.0, 40.1), (30.0, 30.1), budget=0.05), claim).verdict == SUPPORTED
    exact = BETTER | {"least": 1, "noise": 0}
    assert judge(planted((40.0,), (30.0,), budget=0.05), exact).verdict == SUPPORTED


def test_an_assumed_scatter_is_not_printed_as_measured():
    found = judge(planted((32.0,), (30.0,)), BETTER | {"least": 1, "noise": 0.5})
    assert found.why == "2 points (claimed: above 1; n = 1); 0.5 is left to chance"


def test_seconds_are_compared_on_one_machine():
    claim = BETTER | {"as": "ratio", "quantity": "seconds_per_epoch", "above": 1.5}
    timed = [record("plain11", "sgd", seed, 30.0, hardware="EPYC", seconds_per_epoch=100 + seed) for seed in (0, 1)]
    other = [record("plain11", "sgdr", seed, 30.0, hardware="H200", seconds_per_epoch=10 + seed) for seed in (0, 1)]
    found = judge(timed + other, claim)
    assert (found.verdict, found.why) == (NOT_RUN, "no machine has run all of it")
    same = [record("plain11", "sgdr", seed, 30.0, hardware="EPYC", seconds_per_epoch=99 + seed) for seed in (2, 3)]
    found = judge(timed + other + same, claim)
    assert found.verdict == NOT_SUPPORTED
    assert found.n == [2, 2]


def test_diverged_runs_are_counted_or_count():
    left_out = judge(planted((30.0, 30.1, None), (28.0, 28.1)))
    assert left_out.why.endswith("; without 1 diverged run")
    claim = BETTER | {"quantity": "depthlab.report.li2018_numbers.trains", "above": 0, "diverged": True}
    runs = [r | {"train_loss": 0.1} for r in planted((30.0, 30.1), (None, None))]
    found = judge(runs, claim)
    assert (found.verdict, found.estimate.value, found.n) == (SUPPORTED, 1.0, [2, 2])
    assert "without" not in found.why


@pytest.mark.parametrize(("n", "p"), [(3, 1 / 6), (4, 1 / 24), (7, 1 / 5040)])
def test_a_perfect_order_of_few(n, p):
    """One of n! orders; Student's t would have it certain."""
    assert claims.rank(range(n), range(n)).tail(0) == pytest.approx(p)
    assert claims.rank(range(n), range(n)[::-1]).tail(0) == pytest.approx(1 - p)


def test_rank_of_few_is_scipys_permutation_test():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 6.0, 6.0]
    found = stats.permutation_test((y,), lambda y: stats.spearmanr(x, y).statistic, permutation_type="pairings",
                                   alternative="greater")  # fmt: skip
    assert claims.rank(x, y).tail(0) == pytest.approx(found.pvalue)


@pytest.mark.parametrize(
    ("shallow", "parts"),
    [
        (1.1, [SUPPORTED] * 3),
        (3.0, [SUPPORTED, SUPPORTED, NOT_SUPPORTED]),
        (1.46, [SUPPORTED, SUPPORTED, INCONCLUSIVE]),
    ],
)
def test_sharper_without_shortcuts_but_not_at_depth_20(shallow, parts):
    asked = load_experiment(ROOT / "conf/experiment/li2018/sharpness.yaml", "li2018/sharpness")
    sharp = {"resnet20_noshort": shallow, "resnet56_noshort": 4.0, "resnet110_noshort": 9.0}
    runs = [
        record(cell["arch"], "li2018_step", 0, 8.0 + n, analyses={"sharpness": {"S_0_5": sharp.get(cell["arch"], 1.0)}})
        | {"data": "cifar10"}
        for n, cell in enumerate(asked.cells())
    ]
    found = claims.judge(asked, tabulate(asked, runs))[0]
    assert (found.claim["id"], [part.verdict for part in found.parts]) == ("L1", parts)
    assert found.verdict == claims.together(parts)


@pytest.mark.parametrize(("last", "said"), [(0.9, SUPPORTED), (0.1, NOT_SUPPORTED), (None, NOT_RUN)])
def test_flow_of_every_layer_at_every_time(tmp_path, last, said):
    """Of layers 1 to 3 (a fourth is trivial), after the first step and an epoch; measured at no time, not run."""
    asked = load_experiment(ROOT / "conf/experiment/yu2019/fig12.yaml", "yu2019/fig12")
    (stated,) = [part for part in asked.paper["claims"][0]["parts"] if part.get("as") == "apart"]
    alone = Experiment("x", asked.axes, [0], {"claims": [{"id": "Y9", "says": "x"} | stated]}, data="cifar10")
    sigma = {"simple_plain20": {"step000001": (0.2, 0.2, 0.2, 1.0), "epoch0005": (0.2, 0.3, 0.2, 1.0)},
             "simple_residual20": {"step000001": (0.5, 0.6, 0.7, 1.0), "epoch0005": (0.3, last, 0.5, 1.0)}}  # fmt: skip
    runs = []
    for arch, measured in sigma.items():
        for when, values in measured.items():
            (tmp_path / arch).mkdir(exist_ok=True)
            if last is not None or arch == "simple_plain20":
                files.write(tmp_path / arch, f"flow-{when}", Result({}, {"sigma": np.array(values, float)}), {})
        runs.append(record(arch, "yu2019", 0, 9.0, folder=str(tmp_path / arch)) | {"data": "cifar10"})
    (found,) = claims.judge(alone, tabulate(alone, runs))
    assert found.verdict == said
    if last is not None:
        assert found.estimate.value == (last < 0.3)


def test_words():
    """What is a number of points, a ratio, an extreme, or computed without runs says so."""
    pair = {"plus": BETTER["plus"], "minus": BETTER["minus"], "id": "X", "says": "x"}
    runs = planted((30.0, 30.0), (15.0, 15.0))
    said = {
        "ratio 2 (claimed: above 1; n = 2)": {"as": "ratio", "above": 1},
        "E: 15 points (claimed: between 10 and 20; n = 2)": {"between": [10, 20], "what": "E"},
        "at most 30 (claimed: below 40; 4 runs)": {
            "as": "largest",
            "below": 40,
            "plus": [{"arch": "plain11"}],
            "minus": [],
        },
    }
    for words, more in said.items():
        assert judge(runs, pair | more).why.startswith(words)
    stated = pair | {"quantity": "depthlab.report.yu2019_flow.phi_at_1", "below": 1}
    alone = Experiment("x", {}, [], {"claims": [stated]}, runs=False)
    assert claims.judge(alone, [])[0].why == "0.5 (claimed: below 1)"
