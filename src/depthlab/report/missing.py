"""The runs that experiments lack: their commands, what they compute and how long that takes on this machine.

The time of a run is that of the finished runs of the same network on the same hardware in the same precision, epoch by
epoch; where there is none, of a few training steps made now on noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from depthlab.report.experiments import Cell, Experiment
from depthlab.report.recipes import Recipes, epoch_images, overrides
from depthlab.report.tables import Record, tabulate

STEPS = 3  # timed, after one that is not
MOST = 2e11  # FLOPs of such a step: fewer images of a large network or batch, whose memory it would take
Seconds = tuple[float, bool]  # of one training image, on average over a run; whether from finished runs


@dataclass
class Lack:
    """A cell's missing runs; `flops`, `images` and `seconds` are those of one of them, None where not known."""

    experiment: Experiment
    cell: Cell
    seeds: list[Any]
    command: str
    config: dict[str, Any]
    flops: float | None = None
    images: float | None = None
    seconds: float | None = None
    measured: bool = False  # by finished runs

    @property
    def name(self) -> tuple:
        """What makes two of these the same runs, in two tables perhaps."""
        from depthlab.records import identity_of

        return tuple(sorted((key, repr(value)) for key, value in identity_of(self.config).items() if key != "seed"))


def lacks(experiment: Experiment, records: Sequence[Record], recipes: Recipes, expected: Any = None) -> list[Lack]:
    """What the experiment's own table lacks, cell by cell; its length, precision and data set."""
    if not experiment.runs:
        return []
    block = next(
        block for block in tabulate(experiment, records, expected)
        if block.own_data and (block.budget, block.precision) == (experiment.budget, experiment.precision)
    )  # fmt: skip
    found = []
    for row in block.rows:
        if row.missing:
            config, cost = recipes.config(experiment, *overrides(row.cell)), recipes.cost(experiment, row.cell)
            command = experiment.command(row.cell, row.missing)
            about = cost.get("flops"), cost.get("images")
            found.append(Lack(experiment, row.cell, row.missing, command, config, *about))
    return found


def estimate(found: Sequence[Lack], records: Sequence[Record], hardware: str, step: Callable[[dict], float]) -> None:
    """Fill in `seconds`.

    Args:
        hardware: this machine's, as records name it.
        step: configuration -> seconds per training image; called once per network, batch and precision.
    """
    timed: dict[tuple, float] = {}
    for lack in found:
        if lack.images is None:
            continue
        config = lack.config
        rates = [rate for r in records if (rate := pace(r, config, hardware))]
        if rates:
            lack.seconds, lack.measured = median(rates) * lack.images, True
        else:
            key = (repr(config["arch"]), repr(config["grow"]), config["data"]["size"], config["data"]["batch_size"],
                   config["trainer"]["precision"])  # fmt: skip
            if key not in timed:
                timed[key] = step(config)
            lack.seconds = timed[key] * lack.images


def pace(record: Record, config: dict[str, Any], hardware: str) -> float | None:
    """Seconds per training image of a finished run, if it is of this network, precision, data and machine."""
    about = {section: config[section]["name"] for section in ("arch", "grow", "data")}
    same = all(record.get(section, "none") == name for section, name in about.items())
    same = same and record["precision"] == config["trainer"]["precision"] and record.get("hardware") == hardware
    if not same or record["diverged"] or (record.get("devices") or 1) > 1 or not record.get("train_seconds"):
        return None
    if record.get("config", {}).get("trainer", {}).get("limit_train_batches") is not None:
        return None  # its epochs are cut short
    images = epoch_images(config)
    return record["train_seconds"] / (record["epochs"] * images) if images else None


def timed_step(config: dict[str, Any], build: Callable[..., Any], device: Any) -> float:
    """Seconds per image of a training step on noise, forward, backward and SGD; of a network that grows, scaled by
    FLOPs from its first depth to its mean one."""
    import torch

    from depthlab import fused, growth, records
    from depthlab.timing import Stopwatch, timed

    data, trainer = config["data"], config["trainer"]
    precision = trainer["precision"]
    with torch.device("meta"):
        shape = build(config, "arch", num_classes=data["classes"] or 2)
    first = records.training_flops(shape, data["size"])
    images = min(data["batch_size"], max(8, int(MOST / first)))
    with torch.device(device):
        net = build(config, "arch", num_classes=data["classes"] or 2).train()
        x = torch.randn(images, 3, data["size"], data["size"])
        y = torch.zeros(images, dtype=torch.long)
    if fused.switch(trainer["fused"], precision, device.type, trainer["compile"]):  # as the run would
        net, x = (part.to(memory_format=torch.channels_last) for part in (net, x))
    reduced = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if precision == "64-true":
        net, x = net.double(), x.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def steps():
        while True:
            optimizer.zero_grad()
            with torch.autocast(x.device.type, reduced, enabled=reduced is not None):
                loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            yield

    watch = Stopwatch(x.device)
    timed(steps(), watch, 1, STEPS)
    seconds = watch.measured["seconds"] / (STEPS * len(x))
    if (grow := build(config, "grow")) is not None:
        seconds *= growth.mean_flops(shape, data["size"], grow.run_at, grow.run_epochs) / first
    return seconds


def listing(found: Sequence[Lack], hardware: str) -> str:
    """The commands, experiment by experiment, with what each costs, and the sum."""
    lines: list[str] = []
    by_experiment: dict[str, list[Lack]] = {}
    for lack in found:
        by_experiment.setdefault(lack.experiment.id, []).append(lack)
    for id, some in by_experiment.items():
        lines += [f"{id}: {total(some)}", f"    {'all of it':32}  {some[0].experiment.command()}"]
        for lack in some:
            lines.append(f"    {costs(lack):32}  {lack.command}")
        lines.append("")
    once = {(lack.name, seed): lack for lack in found for seed in lack.seeds}
    if len(by_experiment) > 1:
        lines += [
            f"Together: {total(list(once.values()), [1] * len(once))}; runs that two experiments share count once.",
            "",
        ]
    if not found:
        return "Nothing is missing.\n"
    lines.append(f"Time: on {hardware}; from finished runs, or (~) {STEPS} training steps made now on noise.")
    return "\n".join(lines) + "\n"


def costs(lack: Lack) -> str:
    n = len(lack.seeds)
    each = f"{n} run{'s' * (n > 1)}"
    if lack.flops is None:
        return f"{each}, cost unknown"
    return f"{each} x {lack.flops / 1e15:.3g} PFLOP, {'' if lack.measured else '~'}{duration(lack.seconds)}"


def total(found: Sequence[Lack], counts: Sequence[int] | None = None) -> str:
    counts = [len(lack.seeds) for lack in found] if counts is None else counts
    flops = sum(n * (lack.flops or 0) for n, lack in zip(counts, found, strict=True))
    seconds = sum(n * (lack.seconds or 0) for n, lack in zip(counts, found, strict=True))
    unknown = any(lack.flops is None for lack in found)
    runs = sum(counts)
    rough = "" if all(lack.measured for lack in found) else "~"
    cost = f"{'more than ' * unknown}{flops / 1e15:.3g} PFLOP, {rough}{duration(seconds)}"
    return f"{runs} run{'s' * (runs > 1)} missing, {cost}"


def duration(seconds: float | None) -> str:
    """`42 s`, `17 min`, `3.2 h`, `12 days`."""
    if seconds is None:
        return "time unknown"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "days" else 1) * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
