"""Gradients of Yu & Tomasi 2019: size (Fig. 10) and dominant flow (Fig. 12) from finished runs, drawn like theirs.

The trivial case (Figs. 11 and 13) is computed. For what a figure is given, see `given`; functions of a record, or of
nothing, are numbers for claims.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from depthlab.analysis import Result, files
from depthlab.analysis import trivial as case
from depthlab.report.figures import canvas
from depthlab.report.given import Drawn, Given, Table, measurement
from depthlab.report.tables import Record
from depthlab.report.yu2019_measures import is_plain, shade

# ---- Fig. 10


def final_gradients(given: Given) -> Drawn:
    """Fig. 10: histogram over all steps that were measured."""
    from depthlab.analysis import gradient as gradients

    figures, printed, rows, said = {}, [], [], []
    for paper in given.experiment.paper.get("published") or []:
        printed.append(["paper", "not said", f"{paper['mean']:.3g}", f"{paper['std']:.3g}", "", str(paper["steps"])])
    for row, record in ((cell, run) for cell in given.rows for run in cell.finished):
        found = at_steps(record, "gradient")
        if not found:
            said.append(f"Not measured during training: {record['folder']}")
            continue
        arrays = {key: sum(r.arrays[key] for r in found) for key in ("counts", "moments")}
        name = given.experiment.name_of(row.cell)
        figures[""] = gradients.figure({name: Result({}, arrays | {"edges": found[0].arrays["edges"]})})
        numbers = gradients.of_moments(arrays["moments"])
        rows.append(row.cell | {"seed": record["seed"], "steps": len(found)} | numbers)
        batch = given.compose(f"arch={row.cell['arch']}")["data"]["batch_size"]
        for what, scale in (("of each image's loss", 1), (f"of the mean over a batch of {batch}", batch)):
            values = [f"{numbers[key] / scale:.3g}" for key in ("mean", "std")]
            printed.append([name, what, *values, f"{numbers['kurtosis']:.2f}", str(len(found))])
    header = ["network", "gradient", "mean", "standard deviation", "excess kurtosis", "steps"]
    return Drawn(figures, {"gradient": Table("Gradient of the pooled channels", header, printed, rows)}, said)


def at_steps(record: Record, name: str) -> list[Result]:
    """What `analyses.<name>` measured at optimiser steps, in their order."""
    paths = sorted(Path(record["folder"]).glob(f"analysis-{name}-step*.json"))
    found = [files.read(path.parent, path.stem.removeprefix("analysis-")) for path in paths]
    return [pair[0] for pair in found if pair]


def gradient_mean(record: Record) -> float | None:
    """|mean| of the gradient as a part of its standard deviation, over all measured steps."""
    found = at_steps(record, "gradient")
    if not found:
        return None
    from depthlab.analysis.gradient import of_moments

    numbers = of_moments(sum(r.arrays["moments"] for r in found))
    return abs(numbers["mean"]) / numbers["std"]


# ---- Fig. 12


def flows(given: Given) -> Drawn:
    """Fig. 12: sigma by layer after the first (solid) and the last iteration (dotted); averages over training."""
    from depthlab.analysis.flow import KINDS

    figure, lines, rows = canvas(11.0, 3.8), [], []
    axes = figure.subplots(1, len(KINDS), sharey=True)
    curves: dict[bool, dict[Any, dict[str, float]]] = {}
    for row in given.rows:
        record = row.finished[0]
        first = next(iter(at_steps(record, "flow")), None) or (
            (found := files.read(Path(record["folder"]), "flow-epoch0000")) and found[0]
        )
        last = measurement(record, "flow")
        for result, style, when in ((first, "-", "first"), (last, ":", "last")):
            if result is None:
                continue
            for axis, kind in zip(axes, KINDS):
                name = f"{given.experiment.name_of(row.cell)}, {when} iteration"
                x, y = result.arrays["layer"][:-1], result.arrays[kind][:-1]
                axis.plot(x, y, style, color=shade(row), label=name)
            for i, layer in enumerate(result.arrays["layer"][:-1]):
                values = {kind: float(result.arrays[kind][i]) for kind in KINDS}
                rows.append(row.cell | {"iteration": when, "layer": int(layer)} | values)
        during = record["analyses"].get("flow_during") or []
        curves[is_plain(row)] = {(r["epoch"], r.get("step")): r for r in during}
    if not rows:
        return Drawn(lines=given.unmeasured("flow"))
    for axis, title in zip(axes, ("mean of ratios (Eq. 13)", "ratio of sums", "fraction of entries")):
        axis.set(xlabel=r"layer $\ell$", title=title, ylim=(-0.02, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(r"$\sigma^{(\ell)}$")
    axes[0].legend(frameon=False, fontsize=7)
    layers = sorted({r["layer"] for r in rows})
    if {True, False} <= curves.keys() and (both := sorted(curves[True].keys() & curves[False].keys(), key=str)):
        for layer in (1, layers[-2], layers[-1]):
            key = f"sigma_{layer}"
            ratios = [curves[False][at][key] / curves[True][at][key] for at in both if curves[True][at].get(key)]
            paper = {p["layer"]: p["ratio"] for p in given.experiment.paper.get("published") or [] if "ratio" in p}
            theirs = f" (paper {paper[layer]})" if layer in paper and given.block.budget == 1 else ""
            if ratios:
                mean = f"{np.mean(ratios):.2f}{theirs}, mean of {len(ratios)} measurements during training"
                lines.append(f"Residual over plain at layer {layer}: {mean}.")
    shown = sorted({1, layers[len(layers) // 2], *layers[-2:]})
    sigma = {(r["arch"], r["iteration"], r["layer"]): r["sigma"] for r in rows}
    table = [
        [given.experiment.label(arch), when, *(f"{sigma[arch, when, layer]:.3f}" for layer in shown)]
        for arch, when in sorted({key[:2] for key in sigma})
    ]
    header = ["network", "iteration", *(f"layer {layer}" for layer in shown)]
    return Drawn({"": figure}, {"flow": Table("sigma", header, table, rows)}, lines + given.unmeasured("flow"))


def flow_18(record: Record) -> float | None:
    """sigma of layer L-2, mean over what was measured during training."""
    return mean_during(record, "sigma_18")


def flow_17(record: Record) -> float | None:
    return mean_during(record, "sigma_17")


def flow_1(record: Record) -> float | None:
    return mean_during(record, "sigma_1")


def flow_below(one: Record, other: Record) -> float | None:
    """Layers 1..L-2 in which the residual network's sigma is not above the plain one's: the most of them at any time
    at which both were measured. Of a pair of one kind none; None where no time is common."""
    plain, residual = sorted((one, other), key=lambda r: "plain" not in r["arch"])
    if ("plain" in plain["arch"]) == ("plain" in residual["arch"]):
        return 0.0
    names = [{path.stem for path in Path(r["folder"]).glob("analysis-flow-*.json")} for r in (plain, residual)]
    pairs = [
        [files.read(Path(r["folder"]), name.removeprefix("analysis-")) for r in (plain, residual)]
        for name in set.intersection(*names)
    ]
    sigma = [[result.arrays["sigma"][:-1] for result, _ in pair] for pair in pairs if None not in pair]
    return max((float((r <= p).sum()) for p, r in sigma), default=None)


def rise_at_start(record: Record) -> float | None:
    """sigma of layer L-2 less that of layer 1, after the first step."""
    first = at_steps(record, "flow")
    return first[0].scalars["sigma_18"] - first[0].scalars["sigma_1"] if first else None


def fall(record: Record) -> float | None:
    """By how much sigma is smaller after training than after its first step, mean of layers 1, L-3 and L-2."""
    ends = next(iter(at_steps(record, "flow")), None), measurement(record, "flow")
    if None in ends:
        return None
    first, last = (np.mean([result.scalars[f"sigma_{layer}"] for layer in (1, 17, 18)]) for result in ends)
    return float(first - last)


def mean_during(record: Record, key: str) -> float | None:
    values = [row[key] for row in record["analyses"].get("flow_during") or [] if row.get(key) is not None]
    return float(np.mean(values)) if values else None


# ---- Figs. 11 and 13: computed


@lru_cache(1)
def run(draws: int) -> Result:
    return case.trivial(draws)


def simulated(draws: int = 100_000) -> Result:
    """Once per process: `lru_cache` would take a default and the same number for two things."""
    return run(draws)


def trivial_case(given: Given, draws: int = 100_000) -> Drawn:
    """Fig. 11: simulation, the paper's approximation as derived and as repeated in its conclusion, and ours."""
    arrays = simulated(draws).arrays
    names = ("residual", "eq11", "conclusion", "gates", "corrected", "cut", "plain")
    rows = [{key: arrays[key][i].item() for key in ("sweep", "value", *names)} for i in range(len(arrays["sweep"]))]
    lines = [[r["sweep"], f"{r['value']:g}", *(f"{r[key]:.4f}" for key in names)] for r in rows]
    header = ["varied", "value", "residual", "paper, Eq. 11", "paper, conclusion", "gates", "corrected", "cut", "plain"]
    off = np.abs(arrays["eq11"] - arrays["residual"])
    said = [
        f"{draws:,} draws: standard errors up to {0.5 / draws**0.5:.4f}. `residual` and `plain` are simulated; "
        "`corrected` is for an open path, to which `cut` (simulated) is added in the figure.",
        f"The paper's approximation is off by {off[nearly()].max():.3f} at most over panels (a) to (d) but n = 2 and "
        f"sigma_A >= 1, by {off.max():.3f} over all.",
    ]
    return Drawn({"": case.figure({"": simulated(draws)})}, {"": Table("E[sigma]", header, lines, rows)}, said)


