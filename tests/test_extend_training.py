"""A penalty, a criterion and a data set of one's own go through all that training does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn import Criterion, Pruning, attach, load_model, prune, save_model
from taulearn.adaptivity.controller import Pruner
from taulearn.app.command_line import main
from taulearn.data import Generated, Samples
from taulearn.data.catalog import CATALOGUE
from taulearn.integrations.companion import Companion
from taulearn.nn.time_steps import time_steps_of
from taulearn.penalties import L1, L2, Penalty, StageCost
from taulearn.training import History, Run
from training.support import (
    LOSS,
    Crash,
    assert_same_history,
    assert_same_weights,
    crash_after,
    digits,
    momentum,
    network,
    run_fit,
)

INIT = [0.4, 0.02, 0.3, 0.1, 0.3]


class Watchful(Penalty):
    """Of all that a penalty can ask for and record."""

    name = "watchful"
    needs_states = needs_outputs = True
    columns: Mapping[str, str] = {"energy": "number", "size": "layers", "error": "depths"}

    def __init__(self, weight: float = 0.01, loss: Any = LOSS) -> None:
        self.weight, self.loss = weight, loss

    def __call__(  # type: ignore[override]
        self, model: Any, inputs: Any = None, targets: Any = None, states: Any = None, *, outputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sizes = torch.stack([y.square().mean() for y in states[-time_steps_of(model).num_steps :]])
        energy = outputs.square().mean()
        stages = model.intermediate_outputs(inputs, states=states, final=False)
        errors = torch.stack([LOSS(stage, targets) for stage in stages.values()])
        return self.weight * (energy + sizes.sum()), {"energy": energy, "size": sizes, "error": errors}


class Alone(Penalty):
    """A function of the model alone, with columns."""

    name = "alone"
    columns: Mapping[str, str] = {"largest": "number", "norms": "layers"}

    def __call__(self, model: Any, inputs: Any = None, targets: Any = None, states: Any = None) -> Any:
        norms = torch.stack([sum(p.square().sum() for p in layer.parameters()) for layer in model.layers])
        return 1e-3 * norms.sum(), {"largest": norms.max(), "norms": norms}


def by_hand(model: Any, x: Tensor, z: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        states, output = model.states(x), model(x)
        outputs = model.intermediate_outputs(x)
        return {
            "loss": float(LOSS(output, z)),
            "energy": float(output.square().mean()),
            "size": [float(y.square().mean()) for y in states],
            "error": [float(LOSS(outputs[k], z)) if k in outputs else np.nan for k in range(6)],
        }


def assert_columns(history: History, deleted: int, after: int) -> None:
    """Layers and depths are NaN once the layer is gone, and numbers before."""
    found = history.iterations
    assert {name: found[name].shape[1:] for name in ("energy", "size", "error")} == {
        "energy": (),
        "size": (5,),
        "error": (6,),
    }
    gone = np.arange(history.num_iterations) >= after
    assert np.isfinite(found["energy"]).all()
    np.testing.assert_array_equal(np.isnan(found["size"][:, deleted]), gone)
    np.testing.assert_array_equal(np.isnan(found["error"][:, deleted + 1]), gone)
    np.testing.assert_array_equal(np.isnan(found["size"]), np.isnan(found["tau"]))
    np.testing.assert_array_equal(found["error"][:, 5], found["loss"])


class TestPenalty:
    def test_fit_records_the_columns_and_goes_on_after_a_deletion(self, tmp_path: Path) -> None:
        model, (x, z) = network(init=INIT, dtype=torch.float64), digits(80, torch.float64)
        expected = by_hand(model, x, z)
        history = run_fit(
            model,
            (x, z),
            momentum(model),
            penalties=[Watchful(), L1(0.3, proximal=True)],
            epochs=4,
            batch_size=80,
            pruning=Pruning(0.05, every=2),
        )
        for name, value in expected.items():
            np.testing.assert_allclose(history.iterations[name][0], value, rtol=1e-12, err_msg=name)
        value = 0.01 * (history.iterations["energy"] + np.nansum(history.iterations["size"], 1))
        np.testing.assert_allclose(history.iterations["penalty.watchful"], value, rtol=1e-12)
        np.testing.assert_allclose(history.iterations["total"], history.iterations["loss"] + value, rtol=1e-12)
        assert [d.layer for d in history.deletions] == [1]
        assert_columns(history, 1, history.deletions[0].iteration)
        history.save(tmp_path / "history.safetensors")
        assert_same_history(History.load(tmp_path / "history.safetensors"), history)
        save_model(model, tmp_path / "model")
        loaded: Any = load_model(tmp_path / "model")
        assert torch.equal(loaded.predict(x, 0.9).outputs, model.predict(x, 0.9).outputs)

    def test_the_penalty_acts(self) -> None:
        ours, without = (network(init=INIT) for _ in range(2))
        run_fit(ours, digits(80), momentum(ours), penalties=[Watchful(0.5)])
        run_fit(without, digits(80), momentum(without))
        sizes = [float(model(digits(80)[0]).detach().square().mean()) for model in (ours, without)]
        assert sizes[0] < 0.9 * sizes[1]

    @pytest.mark.parametrize("loss", [LOSS, None], ids=["by its loss", "by samples"])
    def test_parts_of_a_batch_make_the_row_of_the_whole(self, loss: Any) -> None:
        parts, whole = (network(init=INIT, dtype=torch.float64) for _ in range(2))
        options: dict[str, Any] = {"penalties": [Watchful(loss=loss), StageCost(0.1, LOSS)], "batch_size": 70}
        data = digits(200, torch.float64)
        found = run_fit(parts, data, momentum(parts), accumulate=3, **options).iterations
        expected = run_fit(whole, data, momentum(whole), **options).iterations
        assert {"energy", "size", "error", "stage_loss"} <= expected.keys()
        for name, column in expected.items():
            np.testing.assert_allclose(found[name], column, rtol=1e-10, err_msg=name)
        np.testing.assert_array_equal(np.isnan(expected["error"][:, 5]), loss is None)
        np.testing.assert_array_equal(expected["error"][:, :5], expected["stage_loss"][:, :5])

    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        def start(run: str, **options: Any) -> tuple[Any, History]:
            model = network(init=INIT)
            penalties = [Watchful(), L1(0.3, proximal=True)]
            settings: dict[str, Any] = {"penalties": penalties, "pruning": Pruning(0.05, every=2), "epochs": 5}
            return model, run_fit(model, digits(), momentum(model), run=tmp_path / run, **settings | options)

        whole, history = start("whole")
        assert history.deletions
        with pytest.raises(Crash):
            start("cut", callbacks=[crash_after(3)])
        model, resumed = start("cut", resume=True)
        assert_same_history(resumed, history)
        assert_same_weights(model, whole)

    def test_attach_does_as_fit(self) -> None:
        ours, theirs, (x, z) = network(init=INIT), network(init=INIT), digits(80)
        options: dict[str, Any] = {"penalties": [Watchful(), L1(0.3, proximal=True)], "pruning": Pruning(0.05, every=2)}
        optimizer = momentum(ours)
        session = attach(ours, optimizer, **options)
        for _ in range(6):
            optimizer.zero_grad()
            output = ours(x)
            session.loss(LOSS(output, z), outputs=output, inputs=x, targets=z).backward()
            optimizer.step()
        session.detach()
        fitted = run_fit(theirs, (x, z), momentum(theirs), epochs=6, batch_size=80, **options)
        assert len(session.history.deletions) == 1
        assert_columns(session.history, 1, session.history.deletions[0].iteration)
        assert session.history.iterations.keys() == fitted.iterations.keys()
        for name, column in fitted.iterations.items():
            np.testing.assert_allclose(session.history.iterations[name], column, rtol=1e-5, atol=1e-7, err_msg=name)

    def test_fused_steps_record_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The function that is compiled; training/test_fused.py compiles one."""
        monkeypatch.setattr("taulearn.training.step.UNROLL", 2)
        monkeypatch.setattr("taulearn.training.fast.compiler._compiler_found", lambda: True)
        monkeypatch.setattr("taulearn.training.fast.fused.compile_once", lambda function, **_: function)

        def start(compiled: str, **options: Any) -> History:
            model = network(3, init=[0.4, 0.02, 0.3], dtype=torch.float64)
            torch.manual_seed(5)
            options |= {"penalties": [Watchful(), L1(0.3, proximal=True)], "pruning": Pruning(0.05, every=4)}
            return run_fit(
                model, digits(80, torch.float64), momentum(model), batch_size=20, compile=compiled, **options
            )

        compiled, eager = start("always", run=tmp_path / "run"), start("never")
        assert Run.open(tmp_path / "run").decisions["step"] == "compiled, 2 SGD steps fused"
        assert len(eager.deletions) == 1
        for name, column in eager.iterations.items():
            np.testing.assert_allclose(compiled.iterations[name], column, rtol=0, atol=1e-10, err_msg=name)

    def test_beside_another_trainer(self) -> None:
        model, (x, z) = network(init=INIT), digits(80)
        optimizer, norms = momentum(model), []
        companion = Companion([Alone()], Pruning(target_blocks=4, every=2, criterion="contribution"), progress=False)
        companion.begin(model, optimizer, epochs=1, per_epoch=10, averages=list)
        for _ in range(10):
            optimizer.zero_grad()
            companion.session.measure()
            loss = LOSS(model(x), z)
            loss.backward()
            norms.append(sum(float(p.detach().square().sum()) for p in model.layers[0].parameters()))
            companion.session.before_step()
            optimizer.step()
            companion.session.after_step(optimizer)
            companion.after_step(loss, epoch=1)
        found = companion.history().iterations
        (deleted,) = companion.history().deletions
        np.testing.assert_allclose(found["norms"][:, 0], norms, rtol=1e-6)
        np.testing.assert_array_equal(found["largest"], np.nanmax(found["norms"], 1))
        np.testing.assert_array_equal(np.isnan(found["norms"]), np.isnan(found["tau"]))
        assert np.isnan(found["norms"][-1, deleted.layer])
        assert found["weight.l1"].max() > 0.0, "that of the target is recorded like any other"

    def test_a_record_that_lacks_a_column_is_gone_on_with(self) -> None:
        """As one that was begun without the penalty."""
        model, (x, z) = network(init=INIT), digits(80)
        past = run_fit(model, (x, z), momentum(model), epochs=1)
        companion = Companion([Alone()], None, progress=False)
        companion.past = past
        companion.begin(model, momentum(model), epochs=2, per_epoch=2, averages=list)
        companion.session.before_step()
        companion.session.after_step(*companion.session.optimizers)
        found = companion.history().iterations
        assert np.isnan(found["norms"]).all(1).tolist() == np.isnan(found["largest"]).tolist() == [True, True, False]
        np.testing.assert_array_equal(found["loss"], [*past.iterations["loss"], np.nan])


