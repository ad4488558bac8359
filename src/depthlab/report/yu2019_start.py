"""What Yu & Tomasi 2019 say of networks that have hardly been trained yet, computed (Tables 4 and 5, section 4.1).

Penalty      lambda/(2 B) ||w||^2 over the kernels, lambda = 1e-4, B = 128: Table 4, first three rows; mean of seeds and
             expectation. S of HMWI is fan_out; the text's fan_in misses the paper's numbers by 7 to 8 deviations.
L            mean cross-entropy, Table 4, where CIFAR-10 is at hand: of 1000 training images (theirs: all)
Parting      max |T^-1(p) - r| after 20 steps of equivalent training at depth 20, on noise
Parameters   of T' networks beside full ones (Table 5 has the errors, the text "decreases dramatically")
"""

from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F

from depthlab.architectures import SimpleNet
from depthlab.decay import parameter_groups, penalty
from depthlab.equivalence import centre_decay, id_entries, plain, residual
from depthlab.records import training_flops
from depthlab.report.given import Drawn, Given, Table
from depthlab.report.yu2019 import ten

DEPTHS = (20, 32, 44)
DECAY = 1e-4 / 128


def initial(given: Given, seeds: int = 8, images: int = 1000, train: bool = True) -> Drawn:
    """Args:
    seeds: how many networks of each kind are drawn.
    images: of the training set, for L; always the same ones.
    train: whether to train pairs for 20 steps, too.
    """
    batches = chosen(given, images)
    lines, rows = [], []
    for arch, fan in (("simple_plain", "out"), ("simple_residual", "out"), ("simple_residual", "in")):
        for depth in DEPTHS:
            config = given.compose(f"arch={arch}", f"arch.depth={depth}", f"arch.fan={fan}")
            nets = [drawn(given, config, seed) for seed in range(seeds)]
            found = [penalty(net, DECAY) for net in nets]
            losses = [loss(net, batches) for net in nets] if batches and fan == "out" else []
            paper = given.experiment.published({"arch": arch, "depth": depth})
            row = {
                "arch": arch, "depth": depth, "fan": fan if arch == "simple_residual" else None,
                "paper_penalty": paper["penalty"], "penalty_mean": fmean(found), "penalty_std": stdev(found),
                "penalty_expected": expected(nets[0], config["arch"]), "seeds": seeds,
                "paper_train_loss": paper["train_loss"],
                "train_loss_mean": fmean(losses) if losses else None,
                "train_loss_std": stdev(losses) if losses else None,
            }  # fmt: skip
            rows.append({key: ten(value) if isinstance(value, float) else value for key, value in row.items()})
            name = given.experiment.label(arch) + (f", S = fan_{fan}" if row["fan"] else "")
            name += given.notes.at({"arch": arch, "fan": fan}, "penalty")
            spread = [f"{row['train_loss_mean']:.4f} ± {row['train_loss_std']:.4f}" if losses else ""]
            lines.append([
                name, str(depth), f"{paper['penalty']:.4g}", f"{fmean(found):.4g} ± {stdev(found):.1g}",
                f"{row['penalty_expected']:.4g}", f"{paper['train_loss']:.3f}", *spread,
            ])  # fmt: skip
    header = ["network", "depth", "paper: penalty", f"ours, {seeds} seeds", "expected", "paper: L", "ours: L"]
    said = [f"L on {images} training images, standardised, not augmented."] if batches else []
    tables = {"": Table("Before training", header, lines, rows), "parameters": parameters(given)}
    if train:
        tables["parting"] = partings()
    return Drawn(tables=tables, lines=said, lacking="" if batches else "No CIFAR-10 in data_dir: L not computed.")


