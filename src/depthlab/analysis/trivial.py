"""Dominant gradient flow of the trivial case (Yu & Tomasi 2019, D.4.1 and E; Figs. 11 and 13). No network, no data.

Theta     = [prod_{m=l+1}^{L} K(m)^T S(m)] diag(V), n x n; S diagonal, Bernoulli(p); V ~ N(0, sigma_V^2)
K         residual: I + eps A, plain: A; A_ij ~ N(0, sigma_A^2)
sigma     fraction of rows i with |Theta_ii| > |sum_{j != i} Theta_ij|; 0 > 0 does not hold
base      n = 20, eps = .1, L = 10, l = 5, p = .9, sigma_A = .01, sigma_V = .1, 100K draws

Simulation  All rows have one distribution, so row 0 is enough, and a row u times a matrix of independent normal numbers
is, given u, |u| sigma_A z with z ~ N(0, 1)^n: no matrix is ever made. Same distribution, n times less work: all of
Fig. 11, 57 points x 2 networks x 100K draws, about 20 s of one core.
Closed form, q = L - l:  E = p^q phi(r),  r = sqrt(1 + q eps^2 sigma_A^2) / (eps sigma_A sqrt((n - 1) g))
             g, the gates on the way          phi(r)
  eq11       p^2 (1 - p^2q) / (1 - p^2)       1 / (1 + r^-1.2)      as derived in the paper
  conclusion q                                1 / (1 + r^-1.2)      as repeated in its conclusion: right for p = 1
  gates      p (1 - p^q) / (1 - p)            1 / (1 + r^-1.2)      a gate is 0 or 1: E[B^2] = E[B] = p, not p^2
  corrected  the same                         (2/pi) arctan r       what the integral of Eq. 14 is
All are the probability that row 0 dominates AND its own path is open; where that path is cut it may dominate, too
(`cut`, simulated: .0003 at the base, .030 of .061 at p = .5, which is why small p fails). `corrected` agrees with the
open part within the simulation's error; `eq11`, too small in g, sometimes lies nearer to the sum of both by chance.
Eq. 15's 1 / (1 + r^-1.2) is off by .0081 at most (r = 2.07).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from depthlab.analysis import Result
from depthlab.problem import Problem

BASE = {"n": 20, "layer": 5, "sigma_A": 0.01, "sigma_V": 0.1, "p": 0.9, "epsilon": 0.1, "L": 10}
SWEEPS: dict[str, list[float]] = {  # the panels of Fig. 11, (a) to (f); the paper states no grids
    "n": [2, 5, 10, 20, 50, 100],
    "layer": [1, 2, 3, 4, 5, 6, 7, 8, 9],
    "sigma_A": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10],
    "sigma_V": [0.01, 0.03, 0.1, 0.3, 1],
    "p": [k / 20 for k in range(21)],
    "epsilon": [0.01, 0.03, 0.1, 0.3, 1, 3, 10],
}
FORMS = ("eq11", "conclusion", "gates", "corrected")


def phi(r: Any) -> Any:
    """P(|X| > |Y|) of independent X ~ N(0, r^2), Y ~ N(0, 1) (Eq. 14)."""
    return 2 / np.pi * np.arctan(r)


def power(r: Any, c: float = 1.2) -> Any:
    """The paper's approximation of `phi` (Eq. 15)."""
    r = np.asarray(r, dtype=float)
    return np.where(r > 0, 1 / (1 + np.maximum(r, 1e-300) ** -c), 0.0)


def closed_form(
    form: str, *, n: int, layer: int, sigma_A: float, p: float, epsilon: float, L: int, **_: float
) -> float:
    """E[sigma] of the residual case by one of `FORMS`. The standard deviation of V cancels.

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"trivial: form must be one of {', '.join(FORMS)}, got {form!r}")
    q = L - layer
    gates = {"eq11": sum(p ** (2 * k) for k in range(1, q + 1)), "conclusion": q}
    g = gates.get(form, sum(p**k for k in range(1, q + 1)))
    other = epsilon * sigma_A * np.sqrt((n - 1) * g)
    r = np.sqrt(1 + q * (epsilon * sigma_A) ** 2) / other if other > 0 else np.inf
    return float(p**q * (phi if form == "corrected" else power)(r))


def simulate(
    draws: int, random: np.random.Generator, residual: bool, *, n: int, layer: int, sigma_A: float, sigma_V: float,
    p: float, epsilon: float, L: int, chunk: int = 4096,
) -> tuple[float, float]:  # fmt: skip
    """E[sigma] over `draws` draws, and the part of it in which row 0's own gates are all open.

    Memory: 4 arrays (chunk, n) of float32.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not (draws >= 1 and n >= 1 and 0 <= layer <= L and 0 <= p <= 1):
        raise ValueError(
            f"trivial: need draws, n >= 1, 0 <= layer <= L and 0 <= p <= 1, got {draws}, {n}, {layer}, {L}, {p}"
        )
    scale = epsilon * sigma_A if residual else 1.0  # a plain row's scale cancels
    dominant = through = 0
    for start in range(0, draws, chunk):
        b = min(chunk, draws - start)
        u = np.zeros((b, n), np.float32)
        u[:, 0] = 1
        is_open = np.ones(b, bool)
        for _ in range(L - layer):
            z = random.standard_normal((b, n), np.float32)
            z *= np.float32(scale) * np.sqrt(np.einsum("ij,ij->i", u, u))[:, None]
            if residual:
                z += u
            gate = random.random((b, n), np.float32) < p
            u = z * gate
            is_open &= gate[:, 0]
        u *= random.standard_normal((b, n), np.float32) * np.float32(sigma_V)
        yes = np.abs(u[:, 0]) > np.abs(u[:, 1:].sum(1))
        dominant += int(yes.sum())
        through += int((yes & is_open).sum())
    return dominant / draws, through / draws


