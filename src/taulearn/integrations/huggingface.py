"""The callback for Trainer of Hugging Face transformers."""

import inspect
import json
import math
import os
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adaptivity.optimizer_state import bare
from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..files import write_tensors
from ..nn.pruned_models import ORIGIN, Follower, follower_of
from ..optim.projections import steps_under_way
from ..penalties import Penalty
from ..saving.recipe import tied_unlike
from ..training.history import History
from ..training.state_without_pickle import from_plain, to_plain
from ..wrapping.configurations import is_pretrained
from ..wrapping.save_pretrained import SavePretrained, guard_of
from .checkpoints import OptimizerFollower, follow_states, mark_
from .companion import Companion, averages_in, model_with_time_steps, warn_of_frozen

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "transformers must be installed for this callback: pip install 'taulearn[huggingface]'"
    ) from error

_PRUNER = "pruner.json"
_LATE = (
    "callbacks must hold this callback when Trainer is made, got it added later: an optimizer of yours would not "
    "follow the layers that a checkpoint lacks, and no checkpoint could be resumed. Write Trainer(model, arguments, "
    "callbacks=[callback]), or call taulearn.integrations.checkpoints.follow_states(model, optimizer) where they are "
    "made"
)


class TimeStepsCallback(TrainerCallback):
    """Trains and prunes time steps in Trainer: add it to the list of callbacks.

    Penalties enter the gradient before each step of the optimiser, after clipping; the proximal step and the projection
    onto the constraint follow it. Layers are deleted at the end of an epoch, or every so many steps, in the model and
    in the optimiser, whose other state stays as it is.

    Trainer's checkpoints hold the time steps, the numbers of the layers that are left, and the record: training resumes
    from them, wherever they lie, with a model that was built and wrapped as at the start. They are for that, and for
    :func:`load_checkpoint`; ``taulearn.save_model`` writes the model itself.

    Args:
        penalties: Added to the loss. Those that need the batch, as distillation does, are added to the loss that the
            model returns; hidden states cost another forward pass.
        pruning: When and which layers are deleted. None: none.
        refinement: When layers come in, and how many; a named indicator needs ``data``, and ``loss`` where the model
            returns none. None: none.
        progress: Whether deletions and new layers are printed.

    Attributes:
        history: The record: steps and penalties of each iteration, losses where Trainer logged them (the mean since the
            last log), layers of each epoch, deletions.

    Raises:
        ValueError: If the model returns no loss that a penalty could be added to; when training starts, if the model
            cannot be pruned, several processes are to prune it, the best model is to be loaded at the end of pruning,
            DeepSpeed is used, it is trained in float16 without clipping, Trainer writes checkpoints and did not have
            the callback when it was made, or one is resumed that was written without it.

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
        self._companion = Companion(penalties, pruning, refinement, progress=progress)
        self._training, self._step = ExitStack(), ExitStack()
        self._early = False
        self._batches = 1  # over which gradients accumulate in the step under way

    @property
    def history(self) -> History:
        """The record so far."""
        return self._companion.history()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model follow a checkpoint that Trainer loads into it."""
        model = model_with_time_steps(kwargs["model"])
        follow_states(model, kwargs.get("optimizer"))
        self._early = True
        warn_of_frozen(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start beside the optimiser."""
        self._training.close()  # of a training that failed
        model, optimizer = model_with_time_steps(kwargs["model"]), bare(kwargs["optimizer"])
        _check_arguments(args, changes=self._companion.changes)
        whole = getattr(kwargs["model"], "_orig_mod", kwargs["model"])
        self._control, companion, follower = control, self._companion, follower_of(model)
        late = not self._early and not isinstance(follower, OptimizerFollower)
        if late and (state.global_step or args.save_strategy != "no"):
            raise ValueError(_LATE)
        companion.past, companion.state = History(), None
        if state.global_step:
            self._read(follower)
        companion.begin(
            model,
            optimizer,
            epochs=state.num_train_epochs,
            per_epoch=math.ceil(state.max_steps / state.num_train_epochs),
            averages=lambda: averages_in(kwargs["model"]),
        )
        self._training.callback(companion.end)
        self._training.callback(self._step.close)
        companion.watch(self._training)
        if companion.of_batches:
            if args.torch_compile:
                raise ValueError(
                    f"torch_compile must be False with {companion.of_batches[0]!r} among the penalties, which is added "
                    "after each forward pass, got True"
                )
            hook = partial(self._add, args.world_size if args.average_tokens_across_devices else 1)
            self._training.callback(whole.register_forward_hook(hook, with_kwargs=True).remove)
        self._lifted = bool(getattr(whole, "peft_config", None)) or (is_pretrained(whole) and whole is not model)
        writers: dict[nn.Module, Callable[..., Any]] = {}
        for module in whole.modules():
            guard = guard_of(module)
            if guard is not None and is_pretrained(module):  # others Trainer does not save so
                writers[module] = partial(self._write_guarded, guard)
        if self._lifted:
            writers[whole] = partial(_write_state, whole)
        for module, write in writers.items():
            inner = guard_of(module) or cast(Any, module).save_pretrained
            self._replace_saving(module, _SaveCheckpoint(inner, write, state))
        if self._lifted or whole not in writers:  # the state dict itself is saved
            for each in (model, *companion.session.averages()):
                marking = each.register_state_dict_post_hook(lambda *args: self._mark(*args))
                self._training.callback(marking.remove)
        companion.warn_of_decay(
            "hand Trainer optimizers=(torch.optim.AdamW(taulearn.parameter_groups(model, lr, weight_decay=...)), None)"
        )

    def _add(self, processes: int, module: nn.Module, _: Any, batch: dict[str, Any], outputs: Any) -> Any:
        """Add penalties that need the batch to the loss that the model returns for training."""
        companion = self._companion
        if module.training and torch.is_grad_enabled() and not companion.adding:
            loss = outputs.get("loss") if isinstance(outputs, MutableMapping) else None
            counted = batch.get("num_items_in_batch") is not None  # the loss is a sum over all, divided by that number
            where = f"{type(module).__name__}'s forward"
            share = 1 / (self._batches * processes) if counted else 1.0
            outputs["loss"] = companion.added(loss, batch, where, share)
        return outputs

    def _replace_saving(self, module: nn.Module, saving: Callable[..., Any]) -> None:
        """Let the module save in another way until training ends."""
        own = vars(module).get("save_pretrained")
        vars(module)["save_pretrained"] = saving
        if own is None:
            self._training.callback(vars(module).pop, "save_pretrained")
        else:
            self._training.callback(vars(module).__setitem__, "save_pretrained", own)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the penalties the epoch."""
        self._companion.session.start_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where the policy asks for it."""
        self._batches = _batches_of_step(args, state, kwargs["train_dataloader"])
        self._companion.session.measure()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the step add the penalties' gradients before it, and end with the projection."""
        session = self._companion.session
        (optimizer,) = session.optimizers

        def before(stepping: torch.optim.Optimizer, *_: Any) -> None:
            if steps_under_way(stepping) < 2:
                session.before_step()

        self._step.callback(optimizer.register_step_pre_hook(before).remove)
        self._companion.constrained(self._step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimiser, whose later steps may be taken outside Trainer."""
        self._step.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, where the policy counts iterations."""
        self._control = control
        self._companion.after_step(None, epoch=math.ceil(state.epoch))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, where the policy counts epochs."""
        self._control = control
        self._companion.end_epoch(max(1, round(state.epoch)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the loss."""
        if logs is not None and "loss" in logs and not self._companion.of_batches:
            self._companion.session.note(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model; say what of a target is left."""
        self._training.close()
        self._companion.session.warn_of_target()

    def _mark(self, model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        if self._control.should_save:  # whoever asked for it; else somebody else reads the weights
            record = self._record() if model is self._companion.session.model else None
            mark_(model, state, prefix, record=record, lifted=self._lifted)

    def _write_guarded(self, guard: SavePretrained, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """The files that the model's own method writes, of steps other than 1, too."""
        state, model = dict(kwargs.pop("state_dict", None) or guard.model.state_dict()), self._companion.session.model
        if guard.model is model:
            prefix = "_orig_mod." if "_orig_mod.time_steps.values" in state else ""  # Trainer has it compiled
            mark_(model, state, prefix, record=self._record(), lifted=True)
        if "save_original_format" in inspect.signature(guard.inner).parameters:
            # Trainer resumes by load_state_dict, which does not know the names of older checkpoints
            kwargs.setdefault("save_original_format", False)
        return guard.inner(folder, *args, state_dict=state, **kwargs)

    def _record(self) -> dict[str, Tensor]:
        """The record, and how far the policy is, as tensors."""
        companion = self._companion
        tensors = dict(companion.history().tensors())
        state = companion.policy_state()
        pruner = None if state is None else to_plain(state, "pruner", tensors)
        return tensors | {_PRUNER: torch.frombuffer(bytearray(json.dumps(pruner).encode()), dtype=torch.uint8)}

    def _read(self, follower: Follower | None) -> None:
        """Go on with the record of the checkpoint that the model loaded."""
        if follower is None or follower.record is None:
            raise ValueError(
                "resume_from_checkpoint must be a checkpoint with the record of the time steps, got one that was "
                "written without this callback: load its weights into the model and begin a new training, or resume "
                "it without the callback"
            )
        tensors = safetensors.torch.load(follower.record)
        follower.record = None
        state = json.loads(tensors.pop(_PRUNER).numpy().tobytes())
        self._companion.past = History.from_tensors(tensors)
        self._companion.state = None if state is None else from_plain(state, tensors)


class _SaveCheckpoint:
    """``save_pretrained`` while Trainer trains: its checkpoints hold the time steps, for resuming alone."""

    def __init__(self, guard: Callable[..., Any], write: Callable[..., Any], state: Any) -> None:
        self.guard, self.write, self.state = guard, write, state

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        ours = Path(save_directory).name == f"checkpoint-{self.state.global_step}"
        return (self.write if ours else self.guard)(save_directory, *args, **kwargs)


def _write_state(model: nn.Module, folder: Any, *_: Any, **kwargs: Any) -> Any:
    """The state dict, where PEFT would save adapters alone, or transformers would not mark a part that is wrapped."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = kwargs.get("state_dict") or model.state_dict()
    return write_tensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})


def _batches_of_step(args: Any, state: Any, loader: Any) -> int:
    """Over how many batches gradients accumulate in the step that begins: fewer in the last one of an epoch."""
    try:
        number = len(loader)
    except TypeError:  # a stream, whose end nobody knows
        return int(args.gradient_accumulation_steps)
    before = state.global_step % math.ceil(number / args.gradient_accumulation_steps)
    return min(args.gradient_accumulation_steps, number - before * args.gradient_accumulation_steps)


def _check_arguments(args: Any, *, changes: bool) -> None:
    """Refuse, before the first step, what could not be carried out at its end."""
    if getattr(args, "deepspeed", None):
        raise ValueError(
            "deepspeed must be None for this callback, got a configuration: DeepSpeed's optimizer takes its steps "
            "where penalties and deletions cannot follow; train without it, or with taulearn.fit"
        )
    if getattr(args, "fp16", False) and not args.max_grad_norm:
        raise ValueError(
            "max_grad_norm must be positive with fp16, got none: without clipping, gradients are still scaled when "
            "penalties are added to them; clip them, or use bf16"
        )
    if changes and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end must be False where layers are pruned or refined, got True: the best checkpoint "
            "may have other layers than the model at the end. Trainer notes it in trainer.state.best_model_checkpoint "
            "all the same where metric_for_best_model is given; load it into a model that was built and wrapped anew, "
            "taulearn.integrations.huggingface.load_checkpoint(model, folder)"
        )


def load_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint that Trainer wrote with the callback: weights, time steps, and which layers are left.

    Args:
        model: A model that was built, and wrapped, as the one that was trained was at the start.
        folder: The checkpoint, such as ``trainer.state.best_model_checkpoint``.

    Raises:
        ValueError: If the folder holds no such checkpoint, or one of another model.
    """
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"folder must be a checkpoint of Trainer, with model.safetensors in it, got {str(folder)!r}")
    found = model_with_time_steps(model)
    if follower_of(found) is None:
        follow_states(found)
    tensors = safetensors.torch.load_file(file)
    if not any(name.endswith(ORIGIN) for name in tensors):
        raise ValueError(f"folder must be a checkpoint that was written with this callback, got {str(folder)!r}")
    if unlike := tied_unlike(model, tensors):
        raise ValueError(f"model must be built as the one of the checkpoint was, got another: {'; '.join(unlike[:5])}")
    try:
        wrong = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"model must be built as the one of the checkpoint was, got another: {error}") from error
    everything = dict(model.named_parameters(remove_duplicate=False))
    tied = {p for name, p in everything.items() if name in tensors}  # of which a file has one name
    missing = [name for name in wrong.missing_keys if everything.get(name) not in tied]
    if missing or wrong.unexpected_keys:
        raise ValueError(
            f"model must be built as the one of the checkpoint was, got one that lacks {wrong.unexpected_keys[:5]} and "
            f"has {missing[:5]} more"
        )
