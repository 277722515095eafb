"""The public ``fit``: arguments checked and put together; the loop itself is in training/loop.py."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from .._deletion import check_holds
from .._errors import positive_integer, unknown_name
from ..penalties import Penalty, time_steps_of
from ..pruning import Pruning, check_prunable
from .batches import Batch, LoaderBatches, TensorBatches, make_batches
from .checkpoint import Parts
from .events import EpochEnd
from .history import History
from .loop import Loop, Settings
from .metrics import Metric, choose_metrics
from .objective import Loss, Objective, StepOptions, as_float
from .run import Run, tidy
from .tensorboard import TensorBoard


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
    compile: str = "auto",  # noqa: A002  it is what torch calls it
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
        train: A pair of tensors (inputs, targets), a torch Dataset, or a DataLoader. uint8 inputs are images, scaled to
            [0, 1] in the step.
        loss: Maps (output, target) to a scalar, the mean over the batch.
        optimizer: Any torch optimiser of the model's parameters (see ``taulearn.parameter_groups``).
        epochs: Number of epochs in all.
        batch_size: Samples per iteration, reshuffled each epoch; a DataLoader has its own.
        penalties: Added to the loss; each is recorded.
        pruning: When and at which threshold layers are deleted. None: never.
        validation: Data like ``train``, evaluated before training and after each epoch.
        run: Folder for configuration, record, checkpoints and model. None: nothing is written.
        resume: Go on from the newest checkpoint of ``run``; everything else must be as at the start (``epochs`` may
            have grown).
        callbacks: Called with an :class:`EpochEnd` after each epoch; may raise :class:`StopTraining`.
        metrics: "auto" (accuracy for class numbers), or names with functions (output, target) -> mean.
        device: Where to train. None: where the model is.
        compile: "auto" (compiled where the run is long enough to pay for it), "always" or "never".
        scheduler: A learning rate scheduler of ``optimizer``; OneCycleLR and CyclicLR step each iteration, all others
            each epoch.
        seed: Of the batches' order, but for a DataLoader. Initial weights and dropout follow torch's global generator
            (torch.manual_seed).
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
        Interrupted: On Ctrl-C, after a checkpoint was written (a Dataset or a DataLoader cannot start in the middle of
            an epoch: there the last checkpoint stands).
        FileExistsError: If the run's folder is not empty, and neither resume nor overwrite is given.
        ValueError, TypeError: If an argument does not fit; the message names it.

    Example:
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> network, x = resnet(1, 8, 1, 3), torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> mse = nn.functional.mse_loss
        >>> history = fit(
        ...     network, (x, x.sin()), loss=mse, optimizer=optimizer, epochs=5, batch_size=16, progress=False
        ... )
        >>> history.num_iterations, history.iterations["tau"].shape
        (20, (20, 3))
    """
    if device is not None:
        model.to(device)
    where = time_steps_of(model).values.device
    batches = make_batches(train, batch_size, seed, where)
    objective = Objective(model, loss, penalties)
    options = StepOptions(clip_norm, accumulate, precision, averaged)
    _check_options(
        {"epochs": epochs, "checkpoint_every": checkpoint_every, "accumulate": accumulate},
        {"compile": (compile, ("auto", "always", "never")), "precision": (precision, ("float32", "bf16"))},
        clip_norm,
        seed,
    )
    if pruning is not None:
        if not isinstance(pruning, Pruning):
            raise TypeError(f"pruning must be a Pruning policy, got {pruning!r}: write pruning=taulearn.Pruning(0.01)")
        check_prunable(model)
    check_holds(optimizer, model)
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must change the learning rate of optimizer, got one that was made for another")
    if clip_norm is not None and isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("clip_norm must be None with LBFGS, whose line search needs the true gradient")
    sample = batches.sample()
    _check_data("train", model, sample, batches)
    if validation is not None:
        held_out = make_batches(validation, batch_size, seed, where, argument="validation")
        _check_data("validation", model, sample := held_out.sample(), held_out)
        if isinstance(held_out, TensorBatches):
            validation = held_out.inputs, held_out.targets
    choose_metrics(metrics, sample[1])
    if tensorboard:
        callbacks = (*callbacks, TensorBoard(run))
    config = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    folder = _open_run(run, config, resume=resume, overwrite=overwrite)
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
    return Loop(objective, batches, Parts(model, optimizer, scheduler, averaged), options, settings, folder).run(
        resume=resume
    )


def _check_options(
    counts: Mapping[str, int], names: Mapping[str, tuple[str, Sequence[str]]], clip_norm: float | None, seed: int
) -> None:
    for name, value in counts.items():
        positive_integer(name, value)
    for name, (given, known) in names.items():
        if given not in known:
            raise unknown_name(name, given, known)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")


def _open_run(
    run: Run | str | os.PathLike[str] | None, config: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Run | None:
    """The run's folder, made or found; what decides the order of the batches must not have changed."""
    if run is None:
        if resume:
            raise ValueError("run must name the run's folder when resume=True, got None")
        return None
    if not resume:
        if not isinstance(run, Run):
            return Run.create(run, config, overwrite=overwrite)
        if any(run.checkpoints.glob("*.safetensors")):
            raise FileExistsError(
                f"run {str(run.path)!r} has checkpoints of an earlier training: "
                "pass resume=True to go on with it, or choose another folder"
            )
        return run
    opened = run if isinstance(run, Run) else Run.open(run)
    for name in ("batch_size", "seed"):
        began = opened.config.get(name)
        if isinstance(began, int) and began != config[name]:
            raise ValueError(f"{name} must be {began} as at the start of the run, got {config[name]}")
    tidy(opened.path)
    return opened


@torch.no_grad()
def _check_data(argument: str, model: nn.Module, sample: Batch, batches: TensorBatches | LoaderBatches) -> None:
    """One forward pass on a few samples, so that data that do not fit are named before training starts."""
    dtype = time_steps_of(model).values.dtype
    inputs, targets = sample
    if inputs.is_floating_point() and inputs.dtype != dtype:
        raise TypeError(
            f"{argument} must hold inputs of the network's type {dtype}, got {inputs.dtype}: "
            f"convert them with inputs.to({dtype}), or build the network with that dtype"
        )
    training = model.training
    model.eval()
    try:
        output = model(as_float(inputs, dtype))
    finally:
        model.train(training)
    known = batches.targets if isinstance(batches, TensorBatches) else targets
    if known.ndim == 1 and known.is_floating_point() and isinstance(output, Tensor) and output.shape[1:] == (1,):
        raise ValueError(
            f"{argument} must hold targets (n, 1) like the network's outputs, got shape {tuple(known.shape)}: "
            "a loss would compare every sample with every other; use targets.unsqueeze(1)"
        )
    if known.ndim == 1 and not known.is_floating_point() and isinstance(output, Tensor) and output.ndim == 2:
        classes = output.shape[1]
        outside = (known >= classes) | ((known < 0) & (known != -100))
        if bool(outside.any()):
            at = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"{argument} must hold labels in 0 .. {classes - 1}, got {int(known[at])} at sample {at}: "
                "renumber the classes, or build the network with more outputs"
            )
