"""The papers' suites, by name; each module has one object, SUITE."""

from importlib import import_module

from ..._errors import unknown_name
from ..suite import Suite

NAMES = ("herberg2023", "antil2022", "puettschneider2025", "beyond")


def load(name: str) -> Suite:
    """The suite of this name.

    Args:
        name: One of NAMES.

    Raises:
        ValueError: If there is none.

    Example:
        >>> load("herberg2023").claims[0].id
        'H1'
    """
    if name not in NAMES:
        raise unknown_name("suite", name, NAMES)
    suite: Suite = import_module(f".{name}", __name__).SUITE
    return suite
