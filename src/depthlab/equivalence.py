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

from collections.abc import Iterable, Mapping

from torch import Tensor


def id_entries(kernel: Tensor) -> Tensor:
    """The ID entries, a view of `kernel` (D, C, U, V) of shape (min(C, D),).

    Raises:
        ValueError: these are not kernels of odd sides.
    """
    if kernel.ndim != 4 or not all(side % 2 for side in kernel.shape[2:]):
        raise ValueError(f"ID entries need kernels (D, C, U, V) with odd U and V, got {tuple(kernel.shape)}")
    return kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2].diagonal()


def T(state: Mapping[str, Tensor], names: Iterable[str], inverse: bool = False) -> dict[str, Tensor]:
    """`state` with 1 added to (`inverse`: taken from) the ID entries of the kernels `names`; the rest is not copied."""
    out = dict(state)
    for name in names:
        out[name] = state[name].detach().clone()
        id_entries(out[name]).add_(-1 if inverse else 1)
    return out
