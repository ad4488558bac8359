"""Tables and curves of Chang et al. 2018, with the paper's panels and axes, so that the two can be held side by side.

parameters       Table 5, counted             accuracies       Figs. 6, 8, 10, 11
time_saved       Table 2, computed            learning_rates   Fig. 9

Figs. 3, 4, 7 and section 3.3 are in `dynamics`. `drop` and `gain` are numbers of one run's record, for claims.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from depthlab.report.figures import COLOURS, canvas
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.tables import Record, Row

PANEL = 4.6, 3.8  # inches


# ---- tables without runs


def parameters(given: Given, arch: list[str], data: list[str]) -> Drawn:
    """Parameters of every network for every data set's number of classes."""
    import torch

    classes = {name: given.compose(f"data={name}")["data"]["classes"] for name in data}
    lines, rows = [], []
    for network in arch:
        config, line = given.compose(f"arch={network}"), []
        for name, k in classes.items():
            with torch.device("meta"):
                count = sum(p.numel() for p in given.build(config, "arch", num_classes=k).parameters())
            cell = {"arch": network, "data": name}
            paper = given.experiment.published(cell).get("parameters")
            difference = "" if count == paper else f" (paper {paper:,})"
            line.append(f"{count:,}{difference}{given.notes.at(cell, 'parameters')}")
            rows.append({**cell, "parameters": count, "paper_parameters": paper})
        n = config["arch"]["blocks"]
        lines.append([given.experiment.label(network), f"{n}-{n}-{n}", *line])
    header = ["network", "blocks", *(given.experiment.label(name) for name in data)]
    differing = sum(row["parameters"] != row["paper_parameters"] for row in rows)
    said = f"Of {len(rows)} numbers {differing} differ from the paper's."
    return Drawn({}, {"": Table("", header, lines, rows)}, [said])


def time_saved(given: Given, growths: list[int], at: list[int], epochs: int, arch: list[str]) -> Drawn:
    """Percent saved by k growths and equal cycles; by growing at the epochs `at`, in block steps and in FLOPs."""
    import torch

    from depthlab.analysis.time_saved import by_block_steps, by_flops, theoretical

    published = given.experiment.published
    lines, rows = [], []
    for k in growths:
        paper = published({"growths": k}).get("saved")
        rows.append({"growths": k, "saved": theoretical(k), "paper_saved": paper})
        lines.append([str(k), f"{paper}", f"{theoretical(k):.2f}"])
    steps = by_block_steps(at, epochs)
    said = [f"Growing at {' and '.join(map(str, at))} of {epochs} epochs saves {steps:.2f} % of the block steps."]
    for name in arch:
        with torch.device("meta"):
            net = given.build(given.compose(f"arch={name}"), "arch", num_classes=10)
        saved = by_flops(net, at, epochs, 32)
        said.append(f"{given.experiment.label(name)}: {saved:.2f} % of the FLOPs.")
    figure = canvas(*PANEL)
    axis = figure.subplots()
    axis.plot(growths, [row["saved"] for row in rows], "o-", color=COLOURS[0], label="computed, equal cycles")
    axis.plot(growths, [row["paper_saved"] for row in rows], "D", ms=9, mfc="none", color=COLOURS[1], label="paper")
    axis.plot(len(at), steps, "s", ms=5, color=COLOURS[2], label=f"grown at {at} of {epochs}")
    axis.set(xlabel="interpolations", ylabel="time saved (%)")
    axis.legend(frameon=False)
    return Drawn(
        {"": figure},
        {"": Table("", ["interpolations", "paper %" + given.notes.at({}, "saved"), "computed %"], lines, rows)},
        [" ".join(said)],
    )


# ---- curves


def accuracies(given: Given, shown: Sequence[str] = ("train", "test"), panel: str = "data") -> Drawn:
    """Accuracy over epochs, a panel per value of one axis: train dashed, test solid; growth dotted.

    Of several seeds the mean and its 95 % confidence interval, below five their range.
    """
    if not given.rows:
        return Drawn()
    groups = by(panel, given.rows)
    figure = canvas(PANEL[0] * len(groups), PANEL[1])
    lines, rows = [], []
    names = list(dict.fromkeys(rest(given, row, panel) for row in given.rows))
    for axis, (value, members) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for row in members:
            name = rest(given, row, panel)
            for kind in shown:
                key = "train_error" if kind == "train" else "val_error"
                found = [[np.nan if e is None else 100 - e for e in r["curves"][key]] for r in row.finished]
                band(axis, found, f"{name} {kind}", COLOURS[names.index(name) % len(COLOURS)], kind == "train")
            points = sorted({point for r in row.finished for point in growth_points(r)})
            for point in points:
                axis.axvline(point, color="0.6", lw=0.8, ls=":", zorder=0)
            for record in row.finished:
                for found in cycles(record):
                    rows.append({**row.cell, "seed": record["seed"], **found})
                    text = (f"{found[key]:.2f}" for key in ("before", "after", "best_before", "best_after"))
                    lines.append([given.experiment.name_of(row.cell), str(record["seed"]), str(found["epoch"]), *text])
        axis.set(title=given.experiment.label(value), xlabel="epoch")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25, lw=0.6)
        axis.legend(fontsize=8, framealpha=0.8, edgecolor="none", loc="lower right")
    figure.axes[0].set_ylabel("accuracy (%)")
    header = [
        "network",
        "seed",
        "grown after epoch",
        "test accuracy",
        "an epoch later",
        "best until then",
        "best of next cycle",
    ]
    return Drawn({"": figure}, {"growth": Table("Test accuracy around growth", header, lines, rows)} if rows else {})


