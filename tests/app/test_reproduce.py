"""Suites and engines of other distributions, which entry points name."""

import importlib.metadata
import warnings

import pytest

from taulearn.app.command_line import main
from taulearn.app.command_line.reproduce import installed_suites
from taulearn.app.run_members import engine_named, run_one_by_one


class Suite:
    """One that tells what it was asked."""

    def __init__(self):
        self.asked = []

    def reproduce(self, options):
        self.asked.append(options)


SUITE, OTHER, NO_SUITE = Suite(), Suite(), object()


@pytest.fixture
def installed(monkeypatch):
    """Put entry points in the place of those that are installed."""

    def put(group, **values):
        points = [importlib.metadata.EntryPoint(name, value, group) for name, value in values.items()]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda **wanted: points if wanted == {"group": group} else []
        )

    return put


def of(name):
    return f"{__name__}:{name}"


def test_without_a_suite_one_line_says_what_to_install(installed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed("taulearn.suites")
    assert main(["reproduce", "herberg2023", "--quick"]) == 2
    err = capsys.readouterr().err
    assert "pip install taulearn-papers" in err
    assert "pip install ./papers" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_suite_that_is_not_installed_is_told_from_those_that_are(installed, capsys):
    installed("taulearn.suites", one=of("SUITE"), two=of("OTHER"))
    assert main(["reproduce", "herberg2023"]) == 2
    err = capsys.readouterr().err
    assert "'one', 'two'" in err
    assert "pip install taulearn-papers" in err


def test_suite_gets_the_options(installed):
    installed("taulearn.suites", one=of("SUITE"), two=of("OTHER"))
    assert main(["reproduce", "two", "--quick", "--seeds", "3"]) == 0
    assert not SUITE.asked
    assert (OTHER.asked[-1].quick, OTHER.asked[-1].seeds) == (True, 3)


@pytest.mark.parametrize("broken", ["no_such_module:SUITE", of("NO_ATTRIBUTE"), of("NO_SUITE")])
def test_entry_point_that_cannot_be_loaded_is_named_and_the_others_go_on(installed, capsys, broken):
    installed("taulearn.suites", sick=broken, two=of("OTHER"))
    with pytest.warns(UserWarning, match="suite 'sick' is left out") as told:
        assert list(installed_suites()) == ["two"]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["reproduce", "two", "--seeds", "5"]) == 0
    assert "warning: suite 'sick' is left out" in capsys.readouterr().err
    assert OTHER.asked[-1].seeds == 5


def test_suite_or_engine_whose_import_exits_is_named_and_the_others_go_on(installed, tmp_path, monkeypatch):
    (tmp_path / "leaves_at_import.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed("taulearn.suites", sick="leaves_at_import:SUITE", two=of("OTHER"))
    with pytest.warns(UserWarning, match=r"suite 'sick' is left out: .*\(SystemExit: 3\)"):
        assert list(installed_suites()) == ["two"]
    installed("taulearn.engines", sick="leaves_at_import:run")
    with pytest.raises(ImportError, match="engine 'sick' cannot be loaded"):
        engine_named("sick")


def test_of_two_suites_of_one_name_the_first_is_taken_and_both_are_named(monkeypatch):
    class Distribution:
        def __init__(self, name):
            self.name = name

    points = [importlib.metadata.EntryPoint("one", of(name), "taulearn.suites") for name in ("SUITE", "OTHER")]
    points = [point._for(Distribution(name)) for point, name in zip(points, ("good", "bad"), strict=True)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: points)
    with pytest.warns(UserWarning, match=r"'one' is .*SUITE of good; that .*OTHER of bad is left out"):
        assert installed_suites() == {"one": SUITE}


@pytest.mark.parametrize("name", ["vmap", "ray"])
def test_engines_of_the_papers_say_what_to_install(installed, capsys, tmp_path, name):
    installed("taulearn.engines")
    with pytest.raises(ImportError, match="pip install taulearn-papers"):
        engine_named(name)
    spec = tmp_path / "depth.toml"
    spec.write_text("[grid]\nhidden_layers = [2, 4]\n")
    assert main(["sweep", str(spec), "--engine", name, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "--engine" in err
    assert "pip install taulearn-papers" in err
    assert not (tmp_path / "out").exists()


def test_engine_of_another_distribution_is_found(installed, capsys, tmp_path):
    installed("taulearn.engines", mine="taulearn.app.run_members:run_one_by_one", sick="no_such_module:run")
    assert engine_named("mine") is run_one_by_one
    with pytest.raises(ImportError, match="engine 'sick' cannot be loaded"):
        engine_named("sick")
    spec = tmp_path / "one.toml"
    spec.write_text("[base]\nwidth = 8\nepochs = 1\n")
    assert main(["sweep", str(spec), "--engine", "mine", "--out", str(tmp_path / "out")]) == 0
    assert "1 trained" in capsys.readouterr().out
