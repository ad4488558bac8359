"""The values that a configuration may have: types, ranges, choices. Keys that the model does not have are refused."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from depthlab.problem import closest

Positive = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


def limit(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or whole or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError("input should be a number of batches >= 1, or a fraction in (0.0, 1.0]")


Limit = Annotated[Any, AfterValidator(limit)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(BaseModel):
    """A section whose further keys are the arguments of `_target_`, checked by building it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str = Field(pattern=r"^[A-Za-z0-9_.]+$")


class Arch(Part):
    weight_decay: float = Field(ge=0)


class Sched(Part):
    epochs: Positive
    clip: float | None = Field(gt=0)


class Optim(Section):
    name: str
    optimizer: dict[str, Any]
    weight_decay: float = Field(ge=0)
    wd_norm: Literal["batch", "none"] = "none"
    decay: Literal["kernels", "all"]
    decay_towards: Literal["zero", "identity"] = "zero"
    momentum_style: Literal["torch", "keras"]


class Data(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.]+$")
    source: str
    dir: str
    classes: Positive | None
    size: Positive | None
    batch_size: Positive
    eval_batch_size: Positive | None
    val_size: Natural
    drop_last: bool
    mean: list[float] | None = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] | None = Field(min_length=3, max_length=3)
    root: str | None = None


class Trainer(Section):
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: Positive
    num_nodes: Positive
    strategy: Literal["auto", "ddp"]
    precision: Literal["64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
    sync_batchnorm: bool
    deterministic: bool | Literal["warn"]
    compile: bool
    fused: bool | None
    channels_last: bool | None
    graph: bool | None
    check_val_every_n_epoch: Positive
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit


class Analysis(Part):
    """An analysis during training: its function's options, and these."""

    target: str = Field(alias="_target_")
    figure: str | None = None
    check: str | None = None
    split: Literal["test", "train", "val"] = "test"
    images: Positive | None = None
    at: list[Natural] = []
    every: Positive | None = None
    at_steps: list[Positive] = []
    every_steps: Positive | None = None


class Logger(Section):
    name: Literal["csv", "wandb", "tensorboard"]
    project: str | None = None
    mode: Literal["online", "offline"] | None = None


class Launcher(Section):
    jobs: Positive | Literal["auto"]
    grace: float = Field(ge=0)


class Trajectory(Section):
    every: Positive | None
    dtype: Literal["float16", "float32"]


class Settings(Section):
    arch: Arch
    sched: Sched
    grow: Part
    augment: Part
    optim: Optim
    data: Data
    trainer: Trainer
    logger: Logger
    launcher: Launcher
    analyses: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], Analysis]
    trajectory: Trajectory
    seed: Natural
    budget: float = Field(gt=0)
    runs_dir: str = Field(min_length=1)
    data_dir: str = Field(min_length=1)
    study: str | None
    paper: dict[str, Any] | None


def key_of(location: tuple[str | int, ...], config: dict[str, Any]) -> list[str]:
    """pydantic's location without the names of a union's branches: as far as it leads into the configuration."""
    path, node = [], config
    for part in location:
        if not isinstance(node, dict) or part not in node:
            break
        path.append(str(part))
        node = node[part]
    return path


def value_problems(config: dict[str, Any]) -> list[str]:
    """A line for each value that the model refuses."""
    try:
        Settings.model_validate(config)
    except ValidationError as error:
        lines, choices = [], {}
        for e in error.errors():
            path = key_of(e["loc"], config)
            key = ".".join(path)
            if e["type"] == "extra_forbidden":
                parent = Settings if len(path) == 1 else Settings.model_fields[path[0]].annotation
                lines.append(f"{key}: no such key; {closest(path[-1], list(parent.model_fields))}")
            elif e["type"] == "missing":
                lines.append(f"{'.'.join(map(str, e['loc']))}: this key is missing")
            else:
                choices.setdefault(f"{key}={e['input']}", []).append(f"{e['msg'][0].lower()}{e['msg'][1:]}")
        for what, said in choices.items():  # a union complains once for each of its branches
            lines.append(f"{what}: {' or '.join(said)}".replace(" or input should be", " or"))
        return list(dict.fromkeys(lines))
    return []