def answering(columns: dict[str, str], answer: dict[str, Tensor], name: str = "odd") -> Penalty:
    class Odd(Penalty):
        def __call__(self, model: Any, inputs: Any = None, targets: Any = None, states: Any = None) -> Any:
            return time_steps_of(model).values.sum(), answer

    found = Odd()
    found.name, found.columns = name, columns
    return found


@pytest.mark.parametrize(
    ("penalties", "message"),
    [
        ([answering({"a": "layer"}, {})], "columns must be one of .*'layers'.*got 'layer'"),
        ([answering({"tau": "layers"}, {})], "columns of penalties must have names of their own"),
        ([answering({"penalty.l2": "number"}, {}), L2(0.1)], "columns of penalties must have names of their own"),
        ([answering({"a": "number"}, {})], r"columns of the penalty 'odd' must be \['a'\].*, got \[\]"),
        ([answering({}, {"a": torch.ones(())})], r"columns of the penalty 'odd' must be \[\].*, got \['a'\]"),
        (
            [answering({"a": "layers"}, {"a": torch.ones(4)})],
            r"column 'a' of a penalty must have shape \(5,\), got \(4,\)",
        ),
        (
            [answering({"a": "number"}, {"a": torch.ones(1)})],
            r"column 'a' of a penalty must have shape \(\), got \(1,\)",
        ),
        (
            [answering({"a": "depths"}, {"a": torch.ones(3)})],
            r"column 'a' of a penalty must have shape \(4,\), got \(3,\)",
        ),
        (
            [
                answering({"a": "depths"}, {"a": torch.ones(5)}),
                answering({"b": "depths"}, {"b": torch.ones(4)}, name="other"),
            ],
            r"column 'b' of a penalty must have shape \(5,\), got \(4,\)",
        ),
    ],
)
def test_columns_that_are_none(penalties: list[Penalty], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        run_fit(model, digits(40), momentum(model), penalties=penalties)


class Saliency(Criterion):
    """abs(tau dJ/dtau), measured in training."""

    def __init__(self, model: Any) -> None:
        self.model, self.values = model, torch.zeros(model.time_steps.num_steps)
        self.looks: list[int] = []

    @property
    def unseen(self) -> list[int]:  # type: ignore[override]
        return [] if self.number else list(range(len(self.values)))

    def scores(self, model: nn.Module) -> Tensor:
        self.looks.append(self.number)
        return self.values

    @contextmanager
    def measuring(self) -> Iterator[None]:
        yield
        steps = self.model.time_steps.values
        self.values = torch.maximum(0.8 * self.values, (steps * steps.grad).detach().abs())
        self.number += 1

    def keep_(self, indices: Any) -> None:
        self.values = self.values[indices]

    def state(self) -> dict[str, Any]:
        return {"saliency": self.values, "seen": self.number}

    def load_state(self, state: Any) -> None:
        self.values, self.number = state["saliency"], state["seen"]


class OfWeights(Criterion):
    """Looks at the model alone."""

    def scores(self, model: nn.Module) -> Tensor:
        layers: Any = model.layers
        return torch.stack([sum(p.square().sum() for p in layer.parameters()) for layer in layers])


CRITERIA: dict[str, Callable[[Any], Any]] = {"watching": Saliency, "of weights": lambda model: OfWeights()}
POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.2, "every": 3},
    "target": {"target_blocks": 3, "by": 3},
    "cut": {"target_blocks": 2, "penalised": "none"},
}


