"""Manifests of format 1, which described every module of a network, in the words of format 2."""

from typing import Any

_BUILDERS = {
    frozenset(("width",)): "Pad",
    frozenset(("in_features", "out_features", "bias")): "Linear",
    frozenset(("in_features", "out_features", "activation")): "FullyConnected",
    frozenset(("in_channels", "out_channels", "stride")): "PointwiseSkip",
    frozenset(("in_channels", "out_channels", "stride", "activation")): "PreActivationBlock",
    frozenset(("in_channels", "channels", "stride")): "ConvolutionalStem",
    frozenset(("channels", "num_classes", "activation")): "PooledHead",
}
"""The kind of a description without a name, by its keys."""
_UNITS = {"fully_connected": "features", "pre_activation_block": "channels"}


def as_format_2(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same manifest in format 2: a network is then one put together by hand.

    Raises:
        ValueError: If the description of a network is incomplete.
    """
    model: Any = manifest.get("model")
    match model:
        case {"kind": "wrapped"}:
            model = {"states": [], **model}
        case {"kind": "network"}:
            try:
                model = _network(**model)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"model must describe a network's parts as format 1 does, got {error!r}") from error
    return {**manifest, "format": 2, "model": model}


def _network(kind: str, dtype: str, stem: Any, layers: Any, head: Any, skips: Any, tail: Any = ()) -> dict[str, Any]:
    """A network."""
    units = [_UNITS[each["kind"]] for each in layers]
    widths = [layers[0][f"in_{units[0]}"], *(each[f"out_{unit}"] for each, unit in zip(layers, units, strict=True))]
    parts = [_part(each) for each in (*tail, head)]
    keywords = {
        "layers": [_part({key: value for key, value in each.items() if key != "kind"}) for each in layers],
        "head": _recipe("Sequential", parts=parts) if tail else parts[0],
        "skips": _skips(widths=widths, **skips),
        "stem": _recipe("FlattenInput", in_features=widths[0]) if stem == "flatten" else _part(stem),
    }
    return {"kind": kind, "dtype": dtype, **_recipe("TimeVariableNetwork", **keywords)}


def _skips(kind: str, from_input: Any, widths: list[Any], maps: Any = ()) -> dict[str, Any]:
    """Skips."""
    own: dict[str, dict[str, Any]] = {
        "identity": {"num_steps": len(widths) - 1},
        "pad": {"widths": widths},
        "composed": {"maps": [_part(each) for each in maps]},
    }
    return _recipe(f"{kind.title()}Skips", **own[kind], from_input=from_input)


def _part(keywords: dict[str, Any] | None) -> dict[str, Any]:
    """A single part; None is the identity."""
    if keywords is None:
        return _recipe("Identity")
    return _recipe(_BUILDERS[frozenset(keywords)], **keywords)


def _recipe(builder: str, **keywords: Any) -> dict[str, Any]:
    return {"builder": builder, "keywords": keywords}
