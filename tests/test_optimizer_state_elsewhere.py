"""Optimisers whose state lies elsewhere than in one entry per parameter: "exact" is said of nothing that was lost."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import DOUBLE, KEEP, assert_same_bits, loss_of, network, train
from taulearn import Pruning, fit, prune
from taulearn.nn import resnet
from taulearn.optim import parameter_groups, register_projection


class Around(torch.optim.Optimizer):
    """A wrapper around another optimiser, which keeps its state itself, as SAM and Lookahead do."""

    def __init__(self, params: Any, name: str = "base_optimizer", *, shared: bool = True, slow: bool = False) -> None:
        super().__init__(params, {"lr": 0.05})
        groups = self.param_groups if shared else [{**g, "params": list(g["params"])} for g in self.param_groups]
        inner: Any = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        if name == "nested":
            inner, name = [{"first": (inner,)}], "inside"
        vars(self)[name], self.slow = inner, slow
        self.find: Callable[[], Any] = lambda: inner[0]["first"][0] if isinstance(inner, list) else inner

    @property
    def inner(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self.find()
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        for p in (p for group in self.param_groups for p in group["params"] if self.slow):
            slow = self.state[p].setdefault("slow", p.clone())
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class Combined(torch.optim.Optimizer):
    """Several in one, with all their groups."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.optimizers:
            each.step()


class Lazily(torch.optim.Optimizer):
    """Gradient descent that makes what ``extra`` says of each parameter when it is first stepped, and uses it."""

    def __init__(self, params: Any, extra: Callable[[Tensor], Any], *, momentum: bool = True) -> None:
        super().__init__(params, {"lr": 0.05})
        self.extra, self.momentum = extra, momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            if not state:
                state["extra"] = self.extra(p)
                if self.momentum:
                    state["momentum"] = torch.zeros_like(p)
            for each in _tensors(state["extra"]):
                assert each.shape in {x.shape for x in _tensors(self.extra(p))}, "state of another parameter"
                each.add_(1.0)
            p.sub_(p.grad, alpha=0.05)
            if self.momentum:
                state["momentum"].add_(p.grad)


class Projector:
    """Something that only the optimiser understands, as GaLore keeps."""

    def __init__(self, p: Tensor) -> None:
        self.basis = torch.eye(len(p), dtype=p.dtype)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
    elif isinstance(value, Projector):
        yield value.basis


class Flat(torch.optim.Optimizer):
    """Momentum of all parameters in one vector: in the state of the first one, under a name, or in an attribute."""

    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, {"lr": 0.05})
        self.where = where

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradient = torch.cat([p.grad.reshape(-1) for p in parameters])
        if self.where == "attribute":
            place: Any = vars(self)
        elif self.where == "group":
            place = self.param_groups[0]
        else:
            place = self.state[parameters[0] if self.where == "first" else self.where]
        buffer = place.setdefault("buffer", torch.zeros_like(gradient))
        buffer.mul_(0.9).add_(gradient)
        for p, d in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
            p.sub_(d.view_as(p), alpha=0.05)


