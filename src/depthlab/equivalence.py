"""The map between plain and residual networks (Yu & Tomasi 2019, section 3, eq. 1; section 4.1).

ID entries   of kernels (D, C, U, V), U and V odd: (c, c, centre), c = 1..min(C, D)
T            p = T(r) = r + rho, rho = 1 at the ID entries of every block's kernels, 0 elsewhere (stem, FC, biases)
Then         the plain network with weights p and the residual network with weights r are the same function, in exact
             arithmetic, and stay so while both are trained on the same batches with the penalties ||T^-1(p)||^2 and
             ||r||^2. In floating point they part slowly (Fig. 6): rounding moves some activations across a ReLU's zero.

With BatchNorm between convolution and sum there is no such map: BN(conv(x)) + x = BN(conv(x) + s x) needs
s = sigma / gamma per channel, and sigma is the deviation of the batch at hand, different for every batch and moved by s
itself; in networks of two convolutions per block the identity would pass the ReLU between them as well.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from depthlab.problem import Problem


def id_entries(kernel: Tensor) -> Tensor:
    """The ID entries, a view of `kernel` (D, C, U, V) of shape (min(C, D),).

    Raises:
        ValueError: these are not kernels of odd sides.
    """
    if kernel.ndim != 4 or not all(side % 2 for side in kernel.shape[2:]):
        raise ValueError(f"ID entries need kernels (D, C, U, V) with odd U and V, got {tuple(kernel.shape)}")
    return kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2].diagonal()


def T(state: Mapping[str, Tensor], names: Iterable[str], inverse: bool = False) -> dict[str, Tensor]:
    """A state dict with 1 added to (`inverse`: taken from) the ID entries of the kernels `names`; the rest as it is."""
    out = dict(state)
    for name in names:
        out[name] = state[name].detach().clone()
        id_entries(out[name]).add_(-1 if inverse else 1)
    return out


def identity_kernels(net: nn.Module) -> list[str]:
    """The names of the kernels to which T applies, one per block.

    Raises:
        Problem: there is no such map for this network, with the reason.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        raise Problem(
            f"no exact map between plain and residual networks with BatchNorm ({type(net).__name__}): behind the "
            "normalisation an identity is worth sigma/gamma in the kernel before it, and sigma is another for every "
            "batch; take a simplified network (arch=simple_plain20, simple_residual20)"
        )
    blocks = net.blocks() if hasattr(net, "set_identity") else []
    if not blocks or any(not isinstance(block.conv, nn.Conv2d) or block.conv.groups > 1 for block in blocks):
        way_out = "take a simplified network (arch=simple_plain20, simple_residual20)"
        raise Problem(f"{type(net).__name__} is neither a plain network nor its residual twin; {way_out}")
    if any(block.step_size != 1 for block in blocks):
        raise Problem("this network has grown, ID(x) + h conv(x) with h < 1: T(r) maps h = 1 only; take grow=none")
    kernels = {id(block.conv.weight) for block in blocks}
    return [name for name, p in net.named_parameters() if id(p) in kernels]


def centre_decay(net: nn.Module, weight_decay: float) -> None:
    """Make gradients to which an optimiser will add weight_decay w those to which it adds weight_decay (w - rho).

    Raises:
        Problem: see `identity_kernels`.
    """
    kernels = [net.get_parameter(name) for name in identity_kernels(net)]
    torch._foreach_sub_([id_entries(p.grad) for p in kernels if p.grad is not None], weight_decay)


def twin(net: nn.Module, residual: bool) -> nn.Module:
    """A copy of a simplified network in its residual or plain form, the same function.

    In the precision of the weights: adding 1 may round them, which in float64 float32 weights do not.

    Raises:
        Problem: see `identity_kernels`.
    """
    names = identity_kernels(net)
    out = copy.deepcopy(net)
    if net.residual != residual:
        out.set_identity(residual)
        with torch.no_grad():
            out.load_state_dict(T(net.state_dict(), names, inverse=residual))
    return out


def plain(net: nn.Module) -> nn.Module:
    """The plain form, see `twin`: of a residual network that with weights T(r)."""
    return twin(net, residual=False)


def residual(net: nn.Module) -> nn.Module:
    """The residual form, see `twin`: of a plain network that with weights T^-1(p)."""
    return twin(net, residual=True)
