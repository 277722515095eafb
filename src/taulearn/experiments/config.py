"""The settings of one training: the options of ``taulearn train``, and the table [config] of a run's run.toml.

Nothing here imports torch. Names of activations, optimisers and data sets are checked when training starts.
"""

import difflib
import math
import os
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .._errors import unknown_name
from .consistency import contradictions

FORMAT = 1

_WORDING = {
    "Input should": "must",
    "String should": "must",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
    "a valid integer": "an integer",
    "valid ": "",
}


class TrainConfig(BaseModel):
    """The settings of a training; the fields' descriptions are the help of ``taulearn train``.

    Settings that contradict each other or would have no effect are refused, with the reason.

    Raises:
        pydantic.ValidationError: A ValueError, if a setting is unknown, of the wrong type or outside its range, or
            contradicts another one.

    Example:
        >>> TrainConfig(hidden_layers=1, prune=0.01)
        Traceback (most recent call last):
        ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for TrainConfig
          Value error, prune must be left out with one hidden layer, which must stay; or raise hidden_layers...
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    data: str = Field("digits", description="Data set; `taulearn data` lists them.")
    network: Literal["resnet", "feedforward", "densenet", "fractional"] = Field(
        "resnet", description="Scheme of the network."
    )
    hidden_layers: int = Field(6, ge=1, description="Number of hidden layers; each has a time step.")
    width: int | tuple[int, ...] = Field(100, description="Width of the hidden layers, one for all or one for each.")
    activation: str = Field("relu", description="Activation, as torch.nn.functional calls it, or smooth_relu.")
    skips: Literal["pad", "learned"] = Field(
        "pad", description="Skips where the width changes: padding with zeros, or learned linear maps."
    )
    constraint: Literal["free", "fixed", "dependent", "simplex"] = Field(
        "free",
        description="On the time steps. free: none; fixed: not trained; dependent: the last one is the horizon minus "
        "the others; simplex: positive, adding up to the horizon.",
    )
    horizon: float = Field(1.0, gt=0, description="Time horizon T.")
    lower_bound: float | None = Field(
        None, ge=0, description="Smallest time step; none unless given, for a fractional network 1e-4."
    )
    init: float | tuple[float, ...] | Literal["uniform"] | None = Field(
        None,
        description="Time steps at the start, one for all or one for each; horizon / layers unless given. uniform "
        "draws them from (0, 1), by the seed.",
    )
    gamma: float = Field(0.5, gt=0, lt=1, description="Order of the fractional derivative, in (0, 1).")
    memory_from: int = Field(1, ge=0, le=1, description="First difference that a fractional network remembers.")
    as_published: bool = Field(
        False,
        description="Imitate faults of the program from which Herberg et al. (2023) printed their curves: of fixed "
        "steps the first alone is fixed, no gradient flows through a dependent step and the fractional weights, and "
        "pruning deletes the layer with the most negative step.",
    )

    loss: Literal["auto", "cross_entropy", "mse", "half_mse"] = Field(
        "auto",
        description="auto is cross_entropy for classes and mse for values; half_mse is the papers' "
        "1/2 of the squared norm.",
    )
    l1: float = Field(0.0, ge=0, description="Weight of the l1 penalty on the time steps; drives them to zero.")
    proximal: bool = Field(
        False, description="Apply l1 as a proximal step, which reaches zero, instead of a subgradient."
    )
    elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on the time steps.")
    weight_elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on weights and biases.")
    time_horizon: float = Field(
        0.0, ge=0, description="Weight of the penalty that draws the sum of the time steps to the horizon."
    )
    bias_ordering: float = Field(
        0.0, ge=0, description="Weight of the penalty that orders the biases of a layer; 10 in the paper."
    )

    prune: float | None = Field(
        None, gt=0, lt=1, description="While training, delete layers whose share of sum |tau| is smaller; e.g. 0.01."
    )
    prune_every: int | Literal["epoch"] = Field(
        "epoch", description="When to look for layers to delete: each epoch, or every so many iterations."
    )

    epochs: int = Field(20, ge=1, description="Passes through the training data.")
    batch_size: int | Literal["auto", "full"] = Field(
        "auto", description="Samples per iteration; auto is 100, or 10 where there are fewer than 5,000; full is all."
    )
    optimizer: str = Field(
        "sgd", description="Any optimiser of torch.optim, by name, or steepest_descent, which searches its step size."
    )
    lr: float = Field(0.01, gt=0, description="Learning rate; the first one tried where it is searched.")
    tau_lr: float | None = Field(None, gt=0, description="Learning rate of the time steps; lr unless given.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum, for optimisers that have it.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay; time steps have none.")
    scheduler: Literal["none", "cosine", "onecycle", "step"] = Field(
        "none",
        description="Of the learning rate. cosine: down to zero; onecycle: up and down; step: a tenth of it after "
        "each third of the epochs.",
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient; no clipping unless given.")
    accumulate: int = Field(1, ge=1, description="Parts to split each batch into, to save memory.")
    average_weights: bool = Field(False, description="Keep an exponential average of the weights as the result.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights and of the order of the samples.")

    device: str = Field("auto", description="auto is cuda where there is one, else cpu.")
    precision: Literal["float32", "float64", "bf16"] = Field(
        "float32", description="Floating point type; bf16 is mixed precision."
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="Compile the training step; auto compiles long runs only."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; torch's choice unless given.")

    run: str | None = Field(None, min_length=1, description="Folder of the run; a new one in runs/ unless given.")
    overwrite: bool = Field(False, description="Replace the run that is in that folder.")
    checkpoint_every: int = Field(1, ge=1, description="Epochs between checkpoints.")
    trace: Literal["all", "thinned"] = Field(
        "all",
        description="Rows per iteration in the record. thinned: some 2000, spaced logarithmically and evenly, which "
        "bounds the space that a run takes.",
    )
    tensorboard: bool = Field(False, description="Write events for TensorBoard into the folder, too.")

    @field_validator("width", mode="before")
    @classmethod
    def _width(cls, value: object) -> object:
        return _one_or_several("width", value, int, "an integer >= 1", lambda n: n >= 1)

    @field_validator("init", mode="before")
    @classmethod
    def _init(cls, value: object) -> object:
        if value is None or value == "uniform":
            return value
        return _one_or_several("init", value, float, "'uniform', a finite number", math.isfinite)

    @field_validator("prune_every", mode="before")
    @classmethod
    def _prune_every(cls, value: object) -> object:
        return _count_or_word("prune_every", value, ("epoch",), "a number of iterations >= 1")

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_size(cls, value: object) -> object:
        return _count_or_word("batch_size", value, ("auto", "full"), "an integer >= 1")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for reason in contradictions(self):
            raise ValueError(reason)
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
        found = content["format"]
        raise ValueError(
            f"{path} must have format = {FORMAT}, got {found!r}: it belongs to another version of taulearn"
        )
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
        ...     TrainConfig(skips="lerned", epochs=0)
        ... except ValidationError as error:
        ...     print(explain(error))
        skips must be one of 'learned', 'pad', got 'lerned': did you mean 'learned'?; epochs must be >= 1, got 0
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
    must = error["msg"]
    for words, instead in _WORDING.items():
        must = must.replace(words, instead)
    return f"{name} {must}, got {error['input']!r}"


def _unknown_key(key: str) -> str:
    nearest = difflib.get_close_matches(key.replace("-", "_"), TrainConfig.model_fields, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`taulearn train --help` lists them"
    return f"unknown setting {key!r}: {hint}"


def _is_number(value: object, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def _one_or_several(
    name: str, value: Any, kind: type[int] | type[float], what: str, fits: Callable[[Any], bool]
) -> object:
    """A number, or a tuple of numbers made from any sequence."""
    several = isinstance(value, list | tuple)
    numbers = value if several else [value]
    if not numbers or not all(_is_number(n, kind) and fits(n) for n in numbers):
        raise ValueError(f"{name} must be {what}, or one for each hidden layer, got {value!r}")
    return tuple(kind(n) for n in numbers) if several else kind(value)


def _count_or_word(name: str, value: Any, words: tuple[str, ...], what: str) -> object:
    """A number >= 1, or a word that stands for a choice."""
    if value not in words and not (_is_number(value, int) and value >= 1):
        raise ValueError(f"{name} must be {', '.join(map(repr, words))} or {what}, got {value!r}")
    return value
