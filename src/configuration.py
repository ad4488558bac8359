"""From a composed configuration to checked values and built parts; every refusal is one line with key, value, way out.

Names are checked by Hydra's struct mode (`explain` turns its complaints into one line), values by the pydantic model
of settings.py, and what only the parts themselves can know by constructing them (networks on the meta device, free).
"""

import inspect
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from depthlab.problem import Problem, closest
from depthlab.records import WHEN
from settings import value_problems

CONF = Path(__file__).resolve().parent.parent / "conf"
# Sections whose keys besides these are constructor arguments.
ABOUT = {"arch": ("name", "weight_decay"), "sched": ("name", "clip"), "grow": ("name",), "augment": ("name",)}
WHICH = ("split", "images", *WHEN)  # images, and when: of callbacks.Analyse
ABOUT["analysis"] = ("name", "figure", "extra", "check", *WHICH)
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it cannot import, `check_arguments` says


def build(config: dict[str, Any], section: str, **more: Any) -> Any:
    """Instantiate `_target_` of a section; None where it has none.

    Raises:
        Problem: in the constructor's own words, or naming the argument that it does not know.
    """
    if "_target_" not in config[section]:
        return None
    arguments = {k: v for k, v in config[section].items() if k not in ABOUT[section]}
    for key in arguments.keys() & more.keys():
        raise Problem(f"{section}.{key}={arguments[key]}: leave it out, it follows from the data")
    check_arguments(section, arguments | more)
    try:
        return instantiate(arguments, **more, _convert_="all")
    except HydraException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise Problem(str(cause)) from cause
        lines = str(cause).splitlines()
        raise Problem(f"{section}={config[section].get('name')}: {lines[-1] if lines else cause}") from cause


ARGUMENTS = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)


def check_arguments(section: str, arguments: dict[str, Any]) -> None:
    """Names and types of `_target_`'s arguments, before its own checks.

    Raises:
        Problem: an argument that it does not know, or a value of another type.
    """
    try:
        target = get_object(arguments["_target_"])
    except Exception as error:
        raise Problem(
            f"{section}._target_={arguments['_target_']}: cannot be imported ({' '.join(str(error).split())})"
        ) from error
    hints = dict.fromkeys(inspect.signature(target).parameters, Any)
    hints |= get_type_hints(target.__init__ if isinstance(target, type) else target)
    for key, value in arguments.items():
        if key.startswith("_"):
            continue
        if key not in hints:
            raise Problem(f"{section}.{key}: no such key; {closest(key, [k for k in hints if k != 'return'])}")
        try:
            TypeAdapter(hints[key], config=ARGUMENTS).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("an instance of Sequence", "a list")
            raise Problem(f"{section}.{key}={value}: {message[0].lower()}{message[1:]}") from error


def analysis(section: dict[str, Any], where: str = "analysis") -> Callable[..., Any]:
    """The function of conf/analysis/<name>.yaml with its options bound.

    Raises:
        Problem: an option that it does not know, or of another type.
    """
    options = {key: value for key, value in section.items() if key not in ABOUT["analysis"]}
    check_arguments(where, options)
    options.pop("_target_")
    return partial(get_object(section["_target_"]), **options)


def analyses(config: dict[str, Any], folder: Path | None = None) -> list[Any]:
    """A callback for each of `analyses`.

    Raises:
        Problem: it says no epoch of the recipe, needs a finished run, or its function does not know an option.
    """
    from callbacks.analyse import Analyse

    found = []
    for name, section in config["analyses"].items():
        which = {key: section[key] for key in WHICH if key in section}
        recipe = {"epochs": config["sched"]["epochs"], "budget": config["budget"]}
        try:
            function = analysis(section, f"analyses.{name}")
            found.append(Analyse(function, **which, **recipe, name=name, folder=folder))
        except ValueError as error:
            raise Problem(str(error)) from error
    return found


def choices(group: str) -> list[str]:
    """What conf/<group> has, e.g. `barz2018/table1` of experiment."""
    return [path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("*.yaml")]


# Where others have these keys elsewhere, as in PyTorch and Lightning.
ELSEWHERE = {
    "lr": "the schedule sets the rate: see sched.lr, sched.lr_max",
    "epochs": "set budget, which scales every length, or sched.epochs",
    "max_epochs": "set budget, which scales every length, or sched.epochs",
    "batch_size": "set data.batch_size",
}


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf says of a command line or a configuration file."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        return f"{group}={name}: there is no such {group}; {closest(name, choices(group) or list(error.options))}"
    if match := re.search(r"full_key: (\S+)", f"{text}\n{error.__cause__ or ''}"):
        key = match[1]
        parent = getattr(error, "parent_node", None) or getattr(error.__cause__, "parent_node", None)
        siblings = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if siblings and "not in struct" in f"{text}{error.__cause__}":
            section, _, word = key.rpartition(".")
            where = None if section == "sched" else ELSEWHERE.get(word)
            return f"{key}: no such key; {where or closest(word, siblings)}"
    if "Ambiguous value for argument" in text:
        return f"{text.splitlines()[0].split(chr(39))[1]}: several values are a sweep; add -m (a list has brackets)"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value ({text.splitlines()[0]})"
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    return first + (f" ({rest[0]})" if rest else "")


def problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with a resolved configuration, a line each; empty if it can run."""
    if lines := value_problems(config):
        return lines
    for section in ("sched", "grow", "augment"):
        try:
            build(config, section)
        except Problem as problem:
            lines.append(str(problem))
    if any(line.startswith("grow.at") for line in lines) and config["sched"].get("at") == config["grow"]["at"]:
        lines = [line for line in lines if not line.startswith("sched.at")]  # which follows grow.at
    devices = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    batch = config["data"]["batch_size"]
    if batch % devices:
        lines.append(
            f"data.batch_size={batch} is the global batch and does not divide by the {devices} devices of "
            f"trainer.devices; take a multiple of {devices}"
        )
    for section in ("sched", "grow"):
        if config[section].get("budget", config["budget"]) != config["budget"]:
            lines.append(f"{section}.budget={config[section]['budget']}: set budget, which scales everything together")
    if config["trainer"]["fused"] and config["trainer"]["compile"]:
        lines.append("trainer.fused=true and trainer.compile=true exclude each other; take trainer.fused=null")
    lines += optimizer_problems(config["optim"])
    style, sched = config["optim"]["momentum_style"], config["sched"]
    if style == "keras" and sched.get("lr_min") == 0:
        lines.append("optim.momentum_style=keras divides by the learning rate: sched.lr_min must be > 0, got 0")
    try:
        net = network(config, device="meta")
    except Problem as problem:
        return [*lines, str(problem)]
    lines += size_problems(config, net) + decay_problems(config["optim"], net)
    lines += analysis_problems(config, net)
    if config["grow"]["name"] != "none":
        lines += growth_problems(config, net)
        if config["trajectory"]["every"] is not None:
            lines.append("trajectory.every: a network that grows has no path in one weight space; take grow=none")
    return list(dict.fromkeys(lines))


def optimizer_problems(optim: dict[str, Any]) -> list[str]:
    import torch

    if optim["momentum_style"] == "keras" and optim["optimizer"].get("_target_") != "torch.optim.SGD":
        return ["optim.momentum_style=keras is SGD's; take torch, or optim.optimizer._target_=torch.optim.SGD"]
    if "weight_decay" in optim["optimizer"]:
        return ["optim.optimizer.weight_decay: set optim.weight_decay, which decays what optim.decay says"]
    try:
        optimizer = instantiate(optim["optimizer"])([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever an optimiser's constructor says
        cause = error.__cause__ or error
        return [f"optim.optimizer: {' '.join(str(cause).split())}"]
    if optim.get("decay_towards") == "identity" and optimizer.defaults.get("decoupled_weight_decay"):
        return ["optim.decay_towards=identity is an L2 term of the gradient, this optimizer's decay is none; take Adam"]
    return []


def decay_problems(optim: dict[str, Any], net: Any) -> list[str]:
    """Whether the network's weights can decay towards the identity."""
    from depthlab.equivalence import identity_kernels

    if optim.get("decay_towards") != "identity":
        return []
    try:
        identity_kernels(net)
    except Problem as problem:
        return [f"optim.decay_towards=identity: {problem}"]
    if net.residual:
        return ["optim.decay_towards=identity is for plain networks; a residual one decays to it by itself: take zero"]
    return []


def size_problems(config: dict[str, Any], net: Any) -> list[str]:
    """Whether images of the configured size fit through the network."""
    from depthlab.records import training_flops

    size = config["data"]["size"]
    try:
        if size is not None:
            training_flops(net, size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return [f"arch={config['arch']['name']} cannot take images of {size}x{size} (data.size): {reason}"]
    return []


def analysis_problems(config: dict[str, Any], net: Any) -> list[str]:
    """What keeps `analyses` from being measured on this network."""
    try:
        analyses(config)
        for name, section in config["analyses"].items():
            if section.get("split") == "val" and not config["data"]["val_size"]:
                return [f"analyses.{name}.split=val: no images are held out (data.val_size=0); take test or train"]
            if section.get("check") is not None:
                check = get_object(section["check"])
                check(net, **{key: section[key] for key in inspect.signature(check).parameters if key in section})
    except Problem as problem:
        return [str(problem)]
    return []


def images(config: dict[str, Any], **more: Any) -> Any:
    """The configured ImageData; `more` in place of its options."""
    from depthlab import ImageData

    options = {k: v for k, v in config["data"].items() if v is not None} | more
    return ImageData(**options, seed=config["seed"])


def data_problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with the images themselves, made or downloaded here if they do not exist."""
    try:
        images(config).check(config["trainer"]["devices"] * config["trainer"]["num_nodes"])
    except Problem as problem:
        return [str(problem)]
    return []


def growth_problems(config: dict[str, Any], net: Any) -> list[str]:
    from depthlab import growth

    lines = growth.problems(net)
    here, there = config["grow"].get("epochs"), config["sched"]["epochs"]
    if here != there:
        lines.append(f"grow.epochs={here} must be sched.epochs={there}: both scale with the budget")
    return lines


def network(config: dict[str, Any], num_classes: int | None = None, device: str = "cpu") -> Any:
    """The configured network, initialised on `device`; `num_classes` where the configuration leaves it to the data."""
    import torch

    with torch.device(device):
        return build(config, "arch", num_classes=num_classes or config["data"]["classes"] or 2)


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Plain types, interpolations filled in, Hydra's own node left out.

    Raises:
        Problem: an interpolation leads nowhere or a `???` is left.
    """
    try:
        ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise Problem(explain(error)) from error


def checked(cfg: DictConfig) -> dict[str, Any]:
    """`resolve`, and everything checked.

    Raises:
        Problem: with a line for each thing that is wrong.
    """
    config = resolve(cfg)
    if lines := problems(config):
        raise Problem("\n".join(lines))
    return config
