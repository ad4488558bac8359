"""Growing a residual network while it is trained (Chang et al. 2018, section 4.1, Fig. 5, App. B).

In every stage at once each block gets a copy of itself to its right, and h is halved everywhere: Y + h F(Y) becomes two
steps of h/2, which solve the same differential equation Y' = F(Y) and differ from the one step by O(h^2). The first
block of a stage has other shapes (stage 1: no leading BatchNorm), so the block after it copies old block 2 (App. B):

    old    1       2       3       4
    new    1   2   3   4   5   6   7   8
    from   1   2   2   2   3   3   4   4

That pair is h/2 F1 + h/2 F2, not h F1: the error rises at every growth, in the paper too (Fig. 6).
Stem, head and classifier stay. Kernels, BatchNorm's parameters, its running statistics and counters are copied
[choice: the paper names weights and BatchNorm parameters; without statistics evaluation right after growth would be
meaningless. They are those of the old h and settle within some hundred steps].

A network can grow that has `stages`, a ModuleList of Sequentials of blocks, each with a `step_size` and a `shortcut`;
`depth`, its layers at present, is shown by the progress bar and in the record.
In He's networks (ResNet) the same is done to ReLU(Y + h F(Y)), h = 1 at first: a step of the same equation, projected
onto Y >= 0, so that the two half steps hold there too. The paper's networks are pre-activation (MultilevelResNet).
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from depthlab.records import training_flops
from depthlab.schedules import run_length, run_points


def sources(n: int) -> list[int]:
    """For each of 2n grown blocks the old block it comes from, counted from 1: n = 4 -> [1, 2, 2, 2, 3, 3, 4, 4].

    Raises:
        ValueError: n < 2, there is no second block to copy.
    """
    if n < 2:
        raise ValueError(f"a stage grows from 2 blocks on, got {n}: its second block is what the new one copies")
    return [1, 2, *(k for k in range(2, n + 1) for _ in range(2))]


def problems(net: nn.Module) -> list[str]:
    """Why `net` cannot grow, a line each; empty if it can."""
    way_out = "take a residual network (arch=ml14, arch=resnet20), or grow=none"
    stages = getattr(net, "stages", None)
    blocks = [block for stage in stages for block in stage] if stages else []
    if not blocks or not all(hasattr(block, "step_size") for block in blocks):
        return [f"grow: {type(net).__name__} has no stages of residual blocks, it cannot grow; {way_out}"]
    if any(block.shortcut is None for block in blocks):
        return [f"grow: this {type(net).__name__} has no shortcuts, a copied block would act in full; {way_out}"]
    if (fewest := min(len(stage) for stage in stages)) < 2:
        return [
            f"grow: a stage of {fewest} block cannot grow, its second block is what the new one copies; "
            "take arch.blocks >= 2 (arch.depth >= 14), or grow=none"
        ]
    return []


def growth_epochs(at: Sequence[int], epochs: int, budget: float = 1.0) -> tuple[int, ...]:
    """The run's epochs at whose start the network grows: `at`, epochs of the recipe, scaled by the budget and rounded.

    Raises:
        ValueError: `at` is empty, out of order or outside 1..epochs-1, or the budget leaves too few epochs between.
    """
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in at)
    if not at or not whole or not rising([0, *at, epochs]):
        raise ValueError(
            f"grow.at must be rising epochs after 0 and before the last, {epochs} (grow.epochs), got {list(at)}"
        )
    run_epochs = run_length(epochs, budget)
    points = run_points(at, epochs, run_epochs)
    if not rising([0, *points, run_epochs]):
        enough = next((n for n in range(run_epochs + 1, epochs) if rising([0, *run_points(at, epochs, n), n])), epochs)
        raise ValueError(
            f"budget={budget:g} leaves {run_epochs} of {epochs} epochs and puts grow.at={list(at)} at {list(points)}, "
            f"but each depth needs an epoch; take budget >= {enough / epochs:.3g} ({enough} epochs) or fewer points"
        )
    return points


def rising(values: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


def grow(net: nn.Module) -> dict[str, str]:
    """Double the blocks of every stage in place and halve h.

    Copies keep device, dtype and memory format. Old blocks stay the same objects, so an optimiser finds their state.

    Returns:
        For each parameter and buffer of the grown network, by name, the name of the one before that it is or copies.

    Raises:
        ValueError: `net` cannot grow.
    """
    if lines := problems(net):
        raise ValueError("; ".join(lines))
    origin = {}
    for k, stage in enumerate(net.stages):
        blocks = []
        for new, old in enumerate(sources(len(stage))):
            block = stage[old - 1]
            # old block j moves to place 2j - 1; what lands elsewhere is a copy
            blocks.append(block if new == 2 * (old - 1) else copy.deepcopy(block))
            origin[f"stages.{k}.{new}."] = f"stages.{k}.{old - 1}."
        net.stages[k] = nn.Sequential(*blocks)
    set_step_size(net, step_size(net) / 2)

    def before(name: str) -> str:
        parts = name.split(".", 3)
        return origin[".".join(parts[:3]) + "."] + parts[3] if parts[0] == "stages" else name

    return {name: before(name) for name in state_names(net)}


def mean_flops(net: nn.Module, size: int, points: Sequence[int], run_epochs: int) -> float:
    """Training FLOPs per image of a run that starts as `net` and grows at the epochs `points`; grows `net` on the way.

    `net` may lie on the meta device.
    """
    total = 0
    for k, (start, end) in enumerate(pairwise([0, *points, run_epochs])):
        if k > 0:
            grow(net)
        total += (end - start) * training_flops(net, size)
    return total / run_epochs


def state_names(net: nn.Module) -> list[str]:
    return [name for name, _ in (*net.named_parameters(), *net.named_buffers())]


def depth(net: nn.Module) -> tuple[int, ...]:
    """Blocks per stage."""
    return tuple(len(stage) for stage in net.stages)


def step_size(net: nn.Module) -> float:
    """h."""
    return float(net.stages[0][0].step_size)


def set_step_size(net: nn.Module, h: float) -> None:
    for stage in net.stages:
        for block in stage:
            block.step_size = h


def state(net: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint must say about the present shape, in plain types; None for a network that has no such shape."""
    if problems(net):
        return None
    return {"blocks": list(depth(net)), "step_size": step_size(net)}


def set_depth(net: nn.Module, blocks: Sequence[int], step_size: float) -> None:
    """Give `net` the shape that `state` described, deeper or shallower, before weights of that shape are loaded.

    Its own weights mean nothing afterwards: blocks are added to or taken from the end of each stage.

    Raises:
        ValueError: another number of stages, or a stage of one block, whose shapes do not repeat, is to become deeper.
    """
    stages = getattr(net, "stages", ())
    if len(blocks) != len(stages) or any(n < 1 for n in blocks):
        raise ValueError(f"cannot give {list(blocks)} blocks to {type(net).__name__} with its {len(stages)} stages")
    for k, (stage, n) in enumerate(zip(stages, blocks)):
        if n > len(stage) == 1:
            raise ValueError(f"stage {k + 1} has a single block, which cannot be repeated to make {n}")
        added = [copy.deepcopy(stage[-1]) for _ in range(n - len(stage))]
        if n != len(stage):
            net.stages[k] = nn.Sequential(*list(stage)[:n], *added)
    set_step_size(net, step_size)
