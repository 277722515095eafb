"""Deleting blocks: what goes, what stays to the bit, and that a failure changes nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from small_networks import assert_same_bits
from taulearn import prune, summary, wrap
from taulearn._calls import call
from taulearn.adaptivity.coarsen import check_prunable
from taulearn.nn.pruned_models import prunable_of
from taulearn.wrapping import PassThrough, wrapping_of
from wrapping.hosts import BY_NAME, HOSTS, Block, Host, evaluated, every_host, sequential, tensor


def step(model: Any, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tensor(call(model, inputs)).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def zeroed(host: Host, gone: list[int], **options: Any) -> Any:
    model = host.wrapped(**options)
    with torch.no_grad():
        model.time_steps.values.copy_(torch.linspace(0.5, 1.2, len(host.blocks)))
        model.time_steps.values[gone] = 0.0
    return model


@every_host
@pytest.mark.parametrize("gone", [[0], [1, 2], [3], [0, 2, 3]], ids=str)
def test_deleting_blocks_with_zero_steps_changes_nothing(host: Host, gone: list[int]) -> None:
    model = zeroed(host, gone)
    before = evaluated(model, host.inputs())
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [model.get_submodule(name) for name in host.blocks]
    sizes = [1 + sum(p.numel() for p in block.parameters()) for block in blocks]
    report = prune(model)
    assert sorted(d.layer for d in report.deleted) == gone
    torch.testing.assert_close(evaluated(model, host.inputs()), before, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == parameters - sum(sizes[l] for l in gone)
    assert report.parameters_before - report.parameters_after == sum(sizes[l] for l in gone)
    left = set(model.modules())
    assert [block in left for block in blocks] == [l not in gone for l in range(4)]
    assert not any(isinstance(module, PassThrough) for module in left)
    for name in host.lists:
        length = sum(block.rpartition(".")[0] == name for block in host.blocks)
        others = 3 if name == "" else int("stages.1" in name)
        lost = sum(host.blocks[l].rpartition(".")[0] == name for l in gone)
        assert len(model.get_submodule(name)._modules) == length + others - lost
    assert model.time_steps.origin == tuple(l for l in range(4) if l not in gone)


@every_host
def test_deletions_one_after_the_other(host: Host) -> None:
    """After each of them the model trains on."""
    model = zeroed(host, [])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number in (3, 2, 1):
        at = number // 2
        with torch.no_grad():
            model.time_steps.values[at] = 0.0
        before = evaluated(model, host.inputs())
        assert len(prune(model, optimizer=optimizer).deleted) == 1
        torch.testing.assert_close(evaluated(model, host.inputs()), before, rtol=0, atol=1e-6)
        assert model.time_steps.num_steps == number
        step(model, optimizer, host.inputs())


@every_host
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_the_state_of_survivors_is_kept_to_the_bit(host: Host, optimizer: Any) -> None:
    model = zeroed(host, [])
    made: torch.optim.Optimizer = optimizer(model.parameters())
    for _ in range(2):
        step(model, made, host.inputs())
    old, blocks = model.time_steps.values, wrapping_of(model).layers  # type: ignore[union-attr]
    before = {p: copy.deepcopy(state) for p, state in made.state.items()}
    lost = {p for l in (0, 2) for p in blocks[l].parameters()}
    assert prune(model, keep=[1, 3], optimizer=made).optimizer == "exact"
    new = model.time_steps.values
    assert made.state.keys() == (before.keys() - lost - {old}) | {new}
    assert {p for group in made.param_groups for p in group["params"]} == set(model.parameters())
    for p, state in made.state.items():
        expected = before[old if p is new else p]
        if p is new:
            expected = {k: v[[1, 3]] if v.ndim else v for k, v in expected.items()}
        assert_same_bits(state, expected)
    step(model, made, host.inputs())


def test_an_optimiser_without_state_per_parameter_is_reset() -> None:
    host = BY_NAME["sequential"]
    model = host.wrapped()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    step(model, optimizer, host.inputs())
    report = prune(model, keep=[1, 3], optimizer=optimizer)
    assert report.optimizer == "reset"
    assert "was reset" in str(report)
    step(model, optimizer, host.inputs())


def test_averaged_weights_are_pruned_alike() -> None:
    host = BY_NAME["gpt2"]
    model = host.wrapped()
    averaged = AveragedModel(model)
    prune(model, keep=[0, 3], averaged=averaged)
    assert averaged.module.config.num_hidden_layers == model.config.num_hidden_layers == 2
    averaged.update_parameters(model)
    assert torch.equal(evaluated(averaged.module, host.inputs()), evaluated(model, host.inputs()))


@every_host
def test_a_copy_is_pruned_without_the_original(host: Host) -> None:
    model = host.wrapped()
    before = evaluated(model, host.inputs())
    twin = copy.deepcopy(model)
    prune(twin, keep=[0, 3])
    assert model.time_steps.num_steps == 4
    assert torch.equal(evaluated(model, host.inputs()), before)


class Failure(Exception):
    pass


@every_host
@pytest.mark.parametrize("where", ["optimizer", "averaged"])
def test_a_failure_leaves_all_as_it_was(host: Host, where: str) -> None:
    model = zeroed(host, [])
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, host.inputs())
    averaged = AveragedModel(model)

    def picture() -> list[Any]:
        found: list[Any] = [[(n, id(p)) for n, p in each.named_parameters()] for each in (model, averaged)]
        found += [[(n, id(m)) for n, m in model.named_modules()], repr(model), model.time_steps.origin]
        found += [[{k: id(v) for k, v in vars(m).items() if k in ("forward", "config")} for m in model.modules()]]
        found += [
            [vars(m).get("layer_idx") for m in model.modules()],
            id(wrapping_of(model)),
            str(vars(model).get("config")),
        ]
        return found

    before, output = picture(), evaluated(model, host.inputs())
    if where == "optimizer":
        optimizer.state = FailingState(optimizer.state)
    else:
        fail(averaged.module)
    with pytest.raises(Failure):
        prune(model, keep=[0, 3], optimizer=optimizer, averaged=averaged)
    assert picture() == before
    assert torch.equal(evaluated(model, host.inputs()), output)


class FailingState(dict[Any, Any]):
    def pop(self, *args: Any) -> Any:
        raise Failure


def fail(model: nn.Module) -> None:
    def keep_(*_: Any) -> None:
        raise Failure

    vars(model.time_steps)["keep_"] = keep_


class ByNumber(nn.Module):
    """Takes its blocks by their numbers, so that the list must stay as long as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))
        self.scales = [1.0, 2.0, 3.0]

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.scales[i] * self.blocks[i](x)
        return x


