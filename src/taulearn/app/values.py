"""Values of settings: what may stand for a number or several, and how messages show what was given instead."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST = 200


def one_or_several(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    what: str,
    fits: Callable[[Any], bool],
    *,
    each: str = "hidden layer",
) -> object:
    """A number, or a tuple of numbers made from any sequence.

    Args:
        name: The setting's name.
        value: What was given.
        kind: int or float.
        what: What a number must be, in words.
        fits: Whether one is that.
        each: What there is one of for each number.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> one_or_several("width", [3, 4], int, "an integer", lambda n: True)
        (3, 4)
    """
    several = isinstance(value, list | tuple)
    numbers = value if several else [value]
    if not numbers or not all(_is_number(n, kind) and _fits(n, fits) for n in numbers):
        raise ValueError(f"{name} must be {what}, or one for each {each}, got {shown(value)}")
    return tuple(kind(n) for n in numbers) if several else kind(value)


def number_of_blocks(blocks: Any, channels: Any) -> int | None:
    """The number of blocks that ``blocks_per_stage`` and ``channels`` mean, None where they are no numbers.

    Args:
        blocks: One number for all stages, or one for each; None: 3.
        channels: Likewise; None: three stages.

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
    """A number >= 1, or a word that stands for a choice.

    Args:
        name: The setting's name.
        value: What was given.
        words: The words.
        what: What a number must be, in words.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> count_or_word("batch_size", 3, ("auto",), "an integer >= 1")
        3
    """
    known = isinstance(value, str) and value in words
    if not known and not (_is_number(value, int) and value >= 1):
        raise ValueError(f"{name} must be {', '.join(map(repr, words))} or {what}, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as messages show it, cut where it is very long.

    Args:
        value: Anything.

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
    """What a message says of a setting that there is not.

    Args:
        key: Its name.
        known: The names there are.

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
