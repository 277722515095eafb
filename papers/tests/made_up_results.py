"""Results of a suite in memory, made up without training, so that the answer of every judge is known."""

import copy

import numpy as np

from taulearn.app.results import NotMeasured
from taulearn.training import History
from taulearn.training.thinned_records import thinned

ITERATIONS, EPOCHS = 12_000, 20
I = np.arange(1, ITERATIONS + 1)[:, None]
SEEDS = (0, 1, 2)


class MadeUp:
    """Results in memory."""

    def __init__(self, records, measured=None):
        self.records, self.measured = records, measured or {}

    @property
    def settings(self):
        return list(self.records)

    def seeds(self, *names):
        if missing := [name for name in names if name not in self.records and name not in self.measured]:
            raise NotMeasured(f"no finished member of {missing}")
        return list(SEEDS)

    def history(self, name, seed):
        return thinned(self.records[name][seed], coarse=True)

    def measurements(self, name, seed):
        return self.measured[name]


def record(tau, *, accuracy=0.9, start=0.1, loss=0.3, penalty=0.0, seed=0, deletions=()):
    epoch = np.arange(EPOCHS + 1)
    rng = np.random.default_rng(seed)
    gain = accuracy - (accuracy - start) * np.exp(-epoch / 2.0) + rng.normal(0, 1e-4, EPOCHS + 1)
    data = loss + np.exp(-epoch / 3.0) + rng.normal(0, 1e-4, EPOCHS + 1)
    tau = np.broadcast_to(tau, (ITERATIONS, 6)) + 0.0
    for gone in deletions:
        tau[gone.iteration :, gone.layer] = np.nan
    layers = 6 - np.array([sum(gone.epoch <= n for gone in deletions) for n in epoch])
    epochs = {
        "iteration": epoch * (ITERATIONS // EPOCHS),
        "layers": layers,
        "parameters": 130_006 - 10_101 * (6 - layers),
        "validation.accuracy": gain,
        "validation.loss": data,
        "train.loss": data,
        "train.total": data + penalty,
    }
    return History({"loss": np.zeros(ITERATIONS), "tau": tau, "raw_tau": tau}, epochs, list(deletions))


def of(value, **settings):
    return [record(value, seed=seed, **settings) for seed in SEEDS]


GROWN = 1 / 6 + np.array([1.0, 0.1, 0.1, 0.1, 0.1, 0.2]) * np.log1p(I / 300)


def changed(results, name, records):
    other = MadeUp(dict(results.records), copy.deepcopy(results.measured))
    other.records[name] = records
    return other
