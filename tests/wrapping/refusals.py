"""Bad inputs of wrap and of what wrapped models offer: rows of the table in tests/refusals.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refusals import NAN, R, each, on, wrapped
from taulearn import unwrap, wrap
from taulearn.nn import (
    resnet,
)
from taulearn.wrapping import anneal_to_one, fold_units
from wrapping.hosts import BY_NAME, Block, sequential
from wrapping.test_find_blocks import Scaled


class Twice(nn.Module):
    """One block in two places, only one of which is called."""

    def __init__(self, again: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.again = again or self.blocks[0]

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


def shared_called_twice() -> nn.Module:
    block = Block(4)
    return nn.Sequential(block, Block(4), block)


def with_a_wrapped_part() -> nn.Module:
    return nn.Sequential(wrap(sequential(), "1"), Block(2))


def with_steps() -> nn.Module:
    model = sequential()
    vars(model)["time_steps"] = [1.0]
    return model


def with_a_compiled_part() -> nn.Module:
    model = sequential()
    model[1] = torch.compile(model[1])
    return model


def wrapping(make: Callable[[], nn.Module], *blocks: Any, **options: Any) -> Callable[[], None]:
    """wrap of a model that must be left as it was."""
    return on(make, lambda model: wrap(model, *blocks, **options))


def scaled() -> nn.Module:
    return nn.Sequential(Scaled())


def two_blocks() -> nn.Module:
    return nn.Sequential(Block(4), Block(4))


def wrap_half(constraint: str) -> nn.Module:
    return wrap(sequential(), example_inputs=X4, init=0.5, constraint=constraint)


def diverged() -> nn.Module:
    model = wrap(sequential(), **SEEN)
    torch.nn.init.constant_(model.time_steps.values, torch.inf)
    return model


def tied() -> nn.Module:
    model = wrap(two_blocks(), example_inputs=X4, form="branches", init=0.5)
    model[1].inner[3].weight = model[0].inner[3].weight  # type: ignore[index, union-attr]
    return model


class Rounded(nn.Module):
    """x + W x with whole numbers in W."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Whole()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return x + y


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(16, dtype=torch.int8).view(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype)


def quantised() -> nn.Module:
    return wrap(nn.Sequential(Rounded(), Rounded()), example_inputs=X4, form="branches", init=0.5)


X4 = torch.ones(1, 4)
TOKENS = {"example_inputs": BY_NAME["bert"].inputs()}
SEEN = {"example_inputs": X4}

