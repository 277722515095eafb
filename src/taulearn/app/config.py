"""The settings of one training: the options of ``taulearn train``, and the table [config] of a run's run.toml.

Nothing here imports torch. Names of activations, optimisers and data sets are checked when training starts.
"""

import difflib
import math
import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .._errors import unknown_name
from ..files import expand_user, is_path
from .config_checks import contradictions, count_or_word, number_of_blocks, one_or_several, shown, unknown_key

FORMAT = 1

_FORMER = ("as_published",)
"""Settings of earlier versions, which wrote them into every run.toml, mostly as false."""

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

    data: str = Field(
        "digits",
        description="Data set, by name (`taulearn data` lists them), or by path (with a slash or an ending): an .npz, "
        ".parquet or .csv file, or a folder with a folder of images for each class.",
    )
    target: str | None = Field(None, description="Column of a .parquet or .csv file that holds the targets.")
    network: Literal["resnet", "feedforward", "densenet", "fractional", "resnet-v2"] = Field(
        "resnet", description="Kind of network; resnet-v2 is the convolutional one, for images."
    )
    scheme: Literal["residual", "midpoint", "heun", "rk4", "momentum", "verlet"] = Field(
        "residual",
        description="How a layer of a resnet or resnet-v2 takes the state on: Euler's step, or another integrator's.",
    )
    epsilon: float = Field(1.0, gt=0, description="Inertia of the scheme momentum, epsilon x'' + x' = f(x).")
    hidden_layers: int = Field(
        6,
        ge=1,
        le=100_000,
        description="Number of hidden layers; each has a time step. A resnet-v2 has its blocks instead.",
    )
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
    horizon: float | None = Field(
        None, gt=0, description="Time horizon T; 1 unless given, for a resnet-v2 the number of blocks."
    )
    lower_bound: float | None = Field(
        None, ge=0, description="Smallest time step; none unless given, for a fractional network 1e-4."
    )
    init: float | tuple[float, ...] | Literal["uniform"] | None = Field(
        None,
        description="Time steps at the start, one for all or one for each; horizon / layers unless given. uniform "
        "draws them from (0, 1), by the seed.",
    )
    gamma: float = Field(0.5, gt=0, lt=1, description="Order of the fractional derivative, in (0, 1).")
    learn_order: Literal["network", "layer"] | None = Field(
        None, description="Learn one order of a fractional network, or one a layer; gamma is the one at the start."
    )
    memory_from: int = Field(1, ge=0, le=1, description="First difference that a fractional network remembers.")
    memory: Literal["auto", "exact", "fast"] = Field(
        "auto",
        description="How a fractional network remembers. exact: all states; fast: sums of exponentials, for deep "
        "networks; auto: fast from 256 layers on.",
    )
    tolerance: float = Field(
        1e-6, gt=0, lt=1, description="Largest relative error of the weights of a fractional network with fast memory."
    )
    blocks_per_stage: int | tuple[int, ...] | None = Field(
        None, description="Blocks of each stage of a resnet-v2, one for all or one for each; 3 unless given."
    )
    channels: int | tuple[int, ...] | None = Field(
        None,
        description="Channels of each stage of a resnet-v2; 16 32 64 unless given. A single one: constant width and "
        "resolution.",
    )
    stem_stride: int = Field(1, ge=1, description="Stride of the first convolution of a resnet-v2.")

    loss: Literal["auto", "cross_entropy", "mse", "half_mse"] = Field(
        "auto",
        description="auto is cross_entropy for classes and mse for values; half_mse is the papers' "
        "1/2 of the squared norm.",
    )
    l1: float = Field(0.0, ge=0, description="Weight of the l1 penalty on the time steps; drives them to zero.")
    proximal: bool = Field(
        False, description="Apply l1 as a proximal step, which reaches zero, instead of a subgradient."
    )
    l2: float = Field(0.0, ge=0, description="Weight of the squared norm of the time steps; drives none to zero.")
    elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on the time steps.")
    weight_elastic_net: float = Field(0.0, ge=0, description="Weight of the elastic net penalty on weights and biases.")
    group_lasso: float = Field(
        0.0, ge=0, description="Weight of the group lasso, a norm of the weights and biases of each layer."
    )
    time_horizon: float = Field(
        0.0, ge=0, description="Weight of the penalty that draws the sum of the time steps to the horizon."
    )
    bias_ordering: float = Field(
        0.0, ge=0, description="Weight of the penalty that orders the biases of a layer; 10 in the paper."
    )
    stage_cost: float = Field(
        0.0,
        ge=0,
        description="Weight of the loss at each intermediate output, which makes the deep layers unnecessary.",
    )
    stage_cost_schedule: Literal["constant", "rising", "falling"] = Field(
        "constant", description="Of that weight over training: from 0 to it, or from it to 0."
    )
    stage_factors: tuple[float, ...] | None = Field(
        None, description="Factors of that weight, one for each intermediate output; 1 unless given."
    )
    depth_losses: bool = Field(False, description="Record the loss at each depth without a stage cost, too.")

    prune: float | None = Field(
        None, gt=0, lt=1, description="While training, delete layers whose share of sum |tau| is smaller; e.g. 0.01."
    )
    prune_every: int | Literal["epoch"] = Field(
        "epoch", description="When to look for layers to delete: each epoch, or every so many iterations."
    )
    prune_blocks: int | None = Field(
        None,
        ge=1,
        description="Number of layers to keep, instead of prune: the others go one after the other, each faded out by "
        "a penalty whose weight is found on the way.",
    )
    prune_by: int | None = Field(
        None, ge=1, description="Epoch by which prune_blocks is reached; at 0.6 of the epochs unless given."
    )

    refine: int | None = Field(
        None, ge=2, description="While training, split layers one after the other until there are so many."
    )
    refine_until: int | None = Field(
        None, ge=1, description="Epoch by which they are there; half of the epochs unless given."
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

    @field_validator("data")
    @classmethod
    def _data(cls, value: str) -> str:
        return str(expand_user(value).absolute()) if is_path(value) else value

    @field_validator("width", mode="before")
    @classmethod
    def _width(cls, value: object) -> object:
        return one_or_several("width", value, int, "an integer >= 1", lambda n: n >= 1)

    @field_validator("blocks_per_stage", "channels", mode="before")
    @classmethod
    def _stages(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return None
        return one_or_several(str(info.field_name), value, int, "an integer >= 1", lambda n: n >= 1, each="stage")

    @field_validator("stage_factors", mode="before")
    @classmethod
    def _stage_factors(cls, value: object) -> object:
        if value is None:
            return None
        several = value if isinstance(value, list | tuple) else (value,)
        return one_or_several(
            "stage_factors", several, float, "a finite number >= 0", lambda c: 0 <= c < math.inf, each="output"
        )

    @model_validator(mode="before")
    @classmethod
    def _blocks_are_layers(cls, values: Any) -> Any:
        """A resnet-v2 has as many layers as blocks; whether the blocks are numbers is seen later."""
        if not isinstance(values, dict) or values.get("network") != "resnet-v2":
            return values
        number = number_of_blocks(values.get("blocks_per_stage"), values.get("channels"))
        default = cls.model_fields["hidden_layers"].default
        given = values.get("hidden_layers", default)
        return values if number is None or given != default else {**values, "hidden_layers": number}

    @field_validator("init", mode="before")
    @classmethod
    def _init(cls, value: object) -> object:
        if value is None or value == "uniform":
            return value
        return one_or_several("init", value, float, "'uniform', a finite number", math.isfinite)

    @field_validator("prune_every", mode="before")
    @classmethod
    def _prune_every(cls, value: object) -> object:
        return count_or_word("prune_every", value, ("epoch",), "a number of iterations >= 1")

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_size(cls, value: object) -> object:
        return count_or_word("batch_size", value, ("auto", "full"), "an integer >= 1")

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

    @property
    def total_time(self) -> float:
        """The time horizon T.

        Example:
            >>> TrainConfig().total_time, TrainConfig(network="resnet-v2").total_time
            (1.0, 9.0)
        """
        if self.horizon is not None:
            return self.horizon
        return float(self.hidden_layers) if self.network == "resnet-v2" else 1.0

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
    """The settings in a file, with known keys, their values not yet checked."""
    file = Path(path)
    if not file.is_file():
        inside = file / "run.toml"
        reason = "there is no such file"
        if file.is_dir():
            reason = f"it is a folder{f'; did you mean {str(inside)!r}?' if inside.is_file() else ''}"
        raise FileNotFoundError(f"config must be a TOML file, got {str(path)!r}: {reason}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        reason = str(error).partition(";")[0]
        raise ValueError(f"{path} must be a TOML file: {reason}") from error
    if "format" in content and content["format"] != FORMAT:
        found = content["format"]
        raise ValueError(
            f"{path} must have format = {FORMAT}, got {found!r}: it belongs to another version of taulearn"
        )
    values = content.get("config", content)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must have config as a table of settings, got {values!r}")
    settings, hooks = split_hooks(values)
    for key in settings:
        if key not in TrainConfig.model_fields:
            raise ValueError(f"{path}: {unknown_key(key, TrainConfig.model_fields)}")
    if hooks is not None:
        raise ValueError(
            f"{path}: {unknown_key(hooks, TrainConfig.model_fields)}; where it names the hooks of a run, train with "
            "them in Python, taulearn.experiments.train(config, hooks=...)"
        )
    return settings


def split_hooks(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The settings in a record and, apart from them, the name of the hooks, which is noted as a setting that is true.

    A name that is close to that of a setting is taken for a mistake, and left among the settings.
    """
    fields = TrainConfig.model_fields
    settings = {name: value for name, value in values.items() if name not in _FORMER or value is not False}
    hooks = [
        name
        for name, value in settings.items()
        if value is True and name not in fields and not difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    ]
    if len(hooks) != 1:
        return settings, None
    del settings[hooks[0]]
    return settings, hooks[0]


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse values that no other setting could make right, each by itself.

    Example:
        >>> check_fields({"hidden_layers": 1, "prune": 0.01})
        >>> check_fields({"tensorboard": "yes"})
        Traceback (most recent call last):
        ...
        ValueError: tensorboard must be a boolean, got 'yes'
    """
    try:
        TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        reasons = [_sentence(each) for each in error.errors(include_url=False) if each["loc"]]
        if reasons:
            raise ValueError("; ".join(reasons)) from error


def explain(error: ValidationError) -> str:
    """A validation error in one line that names each setting, what it must be and what it is.

    Example:
        >>> from taulearn.experiments import TrainConfig
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
        return unknown_key(name, TrainConfig.model_fields)
    if error["type"] == "literal_error":
        given = error["input"]
        given = shown(given) if isinstance(given, int) and given.bit_length() > 64 else given
        parts = typing.get_args(TrainConfig.model_fields[name].annotation)  # of a Literal, or of one that may be None
        known = [word for part in parts for word in typing.get_args(part) or (part,) if isinstance(word, str)]
        return str(unknown_name(name, given, known))
    must = error["msg"]
    for words, instead in _WORDING.items():
        must = must.replace(words, instead)
    return f"{name} {must}, got {shown(error['input'])}"
