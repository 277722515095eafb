"""The output layer of convolutional networks: normalisation, activation, the mean over the pixels, a linear map."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .activations import make_activation
from .module_on_states import mixing, running_statistics_held


class PooledHead(nn.Module):
    """W mean(sigma(norm(y))) + b, the mean over the pixels.

    Args:
        channels: Channels of y.
        num_classes: Number of outputs.
        activation: sigma, elementwise, by name or as a module.
        dtype: Floating point type.
        device: Where the parameters live.

    Example:
        >>> PooledHead(64, 10)(torch.zeros(5, 64, 7, 7)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        activation: str | nn.Module = "relu",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, dtype=dtype, device=device)
        self.activation = make_activation(activation).to(device=device, dtype=dtype)
        self.linear = nn.Linear(channels, num_classes, dtype=dtype, device=device)
        nn.init.zeros_(self.linear.bias)

    def forward(self, y: Tensor) -> Tensor:
        output: Tensor = self.linear(self.activation(self.norm(y)).mean((2, 3)))
        return output

    def each(self, states: Sequence[Float[Tensor, "batch channels height width"]]) -> list[Tensor]:
        """The outputs for several states; in training mode each is normalised by its own statistics, and none is kept.

        ``norm`` may be any module: only an ordinary batch normalisation is computed for all states at once.

        Args:
            states: States of one shape.

        Returns:
            One output per state, (batch, num_classes).

        Raises:
            ValueError: If batch normalisation shall find statistics in an empty batch.
        """
        batch, pixels = len(states[0]), states[0].shape[2:].numel()
        if not mixing(self):
            return list(self(torch.cat(list(states))).split([len(y) for y in states]))
        if batch * pixels == 0:
            raise ValueError(
                f"inputs must have at least one sample in training mode, got states of shape {tuple(states[0].shape)}: "
                "batch normalisation finds no statistics in them; leave the batch out, or call network.eval()"
            )
        if type(self.norm) is not nn.BatchNorm2d or not self.norm.affine or mixing(self) != [self.norm]:
            with running_statistics_held(self):
                return [self(y) for y in states]
        rows = [y.permute(0, 2, 3, 1).flatten(0, 2) for y in states]  # one per pixel
        if self._by_state(rows):
            sums = torch.stack([self._normalised(y, 1).unflatten(0, (batch, -1)).sum(1) for y in rows])
            return list(self.linear(sums / pixels).unbind())
        number = len(rows)  # side by side in the channels, the states keep their own statistics
        sums = self._normalised(torch.cat(rows, 1), number).unflatten(0, (batch, -1)).sum(1)
        return list(self.linear(sums.unflatten(1, (number, -1)) / pixels).unbind(1))

    def _by_state(self, rows: list[Tensor]) -> bool:
        """Whether to normalise one after the other: on a CPU states that stay in the cache beat few calls."""
        return rows[0].device.type == "cpu"

    def _normalised(self, rows: Tensor, number: int) -> Tensor:
        weight, bias = self.norm.weight.repeat(number), self.norm.bias.repeat(number)
        normal = nn.functional.batch_norm(rows, None, None, weight, bias, training=True, eps=self.norm.eps)
        activated: Tensor = self.activation(normal)
        return activated
