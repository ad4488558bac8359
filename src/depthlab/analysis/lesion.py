"""What a trained network loses with some of its residual blocks (Chang et al. 2018, section 3.3; Veit et al. 2016).

Nothing is trained again and no BatchNorm statistics are measured anew. Errors in percent on the given images.

Remove    block j: its residual branch gives nothing, Y_{j+1} = shortcut(Y_j) (identity; where the shape changes the
          shortcut proper; the ReLU after the sum of He's blocks stays). Each alone, then m random blocks together, none
          of them the first of its stage [choice: m = 1..20, 20 draws].
Shuffle   exchange k random pairs of blocks, each pair inside a stage and without its first, whose shape differs
          [choice]; Kendall's tau compares the new order of all blocks with the old one, 1 for the same.
Spearman  rank correlation of a block's lesion (rise of the error) with ||G_j|| / ||Y_j||: equation 8 says that what a
          removal takes away is G_j.

A lesioned network shares its beginning with the whole one up to the first block that differs, so the images are
carried through the network once, and from every block on all lesions that begin there are run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from depthlab.analysis import Images, Result, evaluating, first_blocks, like, residual_stages
from depthlab.analysis.inside import input_of
from depthlab.analysis.norms import norms
from depthlab.problem import Problem

UP_TO_20 = tuple(range(1, 21))


def lesion(
    net: nn.Module,
    batches: Images,
    remove: Sequence[int] = UP_TO_20,
    shuffle: Sequence[int] = UP_TO_20,
    draws: int = 20,
    seed: int = 0,
) -> Result:
    """Arrays: over the d blocks `removed_one` (error without it), `relative` (||G_j||/||Y_j||) and `first`; over m x
    draws `removed` (error) and `without` (d more: which blocks); over k x draws `shuffled`, `tau` and `order` (d more).

    Args:
        remove: numbers m of blocks removed together; those beyond what there is are left out.
        shuffle: numbers k of exchanged pairs.
        draws: of each m and each k.
        seed: of the draws.

    Raises:
        Problem: `net` has no residual blocks, or an argument is out of its range.
    """
    for key, values in (("remove", remove), ("shuffle", shuffle), ("draws", [draws])):
        if any(value < 1 for value in values):
            raise Problem(f"analysis.{key} must be >= 1, got {min(values)}")
    stages = residual_stages(net)
    blocks = [block for stage in stages for block in stage]
    first = first_blocks(net)
    rng = np.random.default_rng(seed)
    d, later = len(blocks), np.flatnonzero(~first)
    remove = [m for m in remove if m <= len(later)]
    shuffle = list(shuffle) if max(map(len, stages)) > 2 else []

    without = np.zeros((len(remove), draws, d), dtype=bool)
    for i, m in enumerate(remove):
        for draw in range(draws):
            without[i, draw, rng.choice(later, m, replace=False)] = True
    order = np.array([[exchanged(stages, k, rng) for _ in range(draws)] for k in shuffle]).reshape(-1, draws, d)
    absent = [Absent(block) for block in blocks]
    variants = [blocks]
    variants += [[*blocks[:j], absent[j], *blocks[j + 1 :]] for j in range(d)]
    variants += [[absent[j] if gone[j] else blocks[j] for j in range(d)] for gone in without.reshape(-1, d)]
    variants += [[blocks[j] for j in new] for new in order.reshape(-1, d)]

    found = errors(net, batches, variants)
    whole, alone, rest = found[0], found[1 : d + 1], found[d + 1 :]
    removed, shuffled = np.split(rest, [without.shape[0] * draws])
    tau = np.array([kendalltau(np.arange(d), new).statistic for new in order.reshape(-1, d)])
    sizes = norms(net, batches)
    relative = sizes.arrays["relative"]
    rise = alone - whole
    arrays = {
        "removed_one": alone, "relative": relative, "first": first,
        "remove": np.array(remove, dtype=int), "removed": removed.reshape(-1, draws), "without": without,
        "shuffle": np.array(shuffle, dtype=int), "shuffled": shuffled.reshape(-1, draws),
        "tau": tau.reshape(-1, draws), "order": order,
    }  # fmt: skip
    return Result(
        {
            "images": sizes.scalars["images"],
            "blocks": d,
            "error": float(whole),
            "rise_first_mean": float(rise[first].mean()),
            "rise_later_median": float(np.median(rise[~first])) if len(later) else None,
            "rise_later_max": float(rise[~first].max()) if len(later) else None,
            "spearman": spearman(rise, relative),
            "spearman_later": spearman(rise[~first], relative[~first]),
            "spearman_shuffled_tau": spearman(shuffled, tau),
        },
        arrays,
    )


class Absent(nn.Module):
    """The block without its residual branch."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        self.block.residual = lambda x: x.new_zeros(())  # hides the class's method until it is deleted
        try:
            return self.block(x)
        finally:
            del self.block.residual


