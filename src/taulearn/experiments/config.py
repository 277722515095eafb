"""The settings of one training: what ``taulearn train`` takes as options and what a run's run.toml holds in its table [config].

Nothing here imports torch. Names that only torch knows (activations, optimisers) and names of data sets are checked when training starts.
"""

import difflib
import math
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .._errors import unknown_name

FORMAT = 1


class TrainConfig(BaseModel):
    """The settings of a training; the fields' descriptions are the help of ``taulearn train``.

    Settings that contradict each other or would have no effect are refused, with the reason.

    Raises:
        pydantic.ValidationError: A ValueError, if a setting is unknown, of the wrong type, outside its range or contradicts another one.

    Example:
        >>> TrainConfig(network="densenet", prune=0.01)
        Traceback (most recent call last):
        ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for TrainConfig
          Value error, prune must be left out with network 'densenet', in which a layer with step 0 is not the identity...
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    data: str = Field("digits", description="Data set; `taulearn data` lists them.")
    network: Literal["resnet", "feedforward", "densenet", "fractional"] = Field("resnet", description="Scheme of the network.")
    hidden_layers: int = Field(6, ge=1, description="Number of hidden layers; each has a time step.")
    width: int | tuple[int, ...] = Field(100, description="Width of the hidden layers, one for all or one for each.")
    activation: str = Field("relu", description="Activation, by its name in torch.nn.functional, or smooth_relu.")
    skips: Literal["pad", "learned"] = Field("pad", description="Skips between layers of different width: zero padding, or learned linear maps.")
    constraint: Literal["free", "fixed", "dependent", "simplex"] = Field(
        "free", description="Time steps: free, not trained, the last one making up the horizon, or positive with the horizon as sum."
    )
    horizon: float = Field(1.0, gt=0, description="Time horizon T.")
    lower_bound: float | None = Field(None, ge=0, description="Smallest time step; a fractional network has 1e-4 unless told otherwise.")
    init: float | tuple[float, ...] | None = Field(None, description="Initial time steps, one for all or one for each; horizon / hidden-layers unless given.")
    gamma: float = Field(0.5, gt=0, lt=1, description="Order of the fractional derivative.")
    memory_from: int = Field(1, ge=0, le=1, description="First difference that a fractional network remembers.")

    loss: Literal["auto", "cross_entropy", "mse", "half_mse"] = Field(
        "auto", description="Loss; auto is cross_entropy for classes and mse for values, half_mse has the factor 1/2 of the papers."
    )
    l1: float = Field(0.0, ge=0, description="Weight of the l1 penalty on the time steps, which drives them to zero.")
    proximal: bool = Field(False, description="Apply the l1 penalty as a proximal step, which reaches zero, instead of a subgradient.")
    elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on the time steps.")
    weight_elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on weights and biases.")
    time_horizon: float = Field(0.0, ge=0, description="Weight of the penalty that draws the sum of the time steps to the horizon.")
    bias_ordering: float = Field(0.0, ge=0, description="Weight of the penalty that orders the biases of each layer; 10 in the paper.")

    prune: float | None = Field(None, gt=0, lt=1, description="Delete layers whose share of the sum of |tau| is below this, while training.")
    prune_every: int | Literal["epoch"] = Field("epoch", description="When to look for layers to delete: after each epoch, or every so many iterations.")

    epochs: int = Field(20, ge=1, description="Number of passes through the training data.")
    batch_size: int = Field(100, ge=1, description="Samples per optimiser step.")
    optimizer: str = Field("sgd", description="Any optimiser of torch.optim, by name.")
    lr: float = Field(0.01, gt=0, description="Learning rate.")
    tau_lr: float | None = Field(None, gt=0, description="Learning rate of the time steps; that of the weights unless given.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of SGD or RMSprop.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay; time steps have none.")
    scheduler: Literal["none", "cosine", "onecycle", "step"] = Field(
        "none", description="Course of the learning rate: constant, cosine to zero, one cycle up and down, or a tenth after each third of the epochs."
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient.")
    accumulate: int = Field(1, ge=1, description="Split each batch into so many parts, to save memory.")
    average_weights: bool = Field(False, description="Average the weights over the training, and keep the average.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of initial weights and order of samples.")

    device: str = Field("auto", description="cpu, cuda, ...; auto is cuda where there is one, else cpu.")
    precision: Literal["float32", "float64", "bf16"] = Field("float32", description="Floating point type; bf16 is mixed precision.")
    compile: Literal["auto", "always", "never"] = Field("auto", description="Compile the training step; auto where the run is long enough to gain.")
    threads: int | None = Field(None, ge=1, description="Number of CPU threads; torch's choice unless given.")

    run: str | None = Field(None, min_length=1, description="Folder of the run; a new one in runs/ unless given.")
    overwrite: bool = Field(False, description="Replace the run in that folder.")
    checkpoint_every: int = Field(1, ge=1, description="Epochs from checkpoint to checkpoint.")
    tensorboard: bool = Field(False, description="Write the figures for TensorBoard as well.")

    @field_validator("width", mode="before")
    @classmethod
    def _width(cls, value: object) -> object:
        return _one_or_several("width", value, int, "an integer >= 1, or one for each hidden layer", lambda n: n >= 1)

    @field_validator("init", mode="before")
    @classmethod
    def _init(cls, value: object) -> object:
        return value if value is None else _one_or_several("init", value, float, "a finite number, or one for each hidden layer", math.isfinite)

    @field_validator("prune_every", mode="before")
    @classmethod
    def _prune_every(cls, value: object) -> object:
        if value != "epoch" and not (_is_number(value, int) and typing.cast(int, value) >= 1):
            raise ValueError(f"prune_every must be 'epoch' or a number of iterations >= 1, got {value!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for contradiction in _contradictions(self):
            raise ValueError(contradiction)
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each hidden layer.

        Example:
            >>> TrainConfig(hidden_layers=3, width=50).widths
            (50, 50, 50)
        """
        return (self.width,) * self.hidden_layers if isinstance(self.width, int) else self.width

    def record(self) -> dict[str, Any]:
        """The settings that make the run what it is, as plain data: all that are not None, but for where the run lies.

        Example:
            >>> "run" in TrainConfig(run="runs/a").record()
            False
        """
        return self.model_dump(mode="json", exclude_none=True, exclude={"run", "overwrite"})

    def to_toml(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`record` as a file of plain keys, for :meth:`from_toml` and ``taulearn train --config``.

        Args:
            path: The file; one that is there is replaced.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "deep.toml"
            >>> TrainConfig(hidden_layers=20).to_toml(path)
            >>> TrainConfig.from_toml(path) == TrainConfig(hidden_layers=20)
            True
        """
        import tomli_w

        Path(path).write_text(tomli_w.dumps(self.record()), encoding="utf-8")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of plain keys, or the run.toml of a run.

        Args:
            path: The file.

        Returns:
            The settings; keys that the file does not have keep their defaults.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no TOML file, of another format version, or its settings do not do.
        """
        values = read_toml(path)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{path}: {explain(error)}") from error


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file, with known keys, their values not yet checked.

    Args:
        path: A TOML file of plain keys, or the run.toml of a run, whose table [config] is taken.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no TOML file, of another format version, or has an unknown key.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config must be a TOML file, got {str(path)!r}: there is no such file")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a TOML file: {error}") from error
    if "format" in content and content["format"] != FORMAT:
        raise ValueError(f"{path} must have format = {FORMAT}, got {content['format']!r}: use the version of taulearn that wrote it")
    values = content.get("config", content)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must have config as a table of settings, got {values!r}")
    for key in values:
        if key not in TrainConfig.model_fields:
            raise ValueError(f"{path}: {_unknown_key(key)}")
    return values


