"""The contribution of layers, as a criterion of pruning."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from small_networks import deleted, network
from taulearn import Pruning, contribution, fit, parameter_groups, prune, wrap
from taulearn.adaptivity.criteria import Contribution
from taulearn.nn import fractional_dnn, resnet
from wrapping.hosts import BY_NAME, Block, Host, every_host

INIT = [0.5, -0.2, 0.4, 0.1, 0.3]


def inputs(n: int = 7) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(4))


def by_hand(model: Any, x: torch.Tensor) -> np.ndarray:
    """Mean over samples of norm(y_{l+1} - y_l), in NumPy, of a residual network."""
    y, found = x.double().numpy(), []
    for l, (layer, tau) in enumerate(zip(model.layers, model.time_steps.tau.tolist(), strict=True)):
        w, b = layer.linear.weight.detach().double().numpy(), layer.linear.bias.detach().double().numpy()
        step = tau * np.tanh(y @ w.T + b)
        found.append(np.linalg.norm(step, axis=1).mean())
        y = step if l == 0 else y + step
    return np.array(found)


def test_of_a_residual_network() -> None:
    model, x = network(INIT), inputs().double()
    found = contribution(x)(model.time_steps.tau, model)
    np.testing.assert_allclose(found.numpy(), by_hand(model, x), rtol=1e-5)
    order = np.argsort(by_hand(model, x)[1:]) + 1  # the first layer must stay
    assert deleted(prune(model, criterion=contribution(x), budget=3)) == order[:2].tolist()


@pytest.mark.parametrize("policy", [{"target_blocks": 2}, {"threshold": 0.1, "criterion": "contribution"}])
def test_in_double_precision_by_default(policy: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, x = resnet(2, 3, 1, 4), torch.rand(16, 2)
        optimizer = torch.optim.Adam(parameter_groups(model, lr=0.01))
        options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "progress": False}
        options |= {"loss": nn.functional.mse_loss, "optimizer": optimizer, "pruning": Pruning(**policy)}
        fit(model, (x, x[:, :1]), **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.time_steps.values.dtype == torch.float64


def test_of_a_fractional_network() -> None:
    """tau^gamma Gamma(2 - gamma) f; at l = 0 that is the first state."""
    model, x = network([0.5, 0.2, 0.4, 0.1, 0.3], builder=fractional_dnn), inputs().double()
    found = contribution(x)(model.time_steps.tau, model)
    first = model.states(x)[0].detach()
    assert float(found[0]) == pytest.approx(float(first.norm(dim=1).mean()), rel=1e-5)


@every_host
def test_of_a_wrapped_model(host: Host) -> None:
    """tau (B(x) - x), so that twice the step is twice the contribution of the last block."""
    model = host.wrapped(init=[0.5, 0.25, 0.5, 0.3], form="whole")
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = contribution(host.inputs())(model.time_steps.tau, model)
    with torch.no_grad():
        model.time_steps.values[3] *= -2.0
    after = contribution(host.inputs())(model.time_steps.tau, model)
    torch.testing.assert_close(after[:3], before[:3])
    torch.testing.assert_close(after[3], 2 * before[3])
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if "time" not in name)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.time_steps.values[1] = 0.0
    assert contribution(host.inputs())(model.time_steps.tau, model)[1] == 0.0


def test_the_running_mean() -> None:
    """The mean of the first five measurements, then a fifth of each new one."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(Block(3), Block(3)).eval(), "[01]")
    running, expected = Contribution(model), torch.zeros(2)
    for k in range(1, 9):
        x = k * inputs()
        with running.measuring():
            model(x)
        model(100 * x)  # not measured
        now = contribution(x)(model.time_steps.tau, model)
        expected = expected + (now - expected) * max(0.2, 1 / k)
        torch.testing.assert_close(running.values, expected)
    assert running.number == 8
    running.keep_([1])
    torch.testing.assert_close(running.values, expected[1:])


