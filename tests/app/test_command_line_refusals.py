"""Command lines and files of settings that do not do: one line each, with the option's name and the remedy."""

import re
from pathlib import Path

import pytest

from taulearn.app.command_line import main
from taulearn.app.command_line.one_line_errors import check_names
from taulearn.app.command_line.options import UsageError

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = ["--hidden-layers", "2", "--width", "8", "--epochs", "1", "--batch-size", "100"]


@pytest.fixture
def call(capsys, own_folder, monkeypatch):
    """Runs a command in this process; gives its exit code and errors, and checks that it printed nothing else."""
    monkeypatch.setenv("COLUMNS", "60")

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --hidden-layers 0", r"error: --hidden-layers must be >= 1, got 0"),
        ("train --hidden-layers 2.5", r"error: --hidden-layers must be an integer, got '2.5'"),
        ("train --lr fast", r"error: --lr must be a number, got 'fast'"),
        ("train --width 10,x", r"error: --width must be an integer >= 1, or one for each hidden layer"),
        ("train --width 10,20", r"error: --width must be one number or 6 \(--hidden-layers\), got 2"),
        ("train --gamma 1.5", r"error: --gamma must be < 1, got 1.5"),
        ("train --horizon 0", r"error: --horizon must be > 0"),
        ("train --prune 1", r"error: --prune must be < 1"),
        ("train --constraint simplex --lower-bound 0.5", r"error: --lower-bound \* --hidden-layers must not exceed"),
        ("train --network resnt", r"error: --network must be one of .*did you mean 'resnet'\?"),
        ("train --prune 0.1 --network densenet", r"error: --prune must be left out with network 'densenet'"),
        ("train --prune 0.1 --hidden-layers 1", r"error: --prune must be left out with one hidden layer"),
        ("train --config nowhere.toml", r"error: config must be a TOML file, got 'nowhere.toml'"),
        ("train --hiden-layers 3", r"error: unknown option --hiden-layers: did you mean --hidden-layers\?\n$"),
        ("train --lr", r"Missing value for argument '--lr'"),
        ("trian", r"error: unknown command 'trian': did you mean 'train'\?\n$"),
        ("resume", r"error: Missing from taulearn resume: RUN"),
        ("prune a --threshold 0.1 --keep 0", r"error: --threshold and --keep must not be given together"),
        ("prune a --keep 0 --depth 2", r"error: --keep and --depth must not be given together"),
        ("prune a --depth few", r"error: --depth must be a number of layers or auto, got 'few'"),
        ("prune a --tolerance 0.1", r"error: --tolerance must be left out without --depth auto"),
        ("prune a --depth 2 --by-stage", r"error: --by-stage must be left out without --depth auto"),
        ("prune a --keep 0,x", r"error: --keep must name layers by number, got 0, x"),
        ("report", r"error: report needs the folder of a run"),
        ("data fetch", r"error: data fetch needs the name of a data set"),
        ("data list mnist", r"error: data list takes no names"),
    ],
)
def test_line_that_does_not_do_is_refused(call, tmp_path, line, message):
    code, err = call(*line.split())
    assert code == 2
    assert re.search(message, err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --data minst", r"--data must be one of .*did you mean 'mnist'\?"),
        ("train --activation rleu", r"--activation must be one of .*did you mean 'relu'\?"),
        ("train --optimizer adm", r"--optimizer must be one of .*did you mean 'adam'\?"),
        ("train --init 0.5 --constraint simplex", r"--init must sum to horizon"),
        ("resume nowhere", r"run must be a folder with a run.toml, got 'nowhere'"),
        ("prune nowhere", r"run must be a folder with a run.toml, got 'nowhere'"),
        ("report nowhere", r"run must be a folder with a run.toml, got 'nowhere'"),
        ("data verify minst", r"must be one of .*did you mean 'mnist'\?"),
        ("data verify mnist --root .", r"MNIST/raw/train-images-idx3-ubyte.gz is not there"),
    ],
)
def test_failure_is_one_line(call, tmp_path, line, message):
    code, err = call(*line.split())
    assert code == 1
    assert re.fullmatch(rf"taulearn: error: .*{message}.*\n", err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_layers = 3", r"a.toml: unknown setting 'hiden_layers': did you mean 'hidden_layers'\?"),
        ("format = 9\n[config]\n", r"a.toml must have format = 1, got 9"),
        ("lr = ", r"a.toml must be a TOML file"),
        ("width = [1, 2]", r"--width must be one number or 6"),
    ],
)
def test_file_of_settings_that_does_not_do_is_refused(call, tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    code, err = call("train", "--config", "a.toml")
    assert code == 2
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --hiden-layers 3", "unknown option --hiden-layers: did you mean --hidden-layers?"),
        ("train --hiden_layers=3", "unknown option --hiden-layers: did you mean --hidden-layers?"),
        ("train --epoch 3", "unknown option --epoch: did you mean --epochs?"),
        ("train --no-proximl", "unknown option --no-proximl: did you mean --no-proximal?"),
        ("train --zzz", "unknown option --zzz: `taulearn train --help` lists them"),
        ("resume a --lr 3", "unknown option --lr: `taulearn resume --help` lists them"),
        ("report a --oot b", "unknown option --oot: did you mean --out?"),
        ("--nonsense", "unknown option --nonsense: `taulearn --help` lists them"),
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("train --lr", "Missing value for argument '--lr'. Expected 1 values"),
        ("train --tensorboard yes", "unexpected argument yes"),
        ("train 3", "unexpected argument 3"),
        ("data foo", "invalid choice 'foo' for argument 'action'. Expected one of ('list', 'fetch', 'verify')"),
        ("resume", "Missing from taulearn resume: RUN Folder of the run. (required)"),
        ("report a --out .", "--out must be a file, got the folder '.': write for instance --out report.html"),
        ("train --config /", "config must be a TOML file, got '/': it is a folder"),
    ],
)
def test_line_that_is_not_understood_is_answered_in_one(call, tmp_path, line, message):
    """A misspelled option was answered with a box of ten lines."""
    assert call(*line.split()) == (2, f"taulearn: error: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--tau_lr", "--tau-lr", "--tau-lr=0.1", "--no-proximal", "--help"])
