"""Checks of settings: their values, those that contradict each other, and those that would change nothing, and why."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig

FAST_FROM = 256
"""Layers from which a fractional network takes fast memory by itself, as taulearn.nn.schemes says."""
_BLOCKED_FROM = 8
_LONGEST = 200


def contradictions(config: "TrainConfig") -> Iterator[str]:
    """The reasons why settings do not go together, one at a time."""
    yield from _impossible(config)
    yield from _bad_starts(config)
    yield from _line_searches(config)
    yield from _without_effect(config)
    yield from _wrong_shape(config)
    yield from _wrong_stages(config)
    if config.prune_blocks is not None:
        yield from _wrong_target(config)
    if config.prune is not None:
        yield from _not_prunable(config, "prune")
    elif config.prune_blocks is not None:
        yield from _not_prunable(config, "prune_blocks")
    if config.refine is not None:
        yield from _not_refinable(config, config.refine)


def _impossible(config: "TrainConfig") -> Iterator[str]:
    layers, bound = config.hidden_layers, config.lower_bound or 0.0
    for name, numbers in (("width", config.width), ("init", config.init)):
        if isinstance(numbers, tuple) and len(numbers) != layers:
            yield f"{name} must be one number or {layers} (hidden_layers), got {len(numbers)}: change one of the two"
    if config.constraint == "dependent" and layers == 1:
        yield (
            "constraint must not be 'dependent' with one hidden layer, whose step would always be the horizon: "
            "use 'fixed', or more layers"
        )
    if config.constraint in ("simplex", "dependent") and bound * layers > config.total_time:
        yield (
            f"lower_bound * hidden_layers must not exceed horizon with constraint {config.constraint!r}, "
            f"got {bound} * {layers} > {config.total_time}: lower the bound or raise the horizon"
        )
    elif config.init is None and bound * layers > config.total_time:
        yield (
            f"lower_bound must not exceed horizon / hidden_layers = {config.total_time / layers:.4g}, where the steps "
            f"start, got {bound}: lower it, or give init"
        )
    if config.network == "fractional" and config.lower_bound == 0:
        yield (
            "lower_bound must be positive with network 'fractional', got 0.0: tau enters as tau^gamma and 1/tau; "
            "leave it out for 1e-4"
        )
    if isinstance(config.batch_size, int) and config.accumulate > config.batch_size:
        yield (
            f"accumulate must not exceed batch_size = {config.batch_size}, got {config.accumulate}: "
            "a batch has no more parts than samples"
        )


def _bad_starts(config: "TrainConfig") -> Iterator[str]:
    if config.init == "uniform" and config.constraint in ("dependent", "simplex"):
        yield (
            f"init must not be 'uniform' with constraint {config.constraint!r}, in which the steps add up to the "
            "horizon: give numbers that do, or use constraint 'free'"
        )
    if config.init == "uniform" and config.lower_bound is not None and config.lower_bound >= 1:
        yield f"init must not be 'uniform', in (0, 1), with lower_bound = {config.lower_bound}: lower the bound"


def _line_searches(config: "TrainConfig") -> Iterator[str]:
    if config.optimizer.lower() not in ("steepest_descent", "lbfgs"):
        return
    if config.clip_norm is not None:
        yield f"clip_norm must be left out with optimizer {config.optimizer!r}, which needs the true gradient"
    if config.optimizer.lower() == "steepest_descent" and config.scheduler != "none":
        yield "scheduler must be left out with optimizer 'steepest_descent', which searches its step size"


def _changes_width(config: "TrainConfig") -> bool:
    if config.network == "resnet-v2":
        return config.channels is None or (isinstance(config.channels, tuple) and len(config.channels) > 1)
    return len(set(config.widths)) > 1


def _without_effect(config: "TrainConfig") -> Iterator[str]:
    free = "or use constraint 'free'"
    if config.proximal and not config.l1:
        yield "proximal must be left out without l1, which it is a way to apply; or give l1 a weight, for instance 0.01"
    if config.prune is None and config.prune_every != "epoch":
        yield "prune_every must be left out without prune; or give prune a threshold, for instance 0.01"
    if config.prune_by is not None and config.prune_blocks is None:
        yield "prune_by must be left out without prune_blocks; or give prune_blocks the number of layers to keep"
    if config.refine_until is not None and config.refine is None:
        yield "refine_until must be left out without refine; or give refine the number of layers to reach"
    if config.scheme != "residual" and config.network not in ("resnet", "resnet-v2"):
        yield f"scheme must be left out with network {config.network!r}; it belongs to 'resnet' and 'resnet-v2'"
    elif config.scheme != "residual" and _changes_width(config):
        yield f"scheme must be left out where the width changes, got {config.scheme!r}, whose layers keep it"
    if config.epsilon != type(config).model_fields["epsilon"].default and config.scheme != "momentum":
        yield f"epsilon must be left out with scheme {config.scheme!r}; it belongs to 'momentum'"
    if config.network != "fractional":
        for name in ("gamma", "learn_order", "memory_from", "memory", "tolerance"):
            if getattr(config, name) != type(config).model_fields[name].default:
                yield f"{name} must be left out with network {config.network!r}; it belongs to 'fractional'"
    elif config.memory != "auto" and (len(set(config.widths)) > 1 or config.hidden_layers < _BLOCKED_FROM):
        yield (
            f"memory must be left out where the width changes or there are fewer than {_BLOCKED_FROM} hidden_layers, "
            f"got {config.memory!r}: the exact memory is the only one there"
        )
    elif config.learn_order and not 0.01 < config.gamma < 0.99:
        yield f"gamma must lie in (0.01, 0.99) with learn_order, got {config.gamma:g}, where the order stays"
    elif config.learn_order and config.memory == "fast":
        yield "memory must not be 'fast' with learn_order, whose memory is exact; leave it out"
    elif config.memory == "fast" and config.compile == "always":
        yield "compile must not be 'always' with memory 'fast', which compiled steps do not have; leave it out"
    if config.network == "fractional" and config.tolerance != type(config).model_fields["tolerance"].default:
        fast = config.memory == "fast" or (config.memory == "auto" and config.hidden_layers >= FAST_FROM)
        if not fast or len(set(config.widths)) > 1:
            yield (
                f"tolerance must be left out where the memory is exact (memory = {config.memory!r}, "
                f"{config.hidden_layers} hidden_layers); or use memory 'fast' and one width"
            )
    if config.skips == "learned" and config.network == "feedforward":
        yield "skips must be left out with network 'feedforward', which has none"
    if config.skips == "learned" and len(set(config.widths)) == 1:
        yield "skips must be left out where all hidden layers have one width: there is no map to learn"
    if config.constraint == "fixed":
        for name in ("l1", "l2", "elastic_net", "time_horizon", "tau_lr", "prune", "prune_blocks"):
            if getattr(config, name):
                yield f"{name} must be left out with constraint 'fixed', in which the steps do not change; {free}"
    if config.constraint == "simplex":
        for name in ("l1", "time_horizon"):
            if getattr(config, name):
                yield (
                    f"{name} must be left out with constraint 'simplex', in which the steps are positive and "
                    f"add up to the horizon, so that this penalty is constant; {free}"
                )
    if config.constraint == "dependent" and config.time_horizon and config.lower_bound is None:
        yield (
            "time_horizon must be left out with constraint 'dependent', in which the steps add up to the horizon, "
            f"so that this penalty is zero; {free}"
        )


def _wrong_shape(config: "TrainConfig") -> Iterator[str]:
    default = {name: info.default for name, info in type(config).model_fields.items()}
    if config.network != "resnet-v2":
        for name in ("blocks_per_stage", "channels", "stem_stride"):
            if getattr(config, name) != default[name]:
                yield f"{name} must be left out with network {config.network!r}; it belongs to 'resnet-v2'"
        return
    if config.bias_ordering:
        yield "bias_ordering must be left out with network 'resnet-v2', whose layers are convolutions without biases"
    for name in ("width", "skips"):
        if getattr(config, name) != default[name]:
            yield f"{name} must be left out with network 'resnet-v2', whose shape is blocks_per_stage and channels"
    blocks, channels = config.blocks_per_stage, config.channels
    stages = 3 if channels is None else len(channels) if isinstance(channels, tuple) else 1
    if isinstance(blocks, tuple) and stages > 1 and len(blocks) != stages:
        yield f"blocks_per_stage must be one number or {stages} (channels), got {len(blocks)}: change one of the two"
    number = number_of_blocks(blocks, channels)
    if config.hidden_layers != number:
        yield f"hidden_layers must be left out with network 'resnet-v2', which has {number} blocks (blocks_per_stage)"


def _wrong_stages(config: "TrainConfig") -> Iterator[str]:
    outputs = config.hidden_layers - (config.network != "resnet-v2")
    if not config.stage_cost:
        for name in ("stage_cost_schedule", "stage_factors"):
            if getattr(config, name) != type(config).model_fields[name].default:
                yield f"{name} must be left out without stage_cost; or give that a weight, for instance 0.1"
    elif config.depth_losses:
        yield "depth_losses must be left out with stage_cost, which records the loss at each depth by itself"
    if (config.stage_cost or config.depth_losses) and outputs == 0:
        name = "stage_cost" if config.stage_cost else "depth_losses"
        yield f"{name} must be left out with one hidden layer, after which comes the output; or raise hidden_layers"
    if config.stage_factors is not None and len(config.stage_factors) != outputs:
        yield (
            f"stage_factors must be {outputs} numbers, one for each intermediate output, got "
            f"{len(config.stage_factors)}: change that"
        )


def _wrong_target(config: "TrainConfig") -> Iterator[str]:
    if config.prune is not None:
        yield "prune must be left out with prune_blocks, which says how many layers go"
    if config.l1:
        yield "l1 must be left out with prune_blocks, for which the weight of that penalty is found on the way"
    most, name = (config.hidden_layers, "hidden_layers") if config.refine is None else (config.refine, "refine")
    if config.prune_blocks is not None and config.prune_blocks >= most:
        yield (
            f"prune_blocks must be less than the {most} layers that there are ({name}), got "
            f"{config.prune_blocks}: nothing would go; leave it out"
        )
    if config.prune_by is not None and config.prune_by > config.epochs:
        yield f"prune_by must be at most epochs = {config.epochs}, got {config.prune_by}: layers go during training"


def _not_prunable(config: "TrainConfig", name: str) -> Iterator[str]:
    if config.network in ("feedforward", "densenet"):
        yield (
            f"{name} must be left out with network {config.network!r}, in which a layer with step 0 is not the "
            "identity and cannot be deleted; or use network 'resnet' or 'fractional'"
        )
    if config.hidden_layers == 1 and config.network != "resnet-v2":
        yield f"{name} must be left out with one hidden layer, which must stay; or raise hidden_layers"
    if config.network == "resnet-v2":
        return
    widths = config.widths
    last = config.hidden_layers - (config.constraint == "dependent")
    if not any(widths[l - 1] == widths[l] for l in range(1, last)):
        reason = "the others change the width" if len(set(widths)) > 1 else "the last one has the dependent step"
        yield (
            f"{name} must be left out, as no layer could be deleted: the first one must stay, and {reason}; "
            "or use more hidden layers of equal width"
        )


def _not_refinable(config: "TrainConfig", refine: int) -> Iterator[str]:
    if config.network in ("feedforward", "densenet"):
        yield (
            f"refine must be left out with network {config.network!r}, whose layers are no steps of a differential "
            "equation; or use network 'resnet' or 'fractional'"
        )
    if refine <= config.hidden_layers:
        yield (
            f"refine must be more than the {config.hidden_layers} layers that there are (hidden_layers), got {refine}: "
            "nothing would come; leave it out"
        )
    if config.network != "resnet-v2" and not any(a == b for a, b in pairwise(config.widths)):
        reason = "start with more" if config.hidden_layers == 1 else "use hidden layers of equal width"
        yield f"refine must be left out, as no layer keeps the width, so that none can be split; or {reason}"
    if config.refine_until is not None and config.refine_until > config.epochs:
        yield f"refine_until must be at most epochs = {config.epochs}, got {config.refine_until}: layers come during it"


def one_or_several(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    what: str,
    fits: Callable[[Any], bool],
    *,
    each: str = "hidden layer",
) -> object:
    """A number, or a tuple of numbers made from any sequence."""
    several = isinstance(value, list | tuple)
    numbers = value if several else [value]
    if not numbers or not all(_is_number(n, kind) and _fits(n, fits) for n in numbers):
        raise ValueError(f"{name} must be {what}, or one for each {each}, got {shown(value)}")
    return tuple(kind(n) for n in numbers) if several else kind(value)


def number_of_blocks(blocks: Any, channels: Any) -> int | None:
    """The number of blocks that ``blocks_per_stage`` and ``channels`` mean, None where they are no numbers.

    Example:
        >>> number_of_blocks(None, None), number_of_blocks([9, 9], None), number_of_blocks(4, 16)
        (9, 18, 4)
    """
    blocks = 3 if blocks is None else blocks
    several = list(blocks) if isinstance(blocks, list | tuple) else [blocks]
    if not all(_is_number(n, int) for n in several):
        return None
    if isinstance(blocks, list | tuple):
        return sum(several)
    stages = 3 if channels is None else len(channels) if isinstance(channels, list | tuple) else 1
    return stages * sum(several)


def count_or_word(name: str, value: Any, words: tuple[str, ...], what: str) -> object:
    """A number >= 1, or a word that stands for a choice."""
    known = isinstance(value, str) and value in words
    if not known and not (_is_number(value, int) and value >= 1):
        raise ValueError(f"{name} must be {', '.join(map(repr, words))} or {what}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as messages show it, cut where it is very long.

    Example:
        >>> shown("a")
        "'a'"
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message on a setting that does not exist.

    Example:
        >>> unknown_key("hiden_layers", ["hidden_layers"])
        "unknown setting 'hiden_layers': did you mean 'hidden_layers'?"
    """
    nearest = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`taulearn train --help` lists them"
    return f"unknown setting {shown(key)}: {hint}"


def _is_number(value: object, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def _fits(number: Any, fits: Callable[[Any], bool]) -> bool:
    try:
        return fits(number)
    except OverflowError:  # an integer that is no float
        return False
