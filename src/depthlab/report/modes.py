"""trainer=fast against trainer=exact: the same seeds in both, so that what they share cancels in the difference."""

from statistics import fmean, stdev

from depthlab.report.figures import curves
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.tables import Record

NUMBERS = {"test_error": "test error (%)", "train_loss": "training loss"}


def paired(given: Given) -> Drawn:
    """The curves over each other, and per network the differences fast - exact of the seeds that both have finished:
    mean, standard error sd / sqrt(n), their ratio (Student's t with n - 1 degrees of freedom)."""
    drawn = curves(given)
    by_mode: dict[str, dict[str, dict[int, Record]]] = {}
    for row in given.rows:
        by_mode.setdefault(row.cell["arch"], {})[row.cell["trainer"]] = {r["seed"]: r for r in row.finished}
    lines, rows = [], []
    for arch, modes in by_mode.items():
        exact, fast = modes.get("exact", {}), modes.get("fast", {})
        for key, name in NUMBERS.items():
            both = exact.keys() & fast.keys()
            seeds = sorted(s for s in both if None not in (exact[s].get(key), fast[s].get(key)))
            if not seeds:
                continue
            sides = [[runs[seed][key] for seed in seeds] for runs in (exact, fast)]
            differences = [b - a for a, b in zip(*sides, strict=True)]
            mean, n = fmean(differences), len(seeds)
            error = stdev(differences) / n**0.5 if n > 1 else None
            ratio = mean / error if error is not None and error > 0 else None
            found = [*map(fmean, sides), mean, error, ratio]
            rows.append(dict(zip(("exact", "fast", "difference", "standard_error", "ratio"), found, strict=True)))
            rows[-1] = {"arch": arch, "number": key} | rows[-1] | {"n": n}
            shown = ["-" if value is None else f"{value:.4g}" for value in found]
            lines.append([given.experiment.label(arch), name, *shown, str(n)])
    header = ["network", "number", "exact", "fast", "fast - exact", "its standard error", "ratio", "pairs"]
    if lines:
        drawn.tables["pairs"] = Table("Paired differences", header, lines, rows)
    return drawn