class TestInnerOptimizers:
    @pytest.mark.parametrize("name", ["base_optimizer", "base", "optimizer", "_fast", "nested"])
    @pytest.mark.parametrize("shared", [True, False], ids=["shared groups", "groups of its own"])
    @pytest.mark.parametrize("slow", [True, False], ids=["state of its own", "none"])
    def test_a_wrapper_goes_on_as_its_inner_one(self, name: str, shared: bool, slow: bool) -> None:
        """Momentum of the survivors, and the wrapper's own state, are what they were, bit by bit."""
        model = network()
        optimizer = Around(model.parameters(), name, shared=shared, slow=slow)
        train(model, optimizer)
        old, before = model.time_steps.values, copy.deepcopy(optimizer.inner.state[model.time_steps.values])
        slow_before = {id(p): s["slow"].clone() for p, s in optimizer.state.items()}
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        held = {id(p) for p in model.parameters()}
        for each in (optimizer, optimizer.inner):
            assert {id(p) for group in each.param_groups for p in group["params"]} == held
            assert {id(p) for p in each.state} <= held
        momentum = optimizer.inner.state[model.time_steps.values]["momentum_buffer"]
        assert torch.equal(momentum, before["momentum_buffer"][list(KEEP)])
        for p, state in optimizer.state.items():
            is_steps = p is model.time_steps.values
            assert torch.equal(state["slow"], slow_before[id(old)][list(KEEP)] if is_steps else slow_before[id(p)])
        tau = model.time_steps.tau.detach().clone()
        train(model, optimizer, 2)
        assert bool((model.time_steps.tau.detach() != tau).all())

    def test_a_combination_of_several(self) -> None:
        model = network()
        muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
        both = Combined(muon, adamw)
        register_projection(both, model)
        train(model, both)
        state = copy.deepcopy(adamw.state[model.time_steps.values])
        assert prune(model, keep=KEEP, optimizer=both).optimizer == "exact"
        after = adamw.state[model.time_steps.values]
        assert torch.equal(after["exp_avg"], state["exp_avg"][list(KEEP)])
        assert all(any(p is q for q in model.parameters()) for each in (muon, adamw) for p in each.state)
        train(model, both)

    def test_if_the_inner_one_cannot_follow_all_is_as_before(self) -> None:
        model = network()
        optimizer = Around(model.parameters(), shared=False, slow=True)
        train(model, optimizer)
        vars(optimizer.inner)["history"] = [torch.zeros(4)]
        before = copy.deepcopy([each.state_dict() for each in (model, optimizer, optimizer.inner)])
        with pytest.raises(ValueError, match="'history'"):
            prune(model, keep=KEEP, optimizer=optimizer)
        assert_same_bits([each.state_dict() for each in (model, optimizer, optimizer.inner)], before)

    @pytest.mark.parametrize("slow", [True, False])
    def test_a_run_resumes_with_the_state_of_the_inner_one(self, tmp_path: Path, slow: bool) -> None:
        """A checkpoint holds it: the last epochs of a resumed run are those of one that was not broken off."""
        torch.manual_seed(1)
        data = torch.randn(24, 3, dtype=DOUBLE), torch.randn(24, 2, dtype=DOUBLE)

        def run(epochs: int, folder: Path, *, resume: bool = False) -> nn.Module:
            model = network([0.3, 0.001, 0.2, 0.3])
            fit(
                model,
                data,
                loss=nn.functional.mse_loss,
                optimizer=Around(parameter_groups(model, 0.02), slow=slow),
                epochs=epochs,
                batch_size=8,
                pruning=Pruning(0.02),
                run=folder,
                resume=resume,
                compile="never",
                progress=False,
            )
            assert model.time_steps.num_steps == 3
            return model

        whole = run(4, tmp_path / "whole")
        run(2, tmp_path / "broken")
        assert_same_bits(run(4, tmp_path / "broken", resume=True).state_dict(), whole.state_dict())


