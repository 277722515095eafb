"""What does not fit is said before anything is trained or written."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from taulearn import Pruning
from taulearn.nn import densenet, feedforward
from taulearn.penalties import L1
from taulearn.training import Diverged, History, Run
from training.support import assert_same_weights, digits, network, run_fit, sgd


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(*digits(), strict=True)


class Nothing(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, i: int) -> Any:
        raise IndexError


X, Z = digits()
LABELS = Z.clone()
LABELS[17] = 10
NEGATIVE = Z.clone()
NEGATIVE[3] = -1

DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "width": ((X.flatten(1)[:, :63], Z), ValueError, r"64 values per sample, got \(2, 63\)"),
    "double": (
        (X.double(), Z),
        TypeError,
        r"type torch.float32, got torch.float64.*convert them with",
    ),
    "half": ((X.half(), Z), TypeError, "got torch.float16"),
    "integers": ((X.long(), Z), TypeError, "must be floating point, got torch.int64"),
    "labels": ((X, LABELS), ValueError, r"must hold labels in 0 \.\. 9, got 10 at sample 17"),
    "negative labels": ((X, NEGATIVE), ValueError, r"must hold labels in 0 \.\. 9, got -1 at sample 3"),
    "empty": ((X[:0], Z[:0]), ValueError, "must hold at least one sample, got none"),
    "lengths": ((X, Z[:-1]), ValueError, "as many targets as inputs, got 200 inputs and 199 targets"),
    "array": (X.numpy(), TypeError, "must be a pair of tensors .* got ndarray"),
    "triple": ((X, Z, Z), TypeError, "must be a pair of tensors"),
    "arrays": ((X.numpy(), Z.numpy()), TypeError, "must be a pair of tensors"),
    "iterable": (Endless(), TypeError, "must have a length, got the Endless without one"),
    "iterable loader": (DataLoader(Endless()), TypeError, "must have a length, got the Endless without one"),
    "empty dataset": (Nothing(), ValueError, "must hold at least one batch, got an empty Nothing"),
    "empty loader": (
        DataLoader(TensorDataset(X, Z), batch_size=500, drop_last=True),
        ValueError,
        "must hold at least one batch, got an empty DataLoader",
    ),
}


@pytest.mark.parametrize("argument", ["train", "validation"])
@pytest.mark.parametrize("case", DATA)
def test_data_that_do_not_fit(case: str, argument: str, tmp_path: Path) -> None:
    data, error, message = DATA[case]
    model = network()
    before = network()
    with pytest.raises(error, match=message) as caught:
        run_fit(model, **{"train": (X, Z), argument: data}, optimizer=sgd(model), run=tmp_path / "run")
    assert argument in str(caught.value) or "inputs must" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert_same_weights(model, before)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "compile": ({"compile": "alway"}, ValueError, "compile must be one of .* got 'alway': did you mean 'always'"),
    "precision": ({"precision": "bf17"}, ValueError, "precision must be one of .* did you mean 'bf16'"),
    "epochs": ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
    "half epochs": ({"epochs": 1.5}, ValueError, "epochs must be an integer >= 1, got 1.5"),
    "true epochs": ({"epochs": True}, ValueError, "epochs must be an integer >= 1, got True"),
    "batch size": ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
    "accumulate": ({"accumulate": 0}, ValueError, "accumulate must be an integer >= 1, got 0"),
    "checkpoint_every": ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be an integer >= 1, got 0"),
    "seed": ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
    "clip_norm": ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive or None, got 0.0"),
    "clip_norm nan": ({"clip_norm": float("nan")}, ValueError, "clip_norm must be positive or None, got nan"),
    "metrics": ({"metrics": "acc"}, ValueError, "metrics must be 'auto' or a mapping"),
    "pruning": ({"pruning": 0.01}, TypeError, r"pruning must be a Pruning policy, got 0.01: write"),
    "penalties": ({"penalties": [L1(0.1), L1(0.2)]}, ValueError, "penalties must have different names"),
    "tensorboard": ({"tensorboard": True, "run": None}, ValueError, "run must be given with tensorboard=True"),
    "resume": ({"resume": True, "run": None}, ValueError, "run must name the run's folder"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(case: str, tmp_path: Path) -> None:
    options, error, message = OPTIONS[case]
    model = network()
    with pytest.raises(error, match=message):
        run_fit(model, (X, Z), sgd(model), **{"run": tmp_path / "run"} | options)
    assert not (tmp_path / "run").exists()


MODELS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "dense": (lambda: densenet(64, 12, 10, 3), ValueError, "model has the dense scheme"),
    "feedforward": (lambda: feedforward(64, 12, 10, 3), ValueError, "model has the feedforward scheme"),
    "single layer": (lambda: network(1), ValueError, "model has a single layer"),
    "no time steps": (lambda: nn.Linear(64, 10), TypeError, "model must have time steps, got Linear"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_pruned(case: str, tmp_path: Path) -> None:
    build, error, message = MODELS[case]
    model = build()
    with pytest.raises(error, match=message):
        run_fit(model, (X, Z), sgd(model), pruning=Pruning(0.01), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters"):
        run_fit(network(), (X, Z), sgd(network()), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scheduler_of_another_optimizer() -> None:
    model = network()
    with pytest.raises(ValueError, match="scheduler must change the learning rate of optimizer"):
        run_fit(model, (X, Z), sgd(model), scheduler=lr_scheduler.StepLR(sgd(model), 1))


def test_lbfgs_does_not_clip() -> None:
    model = network()
    with pytest.raises(ValueError, match="clip_norm must be None with LBFGS"):
        run_fit(model, (X, Z), torch.optim.LBFGS(model.parameters()), clip_norm=1.0)


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if "tensorboard" in name and not name.startswith("taulearn") and arguments[3:] != (1,):
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    model = network()
    with pytest.raises(ImportError, match=r"pip install 'taulearn\[tensorboard\]'"):
        run_fit(model, (X, Z), sgd(model), tensorboard=True, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_events_into_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = network()
    run_fit(model, (X, Z), sgd(model), tensorboard=True, run=tmp_path / "run", epochs=1)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
    assert b"tau/4" in file.read_bytes()


def test_a_run_that_exists_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    model = network()
    run_fit(model, (X, Z), sgd(model), run=tmp_path / "run", epochs=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"run .* exists: choose another folder, pass overwrite"):
        run_fit(model, (X, Z), sgd(model), run=tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    history = run_fit(model, (X, Z), sgd(model), run=tmp_path / "run", epochs=1, overwrite=True)
    assert history.num_iterations == 5
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir()) == ["0000000000", "0000000005"]


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    with pytest.raises(FileExistsError, match=r"it holds files, but no run\.toml"):
        Run.create(tmp_path / "photos", {}, overwrite=True)
    assert (tmp_path / "photos" / "1.png").exists()


def test_a_run_of_another_format(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"epochs": 3, "name": None})
    assert Run.open(tmp_path / "run").config == {"epochs": 3}
    file = run.path / "run.toml"
    text = file.read_text()
    file.write_text(text.replace("format = 1", "format = 2"))
    with pytest.raises(ValueError, match="format = 1, got 2: the run belongs to another version"):
        Run.open(run.path)
    file.write_text("format = [")
    with pytest.raises(ValueError, match="must be a TOML file, got a damaged one"):
        Run.open(run.path)
    file.write_text("format = 1\nconfig = 3\n")
    with pytest.raises(ValueError, match="must hold the tables"):
        Run.open(run.path)
    with pytest.raises(FileNotFoundError, match=r"got .*nowhere"):
        Run.open(tmp_path / "nowhere")


def test_a_record_of_another_format(tmp_path: Path) -> None:
    History().save(tmp_path / "a")
    assert History.load(tmp_path / "a") == History()
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b"taulearn history", b"taulearn mystery"))
    with pytest.raises(ValueError, match="must be a taulearn history of format 1"):
        History.load(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        History.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "b")


@pytest.mark.parametrize(("name", "value"), [("batch_size", 20), ("seed", 1)])
def test_what_orders_the_batches_must_not_change_on_resume(name: str, value: int, tmp_path: Path) -> None:
    model = network()
    run_fit(model, (X, Z), sgd(model), run=tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=f"{name} must be .* as at the start of the run, got {value}"):
        run_fit(model, (X, Z), sgd(model), run=tmp_path / "run", resume=True, **{name: value})


def explode(iteration: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is not finite from this iteration, counted from 1, on."""
    calls = iter(range(10_000))  # from 0: fit tries the loss once before it begins

    def loss(output: Tensor, target: Tensor) -> Tensor:
        factor = float("nan") if output.requires_grad and next(calls) >= iteration else 1.0
        return nn.functional.cross_entropy(output, target) * factor

    return loss


