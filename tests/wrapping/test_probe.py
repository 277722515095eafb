"""Which modules are found to be blocks."""

import pytest
import torch
from torch import Tensor, nn

from taulearn import wrap
from taulearn.wrapping import wrapping_of
from wrapping.hosts import Block


def names(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    wrapping = wrapping_of(wrap(model, example_inputs=inputs))
    assert wrapping is not None
    return wrapping.names


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Basic(nn.Module):
    """A convolutional residual block, whose sum is in place."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.layer = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)),
        )
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += self.skip(x)
        return self.act(y)


class PostNorm(nn.Module):
    """A block that hands its input to a part of it, as BERT's do."""

    class Add(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return self.linear(y) + x

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = mlp(width), self.Add(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x), x)
        return y


def test_members_of_stages_rather_than_stages() -> None:
    model = nn.Sequential(nn.Linear(2, 4), Stage(Block(4), Block(4)), nn.Sequential(mlp(4), mlp(4)), nn.Linear(4, 1))
    assert names(model, torch.ones(1, 2)) == ("1.blocks.0", "1.blocks.1", "2.0", "2.1")


def test_a_stage_within_a_stage() -> None:
    model = nn.Sequential(Stage(Stage(Block(4), Block(4)), Block(4)), nn.Linear(4, 1))
    assert names(model, torch.ones(1, 4)) == ("0.blocks.0.blocks.0", "0.blocks.0.blocks.1", "0.blocks.1")


def test_blocks_rather_than_their_parts() -> None:
    assert names(nn.Sequential(PostNorm(3), PostNorm(3)), torch.ones(1, 3)) == ("0", "1")
    model = nn.Sequential(Stage(Basic(2, 2), Basic(2, 2)), Stage(Basic(2, 4), Basic(4, 4)), nn.Flatten())
    assert names(model, torch.ones(1, 2, 4, 4)) == ("0.blocks.0", "0.blocks.1", "1.blocks.1")


def test_a_single_module_of_layers_is_a_block_where_it_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), mlp(3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="alone of its kind"):
        wrap(model, example_inputs=torch.ones(1, 2))
    assert wrap(model, "1", example_inputs=torch.ones(1, 2)).time_steps.num_steps == 1
    assert names(nn.Sequential(nn.Linear(2, 3), Block(3), nn.Linear(3, 1)), torch.ones(1, 2)) == ("1",)


def test_blocks_in_attributes() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.second, self.first = nn.Linear(2, 3), Block(3), Block(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(self.enter(x)))
            return y

    assert names(Host(), torch.ones(1, 2)) == ("first", "second")  # in the order of their calls


def test_norms_and_modules_without_parameters_are_no_blocks() -> None:
    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    assert names(nn.Sequential(Block(3), RMSNorm(), nn.Sequential(nn.Tanh())), torch.ones(1, 3)) == ("0",)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mul_(2.0))
        return y


def test_no_block_found_says_what_was_seen_and_why_not() -> None:
    shared = Block(3)
    model = nn.Sequential(
        nn.Linear(2, 3), shared, shared, Scaled(), nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.LayerNorm(4)
    )
    with pytest.raises(ValueError, match="model must have a block whose output has the shape of its input") as caught:
        wrap(model, example_inputs=torch.ones(1, 2))
    text = str(caught.value)
    for line in (
        r"0 (Linear): it is a layer of torch.nn, a part of a block",
        "1 (Block): it was called 2 times: a block used in several places has no single time step",
        "3 (Scaled): it has scales and shifts alone",
        "4 (Sequential): its output (1, 4) has another shape than its input (1, 3)",
        "5 (LayerNorm): it is a layer of torch.nn",
    ):
        assert line in text
    assert not hasattr(model, "time_steps")
