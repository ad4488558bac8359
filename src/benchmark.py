"""Speed of training, side by side with the conventional way, in one process, interleaved repetition by repetition.

    python src/benchmark.py                                     four networks on CIFAR-100
    python src/benchmark.py --arch resnet20 --data noise        needs no images
    python src/benchmark.py --arch plain11 --mode fast --profile
    python src/benchmark.py --grid barz2018/table1 budget=0.1   the hours of a grid on this machine, from timed steps

Images/s of training steps: data, augmentation (crop and flip), forward, backward, optimiser.
    conventional   PIL images, DataLoader with 0 and 2 workers, fp32, NCHW, eager, .item() per step
    ours           the Trainer with all callbacks of src/train.py and what its configuration chooses by itself: memory
                   format, fused operations; evaluation and checkpoints lie outside the steps. trainer=exact is fp32 and
                   deterministic, trainer=fast bf16 with all that is fast
    bare           ours without Lightning: the same network, batches and optimiser in a loop of five lines
Also Lightning's own cost per step, on a tiny network, and the data path alone, both on one thread; and runs in
processes of their own, one and two at once: time from command to first step, peak memory, images/s together.
"""

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from torch import nn

import prediction
from configuration import checked, explain, network
from depthlab import conventional, records
from depthlab.data.sources import load
from depthlab.problem import Problem
from depthlab.report import benchmark as page
from depthlab.timing import Stopwatch, peak
from hydra_plugins import side_by_side
from ways import WARM_UP, Ours, Way, endless, flags, stepping

CONF = Path(__file__).resolve().parent.parent / "conf"
TARGET = 4.0  # seconds of a repetition where --steps does not say
MODES = {"exact": "32-true", "fast": "bf16-mixed"}


def overrides(arch: str, precision: str, args: argparse.Namespace, *others: str) -> list[str]:
    """Of `src/train.py` for a benchmarked run: `arch=... trainer=... augment=crop <others>`."""
    chosen = [f"arch={arch}"]
    if not (CONF / "arch" / f"{arch}.yaml").exists() and (match := re.fullmatch(r"(resnet|plain)(\d+)", arch)):
        chosen = ["arch=resnet", f"arch.depth={match[2]}", *(["arch.shortcut=none"] if match[1] == "plain" else [])]
    accelerator = {"cuda": "gpu"}.get(args.device, args.device)
    mode = {precision: mode for mode, precision in MODES.items()}.get(precision, "exact")
    more = [f"data={args.data}", f"data.batch_size={args.batch}", "augment=crop", f"trainer={mode}"]
    return [*chosen, *more, f"trainer.precision={precision}", f"trainer.accelerator={accelerator}", *others]


def composed(arch: str, precision: str, args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The configuration of a benchmarked run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(compose("train", overrides(arch, precision, args, *others)))


def interleaved(ways: dict[str, Way], args: argparse.Namespace, limit: int, about: dict[str, Any]) -> list[dict]:
    """One unrecorded round, then `repetitions` rounds of all ways in turn. `limit`: most steps of a repetition."""
    title = f"{about['part']} {about['network']}"
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
    loaders = args.workers if args.against == "conventional" else []
    pil = {n: conventional.loader(arrays, args.batch, n, device.type == "cuda") for n in loaders}
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
        ways, parts = {}, {}
        flops = records.training_flops(network(composed(arch, "32-true", args), device="meta"), first["data"]["size"])
        for workers, batches in pil.items():
            net = network(composed(arch, "32-true", args)).to(device)
            ways[page.conventional(workers)] = stepping(conventional.training(net, batches, device), True)
        for precision in args.precision:
            timed = {precision: Ours(composed(arch, precision, args))}
            if args.unfused:
                timed[f"{precision} unfused"] = Ours(composed(arch, precision, args, "trainer.fused=false"))
            ways |= {f"{page.OURS} {kind}": way for kind, way in timed.items()}
            if precision == "32-true":
                ways[f"{page.BARE} {precision}"] = stepping(timed[precision].bare(device), False)
            if args.compiled:
                ways[f"{page.OURS} {precision} compiled"] = Ours(
                    composed(arch, precision, args, "trainer.compile=true")
                )
            for kind, way in timed.items() if args.profile else ():
                parts |= {f"{page.OURS} {kind}": way, f"{page.BARE} {kind}": way.in_parts(device)}
        rows += interleaved(ways, args, limit, {"part": "training", "network": arch, "flops_per_image": flops})
        if parts:
            rows += interleaved(parts, args, limit, {"part": "profile", "network": arch})
    return rows


def processes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in processes of their own, so many at once, in turn: what each of them reports."""
    found = []
    for arch in args.arch:
        for repetition in range(min(args.repetitions, 3)):
            for precision in args.precision:
                for k in args.processes:
                    say(f"processes {arch}: {repetition + 1}, {k} at once, {precision}")
                    try:
                        reports = side_by_side.at_once(k, overrides(arch, precision, args), torch.get_num_threads())
                    except RuntimeError as error:
                        raise Problem(f"{k} at once, {arch} {precision}: {error}") from error
                    about = {"network": arch, "way": f"{page.OURS} {precision}", "at_once": k, "repetition": repetition}
                    found += [about | report for report in reports]
    say("")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python src/benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = ["plain11", "resnet20", "simple_plain20", "resnet110"]
    parser.add_argument(
        "--arch", nargs="+", default=networks, help=f"names of conf/arch; default: {' '.join(networks)}"
    )
    parser.add_argument("--mode", default="exact,fast", help="of ours: trainer=exact, fast; default: exact,fast")
    parser.add_argument("--precision", nargs="+", help="of ours, in place of --mode, e.g. 32-true bf16-mixed")
    parser.add_argument("--against", choices=["conventional", "nothing"], default="conventional", help="the other way")
    parser.add_argument(
        "--profile", action="store_true", help="shares of data, forward, backward, optimiser, Lightning"
    )
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
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], metavar="N",
                        help="runs at once in processes of their own; default: 1 2; no number: none")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmark"), metavar="DIR")
    parser.add_argument("--grid", nargs="+", metavar=("EXPERIMENT", "KEY=VALUE"),
                        help="only predict how long an experiment of conf/experiment takes")  # fmt: skip
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    torch.manual_seed(0)
    try:
        if unknown := [mode for mode in args.mode.split(",") if mode not in MODES]:
            raise Problem(f"--mode {unknown[0]}: there is {' and '.join(MODES)}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Problem("--device cuda: PyTorch finds no CUDA GPU here; take --device cpu")
        args.precision = args.precision or [MODES[mode] for mode in args.mode.split(",")]
        if args.grid:
            print(prediction.predict(args.grid[0], args.grid[1:], torch.device(args.device), args.steps), end="")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        about = page.surroundings(args)
        rows = measure(args)
        about["peak"] = {precision: peak(precision, torch.device(args.device)) for precision in args.precision}
        text, files = page.write(args.out, about, rows, processes(args))
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
