"""A residual network in Lightning that learns its time steps and loses layers while it trains.

The module knows nothing of it: the callback is all that Lightning's Trainer needs. Here it is told how many layers to
keep, and finds out which. Run

    python examples/lightning_trainer.py
"""

import argparse
import warnings

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import taulearn
from taulearn import Pruning
from taulearn.integrations.lightning import TimeStepsCallback


class Digits(lightning.LightningModule):
    """A network, its loss and its optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.network = taulearn.nn.resnet(64, 50, 10, hidden_layers=8)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        return cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(taulearn.parameter_groups(self.network, lr=2e-3, tau_lr=1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs
    warnings.filterwarnings("ignore", module="lightning")

    lightning.seed_everything(0, verbose=False)
    train, test = (taulearn.data.load("digits", split=split) for split in ("train", "test"))
    batches = DataLoader(TensorDataset(*train), batch_size=20, shuffle=True)

    module = Digits()
    callback = TimeStepsCallback(pruning=Pruning(target_blocks=4))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)

    layers = callback.history.epochs["layers"]
    print(f"layers: {layers[0]} -> {layers[-1]}, those left: {list(module.network.time_steps.origin)}")
    print(f"test accuracy: {taulearn.training.evaluate(module.network, test)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
