"""The benchmark's page: a table, Lightning's own cost, the data path, processes of their own, shares of a step, a bar
chart, and every repetition as JSON."""

import io
import shlex
import sys
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from depthlab import records
from depthlab.timing import ENOUGH, QUIET, Spread

OURS, BARE, PIL = "ours", "bare loop", "PIL loader, 0 workers"
EPOCH, HELD_OUT = 50_000, 10_000  # images
PARTS = ("data", "forward", "backward", "optimiser")
COLOURS = {"conventional": "#999999", OURS: "#0072B2", BARE: "#56B4E9", "at once": "#009E73"}
Rows = list[dict[str, Any]]


def conventional(workers: int) -> str:
    return f"conventional, {workers} workers"


def surroundings(args: Namespace) -> dict[str, Any]:
    """Where, with what and how it is measured."""
    return {
        "schema": 1,
        "command": "python src/benchmark.py " + shlex.join(sys.argv[1:]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": records.hardware(args.device),
        "device": args.device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "data": args.data,
        "batch": args.batch,
        "repetitions": args.repetitions,
        "versions": records.versions(),
        "git": records.git_state(),
    }


def spread(rows: Rows, value: str) -> Spread:
    return Spread.of([(row[value], row["disturbed"]) for row in rows])


def paired(ours: Rows, theirs: Rows, of: Any) -> Spread:
    """Of a function of two rows of the same repetition; disturbed where either is."""
    return Spread.of([(of(a, b), a["disturbed"] or b["disturbed"]) for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Rows, theirs: Rows) -> Spread:
    return paired(ours, theirs, lambda a, b: a["images_per_second"] / b["images_per_second"])


def cost(ours: Rows, bare: Rows, clock: str) -> Spread:
    """Milliseconds per step that the first take more than the second."""
    return paired(ours, bare, lambda a, b: 1000 * (a[clock] - b[clock]) / a["steps"])


def by_way(rows: Rows, part: str) -> dict[str, dict[str, Rows]]:
    """network -> way -> repetitions, of one part of the benchmark."""
    table: dict[str, dict[str, Rows]] = {}
    for row in rows:
        if row["part"] == part:
            table.setdefault(row["network"], {}).setdefault(row["way"], []).append(row)
    return table


def baseline(ways: dict[str, Rows]) -> str:
    """The faster of the conventional ways, or the first way where there is none."""
    names = [way for way in ways if way.startswith("conventional")]
    return max(names, key=lambda way: spread(ways[way], "images_per_second").median, default=next(iter(ways)))


def of_peak(way: str, rows: Rows, peaks: dict[str, float]) -> float | None:
    """Share of the machine's measured peak in the precision of a way."""
    found = next((peak for precision, peak in peaks.items() if precision in way), None)
    rate, flops = spread(rows, "images_per_second").median, rows[0].get("flops_per_image")
    return rate * flops / found if found and flops else None


def summary(rows: Rows, apart: Rows = (), peaks: dict[str, float] | None = None) -> dict[str, Any]:
    """The table's numbers: training by network and way, Lightning's cost in ms per step, the data path; processes of
    their own, and the shares of a step."""
    training = {}
    for network, ways in by_way(rows, "training").items():
        base = baseline(ways)
        training[network] = {
            way: {
                "images_per_second": (rate := spread(reps, "images_per_second")),
                "ratio": ratio(reps, ways[base]),
                "of_peak": of_peak(way, reps, peaks or {}),
                "epoch_seconds": EPOCH / rate.median,
                "baseline": way == base,
            }
            for way, reps in ways.items()
        }
    tiny, data = by_way(rows, "lightning")["tiny"], by_way(rows, "data")["-"]
    return {
        "training": training,
        "lightning_ms": cost(tiny[OURS], tiny[BARE], "seconds"),
        "lightning_cpu_ms": cost(tiny[OURS], tiny[BARE], "cpu_seconds"),
        "bare_tiny_ms": 1000 * spread(tiny[BARE], "seconds").median / tiny[BARE][0]["steps"],
        "data": {way: spread(reps, "images_per_second") for way, reps in data.items()},
        "data_ratio": ratio(data[OURS], data[PIL]),
        "processes": processes(apart, training),
        "shares": {network: shares(ways) for network, ways in by_way(rows, "profile").items()},
    }


def processes(apart: Rows, training: dict[str, Any]) -> Rows:
    """Of each network, way and number at once: seconds to the first step, peak memory of one, images/s of all."""
    rounds: dict[tuple, dict[int, Rows]] = {}
    for row in apart:
        key = row["network"], row["way"], row["at_once"]
        rounds.setdefault(key, {}).setdefault(row["repetition"], []).append(row)
    found = []
    for (network, way, k), of in rounds.items():
        totals = [
            (sum(r["images_per_second"] for r in some), any(r["disturbed"] for r in some)) for some in of.values()
        ]
        rate, each = Spread.of(totals), [row for some in of.values() for row in some]
        base = next(way["images_per_second"] for way in training[network].values() if way["baseline"])
        found.append({
            "network": network,
            "way": way,
            "at_once": k,
            "first_step_seconds": median(row["first_step_seconds"] or float("nan") for row in each),
            "memory": max(row["memory"] for row in each),
            "images_per_second": rate,
            "ratio": rate.median / base.median,
        })  # fmt: skip
    return found


def shares(ways: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """Of a step of ours, way by way: its parts, as the bare loop takes them, and what Lightning and callbacks add; and
    the evaluation after an epoch, as a share of that."""
    found = {}
    for way, reps in ways.items():
        if way.startswith(OURS):
            parts = ways[way.replace(OURS, BARE, 1)]
            step = median(row["seconds"] / row["steps"] for row in reps)
            of = {name: median(row["phases"][name] / row["steps"] for row in parts) / step for name in PARTS}
            of["Lightning and callbacks"] = max(0.0, 1 - sum(of.values()))
            epoch = median(EPOCH / row["images_per_second"] for row in reps)
            found[way] = of | {"evaluation": HELD_OUT * median(row["evaluation"] for row in parts) / epoch}
    return found


def markdown(about: dict[str, Any], found: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k in ("python", "torch", "lightning"))
    lines = [
        f"Training, images/s: {about['hardware']}, {about['device']}, {about['threads']} threads, "
        f"{about['cpu_capability']}, batch {about['batch']}, {about['data']}; {versions}.",
        f"Median [range] of {about['repetitions']} interleaved repetitions; ratios within a repetition, against the "
        "better conventional way (*). Ours: 32-true is trainer=exact, bf16-mixed trainer=fast.",
        "",
        "| network | way | images/s | ratio | % of peak | s per 50,000 | quiet |",
        "|---|---|---|---|---|---|---|",
    ]
    spreads = [found["lightning_ms"], found["data_ratio"]]
    for network, ways in found["training"].items():
        for way, of in ways.items():
            rate = of["images_per_second"]
            spreads.append(rate)
            name = f"{way} *" if of["baseline"] else way
            peak = "" if of["of_peak"] is None else f"{100 * of['of_peak']:.0f}"
            lines.append(
                f"| {network} | {name} | {rate.text(digits(rate))} | {of['ratio'].text('.2f')} | {peak} | "
                f"{of['epoch_seconds']:.1f} | {rate.quiet}/{rate.total} |"
            )
    if peaks := about.get("peak"):
        said = ", ".join(f"{precision} {peak / 1e9:.0f}" for precision, peak in peaks.items())
        lines += ["", f"Peak: the fastest large matrix product, GFLOP/s: {said}. Of it in direct convolutions' FLOPs:"]
        lines += ["more than 100 % where an operation needs fewer, or where the product is slower than convolutions."]
    ms = found["lightning_ms"]
    lines += [
        "",
        f"Lightning with all callbacks costs {ms.text('.2f')} ms per step over a bare loop "
        f"({found['lightning_cpu_ms'].text('.2f')} ms of CPU time; tiny network, 1 thread, bare step "
        f"{found['bare_tiny_ms']:.2f} ms; quiet {ms.quiet}/{ms.total}).",
    ]
    for way, of in found["training"].get("resnet20", {}).items():
        if way.startswith(OURS):
            step = 1000 * about["batch"] / of["images_per_second"].median
            lines.append(f"That is {100 * ms.median / step:.1f} % of a resnet20 step ({way}, {step:.1f} ms).")
    ours, pil = found["data"][OURS], found["data"][PIL]
    lines += [
        f"Data path alone, 1 thread: {ours.text()} images/s, {PIL} {pil.text()}: "
        f"x{found['data_ratio'].text('.1f')} (quiet {found['data_ratio'].quiet}/{found['data_ratio'].total}).",
    ]
    if found["processes"]:
        lines += [
            "",
            "Processes of their own, the cores shared out; first step: seconds after the process began; memory: the "
            "most that one held; ratio: of all together, against the better conventional way.",
            "",
            "| network | way | at once | first step, s | memory, MB | images/s together | ratio | quiet |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for of in found["processes"]:
        rate = of["images_per_second"]
        spreads.append(rate)
        lines.append(
            f"| {of['network']} | {of['way']} | {of['at_once']} | {of['first_step_seconds']:.1f} | "
            f"{of['memory'] / 1e6:.0f} | {rate.text(digits(rate))} | {of['ratio']:.2f} | {rate.quiet}/{rate.total} |"
        )
    if found["shares"]:
        names = [*PARTS, "Lightning and callbacks", "evaluation"]
        lines += ["", "Shares of a step, %; of 10,000 images' evaluation, of an epoch:", ""]
        lines += [f"| network | way | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for network, ways in found["shares"].items():
        for way, of in ways.items():
            lines.append(f"| {network} | {way} | {' | '.join(f'{100 * of[name]:.1f}' for name in names)} |")
    if not all(s.trusted for s in spreads):
        lines += [
            "",
            f"WARNING: other processes used more than {QUIET:.0%} of the machine in some repetitions. Where fewer than "
            f"{ENOUGH} were quiet the median is over all of them: measure again on a quiet machine.",
        ]
    return "\n".join(lines) + "\n"


def digits(rate: Spread) -> str:
    return ".0f" if rate.median >= 100 else ".1f"


def chart(about: dict[str, Any], found: dict[str, Any]) -> bytes:
    """Ratio against the better conventional way, a group of bars per network, images/s written on them."""
    names = list(found["training"])
    figure = Figure(figsize=(max(6.4, 3.2 * len(names)), 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    seen: set[str] = set()
    for group, network in enumerate(names):
        bars = [(way, of["ratio"], of["images_per_second"]) for way, of in found["training"][network].items()]
        for of in found["processes"]:
            if of["network"] == network and of["at_once"] > 1:
                r = of["ratio"]
                together = f"{of['at_once']} at once, {of['way']}"
                bars.append((together, Spread(r, r, r, 0, 0), of["images_per_second"]))
        width = 0.84 / len(bars)
        for place, (way, r, rate) in enumerate(bars):
            x = group + (place - (len(bars) - 1) / 2) * width
            colour = next(c for key, c in reversed(COLOURS.items()) if key in way)
            hatch = "//" if way.endswith("bf16-mixed") or way.endswith(" 2 workers") else None
            label = None if way in seen else way
            seen.add(way)
            error = [[r.median - r.low], [r.high - r.median]]
            axis.bar(x, r.median, 0.92 * width, yerr=error, color=colour, hatch=hatch, edgecolor="white", label=label,
                     error_kw={"lw": 0.8})  # fmt: skip
            axis.text(x, r.high, f"{rate.median:.0f}", ha="center", va="bottom", fontsize=8)
    axis.axhline(1, color="0.4", lw=0.8, ls=":")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("training speed / conventional")
    axis.margins(y=0.12)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(f"images/s, {about['hardware']}, {about['threads']} threads, batch {about['batch']}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write(out: Path, about: dict[str, Any], rows: Rows, apart: Rows = ()) -> tuple[str, list[Path]]:
    """Writes benchmark.{json,md,png}; returns the text and the files."""
    found = summary(rows, apart, about.get("peak"))
    text = markdown(about, found)
    files = [out / f"benchmark.{kind}" for kind in ("json", "md", "png")]
    records.write_json(files[0], about | {"summary": _plain(found), "rows": rows, "processes": list(apart)})
    records.write_atomically(files[1], f"`{about['command']}`, {about['started'][:10]}\n\n{text}")
    files[2].write_bytes(chart(about, found))
    return text, files


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return vars(value) if isinstance(value, Spread) else value
