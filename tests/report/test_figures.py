import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from taulearn.report import figures
from taulearn.report.records import running_mean, tau_lines, thin
from taulearn.training.history import Deletion, History, Insertion

NAN = float("nan")


def lines_by_label(ax):
    return {line.get_label(): line for line in ax.lines}


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_tau_lines_are_labelled_by_starting_number_and_end_at_the_deletion(record):
    ax = figures.tau_trajectories(record)
    lines = lines_by_label(ax)
    assert ax.get_xscale() == "log"
    assert legend_texts(ax)[:6] == [rf"$\tau^{{[{layer}]}}$" for layer in range(6)]
    for gone in record.deletions:
        x, y = lines[rf"$\tau^{{[{gone.layer}]}}$"].get_data()
        assert x[-1] == gone.iteration
        assert y[-1] == record.iterations["tau"][gone.iteration - 1, gone.layer]
    assert lines[r"$\tau^{[0]}$"].get_xdata()[-1] == 12000


def test_deletions_are_marked_where_the_lines_end(record):
    ax = figures.tau_trajectories(record)
    (marks,) = ax.collections
    ends = [(gone.iteration, record.iterations["tau"][gone.iteration - 1, gone.layer]) for gone in record.deletions]
    np.testing.assert_allclose(marks.get_offsets(), ends)
    assert "deleted" in legend_texts(ax)


def refined():
    """Layer 2 is split off layer 0 after iteration 2, and layer 1 goes after iteration 3."""
    tau = np.array([[0.5, 1.0, NAN], [0.5, 1.0, NAN], [0.25, 1.0, 0.25], [0.3, NAN, 0.2]])
    births, deaths = [Insertion(2, 1, 2, 0, 0.25, 7)], [Deletion(3, 1, 1, 0.01, 7)]
    return History({"loss": np.ones(4), "tau": tau}, {}, deaths, births)


def test_a_new_layer_begins_at_its_parent():
    ax = figures.tau_trajectories(refined())
    lines = lines_by_label(ax)
    assert lines[r"$\tau^{[2]}$"].get_xdata().tolist() == [3, 4]
    (link,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert link.get_xydata().tolist() == [[2, 0.5], [3, 0.25]]
    assert "new" in legend_texts(ax)


def test_the_time_grid_has_the_sums_of_the_steps_in_the_order_of_the_network():
    lines = [line.get_xydata().tolist() for line in figures.time_grid(refined()).lines]
    assert lines[0] == [[1, 0.5], [2, 0.5], [3, 0.25], [4, 0.3]]
    assert lines[1] == [[1, 1.5], [2, 1.5], [3, 1.5]]
    assert lines[2] == [[3, 0.5], [4, 0.5]], "right behind layer 0"


def test_no_marks_without_deletions(make):
    ax = figures.tau_trajectories(make(deletions=()))
    assert len(ax.collections) == 0
    assert "deleted" not in legend_texts(ax)


def test_sum_counts_the_layers_that_are_left(record):
    sum_line = figures.tau_trajectories(record).lines[-1]
    assert sum_line.get_linestyle() == "--"
    x, y = sum_line.get_data()
    np.testing.assert_allclose(y, np.nansum(record.iterations["tau"][x - 1], axis=1))
    assert len(figures.tau_trajectories(record, show_sum=False).lines) == 6


def test_raw_values_where_recorded_else_the_effective_ones(make):
    record = make(raw=True, deletions=())
    effective, raw = (figures.tau_trajectories(record, raw=raw).lines[0].get_ydata() for raw in (False, True))
    np.testing.assert_allclose(raw, effective - 0.3)
    plain = make(deletions=())
    np.testing.assert_array_equal(figures.tau_trajectories(plain, raw=True).lines[0].get_ydata(), effective)


def test_a_layer_deleted_before_the_first_iteration_has_no_line_and_no_mark(make):
    record = make(deletions=((5, 0), (4, 600)))
    ax = figures.tau_trajectories(record)
    assert len(lines_by_label(ax)[r"$\tau^{[5]}$"].get_xdata()) == 0
    assert len(ax.collections[0].get_offsets()) == 1


def test_a_long_trace_is_thinned_but_keeps_early_iterations_and_both_sides_of_a_deletion():
    tau = np.ones((1_000_000, 2), dtype=np.float32)
    tau[765_432:, 1] = np.nan
    (first, second), total = tau_lines(History({"tau": tau}))
    assert 1000 < len(first.x) <= 2004
    assert first.x[:50].tolist() == list(range(1, 51))
    assert {765_432, 765_433, 1_000_000} <= set(first.x.tolist())
    assert second.x[-1] == 765_432
    assert total.y[total.x == 765_432] == 2
    assert total.y[total.x == 765_433] == 1


@pytest.mark.parametrize("count", [0, 1, 3, 1999, 2000, 2001, 12_345])
def test_thinning_keeps_order_ends_and_limit(count):
    rows = thin(count, 2000)
    assert len(rows) <= min(count, 2000)
    assert (np.diff(rows) > 0).all()
    assert rows.size == 0 or (rows[0], rows[-1]) == (0, count - 1)


def test_running_mean_is_the_mean_of_the_window_and_passes_over_nan():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.inf])
    np.testing.assert_allclose(running_mean(values, 2), [1, 2, 3, 5, 5])


