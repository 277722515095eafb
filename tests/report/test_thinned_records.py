"""Records thinned on disk are drawn at the iterations that they belong to."""

import numpy as np
import pytest

from taulearn.report import figures
from taulearn.report.charts import loss_curves
from taulearn.report.records import count_iterations, tau_lines
from taulearn.training.thinned_records import thinned


@pytest.fixture
def both(make):
    whole = make(epochs=20, per_epoch=600)
    return whole, thinned(whole)


def test_steps_lie_on_the_lines_of_the_whole_record(both):
    whole, small = both
    for line, all_ in zip(tau_lines(small)[0], whole.iterations["tau"].T, strict=True):
        np.testing.assert_array_equal(line.y, all_[line.x - 1])
        known = np.flatnonzero(np.isfinite(all_))
        assert (line.x[0], line.x[-1]) == (known[0] + 1, known[-1] + 1)


def test_losses_lie_on_the_lines_of_the_whole_record(both):
    whole, small = both
    drawn = figures.losses(small, by="iteration", total=False).lines[0]
    x, y = np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())
    np.testing.assert_array_equal(y, whole.iterations["loss"][x - 1])
    assert x[-1] == 12_000
    single = [trace for trace in loss_curves(small).data if trace["meta"].get("variant") == "batch"]
    for trace in single:
        assert trace["x"][-1] == 12_000


def test_number_of_iterations_is_that_of_the_run(both):
    whole, small = both
    assert count_iterations(small) == count_iterations(whole) == 12_000
    assert len(small.iterations["loss"]) < 2300
