"""The command line as a user meets it: what it prints, what it leaves, and how it ends."""

import re
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import taulearn
from taulearn.app.config import TrainConfig
from taulearn.saving import load_model

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = ["--hidden-layers", "4", "--width", "8", "--epochs", "1", "--batch-size", "100"]
STEPS = ["--init", "0.5,0.2,0.2,0.05", "--prune", "0.1"]


@pytest.fixture
def trained(call):
    assert call("train", *SMALL, *STEPS, "--run", "runs/a")[0] == 0
    return "runs/a"


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_help_and_refusals_come_without_torch():
    program = """
import contextlib, io, sys
from taulearn.app.command_line import main
lines = ["--help", "--version", "train --help", "resume --help", "prune --help", "report --help", "data --help",
         "train --prune 2", "train --network resnt", "train --config nowhere.toml", "train --nonsense", "data fetch"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(line.split()) for line in lines]
print(codes, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == f"{[0] * 7 + [2] * 5} False\n"


@pytest.mark.long
def test_processes_train_one_network_and_go_on(call):
    """What two processes leave is what one leaves, up to rounding; each says nothing but the first."""
    code = "from taulearn.app.command_line import main; import sys; sys.exit(main(sys.argv[1:]))"
    runs = [["train", *SMALL, *STEPS, "--processes", "2", "--run", "two"], ["resume", "two", "--epochs", "2"]]
    for arguments in (*runs, ["train", *SMALL, *STEPS, "--epochs", "2", "--run", "one"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1
    assert tomllib.loads(Path("two/run.toml").read_text())["decisions"]["processes"] == "2"
    two, one = (load_model(run).state_dict() for run in ("two", "one"))
    for name, value in one.items():
        assert (two[name] - value).abs().max() < 1e-5, name


@pytest.mark.long
def test_processes_end_alike(call):
    """The first error is the exit code; no traceback of torch's launcher follows."""
    code = "from taulearn.app.command_line import main; import sys; sys.exit(main(sys.argv[1:]))"
    line = ["train", *SMALL, "--batch-size", "101", "--processes", "2", "--run", "two"]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--batch-size must be a multiple of the number of processes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_number_of_processes_that_is_none(call):
    assert call("train", "--processes", "0") == (2, "", "taulearn: error: --processes must be an integer >= 1, got 0\n")


def test_version(call):
    assert call("--version") == (0, f"taulearn {taulearn.__version__}\n", "")


