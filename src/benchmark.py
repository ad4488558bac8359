"""Speed of training, side by side with the conventional way, in one process, interleaved repetition by repetition.

    python src/benchmark.py                                     plain11, resnet20 and resnet110 on CIFAR-100
    python src/benchmark.py --arch resnet20 --data noise        needs no images

Images/s of training steps: data, augmentation (crop and flip), forward, backward, optimiser.
    conventional   PIL images, DataLoader with 0 and 2 workers, fp32, NCHW, eager, .item() per step
    ours           the Trainer with all callbacks of src/train.py and what its configuration chooses by itself: memory
                   format, fused kernel; evaluation and checkpoints lie outside the steps
    bare           ours without Lightning: the same network, batches and optimiser in a loop of five lines
Also Lightning's own cost per step, on a tiny network, and the data path alone, both on one thread.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from torch import nn

from configuration import checked, explain, network
from depthlab import conventional, fused
from depthlab.classifier import parameter_groups
from depthlab.data import Batches
from depthlab.data.sources import load
from depthlab.problem import Problem
from depthlab.report import benchmark as page
from depthlab.timing import Stopwatch, timed
from train import assemble

CONF = Path(__file__).resolve().parent.parent / "conf"
WARM_UP = 5  # steps; more than the four batches that two workers keep ready
TARGET = 4.0  # seconds of a repetition where --steps does not say
Way = Callable[[Stopwatch, int], None]  # runs so many steps under the watch


class Ours:
    """A run as src/train.py assembles it, its network kept warm over repetitions."""

    def __init__(self, config: dict[str, Any], net: nn.Module | None = None) -> None:
        self.config = config
        with tempfile.TemporaryDirectory() as folder:
            self.parts = assemble(config, Path(folder))
        self.net = self.parts.model.net if net is None else net

    def __call__(self, watch: Stopwatch, count: int) -> None:
        class Timer(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                if batch_idx + 1 == WARM_UP:
                    watch.start()
                elif batch_idx + 1 == WARM_UP + count:
                    watch.stop()

        flags(conventional=False)
        limits = {"max_epochs": 1, "limit_train_batches": WARM_UP + count, "limit_val_batches": 0}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # the bar's lines
            parts = assemble(self.config, Path(folder), [Timer()], **limits)
            parts.model.net = self.net
            parts.trainer.fit(parts.model, parts.data)

    def batches(self, device: torch.device) -> Batches:
        data = self.parts.data
        data.setup()
        batches = data.train_dataloader()
        batches.images, batches.labels = batches.images.to(device), batches.labels.to(device)
        batches.mean, batches.std = batches.mean.to(device), batches.std.to(device)
        return batches

    def bare(self, device: torch.device) -> Iterator[None]:
        """The same training without Lightning, on the same network: a step per `next`, fp32."""
        model, net = self.parts.model, self.net.to(device)
        of = self.config["trainer"]
        optimizer = model.make_optimizer(parameter_groups(net, model.weight_decay, model.decay), lr=0.01)
        for x, y in endless(self.batches(device)):
            fused.switch(of["fused"], of["precision"], of["accelerator"], of["compile"])
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            yield


def flags(conventional: bool) -> None:
    """Global settings: PyTorch's defaults and cudnn.benchmark as public scripts have them, or src/train.py's."""
    if conventional:
        fused.enable(False)  # back on in `assemble` and `bare`
    torch.use_deterministic_algorithms(not conventional)
    torch.utils.deterministic.fill_uninitialized_memory = conventional
    torch.backends.cudnn.benchmark = conventional
    torch.backends.cudnn.allow_tf32 = conventional


def endless(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


def stepping(steps: Iterator[Any], like_public_scripts: bool) -> Way:
    def way(watch: Stopwatch, count: int) -> None:
        flags(conventional=like_public_scripts)
        timed(steps, watch, WARM_UP, count)

    return way


def composed(arch: str, precision: str, args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The configuration of a run, as `src/train.py arch=... trainer.precision=... augment=crop <others>` has it."""
    overrides = [f"arch={arch}"]
    if not (CONF / "arch" / f"{arch}.yaml").exists() and (match := re.fullmatch(r"(resnet|plain)(\d+)", arch)):
        overrides = ["arch=resnet", f"arch.depth={match[2]}", *(["arch.shortcut=none"] if match[1] == "plain" else [])]
    accelerator = {"cuda": "gpu"}.get(args.device, args.device)
    more = [f"data={args.data}", f"data.batch_size={args.batch}", "augment=crop", f"trainer.precision={precision}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(compose("train", [*overrides, *more, f"trainer.accelerator={accelerator}", *others]))


def interleaved(ways: dict[str, Way], args: argparse.Namespace, limit: int, about: dict[str, Any]) -> list[dict]:
    """One unrecorded round, then `repetitions` rounds of all ways in turn. `limit`: most steps of a repetition."""
    title = " ".join(map(str, about.values()))
    slowest = 0.0
    for name, way in ways.items():
        say(f"{title}: warm-up, {name}")
        watch = Stopwatch(torch.device(args.device))
        way(watch, min(3, limit))
        slowest = max(slowest, watch.measured["seconds"] / min(3, limit))
    count = min(args.steps or max(round(TARGET / slowest), 5), limit)
    rows = []
    for repetition in range(args.repetitions):
        for name, way in ways.items():
            say(f"{title}: {repetition + 1}/{args.repetitions}, {name}, {count} steps")
            watch = Stopwatch(torch.device(args.device))
            way(watch, count)
            if watch.measured is None:
                raise Problem(f"{name}: training ended before its {WARM_UP + count} steps; did the loss diverge?")
            rate = count * args.batch / watch.measured["seconds"]
            rows.append({**about, "way": name, "repetition": repetition, "steps": count, "images_per_second": rate})
            rows[-1] |= watch.measured
    say("")
    return rows


def say(text: str) -> None:
    print(f"\r{text}\033[K" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All repetitions of all ways, as rows."""
    device = torch.device(args.device)
    first = composed(args.arch[0], "32-true", args)
    arrays = load(args.data, first["data"]["dir"])
    limit = len(arrays.train_labels) // args.batch - WARM_UP  # a repetition stays within an epoch
    if limit < 1:
        raise Problem(f"--batch {args.batch}: {len(arrays.train_labels)} images are fewer than {WARM_UP + 1} batches")
    pil = {n: conventional.loader(arrays, args.batch, n, device.type == "cuda") for n in args.workers}
    threads = torch.get_num_threads()
    rows = []
    torch.set_num_threads(1)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, first["data"]["classes"]))
    tiny = Ours(first, net)
    ways = {page.OURS: tiny, page.BARE: stepping(tiny.bare(device), False)}
    rows += interleaved(ways, args, limit, {"part": "lightning", "network": "tiny"})
    loaders = {page.PIL: conventional.loader(arrays, args.batch, 0), page.OURS: tiny.batches(device)}
    ways = {name: stepping(endless(batches), name == page.PIL) for name, batches in loaders.items()}
    rows += interleaved(ways, args, limit, {"part": "data", "network": "-"})
    torch.set_num_threads(threads)
    for arch in args.arch:
        ways = {}
        for workers, batches in pil.items():
            net = network(composed(arch, "32-true", args)).to(device)
            ways[page.conventional(workers)] = stepping(conventional.training(net, batches, device), True)
        for precision in args.precision:
            ours = Ours(composed(arch, precision, args))
            ways[f"{page.OURS} {precision}"] = ours
            if precision == "32-true":
                ways[f"{page.BARE} {precision}"] = stepping(ours.bare(device), False)
            if args.compiled:
                ways[f"{page.OURS} {precision} compiled"] = Ours(
                    composed(arch, precision, args, "trainer.compile=true")
                )
            if args.unfused:
                ways[f"{page.OURS} {precision} unfused"] = Ours(composed(arch, precision, args, "trainer.fused=false"))
        rows += interleaved(ways, args, limit, {"part": "training", "network": arch})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python src/benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["plain11", "resnet20", "resnet110"], help="names of conf/arch")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"], help="of ours")
    parser.add_argument("--compiled", action="store_true", help="ours with trainer.compile=true as well")
    parser.add_argument("--unfused", action="store_true", help="ours with trainer.fused=false as well")
    parser.add_argument("--data", default="cifar100", help="cifar10, cifar100, digits or noise; default: cifar100")
    parser.add_argument("--batch", type=int, default=100, help="default: 100")
    parser.add_argument("--repetitions", type=int, default=5, help="of each way; default: 5")
    parser.add_argument("--steps", type=int, help=f"of a repetition; default: {TARGET:g} s of the slowest way")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="of the conventional loader; default: 0 2"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: PyTorch's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmark"), metavar="DIR")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    torch.manual_seed(0)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        about = page.surroundings(args)
        text, files = page.write(args.out, about, measure(args))
        print(f"{text}\nWritten: {', '.join(map(str, files))}")
    except (Problem, HydraException, OSError) as error:
        print(f"benchmark: {explain(error) if isinstance(error, HydraException) else error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
        flags(conventional=True)
        torch.backends.cudnn.benchmark = False
    return 0


if __name__ == "__main__":
    sys.exit(main())
