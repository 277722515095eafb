"""Synthetic records for the pictures: what a run leaves behind, made up without training; and a browser to look at."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from taulearn.training.history import Deletion, History

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,1000",
)


@dataclass(frozen=True)
class NamedRun:
    name: str
    history: History
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)


def make_record(
    *,
    layers: int = 6,
    epochs: int = 20,
    per_epoch: int = 600,
    deletions: tuple[tuple[int, int], ...] = ((2, 1800), (3, 3000), (4, 7200)),
    raw: bool = False,
    seed: int = 0,
) -> History:
    """A trajectory that starts at 1/layers, where tau_0 grows most and each deleted layer decays to its end."""
    rng = np.random.default_rng(seed)
    count = epochs * per_epoch
    i = np.arange(1, count + 1)
    growth = np.linspace(1.0, 0.25, layers)
    tau = (
        1 / layers
        + growth * 0.12 * np.log1p(i[:, None] / 150)
        + rng.normal(0, 0.004, (count, layers)).cumsum(0) / np.sqrt(i)[:, None]
    )
    gone = []
    for layer, end in deletions:
        tau[:end, layer] = tau[:end, layer] * np.linspace(1, 0, end) ** 0.7
        tau[end:, layer] = np.nan
        gone.append(Deletion(end, -(-end // per_epoch), layer, 0.0041 + 0.001 * layer, 10101))
    loss = 2.3 * (1 + i / 200) ** -0.6 * np.exp(rng.normal(0, 0.15, count))
    penalty = 0.01 * np.nansum(np.abs(tau), axis=1)
    columns = {"loss": loss, "total": loss + penalty, "penalty.l1": penalty, "tau": tau}
    if raw:
        columns["raw_tau"] = np.where(np.isnan(tau), np.nan, tau - 0.3)
    epoch = np.arange(epochs + 1)
    left = np.array([layers - sum(g.epoch <= e for g in gone) for e in epoch])
    means = loss.reshape(epochs, per_epoch).mean(1) if epochs else np.empty(0)
    totals = (loss + penalty).reshape(epochs, per_epoch).mean(1) if epochs else np.empty(0)
    return History(
        columns,
        {
            "iteration": epoch * per_epoch,
            "layers": left,
            "parameters": 130006 - 10101 * (layers - left),
            "seconds": np.where(epoch == 0, 0.0, 0.2 + 0.05 * left + rng.uniform(0, 0.02, epochs + 1)),
            "train.loss": np.concatenate([[np.nan], means]),
            "train.total": np.concatenate([[np.nan], totals]),
            "validation.loss": 2.3 * (1 + epoch) ** -0.5,
            "validation.accuracy": 0.87 - 0.77 * np.exp(-epoch / 2) + rng.uniform(0, 0.01, epochs + 1),
        },
        gone,
    )


@pytest.fixture
def record() -> History:
    return make_record()


@pytest.fixture
def make() -> Callable[..., History]:
    return make_record


@pytest.fixture
def make_run() -> Callable[..., NamedRun]:
    def run(name: str = "first", record: History | None = None, **config: Any) -> NamedRun:
        decisions = {"device": "cpu: no CUDA device found"}
        return NamedRun(name, record or make_record(), config, {"torch": "2.13.0"}, decisions)

    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver_path = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if driver_path is None or binary is None:
        reason = "chromium and chromedriver are needed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()
