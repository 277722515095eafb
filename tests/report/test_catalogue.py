"""The report of many runs, as text and in a real browser."""

import re
from pathlib import Path

import pytest

from taulearn.report.catalogue import ClaimRow, Picture, RunRow, write_catalogue

HOSTILE = "</script><img src=x onerror=alert(2)><b>b</b>\"q\" 'q'\n data=mnist"


@pytest.fixture
def page(tmp_path) -> Path:
    from matplotlib.figure import Figure

    drawing = Figure()
    drawing.subplots().plot([1, 2])
    drawing.savefig(tmp_path / "a.png")
    claims = [
        ClaimRow("H1", "higher accuracy sooner", "holds", "holds: mnist", {"difference": 0.25}),
        ClaimRow("H2", HOSTILE, "does not hold", HOSTILE, {HOSTILE: HOSTILE}),
    ]
    runs = [
        RunRow(
            f"{data}/{penalty}/seed-{seed}",
            {"data": data, "penalty": penalty},
            {"accuracy": 0.9, "layers": "6 → 2"},
            link,
        )
        for data in ("mnist", "fashion-mnist")
        for penalty in ("l1", "free")
        for seed in (0, 1)
        for link in ([f"{data}/run.html"] if seed == 0 else [None])
    ]
    runs.append(RunRow(HOSTILE, {"data": HOSTILE, "penalty": "l1"}, {"accuracy": None}))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/run.html").write_text("<title>the run itself</title>")
    pictures = [Picture("Figure 4.1", HOSTILE, (tmp_path / "a.png").read_bytes())]
    return write_catalogue(tmp_path / "report.html", "suite", HOSTILE, claims=claims, pictures=pictures, runs=runs)


def test_same_content_gives_the_same_bytes(page, tmp_path):
    before = page.read_bytes()
    rows = [RunRow("a", {"data": "x"}, {})]
    assert (
        write_catalogue(tmp_path / "b.html", "a", "", runs=rows).read_bytes()
        == write_catalogue(tmp_path / "c.html", "a", "", runs=rows).read_bytes()
    )
    assert b"report.js" not in before
    assert len(before) < 200_000, "plotly has no place in it"


@pytest.fixture
def opened(browser, page):
    browser.get_log("browser")
    browser.get(page.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def shown(browser):
    rows = browser.find_elements("css selector", "#runs tbody tr")
    return [row.find_element("css selector", "th").text for row in rows if row.is_displayed()]


def choose(browser, facet, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("css selector", f"select[data-facet={facet}]")).select_by_visible_text(value)


def test_filters_narrow_the_runs_and_tell_how_many_are_left(opened):
    assert len(shown(opened)) == 9
    choose(opened, "data", "mnist")
    assert {name.partition("/")[0] for name in shown(opened)} == {"mnist"}
    choose(opened, "penalty", "free")
    assert shown(opened) == ["mnist/free/seed-0", "mnist/free/seed-1"]
    assert opened.find_element("id", "count").text == "2 of 9 runs"
    choose(opened, "data", "all")
    assert len(shown(opened)) == 4


def test_filters_are_in_the_address_and_come_back_with_it(opened):
    choose(opened, "data", "fashion-mnist")
    address = opened.current_url
    assert address.endswith("#data=fashion-mnist")
    opened.get("about:blank")
    opened.get(address)
    assert len(shown(opened)) == 4


def test_every_run_that_has_a_report_links_to_it(opened):
    links = opened.find_elements("css selector", "#runs a")
    assert len(links) == 4
    opened.find_element("link text", "mnist/free/seed-0").click()
    assert opened.title == "the run itself"


def test_verdicts_figures_and_measured_values_are_there(opened):
    marks = opened.find_elements("css selector", ".outcome")
    assert [each.text for each in marks] == ["holds", "does not hold"]
    colours = {each.value_of_css_property("background-color") for each in marks}
    assert len(colours) == 2
    opened.find_element("css selector", ".claims summary").click()
    assert "difference" in opened.find_element("css selector", ".claims dl").text
    image = opened.find_element("css selector", ".pictures img")
    assert opened.execute_script("return arguments[0].naturalWidth", image) > 100


def test_hostile_names_are_text(opened):
    assert opened.execute_script("return document.querySelectorAll('img').length") == 1
    assert opened.execute_script("return document.querySelectorAll('main script, main b').length") == 0
    name = shown(opened)[-1]
    assert name == re.sub(r"\s+", " ", HOSTILE)
    choose(opened, "data", "mnist")
    assert re.sub(r"\s+", " ", HOSTILE) not in shown(opened)


def test_fits_the_window(opened):
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_markdown_tables_become_tables(tmp_path):
    text = "| network | M |\n| --- | --- |\n| <b> | 2 |\n"
    page = write_catalogue(tmp_path / "r.html", "S", "", tables={"Table 1": text, "Note": "| not a table"})
    found = page.read_text(encoding="utf-8")
    assert "<th scope='col'>M</th>" in found
    assert "<th scope='row'>&lt;b&gt;</th><td>2</td>" in found
    assert "<pre>| not a table</pre>" in found
