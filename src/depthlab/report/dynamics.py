"""Residual networks as dynamical systems: the figures of Chang et al. 2018 on norms and lesions, with the paper's axes.

gamma_by_depth   Fig. 3 (and the same in logarithms)        F_by_time   Fig. 7
norms_by_block   Fig. 4                                     lesions     section 3.3, which has no figure

The rest are numbers of one run's record, for claims.
"""

from collections import defaultdict
from functools import partial
from itertools import combinations

from depthlab.report.chang2018 import PANEL, rest
from depthlab.report.figures import COLOURS, canvas
from depthlab.report.given import Drawn, Given, Table, measurement, scalar
from depthlab.report.tables import Record


def gamma_by_depth(given: Given) -> Drawn:
    """Mean ||G(Y_j)|| over blocks against their number; in logarithms a straight line of slope -1 if like 1/d."""
    import numpy as np

    found = sorted(given.measured("norms"), key=lambda one: one[2].scalars["blocks"])
    if not found:
        return Drawn(lines=given.unmeasured("norms"))
    keys = ("blocks", "gamma", "gamma_rms")
    rows = [{**row.cell, "seed": r["seed"], **{key: result.scalars[key] for key in keys}} for row, r, result in found]
    lines = [[given.experiment.name_of(row.cell), str(r["seed"]), f"{s['blocks']}", f"{s['gamma']:.3f}",
              f"{s['blocks'] * s['gamma']:.2f}", f"{s['gamma_rms']:.4f}"]
             for (row, r, _), s in zip(found, rows, strict=True)]  # fmt: skip
    d, gamma = (np.array([row[key] for row in rows], dtype=float) for key in keys[:2])
    figure = canvas(2 * PANEL[0], PANEL[1])
    plain, log = figure.subplots(1, 2)
    said = given.unmeasured("norms")
    for axis in (plain, log):
        axis.plot(d, gamma, "o-", color=COLOURS[0], lw=1, ms=5, label=r"$\gamma$")
        axis.set(xlabel="number of residual blocks d", ylabel=r"$\gamma$ = mean $||G(Y_j)||$")
        axis.grid(alpha=0.25, lw=0.6, which="both")
    plain.set(ylim=(0, None), xlim=(0, None))
    log.set(xscale="log", yscale="log")
    log.set_xticks(ticks := sorted(set(d)), labels=[f"{tick:g}" for tick in ticks])
    log.minorticks_off()
    if len(set(d)) > 1:
        slope, level = np.polyfit(np.log(d), np.log(gamma), 1)
        one = np.exp(np.mean(np.log(gamma * d)))
        x = np.linspace(d.min(), d.max(), 100)
        for axis in (plain, log):
            axis.plot(x, one / x, color="0.5", ls=":", lw=1, label="like 1/d")
        log.plot(x, np.exp(level) * x**slope, color=COLOURS[1], ls="--", lw=1, label=f"slope {slope:.2f}")
        said = [f"Slope of log gamma against log d: {slope:.2f} (1/d would be -1).", *said]
        log.legend(frameon=False)
    header = ["network", "seed", "d", "gamma", "gamma d", "gamma per element"]
    return Drawn({"": figure}, {"norms": Table("Norms of residual branches", header, lines, rows)}, said)


