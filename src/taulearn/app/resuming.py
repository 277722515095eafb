"""What may be changed in a run's settings before it is resumed, and what may not."""

from ..training.checkpoint import read_start
from ..training.run_folder import Run
from .config import TrainConfig

MAY_CHANGE = {"epochs", "threads", "device", "checkpoint_every", "trace", "tensorboard"}
"""Settings that do not decide the iterates, and the number of epochs, which may grow."""

_SCHEDULES = ("cosine", "onecycle", "step")


def check_resumed(config: TrainConfig, run: Run) -> None:
    """Refuse settings that the run was not started with.

    Args:
        config: The settings it would be resumed with.
        run: The run.

    Raises:
        FileNotFoundError: If the run has results, but no checkpoint.
        ValueError: If a setting differs that may not, or fewer epochs are asked for than are done.
    """
    run.check_resumable()
    found = read_start(run.checkpoints)
    if found is None:
        return
    start, position = found
    now, fields = config.record(), TrainConfig.model_fields
    began = {name: start.config.get(name, fields[name].default) for name in fields}
    changed = [
        f"{name} = {now.get(name)!r} (was {began[name]!r})"
        for name in fields
        if name not in MAY_CHANGE | {"run", "overwrite"} and now.get(name) != began[name]
    ]
    if start.config and changed:
        raise ValueError(
            f"{run.path / 'run.toml'} must hold the settings that the run was started with, got {', '.join(changed)}: "
            "put them back, or start a new run with them (taulearn train --config FILE --run OTHER)"
        )
    if config.scheduler in _SCHEDULES and config.epochs != began["epochs"]:
        raise ValueError(
            f"epochs must stay {began['epochs']} with scheduler {config.scheduler!r}, whose learning rates are laid "
            f"out over all epochs, got {config.epochs}: start a new run"
        )
    if config.epochs < position.epoch:
        raise ValueError(
            f"epochs must be at least {position.epoch}, the number that are done, got {config.epochs}: "
            "start a new run for fewer"
        )