class Given(nn.Module):
    """Whatever comes, out goes `y`."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def exchanged(stages: Sequence[Sequence[nn.Module]], k: int, rng: np.random.Generator) -> np.ndarray:
    """The order 0..d-1 of all blocks after k exchanges of two later blocks of one stage; all pairs equally likely."""
    order = np.arange(sum(map(len, stages)))
    pairs, start = [], 0
    for stage in stages:
        pairs += [(start + a, start + b) for b in range(2, len(stage)) for a in range(1, b)]
        start += len(stage)
    for pair in rng.integers(len(pairs), size=k):
        a, b = pairs[pair]
        order[[a, b]] = order[[b, a]]
    return order


def errors(net: nn.Module, batches: Images, variants: Sequence[Sequence[nn.Module]]) -> np.ndarray:
    """Error in percent (len(variants),) of `net` with its residual blocks replaced by each variant's, in that order.

    Memory: one batch's activations at one block, whatever the number of variants.
    """
    blocks = [block for stage in residual_stages(net) for block in stage]
    begin: list[list[int]] = [[] for _ in range(len(blocks) + 1)]  # variants by the first block that differs
    for v, variant in enumerate(variants):
        same = [a is b for a, b in zip(variant, blocks, strict=True)]
        begin[same.index(False) if False in same else len(blocks)].append(v)
    wrong, n = torch.zeros(len(variants), dtype=torch.int64, device=next(net.parameters()).device), 0
    with evaluating(net), tqdm(total=None, unit="lesion", delay=3, leave=False, disable=None) as bar:
        for x, labels in batches:
            bar.total = len(variants) * len(batches) if hasattr(batches, "__len__") else None
            x, labels = like(net, x), labels.to(wrong.device)
            y = input_of(net, blocks[0], x)  # what the stem gives
            for j, here in enumerate(begin):
                for v in here:
                    wrong[v] += (after(net, x, y, variants[v][j:]).argmax(1) != labels).sum()
                bar.update(len(here))
                if j < len(blocks):
                    y = blocks[j](y)
            n += len(x)
    return 100 * wrong.cpu().numpy() / n


def after(net: nn.Module, x: Tensor, y: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
    """Logits where `blocks` and the head are all that is left of the network, and `y` goes in."""
    with rewired(net, [Given(y), *blocks]):
        return net.forward(x[:1])  # the stem has to see something


@contextmanager
def rewired(net: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """`blocks` in place of all stages."""
    stages = net.stages
    net.stages = nn.ModuleList([nn.Sequential(*blocks)])
    try:
        yield
    finally:
        net.stages = stages


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None where one of them is constant."""
    return float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else None


def figure(results: Mapping[str, Result]) -> Any:
    """A row per network: each block's lesion, m random blocks removed, blocks shuffled."""
    from depthlab.analysis.drawing import COLOURS, canvas, stage_lines

    drawing = canvas(13, 3.6 * len(results))
    rows = drawing.subplots(len(results), 3, squeeze=False, width_ratios=(2, 1, 1))
    for (name, result), (one, many, mixed) in zip(results.items(), rows, strict=True):
        of, whole = result.arrays, result.scalars["error"]
        for is_first, colour, label in ((True, COLOURS[1], "first of a stage"), (False, COLOURS[0], "later")):
            j = np.flatnonzero(of["first"] == is_first)
            one.bar(j, of["removed_one"][j], color=colour, label=label)
        one.set(xlabel="block removed", ylabel="error (%)", title=name)
        stage_lines(one, of["first"])
        mean, std = of["removed"].mean(1), of["removed"].std(1)
        many.errorbar(of["remove"], mean, std, fmt="o-", ms=3, lw=1, color=COLOURS[0], label="mean ± std of draws")
        many.set(xlabel="later blocks removed at random", ylabel="error (%)")
        mixed.plot(of["tau"].ravel(), of["shuffled"].ravel(), ".", ms=3, color=COLOURS[0])
        mixed.set(xlabel="shuffled: Kendall's tau of the order", ylabel="error (%)")
        mixed.invert_xaxis()
        for axis in (one, many, mixed):
            axis.axhline(whole, color="0.4", lw=0.8, ls="--", label="whole network")
            axis.set_ylim(bottom=0)
        one.legend(fontsize=8, framealpha=0.9, edgecolor="none")
        many.legend(frameon=False, fontsize=8, loc="lower right")  # the error rises towards it
    return drawing