def test_many_layers_keep_their_labels_and_a_short_legend(make):
    ax = figures.tau_trajectories(make(layers=40, deletions=((20, 600),)))
    assert [line.get_label() for line in ax.lines[:40]] == [rf"$\tau^{{[{layer}]}}$" for layer in range(40)]
    texts = legend_texts(ax)
    assert len(texts) == figures.LEGEND_LIMIT + 2
    assert r"$\tau^{[39]}$" in texts


def test_losses_of_several_runs_carry_their_names_also_odd_ones(make_run, make):
    runs = [make_run("a $x_{$ & <b>"), make_run("_hidden", make(seed=1))]
    ax = figures.losses(runs, validation=True)
    ax.figure.canvas.draw()
    names = [r"a \$x_{\$ & <b>", "_hidden"]
    assert legend_texts(ax) == [*names, "data loss", "total with penalties", "validation loss"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", ":"] * 2
    np.testing.assert_allclose(ax.lines[0].get_ydata(), runs[0].history.epochs["train.loss"][1:])
    assert ax.lines[0].get_xdata()[0] == 1


def test_losses_per_iteration_are_smoothed_over_the_window(record):
    ax = figures.losses(record, by="iteration", smooth=50, total=False)
    x, y = ax.lines[0].get_data()
    row = np.flatnonzero(x == 12000)[0]
    assert y[row] == pytest.approx(record.iterations["loss"][-50:].mean())


def test_total_is_left_out_without_penalties(make):
    record = make()
    bare = History({name: record.iterations[name] for name in ("loss", "total", "tau")}, record.epochs)
    assert len(figures.losses({"bare": bare}).lines) == 1


def test_a_loss_that_is_not_positive_keeps_a_linear_axis():
    record = History({"loss": np.array([1.0, -1.0])}, {})
    assert figures.losses(record, by="iteration").get_yscale() == "linear"


def test_accuracy_over_epochs(make_run):
    run = make_run("free")
    line = figures.accuracy([run, run]).lines[1]
    assert line.get_label() == "free (2)"
    np.testing.assert_array_equal(line.get_ydata(), run.history.epochs["validation.accuracy"])


def test_accuracy_names_the_run_that_has_none(make_run, record):
    bare = History(record.iterations, {"layers": np.array([6])})
    with pytest.raises(ValueError, match="validation accuracy, got 'bare' without"):
        figures.accuracy([make_run("full"), make_run("bare", bare)])


def test_layers_and_parameters(record):
    ax = figures.layers_and_parameters(record)
    right = next(axes for axes in ax.figure.axes if axes is not ax)
    assert ax.lines[0].get_ydata()[-1] == 3
    assert right.lines[0].get_ydata()[[0, -1]].tolist() == [130006, 99703]
    assert ax.get_ylim()[0] == right.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "draw", [figures.tau_trajectories, figures.losses, figures.accuracy, figures.layers_and_parameters]
)
def test_draws_into_the_axes_given(draw, record, tmp_path):
    given = Figure().subplots()
    assert draw(record, ax=given) is given
    given.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_drawing_leaves_pyplot_and_importing_leaves_matplotlib_and_plotly_alone():
    code = (
        "import sys, numpy as np\n"
        "import taulearn.report as report\n"
        "assert not {'matplotlib', 'plotly'} & set(sys.modules)\n"
        "from taulearn.training.history import History\n"
        "report.figures.tau_trajectories(History({'tau': np.ones((3, 2))}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
