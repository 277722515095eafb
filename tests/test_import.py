"""What `import taulearn` costs and offers."""

import importlib.metadata
import subprocess
import sys

import pytest

import taulearn

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
