"""Memory that is reversible: gradients as those of stored states, no state kept, and when it is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import gradients
from taulearn import fit, load_model, prune, save_model
from taulearn.adaptivity.indicators import indicators
from taulearn.nn import (
    FullyConnected,
    Momentum,
    Symmetric,
    TimeSteps,
    TimeVariableNetwork,
    Verlet,
    resnet,
)

DOUBLE = torch.float64
MAKERS: dict[str, Callable[..., Any]] = {
    "momentum": lambda **options: Momentum(1.0, **options),
    "verlet": lambda **options: Verlet(**options),
}
both_schemes = pytest.mark.parametrize("scheme", MAKERS)


def pair(scheme: str, layers: int, dtype: torch.dtype = DOUBLE, **options: Any) -> list[TimeVariableNetwork]:
    """A network whose states are stored, and the same one with reversible memory."""
    made = []
    for memory in ({}, {"memory": "reversible", **options}):
        torch.manual_seed(0)
        made.append(resnet(4, 6, 2, layers, scheme=MAKERS[scheme](**memory), activation="tanh", dtype=dtype))
    return made


def batch(dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(7, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def largest_error(scheme: str, layers: int, dtype: torch.dtype, **options: Any) -> float:
    stored, reversible = (gradients(model, batch(dtype)) for model in pair(scheme, layers, dtype, **options))
    return max(float((reversible[n] - g).norm() / (g.norm() + 1e-12)) for n, g in stored.items())


@both_schemes
class TestGradients:
    def test_in_double_precision(self, scheme: str) -> None:
        assert largest_error(scheme, 64, DOUBLE) <= 1e-10

    def test_in_single_precision(self, scheme: str) -> None:
        assert largest_error(scheme, 64, torch.float32) <= 1e-5

    @pytest.mark.parametrize("every", [1, 3, 100])
    def test_with_stored_states_on_the_way(self, scheme: str, every: int) -> None:
        assert largest_error(scheme, 10, DOUBLE, store_every=every) <= 1e-10

    @pytest.mark.parametrize("layers", [1, 2])
    def test_of_few_layers(self, scheme: str, layers: int) -> None:
        assert largest_error(scheme, layers, DOUBLE) <= 1e-10

    def test_of_the_inputs_and_without_a_first_layer_of_another_width(self, scheme: str) -> None:
        found = []
        for options in ({}, {"memory": "reversible"}):
            torch.manual_seed(0)
            layers = [Symmetric(4, dtype=DOUBLE) for _ in range(5)]
            steps, stem = TimeSteps(5, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)
            scheme_ = MAKERS[scheme](**options)
            model = TimeVariableNetwork(layers, nn.Linear(4, 2, dtype=DOUBLE), scheme_, steps, stem=stem)
            x = batch().requires_grad_()
            model(x).square().sum().backward()
            assert x.grad is not None
            assert stem.weight.grad is not None
            found.append((x.grad, stem.weight.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)

    def test_with_frozen_parameters(self, scheme: str) -> None:
        models = pair(scheme, 6)
        for model in models:
            for layer in list(model.layers)[1:4]:
                layer.requires_grad_(False)
            model(batch()).square().sum().backward()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)

    def test_under_autocast(self, scheme: str) -> None:
        """States that stay in single precision; those in bfloat16 cannot be taken back."""
        x, found = batch(torch.float32), []
        for options in ({}, {"memory": "reversible"}):
            torch.manual_seed(0)
            layers, made = [Symmetric(4) for _ in range(5)], MAKERS[scheme](**options)
            model = TimeVariableNetwork(layers, nn.Linear(4, 2), made, TimeSteps(5), stem=nn.Identity())
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            output.float().square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="memory must be 'stored'"):
            pair(scheme, 4, torch.float32)[1](x)

    def test_in_training_after_a_deletion_and_saved(self, scheme: str, tmp_path: Path) -> None:
        models, x = pair(scheme, 8), batch()
        for model in models:
            prune(model, keep=[0, 2, 3, 6])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            fit(model, (x, x[:, :2]), loss=nn.functional.mse_loss, optimizer=optimizer, epochs=4, compile="never")
        torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-9, atol=1e-12)
        save_model(models[1], tmp_path)
        loaded = load_model(tmp_path)
        assert repr(loaded.scheme) == repr(models[1].scheme)
        assert "reversible" in repr(loaded.scheme)


@both_schemes
def test_indicators_of_refinement_are_those_of_stored_states(scheme: str) -> None:
    stored, reversible = pair(scheme, 5)
    data, loss = (batch(), batch()[:, :2]), nn.functional.mse_loss
    for name in ("dual-weighted", "sensitivity"):
        expected = indicators(stored, name, data, loss)
        torch.testing.assert_close(indicators(reversible, name, data, loss), expected, equal_nan=True)
    assert reversible.scheme.last.__self__ is reversible.scheme, "the scheme is as it was"


def test_training_is_not_compiled_and_says_so(tmp_path: Path) -> None:
    (model, x), loss = (pair("verlet", 3)[1], batch()), nn.functional.mse_loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    fit(model, (x, x[:, :2]), loss=loss, optimizer=optimizer, epochs=1, compile="always", run=tmp_path / "run")
    assert "eager (compiled steps have no reversible memory)" in (tmp_path / "run/run.toml").read_text()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass, without parameters."""
    own, seen = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(seen.values())


