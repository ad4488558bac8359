"""A finished plain (residual) network as its residual (plain) equivalent (Yu & Tomasi 2019, section 3).

Writes `<run>/transformed/{config.json, last.ckpt}`, a folder that src/analyze.py takes like any run's, and compares the
two image by image. Its weights are in double precision, in which adding 1 to single-precision weights loses nothing:
there the two must agree to the last image (`changed` = 0). Rounded to the run's own precision (`*_rounded`) a class may
change where two logits tie.
Costs four passes over the images, two of them in double precision.
"""

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthlab.analysis import Images, Result, evaluating, like
from depthlab.equivalence import identity_kernels, twin
from depthlab.records import write_atomically, write_json


def transform(net: nn.Module, batches: Images, folder: Path) -> Result:
    """Scalars: `error` of the network and `error_transformed` of its equivalent in percent, images whose class
    `changed`, and the largest `difference` of a logit, all in double precision; `*_rounded` in the run's. Arrays: the
    largest difference of a logit per image.

    Raises:
        Problem: there is no such map for this network, see `depthlab.equivalence`.
    """
    identity_kernels(net)  # refuses what has no equivalent
    double = copy.deepcopy(net).double()
    other = twin(double, residual=not net.residual)
    y = torch.cat([y.cpu() for _, y in batches])
    precision = next(net.parameters()).dtype
    scalars: dict[str, Any] = {"images": len(y), "residual": int(other.residual)}
    arrays: dict[str, np.ndarray] = {}
    pairs = {"": (double, other), "_rounded": (net, copy.deepcopy(other).to(precision))}
    for name, (one, two) in pairs.items():
        a, b = (logits(each, batches) for each in (one, two))
        difference = (a - b).abs().amax(1)
        scalars |= {
            f"error{name}": 100 * (a.argmax(1) != y).double().mean().item(),
            f"error_transformed{name}": 100 * (b.argmax(1) != y).double().mean().item(),
            f"changed{name}": int((a.argmax(1) != b.argmax(1)).sum()),
            f"difference{name}": difference.max().item(),
        }
        arrays[f"difference{name}"] = difference.numpy()
    write(folder, other)
    return Result(scalars, arrays)


def logits(net: nn.Module, batches: Images) -> Tensor:
    """(N, K), in double precision on the CPU."""
    with evaluating(net):
        return torch.cat([net.forward(like(net, x)).double().cpu() for x, _ in batches])


def write(folder: Path, net: nn.Module) -> None:
    """`net` as `<folder>/transformed`, with the run's configuration and step."""
    config = json.loads((folder / "config.json").read_text())
    config["arch"] |= {"residual": net.residual, "start": "zero"}
    config["arch"]["name"] = f"simple_{'residual' if net.residual else 'plain'}{net.depth}"
    if "decay_towards" in config["optim"]:  # so that the penalty stays what it was
        config["optim"]["decay_towards"] = "zero" if net.residual else "identity"
    run = torch.load(folder / "last.ckpt", map_location="cpu", mmap=True, weights_only=True)
    checkpoint = {key: run[key] for key in ("epoch", "global_step", "pytorch-lightning_version")}
    checkpoint["state_dict"] = {f"net.{name}": value.cpu() for name, value in net.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    (folder / "transformed").mkdir(exist_ok=True)
    write_atomically(folder / "transformed/last.ckpt", buffer.getvalue())
    write_json(folder / "transformed/config.json", config)


def figure(results: Mapping[str, Result]) -> Any:
    """How many images' logits differ by how much, in double precision and in the run's."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(6.4, 3.6)
    axis = drawing.subplots()
    for (name, result), colour in zip(results.items(), COLOURS * len(results)):
        for key, style, what in (("difference", "-", "double"), ("difference_rounded", "--", "its own")):
            x = np.sort(result.arrays[key])
            x = np.log10(np.maximum(x, 1e-18))
            label = f"{name}, {what} precision"
            axis.step(x, np.arange(1, len(x) + 1) / len(x), color=colour, ls=style, lw=1.2, label=label)
    axis.set(xlabel="$\\log_{10}$ largest difference of an image's logits", ylabel="fraction of images", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=7)
    return drawing
