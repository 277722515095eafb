"""What model.json may say: strict, and read from a file that may be damaged, hostile or of another format."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT: Final = 1

# Widths whose product in bytes stays far below 2^63, where torch's arithmetic ends.
Count = Annotated[int, Field(ge=1, le=2**28)]
Position = Annotated[int, Field(ge=0, le=2**28)]
Value = bool | int | float | str

_LARGEST = 2**24


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Named(_Part):
    """An activation or a scheme: its name in the package's tables, and the arguments it was made with."""

    name: str
    options: dict[str, Value] = {}


class Linear(_Part):
    """A torch.nn.Linear."""

    in_features: Count
    out_features: Count
    bias: bool


class Layer(_Part):
    """A :class:`~taulearn.nn.FullyConnected`."""

    kind: Literal["fully_connected"] = "fully_connected"
    in_features: Count
    out_features: Count
    activation: Named


class Block(_Part):
    """A :class:`~taulearn.nn.PreActivationBlock`."""

    kind: Literal["pre_activation_block"] = "pre_activation_block"
    in_channels: Count
    out_channels: Count
    stride: Count
    activation: Named


class Stem(_Part):
    """A :class:`~taulearn.nn.ConvolutionalStem`."""

    in_channels: Count
    channels: Count
    stride: Count


class Pooled(_Part):
    """A :class:`~taulearn.nn.PooledHead`."""

    channels: Count
    num_classes: Count
    activation: Named


class Pointwise(_Part):
    """A :class:`~taulearn.nn.PointwiseSkip`."""

    in_channels: Count
    out_channels: Count
    stride: Count


class Padding(_Part):
    """A :class:`~taulearn.nn.Pad`."""

    width: Count


class SkipMaps(_Part):
    """Skips: padding takes its widths from the layers, composed skips a map or None (identity) per layer."""

    kind: Literal["identity", "pad", "composed"]
    from_input: bool
    maps: tuple[Linear | Pointwise | None, ...] = ()


class Network(_Part):
    """A network of the package's own parts, rebuilt from this alone; a stem "flatten" takes its width from the layers.

    ``tail``: the skips past layers that were cut, which come before the head.
    """

    kind: Literal["network"] = "network"
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    stem: Literal["flatten"] | Stem | None
    layers: Annotated[tuple[Annotated[Layer | Block, Field(discriminator="kind")], ...], Field(min_length=1)]
    tail: tuple[Linear | Pointwise | Padding, ...] = ()
    head: Linear | Pooled | None
    skips: SkipMaps


class Host(_Part):
    """A model that only its own code can rebuild: the name of its class, for messages, and why."""

    kind: Literal["host"] = "host"
    saved_from: str
    because: str


class Wrapped(_Part):
    """A wrapped model, a host too: names of all blocks at the start, and of the lists that deletion shortens.

    ``states``: for each block the argument and the entry of the output that are its state, None where it is not known.
    """

    kind: Literal["wrapped"] = "wrapped"
    saved_from: str
    blocks: Annotated[tuple[str, ...], Field(min_length=1)]
    shortened: tuple[str, ...]
    states: tuple[tuple[str | int | None, str | int | None], ...] = ()


class Steps(_Part):
    """The time steps; ``origin`` has the number at the start of each layer that was kept."""

    origin: Annotated[tuple[Position, ...], Field(min_length=1)]
    constraint: str
    horizon: float
    lower_bound: float | None


class Manifest(_Part):
    """All of model.json."""

    format: Literal[1] = FORMAT
    taulearn: str
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    time_steps: Steps
    scheme: Named
    model: Annotated[Network | Host | Wrapped, Field(discriminator="kind")]


class _Header(BaseModel):
    """What every format has."""

    format: int
    taulearn: str = "?"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Args:
        path: An existing file.

    Returns:
        The manifest, of which names and numbers may still contradict each other.

    Raises:
        ValueError: If it is damaged or of another format.
    """
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST} bytes, got {size}: it is no manifest; save again")
    content = path.read_bytes()
    try:
        header = _Header.model_validate_json(content, strict=True)
        if header.format == FORMAT:
            return Manifest.model_validate_json(content)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}, got {short(each['input'])}"
            for each in error.errors(include_url=False)[:5]
        )
        raise ValueError(
            f"{path} must be a manifest that save_model wrote, got another content ({found}): restore it, or save again"
        ) from error
    raise ValueError(
        f"{path} must have format {FORMAT}, got {header.format}: load it with the version of taulearn that wrote it, "
        f"{short(header.taulearn)}"
    )


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