@both_schemes
def test_what_is_kept_does_not_grow_with_the_depth(scheme: str) -> None:
    x = torch.randn(500, 4, dtype=DOUBLE)
    stored, reversible = ([kept_bytes(pair(scheme, n)[k], x) for n in (8, 32)] for k in (0, 1))
    assert stored[1] > 3 * stored[0]
    assert reversible[1] <= reversible[0] + 8 * 32  # the steps themselves


class TestRefusals:
    def test_a_step_that_has_no_inverse(self) -> None:
        model = resnet(4, 6, 2, 3, scheme=Momentum(0.5, memory="reversible"), init=[0.3, 0.5, 0.1], dtype=DOUBLE)
        with pytest.raises(ValueError, match="memory must be 'stored' for these steps"):
            model(batch())
        with torch.no_grad():
            assert model(batch()).isfinite().all()

    def test_rounding_that_grows_too_much_unless_states_are_stored(self) -> None:
        def make(**options: Any) -> TimeVariableNetwork:
            scheme = Momentum(1.0, memory="reversible", **options)
            return resnet(4, 6, 2, 64, scheme=scheme, init=0.1, horizon=6.4)

        x = batch(torch.float32)
        with pytest.raises(ValueError, match="store_every=k"):
            make()(x)
        assert make(store_every=16)(x).requires_grad

    def test_rounding_that_grows_in_some_layers_and_shrinks_in_others(self) -> None:
        """The product over all layers is 0.5, that over the first one 2,000."""
        steps = [0.9995, *[3.0] * 12]
        layers = [FullyConnected(4, 4, "tanh") for _ in steps]
        made = Momentum(1.0, memory="reversible")
        model = TimeVariableNetwork(layers, nn.Linear(4, 2), made, TimeSteps(13, init=steps), stem=nn.Identity())
        with pytest.raises(ValueError, match=r"rounding errors grow by 2\.0e"):
            model(batch(torch.float32))

    @pytest.mark.parametrize("tau", [0.3, 0.5])
    def test_layers_that_amplify_rounding(self, tau: float) -> None:
        """Gradients that would be wrong by 0.3 or more; with a state stored every layer they are right."""

        def error(every: int) -> float:
            found = []
            for options in ({}, {"memory": "reversible", "store_every": every}):
                torch.manual_seed(0)
                model = resnet(4, 20, 2, 64, scheme=Verlet(**options), init=tau, horizon=64 * tau)
                found.append(torch.cat([g.flatten() for g in gradients(model, batch(torch.float32)).values()]))
            return float((found[1] - found[0]).norm() / found[0].norm())

        with pytest.raises(ValueError, match="of a state that was computed again"):
            error(0)
        assert error(1) < 1e-4

    def test_parameters_that_changed_in_between(self) -> None:
        model = pair("verlet", 4)[1]
        output = model(batch()).sum()
        with torch.no_grad():
            model.layers[2].linear.bias.add_(1e-9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()

    def test_steps_that_are_no_numbers_are_for_the_loss_to_show(self) -> None:
        model = pair("momentum", 4)[1]
        with torch.no_grad():
            model.time_steps.values[2] = torch.nan
        output = model(batch())
        output.sum().backward()
        assert output.isnan().all()

    @both_schemes
    def test_random_numbers(self, scheme: str) -> None:
        layers = [nn.Sequential(FullyConnected(4, 4), nn.Dropout(0.5)) for _ in range(3)]
        made = MAKERS[scheme](memory="reversible")
        model = TimeVariableNetwork(layers, nn.Linear(4, 2), made, TimeSteps(3), stem=nn.Identity())
        with pytest.raises(ValueError, match="layers that draw random numbers"):
            model(batch(torch.float32))
        assert model.eval()(batch(torch.float32)).requires_grad

    @both_schemes
    @pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
    def test_running_statistics(self, scheme: str, norm: nn.Module) -> None:
        layers = [nn.Sequential(copy.deepcopy(norm), FullyConnected(4, 4)) for _ in range(3)]
        made = MAKERS[scheme](memory="reversible")
        model = TimeVariableNetwork(layers, nn.Linear(4, 2), made, TimeSteps(3), stem=nn.Identity())
        with pytest.raises(ValueError, match="running statistics"):
            model(batch(torch.float32))
        assert isinstance(norm, nn.InstanceNorm1d) or model.eval()(batch(torch.float32)).requires_grad

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"memory must be one of 'reversible', 'stored', got 'reversed'"):
            Verlet(memory="reversed")
        with pytest.raises(ValueError, match="store_every must be left out"):
            Verlet(store_every=3)
        with pytest.raises(ValueError, match="store_every must be an integer >= 1"):
            Momentum(memory="reversible", store_every=-2)