def drawn(given: Given, config: dict[str, Any], seed: int) -> torch.nn.Module:
    """The network that a run of this configuration and seed starts from, but for what its data draw first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return given.build(config, "arch", num_classes=10).eval()


def expected(net: torch.nn.Module, arch: dict[str, Any]) -> float:
    """The expectation of the penalty: kernels' elements x variance; the fully connected layer's is 1 / (3 fan_in)."""
    total = net.classifier.weight.numel() / (3 * net.classifier.in_features)
    for layer in net.layers():
        d, c, u, v = layer.conv.weight.shape
        s = u * v * (d if arch["fan"] == "out" else c)
        total += layer.conv.weight.numel() * (2 / (u * v * c) if arch["init"] == "kwi" else 1 / s**2)
    return DECAY / 2 * total


def chosen(given: Given, images: int) -> Any:
    """Batches of training images, None where the data set is not at hand (nothing is downloaded for this)."""
    from depthlab import ImageData
    from depthlab.analysis import choose

    config = given.compose()["data"]
    if not (Path(config["dir"]) / config["name"]).is_dir():
        return None
    return choose(ImageData(**{k: v for k, v in config.items() if v is not None}), "train", images)


def loss(net: torch.nn.Module, batches: Any) -> float:
    with torch.no_grad():
        return torch.cat([F.cross_entropy(net(x), y, reduction="none") for x, y in batches]).double().mean().item()


def parameters(given: Given) -> Table:
    """Of every network of Tables 1, 2 and 5: parameters, kernels' elements, ID entries, multiply-adds per image."""
    lines, rows = [], []
    for arch in ("simple_plain", "dominant"):
        for depth in (*DEPTHS, *(["20_dense_lower"] if arch == "dominant" else [])):
            config = given.compose(f"arch={arch}{depth}")
            with torch.device("meta"):
                net = given.build(config, "arch", num_classes=10)
            kernels = sum(p.numel() for p in net.parameters() if p.ndim == 4)
            ids = sum(id_entries(block.conv.weight).numel() for block in net.blocks()) if arch != "dominant" else None
            row = {"arch": f"{arch}{depth}", "parameters": sum(p.numel() for p in net.parameters()), "kernels": kernels}
            row |= {"id_entries": ids, "mmac": training_flops(net, 32) / 6 / 1e6}
            rows.append(row)
            name = given.experiment.label(row["arch"])
            counts = (row["parameters"], kernels, ids)
            lines.append([name, *("" if n is None else f"{n:,}" for n in counts), f"{row['mmac']:.2f}"])
    header = ["network", "parameters", "of them in kernels", "ID entries", "MMAC/image"]
    return Table("Parameters", header, lines, rows)


# ---- equivalent training


@cache
def parting(dtype: torch.dtype = torch.float64, centred: bool = True, steps: int = 20) -> float:
    """max |T^-1(p) - r| after training r and p = T(r) on the same batches (16 images of noise), SGD with momentum .9.

    Args:
        centred: penalty ||T^-1(p)||^2 on the plain network; else ||p||^2.
    """
    random = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(16, 3, 32, 32, generator=random), torch.randint(10, (16,), generator=random)) for _ in range(steps)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        r = SimpleNet(10, 20, residual=True, init="hmwi").to(dtype)
    p = plain(r)
    for net in (r, p):
        optimizer = torch.optim.SGD(parameter_groups(net, DECAY), lr=0.01, momentum=0.9)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x.to(dtype)), y).backward()
            if net is p and centred:
                centre_decay(net, DECAY)
            optimizer.step()
    return max((a - b).abs().max().item() for a, b in zip(residual(p).parameters(), r.parameters()))


def partings() -> Table:
    cases = {
        "double precision": parting(),
        "single precision": parting(torch.float32),
        "double precision, penalty on p": parting(centred=False),
    }
    header = ["20 steps of equivalent training, depth 20", "max |T^-1(p) - r|"]
    lines = [[name, f"{value:.1e}"] for name, value in cases.items()]
    return Table("Equivalent training", header, lines, [{"case": name, "largest": v} for name, v in cases.items()])
