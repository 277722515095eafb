"""The documentation's settings: `make docs` builds it strictly, and runs every code cell and notebook."""

import os
from importlib.metadata import version as installed
from typing import Any

project = "taulearn"
author = "The taulearn developers"
copyright = "The taulearn developers, Apache-2.0"
version = release = installed("taulearn")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a network
]
exclude_patterns = ["_build", "results/README.md", "results/*/table.md"]
nitpicky = False
html_theme = "furo"
html_title = f"taulearn {version}"
html_static_path: list[str] = []

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = os.environ.get("TAULEARN_DOCS_EXECUTE", "cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def setup(app: Any) -> None:
    """What autodoc leaves to the project."""
    app.connect("autodoc-process-docstring", literal_formulas)
    app.connect("autodoc-skip-member", skip_foreign)


def literal_formulas(_app: Any, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Set the indented formulas of a module's docstring as they stand in the source."""
    if what != "module":
        return
    result: list[str] = []
    for line in lines:
        if line.startswith("    ") and result and not result[-1] and not inside(result):
            result += ["::", ""]
        result.append(line)
    lines[:] = result


def inside(lines: list[str]) -> bool:
    """Whether the last line that is not empty belongs to an indented block."""
    last = next((line for line in reversed(lines) if line), "")
    return last.startswith("    ")


def skip_foreign(_app: Any, _what: str, _name: str, obj: object, skip: bool, _options: object) -> bool:
    """Leave out what a module imports from elsewhere."""
    return skip or not str(getattr(obj, "__module__", "taulearn") or "taulearn").startswith("taulearn")
