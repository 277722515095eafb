"""Arguments that do not fit are refused before anything is trained or written."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taulearn import Pruning
from taulearn.penalties import L1
from taulearn.training import Diverged, History, Run
from training.support import assert_same_weights, digits, network, run_fit, sgd

X, Z = digits()


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
    with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
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
