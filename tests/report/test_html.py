import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from taulearn.report import write_html
from taulearn.report.charts import depth_losses, loss_curves, tau_explorer
from taulearn.report.records import unique_names
from taulearn.training.history import History

HOSTILE = "</script><script>alert(1)</script>\"quoted\" 'single' & <b>%{x}</b>"


class Page(HTMLParser):
    """Elements, texts and data of a report, as a browser would parse them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.scripts, self.tags, self.cells, self.attributes, self.texts = [], [], [], [], []
        self.open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag in ("td", "th"):
            self.cells.append("")
        self.open = tag

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "script":
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if self.open in ("td", "th"):
            self.cells[-1] += data

    @property
    def figures(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def write(tmp_path):
    def written(runs):
        return Page(write_html(runs, tmp_path / "report.html").read_text(encoding="utf-8"))

    return written


def test_report_of_one_run_shows_key_figures_and_what_was_pruned(write, make_run):
    run = make_run(network="resnet", data="fashion-mnist", l1=0.01, width=[100, 50])
    page = write(run)
    text = " ".join(page.texts)
    last = f"{run.history.epochs['validation.accuracy'][-1]:.4f}"
    for expected in ("6 → 3", "130,006 → 99,703", last, "20 epochs, 12,000 iterations", "resnet on fashion-mnist"):
        assert expected in text
    start = page.cells.index("Parameters removed") + 1
    assert page.cells[start : start + 5] == ["2", "3", "1,800", "0.0061", "10,101"]
    assert page.cells[start + 15 : start + 20] == ["All", "", "", "", "30,303"]
    assert page.cells[page.cells.index("width") + 1] == "[100, 50]"
    assert {"2.13.0", "cpu: no CUDA device found"} <= set(page.cells)
    assert set(page.figures) == {"run-1-tau", "run-1-loss", "run-1-accuracy", "run-1-sizes", "run-1-grid"}


def test_report_is_one_file_that_names_its_scripts_and_loads_nothing(write, make_run):
    page = write(make_run())
    assert [tag for tag in page.tags if tag in ("img", "iframe", "object", "embed")] == []
    assert [attrs for tag, attrs in page.attributes if tag == "script"] == [
        {"type": "application/json", "id": "figures"},
        {},
        {},
    ]
    assert [attrs["href"] for tag, attrs in page.attributes if tag == "link"] == ["data:,"]
    policy = next(attrs["content"] for _, attrs in page.attributes if "Content-Security-Policy" in attrs.values())
    assert "default-src 'none'" in policy
    assert len(re.findall(r"'sha256-[^']{44}'", policy)) == 2
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_report_has_title_language_headers_and_names_of_pictures(write, make_run):
    page = write(make_run("free", l1=0.01))
    assert ("html", {"lang": "en"}) in page.attributes
    assert "Run free · taulearn" in page.texts
    for tag, attrs in page.attributes:
        if tag == "th":
            assert attrs["scope"] in ("row", "col")
        if "data-figure" in attrs:
            assert len(attrs["aria-label"]) > 20
            assert attrs["role"] == "img"
    assert page.tags.count("caption") == page.tags.count("table") >= 5
    identifiers = [attrs["id"] for _, attrs in page.attributes if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("several", [False, True])
def test_names_and_values_are_text_whatever_they_contain(write, make_run, several):
    run = make_run(HOSTILE, **{HOSTILE: HOSTILE, "nested": {"inner": HOSTILE}, "list": [HOSTILE]})
    page = write([run, make_run("other")] if several else run)
    assert len(page.scripts) == 3
    assert not set("<>&") & set(page.scripts[0])
    assert "b" not in page.tags
    assert page.cells.count(HOSTILE) >= 3
    assert any(HOSTILE in text for text in page.texts)
    names = {trace["name"] for figure in page.figures.values() for trace in figure["data"]}
    assert not any("<" in name for name in names)
    if several:
        assert any("&lt;/script&gt;" in name for name in names)


def test_penalty_names_are_text_too(write, make_run, record):
    columns = {name: column for name, column in record.iterations.items() if name != "penalty.l1"}
    columns[f"penalty.{HOSTILE}"] = record.iterations["penalty.l1"]
    epochs = record.epochs | {f"validation.{HOSTILE}": record.epochs["seconds"]}
    page = write(make_run(record=History(columns, epochs)))
    assert len(page.scripts) == 3
    assert f"validation.{HOSTILE}" in page.cells


def test_same_records_give_the_same_bytes(make_run, tmp_path):
    first, second = (write_html(make_run(l1=0.01), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_several_runs_are_compared(write, make_run, make):
    runs = [make_run("free", make(deletions=()), l1=0.0, seed=0), make_run("l1", l1=0.01, prune=0.01, seed=0)]
    page = write(runs)
    assert {"accuracy", "loss", "validation-loss", "layers", "run-1-tau", "run-2-tau"} <= set(page.figures)
    assert [trace["name"] for trace in page.figures["accuracy"]["data"]] == ["free", "l1"]
    losses = [trace["name"] for trace in page.figures["loss"]["data"]]
    assert losses == ["free, data loss", "free, total", "l1, data loss", "l1, total"]
    captions = [text for text in page.texts if text in ("Results", "Options that differ")]
    assert captions == ["Results", "Options that differ"]
    start = page.cells.index("prune")
    assert page.cells[start - 2 : start + 1] == ["Run", "l1", "prune"]
    assert [attrs["id"] for tag, attrs in page.attributes if tag == "details" and "id" in attrs] == ["run-1", "run-2"]


def test_tau_explorer_has_a_line_per_layer_a_mark_per_deletion_and_the_sum(record):
    data = tau_explorer(record).data
    assert [trace["name"] for trace in data] == [
        *(f"layer {layer}" for layer in range(6)),
        *(f"layer {layer} deleted" for layer in (2, 3, 4)),
        "sum",
    ]
    assert data[6]["x"] == [1800] == data[2]["x"][-1:]
    assert data[6]["legendgroup"] == data[2]["legendgroup"]
    assert max(len(trace["x"]) for trace in data) <= 2000 + 2 * 6


def test_loss_curves_hold_data_loss_penalties_total_and_validation(make):
    data = loss_curves(make()).data
    assert [trace["name"] for trace in data if trace["meta"].get("variant") != "batch"] == [
        "data loss",
        "penalty l1",
        "total",
        "validation loss",
    ]
    short = loss_curves(make(epochs=2, per_epoch=20, deletions=())).data
    assert all("variant" not in trace["meta"] for trace in short)


def test_losses_at_each_depth_are_drawn_where_they_are_recorded(record):
    losses = np.full((40, 4), np.nan)
    losses[:, 1:] = np.linspace(2.0, 1.0, 40)[:, None] - [0.0, 0.1, 0.2]
    losses[20:, 2] = np.nan
    history = History(record.iterations | {"loss": losses[:, 3], "stage_loss": losses}, record.epochs, [])
    traces = depth_losses(history).data
    assert [trace["name"] for trace in traces] == ["first tenth", "middle", "last tenth"]
    assert [list(trace["x"]) for trace in traces] == [[1, 2, 3], [1, 2, 3], [1, 3]]
    assert traces[2]["y"][0] == pytest.approx(losses[-4:, 1].mean(), rel=1e-5)


def test_regression_validation_loss_before_training_is_not_drawn_on_the_logarithmic_axis(record):
    validation = loss_curves(record).data[-1]
    assert validation["x"][0] == 600


def test_raw_time_steps_are_a_variant(make):
    variants = [trace["meta"]["variant"] for trace in tau_explorer(make(raw=True, deletions=())).data]
    assert variants == ["effective"] * 7 + ["raw"] * 7


def test_a_diverged_run_is_reported(write, make_run, make):
    record = make(epochs=2, per_epoch=50, deletions=())
    record.iterations["loss"][60:] = np.nan
    record.iterations["total"][60:] = np.inf
    record.iterations["tau"][61:] = np.nan
    record.epochs["train.loss"][2] = np.inf
    page = write(make_run(record=record))
    assert page.figures["run-1-tau"]["data"][0]["x"][-1] == 61
    assert {"nan", "inf"} <= set(page.cells)


def test_a_run_without_validation_data_says_so(write, make_run, record):
    epochs = {name: column for name, column in record.epochs.items() if not name.startswith("validation")}
    page = write(make_run(record=History(record.iterations, epochs, record.deletions)))
    assert "not recorded" in page.texts
    assert "run-1-accuracy" not in page.figures


def test_a_run_stopped_before_its_first_iteration_is_reported(write, make_run):
    page = write(make_run("empty", History()))
    assert "0 epochs, 0 iterations" in page.texts
    assert page.figures == {}


def test_a_long_run_gives_a_moderate_file(make_run, make, tmp_path):
    record = make(layers=20, epochs=200, per_epoch=600, deletions=((19, 40_000),))
    path = write_html(make_run(record=record), tmp_path / "report.html")
    short = write_html(make_run(record=make(epochs=1, per_epoch=2, deletions=())), tmp_path / "short.html")
    assert path.stat().st_size - short.stat().st_size < 1_500_000


def test_a_folder_that_is_not_there_is_an_error(make_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
        write_html(make_run(), tmp_path / "missing" / "report.html")


def test_an_earlier_report_survives_a_failure(make_run, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def full(self, *args, **kwargs):
        with self.open("w") as file:
            file.write("<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_html(make_run(), path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_unicode_is_written(make_run, tmp_path):
    assert write_html(make_run("caf\udce9"), tmp_path / "report.html").is_file()


def test_names_are_told_apart():
    assert unique_names(["a", "a", "a (2)", "a"]) == ["a", "a (2)", "a (2) (2)", "a (3)"]


def test_a_report_does_not_overwrite_other_files(make_run, tmp_path):
    settings = tmp_path / "run.toml"
    settings.write_text("format = 1")
    with pytest.raises(ValueError, match=r"path must .*got .*run\.toml"):
        write_html(make_run(), settings)
    assert settings.read_text() == "format = 1"
