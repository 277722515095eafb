"""Which modules are found to be blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import wrap
from taulearn.wrapping import wrapping_of
from wrapping.hosts import VOCABULARY, Block, tokens, transformers


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
        "0 (Linear) and 3 more: it is a layer of torch.nn, a part of a block",
        "1 (Block) and 6 more: it was called 2 times",
        "3 (Scaled): it changed it in place",
        "4 (Sequential): its output (1, 4) has another shape than its input (1, 3)",
    ):
        assert line in text
    assert not hasattr(model, "time_steps")


class Branch(nn.Module):
    """What a host adds to its state itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Sums(nn.Module):
    """A host that puts its layers together in some way."""

    def __init__(self, way: Callable[[Any, Any, Tensor], Tensor], layer: Callable[[int], nn.Module] = Branch) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.layers = nn.ModuleList(layer(6) for _ in range(3))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for f, norm in zip(self.layers, self.norms, strict=True):
            x = self.way(f, norm, x)
        return x


def in_place(f: nn.Module, _: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x += f(x)
    return x


@pytest.mark.parametrize(
    "way",
    {
        "sum": lambda f, _, x: x + f(x),
        "sum in place": in_place,
        "input normalised first": lambda f, norm, x: x + f(norm(x)),
        "branch normalised": lambda f, norm, x: x + norm(f(x)),
        "sum normalised": lambda f, norm, x: norm(x + f(x)),
        "difference": lambda f, _, x: x - 0.5 * f(x),
        "gate": lambda f, _, x: x * torch.sigmoid(f(x)),
        "both halves scaled": lambda f, _, x: (x + f(x)) * 0.5**0.5,
        "transposed": lambda f, _, x: (x.transpose(0, 1) + f(x).transpose(0, 1)).transpose(0, 1),
        "two branches side by side": lambda f, norm, x: x + f(norm(x)) + f.inner[1](x),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_residual_sum_in_the_host_makes_branches_of_its_layers(way: tuple[str, Any]) -> None:
    host, x = Sums(way[1]), torch.randn(5, 6)
    with pytest.raises(ValueError, match="the model itself adds"):
        wrap(host, example_inputs=x)
    with pytest.raises(ValueError, match=r"got 'layers.0': the model itself adds"):
        wrap(host, "layers.*", example_inputs=x)
    assert not hasattr(host, "time_steps")


@pytest.mark.parametrize(
    "way",
    [
        lambda f, _, x: f(x),
        lambda f, _, x: torch.where(x.sum(-1, keepdim=True) > 0, f(x), x),  # samples that are done stay
        lambda f, _, x: torch.lerp(x, f(x), 0.5),
        lambda f, norm, x: norm(f(x)),
        lambda f, _, x: f(x) * (x.sum(-1, keepdim=True) > 9),
    ],
)
def test_a_host_that_hands_states_on_keeps_its_blocks(way: Any) -> None:
    assert names(Sums(way, Block), torch.randn(5, 6)) == ("layers.0", "layers.1", "layers.2")


class NormAct(nn.GroupNorm):
    """A normalisation that holds an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


class Affine(nn.Module):
    """A scale and a shift for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.ones(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.inner(x)
        return y


class Places(nn.Module):
    """Learned positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places[:, :, :, :4]


class Convolution(nn.Module):
    """A residual block of convolutions, with a part of some kind."""

    def __init__(self, channels: int, part: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), part(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


@pytest.mark.parametrize("part", [NormAct, Affine, Gate, Places, lambda n: nn.Sequential(nn.BatchNorm2d(n), nn.ReLU())])
def test_normalisations_gates_and_embeddings_are_no_blocks(part: Callable[[int], nn.Module]) -> None:
    host = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 1, 1), part(4), Convolution(4, part), Convolution(4, part), nn.Conv2d(4, 6, 1), part(6)),
        *(Convolution(6, part), nn.Conv2d(6, 4, 3, 1, 1), part(4)),
    )
    assert names(host, torch.randn(2, 1, 4, 4)) == ("2", "3", "6")


def test_blocks_of_vectors_alone() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(5, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.fft.irfft(torch.fft.rfft(x) * self.weights, n=8)

    assert names(nn.Sequential(nn.Linear(4, 8), Spectral(), Spectral()), torch.randn(2, 4)) == ("1", "2")


def test_a_time_embedding_is_no_block() -> None:
    class Diffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6))
            self.blocks = nn.ModuleList(Conditioned() for _ in range(3))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            embedded = self.embedding(time)
            for block in self.blocks:
                x = block(x, embedded)
            return x

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 6)

        def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
            y: Tensor = x + self.inner(torch.cat([x, embedded], -1))
            return y

    wrapping = wrapping_of(wrap(Diffusion(), example_inputs=(torch.randn(5, 6), torch.randn(5, 6))))
    assert wrapping is not None
    assert wrapping.names == ("blocks.0", "blocks.1", "blocks.2")


def test_blocks_whose_forward_the_host_calls() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block.forward(x)
            return x

    assert names(Host(), torch.ones(1, 4)) == ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize("layers", [(3, 3), (2, 5), (4, 2)])
def test_stacks_with_as_many_blocks_as_a_block_has_parts(layers: tuple[int, int]) -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        num_heads=2,
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    wrapping = wrapping_of(wrap(transformers.T5Model(config), example_inputs=inputs))
    assert wrapping is not None
    stacks = zip(("encoder", "decoder"), layers, strict=True)
    assert wrapping.names == tuple(f"{side}.block.{l}" for side, number in stacks for l in range(number))


def test_programs_are_refused() -> None:
    host, x = nn.Sequential(Block(4), Block(4)).eval(), torch.ones(1, 4)
    for program, word in (
        (torch.jit.trace(host, x), "ScriptModule"),
        (torch.export.export(host, (x,)).module(), r"torch\.export"),
        (nn.Sequential(Block(4), torch.export.export(host, (x,)).module()), r"torch\.export"),
    ):
        with pytest.raises(TypeError, match=word):
            wrap(program, example_inputs=x)
    mixed = nn.Sequential(Block(4), torch.jit.trace(Block(4).eval(), x), Block(4))
    for example_inputs in (x, None):
        with pytest.raises(ValueError, match="TorchScript"):
            wrap(mixed, ["0", "1"], example_inputs=example_inputs)
    with pytest.raises(ValueError, match=r"0 \(.*\) and 1 more: it is compiled by TorchScript"):
        wrap(nn.Sequential(mixed[1], torch.jit.trace(Block(4).eval(), x)), example_inputs=x)
    assert names(mixed, x) == ("0", "2")


def test_reasons_name_the_outermost_module_first() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), Narrower()) for _ in range(40))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                part(x)
            return torch.cat([x, x])

    class Narrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 2), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y

    with pytest.raises(ValueError, match="must have a block") as caught:
        wrap(nn.Sequential(nn.Linear(4, 4), Wider()), example_inputs=torch.ones(2, 4))
    lines = [line.split()[0] for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines[:2] == ["0", "1"]


class Gated(nn.Module):
    """A host that multiplies what it adds by gates of its own, which hide it at the start."""

    def __init__(self, way: Callable[[Tensor, Tensor, Tensor], Tensor], gate: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Branch(6) for _ in range(3))
        self.gates = nn.ParameterList(nn.Parameter(gate.clone()) for _ in range(3))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for f, gate in zip(self.layers, self.gates, strict=True):
            x = self.way(x, gate, f(x))
        return x


@pytest.mark.parametrize(
    "way", [lambda x, g, y: x + g * y, torch.addcmul, lambda x, g, y: x + torch.tanh(g) * y], ids=["sum", "one", "tanh"]
)
@pytest.mark.parametrize(
    "gate", [torch.zeros(()), torch.zeros(6), torch.full((6,), 1e-5), torch.linspace(1e-5, 1e-4, 6)], ids=str
)
def test_a_residual_sum_behind_gates_that_are_small_at_first(way: Any, gate: Tensor) -> None:
    host, x = Gated(way, gate), torch.randn(5, 6)
    with pytest.raises(ValueError, match="the model itself adds"):
        wrap(host, example_inputs=x)
    with pytest.raises(ValueError, match=r"got 'layers.0': the model itself adds"):
        wrap(host, "layers.*", example_inputs=x)
    assert all(torch.equal(each, gate) for each in host.gates)


def sums_of_states(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for block in blocks:
        x = block(x)
        total = total + x
    return total


def skips(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    first = blocks[0](x)
    second = blocks[1](first)
    y: Tensor = blocks[2](second + first)
    return y


@pytest.mark.parametrize("way", [sums_of_states, skips])
def test_sums_across_blocks_that_are_residual_themselves(way: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Residual(6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return way(self.layers, x)

    assert names(Host(), torch.randn(5, 6)) == ("layers.0", "layers.1", "layers.2")


class Residual(Branch):
    """A block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Around(nn.Module):
    """A module around layers that does something else to its state as well."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor], layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.places = nn.Parameter(torch.randn(5, 6))
        self.way = way

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: m.norm(m.through(x + m.places)),
        lambda m, x: m.norm(m.through(x * 6**0.5)),
        lambda m, x: x + m.norm(m.through(x)),
    ],
    ids=["positions", "scale", "skip"],
)
def test_an_encoder_that_does_more_than_call_its_layers_is_no_block(way: Any) -> None:
    host = nn.Sequential(nn.Linear(4, 6), Around(way, Residual), nn.Linear(6, 2))
    assert names(host, torch.randn(5, 4)) == ("1.layers.0", "1.layers.1", "1.layers.2")


def test_an_encoder_that_adds_its_layers_outputs_is_no_block() -> None:
    def way(around: Any, x: Tensor) -> Tensor:
        for layer in around.layers:
            x = x + layer(x)
        return x

    host, x = nn.Sequential(nn.Linear(4, 6), Around(way, Branch), nn.Linear(6, 2)), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"1\.layers\.0 \(Branch\) and 5 more: the model itself adds"):
        wrap(host, example_inputs=x)
    assert wrap(host, "1", example_inputs=x).time_steps.num_steps == 1  # where it is named


def test_a_single_block_of_two_layers_of_one_kind_is_a_block() -> None:
    host = nn.Sequential(nn.Linear(4, 6), Double(), nn.Linear(6, 2))
    assert names(host, torch.randn(5, 4)) == ("1",)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(mlp(6), mlp(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


class Series(nn.Module):
    def __init__(self, way: Callable[[Any, Any, Tensor], Tensor], skip: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(Branch(6) for _ in range(3)) for _ in range(2))
        self.way, self.skip = way, skip

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for f, g in zip(self.first, self.second, strict=True):
            y = self.way(f, g, y)
        return x - y if self.skip else y


@pytest.mark.parametrize(
    "way", [lambda f, g, x: x + g(f(x)), lambda f, g, x: x + g(torch.relu(f(x))), lambda f, g, x: g(f(x)).add_(x)]
)
def test_branches_of_several_modules_in_the_host(way: Any) -> None:
    host, x = Series(way, skip=False), torch.randn(5, 6)
    with pytest.raises(ValueError, match="the model itself adds"):
        wrap(host, example_inputs=x)
    with pytest.raises(ValueError, match=r"'first.0': the model itself adds"):
        wrap(host, ["first.*", "second.*"], example_inputs=x)


def test_one_skip_across_all_layers_makes_no_branches() -> None:
    assert len(names(Series(lambda f, g, x: g(f(x)), skip=True), torch.randn(5, 6))) == 6
