"""What cannot be wrapped, unwrapped or annealed, and the words for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import fit, nn as taulearn_nn, prune, unwrap, wrap
from taulearn.wrapping import anneal_to_one
from wrapping.hosts import BY_NAME, Block, Host, every_host, sequential
from wrapping.test_find_blocks import Scaled

X = torch.ones(1, 4)


@every_host
def test_wrapping_twice(host: Host) -> None:
    model = host.wrapped()
    with pytest.raises(ValueError, match="model must not be wrapped yet, got one that is: use its time_steps, or call"):
        wrap(model, example_inputs=host.inputs())


def test_a_model_in_a_wrapper_of_data_parallel_training() -> None:
    """It would not average the gradients of the time steps (DistributedDataParallel: in the tests of two processes)."""
    with pytest.raises(TypeError, match=r"model must be the model itself, got it in a DataParallel: hand over wrapper"):
        wrap(nn.DataParallel(sequential()), example_inputs=X)


def test_a_compiled_model() -> None:
    model = sequential()
    with pytest.raises(TypeError, match="model must be the model itself, got it compiled: wrap it first, then compile"):
        wrap(torch.compile(model), example_inputs=X)
    inner = sequential()
    inner[1] = torch.compile(inner[1])
    with pytest.raises(TypeError, match="got its module '1' compiled: wrap it first"):
        wrap(inner, example_inputs=X)
    assert wrap(model, example_inputs=X).time_steps.num_steps > 0


@pytest.mark.parametrize("constraint", ["free", "simplex"])
def test_an_optimiser_from_before(constraint: str) -> None:
    """It holds no time steps, and would leave them as they are without a word."""
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrap(model, example_inputs=X, constraint=constraint)
    acts: list[Callable[[], Any]] = [
        lambda: fit(
            model, (X, torch.zeros(1, 2)), loss=nn.functional.mse_loss, optimizer=optimizer, epochs=1, progress=False
        ),
    ]
    for act in acts:
        with pytest.raises(
            ValueError, match=r"optimizer must hold the model's time steps, got one .* make it after wrap"
        ):
            act()
    model.time_steps.values.requires_grad_(False)
    before = model.time_steps.tau.detach().clone()
    acts[0]()
    torch.testing.assert_close(model.time_steps.tau.detach(), before)


def shared_called_twice() -> nn.Module:
    block = Block(4)
    return nn.Sequential(block, Block(4), block)


class Twice(nn.Module):
    """One block in two places, only one of which is called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.again = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(x, src_key_padding_mask=mask)
        return y


def with_a_wrapped_part() -> nn.Module:
    return nn.Sequential(wrap(sequential(), "1"), Block(2))


