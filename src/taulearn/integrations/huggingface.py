"""The callback for Trainer of Hugging Face transformers."""

import inspect
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..files import read_tensors, write_tensors
from ..penalties import Penalty
from ..pruning import Pruning
from ..training.history import History
from ..training.plain import from_plain, to_plain
from ..wrapping.transformers import SavePretrained, is_pretrained
from .checkpoints import follow_states, mark_
from .companion import Companion, model_with_time_steps

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "transformers must be installed for this callback: pip install 'taulearn[huggingface]'"
    ) from error

FILE = "time_steps.safetensors"
"""The record, in the folder of each checkpoint."""


class TimeStepsCallback(TrainerCallback):
    """Trains and prunes time steps in Trainer: add it to the list of callbacks.

    Penalties enter the gradient before each step of the optimiser, after clipping; the proximal step and the projection
    onto the constraint follow it. Layers are deleted at the end of an epoch, or every so many steps, in the model and
    in the optimiser, whose other state stays as it is.

    Trainer's checkpoints hold the time steps and the numbers of the layers that are left: training resumes from them
    with a model that was built and wrapped as at the start. They are for that alone; ``taulearn.save_model`` writes the
    model itself.

    Args:
        penalties: Added to the loss; those that need the states of the forward pass are not possible here.
        pruning: When and which layers are deleted. None: none.
        progress: Whether deletions are printed.

    Attributes:
        history: The record: steps and penalties of each iteration, losses where Trainer logged them (the mean since the
            last log), layers of each epoch, deletions.

    Raises:
        ValueError: If a penalty needs data; when training starts, if the model cannot be pruned, several processes are
            to prune it, or it is trained in float16 without clipping.

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
        *,
        progress: bool = True,
    ) -> None:
        self._companion = Companion(penalties, pruning, progress=progress)
        self._following: RemovableHandle | None = None
        self._marking: RemovableHandle | None = None
        self._training = ExitStack()

    @property
    def history(self) -> History:
        """The record so far."""
        return self._companion.history()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model follow a checkpoint that Trainer loads into it."""
        model = model_with_time_steps(kwargs["model"])
        self._following = follow_states(model, kwargs.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start beside the optimiser."""
        self._training.close()  # of a training that failed
        model, optimizer = model_with_time_steps(kwargs["model"]), _bare(kwargs["optimizer"])
        if getattr(args, "fp16", False) and not args.max_grad_norm:
            raise ValueError(
                "max_grad_norm must be positive with fp16, got none: without clipping, gradients are still scaled when "
                "penalties are added to them; clip them, or use bf16"
            )
        companion = self._companion
        if state.global_step:
            self._read(_checkpoint(args, state))
        companion.begin(
            model,
            optimizer,
            epochs=state.num_train_epochs,
            per_epoch=math.ceil(state.max_steps / state.num_train_epochs),
            processes=args.world_size,
        )
        self._training.callback(companion.end)
        self._training.callback(optimizer.register_step_pre_hook(lambda *_: companion.before_step()).remove)
        for module in kwargs["model"].modules():
            guard = vars(module).get("save_pretrained")
            if isinstance(guard, SavePretrained):
                vars(module)["save_pretrained"] = _SaveCheckpoint(guard, model)
                self._training.callback(vars(module).__setitem__, "save_pretrained", guard)
        decay = companion.weight_decay()
        if decay:
            warnings.warn(
                f"the optimizer shrinks the time steps by weight decay, {decay:g}: hand Trainer optimizers="
                "(torch.optim.AdamW(taulearn.parameter_groups(model, lr, weight_decay=...)), None)",
                stacklevel=2,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the penalties the epoch."""
        self._companion.start_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where the policy asks for it."""
        self._companion.start_iteration()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, where the policy counts iterations."""
        self._companion.after_step(None, epoch=math.ceil(state.epoch))
        self._before_saving(control, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, where the policy counts epochs."""
        self._companion.end_epoch(max(1, round(state.epoch)))
        self._before_saving(control, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the loss."""
        if logs is not None and "loss" in logs:
            self._companion.losses[self._companion.iteration] = float(logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record into the checkpoint's folder."""
        if self._marking is not None:
            self._marking.remove()
            self._marking = None
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            self._write(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimiser and the model."""
        self._training.close()

    def _before_saving(self, control: Any, model: nn.Module) -> None:
        """Mark the state of a model that Trainer saves without ``save_pretrained``."""
        if control.should_save and self._marking is None and not is_pretrained(model):
            found = model_with_time_steps(model)
            self._marking = found.register_state_dict_post_hook(
                lambda _module, state, prefix, _metadata: mark_(found, state, prefix)
            )

    def _write(self, folder: Path) -> None:
        companion = self._companion
        tensors = dict(companion.history().tensors())
        pruner = None if companion.pruner is None else to_plain(companion.pruner.state(), "pruner", tensors)
        metadata = {"kind": "taulearn time steps", "format": "1", "pruner": json.dumps(pruner)}
        write_tensors(folder / FILE, tensors, metadata)

    def _read(self, folder: Path) -> None:
        """Go on with the record of a checkpoint; without it a new one begins."""
        if (folder / FILE).is_file():
            tensors, metadata = read_tensors(folder / FILE)
            state = json.loads(metadata["pruner"])
            self._companion.past = History.from_tensors(tensors)
            self._companion.state = None if state is None else from_plain(state, tensors)


class _SaveCheckpoint:
    """``save_pretrained`` while Trainer trains: steps other than 1 are saved, for resuming alone."""

    def __init__(self, guard: SavePretrained, model: nn.Module) -> None:
        self.guard, self.model = guard, model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        state = dict(kwargs.pop("state_dict", None) or self.guard.model.state_dict())
        if self.guard.model is self.model:
            mark_(self.model, state, lifted=True)
        if "save_original_format" in inspect.signature(self.guard.inner).parameters:
            # Trainer resumes by load_state_dict, which does not know the names of older checkpoints
            kwargs.setdefault("save_original_format", False)
        return self.guard.inner(save_directory, *args, state_dict=state, **kwargs)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser of torch in those of accelerate."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    found: torch.optim.Optimizer = optimizer
    return found


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
