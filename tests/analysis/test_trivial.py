"""The trivial case against whole matrices, the paper's integral and numbers, and values sampled before."""

import numpy as np
import pytest
from scipy import integrate, stats

from depthlab.analysis import drawing
from depthlab.analysis.trivial import (
    BASE,
    SWEEPS,
    closed_form,
    figure,
    figure_phi,
    phi,
    power,
    simulate,
    trivial,
)
from depthlab.problem import Problem


def by_matrices(draws, residual, *, n, layer, sigma_A, sigma_V, p, epsilon, L):
    """The definition: every matrix made, every row counted."""
    random = np.random.default_rng(7)
    theta = np.broadcast_to(np.eye(n), (draws, n, n))
    for _ in range(layer, L):
        A = random.normal(0, sigma_A, (draws, n, n))
        K = np.eye(n) + epsilon * A if residual else A
        S = (random.random((draws, 1, n)) < p).astype(float)
        theta = theta @ K.transpose(0, 2, 1) * S
    theta = theta * random.normal(0, sigma_V, (draws, 1, n))
    own = np.diagonal(theta, axis1=1, axis2=2)
    return float((abs(own) > abs(theta.sum(2) - own)).mean())


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "other", [{"n": 5, "p": 0.7, "sigma_A": 3.0}, {"n": 3, "layer": 8}, {"n": 8, "p": 0.4}], ids=str
)
def test_one_row_of_independent_numbers_has_the_distribution_of_the_matrices(residual, other):
    at = BASE | other
    whole = by_matrices(6000, residual, **at)
    row, _ = simulate(60_000, np.random.default_rng(0), residual, **at)
    assert row == pytest.approx(whole, abs=0.012)


def run(residual=True, draws=40_000, **other):
    return simulate(draws, np.random.default_rng(3), residual, **BASE | other)[0]


def test_base_case():
    assert run(draws=100_000) == pytest.approx(0.588, abs=0.004)  # standard error .0016
    assert run(False, draws=100_000) == pytest.approx(0.1114, abs=0.003)
    assert closed_form("eq11", **BASE) == pytest.approx(0.588893, abs=1e-6)
    assert closed_form("conclusion", **BASE) == pytest.approx(0.588219, abs=1e-6)
    assert closed_form("corrected", **BASE) == pytest.approx(0.587344, abs=1e-6)


@pytest.mark.parametrize(
    ("other", "residual", "paper", "plain"),
    [
        ({"n": 2}, 0.648, 0.590, 0.474),
        ({"n": 5}, 0.589, 0.590, 0.247),
        ({"n": 50}, 0.586, 0.588, 0.069),
        ({"layer": 1}, 0.386, 0.386, 0.111),
        ({"layer": 9}, 0.898, 0.899, 0.112),
        ({"sigma_A": 0.1}, 0.561, 0.566, 0.112),
        ({"sigma_A": 1}, 0.321, 0.355, 0.111),
        ({"sigma_A": 5}, 0.111, 0.152, 0.113),
        ({"p": 0.3}, 0.056, 0.002, 0.068),
        ({"p": 0.6}, 0.090, 0.078, 0.092),
        ({"p": 0.8}, 0.328, 0.327, 0.105),
        ({"p": 1}, 0.9938, 0.9962, 0.117),
        ({"epsilon": 1}, 0.562, 0.566, 0.112),
        ({"epsilon": 10}, 0.322, 0.355, 0.112),
    ],
    ids=str,
)
def test_sampled_values(other, residual, paper, plain):
    assert run(draws=20_000, **other) == pytest.approx(residual, abs=0.013)
    assert run(False, draws=20_000, **other) == pytest.approx(plain, abs=0.011)
    assert closed_form("eq11", **BASE | other) == pytest.approx(paper, abs=6e-4)


def test_sigma_v_cancels_exactly_and_no_gate_no_flow():
    assert run(sigma_V=0.125, draws=5000) == run(sigma_V=1.0, draws=5000)
    assert run(p=0.0, draws=1000) == run(False, p=0.0, draws=1000) == 0
    assert closed_form("eq11", **BASE | {"p": 0.0}) == 0
    assert closed_form("corrected", **BASE | {"p": 1.0, "n": 1}) == 1


def test_phi_is_the_papers_integral_and_its_approximation_is_off_by_008():
    for r in (0.03, 0.5, 1.0, 2.07, 40.0):
        x, y = stats.norm(scale=r), stats.norm()
        halves = integrate.quad(lambda u, x=x, y=y: x.pdf(u) * y.cdf(u), 0, 12 * r, points=[r], epsabs=1e-12)
        assert phi(r) == pytest.approx(4 * halves[0] - 1, abs=1e-9)
    r = np.logspace(-3, 3, 20001)
    off = abs(power(r) - phi(r))
    assert off.max() == pytest.approx(0.0081, abs=1e-4)
    assert r[off.argmax()] == pytest.approx(2.07, abs=0.01) or 1 / r[off.argmax()] == pytest.approx(2.07, abs=0.01)
    assert phi(1) == power(1) == 0.5


def test_corrected_form_is_the_probability_with_an_open_path():
    for other in ({}, {"sigma_A": 0.1}, {"sigma_A": 0.3}, {"p": 1.0}, {"n": 100}):
        at = BASE | other
        _, through = simulate(100_000, np.random.default_rng(1), True, **at)
        assert closed_form("corrected", **at) == pytest.approx(through, abs=0.005)  # 3 standard errors
    at = BASE | {"sigma_A": 0.1}
    assert closed_form("eq11", **at) - closed_form("corrected", **at) > 0.007


def test_all_sweeps_and_figures():
    out = trivial(draws=200)
    assert len(out.arrays["sweep"]) == sum(map(len, SWEEPS.values())) == 57
    assert (out.arrays["cut"] >= 0).all()
    again = trivial(draws=200)
    assert all((out.arrays[key] == again.arrays[key]).all() for key in out.arrays)
    for drawn in (figure({"": out}), figure_phi()):
        assert drawing.png(drawn).startswith(b"\x89PNG")


def test_what_is_refused():
    with pytest.raises(Problem, match="analysis.draws must be >= 1, got 0"):
        trivial(draws=0)
    with pytest.raises(ValueError, match="one of eq11, conclusion, gates, corrected, got 'eq12'"):
        closed_form("eq12", **BASE)
    with pytest.raises(ValueError, match="0 <= p <= 1"):
        run(p=1.5)
