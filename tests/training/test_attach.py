"""``attach``: a loop of one's own trains as ``fit`` does, targets included; what goes around the step goes right."""

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import taulearn
from taulearn import Pruning, attach
from taulearn.optim import SteepestDescent, parameter_groups, register_projection
from taulearn.penalties import L1, L2, StageCost, TimeHorizon, WeightElasticNet
from taulearn.training import Session
from training.support import LOSS, assert_same_weights, digits, momentum, network, run_fit, sgd
from training.test_fit import orders

Make = Callable[[nn.Module], torch.optim.Optimizer]


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.02, weight_decay=0.01), **options)


def loop(model: nn.Module, data: Any, optimizer: Any, session: Session | None = None, epochs: int = 3) -> None:
    """The loop that anyone would write."""
    model.train()
    for order in orders(data, epochs):
        for index in order.split(40):
            optimizer.zero_grad()
            loss = LOSS(model(data[0][index]), data[1][index])
            (loss if session is None else session.loss(loss)).backward()
            optimizer.step()


EXACT: dict[str, tuple[Make, Any, Pruning | None, dict[str, Any]]] = {
    "alone": (momentum, (), None, {}),
    "simplex": (adam, (), None, {"constraint": "simplex", "lower_bound": 0.05}),
    "dependent, bounded": (sgd, (), None, {"constraint": "dependent", "lower_bound": 0.05}),
    "proximal": (momentum, L1(0.4, proximal=True), None, {}),
    "proximal, pruned": (sgd, L1(0.4, proximal=True), Pruning(0.1, every=2), {}),
    "pruned each epoch": (sgd, L1(0.4, proximal=True), Pruning(0.1), {}),
    "target": (adam, (), Pruning(target_blocks=3), {}),
    "target by an epoch": (adam, (), Pruning(target_blocks=2, by=2, penalised="all", criterion="share"), {}),
    "contribution": (adam, (), Pruning(0.15, every=4, criterion="contribution"), {}),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_loop_is_fit_to_the_bit(case: str) -> None:
    make, penalties, pruning, options = EXACT[case]
    data = digits(200)
    ours, theirs = network(**options), network(**options)
    optimizer = make(ours)
    session = attach(ours, optimizer, penalties=penalties, pruning=pruning, iterations=15, iterations_per_epoch=5)
    loop(ours, data, optimizer, session)
    fitted = run_fit(theirs, data, make(theirs), penalties=penalties, pruning=pruning)
    session.detach()
    assert_same_weights(ours, theirs)
    found = session.history
    assert found.deletions == fitted.deletions
    assert (pruning is None) == (not found.deletions)
    for name in ("tau", "loss"):
        np.testing.assert_array_equal(np.float32(found.iterations[name]), fitted.iterations[name])
    for name in ("iteration", "layers", "parameters"):
        np.testing.assert_array_equal(found.epochs[name], fitted.epochs[name])


def test_a_target_is_reached_with_the_length_alone() -> None:
    model, data = network(), digits(200)
    optimizer = adam(model)
    session = attach(model, optimizer, pruning=Pruning(target_blocks=2), iterations=15)
    loop(model, data, optimizer, session)
    assert model.time_steps.num_steps == 2
    session.detach()
    assert [d.epoch for d in session.history.deletions] == [1, 1, 1]


@pytest.mark.parametrize("penalties", [[TimeHorizon(0.7, weight=0.5)], [L1(0.1), L2(0.1), WeightElasticNet(1e-3)]])
def test_penalties_that_are_differentiated(penalties: Any) -> None:
    data, ours, theirs = digits(200), network(), network()
    optimizer = sgd(ours)
    session = attach(ours, optimizer, penalties=penalties)
    loop(ours, data, optimizer, session)
    fitted = run_fit(theirs, data, sgd(theirs), penalties=penalties)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)
    for name in ("total", *(f"penalty.{p.name}" for p in penalties)):
        np.testing.assert_allclose(session.history.iterations[name], fitted.iterations[name], rtol=1e-5)


