"""Weights and cushions of Yu & Tomasi 2019 from finished runs: Tables 3 and 4, Figs. 3 and 7, section 5.

Drawn like theirs, plain networks blue, residual ones red. For what a figure is given, see `given`; functions of a
record alone are numbers for claims. Gradients are in yu2019_flow.py.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from depthlab.analysis import Result, files
from depthlab.report.figures import canvas
from depthlab.report.given import Drawn, Given, Table, measurement, scalar
from depthlab.report.tables import Record, Row
from depthlab.report.yu2019 import PLAIN, RESIDUAL, depth, four, ten

STATISTICS = {
    "mean": "mean", "std": "standard deviation", "mass": "mass of all", "mass_large": "mass of weights >= .25",
    "mass_id": "mass of ID entries", "id_share": "ID entries' share of weights >= .25", "above_07": "entries above .7",
    "id_mode": "mode of the ID entries",
}  # fmt: skip
UNTRAINED: dict[tuple[str, str, int], Result] = {}


def is_plain(row: Row) -> bool:
    return str(row.cell["arch"]).removeprefix("simple_").startswith("plain")


def shade(row: Row) -> str:
    return PLAIN if is_plain(row) else RESIDUAL


def by_depth(rows: Iterable[Row]) -> dict[int, dict[bool, Row]]:
    """depth -> {is_plain: row}"""
    out: dict[int, dict[bool, Row]] = {}
    for row in rows:
        out.setdefault(depth(row), {})[is_plain(row)] = row
    return dict(sorted(out.items()))


# ---- Tables 3 and 4, Fig. 7


def before_and_after(given: Given, row: Row) -> tuple[Result, Result | None, int | None]:
    """`weights` of the cell's first run before training and after it, and its epochs; without a run, before only.

    Before: as measured in the run, else of a network drawn as the run's was.
    """
    record = next(iter(row.finished), None)
    found = record and files.read(Path(record["folder"]), "weights-epoch0000")
    seed = record["seed"] if record else row.wanted[0]
    before = found[0] if found else untrained(given, row.cell["arch"], seed)
    return before, record and measurement(record, "weights"), record and record["epochs"]


def untrained(given: Given, arch: str, seed: int) -> Result:
    """`weights` of a network that nobody has trained; once for all tables of an experiment."""
    key = given.experiment.id, arch, seed
    if key not in UNTRAINED:
        from depthlab.analysis.weights import weights
        from depthlab.report.yu2019_start import drawn

        UNTRAINED[key] = weights(drawn(given, given.compose(f"arch={arch}"), seed))
    return UNTRAINED[key]


def masses(given: Given) -> Drawn:
    """Table 3: weights p of the plain and t = T(r) of the residual network, before and after training."""
    columns = []
    for row in given.block.rows:
        letter, last = "p" if is_plain(row) else "t", given.compose(f"arch={row.cell['arch']}")["sched"]["epochs"]
        paper = given.experiment.published(row.cell)
        before, after, epochs = before_and_after(given, row)
        for found, when, theirs, ours in ((before, "before", 0, 0), (after, "after", last, epochs)):
            if found or epochs is None:  # the paper's column alone, as long as there is no run
                columns.append(
                    (f"{letter}{theirs}", f"{letter}{theirs if ours is None else ours}", paper.get(when) or {}, found)
                )
    header = ["statistic", *(text for name, mine, *_ in columns for text in (f"paper: {name}", f"ours: {mine}"))]
    lines, rows = [], []
    for key, text in STATISTICS.items():
        pairs = [(theirs.get(key), found and ten(found.scalars[key])) for *_, theirs, found in columns]
        lines.append([text, *("" if v is None else f"{v:.4g}" for pair in pairs for v in pair)])
        rows.append({"statistic": key} | dict(zip(header[1:], (v for pair in pairs for v in pair), strict=True)))
    return Drawn({}, {"weights": Table("Weights", header, lines, rows)}, given.unmeasured("weights"))


def distributions(given: Given) -> Drawn:
    """Fig. 7: all weights (top, counts cut at 800) and ID entries of t (bottom), before and after training."""
    found = [(row, *before_and_after(given, row)) for row in given.block.rows]
    columns = [("before training", 1)] + ([("after training", 2)] if any(after for _, _, after, _ in found) else [])
    figure = canvas(5.0 * len(columns), 6.0)
    axes = figure.subplots(2, len(columns), sharex=True, squeeze=False)
    for (title, at), (top, bottom) in zip(columns, axes.T):
        for entry in found:
            row, result = entry[0], entry[at]
            if result is None:
                continue
            style = {"fill": True, "alpha": 0.6, "color": shade(row), "label": given.experiment.name_of(row.cell)}
            top.stairs(result.arrays["counts"], result.arrays["edges"], **style)
            if not is_plain(row):
                bottom.stairs(result.arrays["id_counts"], result.arrays["edges"], **style)
        top.set(ylim=(0, 800), title=title)
        bottom.set(xlabel="z", xlim=(-1.2, 1.6))
    axes[0, 0].set_ylabel("weights")
    axes[1, 0].set_ylabel("ID entries")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return Drawn({"": figure}, lines=given.unmeasured("weights"))


def regularisation(given: Given) -> Drawn:
    """Table 4: L and weight penalty, before training (penalty only, no run needed) and after, and the ratio of both."""
    lines, rows = [], []
    for row in given.block.rows:
        before = ten(untrained(given, row.cell["arch"], row.wanted[0]).scalars["penalty"])
        record = next(iter(row.finished), {})
        paper = given.experiment.published(row.cell)
        mine = {"penalty_before": before, "train_loss": record.get("train_loss"), "penalty": record.get("penalty")}
        mine["ratio"] = loss_over_penalty(record) if record else None
        theirs = {key: paper.get(key) for key in mine}
        rows.append(row.cell | {f"paper_{key}": value for key, value in theirs.items()} | mine)
        name = given.experiment.name_of(row.cell) + given.notes.at(row.cell, "penalty")
        lines.append([name, *(four(v) for key in mine for v in (theirs[key], mine[key]))])
    what = ("penalty before", "L after", "penalty after", "L / penalty after")
    header = ["network", *(f"{who}: {text}" for text in what for who in ("paper", "ours"))]
    return Drawn({}, {"penalty": Table("Loss and weight regularisation", header, lines, rows)})


def loss_over_penalty(record: Record) -> float | None:
    return record["train_loss"] / record["penalty"] if record.get("penalty") and record.get("train_loss") else None


def id_share(record: Record) -> float | None:
    """The ID entries' share of the mass of weights of magnitude >= .25, of t or p."""
    return scalar(record, "weights", "id_share")


