"""The public ``fit``: arguments checked and put together; the loop itself is in training/loop.py."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from .._errors import unknown_name
from ..penalties import Penalty, time_steps_of
from ..pruning import Pruning, check_holds, check_prunable
from .batches import TensorBatches, make_batches
from .checkpoint import Parts
from .events import EpochEnd
from .history import History
from .loop import Loop, Settings
from .metrics import Metric
from .objective import Loss, Objective, StepOptions, as_float
from .run import Run


def fit(
    model: nn.Module,
    train: Any,
    *,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 100,
    penalties: Sequence[Penalty] = (),
    pruning: Pruning | None = None,
    validation: Any = None,
    run: Run | str | os.PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[EpochEnd], None]] = (),
    metrics: str | Mapping[str, Metric] = "auto",
    device: torch.device | str | None = None,
    compile: str = "auto",
    scheduler: LRScheduler | None = None,
    seed: int = 0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    precision: str = "float32",
    averaged: AveragedModel | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
    tensorboard: bool = False,
    overwrite: bool = False,
) -> History:
    """Train a model, its time steps among the parameters, and prune it on the way.

    Args:
        model: A network with time steps; trained in place.
        train: A pair of tensors (inputs, targets), a torch Dataset, or a DataLoader. uint8 inputs are images, scaled to [0, 1] in the step.
        loss: Maps (output, target) to a scalar, the mean over the batch.
        optimizer: Any torch optimiser of the model's parameters (see ``taulearn.parameter_groups``).
        epochs: Number of epochs in all.
        batch_size: Samples per iteration, reshuffled each epoch; a DataLoader has its own.
        penalties: Added to the loss; each is recorded.
        pruning: When and at which threshold layers are deleted. None: never.
        validation: Data like ``train``, evaluated before training and after each epoch.
        run: Folder for configuration, record, checkpoints and model. None: nothing is written.
        resume: Go on from the newest checkpoint of ``run``; everything else must be as at the start.
        callbacks: Called with an :class:`EpochEnd` after each epoch; may raise :class:`StopTraining`.
        metrics: "auto" (accuracy for class numbers), or names with functions (output, target) -> mean.
        device: Where to train. None: where the model is.
        compile: "auto" (compiled where the run is long enough to pay for it), "always" or "never".
        scheduler: A learning rate scheduler of ``optimizer``; OneCycleLR and CyclicLR step each iteration, all others each epoch.
        seed: Of the batches' order. Initial weights and dropout follow torch's global generator (torch.manual_seed).
        clip_norm: Largest norm of the gradient. None: no clipping.
        accumulate: Parts into which each batch is split to save memory; the step stays that of the whole batch.
        precision: "float32" (the model's own type) or "bf16" (autocast).
        averaged: torch's AveragedModel of ``model``, updated each iteration and pruned alike.
        checkpoint_every: Epochs between checkpoints.
        progress: Whether to show a bar (on a terminal) or a line per epoch.
        tensorboard: Whether to write TensorBoard events into the run's folder.
        overwrite: Whether an existing run in this folder is deleted first.

    Returns:
        The record.

    Raises:
        Diverged: If the loss stops being finite. The last good checkpoint is kept.
        Interrupted: On Ctrl-C, after a checkpoint was written.
        ValueError, TypeError: If an argument does not fit; the message names it.

    Example:
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> network, x = resnet(1, 8, 1, 3), torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> history = fit(network, (x, x.sin()), loss=nn.functional.mse_loss, optimizer=optimizer, epochs=5, batch_size=16, progress=False)
        >>> history.num_iterations, history.iterations["tau"].shape
        (20, (20, 3))
    """
    if device is not None:
        model.to(device)
    where = time_steps_of(model).values.device
    batches = make_batches(train, batch_size, seed, where)
    objective = Objective(model, loss, penalties)
    options = StepOptions(clip_norm, accumulate, precision, averaged)
    for name, value in {"epochs": epochs, "checkpoint_every": checkpoint_every, "accumulate": accumulate}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if compile not in ("auto", "always", "never"):
        raise unknown_name("compile", compile, ("auto", "always", "never"))
    if precision not in ("float32", "bf16"):
        raise unknown_name("precision", precision, ("float32", "bf16"))
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}")
    if pruning is not None:
        if not isinstance(pruning, Pruning):
            raise TypeError(f"pruning must be a Pruning policy, got {pruning!r}: write pruning=taulearn.Pruning(0.01)")
        check_prunable(model)
    check_holds(optimizer, model)
    _check_data(model, *batches.sample(), batches.targets if isinstance(batches, TensorBatches) else None)
    if isinstance(validation, tuple | list):
        validation = tuple(t.to(where) for t in validation)
    folder = _open_run(run, resume=resume, overwrite=overwrite, config={"epochs": epochs, "batch_size": batch_size, "seed": seed})
    if tensorboard:
        from .tensorboard import TensorBoard

        callbacks = (*callbacks, TensorBoard(folder))
    settings = Settings(
        epochs=epochs,
        pruning=pruning,
        validation=validation,
        metrics=metrics,
        callbacks=tuple(callbacks),
        compile=compile,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return Loop(objective, batches, Parts(model, optimizer, scheduler, averaged), options, settings, folder).run(resume=resume)


def _open_run(
    run: Run | str | os.PathLike[str] | None, *, resume: bool, overwrite: bool, config: Mapping[str, Any]
) -> Run | None:
    if run is None:
        if resume:
            raise ValueError("run must name the run's folder when resume=True, got None")
        return None
    if isinstance(run, Run):
        return run
    return Run.open(run) if resume else Run.create(run, config, overwrite=overwrite)


@torch.no_grad()
def _check_data(model: nn.Module, inputs: Tensor, targets: Tensor, all_targets: Tensor | None) -> None:
    """One forward pass on a few samples, so that data that do not fit are named before training starts."""
    dtype = time_steps_of(model).values.dtype
    if inputs.is_floating_point() and inputs.dtype != dtype:
        raise TypeError(
            f"train must hold inputs of the network's type {dtype}, got {inputs.dtype}: convert them with inputs.to({dtype}), "
            "or build the network with that dtype"
        )
    training = model.training
    model.eval()
    try:
        output = model(as_float(inputs, dtype))
    finally:
        model.train(training)
    known = targets if all_targets is None else all_targets
    if known.ndim == 1 and not known.is_floating_point() and isinstance(output, Tensor) and output.ndim == 2:
        classes = output.shape[1]
        outside = (known >= classes) | ((known < 0) & (known != -100))
        if bool(outside.any()):
            at = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"train must hold labels in 0 .. {classes - 1}, got {int(known[at])} at sample {at}: "
                "renumber the classes, or build the network with more outputs"
            )
