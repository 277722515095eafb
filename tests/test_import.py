"""What `import taulearn` costs and offers."""

import ast
import graphlib
import importlib.metadata
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import taulearn

SOURCE = Path(taulearn.__file__).parent
ROOMS = ("functional", "caputo", "nn", "penalties", "diagnostics", "experiments", "cli")
HEAVY = {
    "jaxtyping",
    "matplotlib",
    "numpy",
    "plotly",
    "pooch",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "tyro",
}


def test_import_brings_no_dependency():
    program = "import sys, taulearn; dir(taulearn); print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "taulearn" in loaded
    assert not loaded & HEAVY


def test_dir_is_what_all_names():
    assert dir(taulearn) == sorted(taulearn.__all__)
    assert len(set(taulearn.__all__)) == len(taulearn.__all__)


@pytest.mark.parametrize("name", taulearn.__all__)
def test_public_name_resolves(name):
    value = getattr(taulearn, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name
    assert vars(taulearn)[name] is value


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'TimeStep': did you mean 'TimeSteps'\?"):
        _ = taulearn.TimeStep
    with pytest.raises(AttributeError, match=r"no attribute 'zzzz'$"):
        _ = taulearn.zzzz


def test_version_is_that_of_the_distribution():
    assert taulearn.__version__ == importlib.metadata.version("taulearn")


def imports_of(file):
    """The rooms, top-level modules and packages, that a file of the package imports when it is imported itself."""
    package = file.relative_to(SOURCE.parent).parent.parts
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                name = (*stem, alias.name)
                if name[0] == "taulearn" and len(name) > 1:
                    yield name[1]


def test_rooms_import_downwards():
    graph = {}
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            graph.setdefault(room, set()).update(set(imports_of(file)) - {room, "__version__"})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError where there is a circle
    for below, above in itertools.pairwise(ROOMS):
        assert above not in reached(graph, below), f"{below} must not import {above}"


def reached(graph, room):
    """All that a room imports, by way of others, too."""
    found, todo = set(), [room]
    while todo:
        new = graph.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found