WRAPPING = [
    *[
        R(ValueError, "model", on(host.wrapped, lambda m, host=host: wrap(m, example_inputs=host.inputs())))
        for host in (BY_NAME["encoder"], BY_NAME["gpt2"])
    ],
    R(TypeError, "model", lambda: wrap(lambda x: x, **SEEN), ("function",)),
    R(TypeError, "model", lambda: wrap(nn.DataParallel(sequential()), **SEEN), ("DataParallel",)),
    R(TypeError, "model", lambda: wrap(torch.compile(sequential()), **SEEN), ("compiled",)),
    R(TypeError, "model", lambda: wrap(with_a_compiled_part(), **SEEN), ("'1'", "compiled")),
    R(ValueError, "model", wrapping(with_a_wrapped_part, **SEEN), ("'0'",)),
    R(ValueError, "model", wrapping(with_steps, **SEEN), ("Sequential", "time_steps")),
    R(ValueError, "model", wrapping(lambda: resnet(4, 3, 1, 3), **SEEN), ("TimeVariable",)),
    R(ValueError, "model", wrapping(Nested, example_inputs=X4[None]), ("TransformerEncoder", "'encoder'")),
    R(ValueError, "example_inputs", wrapping(sequential), ("None",)),
    R(ValueError, "blocks", wrapping(sequential, "block*"), ("'block*'",)),
    R(ValueError, "blocks", wrapping(BY_NAME["encoder"].make, "layer.0"), ("'layer.0'", "'layers.0'")),
    R(ValueError, "blocks", wrapping(sequential, []), ("[]",)),
    R(ValueError, "blocks", wrapping(sequential, [1]), ("[1]",)),
    R(ValueError, "blocks", wrapping(sequential, ["1", "1.inner"]), ("'1'", "'1.inner'")),
    R(ValueError, "blocks", wrapping(sequential, "0", **SEEN), ("'0'", "(1, 6)")),
    R(ValueError, "blocks", wrapping(shared_called_twice, "0", **SEEN), ("'0'", "2 times")),
    R(ValueError, "blocks", wrapping(shared_called_twice, "0"), ("'0'", "2")),
    R(ValueError, "blocks", wrapping(Twice, **SEEN), ("'blocks.0'", "again")),
    R(ValueError, "blocks", wrapping(lambda: Twice(Block(4)), "again", **SEEN), ("'again'", "called")),
    R(ValueError, "blocks", wrapping(scaled, "0", example_inputs=X4[:, :3]), ("'0'", "in place")),
    R(ValueError, "blocks", wrapping(lambda: nn.Sequential(nn.Tanh()), "0", **SEEN), ("'0'", "parameters")),
    R(ValueError, "train", wrapping(sequential, "1.norm", train="hea"), ("'hea'",)),
    R(ValueError, "constraint", wrapping(sequential, **SEEN, constraint="fre"), ("'fre'", "'free'")),
    R(ValueError, "init", wrapping(sequential, **SEEN, init=[1.0, 2.0]), ("4", "(2,)")),
    *[
        R(ValueError, "init", wrapping(sequential, **SEEN, constraint=constraint, horizon=3.0), ("horizon = 3.0",))
        for constraint in ("dependent", "simplex")
    ],
    R(ValueError, "units", wrapping(two_blocks, "[01]", units="displacment"), ("'displacement'", "'steps'")),
    R(ValueError, "units", wrapping(two_blocks, "[01]", units="displacement", constraint="simplex"), ("'simplex'",)),
    R(ValueError, "units", wrapping(two_blocks, "[01]", units="displacement", lower_bound=0.1), ("lower_bound 0.1",)),
    R(ValueError, "units", wrapping(sequential, **SEEN, form="branches", units="displacement"), ("'displacement'",)),
    R(ValueError, "form", wrapping(sequential, **SEEN, form="branch"), ("'branch'", "'branches'")),
    R(ValueError, "form", wrapping(BY_NAME["bert"].make, **TOKENS, form="branches"), ("layer.0'", "zeroing test")),
    R(ValueError, "form", wrapping(BY_NAME["bert"].make, **TOKENS, per="branch"), ("layer.0'", "'whole'")),
    R(ValueError, "per", wrapping(sequential, **SEEN, per="blocks"), ("'blocks'", "'block'")),
    R(ValueError, "per", wrapping(sequential, **SEEN, form="whole", per="branch"), ("'whole'", "'branch'")),
    R(ValueError, "per", wrapping(sequential, **SEEN, per="branch"), ("'1'", "'inner'")),
    R(ValueError, "example_inputs", wrapping(sequential, "1", form="branches"), ("None", "'whole'")),
    R(ValueError, "example_inputs", wrapping(sequential, "1", per="branch"), ("None",)),
    R(ValueError, "steps", on(tied, unwrap), ("'0.inner.3.weight'", "'1.inner.3.weight'", "save_model")),
    R(ValueError, "steps", on(diverged, unwrap), ("finite",)),
    R(ValueError, "model", lambda: torch.inference_mode()(wrap)(sequential(), **SEEN), ("inference_mode",)),
    R(ValueError, "steps", on(quantised, unwrap), ("'0.inner.weight'", "quantised", "save_model")),
    R(ValueError, "model", on(two_blocks, fold_units)),
    R(ValueError, "block", on(lambda: wrap(sequential(), "0"), lambda m: m(X4)), ("'0'", "(1, 4)")),
    R(ValueError, "block", lambda: wrap(scaled(), "0")(X4[:, :3].clone()), ("'0'", "in place")),
    R(ValueError, "model", on(sequential, unwrap), ("Sequential",)),
    R(TypeError, "model", lambda: unwrap(torch.compile(wrap(sequential(), **SEEN))), ("compiled",)),
    R(
        ValueError,
        "steps",
        on(lambda: wrap(sequential(), **SEEN, form="whole", init=[1.0, 0.5, 1.0, 1.0]), unwrap),
        ("[1.0, 0.5, 1.0, 1.0]", "discard_steps"),
    ),
    *each(ValueError, "fraction", lambda f: on(wrapped, lambda m: anneal_to_one(m, f))(), -0.1, 1.1, NAN, "x", None),
    R(ValueError, "model", on(sequential, lambda m: anneal_to_one(m, 1.0)), ("Sequential",)),
    R(TypeError, "averaged", on(wrapped, lambda m: anneal_to_one(m, 0.5, averaged=m))),
    *[
        R(
            ValueError,
            "constraint",
            on(partial(wrap_half, constraint), lambda m: anneal_to_one(m, 1.0)),
            ("horizon 2", "4 blocks"),
        )
        for constraint in ("dependent", "simplex")
    ],
]