class TestCriterion:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("name", CRITERIA)
    def test_fit_prune_save_load_and_resume(self, name: str, policy: str, tmp_path: Path) -> None:
        def start(run: str, **options: Any) -> tuple[Any, Any, History]:
            model = network()
            criterion = CRITERIA[name](model)
            settings: dict[str, Any] = {"pruning": Pruning(criterion=criterion, **POLICIES[policy]), "epochs": 5}
            history = run_fit(model, digits(), momentum(model), run=tmp_path / run, **settings | options)
            return model, criterion, history

        model, criterion, history = start("whole")
        assert history.deletions
        assert model.time_steps.num_steps == {"target": 3, "cut": 2}.get(policy, 5 - len(history.deletions))
        if isinstance(criterion, Saliency):
            assert len(criterion.values) == model.time_steps.num_steps
            assert 0 not in criterion.looks, "deletions wait for what is not known"
        with pytest.raises(Crash):
            start("cut", callbacks=[crash_after(2)])
        resumed = start("cut", resume=True)
        assert_same_history(resumed[2], history)
        assert_same_weights(resumed[0], model)
        x, _ = digits(20)
        save_model(model, tmp_path / "model")
        loaded: Any = load_model(tmp_path / "model")
        assert torch.equal(loaded.predict(x, 0.9).outputs, model.predict(x, 0.9).outputs)

    def test_prune_deletes_the_smallest(self) -> None:
        model, other = network(), network()
        with torch.no_grad():
            model.layers[3].linear.weight.mul_(0.01)
        assert [d.layer for d in prune(model, criterion=OfWeights(), budget=4).deleted] == [3]
        criterion = Saliency(other)
        criterion.values = torch.tensor([1.0, 0.5, 0.01, 0.3, 0.02])
        report = prune(other, 0.1, criterion=criterion)
        assert [d.layer for d in report.deleted] == [2, 4]
        assert report.deleted[0].share == pytest.approx(0.01 / 1.83)

    def test_a_policy_is_resumed_with_its_kind(self) -> None:
        def pruner(criterion: Any) -> Pruner:
            model = network()
            given = CRITERIA[criterion](model) if criterion in CRITERIA else criterion
            return Pruner(Pruning(0.01, criterion=given), model, momentum(model), 1, 5)

        kinds = {"contribution": "contribution", "share": "power", "watching": "watching"}
        for began in kinds:
            for other, same in kinds.items():
                if began == other:
                    pruner(same).load_state(pruner(began).state())
                elif (began, other) != ("watching", "share"):
                    with pytest.raises(ValueError, match="another kind of target or criterion"):
                        pruner(other).load_state(pruner(began).state())

    def test_attach(self) -> None:
        ours, theirs, (x, z) = network(), network(), digits(80)
        mine, yours = Saliency(ours), Saliency(theirs)
        optimizer = momentum(ours)
        session = attach(ours, optimizer, pruning=Pruning(0.1, every=3, criterion=mine))
        for _ in range(9):
            optimizer.zero_grad()
            LOSS(ours(x), z).backward()
            optimizer.step()
        session.detach()
        policy = Pruning(0.1, every=3, criterion=yours)
        fitted = run_fit(theirs, (x, z), momentum(theirs), epochs=9, batch_size=80, pruning=policy)
        assert mine.number == yours.number + 1 == 10, "one is under way when the session ends"
        assert session.history.deletions
        assert [d.layer for d in session.history.deletions] == [d.layer for d in fitted.deletions]

    @pytest.mark.parametrize("given", [Saliency, 5, object()], ids=["class", "number", "object"])
    def test_what_is_none(self, given: Any) -> None:
        for call in (lambda: Pruning(0.1, criterion=given), lambda: prune(network(), criterion=given)):
            with pytest.raises(TypeError, match=r"criterion must be a name or a function .* taulearn\.Criterion"):
                call()


