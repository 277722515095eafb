"""The small functions that several rooms share: counting, calls, names, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taulearn._calls import call
from taulearn._counting import Counting, Mean, counted, right_of, watched
from taulearn._distributed import refuse_distributed
from taulearn._errors import is_number, positive_integer, unknown_name
from taulearn._lazy import lazily
from taulearn._milliseconds import clock, layer_milliseconds, milliseconds
from taulearn.adaptivity.policies import check_one_decides, check_threshold
from taulearn.calibration import check_calibration
from taulearn.depth.profile import check_tolerance, within
from taulearn.training.fast.compiler import worth_compiling


class TestCalls:
    def test_inputs_are_arguments_keywords_or_one_argument(self) -> None:
        one = torch.ones(1)
        assert all(call(nn.Identity(), inputs) is one for inputs in (one, (one,), [one], {"input": one}))

    def test_times(self) -> None:
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        now = clock(model)
        assert now() <= now()
        assert milliseconds(model, torch.ones(1, 1), repeats=2) > 0
        times, whole = layer_milliseconds(model, [*model], torch.ones(1, 1))
        assert len(times) == 2
        assert min(*times, whole) > 0


class TestCounting:
    LABELS = torch.tensor([0, 2, -100])

    def test_bytes_are_not_taken_for_ignored_labels(self) -> None:
        assert counted(torch.tensor([156, 3], dtype=torch.uint8)).tolist() == [True, True]

    def test_labels_that_count_and_their_weights(self) -> None:
        assert Counting("labels", classes=3, ignored=-100).of(self.LABELS) == 2
        assert Counting("labels", ignored=-100, weight=torch.tensor([1.0, 9.0, 0.5])).of(self.LABELS) == 1.5
        assert Counting("elements").of(torch.ones(2, 3)) == 6
        assert Counting(summed=True).of(torch.ones(2, 3)) == 1

    def test_what_is_right(self) -> None:
        assert [int(n) for n in right_of(torch.eye(3), torch.tensor([0, 0, -100]))] == [1, 2]

    def test_a_part_without_labels_adds_nothing_to_a_mean(self) -> None:
        mean, counting = Mean(), Counting("labels", ignored=-100)
        for labels in ([0, 1, -100], [1, -100, -100], [-100, -100, -100]):
            mean.add(torch.tensor(float(labels[0])), counting, torch.tensor(labels))
        assert mean.value() == 1 / 3

    def test_labels_out_of_range(self) -> None:
        Counting("labels", classes=3, ignored=-100).check("train", self.LABELS)
        with pytest.raises(ValueError, match=r"train must hold labels in 0 \.\. 1, got 2 at sample 1"):
            Counting("labels", classes=2, ignored=-100).check("train", self.LABELS)

    def test_cross_entropy_is_seen(self) -> None:
        value, counting = watched(F.cross_entropy, torch.zeros(3, 3), self.LABELS)
        torch.testing.assert_close(value, torch.tensor(3.0).log())
        assert (counting.by, counting.classes) == ("labels", 3)


class TestErrors:
    def test_an_unknown_name_with_the_nearest(self) -> None:
        error = unknown_name("scheme", "residul", ["dense", "residual"])
        assert str(error) == "scheme must be one of 'dense', 'residual', got 'residul': did you mean 'residual'?"

    def test_positive_integers(self) -> None:
        assert positive_integer("epochs", torch.tensor(3)) == 3
        for wrong in (0, True, 1.5):
            with pytest.raises(ValueError, match="epochs must be an integer >= 1"):
                positive_integer("epochs", wrong)  # type: ignore[arg-type]

    def test_numbers(self) -> None:
        assert [is_number(each) for each in (0.5, torch.ones(1), "0.5", None)] == [True, True, False, False]

    def test_refusals(self) -> None:
        with pytest.raises(TypeError, match=r"model must be the model itself.*wrapper\.module"):
            refuse_distributed("model", nn.DataParallel(nn.Linear(1, 1)))
        with pytest.raises(ValueError, match="threshold"):
            check_threshold(1.5)
        with pytest.raises(ValueError, match="keep"):
            check_one_decides(0.1, keep=[0, 1])
        with pytest.raises(ValueError, match="inputs"):
            check_calibration("inputs", torch.zeros(0, 3))
        with pytest.raises(ValueError, match="tolerance"):
            check_tolerance(-1.0)
        check_threshold(0.01)
        check_one_decides(None, keep=[0, 1])
        check_calibration("inputs", torch.zeros(2, 3))
        check_tolerance(0.002)


def test_a_lazy_package_imports_what_is_asked_for() -> None:
    get, names, public = lazily("taulearn.nn", {".time_steps": ("TimeSteps",), ".": ("skips",)})
    assert names() == public == ["TimeSteps", "skips"]
    assert get("TimeSteps").__module__ == "taulearn.nn.time_steps"
    assert get("skips").__name__ == "taulearn.nn.skips"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="did you mean 'TimeSteps'"):
        get("TimeStep")


def test_as_good_as_the_last_up_to_a_tolerance() -> None:
    assert within(torch.tensor([0.5, 0.89, 0.9]), True, 0.02) == [False, True, True]
    assert within(torch.tensor([1.2, 1.1, 1.0]), False, 0.11) == [False, True, True]


def test_compilation_is_worth_it_never_as_asked() -> None:
    assert worth_compiling("never", 10**6) == (False, "never (as asked)")
