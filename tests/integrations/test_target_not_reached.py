"""Trainers that stop before a target of pruning is reached: a word of it, and none where it is reached."""

import re
import warnings
from pathlib import Path
from typing import Any

from integrations import huggingface_runs as trainers, test_lightning as lightnings
from taulearn import Pruning

LEFT = r"target of pruning is not reached: [45] blocks are left, target_blocks=2"


def messages(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in said if "target of pruning" in str(each.message)]


def test_trainer(tmp_path: Path) -> None:
    def run(stop: int | None, pruning: Pruning) -> list[str]:
        trainer = trainers.trainer(
            trainers.vit(), trainers.TimeStepsCallback(pruning=pruning, progress=False), tmp_path
        )
        if stop is not None:
            trainer.add_callback(trainers.stopping(stop))
        return messages(trainer.train)

    (said,) = run(6, Pruning(target_blocks=2))
    assert re.search(LEFT, said)
    assert "train longer" in said
    assert run(None, Pruning(target_blocks=2)) == run(6, Pruning(0.01)) == []


def test_lightning() -> None:
    class Stopping(lightnings.lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    def run(pruning: Pruning, *more: Any) -> list[str]:
        callback = lightnings.TimeStepsCallback(pruning=pruning, progress=False)
        trainer = lightnings.lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, *more],
        )
        data = lightnings.DataLoader(lightnings.TensorDataset(*lightnings.digits()), batch_size=20)
        return messages(lambda: trainer.fit(lightnings.Module(), data))

    (said,) = run(Pruning(target_blocks=2), Stopping())
    assert "target_blocks=2 asked for" in said
    assert run(Pruning(target_blocks=2)) == run(Pruning(0.01), Stopping()) == []
