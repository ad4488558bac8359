"""Initialisers of kernels (convolutions and fully connected layers), by name. Biases start at 0, BatchNorm at (1, 0).

glorot_uniform    U(+-sqrt(6 / (fan_in + fan_out)))   Keras' default, used by Barz & Denzler's code
kaiming_normal    N(0, 2 / fan_out)                   He et al. 2015; the fully connected layer keeps torch's default
truncated_normal  N(0, 2 / fan_out) cut at 2 sigma    Chang et al.'s code; fully connected: U(+-sqrt(3 / fan_in))
"""

import math

from torch import nn

INITIALISERS = ("glorot_uniform", "kaiming_normal", "truncated_normal")


def check_batch_norm(eps: float, momentum: float) -> None:
    """Raises:
    ValueError: quoting what is out of its range.
    """
    if not eps > 0:
        raise ValueError(f"arch.bn_eps must be > 0, got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"arch.bn_momentum must lie in [0, 1], got {momentum}")


def initialise(net: nn.Module, name: str) -> None:
    """Initialise every kernel of `net` in place.

    Raises:
        ValueError: `name` is not one of `INITIALISERS`.
    """
    if name not in INITIALISERS:
        raise ValueError(f"arch.init must be one of {', '.join(INITIALISERS)}, got {name!r}")
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name == "glorot_uniform":
                nn.init.xavier_uniform_(module.weight)
            elif name == "truncated_normal":
                truncated_normal(module)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def truncated_normal(module: nn.Conv2d | nn.Linear) -> None:
    """TensorFlow's: sigma is that of the normal distribution before it is cut (after the cut it is 0.88 sigma)."""
    if isinstance(module, nn.Conv2d):
        sigma = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
        nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    else:
        bound = math.sqrt(3 / module.in_features)
        nn.init.uniform_(module.weight, -bound, bound)
