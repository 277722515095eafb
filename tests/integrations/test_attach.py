"""``attach`` in loops around accelerate, and in a module of Lightning that steps its optimiser by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from taulearn import Pruning, attach, fit
from taulearn.optim import parameter_groups
from taulearn.penalties import L1, L2
from training.support import LOSS, assert_same_weights, digits, network

accelerate = pytest.importorskip("accelerate")
lightning_runs = pytest.importorskip("integrations.lightning_runs")
Data = torch.utils.data.TensorDataset
CASES: dict[str, tuple[Any, Any]] = {
    "target": ((), Pruning(target_blocks=2)),
    "proximal": (L1(1.0, proximal=True), Pruning(0.1, every=3)),
    "differentiated": (L1(0.1), None),
}


def made() -> tuple[Any, torch.optim.Optimizer]:
    model = network()
    return model, torch.optim.AdamW(parameter_groups(model, 0.02, weight_decay=0.01))


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_fit(case: str) -> None:
    """To the bit, and to 1e-6 where a penalty is differentiated; the target is reached."""
    penalties, pruning = CASES[case]
    loader = torch.utils.data.DataLoader(Data(*digits(200)), batch_size=40)
    accelerator = accelerate.Accelerator(cpu=True)
    model, bare = made()
    wrapped, optimizer, batches = accelerator.prepare(model, bare, loader)
    session = attach(model, optimizer, penalties=penalties, pruning=pruning, iterations=15, iterations_per_epoch=5)
    for _ in range(3):
        for inputs, targets in batches:
            optimizer.zero_grad()
            accelerator.backward(session.loss(LOSS(wrapped(inputs), targets)))
            optimizer.step()
    session.detach()
    theirs, optimizer = made()
    history = fit(
        theirs,
        loader,
        loss=LOSS,
        optimizer=optimizer,
        epochs=3,
        penalties=penalties,
        pruning=pruning,
        compile="never",
        progress=False,
    )
    if case == "differentiated":
        torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)
    else:
        assert_same_weights(model, theirs)
        np.testing.assert_array_equal(np.float32(session.history.iterations["loss"]), history.iterations["loss"])
        assert session.history.deletions == history.deletions
        assert history.deletions
    if case == "target":
        assert model.time_steps.num_steps == 2


def test_accumulated_batches_are_one_iteration() -> None:
    loader = torch.utils.data.DataLoader(Data(*digits(200)), batch_size=20)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, bare = made()
    _, optimizer, batches = accelerator.prepare(model, bare, loader)
    session = attach(model, optimizer, pruning=Pruning(target_blocks=2), iterations=15)
    losses = []
    for _ in range(3):
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                loss = session.loss(LOSS(model(inputs), targets))
                losses.append(loss.item())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert session.history.num_iterations == 15
    assert model.time_steps.num_steps == 2
    np.testing.assert_allclose(session.history.iterations["loss"], np.reshape(losses, (15, 2)).mean(1), rtol=1e-6)


class ByHand(lightning_runs.Built):  # type: ignore[name-defined,misc]
    """Lightning hands such an optimiser a closure that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        length = lightning_runs.EPOCHS * len(lightning_runs.batches())
        self.session = attach(
            self.model, self.optimizers(), penalties=L2(0.1), pruning=Pruning(target_blocks=2), iterations=length
        )

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.session.loss(super().training_step(batch, index)))
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_in_lightning_by_hand() -> None:
    module = ByHand()
    lightning_runs.trainer().fit(module, lightning_runs.batches())
    module.session.detach()
    history = module.session.history
    assert module.steps.num_steps == 2
    assert history.num_iterations == lightning_runs.EPOCHS * len(lightning_runs.batches())
    assert (history.iterations["penalty.l2"] > 0).all()
