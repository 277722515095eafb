"""Refinement as one transaction: the optimisers follow, and when anything fails all is as before, to the bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from small_networks import DOUBLE, Picture, assert_same_bits, batch, loss_of, network, train
from taulearn import refine
from taulearn.adaptivity import optimizer_state, transaction
from taulearn.nn import IdentitySkips, TimeSteps, TimeVariableNetwork, resnet
from taulearn.optim import parameter_groups
from test_pruning_optimizers import elementwise

Optimizers = list[torch.optim.Optimizer]


def by_kind(model: TimeVariableNetwork) -> Optimizers:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(rest, lr=0.01)]


KINDS: dict[str, Callable[[TimeVariableNetwork], Optimizers]] = {
    "SGD momentum": lambda m: [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)],
    "Adam": lambda m: [torch.optim.Adam(m.named_parameters(), lr=0.01, amsgrad=True)],
    "groups": lambda m: [torch.optim.AdamW(parameter_groups(m, 0.01, 0.001, weight_decay=0.1))],
    "Muon and AdamW": by_kind,
}
kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("by", ["split", "insert"])


def setting(kind: str = "Adam", **options: Any) -> tuple[TimeVariableNetwork, Optimizers, AveragedModel]:
    model = network(**options)
    optimizers, averaged = KINDS[kind](model), AveragedModel(model)
    go_on(model, optimizers)
    averaged.update_parameters(model)
    return model, optimizers, averaged


def go_on(model: nn.Module, optimizers: Optimizers, iterations: int = 3) -> None:
    for _ in range(iterations):
        model.zero_grad()
        loss_of(model).backward()
        for each in optimizers:
            each.step()


def state_of(optimizers: Optimizers, p: Tensor) -> dict[str, Any]:
    return next((dict(each.state[p]) for each in optimizers if p in each.state), {})


@kinds
@both
def test_state_and_groups(kind: str, by: str) -> None:
    model, optimizers, averaged = setting(kind)
    old, before = model.time_steps.values, {p: copy.deepcopy(state_of(optimizers, p)) for p in model.parameters()}
    report = refine(model, [1, 3], by=by, optimizer=optimizers, averaged=averaged)
    assert report.optimizer == "exact"
    new = {2: 1, 5: 4}  # where the new layers are, and their parents
    for i, layer in enumerate(model.layers):
        parents = model.layers[new.get(i, i)].named_parameters()
        for (name, p), q in zip(parents, layer.parameters(), strict=True):
            if i not in new:
                assert_same_bits(state_of(optimizers, q), before[q])
            elif by == "insert":
                assert state_of(optimizers, q) == {}
            else:
                theirs = state_of(optimizers, q)
                assert theirs, name
                assert_same_bits(theirs, before[p])
                mine = state_of(optimizers, p)
                assert all(value is not mine[key] for key, value in theirs.items() if isinstance(value, Tensor))
    half = [0, 1, 1, 2, 3, 3, 4] if by == "split" else [0, 1, -1, 2, 3, -1, 4]
    for key, value in before[old].items():
        now = state_of(optimizers, model.time_steps.values)[key]
        whole = isinstance(value, Tensor) and value.shape == old.shape
        assert now.tolist() == ([0.0 if l < 0 else float(value[l]) for l in half] if whole else value)
    held = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    # an optimiser made anew has its parameters in the same order, and goes on with this state
    twin = copy.deepcopy(model)
    others = KINDS[kind](twin)
    for each, other in zip(optimizers, others, strict=True):
        assert [len(g["params"]) for g in each.param_groups] == [len(g["params"]) for g in other.param_groups]
        other.load_state_dict(copy.deepcopy(each.state_dict()))
    go_on(model, optimizers)
    go_on(twin, others)
    assert_same_bits(model.state_dict(), twin.state_dict())
    assert sum(not torch.equal(a, b) for a, b in zip(model.parameters(), averaged.module.parameters(), strict=True))


@elementwise
def test_split_weights_take_the_same_steps(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Halves that are fed the same gradients stay equal, and go the way of the layer that they come from."""
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    refine(model, [2], optimizer=optimizer)
    for _ in range(3):
        halves = [*zip(twin.layers[2].parameters(), model.layers[2].parameters(), strict=True)]
        halves += zip(twin.layers[2].parameters(), model.layers[3].parameters(), strict=True)
        for p in (*model.parameters(), *twin.parameters()):
            p.grad = torch.ones_like(p)
        for p, q in halves:
            q.grad = p.grad = torch.linspace(-1, 1, p.numel(), dtype=DOUBLE).view_as(p)
        optimizer.step()
        other.step()
        for p, q in halves:
            assert torch.equal(p, q)