def spread(record: Record) -> float | None:
    """Standard deviation of the weights."""
    return scalar(record, "weights", "std")


def id_mode(record: Record) -> float | None:
    """Mode of the ID entries."""
    return scalar(record, "weights", "id_mode")


# ---- Fig. 3


def layer_cushions(given: Given) -> Drawn:
    """Fig. 3, and the same over the full norm; medians of every layer."""
    measured = {(depth(row), is_plain(row)): (row, result) for row, _, result in given.measured("cushion")}
    depths = sorted({d for d, _ in measured})
    if not measured:
        return Drawn(lines=given.unmeasured("cushion"))
    from depthlab.analysis.cushion import per_sample

    figures, rows, lines, said = {}, [], [], []
    for denominator, name in (("own", ""), ("full", "full_norm")):
        figure = figures[name] = canvas(5.0 * len(depths), 3.8)
        for axis, d in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths):
            pair = [measured[key] for key in measured if key[0] == d]
            values = [per_sample(result, 10, denominator) for _, result in pair]
            bins = np.histogram_bin_edges(np.concatenate(values), 120)
            for (row, _), mu in zip(pair, values, strict=True):
                axis.hist(mu, bins, color=shade(row), alpha=0.6, label=given.experiment.name_of(row.cell))
            axis.set(xlabel=r"$\mu_{10}(x)$", ylabel="images", title=f"depth {d}")
            axis.legend(frameon=False, fontsize=8)
    for (d, plain), (_, result) in measured.items():
        for layer in range(1, len(result.arrays["gain"]) + 1):
            medians = {key: float(np.median(per_sample(result, layer, key))) for key in ("own", "full")}
            least = {f"{key}_min": float(per_sample(result, layer, key).min()) for key in ("own", "full")}
            rows.append({"depth": d, "network": "plain" if plain else "residual", "layer": layer} | medians | least)
    for d in depths:
        if not {(d, True), (d, False)} <= measured.keys():
            continue
        pair = {kind: [r for r in rows if r["depth"] == d and r["network"] == kind] for kind in ("plain", "residual")}
        for key, text in (("own", "without the identity (the paper's)"), ("full", "with it")):
            below = [p["layer"] for p, r in zip(pair["plain"], pair["residual"]) if r[key] <= p[key]]
            which = ", ".join(map(str, below)) or "none"
            said.append(f"Depth {d}, norm {text}: residual below plain in {len(below)} layers (median): {which}.")
            lines.append([str(d), text, *(f"{pair[k][9][key]:.3g}" for k in pair), str(len(below))])
    header = ["depth", "norm of A below", "plain, layer 10", "residual, layer 10", "layers with residual below plain"]
    said += given.unmeasured("cushion")
    return Drawn(figures, {"layers": Table("Median layer cushion", header, lines, rows)}, said)


