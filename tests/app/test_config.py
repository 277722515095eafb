"""The settings of a training: what they must be, what they may not be together, and the files they are kept in."""

import pytest
from hypothesis import example, given, strategies as st
from pydantic import ValidationError

from taulearn.app.config import TrainConfig
from taulearn.app.config_checks import contradictions


def test_every_setting_has_a_description_of_one_line():
    for name, info in TrainConfig.model_fields.items():
        assert info.description, name
        assert info.description.endswith("."), name
        assert "\n" not in info.description, name


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().lr = 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"l1": 0.01, "proximal": True, "prune": 0.01, "prune_every": 100},
        {"prune_blocks": 3, "prune_by": 10},
        {"network": "fractional", "gamma": 0.3, "memory_from": 0, "prune": 0.01},
        {"network": "fractional", "hidden_layers": 8, "memory": "fast", "tolerance": 1e-3},
        {"network": "fractional", "hidden_layers": 256, "tolerance": 1e-3},
        {"network": "fractional", "hidden_layers": 300, "memory": "exact"},
        {"hidden_layers": 3, "width": (3, 4, 4), "skips": "learned", "prune": 0.01},
        {"hidden_layers": 3, "constraint": "dependent", "prune": 0.01},
        {"constraint": "dependent", "lower_bound": 0.01, "time_horizon": 1.0},
        {"lower_bound": 0.5, "init": 1.0},
        {"constraint": "simplex", "elastic_net": 0.1},
        {"optimizer": "steepest_descent", "batch_size": "full", "init": "uniform", "network": "fractional"},
    ],
)
def test_sound_combinations_pass(settings):
    assert list(contradictions(TrainConfig(**settings))) == []


settings = st.fixed_dictionaries(
    {},
    optional={
        "data": st.text(min_size=1),
        "width": st.lists(st.integers(1, 2**40), min_size=6, max_size=6) | st.integers(1, 2**40),
        "init": st.floats(0.1, 1e300) | st.lists(st.floats(-1e300, 1e300), min_size=6, max_size=6),
        "lower_bound": st.floats(0, 0.1),
        "l1": st.floats(0, 1e300),
        "prune_every": st.just("epoch"),
        "batch_size": st.integers(1, 2**40) | st.sampled_from(["auto", "full"]),
        "tau_lr": st.none() | st.floats(1e-300, 1e300),
        "seed": st.integers(0, 2**63 - 1),
        "threads": st.none() | st.integers(1, 99),
        "run": st.text(min_size=1),
        "overwrite": st.booleans(),
    },
)


@given(settings)
@example({"data": "~0"})
@example({"data": "~\0/mine.npz"})
def test_round_trip_through_a_file(tmp_path_factory, values):
    config = TrainConfig(**values)
    path = tmp_path_factory.mktemp("round") / "deep.toml"
    config.to_toml(path)
    assert TrainConfig.from_toml(path) == config.model_copy(update={"run": None, "overwrite": False})


def test_fast_memory_begins_where_the_scheme_says():
    from taulearn.app import config_checks
    from taulearn.nn import schemes

    assert (schemes._FAST_FROM, schemes._BLOCKED_FROM) == (config_checks.FAST_FROM, config_checks._BLOCKED_FROM)


def test_where_a_run_lies_is_not_part_of_its_record():
    record = TrainConfig(run="runs/a", overwrite=True, tau_lr=None).record()
    assert not {"run", "overwrite", "tau_lr"} & record.keys()


def test_table_of_a_run_is_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('format = 1\n[config]\nhidden_layers = 3\nwidth = [9, 8, 7]\nlr = 1\n[versions]\ntorch = "2"\n')
    config = TrainConfig.from_toml(path)
    assert (config.widths, config.lr) == ((9, 8, 7), 1.0)


def test_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"deep.toml must be a TOML file"):
        TrainConfig.from_toml(path)


def test_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config must .*got '/'"):
        TrainConfig.from_toml("/")
    (tmp_path / "run.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"it is a folder; did you mean '.*run.toml'\?"):
        TrainConfig.from_toml(tmp_path)