def nearly() -> np.ndarray:
    """The points of panels (a) to (d) at which the approximation may be expected to hold."""
    arrays = simulated().arrays
    sweep, value = arrays["sweep"], arrays["value"].astype(float)
    there = (sweep != "p") & (sweep != "epsilon")
    return there & ~((sweep == "n") & (value < 5)) & ~((sweep == "sigma_A") & (value >= 1))


def ends(sweep: str) -> float:
    """E[sigma] of residual networks at a sweep's end less that at its beginning."""
    arrays = simulated().arrays
    values = arrays["residual"][arrays["sweep"] == sweep]
    return float(values[-1] - values[0])


def trends() -> float:
    """The least of: rise with l, with p; fall with epsilon, n, sigma_A. Positive if all are as the paper says."""
    return min(ends("layer"), ends("p"), -ends("epsilon"), -ends("n"), -ends("sigma_A"))


def spread_of_sigma_v() -> float:
    arrays = simulated().arrays
    return float(np.ptp(arrays["residual"][arrays["sweep"] == "sigma_V"]))


def off_a_to_d() -> float:
    """The largest distance of the paper's approximation from the simulation in panels (a) to (d)."""
    arrays = simulated().arrays
    there = (arrays["sweep"] != "p") & (arrays["sweep"] != "epsilon")
    return float(np.abs(arrays["eq11"] - arrays["residual"])[there].max())


