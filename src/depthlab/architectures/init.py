"""Initialisers of kernels (convolutions and fully connected layers), by name. Biases start at 0, BatchNorm at (1, 0).

glorot_uniform    U(+-sqrt(6 / (fan_in + fan_out)))   Keras' default, used by Barz & Denzler's code
kaiming_normal    N(0, 2 / fan_out)                   He et al. 2015; the fully connected layer keeps torch's default
truncated_normal  N(0, 2 / fan_out) cut at 2 sigma    Chang et al.'s code; fully connected: U(+-sqrt(3 / fan_in))
kaiming_fan_in    N(0, 2 / fan_in)                    Li et al.'s code; fully connected: N(0, 1e-3^2)
Compared by experiment li2018/initialisation, convolutions and fully connected layers alike:
kaiming           N(0, 2 / fan_in)                    He et al. 2015, for ReLU
xavier            N(0, 2 / (fan_in + fan_out))        Glorot & Bengio 2010, for linear units
orthogonal        rows, or columns, of a random orthogonal matrix (Saxe et al. 2014)
normal            N(0, .01^2)                         Krizhevsky et al. 2012, whatever the layer's size
kwi               N(0, 2 / fan_in)                    Yu & Tomasi 2019, eq. 3: He et al. 2015
hmwi              N(0, 1 / S^2)                       ib. eq. 4, "Hartz-Ma", after Hardt & Ma 2017; S: `fan`
kwi and hmwi leave the fully connected layer at torch's default U(+-sqrt(1 / fan_in)), bias too, as the paper's initial
losses and weight penalties show (Table 4). The text says S = fan_in, but Tables 3 and 4 need fan_out: the weight
penalties are 2.01e-6, 2.56e-6, 3.12e-6 at depths 20, 32, 44; fan_out has 2.05, 2.57, 3.09, fan_in 2.40, 2.92, 3.44.
Every one can be scaled: kernels times arch.init_scale, where the architecture has that option.
"""

import math

from torch import nn

INITIALISERS = ("glorot_uniform", "kaiming_normal", "truncated_normal", "kwi", "hmwi")
INITIALISERS += ("kaiming_fan_in", "kaiming", "xavier", "orthogonal", "normal")


def check_batch_norm(eps: float, momentum: float) -> None:
    """Raises:
    ValueError: quoting what is out of its range.
    """
    if not eps > 0:
        raise ValueError(f"arch.bn_eps must be > 0, got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"arch.bn_momentum must lie in [0, 1], got {momentum}")


def initialise(net: nn.Module, name: str, scale: float = 1.0, fan: str = "out") -> None:
    """Initialise every kernel of `net` in place, `scale` times what the initialiser draws.

    Args:
        fan: hmwi's S, "out" or "in".

    Raises:
        ValueError: `name` is not one of `INITIALISERS`, `scale` not above 0, or `fan` neither "out" nor "in".
    """
    if not scale > 0:
        raise ValueError(f"arch.init_scale must be > 0, got {scale}")
    if name not in INITIALISERS:
        raise ValueError(f"arch.init must be one of {', '.join(INITIALISERS)}, got {name!r}")
    if fan not in ("out", "in"):
        raise ValueError(f"arch.fan must be out or in, got {fan!r}")
    if name in ("kwi", "hmwi"):
        kwi_or_hmwi(net, name, scale, fan)
        return
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name == "glorot_uniform":
                nn.init.xavier_uniform_(module.weight)
            elif name == "truncated_normal":
                truncated_normal(module)
            elif name in NORMAL or name == "orthogonal":
                normal_or_orthogonal(module, name)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if scale != 1:
                module.weight.data *= scale


def truncated_normal(module: nn.Conv2d | nn.Linear) -> None:
    """TensorFlow's: sigma is that of the normal distribution before it is cut (after the cut it is 0.88 sigma)."""
    if isinstance(module, nn.Conv2d):
        sigma = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
        nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    else:
        bound = math.sqrt(3 / module.in_features)
        nn.init.uniform_(module.weight, -bound, bound)


NORMAL = {  # variance from fan_in, fan_out, and whether the layer is fully connected
    "kaiming_fan_in": lambda fan_in, fan_out, linear: 1e-6 if linear else 2 / fan_in,
    "kaiming": lambda fan_in, fan_out, linear: 2 / fan_in,
    "xavier": lambda fan_in, fan_out, linear: 2 / (fan_in + fan_out),
    "normal": lambda fan_in, fan_out, linear: 1e-4,
}


def normal_or_orthogonal(module: nn.Conv2d | nn.Linear, name: str) -> None:
    if name == "orthogonal":  # of the kernel as a matrix, outputs x fan_in
        nn.init.orthogonal_(module.weight)
        return
    field = module.weight[0, 0].numel()
    fan_in, fan_out = module.weight.shape[1] * field, module.weight.shape[0] * field
    variance = NORMAL[name](fan_in, fan_out, isinstance(module, nn.Linear))
    nn.init.normal_(module.weight, std=math.sqrt(variance))


def kwi_or_hmwi(net: nn.Module, name: str, scale: float, fan: str) -> None:
    """A part of a larger kernel gets the deviation of the whole: `module.full` = (in, out) channels."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            channels = getattr(module, "full", (module.in_channels, module.out_channels))
            fan_in, fan_out = (math.prod(module.kernel_size) * n for n in channels)
            std = math.sqrt(2 / fan_in) if name == "kwi" else 1 / (fan_out if fan == "out" else fan_in)
            nn.init.normal_(module.weight, std=scale * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
