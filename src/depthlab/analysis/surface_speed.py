"""What a point of a loss surface costs, ours against the obvious loop, on this machine, in turn, with equal numbers.

The loop is what public scripts do (the habits of tomgoldstein/loss-landscape): write the point's weights into the
network, walk a DataLoader with PIL images, ToTensor and Normalize in batches of 128, fp32, BatchNorm as a layer.
Ours is evaluator.py in fp32 (all it has), in fp32 without Winograd, and in bf16. The loop has a process of its own,
as a public script would, so that memory.keep_freed does not help it. Seconds are the processor's: on a busy machine
the clock says little. On a GPU they are the clock's.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from depthlab.analysis import Result
from depthlab.analysis.directions import Layout, random_direction
from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.analysis.grid import Plane, Point
from depthlab.conventional import PILImages
from depthlab.data.batches import Batches
from depthlab.problem import Problem

LOOP, OURS = "loop", "ours"
Way = Callable[[Point], tuple[float, float]]  # (loss, seconds)


def surface_speed(net: nn.Module, batches: Batches, repetitions: int = 5, seed: int = 123) -> Result:
    """Arrays: `seconds` (ways, repetitions) of a point, `loss` likewise; the scalars are medians and ratios.

    Args:
        batches: uint8 images in memory, as `depthlab.analysis.choose` gives them.
        repetitions: points, each evaluated in every way, one way after the other.

    Raises:
        Problem: fewer than one repetition.
    """
    if repetitions < 1:
        raise Problem(f"analysis.repetitions must be >= 1, got {repetitions}")
    layout = Layout(net)
    theta = layout.vector(net)
    device = theta.device
    vectors = [theta, *(random_direction(net, seed, draw).to(device) for draw in (0, 1))]
    images = Resident.of(batches, device, layout.dtype)
    plane, ways = Plane(vectors[0], vectors[1:]), {}
    for name, options in ((OURS, {}), ("ours, direct", {"winograd": False}), ("ours, bf16", {"precision": "bf16"})):
        evaluator = Evaluator(net, images, **options)
        ways[name] = timed(device, lambda point, evaluator=evaluator: evaluator(plane.at(point))[0])
    points = [(0.0, 0.0), *np.random.default_rng(seed).uniform(-0.5, 0.5, (repetitions, 2)).tolist()]
    seconds, loss = np.zeros((2, len(ways) + 1, repetitions + 1))
    with elsewhere(net, batches, vectors, device) as conventional:
        ways = {LOOP: conventional} | ways
        for j, point in enumerate(points):  # the first one warms up
            for i, way in enumerate(ways.values()):
                loss[i, j], seconds[i, j] = way(tuple(point))
    seconds, loss = seconds[:, 1:], loss[:, 1:]
    about: dict[str, Any] = {"images": len(images.y), "repetitions": repetitions, "threads": torch.get_num_threads()}
    for i, name in enumerate(ways):
        key = name.replace(", ", "_")
        about[f"{key}_seconds"] = float(np.median(seconds[i]))
        if i:
            ratio = seconds[0] / seconds[i]
            about |= {f"{key}_times": float(np.median(ratio)), f"{key}_times_min": float(ratio.min()),
                      f"{key}_times_max": float(ratio.max()),
                      f"{key}_relative_difference": float(np.max(np.abs(loss[i] - loss[0]) / loss[0]))}  # fmt: skip
    return Result(about, {"seconds": seconds, "loss": loss, "ways": np.array(list(ways))})


def timed(device: torch.device, way: Callable[[Point], float]) -> Way:
    """The same with its seconds."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def run(point: Point) -> tuple[float, float]:
        began = clock()
        return way(point), clock() - began

    return run


@contextmanager
def elsewhere(net: nn.Module, batches: Batches, vectors: list[Tensor], device: torch.device) -> Iterator[Way]:
    """`loop`, timed in a process of its own."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    mean, std = (v[:3].cpu().tolist() for v in (batches.mean, batches.std))
    images, labels = batches.images.cpu().numpy(), batches.labels.cpu().numpy()
    given = (copy.deepcopy(net).cpu(), (images, labels, mean, std), [v.cpu() for v in vectors], str(device))
    process = context.Process(target=serve, args=(theirs, torch.get_num_threads(), *given), daemon=True)
    process.start()
    theirs.close()

    def way(point: Point) -> tuple[float, float]:
        ours.send(point)
        return ours.recv()

    try:
        yield way
    finally:
        ours.close()
        process.join(timeout=10)


def serve(link: Any, threads: int, net: nn.Module, arrays: tuple, vectors: list[Tensor], device: str) -> None:
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    names = ("train_images", "train_labels", "mean", "std")
    way = loop(net.to(device), SimpleNamespace(**dict(zip(names, arrays))), vectors, torch.device(device))
    way = timed(torch.device(device), way)
    with suppress(EOFError):
        while True:
            link.send(way(link.recv()))


def loop(net: nn.Module, arrays: Any, vectors: list[Tensor], device: torch.device) -> Callable[[Point], float]:
    """The obvious way from a point to its mean loss."""
    layout, dtype = Layout(net), vectors[0].dtype
    batches = DataLoader(PILImages(arrays, augment=False), batch_size=128, shuffle=False)
    net.eval()

    def way(point: Point) -> float:
        theta, first, second = vectors
        net.load_state_dict(net.state_dict() | layout.views(theta + point[0] * first + point[1] * second))
        total, n = 0.0, 0
        with torch.no_grad():
            for x, y in batches:
                x, y = x.to(device, dtype), y.to(device)
                total += F.cross_entropy(net(x), y).item() * len(y)
                n += len(y)
        return total / n

    return way


def figure(results: Mapping[str, Result]) -> Any:
    """Processor seconds of a point, every repetition, a group per run."""
    from depthlab.analysis.drawing import COLOURS, canvas

    drawing = canvas(1.6 + 2.6 * len(results), 3.6)
    axes = drawing.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, result) in zip(axes, results.items()):
        ways = [str(way) for way in result.arrays["ways"]]
        for i, (way, seconds) in enumerate(zip(ways, result.arrays["seconds"])):
            axis.bar(i, np.median(seconds), color=COLOURS[i], alpha=0.6)
            axis.plot(np.full(len(seconds), i), seconds, "_", color="black", ms=12)
            times = result.scalars.get(f"{way.replace(', ', '_')}_times")
            if times:
                axis.text(i, np.median(seconds), f"x{times:.2f}", ha="center", va="bottom", fontsize=9)
        axis.set_xticks(range(len(ways)), [way.replace(", ", "\n") for way in ways], fontsize=8)
        axis.set_title(name, fontsize=8)
        axis.set_ylabel("seconds of a point")
    return drawing