def off_where_small() -> float:
    arrays = simulated().arrays
    return float(np.abs(arrays["eq11"] - arrays["residual"])[nearly()].max())


def plain_above_at_half() -> float:
    """E[sigma] of plain less that of residual networks at p = .5."""
    arrays = simulated().arrays
    at = (arrays["sweep"] == "p") & (np.abs(arrays["value"].astype(float) - 0.5) < 1e-9)
    return float((arrays["plain"] - arrays["residual"])[at][0])


def gaussian_inequality(given: Given) -> Drawn:
    """Fig. 13: phi(r) and its approximation."""
    r = np.logspace(-2, 2, 401)
    rows = [{"r": x, "phi": case.phi(x), "approximation": float(case.power(x))} for x in map(float, r)]
    shown = [(x, case.phi(x), float(case.power(x))) for x in (0.1, 0.5, 1.0, 2.07, 10.0, 100.0)]
    lines = [[f"{x:g}", f"{exact:.6f}", f"{guess:.6f}", f"{guess - exact:+.4f}"] for x, exact, guess in shown]
    header = ["r", "phi(r) = (2/pi) arctan r", "1 / (1 + r^-1.2)", "difference"]
    fine = np.logspace(0, 2, 20001)
    off = np.abs(case.power(fine) - case.phi(fine))
    said = [f"The approximation is off by {off.max():.4f} at most, at r = {fine[off.argmax()]:.2f} and 1/r."]
    return Drawn({"": case.figure_phi()}, {"": Table("P(|X| > |Y|)", header, lines, rows)}, said)


def phi_at_1() -> float:
    return float(case.phi(1.0))
