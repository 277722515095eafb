"""Steepest descent with a line search: its rule on problems with known constants, monotony, constraints, state."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn import penalties
from taulearn.nn import fractional_dnn, resnet
from taulearn.optim import SteepestDescent, parameter_groups, register_projection

C = 1e-4


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def closure_of(optimizer: torch.optim.Optimizer, J: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = J()
        value.backward()
        return value

    return closure


def rosenbrock(x: Any) -> Any:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def numpy_descent(x: np.ndarray, steps: int, lr: float = 1.0) -> list[np.ndarray]:
    """Armijo's rule written out for Rosenbrock's function, the step growing after an accepted first trial."""
    grow, points = False, [x]
    for _ in range(steps):
        gradient = np.array([-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)])
        lr, trials = 2 * lr if grow else lr, 1
        while rosenbrock(x - lr * gradient) > rosenbrock(x) - C * lr * gradient @ gradient:
            lr, trials = lr / 2, trials + 1
        x, grow = x - lr * gradient, trials == 1
        points.append(x)
    return points


class TestRule:
    def test_steps_on_a_parabola_are_the_ones_known_by_hand(self) -> None:
        # J = L/2 x^2: t is accepted if and only if t L <= 2 (1 - c); with L = 10 that is t <= 0.19998
        x = parameter(1.0)
        optimizer = SteepestDescent([x], lr=1.0)
        closure = closure_of(optimizer, lambda: 5 * (x**2).sum())
        trials, steps, points = [], [], []
        for _ in range(4):
            optimizer.step(closure)
            trials.append(optimizer.trials)
            steps.append(optimizer.param_groups[0]["lr"])
            points.append(x.item())
        assert trials == [4, 1, 2, 1]  # 1, 1/2, 1/4, 1/8; 1/8; 1/4 and back; 1/8
        assert steps == [0.125] * 4
        np.testing.assert_allclose(points, [(1 - 1.25) ** k for k in (1, 2, 3, 4)], rtol=1e-14)

    def test_the_constant_of_the_rule_counts(self) -> None:
        # t L <= 2 (1 - c): 0.25 is accepted for c < 0.75 and L = 2, rejected for c > 0.75
        for decrease, expected in ((0.74, 0.25), (0.76, 0.125)):
            x = parameter(1.0)
            optimizer = SteepestDescent([x], lr=0.25, decrease=decrease)
            optimizer.step(closure_of(optimizer, lambda x=x: (x**2).sum()))
            assert optimizer.param_groups[0]["lr"] == expected

    def test_linear_convergence_at_the_rate_of_the_theory(self) -> None:
        # J falls by c t norm(g)^2 >= 2 c t mu J, and t >= shrink * 2 (1 - c) / L
        eigenvalues = torch.tensor([1.0, 3.0, 20.0], dtype=torch.float64)
        x, c = parameter(1.0, -2.0, 0.5), 0.3
        optimizer = SteepestDescent([x], lr=7.0, decrease=c)
        closure = closure_of(optimizer, lambda: (eigenvalues * x**2).sum() / 2)
        values = np.array([float(optimizer.step(closure).detach()) for _ in range(100)])
        rate = 1 - 2 * c * (0.5 * 2 * (1 - c) / 20.0) * 1.0
        assert (values[1:] <= rate * values[:-1]).all()
        assert values[-1] < 1e-10

    def test_rosenbrock_follows_the_rule_written_in_numpy(self) -> None:
        x = parameter(-1.2, 1.0)
        optimizer = SteepestDescent([x])
        closure = closure_of(optimizer, lambda: rosenbrock(x))
        points = [x.detach().numpy().copy()]
        for _ in range(200):
            optimizer.step(closure)
            points.append(x.detach().numpy().copy())
        np.testing.assert_allclose(points, numpy_descent(np.array([-1.2, 1.0]), 200), rtol=1e-7)

    def test_rosenbrock_goes_down_to_the_valley_floor(self) -> None:
        x = parameter(-1.2, 1.0)
        optimizer = SteepestDescent([x])
        closure = closure_of(optimizer, lambda: rosenbrock(x))
        values = [float(optimizer.step(closure).detach()) for _ in range(4000)]
        assert all(after < before for before, after in itertools.pairwise(values))
        assert values[-1] < 1e-3
        assert x.detach().sub(1).abs().max() < 0.05

    @pytest.mark.parametrize("lr", [1e-9, 1e9])
    def test_the_first_step_size_hardly_matters(self, lr: float) -> None:
        x = parameter(3.0, 1.0)
        optimizer = SteepestDescent([x], lr=lr, max_trials=50)
        closure = closure_of(optimizer, lambda: (torch.tensor([1.0, 10.0]) * x**2).sum())
        for _ in range(120):
            optimizer.step(closure)
        assert x.detach().abs().max() < 1e-5

    def test_a_trial_that_is_not_finite_is_rejected(self) -> None:
        x = parameter(1.0)
        optimizer = SteepestDescent([x], lr=4.0)
        values = [
            float(optimizer.step(closure_of(optimizer, lambda: (x - x.log()).sum() + 3 * x.sum())).detach())
            for _ in range(30)
        ]  # the first trial lies where the logarithm is NaN
        assert values == sorted(values, reverse=True)
        assert x.item() == pytest.approx(0.25, abs=1e-4)

    def test_trials_need_no_gradient_where_the_value_is_given(self) -> None:
        iterates = []
        for separate in (True, False):
            x, calls = parameter(-1.2, 1.0), [0]
            optimizer = SteepestDescent([x])

            def closure(
                x: nn.Parameter = x, optimizer: SteepestDescent = optimizer, calls: list[int] = calls
            ) -> Tensor:
                calls[0] += 1
                return closure_of(optimizer, lambda: rosenbrock(x))()

            def value(x: nn.Parameter = x) -> Tensor:
                with torch.no_grad():
                    return rosenbrock(x)

            for _ in range(20):
                optimizer.step(closure, value) if separate else optimizer.step(closure)
            iterates.append(x.detach())
            assert (calls[0] == 20) is separate
        assert torch.equal(*iterates)

    def test_groups_keep_the_ratio_of_their_steps(self) -> None:
        x, y = parameter(1.0), parameter(1.0)
        optimizer = SteepestDescent([{"params": [x]}, {"params": [y], "lr": 0.1}], lr=1.0)
        closure = closure_of(optimizer, lambda: 5 * (x**2 + y**2).sum())
        for _ in range(5):
            optimizer.step(closure)
            first, second = (group["lr"] for group in optimizer.param_groups)
            assert second == pytest.approx(first / 10)


class TestNoStep:
    def test_where_the_gradient_vanishes(self) -> None:
        x = parameter(0.0)
        optimizer = SteepestDescent([x], lr=0.5)
        optimizer.step(closure_of(optimizer, lambda: (x**2).sum()))
        assert (x.item(), optimizer.trials, optimizer.param_groups[0]["lr"]) == (0.0, 0, 0.5)

    def test_where_no_trial_is_accepted(self) -> None:
        x = parameter(1.0)
        optimizer = SteepestDescent([x], lr=1e6, max_trials=3)
        optimizer.step(closure_of(optimizer, lambda: (x**2).sum()))
        assert (x.item(), optimizer.trials, optimizer.param_groups[0]["lr"]) == (1.0, 3, 1e6 / 8)

    def test_where_rounding_hides_the_decrease(self) -> None:
        x = nn.Parameter(torch.tensor([1e-5]))
        optimizer = SteepestDescent([x], lr=0.1)
        for _ in range(50):
            optimizer.step(closure_of(optimizer, lambda: 1.0 + (x**2).sum()))
            assert optimizer.trials <= 3
            assert 0 < optimizer.param_groups[0]["lr"] < torch.inf
        assert x.abs().max() <= 1e-5

    def test_where_the_objective_is_not_finite(self) -> None:
        x = parameter(-1.0)
        optimizer = SteepestDescent([x])
        value = optimizer.step(closure_of(optimizer, lambda: x.log().sum()))
        assert value.isnan()
        assert (x.item(), optimizer.trials) == (-1.0, 0)

    def test_parameters_without_gradient_stay(self) -> None:
        x, unused = parameter(1.0), parameter(2.0)
        optimizer = SteepestDescent([x, unused], lr=0.25)
        optimizer.step(closure_of(optimizer, lambda: (x**2).sum()))
        assert (x.item(), unused.item()) == (0.5, 2.0)


class TestConstraints:
    def test_projected_descent_finds_the_constrained_minimum(self) -> None:
        x, target = parameter(3.0, 3.0), torch.tensor([2.0, -1.0], dtype=torch.float64)
        optimizer = SteepestDescent([x])
        handle = optimizer.register_constraint(lambda: x.clamp_(min=0.5))
        closure = closure_of(optimizer, lambda: ((x - target) ** 2 * torch.tensor([1.0, 7.0])).sum())
        values = [float(optimizer.step(closure).detach()) for _ in range(60)]
        assert values == sorted(values, reverse=True)
        torch.testing.assert_close(x.detach(), torch.tensor([2.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)
        handle.remove()
        for _ in range(60):
            optimizer.step(closure)
        torch.testing.assert_close(x.detach(), target, rtol=0, atol=1e-6)

    def test_proximal_descent_finds_the_minimum_of_the_sum(self) -> None:
        # min 1/2 (x - a)^2 + alpha abs(x) is soft thresholding
        a, alpha = torch.tensor([2.0, -0.3, -1.0], dtype=torch.float64), 0.5
        x = parameter(0.1, 0.1, 0.1)
        optimizer = SteepestDescent([x], lr=8.0)

        def shrink() -> None:
            lr = optimizer.param_groups[0]["lr"]
            x.copy_(taulearn.functional.soft_threshold(x, lr * alpha))

        optimizer.register_constraint(shrink)
        closure = closure_of(optimizer, lambda: ((x - a) ** 2).sum() / 2)
        sums = []
        for _ in range(60):
            sums.append(float(closure().detach() + alpha * x.detach().abs().sum()))
            optimizer.step(closure)
        assert all(after <= before for before, after in itertools.pairwise(sums))
        torch.testing.assert_close(x.detach(), torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64), rtol=0, atol=1e-7)
        assert x[1].item() == 0.0

    def test_registered_projection_acts_inside_of_the_search(self) -> None:
        torch.manual_seed(0)
        model = resnet(2, 4, 1, 4, constraint="simplex", dtype=torch.float64)
        optimizer = SteepestDescent(model.parameters())
        handle = register_projection(optimizer, model)
        inputs = torch.randn(16, 2, dtype=torch.float64)
        sums = []

        def J() -> Tensor:
            sums.append(model.time_steps.tau.sum().item())
            return (model(inputs) - 1).square().mean()

        values = [float(optimizer.step(closure_of(optimizer, J)).detach()) for _ in range(20)]
        np.testing.assert_allclose(sums, 1.0, rtol=1e-12)  # at every trial, not only after the step
        assert values == sorted(values, reverse=True)
        handle.remove()
        assert not vars(optimizer)["_constraints"]


class TestTorchOptimizer:
    def test_state_dict_round_trip_goes_on_exactly(self) -> None:
        def run(steps: int, saved: dict[str, Any] | None, start: Tensor) -> tuple[dict[str, Any], Tensor]:
            x = nn.Parameter(start.clone())
            optimizer = SteepestDescent([x], lr=3.0, growth=1.7)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for _ in range(steps):
                optimizer.step(closure_of(optimizer, lambda: rosenbrock(x)))
            return optimizer.state_dict(), x.detach()

        start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        _, expected = run(25, None, start)
        saved, half = run(12, None, start)
        _, actual = run(13, copy.deepcopy(saved), half)
        assert torch.equal(actual, expected)

    def test_deepcopy_steps_alike(self) -> None:
        x = parameter(-1.2, 1.0)
        optimizer = SteepestDescent([x])
        optimizer.step(closure_of(optimizer, lambda: rosenbrock(x)))
        twin = copy.deepcopy(optimizer)
        y = twin.param_groups[0]["params"][0]
        optimizer.step(closure_of(optimizer, lambda: rosenbrock(x)))
        twin.step(closure_of(twin, lambda: rosenbrock(y)))
        assert torch.equal(x, y)

    def test_hooks_run_once_per_step(self) -> None:
        x, calls = parameter(1.0), []
        optimizer = SteepestDescent([x])
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        optimizer.step(closure_of(optimizer, lambda: 5 * (x**2).sum()))
        assert (optimizer.trials, calls) == (4, [1])

    def test_pruning_keeps_the_state(self) -> None:
        model = resnet(2, 4, 1, 4, init=[0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
        optimizer = SteepestDescent(parameter_groups(model, lr=0.5))
        inputs = torch.ones(3, 2, dtype=torch.float64)
        report = taulearn.prune(model, 0.01, optimizer=optimizer)
        assert report.layers_after == 3
        before = closure_of(optimizer, lambda: model(inputs).square().mean())
        first, second = (float(optimizer.step(before).detach()) for _ in range(2))
        assert second < first


def problem(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    build = {"resnet": resnet, "fractional": fractional_dnn}[kind]
    model = build(7, 8, 3, 3, activation="smooth_relu", init=1.0, dtype=torch.float64)
    inputs, targets = taulearn.data.load("maxwell", "test")
    return model, (inputs[:300].double(), targets[:300].double())


class TestFit:
    @pytest.mark.parametrize("kind", ["resnet", "fractional"])
    def test_the_recorded_objective_with_penalties_never_rises(self, kind: str) -> None:
        model, train = problem(kind)
        history = taulearn.fit(
            model,
            train,
            loss=taulearn.functional.half_mse_loss,
            optimizer=SteepestDescent(model.parameters()),
            epochs=60,
            batch_size=300,
            penalties=[penalties.BiasOrdering(10.0), penalties.L1(1e-3), penalties.TimeHorizon(2.0)],
            progress=False,
        )
        total = history.iterations["total"]
        assert (np.diff(total) < 0).all()
        assert total[-1] < 0.1 * total[0]
        assert (np.diff(history.iterations["penalty.bias_ordering"]) != 0).any()

    def test_proximal_penalty_counts_in_what_never_rises(self) -> None:
        model, train = problem("resnet")
        history = taulearn.fit(
            model,
            train,
            loss=taulearn.functional.half_mse_loss,
            optimizer=SteepestDescent(model.parameters()),
            epochs=60,
            batch_size=300,
            penalties=[penalties.L1(0.05, proximal=True)],
            progress=False,
        )
        assert (np.diff(history.iterations["total"] + history.iterations["penalty.l1"]) <= 1e-15).all()
