"""Values at many points, spread over processes, going on where they were cut off.

Points are dealt one by one to whoever is free. What is known is written beside the run every few seconds, whole or not
at all, under a fingerprint of everything that the values depend on; a later call with the same fingerprint goes on.
"""

import contextlib
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from depthlab.analysis.evaluator import Evaluator, Resident
from depthlab.records import write_atomically

EVERY = 5.0  # seconds between two savings
Point = tuple[float, ...]


class Plane:
    """theta + sum_k c_k d_k as an evaluator's input, the sum made in place.

    Args:
        theta, directions: vectors (P,), on the device to compute on.
    """

    def __init__(self, theta: Tensor, directions: Sequence[Tensor]) -> None:
        self.theta, self.directions, self.buffer = theta, directions, torch.empty_like(theta)

    def at(self, point: Point) -> Tensor:
        self.buffer.copy_(self.theta)
        for c, d in zip(point, self.directions):
            self.buffer.add_(d, alpha=c)
        return self.buffer


def fingerprint(*parts: Any) -> str:
    """Of tensors (their bytes) and of whatever has a plain repr."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.detach().cpu().contiguous().numpy() if isinstance(part, Tensor) else part
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


def evaluate(
    points: Sequence[Point],
    plane: Plane,
    evaluator: Evaluator,
    workers: int = 1,
    scratch: Path | None = None,
    name: str = "surface",
) -> np.ndarray:
    """(n, 2): mean loss and error in percent at each point.

    Args:
        workers: processes; 1 is this one. On GPUs worker i takes the i-th, on CPUs each has one thread.
        scratch: a .npz that keeps what is known; the caller removes it when all is safe elsewhere.
        name: of the progress bar.

    Raises:
        RuntimeError: a worker failed.
    """
    values = np.full((len(points), 2), np.nan)
    done = np.zeros(len(points), dtype=bool)
    images = evaluator.images
    key = fingerprint(list(points), plane.theta, *plane.directions, images.y, images.x[:: max(1, len(images.x) // 64)],
                      str(evaluator.forward.dtype), evaluator.recalibrate)  # fmt: skip
    if scratch is not None and (found := read(scratch, key, values.shape)) is not None:
        values, done = found
    left = np.flatnonzero(~done).tolist()
    if not left:
        return values
    saved = time.monotonic()
    with bar(len(points), len(points) - len(left), name) as progress, contextlib.ExitStack() as stack:
        if workers == 1:
            some: Iterator[tuple[int, tuple[float, float]]] = ((i, evaluator(plane.at(points[i]))) for i in left)
        else:
            some = stack.enter_context(contextlib.closing(spread(points, left, plane, evaluator, workers)))
        for i, value in some:
            values[i], done[i] = value, True
            progress.update()
            if scratch is not None and time.monotonic() - saved > EVERY:
                write(scratch, key, values, done)
                saved = time.monotonic()
    if scratch is not None:
        write(scratch, key, values, done)
    return values


def bar(total: int, initial: int, name: str) -> tqdm:
    """Points done, points a second, time left; on a terminal always fresh, in a log a line every half minute."""
    seconds = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=initial, desc=name, unit="point", mininterval=seconds, smoothing=0.05, leave=False)


def spread(
    points: Sequence[Point], left: Sequence[int], plane: Plane, evaluator: Evaluator, workers: int
) -> Iterator[tuple[int, tuple[float, float]]]:
    """The values of points `left`, as they come in. Workers end when this process does, however it ends."""
    context = torch.multiprocessing.get_context("spawn")
    device = evaluator.images.x.device
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    shared = [v.share_memory_() if v.device.type == "cpu" else v.cpu().share_memory_()
              for v in (plane.theta, *plane.directions, evaluator.images.x, evaluator.images.y)]  # fmt: skip
    precision = "bf16" if evaluator.forward.dtype == torch.bfloat16 else "32"
    net = evaluator.net.cpu()
    links: dict[Connection, Any] = {}
    queue = list(reversed(left))
    try:
        for k in range(min(workers, len(left))):
            ours, theirs = context.Pipe()
            where = f"{device.type}:{k % count}" if device.type == "cuda" else str(device)
            process = context.Process(
                target=work, args=(theirs, net, shared, where, precision, evaluator.recalibrate, points), daemon=True
            )
            process.start()
            theirs.close()
            links[ours] = process
            ours.send(queue.pop())
        busy = set(links)
        while busy:
            for link in wait(list(busy)):
                try:
                    answer = link.recv()
                except EOFError:
                    links[link].join()
                    raise RuntimeError(f"a worker ended with exit code {links[link].exitcode}") from None
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                if queue:
                    link.send(queue.pop())
                else:
                    link.send(None)
                    busy.discard(link)
                yield answer
    finally:
        for link, process in links.items():
            link.close()
            if process.is_alive():
                process.join(timeout=2)
                process.terminate()


def work(
    link: Connection, net: Any, shared: list[Tensor], device: str, precision: str, recalibrate: int | None,
    points: Sequence[Point],
) -> None:  # fmt: skip
    """A worker: points come in by number, values go out, until the other end is gone."""
    try:
        if not device.startswith("cuda"):
            torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False
        theta, *directions, x, y = (v.to(device) for v in shared)
        x = x.contiguous(memory_format=torch.channels_last)
        evaluator = Evaluator(net.to(device), Resident(x, y), precision, recalibrate)
        plane = Plane(theta, directions)
        while (i := link.recv()) is not None:
            link.send((i, evaluator(plane.at(points[i]))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # nobody is there any more
        return
    except Exception as error:
        link.send(f"{type(error).__name__}: {error}")


def write(path: Path, key: str, values: np.ndarray, done: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), values=values, done=done)
    write_atomically(path, buffer.getvalue())


def read(path: Path, key: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """What `write` was given under this key; None for another measurement's, or none."""
    if not path.exists():
        return None
    try:
        with np.load(path) as found:
            if str(found["key"]) == key and found["values"].shape == shape:
                return found["values"], found["done"]
    except (OSError, ValueError, KeyError):  # not ours, or of another version
        pass
    os.remove(path)
    return None