@pytest.mark.parametrize("pruning", [None, Pruning(0.001), Pruning(0.001, every=1)])
def test_divergence_is_said_and_the_last_good_checkpoint_stays(pruning: Pruning | None, tmp_path: Path) -> None:
    model, healthy = network(), network()
    penalties = [L1(0.1)]
    expected = run_fit(healthy, (X, Z), sgd(healthy), penalties=penalties, epochs=2)
    with pytest.raises(Diverged, match="the loss is not finite from iteration 13 on; last finite") as caught:
        run_fit(
            model,
            (X, Z),
            sgd(model),
            loss=explode(13),
            penalties=penalties,
            epochs=5,
            pruning=pruning,
            run=tmp_path / "r",
        )
    message = str(caught.value)
    assert "last finite values, at iteration 12: loss = " in message
    assert "penalty.l1 = 0." in message
    assert "tau = [" in message
    assert str(tmp_path / "r" / "checkpoint") in message
    assert "Lower the learning rate" in message
    good = network()
    same: dict[str, Any] = {"penalties": penalties, "pruning": pruning}
    history = run_fit(good, (X, Z), sgd(good), epochs=2, run=tmp_path / "r", resume=True, **same)
    assert_same_weights(good, healthy)
    np.testing.assert_array_equal(history.iterations["loss"], expected.iterations["loss"])