def explain(error: ValidationError) -> str:
    """What a validation error says, in one line that names each setting, what it must be and what it is.

    Args:
        error: From :class:`TrainConfig`.

    Example:
        >>> try:
        ...     TrainConfig(network="resnt", epochs=0)
        ... except ValidationError as error:
        ...     print(explain(error))
        network must be one of 'densenet', 'feedforward', 'fractional', 'resnet', got 'resnt': did you mean 'resnet'?; epochs must be greater than or equal to 1, got 0
    """
    return "; ".join(_sentence(each) for each in error.errors(include_url=False))


def _sentence(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return _unknown_key(name)
    if error["type"] == "literal_error":
        return str(unknown_name(name, error["input"], typing.get_args(TrainConfig.model_fields[name].annotation)))
    must = error["msg"].replace("Input should be", "must be").replace("String should", "must").replace("valid ", "")
    return f"{name} {must}, got {error['input']!r}"


def _unknown_key(key: str) -> str:
    nearest = difflib.get_close_matches(key.replace("-", "_"), TrainConfig.model_fields, n=1)
    return f"unknown setting {key!r}" + (f": did you mean {nearest[0]!r}?" if nearest else ": see taulearn train --help")


def _is_number(value: object, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)


def _one_or_several(name: str, value: object, kind: type[int] | type[float], what: str, fits: Any) -> object:
    """A number, or a tuple of numbers made from any sequence."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(_is_number(n, kind) and fits(n) for n in numbers):
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return tuple(kind(n) for n in numbers) if isinstance(value, list | tuple) else kind(numbers[0])


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """Why the settings do not go together, one reason at a time."""
    layers, bound = config.hidden_layers, config.lower_bound or 0.0
    for name, numbers in (("width", config.width), ("init", config.init)):
        if isinstance(numbers, tuple) and len(numbers) != layers:
            yield f"{name} must be one number or {layers} (hidden_layers), got {len(numbers)} numbers: change one of the two"
    if config.constraint == "dependent" and layers == 1:
        yield "constraint must not be 'dependent' with one hidden layer, whose step would always be the horizon: use 'fixed', or more layers"
    if config.constraint in ("simplex", "dependent") and bound * layers > config.horizon:
        yield (
            f"lower_bound * hidden_layers must not exceed horizon with constraint {config.constraint!r}, got {bound} * {layers} > "
            f"{config.horizon}: lower the bound or raise the horizon"
        )
    if config.network == "fractional" and config.lower_bound == 0:
        yield "lower_bound must be positive with network 'fractional', got 0.0: tau enters as tau^gamma and 1/tau; leave it out for 1e-4"
    if config.skips == "learned" and (config.network == "feedforward" or len(set(config.widths)) == 1):
        reason = "network 'feedforward' has no skips" if config.network == "feedforward" else "all hidden layers have one width"
        yield f"skips must not be 'learned' here: {reason}, so there is none to learn; leave it out"
    yield from _without_effect(config)
    yield from _pruning_contradictions(config)
    if config.accumulate > config.batch_size:
        yield f"accumulate must not exceed batch_size = {config.batch_size}, got {config.accumulate}: a part would be empty"


def _without_effect(config: TrainConfig) -> Iterator[str]:
    """Settings that were given and would change nothing."""
    if config.proximal and not config.l1:
        yield "proximal must be left out without l1: it is a way to apply that penalty; give l1 a weight, for instance 0.01"
    if config.network != "fractional":
        for name in ("gamma", "memory_from"):
            if getattr(config, name) != TrainConfig.model_fields[name].default:
                yield f"{name} must be left out with network {config.network!r}, which has no fractional derivative; or use 'fractional'"
    if config.constraint == "fixed":
        for name in ("l1", "elastic_net", "time_horizon", "tau_lr", "prune"):
            if getattr(config, name):
                yield f"{name} must be left out with constraint 'fixed', in which the time steps do not change; or use 'free'"
    if config.constraint == "simplex":
        for name in ("l1", "time_horizon"):
            if getattr(config, name):
                yield f"{name} must be left out with constraint 'simplex', in which the steps are positive with a fixed sum, so that it is constant; or use 'free'"
    if config.constraint == "dependent" and config.time_horizon and config.lower_bound is None:
        yield "time_horizon must be left out with constraint 'dependent', in which the steps always add up to the horizon; or use 'free'"
    if config.prune is None and config.prune_every != "epoch":
        yield f"prune_every must be left out without prune, got {config.prune_every!r}: give prune a threshold, for instance 0.01"


def _pruning_contradictions(config: TrainConfig) -> Iterator[str]:
    if config.prune is None:
        return
    if config.network in ("feedforward", "densenet"):
        yield (
            f"prune must be left out with network {config.network!r}, in which a layer with step 0 is not the identity and cannot be deleted; "
            "or use 'resnet' or 'fractional'"
        )
    if config.hidden_layers == 1:
        yield "prune must be left out with one hidden layer, which must stay; or raise hidden_layers"
    widths = config.widths
    last = config.hidden_layers - (config.constraint == "dependent")
    if not any(widths[l - 1] == widths[l] for l in range(1, last)):
        reason = "the last step is the dependent one" if last < config.hidden_layers and len(set(widths)) == 1 else "every layer changes the width"
        yield f"prune must be left out, as no layer could be deleted: the first one must stay and {reason}; or use more layers of equal width"
