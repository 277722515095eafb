"""New statistics for batch normalisation: those of one batch, with everything else left as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from taulearn import wrap
from taulearn.calibration import Statistics, norms_in, recalibrate_, statistics_of, using
from taulearn.depth.truncate import truncate
from taulearn.diagnostics import choose_layers, depth_profile, depth_statistics, early_exit
from taulearn.nn import resnet, resnet_v2

DOUBLE = torch.float64


def images(number: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(number, 1, 4, 4, dtype=DOUBLE, generator=generator)
    return x, torch.randint(3, (number,), generator=generator)


def network() -> Any:
    torch.manual_seed(0)
    return resnet_v2((2, 2), 3, 1, (3, 4), dtype=DOUBLE)


def test_outputs_are_those_of_training_on_that_batch() -> None:
    model, (x, _) = network(), images()
    with torch.no_grad():
        expected = model.train()(x)
    assert recalibrate_(model.eval(), x) == len(norms_in([model])) == 9
    variance = len(x) * 16 / (len(x) * 16 - 1)  # the running one is without bias
    torch.testing.assert_close(model(x), expected, rtol=0.0, atol=10 * (variance - 1))
    assert not model.training


def test_nothing_else_changes() -> None:
    model, (x, _) = network().train(), images()
    model.layers[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    recalibrate_(model, x, within=model.head)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["head.norm.running_mean", "head.norm.running_var"]
    assert [module.training for module in model.modules()] == modes
    assert {norm.momentum for norm in norms_in([model])} == {0.1}


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    x = torch.randn(50, 3)
    recalibrate_(model, x)
    torch.testing.assert_close(model[1].running_mean, x.mean(0))


def test_without_normalisation_there_is_nothing_to_do() -> None:
    assert recalibrate_(resnet(3, 4, 2, 3), torch.ones(2, 3)) == 0
    assert statistics_of([nn.ReLU()], torch.ones(2, 3)) == []


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_profile_of_networks_that_are_calibrated_after_the_cut(depth: int) -> None:
    model, (x, z) = network().train(), images()
    with torch.no_grad():
        for _ in range(3):
            model(x + torch.randn_like(x))
    before = copy.deepcopy(model.state_dict())
    profile = depth_profile(model, x, z, cross_entropy, calibration=x[:20], batch_size=7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model).eval()
    if depth < 4:  # the last row is the network as it is
        truncate(twin, depth)
        recalibrate_(twin, x[:20], within=twin.head)
    assert profile.loss[depth].item() == pytest.approx(cross_entropy(twin(x), z).item(), rel=1e-9)
    plain = depth_profile(model, x, z, cross_entropy)
    assert (abs(plain.loss[depth].item() - profile.loss[depth].item()) > 1e-4) == (depth < 4)


@pytest.mark.parametrize("by_stage", [False, True])
def test_decision_and_what_comes_of_it(by_stage: bool) -> None:
    model, (x, _) = network().eval(), images()
    with torch.no_grad():
        model.time_steps.values[[1, 3]] = 0.0
        z = model(x).argmax(1)
    decision = choose_layers(model, x, z, cross_entropy, tolerance=0.5, by_stage=by_stage, calibration=x)
    decision.apply_(model, x)
    assert (model(x).argmax(1) == z).double().mean().item() == pytest.approx(decision.reached)


@pytest.mark.parametrize("by_stage", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.2, 10.0])
def test_figures_of_a_decision_are_those_before_and_after_it(tolerance: float, by_stage: bool) -> None:
    """Running statistics that are far from those of the batch: the baseline is the network with them all the same."""
    model, (x, z) = network().eval(), images()
    with torch.no_grad():
        model.head.norm.running_mean += 0.3
        one_hot = torch.eye(3, dtype=DOUBLE)[z]
        whole = mse_loss(model(x), one_hot).item()
    decision = choose_layers(model, x, one_hot, mse_loss, tolerance=tolerance, by_stage=by_stage, calibration=x[:20])
    assert decision.whole == pytest.approx(whole, rel=1e-12)
    decision.apply_(model, x[:20])
    assert mse_loss(model(x), one_hot).item() == pytest.approx(decision.reached, rel=1e-9)


def test_a_decision_to_keep_all_changes_nothing() -> None:
    model, (x, _) = network().eval(), images()
    with torch.no_grad():
        model.head.norm.running_mean += 0.3
        y = model(x)
    decision = choose_layers(model, x, y, mse_loss, tolerance=0.0, calibration=x)
    assert (len(decision.keep), decision.whole, decision.reached) == (4, 0.0, 0.0)
    decision.apply_(model, x)
    assert torch.equal(model(x), y)


class TestBadInput:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, value: float) -> None:
        model, (x, z) = network(), images()
        before, x = copy.deepcopy(model.state_dict()), x.clone()
        x[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"the statistics of batch normalisation must .*got nan or inf"):
            recalibrate_(model, x)
        with pytest.raises(ValueError, match="the statistics of batch normalisation must be finite"):
            depth_profile(model, images()[0], z, cross_entropy, calibration=x)
        assert all(torch.equal(found, before[name]) for name, found in model.state_dict().items())

    def test_statistics_that_do_not_fit_leave_no_trace(self) -> None:
        norm = nn.BatchNorm1d(3)
        with pytest.raises(RuntimeError), using([Statistics(norm, torch.ones(3), torch.ones(5))]):
            pass
        assert norm.running_mean is not None
        assert norm.running_mean.tolist() == [0.0] * 3


def test_wrapped_models_are_refused() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = wrap(nn.Sequential(block, nn.Linear(3, 2)), ["0"])
    with pytest.raises(ValueError, match="calibration must be None for a wrapped model, whose normalisations"):
        depth_profile(
            model, torch.ones(2, 3), torch.zeros(2, dtype=torch.long), cross_entropy, calibration=torch.ones(2, 3)
        )


@pytest.mark.parametrize("confidence", [0.6, 0.8])
def test_early_exit_answers_as_the_calibrated_cut_networks(confidence: float) -> None:
    model, (x, z) = network().eval(), images()
    with torch.no_grad():
        model.head.norm.running_mean += 0.5  # far from what early states have
        model.head.linear.weight *= 5.0
        whole = model(x)
    outputs = []
    for k in range(4):
        short = copy.deepcopy(model)
        if k:
            truncate(short, k)
            recalibrate_(short, x, within=short.head)
            outputs.append(short(x).detach())
        else:
            tail = nn.Sequential(short.stem, *(short.skips.past(l) for l in range(4)), short.head)
            recalibrate_(tail, x, within=short.head)
            outputs.append(tail(x).detach())
    stops = [next((k for k in range(4) if outputs[k][i].softmax(0).max() >= confidence), 4) for i in range(len(x))]
    expected = torch.stack([(outputs[k] if k < 4 else whole)[i] for i, k in enumerate(stops)])
    found = model.predict(x, confidence, statistics=depth_statistics(model, x))
    assert len(set(stops)) > 1
    assert found.depths.tolist() == stops
    torch.testing.assert_close(found.outputs, expected, rtol=1e-9, atol=1e-9)
    table = early_exit(model, x, z, (confidence,), calibration=x, batch_size=7)
    assert table.depth.item() == pytest.approx(sum(stops) / len(stops))
    assert table.accuracy.item() == pytest.approx(float((expected.argmax(1) == z).double().mean()))
    torch.testing.assert_close(model(x).detach(), whole)
