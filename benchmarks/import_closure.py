"""How much of this package a call loads, and how large the package is: modules and physical lines.

Counted in ``sys.modules`` after the call, each in a process of its own. The core: the rooms in which the method lies.
``python benchmarks/import_closure.py`` prints the table.
"""

import subprocess
import sys
from pathlib import Path

import taulearn

SOURCE = Path(taulearn.__file__).parent
CORE = ("functional.py", "nn", "caputo", "penalties", "adaptivity", "wrapping")

CALLS = {
    "import taulearn": "",
    "parameter_groups of a wrapped model": """
import torch
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        return x + self.linear(x)
model = taulearn.wrap(torch.nn.Sequential(Block(), Block()), example_inputs=torch.ones(2, 4))
assert len(taulearn.parameter_groups(model, 0.1)) == 2
""",
    "fit, one epoch with a deletion": """
import torch
model = taulearn.nn.resnet(2, 3, 1, 4, init=[0.5, 1e-5, 0.5, 0.5])
optimizer = torch.optim.SGD(taulearn.parameter_groups(model, 1e-4), lr=1e-4)
history = taulearn.fit(model, (torch.ones(8, 2), torch.ones(8, 1)), loss=torch.nn.functional.mse_loss,
                       optimizer=optimizer, epochs=1, batch_size=4, pruning=taulearn.Pruning(0.01), progress=False)
assert len(history.deletions) == 1
""",
}
BUDGETS = {"import taulearn": 200, "parameter_groups of a wrapped model": 4350, "fit, one epoch with a deletion": 9000}

_COUNT = """
import sys, taulearn
{call}
ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "taulearn"]
files = {{module.__file__ for module in ours if getattr(module, "__file__", None)}}
print(len(files), sum(len(open(f, encoding="utf-8").read().splitlines()) for f in files))
"""


def loaded(call: str) -> tuple[int, int]:
    """Modules of this package that a program loads, and their lines."""
    program = [sys.executable, "-W", "ignore", "-c", _COUNT.format(call=call)]
    modules, lines = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return int(modules), int(lines)


def size(*parts: str) -> tuple[int, int]:
    """Modules and lines of files and folders of the package; all of it without any."""
    places = [SOURCE / part for part in parts] or [SOURCE]
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*.py"))]
    return len(files), sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files)


def main() -> None:
    rows = [("the wheel", *size(), 20000), ("the core", *size(*CORE), 10000)]
    rows += [(name, *loaded(call), BUDGETS[name]) for name, call in CALLS.items()]
    print(f"{'':40}{'modules':>8}{'lines':>8}{'budget':>8}")
    for name, modules, lines, budget in rows:
        print(f"{name:40}{modules:8}{lines:8}{budget:8}")


if __name__ == "__main__":
    main()
