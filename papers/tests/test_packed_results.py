"""A suite's results in one file: the same as in the members' folders."""

import numpy as np
import pytest

from taulearn.app.members import Member
from taulearn.app.results import NotMeasured, Results
from taulearn.app.run_members import run_members
from taulearn.experiments import TrainConfig
from taulearn.saving import load_model
from taulearn_papers.herberg2023.published_program import AsPublished
from taulearn_papers.packed_results import pack, results_in, shown_arrays


def member(setting="a", seed=0, hooks=None, **settings):
    config = TrainConfig(**{"width": 8, "hidden_layers": 2, "epochs": 1, "seed": seed, **settings})
    return Member(setting, seed, config, hooks=hooks)


def measured(folder):
    return {"one": 1}


def test_packed_results_are_the_same_results(tmp_path):
    run_members(
        [
            member(prune=0.4, hidden_layers=4, l1=0.1, lr=0.1, epochs=3),
            member("c", hooks=AsPublished(), hidden_layers=4, constraint="fixed"),
            Member("b", 0, None, measured),
        ],
        tmp_path / "out",
        engine="serial",
    )
    folder = Results(tmp_path / "out")
    pack(folder, tmp_path / "records.npz")
    packed = results_in(tmp_path / "records.npz")
    assert packed.settings == folder.settings == ["a", "b", "c"]
    ours, theirs = folder.history("a", 0), packed.history("a", 0)
    assert ours.deletions == theirs.deletions != []
    for mine, other in ((ours.iterations, theirs.iterations), (ours.epochs, theirs.epochs)):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])
    assert packed.config("a", 0) == folder.config("a", 0)
    assert packed.options("c", 0) == folder.options("c", 0)
    assert packed.options("c", 0)["as_published"] is True
    assert packed.measurements("b", 0) == folder.measurements("b", 0)
    pack(packed, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "records.npz").read_bytes()


def test_columns_that_are_not_asked_for_are_not_kept(tmp_path):
    run_members([member(refine=4, epochs=2)], tmp_path / "out", engine="serial")
    pack(Results(tmp_path / "out"), tmp_path / "records.npz", columns=("epoch/*loss", "insertion/*"))
    whole, kept = Results(tmp_path / "out").history("a", 0), results_in(tmp_path / "records.npz").history("a", 0)
    assert not kept.iterations
    assert set(kept.epochs) == {"train.loss", "validation.loss"}
    np.testing.assert_array_equal(kept.epochs["train.loss"], whole.epochs["train.loss"])
    assert kept.insertions == whole.insertions != []


def test_what_a_figure_shows_besides_records_is_kept(tmp_path):
    run_members([member()], tmp_path / "out", engine="serial")
    folder = Results(tmp_path / "out")

    def weights(results):
        model = load_model(results.folder("a", 0))
        return {"head": model.head.weight.detach().numpy(), "tau": np.array(model.time_steps.tau.tolist())}

    pack(folder, tmp_path / "records.npz", {"1": weights, "2": lambda results: {"none": results.folder("b", 0)}})
    packed = results_in(tmp_path / "records.npz")
    found, again = shown_arrays(folder, "1", weights), shown_arrays(packed, "1", weights)
    assert found.keys() == again.keys() == {"head", "tau"}
    np.testing.assert_allclose(found["head"], weights(folder)["head"], rtol=1e-3, atol=1e-7)
    for name, array in found.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(NotMeasured, match="figure 2 shows more than records"):
        shown_arrays(packed, "2", weights)
    pack(packed, tmp_path / "again.npz", {"1": weights})
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "records.npz").read_bytes()


def test_damaged_pack_is_refused(tmp_path):
    (tmp_path / "records.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged file"):
        results_in(tmp_path / "records.npz")
