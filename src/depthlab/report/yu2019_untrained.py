"""Measurements of Yu & Tomasi 2019 on networks before training: nothing is trained, all is computed.

Weights of p0 and t0 (Table 3), sigma(l) (the solid lines of Fig. 12), layer cushions over both norms (the question that
Fig. 3 raises), interlayer cushions by both statistics of BatchNorm (section 5). Of networks drawn with several seeds:
mean and sample standard deviation; images of the training set, standardised, not augmented.
"""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from depthlab.analysis import Result
from depthlab.analysis.cushion import cushion
from depthlab.analysis.flow import flow
from depthlab.analysis.interlayer import interlayer
from depthlab.analysis.weights import weights
from depthlab.report.figures import canvas
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.yu2019 import PLAIN, RESIDUAL
from depthlab.report.yu2019_measures import STATISTICS
from depthlab.report.yu2019_start import chosen, drawn

SIMPLE, FULL = ("simple_plain20", "simple_residual20"), ("plain20", "resnet20")
RECIPE = ["arch.init=kaiming_normal", "arch.bn_eps=1e-5", "arch.bn_momentum=0.1"]  # of yu2019/interlayer


def untrained(given: Given, seeds: int = 3, images: int = 64) -> Drawn:
    """Args:
    seeds: how many networks of each kind are drawn.
    images: of the training set, always the same ones.
    """
    batches = chosen(given, images)
    out = Drawn({}, {"weights": masses(given, seeds)})
    if batches is None:
        out.lacking = "No CIFAR-10 in data_dir: sigma and cushions not computed."
        return out
    flows = {arch: each(given, arch, seeds, lambda net: flow(net, batches)) for arch in (*SIMPLE, *FULL)}
    out.figures[""], out.tables["flow"] = figure(given, flows), layers(given, flows)
    out.tables["cushion"] = layer_cushions(given, seeds, batches)
    out.tables["interlayer"] = interlayer_cushions(given, seeds, batches)
    out.lines.append(f"{seeds} networks of each kind, {images} training images, standardised, not augmented.")
    return out


def each(given: Given, arch: str, seeds: int, measure: Callable[[Any], Result]) -> list[Result]:
    """What `measure` finds of `seeds` networks."""
    config = given.compose(f"arch={arch}", *(RECIPE if arch in FULL else []))
    return [measure(drawn(given, config, seed)) for seed in range(seeds)]


def spread(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def masses(given: Given, seeds: int) -> Table:
    """Table 3's columns p0 and t0."""
    found = {arch: each(given, arch, seeds, weights) for arch in ("simple_plain32", "simple_residual32")}
    lines, rows = [], []
    for key, text in STATISTICS.items():
        line = [text]
        for arch, results in found.items():
            paper = given.experiment.published({"arch": arch}).get(key)
            mean, std = spread([float(r.scalars[key]) for r in results])
            line += ["" if paper is None else f"{paper:.4g}", f"{mean:.4g} ± {std:.1g}"]
            rows.append({"arch": arch, "statistic": key, "paper": paper, "mean": mean, "std": std, "seeds": seeds})
        lines.append(line)
    names = ["PlnNet p0", "ResNet t0"]
    header = ["Table 3, depth 32", *(f"{who}: {name}" for name in names for who in ("paper", "ours"))]
    return Table("Weights", header, lines, rows)


def layers(given: Given, flows: dict[str, list[Result]]) -> Table:
    """sigma of every layer; few of them are printed."""
    lines, rows = [], []
    for arch, results in flows.items():
        kinds = {kind: np.stack([r.arrays[kind] for r in results]) for kind in ("sigma", "sigma_sums", "sigma_entries")}
        for i, layer in enumerate(results[0].arrays["layer"]):
            numbers = {f"{kind}_{what}": float(f(v[:, i])) for kind, v in kinds.items()
                       for what, f in (("mean", np.mean), ("std", lambda x: np.std(x, ddof=1)))}  # fmt: skip
            rows.append({"arch": arch, "layer": int(layer), "seeds": len(results)} | numbers)
        for kind, text in (("sigma", "mean of ratios"), ("sigma_sums", "ratio of sums"), ("sigma_entries", "entries")):
            values = kinds[kind][:, [0, 6, 10, 12, 14, 16, 17]]
            pairs = zip(values.mean(0), values.std(0, ddof=1), strict=True)
            lines.append([given.experiment.label(arch), text, *(f"{m:.3f} ± {s:.3f}" for m, s in pairs)])
    header = ["network", "sigma by", *(f"layer {k}" for k in (1, 7, 11, 13, 15, 17, 18))]
    return Table("Dominant gradient flow", header, lines, rows)


def layer_cushions(given: Given, seeds: int, batches: Any) -> Table:
    """Layer 10, mean over images, over the paper's norm and over that of what acts."""
    lines, rows = [], []
    for arch in ("simple_plain20", "simple_residual20", "simple_plain32", "simple_residual32"):
        found = each(given, arch, seeds, lambda net: cushion(net, batches))
        pairs = {key: spread([float(r.scalars[f"{key}_mean"]) for r in found]) for key in ("own", "full")}
        rows.append({"arch": arch, "seeds": seeds} | {
            f"{key}_{what}": v for key, pair in pairs.items() for what, v in zip(("mean", "std"), pair, strict=True)
        })  # fmt: skip
        lines.append([given.experiment.label(arch), *(f"{m:.3f} ± {s:.3f}" for m, s in pairs.values())])
    header = ["network", "over the paper's norm", "over the norm of what acts"]
    return Table("Layer cushion, layer 10", header, lines, rows)


def interlayer_cushions(given: Given, seeds: int, batches: Any) -> Table:
    """Block 5 of 9, mean and deviation over images and networks."""
    lines, rows = [], []
    for arch in FULL:
        found = each(given, arch, seeds, lambda net: interlayer(net, batches, probes=16))
        paper = given.experiment.published({"arch": arch})
        line = [given.experiment.label(arch), f"{paper['mean']:.2g} ± {paper['std']:.2g}"]
        row = {"arch": arch, "seeds": seeds, "paper_mean": paper["mean"]}
        for mode in ("batch", "running"):
            mu = np.concatenate([r.arrays[mode] for r in found])
            row |= {f"{mode}_mean": float(mu.mean()), f"{mode}_std": float(mu.std())}
            line.append(f"{mu.mean():.3g} ± {mu.std():.2g}")
        lines.append(line)
        rows.append(row)
    header = ["network", "paper, after training", "ours: statistics of the image", "ours: running statistics"]
    return Table("Interlayer cushion, block 5 of 9", header, lines, rows)


def figure(given: Given, flows: dict[str, list[Result]]) -> Any:
    """Fig. 12's solid lines: simplified networks left, fully-fledged ones right; bands of a standard deviation."""
    drawing = canvas(10, 3.8)
    axes = drawing.subplots(1, 2, sharey=True)
    for axis, pair, title in zip(axes, (SIMPLE, FULL), ("simplified", "fully-fledged")):
        for arch, colour in zip(pair, (PLAIN, RESIDUAL)):
            x = flows[arch][0].arrays["layer"][:-1]
            y = np.stack([r.arrays["sigma"][:-1] for r in flows[arch]])
            axis.plot(x, y.mean(0), "o-", ms=3, color=colour, label=given.experiment.label(arch))
            axis.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=colour, alpha=0.2, lw=0)
        axis.set(xlabel=r"layer $\ell$", title=f"{title}, depth 20, before training", ylim=(-0.02, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
    axes[0].set_ylabel(r"$\sigma^{(\ell)}$")
    return drawing