def cushion_10(record: Record) -> float | None:
    """Mean of layer 10's cushions over the paper's norm."""
    return scalar(record, "cushion", "own_mean")


def cushion_10_full(record: Record) -> float | None:
    """The same over the norm of what acts, identity included."""
    return scalar(record, "cushion", "full_mean")


def layers_below(one: Record, other: Record) -> float | None:
    """Layers in which the residual network's median cushion, over the paper's norm, is not above the plain one's; of a
    pair of one kind none."""
    pair = {result.scalars["residual"]: result for r in (one, other) if (result := measurement(r, "cushion"))}
    if None in (measurement(one, "cushion"), measurement(other, "cushion")):
        return None
    if len(pair) < 2:
        return 0.0
    from depthlab.analysis.cushion import per_sample

    layers = range(1, len(pair[1].arrays["gain"]) + 1)
    medians = [[np.median(per_sample(pair[kind], layer, "own")) for kind in (1, 0)] for layer in layers]
    return float(sum(residual <= plain for residual, plain in medians))


# ---- interlayer cushion


def interlayer_cushions(given: Given) -> Drawn:
    """Mean and standard deviation by both statistics of BatchNorm, beside the paper's."""
    from depthlab.analysis.interlayer import figure

    measured, lines, rows = given.measured("interlayer"), [], []
    for row, record, result in measured:
        paper = given.experiment.published(row.cell)
        theirs = f"{paper['mean']:.2g} ± {paper['std']:.2g}" if "mean" in paper else ""
        ours = {mode: (float(np.nanmean(v)), float(np.nanstd(v))) for mode, v in result.arrays.items()}
        lines.append([
            given.experiment.name_of(row.cell), theirs,
            *(f"{ours[mode][0]:.3g} ± {ours[mode][1]:.2g}" if mode in ours else "" for mode in ("batch", "running")),
            str(result.scalars["images"]),
        ])  # fmt: skip
        numbers = {f"{mode}_{key}": v for mode, pair in ours.items() for key, v in zip(("mean", "std"), pair)}
        rows.append(row.cell | {"seed": record["seed"], "paper_mean": paper.get("mean")} | numbers)
    if not measured:
        return Drawn(lines=given.unmeasured("interlayer"))
    header = ["network", "paper", "ours: statistics of the image", "ours: running statistics", "images"]
    shown = figure({given.experiment.name_of(row.cell): result for row, _, result in measured})
    return Drawn(
        {"": shown}, {"cushions": Table("Interlayer cushion, block 5 of 9", header, lines, rows)},
        given.unmeasured("interlayer"),
    )  # fmt: skip


def interlayer_batch(record: Record) -> float | None:
    return scalar(record, "interlayer", "batch_mean")


def interlayer_running(record: Record) -> float | None:
    return scalar(record, "interlayer", "running_mean")