def with_steps() -> nn.Module:
    model = sequential()
    vars(model)["time_steps"] = [1.0]
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (sequential, {}, "example_inputs must be given where blocks are to be found by a forward pass, got None"),
        (sequential, {"blocks": "block*"}, r"blocks must match names of the model, got 'block\*', which matches none"),
        (BY_NAME["encoder"].make, {"blocks": "layer.0"}, "got 'layer.0', which matches none: did you mean 'layers.0'"),
        (sequential, {"blocks": []}, "blocks must be a name or pattern, or several of them, got \\[\\]"),
        (sequential, {"blocks": [1]}, "blocks must be a name or pattern"),
        (sequential, {"blocks": ["1", "1.inner"]}, "blocks must not contain each other, got '1' and '1.inner'"),
        (
            sequential,
            {"blocks": "0", "example_inputs": X},
            r"got '0': its output \(1, 6\) has another shape than its inp",
        ),
        (
            sequential,
            {"blocks": "1.norm", "train": "hea"},
            "train must match names of the model, got 'hea', which matches",
        ),
        (
            shared_called_twice,
            {"blocks": "0", "example_inputs": X},
            "got '0': it was called 2 times: a block used in sever",
        ),
        (
            shared_called_twice,
            {"blocks": "0"},
            "blocks must have one place each, got '0', which is also 2: a block used",
        ),
        (Twice, {"example_inputs": X}, "blocks must have one place each, got 'blocks.0', which is also again"),
        (
            lambda: nn.Sequential(Scaled()),
            {"blocks": "0", "example_inputs": X[:, :3]},
            "got '0': it changed it in place",
        ),
        (lambda: nn.Sequential(nn.Tanh()), {"blocks": "0", "example_inputs": X}, "got '0': it has no parameters"),
        (
            Nested,
            {"example_inputs": X[None]},
            "got the TransformerEncoder 'encoder' that does: build torch.nn.Transformer",
        ),
        (with_a_wrapped_part, {"example_inputs": X}, "model must not contain wrapped modules, got '0', which is"),
        (with_steps, {"example_inputs": X}, "model must not have time steps yet, got a Sequential with time_steps"),
        (
            lambda: taulearn_nn.resnet(4, 3, 1, 3),
            {"example_inputs": X},
            "must not have time steps yet, got a TimeVariable",
        ),
        (sequential, {"example_inputs": X, "constraint": "fre"}, "did you mean 'free'"),
        (
            sequential,
            {"example_inputs": X, "init": [1.0, 2.0]},
            r"init must be a number or 4 numbers, got shape \(2,\)",
        ),
        (
            sequential,
            {"example_inputs": X, "constraint": "dependent", "horizon": 3.0},
            "init must sum to horizon = 3.0",
        ),
    ],
)
def test_what_cannot_be_wrapped(make: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    model = make()
    before = [dict(vars(m)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        wrap(model, **options)
    assert [vars(m).keys() for m in model.modules()] == [each.keys() for each in before]
    assert [p.requires_grad for p in model.parameters()] == flags


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        wrap(lambda x: x, example_inputs=X)  # type: ignore[type-var]


def test_a_block_that_was_not_called() -> None:
    class Idle(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.again = Block(4)

    with pytest.raises(ValueError, match="got 'again': it was not called"):
        wrap(Idle(), "again", example_inputs=X)


def test_steps_that_meet_something_else_than_a_block() -> None:
    model = wrap(sequential(), "0")
    with pytest.raises(ValueError, match=r"block '0' must return a state of its input's shape, got \(1, 4\) in and"):
        model(X)
    model = wrap(nn.Sequential(Scaled()), "0")
    with pytest.raises(ValueError, match="block '0' must leave its input as it is, but it changed it in place"):
        model(X[:, :3].clone())


def test_nested_tensors_that_come_after_wrapping() -> None:
    model = Nested().eval()
    model.encoder.use_nested_tensor = False
    wrap(model, example_inputs=X[None].expand(2, 3, 4))
    model.encoder.use_nested_tensor = True
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"must get a plain tensor, got a nested one: build torch.nn.Tran"),
    ):
        model(torch.rand(2, 3, 4), mask)


def test_what_cannot_be_unwrapped() -> None:
    with pytest.raises(ValueError, match="model must be wrapped, got Sequential without"):
        unwrap(sequential())
    model = wrap(sequential(), example_inputs=X, init=[1.0, 0.5, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"time steps must all be 1, got \[1.0, 0.5, 1.0, 1.0\]: without them"):
        unwrap(model)
    assert not hasattr(unwrap(model, discard_steps=True), "time_steps")


def test_what_cannot_be_annealed() -> None:
    model = wrap(sequential(), example_inputs=X, init=0.5)
    for fraction in (-0.1, 1.1, float("nan"), "x", None):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
            anneal_to_one(model, fraction)
    with pytest.raises(ValueError, match="model must be wrapped, got Sequential"):
        anneal_to_one(sequential(), 1.0)
    for constraint in ("dependent", "simplex"):
        model = wrap(sequential(), example_inputs=X, init=0.5, constraint=constraint)
        with pytest.raises(
            ValueError, match=r"able to be 1 all at once, got constraint .* with horizon 2 for 4 blocks"
        ):
            anneal_to_one(model, 1.0)


def test_pruning_everything() -> None:
    model = wrap(sequential(), example_inputs=X)
    with pytest.raises(ValueError, match=r"keep must name layers in 0 .. 3, got \[\]"):
        prune(model, keep=[])
    with pytest.raises(ValueError, match="budget must be an integer >= 1, got 0: at least one layer stays"):
        prune(model, budget=0)
    with torch.no_grad():
        model.time_steps.values.zero_()
    assert prune(model).layers_after == 1