def test_gradients_of_what_was_there_are_kept() -> None:
    model = network()
    loss_of(model).backward()
    values = model.time_steps.values.grad
    assert values is not None
    kept = [[p.grad for p in layer.parameters()] for layer in model.layers]
    refine(model, [1])
    assert_same_bits(model.time_steps.values.grad, values[[0, 1, 1, 2, 3, 4]])
    assert all(p.grad is g for p, g in zip(model.layers[3].parameters(), kept[2], strict=True))


def test_lbfgs_is_reset_and_the_report_says_so() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    report = refine(model, [1], optimizer=optimizer)
    assert report.optimizer == "reset"
    assert "was reset" in str(report)
    optimizer.step(closure)


def test_frozen_parents_have_frozen_children() -> None:
    model = network()
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    refine(model, [1, 2], optimizer=optimizer)
    assert [p.requires_grad for layer in model.layers[1:5] for p in layer.parameters()] == [*[False] * 4, *[True] * 4]
    train(model, optimizer)


class Failure(Exception):
    pass


FAILING: dict[str, tuple[Any, str]] = {
    "steps": (TimeSteps, "grow_"),
    "their vector": (TimeSteps, "take_"),
    "skips": (IdentitySkips, "grow_"),
    "the network": (TimeVariableNetwork, "grow_layers_"),
    "a copy": (TimeVariableNetwork, "copy_of"),
    "the optimiser": (transaction, "follow"),
    "its groups": (optimizer_state, "_follow_in_group"),
    "its state": (optimizer_state, "_follow_in_state"),
    "its check": (optimizer_state, "check_follows"),
}


@kinds
@both
@pytest.mark.parametrize("where", FAILING)
@pytest.mark.parametrize("when", ["before", "after", "second"])
def test_when_anything_fails_all_is_as_before(
    kind: str, by: str, where: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers, averaged = setting(kind)
    picture = Picture(model, averaged, *optimizers)
    owner, name = FAILING[where]
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if when == "before" or (when == "second" and len(calls) == 2):
            raise Failure
        result = original(*args, **options)
        if when == "after":
            raise Failure
        return result

    monkeypatch.setattr(owner, name, failing)
    for train_what in (None, "new"):
        calls.clear()
        if when == "second" and where in ("the optimiser", "its groups", "its state", "its check"):
            continue  # which may be called once
        with pytest.raises(Failure):
            refine(model, [1, 3], by=by, optimizer=optimizers, averaged=averaged, train=train_what)
        picture.assert_unchanged()
        assert (model.time_steps.next_number, model.time_steps.parent, model.time_steps.held) == (5, {}, frozenset())
        assert all(p.requires_grad for p in model.parameters())
    monkeypatch.undo()
    twin, others, _ = setting(kind)
    go_on(model, optimizers)
    go_on(twin, others)
    assert_same_bits(model.state_dict(), twin.state_dict())


def test_a_module_that_cannot_be_copied() -> None:
    model, optimizers, averaged = setting()
    vars(model.layers[3])["generator"] = (i for i in range(3))
    picture = Picture(model, averaged, *optimizers)
    with pytest.raises(TypeError, match="generator"):
        refine(model, [1, 3], optimizer=optimizers, averaged=averaged)
    picture.assert_unchanged()


def test_a_new_layer_has_parameters_for_which_there_are_groups() -> None:
    model = resnet(3, 4, 2, 3, dtype=DOUBLE)
    optimizers = by_kind(model)
    model(batch()).sum().backward()

    def make(neighbour: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4, dtype=DOUBLE), nn.LayerNorm(4, dtype=DOUBLE))

    refine(model, [1], by="insert", layer=make, optimizer=optimizers)
    sizes = [sorted(p.ndim for group in each.param_groups for p in group["params"]) for each in optimizers]
    assert sizes == [[2] * 5, [1] * 7]

    def convolution(neighbour: nn.Module) -> nn.Module:
        return nn.Conv1d(4, 4, 1, dtype=DOUBLE)

    picture = Picture(model, *optimizers)
    with pytest.raises(ValueError, match=r"layer .*'weight'"):
        refine(model, [1], by="insert", layer=convolution, optimizer=optimizers)
    picture.assert_unchanged()
    refine(model, [1], by="insert", layer=convolution)
