"""The callback for Trainer of Lightning."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..nn.time_steps import time_steps_of
from ..optim import group_of
from ..optim.projections import searches
from ..penalties import Penalty
from ..training.history import History
from .checkpoints import mark_states
from .companion import Companion, averages_in, model_with_time_steps

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import StochasticWeightAveraging
except ImportError as error:
    raise ImportError("lightning must be installed for this callback: pip install 'taulearn[lightning]'") from error


class TimeStepsCallback(Callback):
    """Trains and prunes time steps in Lightning: add it to the list of callbacks.

    Penalties enter the gradient before each step of the optimiser, before clipping; the proximal step and the
    projection onto the constraint follow it. Layers are deleted at the end of an epoch, or every so many steps, in the
    model and in the optimiser, whose other state stays as it is.

    Checkpoints hold the time steps, the numbers of the layers that are left, and the record: training resumes from them
    with a module that was built as at the start, and ``load_from_checkpoint`` loads them. From the first training on,
    the module's ``state_dict()`` says which layers are left.

    Averages that torch's AveragedModel or Lightning's callbacks keep of the weights lose the same layers.

    Args:
        penalties: Added to the loss. Those that need the batch, as distillation does, are added to the loss that
            training_step returns, of the model's last forward pass in it; hidden states cost another one.
        pruning: When and which layers are deleted. None: none.
        refinement: When layers come in, and how many; a named indicator needs ``data``, and ``loss`` where the model
            returns none. None: none.
        progress: Whether deletions and new layers are printed.

    Attributes:
        history: The record: loss, steps and penalties of each iteration, layers of each epoch, deletions.

    Raises:
        ValueError: If training_step returns no loss that a penalty could be added to; when training starts, if the
            model cannot be pruned, several processes are to prune it, the module steps its optimisers by hand, or an
            optimiser searches along lines (LBFGS).

    Example:
        >>> from taulearn import Pruning
        >>> from taulearn.penalties import L1
        >>> callback = TimeStepsCallback(penalties=[L1(0.01, proximal=True)], pruning=Pruning(0.02))
        >>> callback.history.num_iterations
        0
    """

    def __init__(
        self,
        penalties: Penalty | Sequence[Penalty] = (),
        pruning: Pruning | None = None,
        refinement: Refinement | None = None,
        *,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self._companion = Companion(penalties, pruning, refinement, progress=progress)
        self._training = ExitStack()
        self._trained = False

    @property
    def history(self) -> History:
        """The record so far."""
        return self._companion.history()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let checkpoints of the module, also those that are written later, say which layers are left."""
        mark_states(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start beside the optimiser that holds the time steps."""
        self._training.close()  # of a training that failed before its own end
        self._trained = False
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True for this callback, got a module that steps its optimisers by "
                "hand: use taulearn.attach in it, without the callback"
            )
        model = model_with_time_steps(pl_module)
        values = time_steps_of(model).values
        optimizers = [each for each in trainer.optimizers if group_of(each, values) is not None]
        if len(optimizers) != 1:
            raise ValueError(
                f"configure_optimizers must return one optimiser that holds the time steps, got {len(optimizers)}: "
                "make it from taulearn.parameter_groups(model, lr)"
            )
        self._optimizer = optimizers[0]
        if searches(self._optimizer):
            raise ValueError(
                "configure_optimizers must return an optimiser that takes one gradient a step, got "
                f"{type(self._optimizer).__name__}, whose trials this callback cannot tell from steps: use another "
                "one, or train with taulearn.fit"
            )
        batches = trainer.estimated_stepping_batches
        if batches == float("inf"):
            raise ValueError("max_epochs or max_steps must be set for this callback, got an endless training")
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 1
        self._companion.begin(
            model,
            self._optimizer,
            epochs=epochs,
            per_epoch=-(-int(batches) // epochs),
            averages=lambda: [*averages_in(pl_module), *averages_of(trainer)],
        )
        for each in averages_of(trainer):
            mark_states(each)
        self._training.callback(self._companion.end)
        self._companion.constrained(self._training)
        self._companion.watch(self._training)
        if self._companion.of_batches:
            self._add_to(pl_module)
        self._companion.warn_of_decay("let configure_optimizers use taulearn.parameter_groups(model, lr, ...)")

    def _add_to(self, pl_module: Any) -> None:
        """Let training_step return the loss with the penalties that need the batch, until training ends."""
        step = pl_module.training_step

        def training_step(batch: Any, *args: Any, **options: Any) -> Any:
            returned = step(batch, *args, **options)
            loss = returned.get("loss") if isinstance(returned, Mapping) else returned
            total = self._companion.added(loss, batch, "training_step")
            return {**returned, "loss": total} if isinstance(returned, Mapping) else total

        pl_module.training_step = training_step
        self._training.callback(vars(pl_module).pop, "training_step", None)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the penalties the epoch."""
        self._companion.session.start_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, where the policy asks for it; nothing in an epoch for the statistics of an average."""
        if trainer.fit_loop._skip_backward and not self._trained:
            self._trained = True
            self._training.close()
        if not self._trained:
            self._companion.session.measure()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the penalties' gradients."""
        if optimizer is self._optimizer and not self._trained:
            self._companion.session.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss; prune where the policy counts iterations."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._companion.after_step(loss if isinstance(loss, Tensor) else None, epoch=trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Prune, where the policy counts epochs."""
        if not self._trained:
            self._companion.end_epoch(trainer.current_epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimiser; say what of a target is left."""
        self._training.close()
        self._companion.session.warn_of_target()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the optimiser when training failed, too."""
        self._training.close()

    def state_dict(self) -> dict[str, Any]:
        """The record, and how far the policy is."""
        return {"history": self.history.tensors(), "pruner": self._companion.policy_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._companion.past = History.from_tensors(state_dict["history"])
        self._companion.state = state_dict["pruner"]


def averages_of(trainer: Any) -> list[nn.Module]:
    """The averaged models that the callbacks of a trainer hold."""
    found = []
    for callback in trainer.callbacks:
        for value in vars(callback).values():
            if isinstance(value, AveragedModel):
                found.append(value.module)
            elif isinstance(value, nn.Module) and isinstance(callback, StochasticWeightAveraging):
                found.append(value)
    return found
