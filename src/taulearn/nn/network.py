"""A network with learned time steps: layers, a scheme, one vector of steps, and an output layer."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .module_on_states import apply_to_each
from .pruned_models import Follower, set_follower
from .schemes import Scheme
from .skips import IdentitySkips, Skips
from .time_steps import TimeSteps

if TYPE_CHECKING:
    from ..calibration import Statistics
    from .early_exit import Prediction


class TimeVariableNetwork(nn.Module):
    """A time-discretised dynamical system y_0 -> y_1 -> .. -> y_N with learned steps, and an output layer on y_N.

    Args:
        layers: Layer functions f_0 .. f_{N-1}, any modules whose outputs fit the scheme.
        head: Output layer, applied to y_N.
        scheme: How the states follow from each other.
        time_steps: The steps, one per layer.
        skips: The maps P. None: identities, and zero past the first layer when there is no stem (it changes the space).
        stem: Maps the network's input to the state y_0. None: the input is y_0.

    Attributes:
        recipe: Which function of this package built the layers, head and skips, and from which arguments, as
            ``save_model`` writes it; None for a network put together by hand.

    Raises:
        ValueError: If the numbers of layers, steps and skips differ.

    References:
        Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.

    Example:
        >>> from taulearn.nn import Residual
        >>> layers = [nn.Sequential(nn.Linear(n, 4), nn.ReLU()) for n in (2, 4, 4)]
        >>> network = TimeVariableNetwork(layers, nn.Linear(4, 1), Residual(), TimeSteps(3))
        >>> network(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    recipe: Mapping[str, Any] | None = None

    def __init__(
        self,
        layers: Iterable[nn.Module],
        head: nn.Module,
        scheme: Scheme,
        time_steps: TimeSteps,
        skips: Skips | None = None,
        *,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.scheme = scheme
        self.time_steps = time_steps
        self.skips = IdentitySkips(len(self.layers), from_input=stem is not None) if skips is None else skips
        if len(self.layers) != time_steps.num_steps:
            raise ValueError(
                f"time_steps must have one step per layer, got {time_steps.num_steps} for {len(self.layers)} layers"
            )
        if self.skips.num_steps != len(self.layers):
            raise ValueError(
                f"skips must have one map per layer, got {self.skips.num_steps} for {len(self.layers)} layers"
            )
        set_follower(self, Follower())

    def states(self, x: Float[Tensor, "batch *features"], *, initial: bool = False) -> list[Tensor]:
        """The states y_1 .. y_N, one tensor per layer.

        Args:
            x: Inputs, (batch, ...).
            initial: Whether y_0, the output of the stem, comes before them.

        Returns:
            N tensors (batch, ...), or N + 1.
        """
        start = self.stem(x)
        states = self.scheme.states(start, self.layers, self.skips, self.time_steps.tau)
        return [start, *states] if initial else states

    def forward(self, x: Float[Tensor, "batch *features"]) -> Tensor:
        """The network's output, the head applied to y_N.

        Args:
            x: Inputs, (batch, ...), of the network's floating point type.

        Returns:
            Outputs, (batch, ...).
        """
        output: Tensor = self.head(self.scheme.last(self.stem(x), self.layers, self.skips, self.time_steps.tau))
        return output

    def intermediate_outputs(
        self, x: Float[Tensor, "batch *features"], *, states: Sequence[Tensor] | None = None, final: bool = True
    ) -> dict[int, Tensor]:
        """The outputs yhat_k of the network cut after k layers: y_k carried by the remaining skips to the head.

        That is the network with tau_l = 0 for all l >= k (residual and fractional schemes; the others carry the state
        by their skips all the same), without parameters of its own. One forward pass gives the states; what is carried
        goes through each skip and the head together.

        Batch normalisation in the head or in a skip, in training mode: each state is normalised by its own statistics,
        and only y_N, as in every forward pass, enters the running ones. In evaluation mode all are normalised by those.

        Args:
            x: Inputs, (batch, ...).
            states: y_1 .. y_N, or y_0 .. y_N, of a forward pass on ``x``, where there was one. None: computed.
            final: Whether yhat_N is wanted.

        Returns:
            For k = 1 .. N the output yhat_k, yhat_N being that of :meth:`forward`; before them k = 0, where the skips
            carry the input state.

        Raises:
            ValueError: If there is not one state per layer.

        References:
            Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet
                training.

        Example:
            >>> from taulearn.nn import resnet
            >>> sorted(resnet(2, 3, 1, 4).intermediate_outputs(torch.zeros(5, 2)))
            [1, 2, 3, 4]
        """
        N, first = len(self.layers), 0 if self.skips.from_input else 1
        states = self.states(x, initial=first == 0) if states is None else list(states)
        if len(states) not in (N, N + 1):
            raise ValueError(f"states must be y_1 .. y_{N}, got {len(states)} tensors: take those of network.states(x)")
        if len(states) == N:
            states = [self.stem(x) if first == 0 else states[0], *states]
        carried: list[Tensor] = []
        for l in range(N):
            if l >= first:
                carried.append(states[l])
            if not self.skips.unchanged(l):
                carried = apply_to_each(self.skips.past(l), carried)
        outputs = dict(enumerate(apply_to_each(self.head, carried), start=first))
        return {**outputs, N: self.head(states[N])} if final else outputs

    def predict(
        self,
        inputs: Float[Tensor, "batch *features"],
        confidence: float = 0.9,
        *,
        depths: Collection[int] | None = None,
        statistics: "Mapping[int, Sequence[Statistics]] | None" = None,
    ) -> "Prediction":
        """Outputs with early exit: each sample stops at the first intermediate output that is confident.

        Samples that have stopped leave the batch, so that the layers after them are not computed for them. It is worth
        its checks after training with a stage cost, which makes the intermediate outputs good ones.

        Args:
            inputs: (batch, ...), of the network's floating point type.
            confidence: The largest softmax probability that is enough, in (0, 1]; 1 computes the whole network.
            depths: Numbers k of layers after which to look. None: all there are.
            statistics: Of batch normalisation in skips and head at depths before the last, as
                :func:`taulearn.diagnostics.depth_statistics` gives them. None: the running ones, which are those of the
                last state: with them early outputs of a network with batch normalisation can be confident and wrong.

        Returns:
            Outputs and the number of layers behind each.

        Raises:
            ValueError: If confidence or depths lie outside their range, the outputs are not (batch, classes) with at
                least two classes, the statistics are those of another network or of this one before a deletion, or
                the scheme carries something that has not the batch first.
            TypeError: If depths are no collection, or statistics no mapping.

        Example:
            >>> from taulearn.nn import resnet
            >>> network = resnet(2, 3, 2, 4)
            >>> network.predict(torch.ones(5, 2), confidence=1.0).depths
            tensor([4, 4, 4, 4, 4])
        """
        from .early_exit import predict

        return predict(self, inputs, confidence, depths=depths, statistics=statistics)

    def fixed_layers(self) -> dict[int, str]:
        """Positions that pruning must leave, each with the reason."""
        reasons = self.not_split()
        for layer, reason in self.time_steps.rule.fixed(len(self.layers)).items():
            reasons.setdefault(layer, reason)
        return reasons

    def not_split(self) -> dict[int, str]:
        """Positions of layers that are no step from a state to the next, and cannot be split, each with the reason."""
        reasons = {}
        for layer in range(len(self.layers)):
            if not self.skips.is_identity(layer):
                reasons[layer] = (
                    "the skip past it is zero"
                    if layer == 0 and not self.skips.from_input
                    else "the skip past it is not the identity"
                )
        if self.skips.from_input and self.scheme.memory_from == 1:
            reasons.setdefault(0, "the memory starts after it, so that the next layer would leave the memory")
        return reasons

    @torch.no_grad()
    def keep_layers_(self, indices: Sequence[int]) -> None:
        """Delete all layers but those at ``indices``, with steps and skips; ``taulearn.prune`` mends the optimiser too.

        Args:
            indices: Current positions, in increasing order; those left out must have an identity skip.

        Raises:
            ValueError: If a layer that must stay is left out.
        """
        kept = list(indices)
        for layer, reason in self.fixed_layers().items():
            if layer not in kept:
                raise ValueError(
                    f"indices must contain layer {self.time_steps.origin[layer]}, got positions {kept}: {reason}"
                )
        self.time_steps.keep_(kept)
        self.skips.keep_(kept)
        self.scheme.follow_(kept)
        self.layers = nn.ModuleList(self.layers[i] for i in kept)
        self.layers.training = self.training

    def not_inserted(self, *, copied: bool) -> dict[int, str]:
        """Positions behind which no layer can be inserted, or none that is a copy, each with the reason."""
        if self.scheme.step_power != 1.0 and not self.time_steps.lower_bound:
            why = f"the {self.scheme.name} scheme divides by its steps: set a lower bound"
            return dict.fromkeys(range(len(self.layers)), why)
        places = [l for l in range(len(self.layers)) if copied and self.copied_behind(l) is None]
        return dict.fromkeys(places, "no copy of a layer fits there: say what comes there, layer=...")

    def copied_behind(self, layer: int) -> int | None:
        """Position of the layer a copy of which fits behind one: that one, or else the next one; None: no copy fits."""
        places = (l for l in (layer, layer + 1) if l < len(self.layers))
        return next((l for l in places if self.skips.is_identity(l)), None)

    def copy_of(self, layer: int) -> nn.Module:
        """A layer once more, with parameters and buffers of its own."""
        from .grid import copied

        return copied(self.layers[layer])

    @torch.no_grad()
    def grow_layers_(self, sources: Sequence[int], made: Mapping[int, nn.Module], values: Tensor) -> dict[Any, Any]:
        """Take layers in between; ``taulearn.refine`` makes them, and mends the optimiser too.

        Args:
            sources: For each of the layers then the position now, its own or its parent's, in order.
            made: The new layers, by their positions then.
            values: The vector of the time steps then.
        """
        self.time_steps.grow_(sources, made, values)
        self.skips.grow_(sources, made)
        self.layers = nn.ModuleList(made.get(i, self.layers[l]) for i, l in enumerate(sources))
        self.layers.training = self.training
        # new parameters of the scheme, with their parents
        return self.scheme.follow_([sources[max(0, i - (i in made))] for i in range(len(sources))])