def growth_points(record: Record) -> list[int]:
    """Epochs completed when the network grew."""
    depth = record["curves"].get("depth") or []
    return [e for e in range(1, len(depth)) if depth[e] != depth[e - 1]]


def cycles(record: Record) -> list[dict[str, float]]:
    """At each growth: test accuracy before and an epoch after; the best until then and of the cycle that follows."""
    accuracy, points = [100 - e for e in record["curves"]["val_error"]], growth_points(record)
    ends = [*points, len(accuracy)][1:]
    return [
        {"epoch": p, "before": accuracy[p - 1], "after": accuracy[p], "best_before": max(accuracy[:p]),
         "best_after": max(accuracy[p:end])}
        for p, end in zip(points, ends, strict=True)
    ]  # fmt: skip


def learning_rates(given: Given, x: str = "sched.lr_max", curve: str = "sched.lr_min", panel: str = "data") -> Drawn:
    """Final test accuracy over the highest rate, a curve per lowest rate, a panel per data set."""
    if not given.rows:
        return Drawn()
    groups, lines = by(panel, given.rows), []
    figure = canvas(PANEL[0] * len(groups), PANEL[1])
    for axis, (value, members) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for colour, (low, of) in zip(COLOURS, by(curve, members).items(), strict=False):
            of = sorted(of, key=lambda row: row.cell[x])
            samples = [[100 - e for e in row.values("test_error")] for row in of]
            at, mean = [row.cell[x] for row in of], [fmean(s) for s in samples]
            error = [stdev(s) if len(s) > 1 else 0.0 for s in samples]
            axis.errorbar(at, mean, error, fmt="o-", ms=4, lw=1.2, color=colour, label=rf"$\eta_{{\min}}$ = {low:g}")
        best = min(members, key=lambda row: fmean(row.values("test_error")))
        found = f"{given.experiment.label(value)}: best at {x}={best.cell[x]:g}, {curve}={best.cell[curve]:g}"
        lines.append(f"{found}, error {fmean(best.values('test_error')):.2f} %, of {len(members)} pairs.")
        axis.set(title=given.experiment.label(value), xlabel=r"$\eta_{\max}$", xscale="log")
        axis.set_xticks(
            sorted({row.cell[x] for row in members}),
            labels=[f"{v:g}" for v in sorted({row.cell[x] for row in members})],
        )
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
        axis.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("test accuracy (%)")
    return Drawn({"": figure}, {}, lines)


# ---- numbers of claims


def drop(record: Record) -> float | None:
    """Points of test accuracy lost an epoch after growth, the smallest loss of the run's growths."""
    return min((c["before"] - c["after"] for c in cycles(record)), default=None)


def gain(record: Record) -> float | None:
    """Points by which the best of a cycle exceeds the best before it, the smallest gain of the run's growths."""
    return min((c["best_after"] - c["best_before"] for c in cycles(record)), default=None)


# ---- drawing


def by(axis: str, rows: Iterable[Row]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.cell.get(axis)].append(row)
    return groups


def rest(given: Given, row: Row, panel: str) -> str:
    """The cell's name without the panel's axis."""
    name = given.experiment.name_of({axis: value for axis, value in row.cell.items() if axis != panel})
    return " ".join(name.split())


def band(axis: Any, curves: list[list[float]], label: str, colour: str, dashed: bool) -> None:
    """Mean over runs; of five or more its 95 % confidence interval (Student's t), of fewer their range.

    x = epochs completed; those that a run did not measure are left out.
    """
    from scipy.stats import t

    n, at = len(curves), np.array([*zip(*curves, strict=False)], dtype=float)  # (epochs, runs)
    (there,) = np.nonzero(~np.isnan(at).any(1))
    x, at = there + 1, at[there]
    mean = at.mean(1)
    said = f" (n = {n}, {'95 %' if n >= 5 else 'range'})" if n > 1 else ""
    axis.plot(x, mean, color=colour, lw=1.2, ls="--" if dashed else "-", label=label + said)
    if n > 1:
        half = t.isf(0.025, n - 1) * at.std(1, ddof=1) / n**0.5
        low, high = (mean - half, mean + half) if n >= 5 else (at.min(1), at.max(1))
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
