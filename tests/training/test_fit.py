"""fit computes what the loop computes that anyone would write, bit by bit, and records what it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from taulearn import Pruning, parameter_groups, prune
from taulearn.nn import fractional_dnn
from taulearn.optim import register_projection
from taulearn.penalties import L1, BiasOrdering, ElasticNet, Penalty, TimeHorizon, WeightElasticNet
from taulearn.training import EpochEnd, History, StopTraining, accuracy, evaluate, fit
from taulearn.training.batches import make_batches
from training.support import LOSS, assert_same_history, assert_same_weights, digits, network, plain_loop, run_fit

CPU = torch.device("cpu")
EPOCHS = 3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameter_groups(model, 0.05, 0.01, 1e-3), momentum=0.9, nesterov=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def void(_: object) -> None:
    """Nothing, which is what a hook must return."""


def orders(data: Any, epochs: int = EPOCHS, *, batch_size: int = 40, seed: int = 0) -> list[Tensor]:
    """The orders that fit uses."""
    batches: Any = make_batches(data, batch_size, seed, CPU)
    return [batches.order(epoch) for epoch in range(epochs)]


CASES: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], list[Penalty], dict[str, Any]]] = {
    "sgd": (sgd, [], {}),
    "momentum": (momentum, [], {}),
    "adam": (adam, [], {}),
    "l1": (sgd, [L1(0.05)], {}),
    "proximal": (momentum, [L1(0.4, proximal=True)], {}),
    "time horizon": (momentum, [TimeHorizon(0.7, weight=0.5)], {}),
    "many": (adam, [L1(0.1), ElasticNet(0.01), WeightElasticNet(1e-3), BiasOrdering()], {}),
    "dependent": (momentum, [L1(0.1)], {"constraint": "dependent"}),
    "dependent, bounded": (sgd, [], {"constraint": "dependent", "lower_bound": 0.19}),
    "simplex": (adam, [L1(0.1)], {"constraint": "simplex", "lower_bound": 0.05}),
    "bounded": (momentum, [L1(2.0)], {"lower_bound": 0.15}),
    "fixed": (momentum, [], {"constraint": "fixed"}),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_is_the_plain_loop(case: str) -> None:
    make, penalties, options = CASES[case]
    data = digits(190)
    ours, theirs = network(**options), network(**options)
    history = run_fit(ours, data, make(ours), penalties=penalties)
    optimizer = make(theirs)
    handle = register_projection(optimizer, theirs, penalties)
    rows = np.array(plain_loop(theirs, data, optimizer, orders(data), penalties=penalties))
    handle.remove()
    assert_same_weights(ours, theirs)
    columns, scalars = history.iterations, 2 + len(penalties)
    names = ["loss", "total", *(f"penalty.{penalty.name}" for penalty in penalties)]
    assert list(columns)[:scalars] == names
    np.testing.assert_array_equal(np.stack([columns[name] for name in names], 1), np.float32(rows[:, :scalars]))
    np.testing.assert_array_equal(columns["tau"], np.float32(rows[:, scalars:]))
    assert ("raw_tau" in columns) == (case == "dependent, bounded")


def test_the_constraints_are_kept_by_hand_alone() -> None:
    """The same without taulearn.optim: proximal step and projection written out."""
    data, alpha = digits(), 0.3
    ours, theirs = network(lower_bound=0.1), network(lower_bound=0.1)
    run_fit(ours, data, sgd(ours), penalties=[L1(alpha, proximal=True)])
    tau = theirs.time_steps.values

    def after_step() -> None:
        with torch.no_grad():
            tau.copy_((tau.sign() * (tau.abs() - 0.05 * alpha).clamp(min=0.0)).clamp(min=0.1))

    plain_loop(theirs, data, sgd(theirs), orders(data), after_step=after_step)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0.0, atol=1e-6)


def test_a_fractional_network_trains_alike() -> None:
    data = digits()
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(fractional_dnn(64, 12, 10, 4, gamma=0.6))
    run_fit(made[0], data, adam(made[0]))
    optimizer = adam(made[1])
    register_projection(optimizer, made[1])
    plain_loop(made[1], data, optimizer, orders(data))
    assert_same_weights(*made)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    results = []
    for seed in (1, 1, 2):
        model = network(dropout=0.1)
        results.append((model, run_fit(model, digits(), adam(model), seed=seed)))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_history(results[0][1], results[1][1])
    assert not np.array_equal(results[0][1].iterations["loss"], results[2][1].iterations["loss"])


def test_the_record_of_losses_and_epochs() -> None:
    data, held_out = digits(190), digits(60)
    model = network()
    before = evaluate(model, held_out, loss=LOSS)
    history = run_fit(model, data, momentum(model), penalties=[L1(0.1), TimeHorizon(weight=2.0)], validation=held_out)
    columns, epochs = history.iterations, history.epochs
    np.testing.assert_allclose(
        columns["total"], columns["loss"] + columns["penalty.l1"] + columns["penalty.time_horizon"], rtol=1e-6
    )
    np.testing.assert_allclose(columns["penalty.l1"], 0.1 * np.abs(columns["tau"]).sum(1), rtol=1e-6)
    np.testing.assert_allclose(columns["penalty.time_horizon"], (1.0 - columns["tau"].sum(1)) ** 2, atol=1e-7)
    np.testing.assert_array_equal(epochs["iteration"], [0, 5, 10, 15])
    np.testing.assert_array_equal(epochs["layers"], [5] * 4)
    np.testing.assert_array_equal(epochs["parameters"], [sum(p.numel() for p in model.parameters())] * 4)
    assert epochs["seconds"][0] == 0.0
    assert (epochs["seconds"][1:] > 0).all()
    for name in ("loss", "total"):
        assert np.isnan(epochs[f"train.{name}"][0])
        means = columns[name].astype(np.float64).reshape(3, 5).mean(1)
        np.testing.assert_array_equal(epochs[f"train.{name}"][1:], means)
    after = evaluate(model, held_out, loss=LOSS)
    for name in ("loss", "accuracy"):
        assert epochs[f"validation.{name}"][0] == before[name]
        assert epochs[f"validation.{name}"][-1] == after[name]
    with torch.no_grad():
        output = model(held_out[0])
    assert after["accuracy"] == pytest.approx(float((output.argmax(1) == held_out[1]).double().mean()), abs=1e-7)
    assert history.deletions == []
    assert history.num_iterations == 15


def test_the_record_of_deletions(tmp_path: Path) -> None:
    model = network(init=[0.3, 0.05, 0.2, 0.1, 0.35])
    one_layer = 1 + 12 * 12 + 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    penalties = [L1(0.3, proximal=True)]
    history = run_fit(model, digits(), optimizer, penalties=penalties, pruning=Pruning(0.05, every=4), epochs=4)
    tau, deletions = history.iterations["tau"], history.deletions
    assert len(deletions) >= 2
    assert len({d.iteration for d in deletions}) >= 2
    for deletion in deletions:
        assert deletion.iteration % 4 == 0
        assert deletion.epoch == -(-deletion.iteration // 5)
        assert 0 <= deletion.share < 0.05
        assert deletion.parameters == one_layer
        assert np.isfinite(tau[: deletion.iteration, deletion.layer]).all()
        assert np.isnan(tau[deletion.iteration :, deletion.layer]).all()
    kept = [layer for layer in range(5) if layer not in {d.layer for d in deletions}]
    assert list(model.time_steps.origin) == kept
    assert np.isfinite(tau[:, kept]).all()
    layers = [5 - sum(d.epoch <= epoch for d in deletions) for epoch in range(5)]
    np.testing.assert_array_equal(history.epochs["layers"], layers)
    start = history.epochs["parameters"][0]
    np.testing.assert_array_equal(history.epochs["parameters"], [start - (5 - n) * one_layer for n in layers])
    np.testing.assert_allclose(history.iterations["penalty.l1"], 0.3 * np.nansum(np.abs(tau), 1), rtol=1e-5)
    history.save(tmp_path / "history.safetensors")
    assert_same_history(History.load(tmp_path / "history.safetensors"), history)


def test_raw_steps_of_a_bounded_dependent_step_are_recorded() -> None:
    model = network(constraint="dependent", lower_bound=0.19)
    history = run_fit(model, digits(), torch.optim.SGD(model.parameters(), lr=0.5), epochs=4)
    tau, raw = history.iterations["tau"], history.iterations["raw_tau"]
    np.testing.assert_allclose(raw.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(tau[:, :-1], raw[:, :-1])
    np.testing.assert_array_equal(tau[:, -1], np.maximum(raw[:, -1], np.float32(0.19)))
    assert (tau[:, -1] != raw[:, -1]).any()


def test_a_model_that_was_pruned_before_keeps_its_numbers() -> None:
    model = network()
    prune(model, keep=[0, 2, 4])
    history = run_fit(model, digits(), sgd(model))
    tau = history.iterations["tau"]
    assert tau.shape == (15, 5)
    assert np.isfinite(tau[:, [0, 2, 4]]).all()
    assert np.isnan(tau[:, [1, 3]]).all()


def test_fixed_steps_do_not_train() -> None:
    model = network(constraint="fixed", init=[0.1, 0.2, 0.3, 0.2, 0.2])
    history = run_fit(model, digits(), momentum(model), penalties=[L1(1.0, proximal=True)])
    np.testing.assert_array_equal(history.iterations["tau"], [np.float32([0.1, 0.2, 0.3, 0.2, 0.2])] * 15)
    assert model.time_steps.tau.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2])


def test_a_scheduler_steps_each_epoch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates: list[float] = []
    run_fit(
        model,
        digits(),
        optimizer,
        scheduler=lr_scheduler.StepLR(optimizer, 1, 0.1),
        callbacks=[lambda end: rates.append(end.optimizer.param_groups[0]["lr"])],
    )
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_one_cycle_steps_each_iteration() -> None:
    data = digits()
    ours, theirs = network(), network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    run_fit(ours, data, optimizer, scheduler=lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=15))
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(plain, 0.2, total_steps=15)
    plain_loop(theirs, data, plain, orders(data), after_step=scheduler.step)
    assert_same_weights(ours, theirs)


def test_plateau_follows_the_validation_loss() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    history = run_fit(model, digits(), optimizer, scheduler=scheduler, validation=digits(50))
    assert scheduler.best == min(history.epochs["validation.loss"][1:])


@pytest.mark.parametrize("parts", [2, 3, 7, 40])
def test_accumulation_is_the_step_of_the_whole_batch(parts: int) -> None:
    data = digits(190, torch.float64)
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    penalties = [L1(0.1), WeightElasticNet(1e-3)]
    split = run_fit(ours, data, momentum(ours), penalties=penalties, accumulate=parts)
    whole = run_fit(theirs, data, momentum(theirs), penalties=penalties)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0.0, atol=1e-12)
    for name in whole.iterations:
        np.testing.assert_allclose(split.iterations[name], whole.iterations[name], rtol=0.0, atol=1e-12)


def test_clipping_bounds_the_gradient() -> None:
    data = digits()
    ours, theirs = network(), network()
    run_fit(ours, data, sgd(ours), clip_norm=0.01)
    optimizer = sgd(theirs)
    optimizer.register_step_pre_hook(lambda *_: void(nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)))
    plain_loop(theirs, data, optimizer, orders(data))
    assert_same_weights(ours, theirs)
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    run_fit(model, data, sgd(model), clip_norm=0.01, epochs=1, batch_size=200)
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), start, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_float32() -> None:
    seen: set[torch.dtype] = set()
    model = network()
    model.layers[1].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    history = run_fit(model, digits(400), adam(model), precision="bf16", epochs=8)
    assert torch.bfloat16 in seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.iterations["tau"].dtype == np.float32
    reference = network()
    expected = run_fit(reference, digits(400), adam(reference), epochs=8)
    assert history.epochs["train.loss"][-1] == pytest.approx(expected.epochs["train.loss"][-1], rel=0.02)
    assert history.epochs["train.loss"][-1] < 0.8 * history.epochs["train.loss"][1]


def test_lbfgs() -> None:
    data = digits()
    ours, theirs = network(), network()
    history = run_fit(ours, data, torch.optim.LBFGS(ours.parameters(), max_iter=4), batch_size=200)
    optimizer = torch.optim.LBFGS(theirs.parameters(), max_iter=4)
    losses = []
    for order in orders(data, batch_size=200):

        def closure(order: Tensor = order) -> Any:
            optimizer.zero_grad()
            loss = LOSS(theirs(data[0][order]), data[1][order])
            loss.backward()
            return loss

        losses.append(float(torch.as_tensor(optimizer.step(closure)).detach()))
    assert_same_weights(ours, theirs)
    np.testing.assert_array_equal(history.iterations["loss"], np.float32(losses))


def test_images_kept_as_bytes_train_alike() -> None:
    inputs, targets = digits()
    images = (inputs * 255).round().to(torch.uint8)
    results = []
    for values in (images, images.float() / 255):
        model = network()
        results.append((model, run_fit(model, (values, targets), sgd(model), validation=(values[:50], targets[:50]))))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_history(results[0][1], results[1][1])


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A Dataset that is not a TensorDataset."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


def test_a_tensor_dataset_is_its_tensors() -> None:
    results = []
    for data in (digits(), list(digits()), TensorDataset(*digits())):
        model = network()
        run_fit(model, data, sgd(model), validation=data)
        results.append(model)
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])


def test_a_dataset_is_shuffled_after_the_seed_alone() -> None:
    losses = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = network()
        torch.manual_seed(noise)
        data = Pairs(*digits())
        losses.append(run_fit(model, data, sgd(model), seed=seed, validation=data).iterations["loss"])
    assert np.array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])
    assert len(losses[0]) == 15


def test_a_loader_gives_its_own_batches() -> None:
    data = digits(190)
    ours, theirs = network(), network()
    loader = DataLoader(Pairs(*data), batch_size=40, shuffle=False)
    history = run_fit(ours, loader, sgd(ours), batch_size=7)
    plain_loop(theirs, data, sgd(theirs), [torch.arange(190)] * 3)
    assert_same_weights(ours, theirs)
    assert history.num_iterations == 15


def test_a_loader_may_collate_in_its_own_way() -> None:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x.flatten() for x, _ in samples]), torch.stack([z for _, z in samples])

    class Named(Pairs):
        def __getitem__(self, i: int) -> Any:
            return {"x": self.inputs[i], "z": self.targets[i]}

    model = network()
    loader = DataLoader(Named(*digits()), batch_size=40, collate_fn=lambda s: collate([(d["x"], d["z"]) for d in s]))
    assert run_fit(model, loader, sgd(model)).num_iterations == 15


def test_evaluation_does_not_disturb_training() -> None:
    histories = []
    loader = DataLoader(Pairs(*digits(50)), batch_size=10, shuffle=True)
    for validation in (None, loader, digits(50)):
        model = network(dropout=0.3)
        histories.append(run_fit(model, digits(), sgd(model), validation=validation).iterations["loss"])
        assert model.training
    assert np.array_equal(histories[0], histories[1])
    assert np.array_equal(histories[0], histories[2])


def test_metrics_by_name() -> None:
    model = network()
    metrics = {"accuracy": accuracy, "largest": lambda output, target: output.amax(1).mean()}
    held_out = digits(50)
    history = run_fit(model, digits(), sgd(model), validation=held_out, metrics=metrics)
    assert {"validation.loss", "validation.accuracy", "validation.largest"} <= history.epochs.keys()
    with torch.no_grad():
        expected = model(held_out[0]).amax(1).mean()
    assert history.epochs["validation.largest"][-1] == pytest.approx(float(expected), rel=1e-6)


def test_evaluation_weights_batches_by_their_size() -> None:
    model, data = network(), digits(130)
    assert evaluate(model, data, loss=LOSS, batch_size=100) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)
    loader = DataLoader(Pairs(*data), batch_size=100)
    assert evaluate(model, loader, loss=LOSS) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)
    assert evaluate(model, Pairs(*data), loss=LOSS) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)


def test_regression_has_no_accuracy() -> None:
    inputs, targets = digits()
    model = network()
    data = inputs, nn.functional.one_hot(targets, 10).float()
    history = run_fit(model, data, sgd(model), loss=nn.functional.mse_loss, validation=data)
    assert "validation.accuracy" not in history.epochs
    assert history.epochs["validation.loss"].shape == (4,)


def test_callbacks_see_the_end_of_each_epoch() -> None:
    ends: list[EpochEnd] = []
    model = network(init=[0.3, 0.05, 0.2, 0.1, 0.35])
    optimizer = sgd(model)
    penalties = [L1(0.3, proximal=True)]
    history = run_fit(
        model,
        digits(),
        optimizer,
        penalties=penalties,
        pruning=Pruning(0.05),
        callbacks=[ends.append],
        validation=digits(30),
    )
    assert [end.epoch for end in ends] == [1, 2, 3]
    assert [end.iteration for end in ends] == [5, 10, 15]
    for i, end in enumerate(ends):
        assert end.model is model
        assert end.optimizer is optimizer
        assert dict(end.metrics) == {name: column[i + 1] for name, column in history.epochs.items()}
        assert list(end.deletions) == [d for d in history.deletions if d.epoch <= end.epoch]
    assert history.deletions


def test_stopping_early_keeps_all_until_there(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(end: EpochEnd) -> None:
        if end.epoch == 2:
            raise StopTraining

    model = network()
    history = run_fit(
        model,
        digits(),
        sgd(model),
        epochs=5,
        callbacks=[stop, lambda end: seen.append(end.epoch)],
        run=tmp_path / "run",
        checkpoint_every=10,
    )
    assert history.num_iterations == 10
    assert seen == [1, 2]
    assert_same_history(History.load(tmp_path / "run" / "history.safetensors"), history)
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir()) == ["0000000000", "0000000010"]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_averaged_weights_follow_the_iterations() -> None:
    data = digits()
    ours, theirs = network(), network()
    average, expected = AveragedModel(ours), AveragedModel(theirs)
    run_fit(ours, data, sgd(ours), averaged=average)
    plain_loop(theirs, data, sgd(theirs), orders(data), after_step=lambda: expected.update_parameters(theirs))
    assert_same_weights(average, expected)


def test_no_hook_is_left_behind() -> None:
    model = network(lower_bound=0.1)
    optimizer = sgd(model)
    run_fit(model, digits(), optimizer)
    with torch.no_grad():
        model.time_steps.values.fill_(0.0)
    optimizer.step()
    assert (model.time_steps.values < 0.05).all()


def test_batches_cover_each_sample_once() -> None:
    data = torch.arange(23).unsqueeze(1), torch.arange(23)
    batches: Any = make_batches(data, 5, 0, CPU)
    assert len(batches) == 5
    seen = [inputs.flatten() for inputs, _ in batches.epoch(0)]
    assert [len(x) for x in seen] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(23))
    rest = [inputs.flatten() for inputs, _ in batches.epoch(0, start=2)]
    assert all(torch.equal(a, b) for a, b in zip(rest, seen[2:], strict=True))
    assert not torch.equal(batches.order(0), batches.order(1))
    assert not torch.equal(batches.order(0), make_batches(data, 5, 1, CPU).order(0))
    assert len(make_batches(data, 100, 0, CPU)) == 1


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    model = network(init=[0.3, 0.001, 0.2, 0.1, 0.35])
    fit(
        model,
        digits(),
        loss=LOSS,
        optimizer=sgd(model),
        epochs=2,
        batch_size=40,
        validation=digits(30),
        pruning=Pruning(0.01),
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "deleted layer 1" in lines[0]
    assert lines[1].startswith("epoch 1/2  loss ")
    assert "accuracy" in lines[1]
    assert "4 layers" in lines[2]


def test_a_long_epoch_is_flushed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.training.loop._FLUSH_EVERY", 3)
    ours, theirs = network(), network()
    flushed = run_fit(ours, digits(), sgd(ours), batch_size=7)
    monkeypatch.undo()
    assert_same_history(flushed, run_fit(theirs, digits(), sgd(theirs), batch_size=7))
