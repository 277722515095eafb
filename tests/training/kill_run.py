"""A small run with everything that a checkpoint holds, to be killed at any moment.

    python -m training.kill_run FOLDER KIND

KIND says how its layers change: "pruned", or "refined" and then pruned. Started again on the same folder it goes on, as
the command line does.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning, Refinement, parameter_groups
from taulearn.penalties import L1
from taulearn.training import Run
from training.support import digits, network, run_fit

EPOCHS = 25


POLICIES: dict[str, dict[str, Any]] = {
    "pruned": {"penalties": [L1(2.5, proximal=True)], "pruning": Pruning(0.02, every=30)},
    "refined": {"refinement": Refinement(12, until=0.5, rest=15), "pruning": Pruning(target_blocks=7, by=0.9)},
}


def main(folder: Path, kind: str = "pruned") -> None:
    """Start the run in this folder, or go on with it."""
    torch.set_num_threads(1)
    model = network(8, dropout=0.1, init=[0.5, 0.03, 0.3, 0.1, 0.2, 0.17, 0.3, 0.25])
    optimizer = torch.optim.Adam(parameter_groups(model, lr=2e-3, tau_lr=1e-3, weight_decay=1e-4))
    averaged = AveragedModel(model)
    resume = (folder / "run.toml").exists()
    run = Run.open(folder) if resume else Run.create(folder, {"epochs": EPOCHS})
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    run_fit(
        model,
        digits(400),
        optimizer,
        epochs=EPOCHS,
        batch_size=20,
        **POLICIES[kind],
        validation=digits(100),
        averaged=averaged,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.8),
        run=run,
        resume=resume,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