def test_a_pass_that_fails_is_not_counted() -> None:
    model = wrap(nn.Sequential(Block(3), Block(3)), "[01]")
    running = Contribution(model)
    with pytest.raises(RuntimeError), running.measuring():
        model(torch.ones(2, 5))
    assert running.number == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_of_transformers_takes_keywords() -> None:
    host = BY_NAME["gpt2"]
    model = host.wrapped()
    assert len(prune(model, criterion=contribution({"input_ids": host.inputs()}), budget=2).deleted) == 2


class Skipping(nn.Module):
    """A host that leaves blocks out: the last two on demand, each at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block(4) for _ in range(6))
        self.generator, self.drop = torch.Generator().manual_seed(3), [0.0] * 6

    def forward(self, x: torch.Tensor, deep: bool = True) -> torch.Tensor:
        x = self.first(x)
        for block, drop in zip(self.blocks, self.drop[: len(self.blocks)], strict=True):
            taken = not self.training or float(torch.rand((), generator=self.generator)) >= drop
            if taken and (deep or block not in list(self.blocks)[4:]):
                x = block(x)
        return self.last(x)


def skipping(*drop: float) -> Any:
    torch.manual_seed(0)
    model = wrap(Skipping(), "blocks.*", example_inputs=inputs())
    model.drop = list(drop) or [0.0] * 6
    return model


def test_layers_that_are_not_called_are_not_deleted_for_it() -> None:
    model = skipping()
    with pytest.raises(ValueError, match=r"example_inputs must be such .* on which \[4, 5\] of 6 layers are not"):
        prune(model, criterion=contribution({"x": inputs(), "deep": False}))
    with pytest.raises(ValueError, match="example_inputs must be such that every layer is called on at least one"):
        prune(model, criterion=contribution(inputs(0)))
    assert model.time_steps.num_steps == 6


def test_the_running_mean_of_a_layer_that_is_skipped() -> None:
    model = skipping().eval()
    running = Contribution(model)
    for deep in (False, True, False):
        with running.measuring():
            model(inputs(), deep=deep)
        assert running.unseen == ([] if running.number > 1 else [4, 5])
    assert running.counts.tolist() == [3, 3, 3, 3, 1, 1]
    torch.testing.assert_close(running.values, contribution(inputs())(model.time_steps.tau, model))
    running.keep_([3, 5])
    assert running.counts.tolist() == [3, 1]


def trained(model: Any, pruning: Pruning) -> Any:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01))
    options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "progress": False, "compile": "never"}
    x = inputs(40)
    return fit(model, (x, x[:, :2]), loss=nn.functional.mse_loss, optimizer=optimizer, pruning=pruning, **options)


def test_blocks_that_are_skipped_at_random_in_training() -> None:
    model = skipping(*[0.5] * 6)
    trained(model, Pruning(target_blocks=2, by=2))
    assert model.time_steps.num_steps == 2


def test_a_block_that_training_never_calls() -> None:
    model = skipping(*[0.0] * 5, 1.0)
    with pytest.warns(UserWarning, match=r"layers \[5\] were called in none of .* abs\(tau\) take its place"):
        trained(model, Pruning(target_blocks=2, by=2))
    assert model.time_steps.num_steps == 2
    model = skipping(*[0.0] * 5, 1.0)
    with pytest.warns(UserWarning, match=r"layers \[5\] were called in none of .*nothing is deleted before"):
        trained(model, Pruning(0.9, every=1, criterion="contribution"))
    assert model.time_steps.num_steps == 6


def test_the_record_tells_the_shares_of_the_criterion() -> None:
    policy = Pruning(target_blocks=4, by=2, penalised="none", criterion=lambda tau, _: torch.arange(len(tau)) + 1.0)
    deletions = trained(skipping(), policy).deletions
    assert [d.share for d in deletions] == pytest.approx([1 / 21, 1 / 15])
