"""Pruning as one transaction: when anything fails, model, optimiser and averaged model are as before."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from small_networks import DOUBLE, KEEP, Picture, assert_same_bits, train
from taulearn import prune
from taulearn.nn import (
    IdentitySkips,
    PadSkips,
    TimeSteps,
    TimeVariableNetwork,
    resnet,
)


class Failure(Exception):
    pass


class State(dict[Any, Any]):
    """An optimiser's state that fails at one of its operations."""

    failing = ""

    def pop(self, *args: Any) -> Any:
        if self.failing == "pop":
            raise Failure
        return super().pop(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.failing == "set":
            raise Failure
        super().__setitem__(key, value)


class TestTransaction:
    def setting(
        self, widths: int | list[int] = 4, constraint: str = "free"
    ) -> tuple[TimeVariableNetwork, torch.optim.Optimizer, AveragedModel, Picture]:
        torch.manual_seed(0)
        model = resnet(3, widths, 2, 5, dtype=DOUBLE, constraint=constraint)
        optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1, amsgrad=True)
        averaged = AveragedModel(model)
        train(model, optimizer)
        averaged.update_parameters(model)
        return model, optimizer, averaged, Picture(model, optimizer, averaged)

    def assert_training_goes_on(self, model: nn.Module, optimizer: torch.optim.Optimizer, constraint: str) -> None:
        """Bit by bit like that of a twin for which the deletion was never tried."""
        twin, other, *_ = self.setting(constraint=constraint)
        train(model, optimizer, 2)
        train(twin, other, 2)
        assert_same_bits(model.state_dict(), twin.state_dict())
        assert_same_bits(optimizer.state_dict(), other.state_dict())

    @pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
    @pytest.mark.parametrize("owner", [TimeSteps, IdentitySkips, TimeVariableNetwork], ids=lambda c: c.__name__)
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_module_fails(self, owner: Any, when: str, constraint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, optimizer, averaged, picture = self.setting(constraint=constraint)
        name = "keep_layers_" if owner is TimeVariableNetwork else "keep_"
        original = getattr(owner, name)

        def failing(self: Any, indices: Any) -> None:
            if when == "after":
                original(self, indices)
            raise Failure

        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(Failure):
            prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        picture.assert_unchanged()
        monkeypatch.undo()
        self.assert_training_goes_on(model, optimizer, constraint)

    @pytest.mark.parametrize("failing", ["pop", "set"])
    def test_the_optimiser_fails(self, failing: str) -> None:
        model, optimizer, averaged, picture = self.setting()
        state = State(optimizer.state)
        vars(optimizer)["state"] = state
        state.failing = failing
        with pytest.raises(Failure):
            prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        state.failing = ""
        picture.assert_unchanged()
        self.assert_training_goes_on(model, optimizer, "free")

    def test_its_groups_fail(self) -> None:
        model, optimizer, averaged, _ = self.setting()
        optimizer.param_groups[0]["param_names"].pop()
        picture = Picture(model, optimizer, averaged)
        with pytest.raises(ValueError, match="zip"):
            prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        picture.assert_unchanged()

    def test_the_averaged_model_fails_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, optimizer, averaged, picture = self.setting()

        def failing(indices: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(averaged.module, "keep_layers_", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        picture.assert_unchanged()

    def test_skips_that_change_a_list_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, optimizer, averaged, picture = self.setting([4, 4, 4, 4, 2])
        assert isinstance(model.skips, PadSkips)
        labels = ["a", "b", "c", "d", "e"]
        vars(model.skips)["labels"] = [*labels]

        def failing(self: Any, layers: Any) -> None:
            del self.labels[1]
            raise Failure

        monkeypatch.setattr(PadSkips, "keep_", failing)
        with pytest.raises(Failure):
            prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        picture.assert_unchanged()
        assert vars(model.skips)["labels"] == labels

    def test_a_refused_call_changes_nothing(self) -> None:
        model, optimizer, averaged, picture = self.setting()
        calls: list[dict[str, Any]] = [{"threshold": 2.0}, {"keep": [1]}, {"keep": [0, 9]}]
        for arguments in calls:
            with pytest.raises(ValueError, match="must"):
                prune(model, optimizer=optimizer, averaged=averaged, **arguments)
        picture.assert_unchanged()

    def test_it_succeeds_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, optimizer, averaged, _ = self.setting()
        with monkeypatch.context() as context:
            context.setattr(IdentitySkips, "keep_", lambda self, layers: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        assert prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged).kept == KEEP