def norms_by_block(given: Given) -> Drawn:
    """||Y_j|| and ||G(Y_j)|| of every block, a panel per network and data set."""
    from depthlab.analysis.drawing import stage_lines

    found = given.measured("norms")
    if not found:
        return Drawn(lines=given.unmeasured("norms"))
    figure = canvas(PANEL[0] * len(found), PANEL[1])
    lines, rows = [], []
    for axis, (row, record, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        name, of = given.experiment.name_of(row.cell), result.arrays
        axis.plot(of["input"], "o-", ms=3, lw=1, color=COLOURS[0], label="input $||Y_j||$")
        axis.plot(of["residual"], "s-", ms=3, lw=1, color=COLOURS[1], label="output $||G(Y_j)||$")
        stage_lines(axis, of["first"])
        axis.set(title=name, xlabel="residual block", ylim=(0, None))
        axis.legend(frameon=False)
        s = result.scalars
        lines.append([name, str(record["seed"]), str(s["blocks"]), f"{s['relative_first_median']:.3f}",
                      "" if s["relative_later_median"] is None else f"{s['relative_later_median']:.3f}"])  # fmt: skip
        for j, (y, g, first) in enumerate(zip(of["input"], of["residual"], of["first"], strict=True)):
            rows.append({**row.cell, "seed": record["seed"], "block": j, "input": y, "residual": g, "first": first})
    figure.axes[0].set_ylabel("$L^2$-norm, mean over images")
    header = ["network", "seed", "blocks", "median ||G||/||Y||, first of stages", "of the others"]
    return Drawn({"": figure}, {"norms": Table("Norms by block", header, lines, rows)}, given.unmeasured("norms"))


def F_by_time(given: Given, panel: str = "data") -> Drawn:
    """||F(Y_j)|| = ||G(Y_j)|| / h against time: networks of h = 1, .5, .25 are one equation if their curves are one."""
    found = given.measured("norms")
    if not found:
        return Drawn(lines=given.unmeasured("norms"))
    from depthlab.analysis.norms import difference

    groups = defaultdict(list)
    for one in found:
        groups[one[0].cell.get(panel)].append(one)
    figure = canvas(PANEL[0] * len(groups), PANEL[1])
    lines, rows = [], []
    for axis, (value, members) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        named = {}
        for row, record, result in members:
            seed = f", seed {record['seed']}" if len(row.finished) > 1 else ""
            named[f"{rest(given, row, panel)}, h = {result.scalars['step_size']:g}{seed}"] = result
        for (name, result), colour in zip(named.items(), COLOURS * len(named)):
            axis.plot(result.arrays["time"], result.arrays["F"], "o-", ms=3, lw=1, color=colour, label=name)
        for a, b in combinations(named, 2):
            far = difference(named[a], named[b])
            lines.append([given.experiment.label(value), a, b, f"{far:.3f}"])
            rows.append({panel: value, "one": a, "other": b, "difference": far})
        axis.set(title=given.experiment.label(value), xlabel="time t", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("$||F(Y_j)||$")
    header = [given.experiment.label(panel), "network", "and", "relative difference"]
    return Drawn(
        {"": figure},
        {"F": Table("How far the curves lie apart", header, lines, rows)} if rows else {},
        given.unmeasured("norms"),
    )


LESION = {
    "error": "error %", "rise_first_mean": "rise, first of stages", "rise_later_median": "others, median",
    "rise_later_max": "others, largest", "spearman": "Spearman with ||G||/||Y||", "spearman_later": "of the others",
    "spearman_shuffled_tau": "shuffled: with tau",
}  # fmt: skip


def lesions(given: Given) -> Drawn:
    """Error without each block, without m, with blocks exchanged: a row per network and data set."""
    from depthlab.analysis.lesion import figure

    found = given.measured("lesion")
    missing = given.unmeasured("lesion")
    if not found:
        return Drawn(lines=missing)
    named = [(f"{given.experiment.name_of(row.cell)}, seed {r['seed']}", row, r, result) for row, r, result in found]
    lines = [[name, *("" if result.scalars[key] is None else f"{result.scalars[key]:.2f}" for key in LESION)]
             for name, _, _, result in named]  # fmt: skip
    rows = [{**row.cell, "seed": r["seed"], **result.scalars} for _, row, r, result in named]
    table = Table("Lesions, errors in points", ["network", *LESION.values()], lines, rows)
    return Drawn({"": figure({name: result for name, _, _, result in named})}, {"lesion": table}, missing)


# ---- numbers of claims


gamma, blocks, relative_later = (
    partial(scalar, analysis="norms", key=key) for key in ("gamma", "blocks", "relative_later_median")
)
rise_first, rise_later = (
    partial(scalar, analysis="lesion", key=key) for key in ("rise_first_mean", "rise_later_median")
)


def F_apart(one: Record, other: Record) -> float | None:
    """How far the curves ||F||(t) of two runs lie apart, see `norms.difference`."""
    found = [measurement(record, "norms") for record in (one, other)]
    if None in found:
        return None
    from depthlab.analysis.norms import difference

    return difference(*found)