def test_help_describes_every_option_of_train(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    for name in TrainConfig.model_fields:
        assert re.search(rf"--{name.replace('_', '-')}\b", out), name
    assert "(default: 0.01)" in out
    assert "None" not in out


def test_no_command_shows_the_commands(call):
    code, out, _ = call()
    assert code == 0
    assert re.findall(r"• (\w+)", out) == ["train", "resume", "prune", "report", "export", "reproduce", "sweep", "data"]


def test_train_tells_what_it_did(call):
    code, out, err = call("train", *SMALL, *STEPS)
    folder = re.search(r"run: (runs/digits-resnet-\d{4}-\d\d-\d\d-1)\n", out)[1]
    assert (code, err) == (0, "")
    assert out.startswith("resnet on digits, 4 hidden layers of width 8")
    assert re.search(r"deleted layer 3 \(share 0\.\d+\): 4 -> 3 layers", out)
    assert re.search(r"\ntest accuracy +0\.\d{4}\ntest loss +\d", out)
    assert re.search(r"\nlayers +4 -> 3\nparameters +820 -> 747\ntraining time +\d+\.\d s\n", out)
    assert out.endswith(f"report         {folder}/report.html\n")
    files = {"run.toml", "history.safetensors", "model.safetensors", "model.json", "report.html", "checkpoint"}
    assert files <= names_in(folder)


def test_file_of_a_run_reproduces_it(call, trained):
    assert call("train", "--config", f"{trained}/run.toml", "--run", "runs/b")[0] == 0
    assert weights("runs/b") == weights(trained)
    texts = [Path(folder, "run.toml").read_text() for folder in (trained, "runs/b")]
    assert texts[0] == texts[1]


def test_options_override_the_file(call, tmp_path):
    (tmp_path / "a.toml").write_text("hidden_layers = 2\nwidth = [8, 4]\ngamma = 0.3\nepochs = 1\nprune = 0.1\n")
    options = ["--network", "fractional", "--width", "5", "--prune", "none", "--run", "runs/a"]
    assert call("train", "--config", "a.toml", *options)[0] == 0
    config = tomllib.loads((tmp_path / "runs/a/run.toml").read_text())["config"]
    assert (config["hidden_layers"], config["gamma"], config["width"]) == (2, 0.3, 5)
    assert "prune" not in config


def test_lists_are_separated_by_commas_or_spaces(call, tmp_path):
    common = ["train", "--epochs", "1", "--hidden-layers", "2"]
    assert call(*common, "--width", "5,4", "--init=-0.5,0.25", "--run", "a")[0] == 0
    assert call(*common, "--width", "5", "4", "--init", "-0.5", "0.25", "--run", "b")[0] == 0
    assert weights("a") == weights("b")


def test_diverged_training_says_so_in_one_line(call):
    code, _, err = call("train", *SMALL, "--lr", "1e30", "--run", "a")
    assert code == 1
    assert re.fullmatch(r"taulearn: error: .*not finite.*\n", err)
    assert all(option in err for option in ("(--lr, --tau-lr)", "(--clip-norm)", "--lower-bound, --time-horizon)"))
    assert "penalties." not in err


def test_run_that_exists_is_kept_unless_told(call, trained, tmp_path):
    before = weights(trained)
    code, _, err = call("train", *SMALL, "--seed", "1", "--run", trained)
    assert (code, weights(trained)) == (1, before)
    assert "--overwrite" in err
    assert call("train", *SMALL, "--seed", "1", "--run", trained, "--overwrite")[0] == 0
    assert weights(trained) != before
    (tmp_path / "file").write_text("")
    assert re.search(r"run must be a folder, got the file 'file'", call("train", *SMALL, "--run", "file")[2])


def test_interrupted_run_says_how_to_go_on_and_goes_on(call, tmp_path):
    options = ["--hidden-layers", "2", "--width", "8", "--epochs", "20", "--threads", "1"]
    command = [sys.executable, "-m", "taulearn", "train", *options, "--run", "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch  2/20"):
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == "taulearn: interrupted: go on with `taulearn resume a`\n"
    code, out, _ = call("resume", "a")
    assert code == 0
    assert re.match(r"\d+ of 20 epochs are done\n", out)
    assert "report         a/report.html" in out
    assert call("resume", "a")[1].startswith("20 of 20 epochs are done\n")


def test_interruption_after_training_can_be_resumed(call, monkeypatch):
    import taulearn.app.train as training

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_html", interrupt)
        code, _, err = call("train", *SMALL, "--run", "a")
    assert (code, err) == (130, "taulearn: interrupted: go on with `taulearn resume a`\n")
    assert call("resume", "a")[0] == 0
    assert "report.html" in names_in("a")


def test_interruption_before_training_leaves_nothing(call, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(taulearn.app.build, "load_splits", interrupt)
    assert call("train") == (130, "", "taulearn: interrupted\n")
    assert not names_in(tmp_path)


def test_damaged_checkpoint_is_named_in_a_warning(call, tmp_path):
    assert call("train", *SMALL, "--epochs", "2", "--run", "a")[0] == 0
    newest = max((tmp_path / "a" / "checkpoint").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    before = weights("a")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = call("resume", "a")
    assert (code, weights("a")) == (0, before)
    assert re.fullmatch(rf"taulearn: warning: .*{newest.name}.*\n", err)


def test_damaged_record_is_no_obstacle_to_resuming(call, trained):
    record = Path(trained, "history.safetensors")
    whole = record.read_bytes()
    record.write_bytes(whole[:-9])
    assert call("resume", trained)[0] == 0
    assert record.read_bytes() == whole


@pytest.mark.parametrize("debug", [False, True])
def test_fault_of_ours_shows_where_on_request(call, monkeypatch, debug):
    def fail(*_, **__):
        raise KeyError("gone")

    monkeypatch.setattr("taulearn.app.train.train", fail)
    if debug:
        monkeypatch.setenv("TAULEARN_DEBUG", "1")
        with pytest.raises(KeyError, match="gone"):
            call("train")
    else:
        assert call("train") == (1, "", "taulearn: error: KeyError: 'gone' (TAULEARN_DEBUG=1 shows where)\n")


def test_prune_compares_and_saves_beside_the_run(call, trained):
    before = weights(trained)
    code, out, _ = call("prune", trained, "--keep", "0,2")
    assert code == 0
    assert re.match(r"deleted layer 1 \(share 0\.\d+\): 3 -> 2 layers, 747 -> 674 parameters\n", out)
    assert re.search(r"test accuracy +0\.\d{4} -> 0\.\d{4}\ntest loss +\S+ -> \S+\nnetwork +runs/a/pruned\n$", out)
    assert load_model("runs/a/pruned").time_steps.origin == (0, 2)
    assert weights(trained) == before


@pytest.mark.parametrize("depth", [["1"], ["auto", "--tolerance", "0.99"]], ids=str)
def test_prune_cuts_after_a_depth(call, trained, depth):
    code, out, _ = call("prune", trained, "--depth", *depth)
    assert code == 0
    if depth[0] == "auto":
        assert re.match(
            r"depth +loss +accuracy +parameters +ms +distance +last layer +contribution +relative\n-+\n +1 ", out
        )
        assert re.search(r"the first layer of 3: accuracy \S+ -> \S+ \(test data: this set has no validation", out)
    assert re.search(r"deleted layers 2, 1 \(shares 0\.\d+, 0\.\d+\): 3 -> 1 layers, 747 -> 601 parameters\n", out)
    assert re.search(r"test accuracy +0\.\d{4} -> 0\.\d{4}\ntest loss +\S+ -> \S+\nnetwork +runs/a/pruned\n$", out)
    assert load_model("runs/a/pruned").time_steps.origin == (0,)


def test_prune_that_finds_nothing_says_what_would_go(call, trained):
    code, out, _ = call("prune", trained, "--threshold", "0.001")
    assert code == 0
    assert re.search(r"no layer deleted: 3 layers.*\nlayer [12] has the smallest share, 0\.\d+: a larger --thr", out)
    assert "pruned" not in names_in(trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0,3"], r"keep must name layers out of 0, 1, 2, which are there, got \[0, 3\]"),
        (["--keep", "1"], r"keep must contain layer 0"),
        (["--depth", "4"], r"depth must be at most 3, the number of layers, got 4"),
        (["--depth", "auto", "--tolerance", "-1"], r"tolerance must be a finite number >= 0, got -1"),
        (["--threshold", "1.5"], r"threshold must lie in \(0, 1\), got 1.5"),
        (["--out", "runs/a"], r"out must not be the folder of a run, got 'runs/a'"),
        (["--out", "runs"], r"out must be a new folder, got 'runs'.*--overwrite"),
    ],
)
def test_prune_refuses(call, trained, options, message):
    code, out, err = call("prune", trained, *options)
    assert (code, out) == (1, "")
    assert re.search(message, err)


def test_report_of_one_run_and_of_several(call, trained):
    assert call("train", *SMALL, "--run", "runs/b")[0] == 0
    Path("runs/a/report.html").unlink()
    assert call("report", trained) == (0, "report: runs/a/report.html\n", "")
    assert call("report", trained, "runs/b") == (0, "report: comparison.html\n", "")
    assert "2 runs compared" in Path("comparison.html").read_text()
    assert call("report", trained, "--out", "c.html") == (0, "report: c.html\n", "")
    code, _, err = call("report", trained, "--out", "no/where.html")
    assert code == 1
    assert "make 'no' first" in err


def test_data_lists_fetches_and_verifies(call, real_data_root):
    code, out, _ = call("data", "list", "--root", real_data_root)
    assert code == 0
    assert out == call("data", "--root", real_data_root)[1]
    lines = out.splitlines()
    assert lines[0].split() == ["name", "kind", "samples", "input", "classes", "location"]
    assert re.fullmatch(r"mnist +images +60,000 train, 10,000 test +1 x 28 x 28 +10 +/.*/MNIST/raw", lines[2])
    for action in ("fetch", "verify"):
        code, out, _ = call("data", action, "fashion-mnist", "digits", "--root", real_data_root)
        assert code == 0
        assert re.fullmatch(r"fashion-mnist: 4 files in /.* are in order\ndigits: built in, there is no file\n", out)