def step(model: nn.Module, optimizer: Any, loss: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
    optimizer.zero_grad()
    inputs, targets = digits(40)
    loss(LOSS(model(inputs), targets)).backward()
    optimizer.step()


def test_losses_are_unknown_unless_told() -> None:
    model = network()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    step(model, optimizer)
    step(model, optimizer, session.loss)
    loss = session.history.iterations["loss"]
    assert np.isnan(loss[0])
    assert loss[1] > 0
    step(model, optimizer)
    assert np.isnan(session.history.iterations["loss"][2])


def test_penalties_come_after_the_callers_clipping() -> None:
    models = [network(), network()]
    optimizers = [sgd(model, lr=1.0) for model in models]
    attach(models[0], optimizers[0], penalties=TimeHorizon(0.5, weight=3.0))
    for model, optimizer in zip(models, optimizers, strict=True):
        inputs, targets = digits(40)
        LOSS(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        before = model.time_steps.tau.detach().clone()
        optimizer.step()
    plain = models[1].time_steps.tau.detach() - before
    value = TimeHorizon(0.5, weight=3.0)(fresh := network())
    (gradient,) = torch.autograd.grad(value, [fresh.time_steps.values])
    torch.testing.assert_close(models[0].time_steps.tau.detach() - before, plain - gradient)
    assert gradient.abs().max() > 0.1


class TestClosure:
    @pytest.mark.parametrize("by_name", [False, True])
    def test_penalties_come_after_the_users_backward(self, by_name: bool) -> None:
        models = [network(), network()]
        for closes, model in zip((True, False), models, strict=True):
            optimizer = adam(model)
            session = attach(model, optimizer, penalties=TimeHorizon(0.5))
            for _ in range(3):
                if not closes:
                    step(model, optimizer)
                    continue

                def closure(model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
                    optimizer.zero_grad()
                    inputs, targets = digits(40)
                    loss = LOSS(model(inputs), targets)
                    loss.backward()
                    return loss

                assert optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            assert session.history.num_iterations == 3
        assert_same_weights(*models)

    @pytest.mark.parametrize("kind", [torch.optim.LBFGS, SteepestDescent])
    def test_line_searches_are_refused(self, kind: Any) -> None:
        model = network()
        with pytest.raises(ValueError, match=rf"optimizer must .*got {kind.__name__}"):
            attach(model, kind(model.parameters()))

    def test_one_with_two_halves_of_a_step_is_refused(self) -> None:
        class SAM(torch.optim.SGD):
            def first_step(self) -> None: ...

            def second_step(self) -> None: ...

        model = network()
        with pytest.raises(ValueError, match=r"optimizer must .*got SAM"):
            attach(model, SAM(model.parameters()))

    @pytest.mark.parametrize("moves", [False, True], ids=["twice", "elsewhere"])
    def test_optimisers_that_call_it_again_or_elsewhere_are_refused(self, moves: bool) -> None:
        class Extra(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:  # type: ignore[override]
                if moves:
                    with torch.no_grad():
                        self.param_groups[0]["params"][0].mul_(1.0)
                else:
                    with torch.enable_grad():
                        closure()
                return super().step(closure)

        model = network()
        optimizer = Extra(model.parameters(), lr=0.1)
        session = attach(model, optimizer)
        with pytest.raises(ValueError, match=r"optimizer must .*got Extra"):
            optimizer.step(lambda: LOSS(model(digits(40)[0]), digits(40)[1]))
        session.detach()
        assert session.history.num_iterations == 0


class CallsItsParent(torch.optim.SGD):
    """torch calls the hooks in both steps once an SGD was made."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class TestAnOptimiserThatCallsTheStepOfItsParent:
    @pytest.mark.parametrize("penalty", [L1(0.3), L1(0.3, proximal=True)])
    @pytest.mark.parametrize("closes", [False, True])
    def test_penalties_act_once_a_step(self, penalty: Any, closes: bool) -> None:
        models = [network(), network()]
        for kind, model in zip((torch.optim.SGD, CallsItsParent), models, strict=True):
            optimizer = kind(model.parameters(), lr=0.1)
            session = attach(model, optimizer, penalties=penalty)
            for _ in range(3):
                optimizer.zero_grad()

                def closure(model: Any = model) -> torch.Tensor:
                    loss = LOSS(model(digits(40)[0]), digits(40)[1])
                    loss.backward()
                    return loss

                optimizer.step(closure) if closes else (closure(), optimizer.step())
            assert session.history.num_iterations == 3
        assert_same_weights(*models)

    def test_penalties_of_the_batch_count_once(self) -> None:
        model = network()
        optimizer = CallsItsParent(model.parameters(), lr=0.1)
        session = attach(model, optimizer, penalties=StageCost(0.3, LOSS))
        inputs, targets = digits(40)
        step(model, optimizer, lambda loss: session.loss(loss, inputs=inputs, targets=targets))
        assert session.history.num_iterations == 1

    def test_a_registered_projection_acts_once(self) -> None:
        models = [network(), network()]
        for kind, model in zip((torch.optim.SGD, CallsItsParent), models, strict=True):
            optimizer = kind(model.parameters(), lr=0.1)
            register_projection(optimizer, model, L1(0.3, proximal=True))
            step(model, optimizer)
        assert_same_weights(*models)


FUSED = [{"fused": True}, {"fused": False, "foreach": False}]


class TestGradScaler:
    @pytest.mark.parametrize("options", FUSED)
    @pytest.mark.parametrize("unscales", [False, True])
    def test_steps_are_those_without_it(self, options: dict[str, Any], unscales: bool) -> None:
        """Penalties are multiplied by the scale; skipped steps neither act nor count, nor do layers go in them."""
        models, sessions = [network(), network()], []
        for scaled, model in zip((True, False), models, strict=True):
            optimizer = adam(model, **options)
            scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**8)
            session = attach(
                model, optimizer, penalties=[TimeHorizon(0.5)], pruning=Pruning(target_blocks=3), iterations=12
            )
            sessions.append(session)
            for iteration in range(15):
                skipped = iteration in (1, 2, 8)
                if skipped and not scaled:
                    continue
                inputs, targets = digits(40)
                optimizer.zero_grad()
                scaler.scale(LOSS(model(inputs), targets)).backward()
                if skipped:
                    model.head.weight.grad.fill_(float("inf"))
                    before = copy.deepcopy(model.state_dict())
                if unscales:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                if skipped:
                    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        ours, theirs = (session.history for session in sessions)
        assert ours.num_iterations == theirs.num_iterations == 12
        assert ours.deletions[0].iteration == theirs.deletions[0].iteration
        assert models[0].time_steps.origin == models[1].time_steps.origin
        assert len(models[0].time_steps.origin) == 3
        for ours_, theirs_ in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5)

    def test_a_flag_set_by_hand_lets_nothing_act_or_count(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1, fused=True)
        session = attach(
            model, optimizer, penalties=L1(0.5, proximal=True), pruning=Pruning(0.9, every=1), iterations=3
        )
        vars(optimizer)["found_inf"], vars(optimizer)["grad_scale"] = torch.tensor(1.0), torch.tensor(4.0)
        before = copy.deepcopy(model.state_dict())
        step(model, optimizer)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert session.history.num_iterations == 0
        vars(optimizer)["found_inf"] = torch.tensor(0.0)
        step(model, optimizer, lambda loss: 4.0 * loss)
        assert session.history.num_iterations == 1
        assert model.time_steps.num_steps == 1

    @pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
    def test_one_that_is_handed_the_scaler_is_refused_with_penalties_to_be_scaled(self) -> None:
        class OldStyle(torch.optim.SGD):
            _step_supports_amp_scaling = True

            def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
                super().step()

        model, scaler = network(), torch.amp.GradScaler("cpu")
        optimizer = OldStyle(model.parameters(), lr=0.1)
        attach(model, optimizer, penalties=TimeHorizon())
        scaler.scale(LOSS(model(digits(40)[0]), digits(40)[1])).backward()
        with pytest.raises(ValueError, match="optimizer must find the scale of the gradients in its grad_scale"):
            scaler.step(optimizer)

    def test_float16_with_a_fused_optimiser_is_refused_before_anything_moves(self) -> None:
        model = network().half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        attach(model, optimizer, penalties=L1(1.0))
        scaler, before = torch.amp.GradScaler("cpu"), copy.deepcopy(model.state_dict())
        scaler.scale(0.0 * model(digits(40)[0].half()).float().sum()).backward()
        with pytest.raises(ValueError, match="optimizer must hold no float16 parameters where a GradScaler"):
            scaler.step(optimizer)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class TestPenaltiesOfTheBatch:
    def test_they_enter_by_the_loss(self) -> None:
        data, penalty = digits(200), StageCost(0.3, LOSS, schedule="falling")
        ours, theirs = network(activation="tanh"), network(activation="tanh")
        optimizer = sgd(ours)
        session = attach(ours, optimizer, penalties=[penalty, L1(0.1)], iterations=15, iterations_per_epoch=5)
        for order in orders(data):
            for index in order.split(40):
                optimizer.zero_grad()
                inputs, targets = data[0][index], data[1][index]
                outputs = ours(inputs)
                session.loss(LOSS(outputs, targets), outputs=outputs, inputs=inputs, targets=targets).backward()
                optimizer.step()
        fitted = run_fit(theirs, data, sgd(theirs), penalties=[StageCost(0.3, LOSS, schedule="falling"), L1(0.1)])
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)
        for name in ("loss", "total", "penalty.stage_cost"):
            np.testing.assert_allclose(session.history.iterations[name], fitted.iterations[name], rtol=1e-5)

    def test_a_step_without_it_is_refused(self) -> None:
        model = network()
        optimizer = sgd(model)
        session = attach(model, optimizer, penalties=StageCost(0.3, LOSS))
        inputs, targets = digits(40)
        for told in (False, True, False):
            loss = LOSS(model(inputs), targets)
            if told:
                session.loss(loss, inputs=inputs, targets=targets).backward()
                optimizer.step()
                continue
            loss.backward()
            with pytest.raises(RuntimeError, match=r"session.loss must be called before each step with 'stage_cost'"):
                optimizer.step()
        assert session.history.num_iterations == 1

    def test_what_is_missing_is_named(self) -> None:
        model = network()
        session = attach(model, sgd(model), penalties=StageCost(0.3, LOSS))
        with pytest.raises(ValueError, match=r"inputs must be given to session.loss with 'stage_cost'"):
            session.loss(torch.zeros((), requires_grad=True))

    def test_running_statistics_take_each_batch_once(self) -> None:
        models = [network(), network()]
        for model in models:
            model.head = nn.Sequential(model.head, nn.BatchNorm1d(model.head.out_features))
        inputs, targets = digits(40)
        session = attach(models[0], sgd(models[0]), penalties=StageCost(0.3, LOSS))
        for model in models:
            loss = LOSS(model(inputs), targets)
            if model is models[0]:
                session.loss(loss, inputs=inputs, targets=targets)
        assert models[0].head[1].running_mean.any()
        assert_same_weights(*models)


class TestLossesThatAreTold:
    def test_a_batch_that_is_left_out_leaves_no_loss(self) -> None:
        model = network()
        session = attach(model, optimizer := sgd(model), penalties=StageCost(0.3, LOSS))
        inputs, targets = digits(40)
        for factor in (1.0, float("nan"), 1.0):
            optimizer.zero_grad()
            x = factor * inputs
            loss = session.loss(LOSS(model(x), targets), inputs=x, targets=targets)
            if loss.isfinite():
                loss.backward()
                optimizer.step()
        assert session.history.num_iterations == 2
        for name in ("loss", "penalty.stage_cost", "total"):
            assert np.isfinite(session.history.iterations[name]).all()

    def test_a_step_that_was_taken_keeps_what_is_not_finite(self) -> None:
        model = network()
        session = attach(model, optimizer := sgd(model))
        step(model, optimizer, lambda loss: session.loss(float("inf") * loss))
        assert np.isinf(session.history.iterations["loss"][0])

    def test_a_call_that_is_refused_tells_nothing(self) -> None:
        model = network()
        session = attach(model, optimizer := sgd(model), penalties=StageCost(0.3, LOSS))
        inputs, targets = digits(40)
        loss = LOSS(model(inputs), targets)
        with pytest.raises(ValueError, match="inputs must be given"):
            session.loss(100.0 * loss)
        session.loss(loss, inputs=inputs, targets=targets).backward()
        optimizer.step()
        np.testing.assert_allclose(session.history.iterations["loss"], [loss.item()], rtol=1e-6)

    def test_a_number_is_refused(self) -> None:
        model = network()
        with pytest.raises(TypeError, match=r"loss must be a tensor.*got 0\.5"):
            attach(model, sgd(model)).loss(0.5)  # type: ignore[arg-type]


class TestFrozenSteps:
    @pytest.mark.parametrize("by_fit", [False, True])
    def test_neither_proximal_maps_nor_projections_move_them(self, by_fit: bool) -> None:
        model = network(constraint="simplex")
        optimizer = sgd(model)
        with torch.no_grad():
            model.time_steps.values.requires_grad_(False).mul_(2.0)
        before = model.time_steps.values.clone()
        if by_fit:
            run_fit(model, digits(80), optimizer)
        else:
            attach(model, optimizer)
            step(model, optimizer)
        assert torch.equal(model.time_steps.values, before)
        model = network()
        optimizer = sgd(model)
        before = model.time_steps.values.requires_grad_(False).clone()
        if by_fit:
            run_fit(model, digits(80), optimizer, penalties=L1(0.3, proximal=True))
        else:
            attach(model, optimizer, penalties=L1(0.3, proximal=True))
            step(model, optimizer)
        assert torch.equal(model.time_steps.values, before)


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.02),
    ]


class TestSeveralOptimisers:
    @pytest.mark.parametrize("order", [1, -1])
    def test_gradients_before_the_first_and_deletions_after_the_last(self, order: int) -> None:
        model, penalty = network(), WeightElasticNet(0.01)
        optimizers = muon_and_adamw(model)
        session = attach(
            model, optimizers, penalties=penalty, pruning=Pruning(target_blocks=3, every=1, by=1.0), iterations=10
        )
        for iteration in range(1, 11):
            for each in optimizers:
                each.zero_grad()
            inputs, targets = digits(40)
            LOSS(model(inputs), targets).backward()
            weight = model.head.weight
            gradient, value = weight.grad.clone(), penalty(model)
            (its,) = torch.autograd.grad(value, [weight])
            first, last = optimizers[::order]
            layers = model.time_steps.num_steps
            first.step()
            assert session.iteration == iteration - 1
            assert model.time_steps.num_steps == layers
            last.step()
            assert session.iteration == iteration
            torch.testing.assert_close(weight.grad, gradient + its)
        assert model.time_steps.num_steps == 3
        assert any(p is model.time_steps.values for p in optimizers[1].param_groups[0]["params"])

    def test_a_round_of_which_one_is_skipped_is_none(self) -> None:
        model = network()
        optimizers = muon_and_adamw(model)
        session = attach(model, optimizers, penalties=L1(0.1, proximal=True))
        for takes in (True, False, True):
            for each in optimizers:
                each.zero_grad()
            LOSS(model(digits(40)[0]), digits(40)[1]).backward()
            optimizers[0].step()
            if takes:
                optimizers[1].step()
        assert session.history.num_iterations == 2

    @pytest.mark.parametrize("skipped", [0, 1])
    def test_after_a_skip_penalties_act_on_and_rounds_begin_with_the_first(self, skipped: int) -> None:
        model = network()
        optimizers = [torch.optim.SGD([model.time_steps.values], lr=0.1), sgd(model.layers, lr=0.0)]
        session = attach(model, optimizers, penalties=L1(0.1))
        for iteration in range(5):
            (0.0 * model(digits(40)[0])).sum().backward()
            before = model.time_steps.values.detach().clone()
            counted = session.iteration
            session.loss(torch.tensor(float(iteration)))
            for number, each in enumerate(optimizers):
                if (iteration, number) != (1, skipped):
                    each.step()
                each.zero_grad()
            moved = model.time_steps.values.detach() - before
            assert bool((moved != 0).all()) == ((iteration, skipped) != (1, 0))
            assert session.iteration - counted == (iteration != 1)
        np.testing.assert_array_equal(session.history.iterations["loss"], [0.0, 1.5, 3.0, 4.0])

    @pytest.mark.parametrize("order", [1, -1])
    def test_before_the_first_round_a_skipped_one_shifts_none(self, order: int) -> None:
        """As GradScaler does it, which leaves out steps whose gradients overflow, mostly the first ones."""
        model = network()
        optimizers = [sgd(model.layers, lr=0.01), torch.optim.SGD([model.time_steps.values], lr=0.01)][::order]
        session = attach(model, optimizers)
        found = []
        for iteration in range(4):
            for each in optimizers:
                each.zero_grad()
            loss = LOSS(model(digits(40)[0]), digits(40)[1])
            found.append(model.time_steps.tau.tolist())
            session.loss(loss).backward()
            if iteration == 0:
                next(model.layers.parameters()).grad.fill_(torch.inf)
            for each in optimizers:
                if all(bool(p.grad.isfinite().all()) for p in each.param_groups[0]["params"]):
                    each.step()
        np.testing.assert_array_equal(session.history.iterations["tau"], np.array(found[1:], dtype=np.float32))

    def test_penalties_act_where_each_has_its_own_backward(self) -> None:
        model, plain = network(), network()
        for net in (model, plain):
            optimizers = muon_and_adamw(net)
            if net is model:
                attach(net, optimizers, penalties=[L1(0.3), WeightElasticNet(0.01)])
            for _ in range(3):
                for each in optimizers:
                    for one in optimizers:
                        one.zero_grad()
                    loss = LOSS(net(digits(40)[0]), digits(40)[1])
                    loss = loss if net is model else loss + L1(0.3)(net) + WeightElasticNet(0.01)(net)
                    loss.backward()
                    each.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)

    def test_one_that_steps_twice_a_round_gets_penalties_each_time(self) -> None:
        model = network()
        optimizers = [torch.optim.SGD([model.time_steps.values], lr=0.1), sgd(model.layers)]
        session = attach(model, optimizers, penalties=L1(0.1))
        for each in (0, 0, 1, 0, 0, 1):
            (0.0 * model(digits(40)[0])).sum().backward()
            optimizers[each].step()
            optimizers[0].zero_grad()
        torch.testing.assert_close(network().time_steps.tau - model.time_steps.tau, torch.full((5,), 0.04))
        assert session.iteration == 2

    def test_a_closure_is_refused(self) -> None:
        model = network()
        optimizers = muon_and_adamw(model)
        attach(model, optimizers)
        with pytest.raises(ValueError, match="closure must be left out where several optimisers are attached"):
            optimizers[0].step(lambda: 0.0)


class TestMeasuring:
    def test_evaluation_between_two_steps_is_not_measured(self) -> None:
        models = [network(), network()]
        sessions = []
        for evaluates, model in zip((True, False), models, strict=True):
            optimizer = adam(model)
            sessions.append(attach(model, optimizer, pruning=Pruning(target_blocks=3), iterations=12))
            for _ in range(12):
                inputs, targets = digits(40)
                optimizer.zero_grad()
                LOSS(model(inputs), targets).backward()
                if evaluates:
                    with torch.no_grad():
                        model(100.0 * digits(80)[0])
                optimizer.step()
        assert_same_weights(*models)
        ours, theirs = (session.pruner.criterion.values for session in sessions)  # type: ignore[union-attr]
        assert ours.min() > 0
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("pickled", [False, True])
    def test_a_copy_of_the_model_does_not_measure(self, pickled: bool, tmp_path: Path) -> None:
        """A copy is called with other inputs, while the model's forward passes are measured."""
        measured = []
        for copies in (True, False):
            model = network()
            session = attach(model, optimizer := adam(model), pruning=Pruning(0.01, every=8, criterion="contribution"))
            for _ in range(3):
                optimizer.zero_grad()
                LOSS(model(digits(40)[0]), digits(40)[1]).backward()
                if copies:
                    copied = copy.deepcopy(model)
                    torch.save(model, tmp_path / "model.pt")
                    if pickled:
                        copied = torch.load(tmp_path / "model.pt", weights_only=False)
                    assert torch.equal(copied(digits(40)[0]), model(digits(40)[0]))
                    copied(100.0 * digits(80)[0])
                optimizer.step()
            measured.append(session.pruner.criterion.values)  # type: ignore[union-attr]
        assert measured[1].min() > 0
        assert torch.equal(*measured)

    def test_nothing_is_left_in_the_model(self) -> None:
        model = network()
        session = attach(model, optimizer := adam(model), pruning=Pruning(target_blocks=3), iterations=12)
        own = {"states", "last"}
        assert own <= vars(model.scheme).keys()
        with pytest.warns(UserWarning, match="the target of pruning is not reached"):
            session.detach()
        assert own.isdisjoint(vars(model.scheme))
        assert not any(layer._forward_hooks for layer in model.layers)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


class TestWrappers:
    def test_a_compiled_model(self) -> None:
        model = network()
        compiled = torch.compile(model, backend="eager")
        optimizer = adam(model)
        session = attach(compiled, optimizer, pruning=Pruning(target_blocks=3), iterations=15)
        loop(compiled, digits(200), optimizer, session)
        plain = network()
        loop(
            plain, digits(200), its := adam(plain), attach(plain, its, pruning=Pruning(target_blocks=3), iterations=15)
        )
        assert model.time_steps.num_steps == 3
        assert_same_weights(model, plain)

    def test_an_average_loses_the_same_layers(self) -> None:
        model = network()
        averaged, optimizer = AveragedModel(model), adam(model)
        attach(model, optimizer, pruning=Pruning(target_blocks=3), iterations=12, averaged=averaged)
        for _ in range(12):
            step(model, optimizer)
            averaged.update_parameters(model)
        assert averaged.module.time_steps.origin == model.time_steps.origin
        assert model.time_steps.num_steps == 3

    @pytest.fixture
    def alone(self, tmp_path: Path) -> Iterator[None]:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        yield
        gc.collect()
        torch.distributed.destroy_process_group()

    @pytest.mark.usefixtures("alone")
    def test_a_live_data_parallel_wrapper(self) -> None:
        model = network()
        wrapper = nn.parallel.DistributedDataParallel(model)
        optimizer, pruning = adam(model), Pruning(target_blocks=3)
        with pytest.raises(TypeError, match=r"model must .*got it in a DistributedDataParallel"):
            attach(wrapper, optimizer, pruning=pruning, iterations=12)
        session = attach(model, optimizer, pruning=pruning, iterations=12)
        for _ in range(12):
            step(wrapper, optimizer)
        assert (model.time_steps.num_steps, session.history.num_iterations) == (3, 12)

    @pytest.mark.usefixtures("alone")
    def test_one_that_is_made_later(self) -> None:
        model = network()
        attach(model, optimizer := adam(model), pruning=Pruning(target_blocks=3), iterations=12)
        wrapper = nn.parallel.DistributedDataParallel(model)
        for _ in range(12):
            step(wrapper, optimizer)
        assert model.time_steps.num_steps == 3


class TestDeletionInTheLoop:
    def deleted(self) -> tuple[Any, Any, Session]:
        model = network(init=[0.3, 0.001, 0.3, 0.2, 0.2])
        optimizer = sgd(model, lr=1e-3)
        return model, optimizer, attach(model, optimizer, pruning=Pruning(0.05, every=1))

    def test_gradients_that_are_pending_stay(self) -> None:
        """A loop that goes on accumulating has those of all parameters that are left."""
        model, optimizer, _ = self.deleted()
        inputs, targets = digits(40)
        LOSS(model(inputs), targets).backward()
        kept = {id(p): p.grad.clone() for p in model.parameters()}
        steps = model.time_steps.values.grad[[0, 2, 3, 4]].clone()
        optimizer.step()
        assert model.time_steps.origin == (0, 2, 3, 4)
        assert torch.equal(model.time_steps.values.grad, steps)
        for p in model.parameters():
            assert p is model.time_steps.values or torch.equal(p.grad, kept[id(p)])
        LOSS(model(inputs), targets).backward()
        assert not torch.equal(model.time_steps.values.grad, steps)

    def test_a_graph_from_before_it_is_refused_by_torch(self) -> None:
        """Its gradient would reach steps of which nobody knows any more."""
        model, optimizer, _ = self.deleted()
        inputs, targets = digits(40)
        late = LOSS(model(inputs), targets)
        step(model, optimizer)
        assert model.time_steps.num_steps == 4
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()

    def test_by_hand_it_is_refused_until_detached(self) -> None:
        model = network()
        optimizer = sgd(model)
        session = attach(model, optimizer)
        step(model, optimizer)
        with pytest.raises(ValueError, match=r"model must have no session of taulearn.attach.*detach\(\)"):
            taulearn.prune(model, keep=[0, 2], optimizer=optimizer)
        assert model.time_steps.num_steps == 5
        session.detach()
        taulearn.prune(copy.deepcopy(model), keep=[0, 2])
        taulearn.prune(model, keep=[0, 2], optimizer=optimizer)
        session = attach(model, optimizer)
        step(model, optimizer)
        assert session.history.iterations["tau"].shape[0] == 1


class TestAStepThatFails:
    @pytest.mark.parametrize("registered", ["before", "after"])
    def test_tried_again_it_is_one(self, registered: str) -> None:
        models = [network(), network()]
        for fails, model in zip((True, False), models, strict=True):
            optimizer, left = torch.optim.SGD(model.parameters(), lr=0.1), [fails]

            def fail(*_: Any, left: list[bool] = left) -> None:
                if left[0]:
                    left[0] = False
                    raise KeyError

            if registered == "before":
                optimizer.register_step_pre_hook(fail)
            session = attach(model, optimizer, penalties=[L1(0.3), WeightElasticNet(0.01)])
            if registered == "after":
                optimizer.register_step_pre_hook(fail)
            for _ in range(2):  # gradients of the second step join those of the first
                session.loss(LOSS(model(digits(40)[0]), digits(40)[1])).backward()
                if left[0]:
                    with pytest.raises(KeyError):
                        optimizer.step()
                optimizer.step()
            assert session.history.num_iterations == 2
        assert_same_weights(*models)


class TestDetach:
    def test_afterwards_the_optimiser_is_as_before(self) -> None:
        model = network(lower_bound=0.1)
        session = attach(model, optimizer := sgd(model), penalties=L1(0.5))
        step(model, optimizer)
        session.detach()
        step(model, optimizer)
        assert session.history.num_iterations == 1
        attach(model, optimizer).detach()
        session.detach()

    @pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
    @pytest.mark.parametrize("first", [True, False])
    def test_in_a_hook_it_is_refused(self, register: str, first: bool) -> None:
        model = network()
        optimizer, found = sgd(model), list[Session]()
        hang: Any = getattr(optimizer, register)
        if first:
            hang(lambda *_: found[0].detach())
        found.append(attach(model, optimizer))
        if not first:
            hang(lambda *_: found[0].detach())
        with pytest.raises(RuntimeError, match=r"detach must be called between two steps.*after optimizer.step\(\)"):
            step(model, optimizer)
        found[0].detach()
        assert not any(isinstance(hook, taulearn.optim.projections.Attached) for hook in _hooks(optimizer))

    def test_after_a_step_that_failed(self) -> None:
        model = network()
        session = attach(model, optimizer := sgd(model))
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        session.detach()
        assert not _hooks(optimizer)


def _hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"pruning": Pruning(target_blocks=2)}, "iterations must be given where pruning has a target"),
    "epochs": ({"pruning": Pruning(0.1)}, "iterations_per_epoch must be given with every='epoch'"),
    "an integer by": (
        {"pruning": Pruning(target_blocks=2, by=3), "iterations": 9},
        "iterations_per_epoch must be given with by=3",
    ),
    "a penalty that changes": (
        {"penalties": StageCost(1.0, LOSS, schedule="falling"), "iterations": 9},
        "iterations_per_epoch must be given with the penalty 'stage_cost'",
    ),
    "until when it changes": (
        {"penalties": StageCost(1.0, LOSS, schedule="falling"), "iterations_per_epoch": 9},
        "iterations must be given with the penalty 'stage_cost'",
    ),
    "late by": (
        {"pruning": Pruning(target_blocks=2, by=3), "iterations": 9, "iterations_per_epoch": 4},
        "by must be at most 2.25, the number of epochs",
    ),
    "latency": (
        {"pruning": Pruning(target_latency_ms=1.0), "iterations": 9},
        "example_inputs must be given with target_latency_ms",
    ),
    "no integer": ({"iterations": 0.5}, "iterations must be an integer"),
    "the penalty of a target": (
        {"pruning": Pruning(target_blocks=2), "iterations": 9, "penalties": L1(0.1)},
        "penalties must not contain L1 where pruning has a target",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_contradicts(case: str) -> None:
    options, message = REFUSED[case]
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        attach(model, optimizer, **options)
    assert not _hooks(optimizer)


class TestOptimisersThatAreRefused:
    def test_one_that_lacks_the_steps(self) -> None:
        model = network()
        with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
            attach(model, torch.optim.SGD(model.layers.parameters(), lr=0.1))
        with pytest.raises(ValueError, match="optimizer must hold the model's parameters"):
            attach(model, sgd(network()))

    def test_one_with_a_session(self) -> None:
        model = network()
        session = attach(model, optimizer := sgd(model))
        acts: list[Callable[[], Any]] = [
            lambda: attach(model, optimizer),
            lambda: register_projection(optimizer, model),
            lambda: run_fit(model, digits(40), optimizer),
        ]
        for act in acts:
            with pytest.raises(ValueError, match=r"optimizer must have no session of taulearn.attach.*detach\(\)"):
                act()
        session.detach()
        for act in acts:
            if isinstance(left := act(), Session):
                left.detach()
            elif hasattr(left, "remove"):
                left.remove()

    def test_any_whose_model_has_a_session_with_another(self) -> None:
        model = network()
        session = attach(model, sgd(model), pruning=Pruning(0.1, every=2))
        acts: list[Callable[[], Any]] = [
            lambda: attach(model, momentum(model)),
            lambda: register_projection(momentum(model), model),
            lambda: run_fit(model, digits(40), momentum(model)),
        ]
        for act in acts:
            with pytest.raises(ValueError, match=r"model must have no session of taulearn.attach.*detach\(\)"):
                act()
        session.detach()
        attach(model, momentum(model))

    def test_a_session_that_is_gone_is_none(self) -> None:
        model = network()
        attach(model, sgd(model))
        session = attach(model, sgd(model))
        assert session.history.num_iterations == 0
        session.detach()

    def test_one_with_a_registered_projection(self) -> None:
        model, other = network(), network(seed=1)
        both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
        handle = register_projection(both, model)
        with pytest.raises(ValueError, match="optimizer must have no projection of register_projection"):
            attach(model, both)
        attach(other, both).detach()
        handle.remove()
        attach(model, both)

    def test_what_calls_no_hooks(self) -> None:
        class Unmade(torch.optim.SGD):
            def __init__(self, params: Any) -> None:
                self.param_groups = [{"params": list(params), "lr": 0.1}]

        model = network()
        with pytest.raises(TypeError, match="optimizer must be an optimiser of torch whose __init__ has run"):
            attach(model, Unmade(model.parameters()))
