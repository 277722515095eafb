"""Packages whose public names are imported when they are asked for (PEP 562)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module


def lazily(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, from its modules and the public names in them.

    Under the key "." are names that are modules of the package themselves.
    """
    home = {name: module for module, names in homes.items() for name in names}
    public = sorted(home)

    def get(name: str) -> object:
        if name not in home:
            nearest = get_close_matches(name, public, n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        module = home[name]
        value = import_module(f".{name}", package) if module == "." else getattr(import_module(module, package), name)
        vars(sys.modules[package])[name] = value
        return value

    return get, lambda: [*public], public