def trivial(draws: int = 100_000, seed: int = 0) -> Result:
    """All six sweeps. Arrays over their points: `sweep`, `value`, `residual`, `plain`, `cut` (what of `residual` has
    a closed gate on its own path) and each of `FORMS`; the standard error of a simulated x is sqrt(x (1 - x) / draws).

    Raises:
        Problem: fewer than 1 draw.
    """
    if draws < 1:
        raise Problem(f"analysis.draws must be >= 1, got {draws}")
    from depthlab.analysis.inside import progress

    points = [(key, value) for key, values in SWEEPS.items() for value in values]
    rows: dict[str, list[Any]] = {key: [] for key in ("sweep", "value", "residual", "plain", "cut", *FORMS)}
    for number, (key, value) in enumerate(progress(points, "trivial case")):
        at = BASE | {key: value}
        random = np.random.default_rng([seed, number])  # a point's numbers do not depend on the other points
        residual, through = simulate(draws, random, True, **at)
        row = {"sweep": key, "value": value, "residual": residual, "cut": residual - through}
        row["plain"] = simulate(draws, random, False, **at)[0]
        row |= {form: closed_form(form, **at) for form in FORMS}
        for name in rows:
            rows[name].append(row[name])
    arrays = {key: np.array(values) for key, values in rows.items()}
    base = (arrays["sweep"] == "n") & (arrays["value"] == BASE["n"])
    scalars = {key: float(arrays[key][base][0]) for key in ("residual", "plain", *FORMS)}
    return Result({"draws": draws, **scalars}, arrays)


# ---- figures

PANELS = {"n": "dimension n", "layer": "layer $l$", "sigma_A": r"$\sigma_A$", "sigma_V": r"$\sigma_V$", "p": "p",
          "epsilon": r"$\epsilon$"}  # fmt: skip


def figure(results: Mapping[str, Result]) -> Any:
    """Fig. 11: blue plain, red residual, dotted the paper's approximation; dashed the corrected one plus `cut`."""
    from depthlab.analysis.drawing import canvas

    (result,) = results.values()
    drawing = canvas(10.5, 6.0)
    axes = drawing.subplots(2, 3, sharey=True)
    for letter, axis, (key, label) in zip("abcdef", axes.flat, PANELS.items()):
        rows = result.arrays["sweep"] == key
        x = result.arrays["value"][rows].astype(float)
        for name, style in (
            ("plain", {"color": "tab:blue", "marker": "o", "label": "plain, simulated"}),
            ("residual", {"color": "tab:red", "marker": "o", "label": "residual, simulated"}),
            ("eq11", {"color": "tab:red", "ls": ":", "lw": 2, "label": "residual, the paper's approximation"}),
            ("corrected", {"color": "black", "ls": "--", "lw": 0.8, "label": "residual, corrected"}),
        ):
            y = result.arrays[name][rows] + (result.arrays["cut"][rows] if name == "corrected" else 0)
            axis.plot(x, y, ms=3, **{"lw": 1.2} | style)
        axis.set_xlabel(f"({letter})  {label}")
        if key in ("n", "sigma_A", "sigma_V", "epsilon"):
            axis.set_xscale("log")
        axis.grid(alpha=0.25, lw=0.6)
    for axis in axes[:, 0]:
        axis.set(ylabel=r"$E[\sigma]$", ylim=(-0.02, 1.02))
    drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawing


def figure_phi() -> Any:
    """Fig. 13: phi(r), its approximation, and the difference of the two."""
    from depthlab.analysis.drawing import canvas

    r = np.logspace(-2, 2, 401)
    drawing = canvas(6.4, 5.0)
    top, bottom = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.semilogx(r, phi(r), color="tab:blue", lw=2, label=r"$\phi(r) = (2/\pi)\,\arctan r$")
    top.semilogx(r, power(r), color="magenta", lw=0.8, label="$1 / (1 + r^{-1.2})$")
    top.plot([1, 1, r[0]], [0, 0.5, 0.5], color="tab:red", lw=0.8)
    top.set(ylabel=r"$P(|X| > |Y|)$", ylim=(0, 1), xlim=(r[0], r[-1]))
    top.legend(frameon=False)
    bottom.semilogx(r, power(r) - phi(r), color="magenta", lw=0.8)
    bottom.axhline(0, color="0.6", lw=0.6)
    bottom.set(xlabel=r"$r = \sigma_X / \sigma_Y$", ylabel="difference")
    for axis in (top, bottom):
        axis.grid(alpha=0.25, lw=0.6)
    return drawing
