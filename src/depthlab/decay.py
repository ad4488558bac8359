"""Weight decay, an L2 term: (weight_decay / 2) ||w||^2, on
    decay="kernels"   convolution and fully connected kernels but those in `net.no_weight_decay` (Barz & Denzler's code)
    decay="all"       every parameter, biases and BatchNorm too (plain torch; Li et al.)
or, with decay_towards="identity", (weight_decay / 2) ||w - rho||^2: the penalty ||T^-1(p)||^2 of a plain network with
weights p that is a residual one in disguise (Yu & Tomasi 2019, section 4.1; depthlab/equivalence.py).
"""

from torch import Tensor, nn

from depthlab.equivalence import T, identity_kernels


def parameter_groups(net: nn.Module, weight_decay: float, decay: str = "kernels") -> list[dict]:
    """Two groups of `net`'s parameters in their own order: with weight decay and without.

    Raises:
        ValueError: `decay` is neither "kernels" nor "all", or `weight_decay` is negative.
    """
    if decay not in ("kernels", "all"):
        raise ValueError(f"optim.decay must be kernels or all, got {decay!r}")
    if not weight_decay >= 0:
        raise ValueError(f"optim.weight_decay must be >= 0, got {weight_decay}")
    spared = getattr(net, "no_weight_decay", ())
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, p in net.named_parameters():
        decayed = decay == "all" or (p.ndim > 1 and name not in spared)
        groups[0 if decayed else 1].append(p)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def penalty(net: nn.Module, weight_decay: float, decay: str = "kernels", decay_towards: str = "zero") -> float:
    """The L2 term of the weights as they are."""
    state = dict(net.named_parameters())
    if decay_towards == "identity":
        state = T(state, identity_kernels(net), inverse=True)
    decayed = {id(p) for p in parameter_groups(net, weight_decay, decay)[0]["params"]}
    names = [name for name, p in net.named_parameters() if id(p) in decayed]
    return weight_decay / 2 * sum(state[name].detach().cpu().double().square().sum().item() for name in names)