def spirals(split: str) -> Samples:
    generator = torch.Generator().manual_seed(len(split))
    time, arm = 6.0 * torch.rand(120, generator=generator), torch.arange(120) % 2
    angle = time + torch.pi * arm
    return Samples(torch.stack([time * angle.cos(), time * angle.sin()], 1), arm)


def test_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"train": 120, "test": 120}
    entry = Generated(name="mine", kind="classification", samples=counts, shape=(2,), classes=2, generate=spirals)
    taulearn.data.register(entry)
    try:
        inputs, targets = taulearn.data.load("mine")
        assert torch.equal(inputs, spirals("train").inputs)
        run = str(tmp_path / "run")
        small = ["--hidden-layers", "3", "--width", "8", "--epochs", "2", "--compile", "never"]
        assert main(["train", "--data", "mine", *small, "--run", run]) == 0
        assert Run.open(run).config["data"] == "mine"
        model: Any = load_model(run)
        assert model(inputs).shape == (120, 2)
        assert model.predict(inputs, 0.9).outputs.shape == (120, 2)
        assert main(["export", run, "--out", str(tmp_path / "out")]) == 0
        capsys.readouterr()
        assert main(["data", "list"]) == 0
        assert "mine" in capsys.readouterr().out
        assert len(targets) == 120
    finally:
        del CATALOGUE["mine"]
