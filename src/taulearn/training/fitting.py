"""The public ``fit``: arguments checked and put together; the loop itself is in training/loop.py."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from .._batches import check_loss, leading, split
from .._distributed import refuse_distributed
from ..adaptivity.adaptation import Adaptation
from ..adaptivity.optimizer_state import bare
from ..adaptivity.policies import Pruning
from ..nn.time_steps import time_steps_of
from ..optim.projections import check_projections
from ..penalties import Penalty
from .batches import TensorBatches, make_batches
from .check_arguments import (
    Metric,
    bare_scheduler,
    check_callbacks,
    check_metrics,
    check_optimizer,
    check_options,
    check_parts,
    check_policies,
    terms,
)
from .check_data import check_data
from .distributed import begin_alike, check_shares, has_whole_batches, join
from .events import EpochEnd
from .history import History
from .interruption import announced
from .loop import Loop, Settings
from .objective import Loss, Objective, StepOptions, as_float, as_penalties, input_dtype
from .parts import Parts
from .session import active_penalties

if TYPE_CHECKING:
    from ..adaptivity.refiner import Refinement
    from .run_folder import Run


def fit(
    model: nn.Module,
    train: Any,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 100,
    penalties: Penalty | Sequence[Penalty] = (),
    pruning: Pruning | None = None,
    refinement: "Refinement | None" = None,
    validation: Any = None,
    run: "Run | str | os.PathLike[str] | None" = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[EpochEnd], None]] = (),
    metrics: str | Sequence[str] | Mapping[str, Metric] = "auto",
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
    """Train a model, its time steps among the parameters, and prune or refine it on the way.

    Started by torchrun, or where torch.distributed is initialised, all processes train one model together: each takes
    its share of every batch, and gradients are averaged. Rank 0 decides, evaluates and writes; callbacks run in each.

    Args:
        model: A network with time steps; trained in place.
        train: A pair of tensors (inputs, targets), a torch Dataset, or a DataLoader. uint8 inputs are images, scaled to
            [0, 1] in the step. Batches of a DataLoader are pairs, whose inputs may be several tensors, or dictionaries
            of the model's keywords with "labels" as targets, padded as each batch needs.
        loss: Maps (output, target) to a scalar. None: the loss that the model itself returns when it is called with
            labels, as models of transformers do. Torch's own losses (functions, modules, functools.partial of them, or
            a function that returns the answer of one, a multiple of a mean, or a sum of several that count alike) are
            weighted by what they count where a batch is taken in parts (``accumulate``, several processes, validation):
            labels that are not ignored, class weights, elements; sums are added up. Any other is taken for a mean over
            samples. The output may be anything the loss takes.
        optimizer: Any torch optimiser of the model's parameters (see ``taulearn.parameter_groups``). Several are not
            possible here: write the loop yourself, with ``taulearn.attach``.
        epochs: Number of epochs in all.
        batch_size: Samples per iteration, of all processes together, reshuffled each epoch; a DataLoader has its own.
            The last batch of an epoch may be smaller; where it is too small for batch normalisation (a single sample),
            it goes with the one before, and a DataLoader that ends so is refused.
        penalties: One or several, added to the loss; each is recorded.
        pruning: When and at which threshold layers are deleted. None: never.
        refinement: When layers come in, and how many. None: never.
        validation: Data like ``train``, evaluated before training and after each epoch.
        run: Folder for configuration, record, checkpoints and model. None: nothing is written.
        resume: Go on from the newest checkpoint of ``run``; all that decides the iterates must be as at the start
            (``epochs`` may have grown), and what is seen to differ is refused. The optimiser's options, learning rates
            among them, are those of the checkpoint.
        callbacks: Called with an :class:`EpochEnd` after each epoch; may raise :class:`StopTraining`.
        metrics: "auto" (accuracy for class numbers; perplexity, exp of the mean loss of a token, for language models),
            "accuracy" and "perplexity" in a list, or names with functions (output, target) -> mean.
        device: Where to train. None: where the model is.
        compile: "auto" (compiled where the run is long enough to pay for it), "always" or "never".
        scheduler: A learning rate scheduler of ``optimizer``; OneCycleLR, CyclicLR and combinations that contain one
            of them (SequentialLR, ChainedScheduler) step each iteration, all others each epoch.
        seed: Of the batches' order, but for a DataLoader. Initial weights and dropout follow torch's global generator
            (torch.manual_seed).
        clip_norm: Largest norm of the gradient. None: no clipping.
        accumulate: Parts into which each batch is split to save memory, fewer where batch normalisation would get a
            single sample; the step stays that of the whole batch, batch normalisation apart. A part
            of which all labels are ignored counts nothing; a batch of which all are ends the training as
            :class:`Diverged`, because its mean is 0/0.
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
            an epoch: there the last checkpoint stands, and the message says what is lost).
        FileNotFoundError: If there is nothing to resume, or a run whose checkpoints are gone.
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
    with announced(run), ExitStack() as until_failure:
        refuse_distributed("model", model, "fit")
        ranks = until_failure.enter_context(join(model))
        optimizer, scheduler = bare(optimizer), bare_scheduler(scheduler)
        _put_on(device, model)
        where = time_steps_of(model).values.device
        penalties = as_penalties(penalties)
        check_loss(loss)
        check_options(
            {"epochs": epochs, "checkpoint_every": checkpoint_every, "accumulate": accumulate},
            {"compile": (compile, ("auto", "always", "never")), "precision": (precision, ("float32", "bf16"))},
            clip_norm,
            seed,
        )
        check_callbacks(callbacks)
        check_optimizer(optimizer, model, clip_norm)
        check_policies(pruning, refinement, penalties)
        compiling = ranks.check(model, optimizer, [pruning, refinement, averaged], penalties, compile)
        batches = make_batches(train, batch_size, seed, where)
        check_shares(ranks, batches, batch_size, resumed=resume)
        sample = batches.sample()
        seen = check_data(
            "train", model, loss, sample, batches, differentiated=True, precision=precision, penalties=penalties
        )
        if seen.least > 1:
            batches.join_last(seen.least * (ranks.size if has_whole_batches(batches) else 1))
        check_parts(model, optimizer, scheduler, averaged, epochs * len(batches))
        policies = Adaptation(pruning, refinement, model, optimizer, epochs, len(batches), loss=loss)
        penalties = active_penalties(penalties, policies)
        check_projections(optimizer, model, penalties)
        if validation is not None:
            held_out = make_batches(validation, batch_size, seed, where, argument="validation")
            check_data("validation", model, loss, held_out.sample(), held_out, differentiated=False)
            if isinstance(held_out, TensorBatches):
                validation = held_out.inputs, held_out.targets
        check_metrics(metrics)
        if tensorboard and ranks.first:
            from .tensorboard import TensorBoard

            callbacks = (*callbacks, TensorBoard(run))
        if policies and not (resume and _has_checkpoints(run)):
            begin_alike(ranks, policies, as_float(split(sample, len(leading(sample)))[0][0], input_dtype(model)))
        settings = Settings(
            epochs=epochs,
            validation=validation,
            metrics=metrics,
            callbacks=tuple(callbacks),
            compile=compiling,
            checkpoint_every=checkpoint_every,
            progress=progress,
            terms=terms(
                model,
                optimizer,
                scheduler,
                penalties,
                pruning,
                refinement,
                epochs=epochs,
                batches=len(batches),
                batch_size=batch_size,
                seed=seed,
                clip_norm=clip_norm,
                accumulate=accumulate,
                precision=precision,
                averaged=averaged is not None,
            ),
        )
        config = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
        parts = Parts(model, optimizer, scheduler, averaged, policies=policies)
        if run is not None:
            from .checkpoint import check_contents

            ranks.written(lambda: check_contents(parts), model, optimizer)
        folder = ranks.told(lambda: _open_run(run, config, resume=resume, overwrite=overwrite))
        options = StepOptions(clip_norm, accumulate, precision, averaged, seen.least)
        until_failure.pop_all()  # the loop leaves them
    objective = Objective(model, loss, penalties, seen.countings)
    return Loop(objective, batches, parts, options, settings, folder, ranks).run(resume=resume)


def _put_on(device: torch.device | str | None, model: nn.Module) -> None:
    if device is not None:
        from .devices import usable_device

        try:
            model.to(usable_device("device", device))
        except NotImplementedError as error:
            raise ValueError(
                "model must hold numbers, got parameters on the meta device: build it on another one"
            ) from error


def _has_checkpoints(run: "Run | str | os.PathLike[str] | None") -> bool:
    if run is None:
        return False
    from .run_folder import Run

    folder = run.checkpoints if isinstance(run, Run) else Path(run) / "checkpoint"
    return any(folder.glob("*.safetensors"))


def _open_run(
    run: "Run | str | os.PathLike[str] | None", config: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> "Run | None":
    """The run's folder, made or found; what decides the order of the batches must not have changed."""
    if run is None:
        if resume:
            raise ValueError("run must name the run's folder when resume=True, got None")
        return None
    from .run_folder import Run, tidy

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
    opened.check_resumable()
    for name in ("batch_size", "seed"):
        began = opened.config.get(name)
        if isinstance(began, int) and began != config[name]:
            raise ValueError(f"{name} must be {began} as at the start of the run, got {config[name]}")
    tidy(opened.path)
    return opened