class Paired(ByNumber):
    """Runs through two lists at once: with one of them shorter it would go wrong without an error."""

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=False):
            x = scale * block(x)
        return x


class Attributes(nn.Module):
    """Blocks that return tuples, in attributes."""

    class Tupled(Block):
        def forward(self, x: Tensor) -> Any:
            return None, super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Tupled(4), self.Tupled(4)
        self.third = nn.ModuleDict({"inner": self.Tupled(4)})

    def forward(self, x: Tensor) -> Tensor:
        _, x = self.first(x)
        _, x = self.second(x)
        _, x = self.third["inner"](x)
        return x


@pytest.mark.parametrize("make", [ByNumber, Paired, Attributes])
def test_where_a_list_cannot_get_shorter_a_placeholder_stays(make: type[nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 4)
    wrap(model, example_inputs=x)
    with torch.no_grad():
        model.time_steps.values[0] = 0.0
    before, parameters = model(x), sum(p.numel() for p in model.parameters())
    prune(model)
    assert torch.equal(model(x), before)
    assert sum(isinstance(module, PassThrough) for module in model.modules()) == 1
    assert sum(p.numel() for p in model.parameters()) == parameters - 1 - sum(p.numel() for p in Block(4).parameters())
    assert not torch.equal(before, x)


class Handing(nn.Module):
    """Its first block makes what the others need, as T5's does with its position bias."""

    class Biased(Block):
        def __init__(self, first: bool) -> None:
            super().__init__(4)
            self.bias = nn.Parameter(torch.arange(4.0)) if first else None

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
            bias = self.bias if bias is None else bias
            return super().forward(x if bias is None else x + bias) - (0.0 if bias is None else bias), bias

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Biased(i == 0) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


def test_a_block_that_others_depend_on_stays() -> None:
    model = wrap(Handing(), example_inputs=torch.randn(2, 4))
    wrapping = wrapping_of(model)
    assert wrapping is not None
    assert list(wrapping.fixed_layers()) == [0]
    assert wrapping.shorten == {"blocks"}
    with torch.no_grad():
        model.time_steps.values[:2] = 0.0
    assert [d.layer for d in prune(model).deleted] == [1]
    with pytest.raises(ValueError, match=r"keep must .*got .*another output without it"):
        prune(model, keep=[1])


def test_without_inputs_only_what_is_certain_can_be_deleted() -> None:
    model = wrap(ByNumber(), "blocks.*")
    with pytest.raises(ValueError, match=r"a layer that can be deleted, got none: .*give example_inputs to wrap"):
        prune(model)
    prune(wrap(sequential(), "[1234]"), keep=[0])
    prune(wrap(BY_NAME["encoder"].make(), "layers.*"), keep=[0])


def test_plain_lists_of_modules_follow() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(4) for _ in range(3))
            self.order = [*self.blocks]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.order:
                x = block(x)
            return x

    model = wrap(Both(), example_inputs=torch.ones(1, 4))
    prune(model, keep=[1])
    assert len(model.order) == len(model.blocks) == 1
    assert model.order[0] is model.blocks[0]


def test_an_encoder_may_lose_all_its_layers() -> None:
    encoder = BY_NAME["encoder"].make()
    model = nn.Sequential(nn.Linear(8, 8), encoder, Block(8)).eval()
    x = BY_NAME["encoder"].inputs()
    wrap(model, example_inputs=x)
    with torch.no_grad():
        model.time_steps.values[:4] = 0.0
        before = model(x)
        prune(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert encoder.num_layers == 0


def test_summary_of_a_wrapped_model() -> None:
    host = BY_NAME["gpt2"]
    model = host.wrapped(init=[1.0, 0.5, 0.25, 0.25])
    prune(model, keep=[0, 1, 3])
    found = summary(model, {"input_ids": host.inputs()})
    assert found.layers == (0, 1, 3)
    assert found.shares == pytest.approx((1 / 1.75, 0.5 / 1.75, 0.25 / 1.75))
    assert found.kinds == tuple(f"transformer.h.{l} GPT2Block" for l in (0, 1, 3))
    assert found.parameters == (sum(p.numel() for p in model.transformer.h[0].parameters()),) * 3
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    assert found.milliseconds is not None
    assert all(ms > 0 for ms in found.milliseconds)
    assert found.total_milliseconds is not None
    assert found.total_milliseconds > 0
    assert "GPT2LMHeadModel" in str(found)
    assert type(vars(model.transformer.h[0])["forward"]).__name__ == "WatchedBlock"


def test_check_prunable_gives_the_wrapping() -> None:
    model = HOSTS[0].wrapped()
    assert check_prunable(model) is prunable_of(model) is wrapping_of(model)