EXTRAS: dict[str, Callable[[Tensor], Any]] = {
    "a matrix": lambda p: torch.eye(len(p), dtype=p.dtype),
    "matrices in a list": lambda p: [torch.eye(n, dtype=p.dtype) for n in p.shape],
    "matrices by axis": lambda p: {axis: (torch.eye(n, dtype=p.dtype),) for axis, n in enumerate(p.shape)},
    "two halves": lambda p: torch.zeros(2, *p.shape, dtype=p.dtype),
    "a shorter vector": lambda p: torch.zeros((p.numel() + 1) // 2, dtype=p.dtype),
    "an object": Projector,
}
FITTING: dict[str, Callable[[Tensor], Any]] = {
    "a vector": torch.zeros_like,
    "vectors in a list": lambda p: [torch.zeros_like(p), (p.detach().clone(), 3)],
    "a number": lambda p: torch.zeros(()),
    "a vector of one": lambda p: torch.zeros(1),
    "a text and nothing": lambda p: {"name": "p", "none": None, "flag": True, "value": torch.zeros_like(p)},
}


class TestShapes:
    @pytest.mark.parametrize("momentum", [True, False], ids=["beside momentum", "alone"])
    @pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
    def test_state_of_another_shape_is_reset_and_the_report_says_so(self, extra: Any, momentum: bool) -> None:
        model = network()
        optimizer = Lazily(model.parameters(), extra, momentum=momentum)
        train(model, optimizer)
        others = {id(p): copy.deepcopy(optimizer.state[p].get("momentum")) for p in model.layers[2].parameters()}
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert report.optimizer == "reset"
        assert "state of the time steps" in report.note
        assert "was reset" in str(report)
        assert model.time_steps.values not in optimizer.state
        for p in model.layers[1].parameters():  # of the survivors nothing is lost
            assert_same_bits(optimizer.state[p].get("momentum"), others[id(p)])
        train(model, optimizer)
        assert prune(model, keep=[0, 1], optimizer=optimizer).optimizer == "reset"
        train(model, optimizer)

    @pytest.mark.parametrize("extra", FITTING.values(), ids=FITTING.keys())
    def test_state_that_fits_is_kept(self, extra: Any) -> None:
        model = network()
        optimizer = Lazily(model.parameters(), extra)
        train(model, optimizer)
        expected = [t[list(KEEP)] if t.shape == (5,) else t for t in _tensors(optimizer.state[model.time_steps.values])]
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert (report.optimizer, report.note) == ("exact", "")
        assert_same_bits(list(_tensors(optimizer.state[model.time_steps.values])), expected)
        train(model, optimizer)

    def test_a_vector_that_is_as_long_as_a_group_by_chance_is_kept(self) -> None:
        """Five steps and a number: as many entries as a bias of six."""
        torch.manual_seed(0)
        model = resnet(3, 6, 1, 5, dtype=DOUBLE)
        small = [model.time_steps.values, nn.Parameter(torch.zeros(1, dtype=DOUBLE))]
        others = [p for p in model.parameters() if p is not small[0]]
        optimizer = torch.optim.Adam([{"params": small}, {"params": others}], lr=0.01)
        train(model, optimizer)
        bias = next(p for p in model.layers[2].parameters() if p.shape == (6,))
        before = copy.deepcopy(optimizer.state[bias])
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        assert_same_bits(optimizer.state[bias], before)

    def test_frozen_steps_have_no_state_to_lose(self) -> None:
        model = network()
        model.time_steps.values.requires_grad_(False)
        optimizer = Lazily([p for p in model.parameters() if p.requires_grad], EXTRAS["a matrix"])
        train(model, optimizer)
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        train(model, optimizer)


class TestSeveralParametersTogether:
    @pytest.mark.parametrize("where", ["first", "all parameters"])
    @pytest.mark.parametrize("steps_first", [True, False])
    def test_a_vector_in_the_state_is_reset(self, where: str, steps_first: bool) -> None:
        model = network()
        groups = parameter_groups(model, 0.05)
        optimizer = Flat(groups[::-1] if steps_first else groups, where)
        train(model, optimizer)
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert report.optimizer == "reset"
        assert "was reset" in report.note
        twin = copy.deepcopy(model)
        groups = parameter_groups(twin, 0.05)
        fresh = Flat(groups[::-1] if steps_first else groups, where)
        train(model, optimizer)
        train(twin, fresh)
        assert_same_bits(model.state_dict(), twin.state_dict())

    def test_a_vector_in_the_state_of_a_layer_that_goes(self) -> None:
        model = network()
        layers = list(model.layers)
        optimizer = Flat([*layers[1].parameters(), model.time_steps.values, *layers[0].parameters()], "first")
        train(model, optimizer)
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "reset"
        train(model, optimizer)

    @pytest.mark.parametrize("where", ["attribute", "group"])
    def test_a_vector_elsewhere_is_refused(self, where: str) -> None:
        model = network()
        optimizer = Flat(model.parameters(), where)
        train(model, optimizer)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"optimizer must keep its state by parameter.*make a new one"):
            prune(model, keep=KEEP, optimizer=optimizer)
        assert_same_bits(model.state_dict(), before)
        train(model, optimizer)

    @pytest.mark.parametrize(
        "kept",
        [
            lambda model: {"slow": [[p.clone() for p in model.parameters()]]},
            lambda model: {"parameters": list(model.parameters())},
            lambda model: {"pairs": {"tau": (model.time_steps.values,)}},
            lambda model: {"masters": torch.cat([p.detach().reshape(-1) for p in model.parameters()])},
        ],
    )
    def test_copies_and_lists_in_attributes_are_refused(self, kept: Any) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        vars(optimizer).update(kept(model))
        with pytest.raises(ValueError, match=f"its attribute '{next(iter(kept(model)))}'"):
            prune(model, keep=KEEP, optimizer=optimizer)
        assert model.time_steps.num_steps == 5

    def test_attributes_of_a_few_numbers_and_of_what_stays_are_none(self) -> None:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        vars(optimizer).update(overflow=torch.zeros(1), head=list(model.head.parameters()), names=["a", "b"])
        train(model, optimizer)
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"

    def test_fit_refuses_before_it_trains(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        vars(optimizer)["parameters"] = list(model.parameters())
        before = copy.deepcopy(model.state_dict())
        data = torch.randn(8, 3, dtype=DOUBLE), torch.randn(8, 2, dtype=DOUBLE)
        options: dict[str, Any] = {"loss": nn.functional.mse_loss, "epochs": 1, "progress": False, "compile": "never"}
        with pytest.raises(ValueError, match="its attribute 'parameters'"):
            fit(model, data, optimizer=optimizer, pruning=Pruning(0.01), **options)
        assert_same_bits(model.state_dict(), before)
        fit(model, data, optimizer=optimizer, **options)


class TestKeys:
    @pytest.mark.parametrize("kind", ["id", "name"])
    @pytest.mark.parametrize("where", ["state", "attribute"])
    def test_state_by_id_or_name_follows(self, kind: str, where: str) -> None:
        """Names move with their layers: the state of a layer that has another number now goes with it."""
        model = network()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
        place: Any = optimizer.state if where == "state" else vars(optimizer).setdefault("velocity", {})
        for name, p in model.named_parameters():
            place[id(p) if kind == "id" else name] = {"v": torch.full_like(p, p.detach().sum().item())}
        wanted = {id(p): place[id(p) if kind == "id" else name]["v"] for name, p in model.named_parameters()}
        old = model.time_steps.values
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        assert len(place) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            found = place[id(p) if kind == "id" else name]["v"]
            assert torch.equal(found, wanted[id(old)][list(KEEP)] if p is model.time_steps.values else wanted[id(p)])

    def test_state_by_parameter_in_an_attribute_follows(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        vars(optimizer)["slow"] = slow = {model.time_steps.values: torch.arange(5.0)}
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        assert slow[model.time_steps.values].tolist() == [0.0, 2.0, 4.0]

    def test_other_keys_do_not_crash(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer)
        other: Any = optimizer.state
        other["count"], other[3], other[nn.Linear(1, 1)] = 7, {"step": torch.tensor(1.0)}, {}
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert (report.optimizer, other["count"]) == ("exact", 7)
        other["table"] = torch.zeros(3)
        report = prune(model, keep=[0, 1], optimizer=optimizer)
        assert report.optimizer == "reset"
        assert "'table'" in report.note

    def test_a_checkpoint_refuses_state_that_it_cannot_hold(self, tmp_path: Path) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        other: Any = optimizer.state
        other["count"] = 7
        data = torch.randn(8, 3, dtype=DOUBLE), torch.randn(8, 2, dtype=DOUBLE)
        with pytest.raises(ValueError, match=r"optimizer must keep its state by parameter where run is given.*'count'"):
            fit(
                model,
                data,
                loss=nn.functional.mse_loss,
                optimizer=optimizer,
                epochs=1,
                run=tmp_path / "run",
                progress=False,
                compile="never",
            )


def test_optimisers_of_this_kind_in_fit_with_deletions() -> None:
    """Loss falls, and tau trains, through a deletion in the middle."""
    torch.manual_seed(1)
    data = torch.randn(32, 3, dtype=DOUBLE), torch.randn(32, 2, dtype=DOUBLE)
    for make in (lambda p: Around(p, slow=True), lambda p: Lazily(p, EXTRAS["a matrix"]), lambda p: Flat(p, "first")):
        model = network([0.3, 0.001, 0.2, 0.3])
        start = loss_of(model).item()
        optimizer = make(parameter_groups(model, 0.05))
        history = fit(
            model,
            data,
            loss=nn.functional.mse_loss,
            optimizer=optimizer,
            epochs=3,
            batch_size=8,
            pruning=Pruning(0.02),
            progress=False,
            compile="never",
        )
        assert len(history.deletions) == 1
        tau = history.iterations["tau"]
        assert (tau[-1][[0, 2, 3]] != tau[-2][[0, 2, 3]]).all()
        assert loss_of(model).item() != start


class Handing:
    """A wrapper that shows the groups and state of its optimiser, and takes steps of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, slow: bool) -> None:
        self.optimizer, self.calls = optimizer, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"] if slow]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        self.optimizer.step()


def test_a_wrapper_with_a_step_of_its_own_takes_it() -> None:
    """It is no mere shell: ``fit`` calls its step."""
    model = resnet(2, 3, 2, 3)
    optimizer: Any = Handing(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), slow=False)
    fit(
        model,
        (torch.ones(4, 2), torch.ones(4, 2)),
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
        epochs=3,
        compile="never",
    )
    assert optimizer.calls == 3
    assert prune(model, keep=[0, 2], optimizer=optimizer).optimizer == "exact"


def test_a_wrapper_with_tensors_of_its_own_is_refused() -> None:
    """The state that it keeps beside its optimiser cannot follow."""
    model = resnet(2, 3, 2, 3)
    optimizer: Any = Handing(torch.optim.SGD(model.parameters(), lr=0.1), slow=True)
    with pytest.raises(ValueError, match="got Handing with tensors in its attribute 'slow'"):
        prune(model, keep=[0, 2], optimizer=optimizer)
    assert model.time_steps.num_steps == 3


class Average:
    """An average of weights, as an object."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.shadow = [p.detach().clone() for p in parameters]


def test_tensors_inside_an_object_of_the_optimizer() -> None:
    """They are found there, too."""
    model = resnet(2, 3, 2, 3)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.average = Average(model.parameters())
    with pytest.raises(ValueError, match="got SGD with tensors in its attribute 'average'"):
        prune(model, keep=[0, 2], optimizer=optimizer)
    assert model.time_steps.num_steps == 3
