"""Bad settings, files of settings, sweeps and trainings by settings: rows of the table in tests/refusals.py."""

import tempfile
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from refusals import INF, NAN, R
from taulearn.app.config import explain
from taulearn.app.members import Member
from taulearn.app.sweep import make_sweep
from taulearn.experiments import TrainConfig, train as train_config


def settings(**given: Any) -> None:
    """The settings of a training, with the error's text as a user sees it."""
    try:
        TrainConfig(**given)
    except ValueError as error:
        raise ValueError(explain(error)) from error


def settings_file(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep.toml"
        path.write_text(text)
        TrainConfig.from_toml(path)


def sweep(text: str) -> None:
    make_sweep("test", tomllib.loads(text))


def training(**given: Any) -> Callable[[], object]:
    small = {"hidden_layers": 4, "width": 8, "epochs": 1, "batch_size": 100, "run": "run"}
    return lambda: train_config(TrainConfig(**small | given), progress=False)


USELESS = ("l1", "elastic_net", "time_horizon", "tau_lr", "prune")
NARROWING = {"hidden_layers": 2, "width": (3, 4)}
FRACTIONAL = {"network": "fractional"}

APP = [
    *[
        R(ValueError, name, partial(settings, **{name: value}), (repr(value),))
        for name, values in {
            "hidden_layers": (0, "6", True, 6.0),
            "width": (0, [10, 0.5], []),
            "init": ("x", [0.1, NAN]),
            "horizon": (0,),
            "lower_bound": (-0.1,),
            "gamma": (1,),
            "memory_from": (2,),
            "l1": (INF,),
            "prune": (0.0, 1.0),
            "prune_blocks": (0,),
            "batch_size": ("all",),
            "lr": (0.0,),
            "proximal": (1,),
            "run": ("",),
            "network": ("resnt",),
            "constraint": ("simplx",),
        }.items()
        for value in values
    ],
    R(ValueError, "network", partial(settings, network="resnt"), ("'resnet'",)),
    R(ValueError, "constraint", partial(settings, constraint="simplx"), ("'simplex'",)),
    R(ValueError, "hiden_layers", partial(settings, hiden_layers=3), ("'hidden_layers'",)),
    R(ValueError, "zzz", partial(settings, zzz=3), ("taulearn train --help",)),
    *[
        R(ValueError, argument, partial(settings, **given), says)
        for argument, given, says in (
            ("prune_every", {"prune": 0.1, "prune_every": 0}, ("0",)),
            ("width", {"width": (10, 20)}, ("6", "2")),
            ("init", {"init": (0.1, 0.2)}, ("6", "2")),
            ("constraint", {"constraint": "dependent", "hidden_layers": 1}, ("'dependent'",)),
            ("lower_bound", {"constraint": "simplex", "lower_bound": 0.5}, ("horizon",)),
            ("lower_bound", {"constraint": "dependent", "lower_bound": 0.5}, ("horizon",)),
            ("lower_bound", {"lower_bound": 0.5}, ("horizon", "0.1667")),
            ("lower_bound", {**FRACTIONAL, "lower_bound": 0.0}, ("'fractional'",)),
            ("accumulate", {"accumulate": 20, "batch_size": 10}, ("10", "20")),
            ("proximal", {"proximal": True}, ("l1",)),
            ("prune_every", {"prune_every": 100}, ("prune",)),
            ("prune_by", {"prune_by": 3}, ("prune_blocks",)),
            ("prune_blocks", {"prune_blocks": 6}, ("6", "hidden_layers")),
            ("prune", {"prune_blocks": 3, "prune": 0.01}, ("prune_blocks",)),
            ("l1", {"prune_blocks": 3, "l1": 0.01}, ("prune_blocks",)),
            ("prune_by", {"prune_blocks": 3, "prune_by": 21}, ("epochs = 20", "21")),
            ("prune_blocks", {"prune_blocks": 3, "network": "densenet"}, ("'densenet'",)),
            ("refine", {"refine": 6}, ("6", "hidden_layers")),
            ("refine", {"refine": 8, "network": "densenet"}, ("'densenet'", "'resnet'")),
            ("refine", {"refine": 8, "hidden_layers": 1}, ("width", "start with more")),
            ("refine_until", {"refine_until": 3}, ("refine",)),
            ("refine_until", {"refine": 8, "refine_until": 21}, ("epochs = 20", "21")),
            ("prune_blocks", {"refine": 8, "prune_blocks": 8}, ("8", "(refine)")),
            ("gamma", {"gamma": 0.3}, ("'resnet'",)),
            ("scheme", {"scheme": "verlet", "network": "densenet"}, ("'densenet'",)),
            ("scheme", {"scheme": "heun", "hidden_layers": 2, "width": (4, 5)}, ("'heun'",)),
            ("scheme", {"scheme": "heun", "network": "resnet-v2"}, ("'heun'",)),
            ("learn_order", {"network": "fractional", "learn_order": "layers"}, ("'layer'",)),
            ("epsilon", {"epsilon": 0.5}, ("'residual'",)),
            ("learn_order", {"learn_order": "network"}, ("'resnet'",)),
            (
                "memory",
                {"network": "fractional", "hidden_layers": 20, "memory": "fast", "learn_order": "network"},
                ("'fast'",),
            ),
            ("gamma", {"network": "fractional", "gamma": 0.995, "learn_order": "network"}, ("0.995",)),
            ("epsilon", {"epsilon": 0.0, "scheme": "momentum"}, ("0",)),
            ("memory_from", {"network": "densenet", "memory_from": 0}, ("'densenet'",)),
            ("init", {"init": "uniform", "constraint": "simplex"}, ("'simplex'",)),
            ("init", {"init": "uniform", "lower_bound": 1.0}, ("lower_bound = 1.0",)),
            ("clip_norm", {"optimizer": "steepest_descent", "clip_norm": 1.0}, ("'steepest_descent'",)),
            ("clip_norm", {"optimizer": "lbfgs", "clip_norm": 1.0}, ("'lbfgs'",)),
            ("scheduler", {"optimizer": "steepest_descent", "scheduler": "step"}, ("'steepest_descent'",)),
            ("skips", {"skips": "learned"}, ("width",)),
            ("skips", NARROWING | {"skips": "learned", "network": "feedforward"}, ("feedforward",)),
            *((name, {"constraint": "fixed", name: 0.01}, ("'fixed'",)) for name in USELESS),
            ("l1", {"constraint": "simplex", "l1": 0.01}, ("'simplex'",)),
            ("time_horizon", {"constraint": "simplex", "time_horizon": 1.0}, ("'simplex'",)),
            ("time_horizon", {"constraint": "dependent", "time_horizon": 1.0}, ("'dependent'",)),
            ("memory", {"memory": "fast"}, ("'resnet'", "'fractional'")),
            ("tolerance", {"tolerance": 1e-3}, ("'resnet'",)),
            ("memory", {**FRACTIONAL, "memory": "fast"}, ("8", "hidden_layers")),
            ("memory", {**FRACTIONAL, "hidden_layers": 8, "width": (4,) * 7 + (3,), "memory": "fast"}, ("width",)),
            ("tolerance", {**FRACTIONAL, "hidden_layers": 255, "tolerance": 1e-3}, ("'auto'", "255")),
            ("tolerance", {**FRACTIONAL, "hidden_layers": 300, "memory": "exact", "tolerance": 1e-3}, ("'exact'",)),
            ("compile", {**FRACTIONAL, "hidden_layers": 9, "memory": "fast", "compile": "always"}, ("'fast'",)),
            ("prune", {"network": "densenet", "prune": 0.01}, ("'densenet'", "'resnet'")),
            ("prune", {"network": "feedforward", "prune": 0.01}, ("'feedforward'",)),
            ("prune", {"hidden_layers": 1, "prune": 0.01}, ("hidden layer",)),
            ("prune", NARROWING | {"prune": 0.01}, ("width",)),
            ("prune", {"hidden_layers": 2, "constraint": "dependent", "prune": 0.01}, ("dependent",)),
        )
    ],
    *[
        R(ValueError, argument, partial(settings_file, text), ("deep.toml", *says))
        for argument, text, says in (
            ("hiden_layers", "hiden_layers = 3", ("'hidden_layers'",)),
            ("hidden-layers", "[config]\nhidden-layers = 3", ("'hidden_layers'",)),
            ("lr", "lr = '0.1'", ("'0.1'",)),
            ("format", "format = 2\n[config]\nlr = 0.1", ("1", "2")),
            ("TOML", "lr = ", ()),
            ("data", "data = {a = 1}", ("{'a': 1}",)),
            ("tensorboard", "tensorboard = 'yes'", ("'yes'",)),
            ("compile", "compile = true", ("'always'", "True")),
            ("TOML", f"epochs = {'9' * 5000}", ("4300 digits",)),
            ("epochs", f"epochs = -{'9' * 4000}", ("4001 characters",)),
            ("lr", f"lr = 0x{'f' * 5000}", ("thousands of digits",)),
            ("init", f"init = {'9' * 400}", ("finite",)),
            ("compile", f"compile = 0x{'f' * 5000}", ("thousands of digits",)),
            ("TOML", f"width = {'[' * 5000}", ("recursion",)),
            ("hidden_layers", "hidden_layers = 10000000", ("100000", "10000000")),
            ("config", "config = 3", ("3",)),
            ("l1", "constraint = 'fixed'\nl1 = 0.1", ("'fixed'",)),
        )
    ],
    R(FileNotFoundError, "config", lambda: TrainConfig.from_toml("/"), ("'/'", "folder")),
    R(FileNotFoundError, "config", lambda: TrainConfig.from_toml("deep.toml"), ("'deep.toml'",)),
    *[
        R(ValueError, argument, partial(sweep, text), says)
        for argument, text, says in (
            ("seed", "seed = 3", ("'seeds'",)),
            ("hiden_layers", "[grid]\nhiden_layers = [2]", ("'hidden_layers'",)),
            ("seed", "[base]\nseed = 3", ()),
            ("run", "[base]\nrun = 'x'", ()),
            ("grid.l1", "[grid]\nl1 = 0.1", ("0.1",)),
            ("grid.l1", "[grid]\nl1 = []", ("[]",)),
            ("seeds", "seeds = 0", ("0",)),
            ("seeds", "seeds = [1, 1]", ("[1, 1]",)),
            ("seeds", "seeds = true", ("True",)),
            ("list", "list = 3", ("[[list]]",)),
            ("training", "[grid]\nl1 = [0.1, 0.1]", ("twice",)),
            ("l1", "[grid]\nl1 = [0.1]\n[[list]]\nlabel = 'a'\n[[list]]\nlabel = 'b'\nl1 = 0.5", ("entry 2 ('b')",)),
            ("l1", "[grid]\nl1 = [0.1]\n[[list]]\nl1 = 0.5", ("entry 1",)),
            ("label", "[base]\nlabel = 'a'\n[[list]]\nlabel = 'a'", ("[base]",)),
            ("label", "[base]\nlabel = 'a'", ("[base]",)),
            ("label", "[grid]\nlabel = ['a']\n[[list]]\nlabel = ['a']", ("[grid]",)),
            ("trainings", f"seeds = 200\n[grid]\nepochs = {list(range(1, 100))}", ("10,000", "19,800")),
            ("prune", "[grid]\nnetwork = ['resnet', 'densenet']\n[base]\nprune = 0.1", ("network=densenet",)),
            ("l1", "[base]\nconstraint = 'fixed'\n[grid]\nl1 = [0.0, 0.1]", ("l1=0.1", "'fixed'")),
            ("constraint", "[base]\nconstraint = 'dependent'\nhidden_layers = 1", ("'dependent'",)),
            ("epochs", "[grid]\nepochs = [0]", ("epochs=0",)),
        )
    ],
    *[
        R(ValueError, argument, training(**given), says)
        for argument, given, says in (
            ("data", {"data": "minst"}, ("'mnist'",)),
            ("activation", {"activation": "rleu"}, ("'relu'",)),
            ("optimizer", {"optimizer": "adm"}, ("'adam'",)),
            ("momentum", {"optimizer": "adam", "momentum": 0.9}, ("'adam'",)),
            ("weight_decay", {"optimizer": "rprop", "weight_decay": 0.1}, ("'rprop'",)),
            ("tau_lr", {"optimizer": "lbfgs", "tau_lr": 0.1}, ("'lbfgs'",)),
            ("loss", {"loss": "mse"}, ("'digits'", "'cross_entropy'")),
            ("loss", {"data": "sine", "loss": "cross_entropy"}, ("'sine'", "'mse'")),
            *(("device", {"device": device}, (repr(device), "cpu")) for device in ("tpu", "meta", "mps")),
            ("width", {"width": 10**7}, ("10000000", "hidden_layers = 4")),
            ("width", {"width": 10**30}, ("GiB",)),
            ("width", {"hidden_layers": 100_000, "width": 10_000}, ("hidden_layers",)),
            ("init", {"constraint": "simplex", "init": 0.1}, ("horizon",)),
            ("accumulate", {"batch_size": "auto", "accumulate": 11}, ("10", "11")),
        )
    ],
    *[
        R(ValueError, "setting", partial(Member, name, 0, TrainConfig()))
        for name in ("", "/a", "a//b", "../a", "a/..", "a b", "a/", "ä")
    ],
    R(ValueError, "seed", lambda: Member("a", 0, TrainConfig(seed=1)), ("1", "0")),
]