def test_divergence_in_the_first_iteration() -> None:
    model = network()
    with pytest.raises(Diverged, match="from iteration 1 on; there was no finite value before"):
        run_fit(model, (X, Z), sgd(model), loss=explode(1))


@pytest.mark.parametrize("pruning", [None, Pruning(0.001), Pruning(0.001, every=1)])
def test_a_last_step_that_spoils_the_weights_is_not_saved(pruning: Pruning | None, tmp_path: Path) -> None:
    """The loss of an epoch's last iteration is finite, what it makes of the weights is not."""
    model = network()
    optimizer = sgd(model)
    steps = iter(range(100))

    def spoil(*_: object) -> None:
        if next(steps) == 9:
            with torch.no_grad():
                model.time_steps.values.fill_(float("inf"))

    optimizer.register_step_post_hook(spoil)
    with pytest.raises(Diverged, match=r"weights are not finite after iteration 10; last .* at iteration 10"):
        run_fit(model, (X, Z), optimizer, epochs=3, run=tmp_path / "run", pruning=pruning)
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir()) == ["0000000000", "0000000005"]


def test_the_very_last_step_is_looked_at_too() -> None:
    model = network()
    optimizer = sgd(model)
    steps = iter(range(100))
    optimizer.register_step_post_hook(
        lambda *_: model.head.weight.detach().fill_(float("inf")) if next(steps) == 4 else None
    )
    with pytest.raises(Diverged, match="the weights are not finite after iteration 5"):
        run_fit(model, (X, Z), optimizer, epochs=1)


def test_a_learning_rate_that_is_too_large_diverges_with_a_hint() -> None:
    model = network()
    with pytest.raises(Diverged, match="Lower the learning rate"):
        run_fit(model, (X, Z), sgd(model, 1e30), epochs=5)


def test_flat_targets_of_a_network_with_one_output_are_not_broadcast() -> None:
    from taulearn import fit
    from taulearn.nn import resnet

    model = resnet(2, 3, 1, 2)
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"train must hold targets \(n, 1\).*got shape \(4,\).*unsqueeze"):
        fit(
            model,
            (x, x.sum(1)),
            loss=torch.nn.functional.mse_loss,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            epochs=1,
            progress=False,
        )
