"""Cost and public names of `import taulearn`."""

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

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


OF_THE_APP = ("jinja2", "matplotlib", "plotly", "pooch", "psutil", "pydantic", "tyro")
WITHOUT = f"""
import importlib.abc
import sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_THE_APP}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def without_the_app(program):
    return subprocess.run([sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, check=False)


def test_core_dependencies_train_and_prune_and_save(tmp_path):
    done = without_the_app(f"""
import torch, taulearn
train = taulearn.data.load("digits")
model = taulearn.nn.resnet(64, 10, 10, hidden_layers=4, init=[0.5, 1e-6, 0.5, 0.5])
optimizer = torch.optim.SGD(taulearn.parameter_groups(model, lr=0.01))
history = taulearn.fit(model, train, validation=train, loss=torch.nn.functional.cross_entropy, optimizer=optimizer,
                       epochs=1, pruning=taulearn.Pruning(0.01), run={str(tmp_path / "run")!r})
print(taulearn.summary(model))
print(taulearn.load_model({str(tmp_path / "run")!r}).time_steps.origin)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("(0, 2, 3)\n")


@pytest.mark.parametrize(
    "program",
    [
        "import taulearn.experiments; taulearn.experiments.TrainConfig()",
        "import taulearn; taulearn.report.write_html([], 'report.html')",
        "import taulearn; taulearn.report.figures.palette(99)",
        "import taulearn; from taulearn.app.command_line import main; sys.exit(main(['data', 'list']))",
    ],
)
def test_what_needs_the_app_names_the_extra(program):
    done = without_the_app(program)
    assert done.returncode == 1
    assert "pip install 'taulearn[app]'" in done.stderr.splitlines()[-1]


CLOSURE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "import_closure.py"))


@pytest.mark.parametrize("call", CLOSURE["CALLS"])
def test_calls_load_no_more_of_the_package_than_they_may(call):
    _, lines = CLOSURE["loaded"](CLOSURE["CALLS"][call])
    assert lines <= CLOSURE["BUDGETS"][call]
