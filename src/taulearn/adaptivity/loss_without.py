"""The loss of the model without each layer, which is the deletion itself, tried and undone.

    score_l = J_l - min(J, min_k J_k),    J_l the mean loss without layer l, J that of the model as it is

The smallest goes, and then all are taken again: the greedy choice. The mean weighs each batch by what its loss counts;
of a language model it is the logarithm of the perplexity. It costs n + 1 passes over the data with n layers, for each
deletion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import batches_of, each_batch
from .._counting import Mean, loss_counted
from .._undisturbed import Before
from ..nn.pruned_models import prunable_of
from .estimate import Criterion
from .transaction import taken_out


class LossWithout(Criterion):
    """What the loss on given data becomes without each layer; taken anew when the layers are others.

    Args:
        data: Batches, or one, as for ``taulearn.prune``.
        loss: Maps (output, target) to a scalar. None: the model's own.
    """

    greedy = True

    def __init__(self, data: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        self.data, self.loss = batches_of(data), loss
        self.layers: list[int] | None = None  # their numbers when the scores were taken
        self.values: Tensor | None = None

    def scores(self, model: nn.Module) -> Tensor:
        layers = list(prunable_of(model).time_steps.origin)
        if self.layers != layers or self.values is None:
            self.layers, self.values = layers, self._scores(model)
        return self.values

    def _scores(self, model: nn.Module) -> Tensor:
        """The scores of the layers; 0 for those that must stay."""
        prunable, before = prunable_of(model), Before(model)
        number, fixed = prunable.time_steps.num_steps, prunable.fixed_layers()
        free = [l for l in range(number) if l not in fixed and number > 1]
        with before.kept() as written:  # the others need not look for what a pass writes
            whole = self._mean(model)
        found = []
        for l in free:
            with taken_out(model, [l]), before.kept(written):
                found.append(self._mean(model))
        scores = torch.zeros(number, dtype=torch.float64)
        scores[free] = torch.tensor(found, dtype=torch.float64) - min([whole, *found])
        return scores

    def _mean(self, model: nn.Module) -> float:
        """The mean loss over the data."""
        mean = Mean()
        for batch in each_batch(self.data, model, prunable_of(model).time_steps.values):
            mean.add(*loss_counted(model, batch, self.loss))
        found = float(mean.value())
        if found != found or abs(found) == float("inf"):
            gone = prunable_of(model).time_steps.origin
            raise ValueError(
                f"loss must be finite on data, got {found} with the layers {list(gone)}: give data with labels that "
                "count, and a model whose weights are finite"
            )
        return found

    def state(self) -> dict[str, Any]:
        return {"losses": self.values, "layers": self.layers}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.values, self.layers = state["losses"], state["layers"]
