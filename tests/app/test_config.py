"""The settings of a training: what they must be, what they may not be together, and the files they are kept in."""

import re

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from taulearn.app.config import TrainConfig, explain
from taulearn.app.config_checks import contradictions


def refusal(**settings):
    with pytest.raises(ValidationError) as caught:
        TrainConfig(**settings)
    return explain(caught.value)


def test_every_setting_has_a_description_of_one_line():
    for name, info in TrainConfig.model_fields.items():
        assert info.description, name
        assert info.description.endswith("."), name
        assert "\n" not in info.description, name


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().lr = 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_layers": 0}, r"^hidden_layers must be >= 1, got 0$"),
        ({"hidden_layers": "6"}, r"^hidden_layers must be an integer, got '6'$"),
        ({"hidden_layers": True}, r"^hidden_layers must be an integer, got True$"),
        ({"hidden_layers": 6.0}, r"^hidden_layers must be an integer, got 6.0$"),
        ({"width": 0}, r"^width must be an integer >= 1, or one for each hidden layer, got 0$"),
        ({"width": [10, 0.5]}, r"^width must be an integer >= 1, or one for each hidden layer, got \[10, 0.5\]$"),
        ({"width": []}, r"^width must be"),
        ({"init": "x"}, r"^init must be 'uniform', a finite number, or one for each hidden layer, got 'x'$"),
        ({"init": [0.1, float("nan")]}, r"^init must be 'uniform', a finite number"),
        ({"horizon": 0}, r"^horizon must be > 0, got 0$"),
        ({"lower_bound": -0.1}, r"^lower_bound must be >= 0, got -0.1$"),
        ({"gamma": 1}, r"^gamma must be < 1, got 1$"),
        ({"memory_from": 2}, r"^memory_from must be <= 1, got 2$"),
        ({"l1": float("inf")}, r"^l1 must be a finite number, got inf$"),
        ({"prune": 1.0}, r"^prune must be < 1, got 1.0$"),
        ({"prune": 0.0}, r"^prune must be > 0, got 0.0$"),
        ({"prune": 0.1, "prune_every": 0}, r"^prune_every must be 'epoch' or a number of iterations >= 1, got 0$"),
        ({"batch_size": "all"}, r"^batch_size must be 'auto', 'full' or an integer >= 1, got 'all'$"),
        ({"lr": 0.0}, r"^lr must be > 0, got 0.0$"),
        ({"proximal": 1}, r"^proximal must be a boolean, got 1$"),
        ({"run": ""}, r"^run must have at least 1 character, got ''$"),
        ({"network": "resnt"}, r"^network must be one of .*, got 'resnt': did you mean 'resnet'\?$"),
        ({"constraint": "simplx"}, r"did you mean 'simplex'\?$"),
        ({"hiden_layers": 3}, r"^unknown setting 'hiden_layers': did you mean 'hidden_layers'\?$"),
        ({"zzz": 3}, r"^unknown setting 'zzz': `taulearn train --help` lists them$"),
    ],
)
def test_setting_out_of_range_is_named_with_what_it_must_be(settings, message):
    assert re.search(message, refusal(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": (10, 20)}, r"^width must be one number or 6 \(hidden_layers\), got 2"),
        ({"init": (0.1, 0.2)}, r"^init must be one number or 6 \(hidden_layers\), got 2"),
        ({"constraint": "dependent", "hidden_layers": 1}, r"^constraint must not be 'dependent' with one hidden layer"),
        ({"constraint": "simplex", "lower_bound": 0.5}, r"^lower_bound \* hidden_layers must not exceed horizon"),
        ({"constraint": "dependent", "lower_bound": 0.5}, r"^lower_bound \* hidden_layers must not exceed horizon"),
        ({"lower_bound": 0.5}, r"^lower_bound must not exceed horizon / hidden_layers = 0.1667"),
        ({"network": "fractional", "lower_bound": 0.0}, r"^lower_bound must be positive with network 'fractional'"),
        ({"accumulate": 20, "batch_size": 10}, r"^accumulate must not exceed batch_size = 10, got 20"),
        ({"proximal": True}, r"^proximal must be left out without l1"),
        ({"prune_every": 100}, r"^prune_every must be left out without prune"),
        ({"prune_by": 3}, r"^prune_by must be left out without prune_blocks"),
        ({"prune_blocks": 0}, r"^prune_blocks must be >= 1, got 0$"),
        ({"prune_blocks": 6}, r"^prune_blocks must be less than the 6 layers that there are \(hidden_layers\), got 6"),
        ({"prune_blocks": 3, "prune": 0.01}, r"^prune must be left out with prune_blocks"),
        ({"prune_blocks": 3, "l1": 0.01}, r"^l1 must be left out with prune_blocks"),
        ({"prune_blocks": 3, "prune_by": 21}, r"^prune_by must be at most epochs = 20, got 21"),
        ({"prune_blocks": 3, "network": "densenet"}, r"^prune_blocks must be left out with network 'densenet'"),
        ({"gamma": 0.3}, r"^gamma must be left out with network 'resnet'"),
        ({"network": "densenet", "memory_from": 0}, r"^memory_from must be left out with network 'densenet'"),
        ({"init": "uniform", "constraint": "simplex"}, r"^init must not be 'uniform' with constraint 'simplex'"),
        ({"init": "uniform", "lower_bound": 1.0}, r"^init must not be 'uniform', in \(0, 1\), with lower_bound = 1.0"),
        ({"optimizer": "steepest_descent", "clip_norm": 1.0}, r"^clip_norm must be left out with .*'steepest_descent'"),
        ({"optimizer": "lbfgs", "clip_norm": 1.0}, r"^clip_norm must be left out with optimizer 'lbfgs'"),
        ({"optimizer": "steepest_descent", "scheduler": "step"}, r"^scheduler must be left out with optimizer 'steep"),
        ({"skips": "learned"}, r"^skips must be left out where all hidden layers have one width"),
        (
            {"skips": "learned", "network": "feedforward", "hidden_layers": 2, "width": (3, 4)},
            r"^skips must be left out with network 'feedforward'",
        ),
        *(
            ({"constraint": "fixed", name: 0.01}, rf"^{name} must be left out with constraint 'fixed'")
            for name in ("l1", "elastic_net", "time_horizon", "tau_lr", "prune")
        ),
        ({"constraint": "simplex", "l1": 0.01}, r"^l1 must be left out with constraint 'simplex'"),
        ({"constraint": "simplex", "time_horizon": 1.0}, r"^time_horizon must be left out with constraint 'simplex'"),
        ({"constraint": "dependent", "time_horizon": 1.0}, r"^time_horizon must be left out with constraint 'depend"),
        ({"memory": "fast"}, r"^memory must be left out with network 'resnet'; it belongs to 'fractional'"),
        ({"tolerance": 1e-3}, r"^tolerance must be left out with network 'resnet'"),
        ({"network": "fractional", "memory": "fast"}, r"^memory must be left out where .* fewer than 8 hidden_layers"),
        (
            {"network": "fractional", "hidden_layers": 8, "width": (4,) * 7 + (3,), "memory": "fast"},
            r"^memory must be left out where the width changes",
        ),
        (
            {"network": "fractional", "hidden_layers": 255, "tolerance": 1e-3},
            r"^tolerance must be left out where the memory is exact \(memory = 'auto', 255 hidden_layers\)",
        ),
        (
            {"network": "fractional", "hidden_layers": 300, "memory": "exact", "tolerance": 1e-3},
            r"^tolerance must be left out where the memory is exact \(memory = 'exact'",
        ),
        (
            {"network": "fractional", "hidden_layers": 9, "memory": "fast", "compile": "always"},
            r"^compile must not be 'always' with memory 'fast'",
        ),
        ({"network": "densenet", "prune": 0.01}, r"^prune must be left out with network 'densenet'.*'resnet'"),
        ({"network": "feedforward", "prune": 0.01}, r"^prune must be left out with network 'feedforward'"),
        ({"hidden_layers": 1, "prune": 0.01}, r"^prune must be left out with one hidden layer"),
        ({"hidden_layers": 2, "width": (3, 4), "prune": 0.01}, r"no layer could be deleted.*change the width"),
        ({"hidden_layers": 2, "constraint": "dependent", "prune": 0.01}, r"no layer could be deleted.*dependent step"),
    ],
)
def test_contradiction_is_refused_with_its_reason(settings, message):
    assert re.search(message, refusal(**settings))


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_layers = 3", r"deep.toml: unknown setting 'hiden_layers': did you mean 'hidden_layers'\?"),
        ("[config]\nhidden-layers = 3", r"unknown setting 'hidden-layers': did you mean 'hidden_layers'\?"),
        ("lr = '0.1'", r"deep.toml: lr must be a number, got '0.1'"),
        ("format = 2\n[config]\nlr = 0.1", r"deep.toml must have format = 1, got 2"),
        ("lr = ", r"deep.toml must be a TOML file: Invalid value"),
        ("data = {a = 1}", r"deep.toml: data must be a string, got {'a': 1}"),
        ("tensorboard = 'yes'", r"deep.toml: tensorboard must be a boolean, got 'yes'"),
        ("compile = true", r"deep.toml: compile must be one of 'always', 'auto', 'never', got True"),
        (f"epochs = {'9' * 5000}", r"deep.toml must be a TOML file: Exceeds the limit \(4300 digits\)"),
        (f"epochs = -{'9' * 4000}", r"epochs must be >= 1, got -9{199}\.\.\. \(4001 characters\)$"),
        (f"lr = 0x{'f' * 5000}", r"deep.toml: lr must be a number, got an integer of thousands of digits$"),
        (f"init = {'9' * 400}", r"deep.toml: init must be 'uniform', a finite number"),
        (f"compile = 0x{'f' * 5000}", r"compile must be one of .* got 'an integer of thousands of digits'"),
        (f"width = {'[' * 5000}", r"deep.toml must be a TOML file: maximum recursion depth exceeded"),
        ("hidden_layers = 10000000", r"hidden_layers must be <= 100000, got 10000000"),
        ("config = 3", r"deep.toml must have config as a table of settings, got 3"),
        ("constraint = 'fixed'\nl1 = 0.1", r"deep.toml: l1 must be left out with constraint 'fixed'"),
    ],
)
def test_file_that_will_not_do_is_named(tmp_path, text, message):
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_toml(path)


def test_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"deep.toml must be a TOML file"):
        TrainConfig.from_toml(path)


def test_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config must be a TOML file, got '/': it is a folder$"):
        TrainConfig.from_toml("/")
    (tmp_path / "run.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"it is a folder; did you mean '.*run.toml'\?"):
        TrainConfig.from_toml(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config must be a TOML file, got '.*deep.toml'"):
        TrainConfig.from_toml(tmp_path / "deep.toml")
