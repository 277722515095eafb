"""The report in a real browser: headless Chromium, driven through selenium."""

import re

import pytest

from taulearn.report import write_html

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>b</b>%{x}\"q\" 'q'"


@pytest.fixture
def visit(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    def opened(runs, *, fragment=""):
        path = write_html(runs, tmp_path / "report.html")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri() + fragment)
        WebDriverWait(browser, 60).until(
            lambda page: page.execute_script("return 'ready' in document.documentElement.dataset")
        )
        return browser

    yield opened
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def wait_until(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda page: page.execute_script(script))


def hover(browser, trace, point):
    """Move the mouse to a point of the time step explorer, and return the text that appears."""
    from selenium.webdriver.common.action_chains import ActionChains

    plot = browser.find_element("css selector", "[data-figure$=tau]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y = browser.execute_script(
        """const [plot, number, point] = arguments, {xaxis, yaxis} = plot._fullLayout, trace = plot.data[number];
        const box = plot.getBoundingClientRect(), k = point < 0 ? trace.x.length + point : point;
        const left = xaxis._offset + xaxis.d2p(trace.x[k]), top = yaxis._offset + yaxis.d2p(trace.y[k]);
        return [left - box.width / 2, top - box.height / 2]""",
        plot,
        trace,
        point,
    )
    ActionChains(browser).move_to_element_with_offset(plot, round(x), round(y)).perform()
    label = "[data-figure$=tau] .hoverlayer .hovertext"
    return wait_until(browser, f"return document.querySelector('{label}')?.textContent")


def test_the_page_renders_every_figure(visit, make_run):
    page = visit(make_run("free", network="resnet"))
    assert page.title == "Run free · taulearn"
    counts = page.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    assert counts == [10, 6, 3, 4, 1]
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_hover_shows_layer_iteration_and_value(visit, make_run, record):
    page = visit(make_run("free", record))
    text = hover(page, 0, -1)
    assert "layer 0" in text
    iteration = int(re.search(r"iteration ([\d,]+)", text)[1].replace(",", ""))
    value = float(re.search(r"τ = ([\d.]+)", text)[1])
    assert abs(iteration - 12000) < 200
    assert value == pytest.approx(record.iterations["tau"][iteration - 1, 0], rel=1e-4)


def test_hover_on_a_cross_says_what_was_deleted(visit, make_run):
    text = hover(visit(make_run("free")), 6, 0)
    assert text.startswith("layer 2")
    assert "deleted after iteration 1,800 (epoch 3)" in text
    assert "10,101 parameters removed" in text


def test_switch_to_a_linear_axis_and_isolate_a_layer(visit, make_run):
    from selenium.webdriver.common.action_chains import ActionChains

    page = visit(make_run("free"))
    page.find_element("css selector", "[data-axis=xaxis][data-type=linear]").click()
    wait_until(page, "return document.querySelector('[data-figure$=tau]')._fullLayout.xaxis.type === 'linear'")
    assert (
        page.find_element("css selector", "[data-axis=xaxis][data-type=log]").get_attribute("aria-pressed") == "false"
    )
    legend = page.find_elements("css selector", "[data-figure$=tau] .legendtoggle")
    ActionChains(page).move_to_element(legend[2]).click().perform()
    shown = (
        "const plot = document.querySelector('[data-figure$=tau]');"
        "const shown = plot._fullData.filter(trace => trace.visible === true).map(trace => trace.name);"
    )
    wait_until(page, shown + "return shown.length === 2")
    assert page.execute_script(shown + "return shown") == ["layer 2", "layer 2 deleted"]
    page.find_element("xpath", "(//button[.='show all'])[1]").click()
    wait_until(page, shown + "return shown.length === 10")


def test_switch_between_smoothed_and_single_batches(visit, make_run):
    page = visit(make_run("free"))
    shown = (
        "return [...new Set(document.querySelector('[data-figure$=loss]')._fullData"
        ".filter(t => t.visible === true && t.meta.variant).map(t => t.meta.variant))].join()"
    )
    assert page.execute_script(shown) == "mean"
    page.find_element("css selector", "[data-variant=batch]").click()
    wait_until(page, shown + " === 'batch'")


def test_hostile_names_are_text_and_nothing_runs(visit, make_run):
    runs = [make_run(HOSTILE, l1=HOSTILE), make_run("other", l1=0.0)]
    page = visit(runs, fragment="#run-1")
    assert page.find_element("css selector", "#run-1 h2").text == HOSTILE
    assert page.execute_script("return document.querySelectorAll('img, main script').length") == 0
    legend = page.execute_script("return document.querySelector('[data-figure=accuracy] .legendtext').textContent")
    assert legend == HOSTILE


def test_no_request_leaves_the_page(visit, make_run):
    page = visit(make_run(HOSTILE))
    hover(page, 0, -1)
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    urls = re.findall(
        r'"method":"Network.requestWillBeSent".*?"url":"([^"]+)"',
        "\n".join(e["message"] for e in page.get_log("performance")),
    )
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}
    titles = page.execute_script("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert not any("share" in title.lower() or "cloud" in title.lower() for title in titles)


def test_a_script_that_got_in_would_not_run(visit, make_run):
    page = visit(make_run("free"))
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.broken = true'; document.body.append(s)"
    )
    assert page.execute_script("return window.broken === undefined")
    (refused,) = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert "Content Security Policy" in refused["message"]


def test_figures_of_a_folded_run_are_drawn_when_it_opens(visit, make_run):
    page = visit([make_run("free"), make_run("l1")])
    drawn = "return document.querySelectorAll('#run-2 .js-plotly-plot .main-svg').length > 0"
    assert not page.execute_script(drawn)
    page.find_element("css selector", "#run-2 > summary").click()
    wait_until(page, drawn)
    assert page.execute_script("return document.querySelector('#run-2 .plot')._fullLayout.width") > 600


def test_fits_a_phone_and_follows_the_dark_mode(visit, make_run):
    page = visit(make_run("free"))
    ink = "return document.querySelector('[data-figure$=tau]')._fullData.at(-1).line.color"
    light = page.execute_script(ink)
    try:
        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        wait_until(page, f"{ink} !== '{light}'")
        wait_until(page, "return document.querySelector('.plot')._fullLayout.legend.orientation === 'h'")
        assert page.execute_script("return document.documentElement.scrollWidth") == 400
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