def test_options_in_every_spelling_pass(option):
    from taulearn.app.command_line.commands import commands

    check_names(["train", option], commands({}))
    with pytest.raises(UsageError, match="unknown option"):
        check_names(["report", option.replace("help", "hlp")], commands({}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = {a = 1}", r"a.toml: data must be a string, got {'a': 1}"),
        ('tensorboard = "yes"', r"a.toml: tensorboard must be a boolean, got 'yes'"),
        ("data = 2020-01-01", r"a.toml: data must be a string, got datetime.date\(2020, 1, 1\)"),
        (f"epochs = {'9' * 5000}", r"a.toml must be a TOML file: Exceeds the limit .* value has 5000 digits"),
        ("prune = [1]", r"a.toml: prune must be a number, got \[1\]"),
    ],
)
def test_file_of_settings_of_the_wrong_kind_is_answered_in_one_line(call, tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    code, err = call("train", "--config", "a.toml")
    assert code == 2
    assert re.fullmatch(rf"taulearn: error: {message}\n", err)


def test_settings_of_a_file_that_only_contradict_each_other_may_be_mended_by_options(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("hidden_layers = 2\nwidth = [8, 8, 8]\n")
    assert main(["train", "--config", "a.toml", *SMALL, "--run", "b"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "meta"], r"--device must be one that is there, got 'meta' \(it holds no numbers\): .*"),
        (["--device", "mps"], r"--device must be one that is there, got 'mps' .*"),
        (
            ["--width", "10000000"],
            r"--width must be smaller, or --hidden-layers fewer: .*at least [\d.e+]+ GiB.*",
        ),
        (["--run", "/proc/foo"], r"--run must be a folder that can be made and written, got '/proc/foo' .*"),
        (["--run", "file"], r"--run must be a folder, got the file 'file': choose another name"),
        (["--run", "file/a"], r"--run must be a folder that can be made and written, got 'file/a' \(Not a dir.*"),
    ],
)
def test_option_that_asks_for_what_there_is_not_is_named(call, tmp_path, options, message):
    (tmp_path / "file").touch()
    code, err = call("train", *SMALL, *options)
    assert code == 1
    assert re.fullmatch(rf"taulearn: error: {message}\n", err)
    assert [path.name for path in Path().iterdir()] == ["file"]
