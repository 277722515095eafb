"""The parts of a training, each made from its settings."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

from .. import penalties
from .._errors import unknown_name
from ..adaptivity.adaptation import Adaptation
from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..data import Samples
from ..data.catalog import entry_of, samples_of
from ..data.own_data import OwnData
from ..functional import half_mse_loss
from ..nn.activations import make_activation
from ..nn.builders import BUILDERS
from ..nn.convolutional import resnet_v2
from ..nn.integrators import Momentum
from ..nn.learned_order import LearnedOrder
from ..nn.network import TimeVariableNetwork
from ..optim import SteepestDescent, parameter_groups
from ..training.devices import usable_device
from ..training.objective import Loss
from ..training.run_folder import Run
from .config import TrainConfig
from .config_checks import FAST_FROM

# SparseAdam wants sparse gradients, Muon nothing but matrices; no network here has either.
_UNFIT = {"Optimizer", "SparseAdam", "Muon"}
_FEW_SAMPLES = 5000
_SMALLEST_DRAW = 1e-4
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}


class Splits(NamedTuple):
    """The data of a training."""

    train: Samples  # what the network learns from
    validation: Samples  # what it is evaluated on after each epoch; the test data where the set has nothing else
    test: Samples  # what it is evaluated on at the end
    classes: int | None  # number of classes, None for values
    notes: Mapping[str, str] = MappingProxyType({})  # for the run's record, of data of one's own


_LOSSES: dict[str, Loss] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
    "half_mse": half_mse_loss,
}


def make_device(config: TrainConfig) -> torch.device:
    """The device that ``config.device`` means."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device("device", config.device)


def load_splits(config: TrainConfig, run: Run | None = None) -> Splits:
    """The data set ``config.data``, images as they are stored, all else of the floating point type of the training.

    Data that are not those on which ``run`` was trained are refused.
    """
    entry, dtype = entry_of(config.data, config.target, argument="data"), _DTYPES[config.precision]
    notes = entry.notes if isinstance(entry, OwnData) else {}
    key = "digest of the data"
    if run is not None and run.decisions.get(key) != notes.get(key):
        raise ValueError(
            f"data must be what run {str(run.path)!r} was trained on, got {config.data!r}, whose content has changed: "
            "put it back, or train anew"
        )

    def load(split: str) -> Samples:
        samples = samples_of(entry, split, as_uint8=True)
        return Samples(*(t.to(dtype) if t.is_floating_point() else t for t in samples))

    train, test = load("train"), load("test")
    return Splits(train, load("validation") if "validation" in entry.samples else test, test, entry.classes, notes)


def features(splits: Splits) -> tuple[int, int]:
    """Values per sample, and the outputs that the targets ask for."""
    targets = splits.train.targets[0].numel() if splits.classes is None else splits.classes
    return splits.train.inputs[0].numel(), targets


def compile_mode(config: TrainConfig) -> str:
    """When to compile: "auto" is never where a fractional network has fast memory, which compiled steps do not.

    Example:
        >>> compile_mode(TrainConfig(network="fractional", hidden_layers=300))
        'never'
    """
    deep = config.hidden_layers >= FAST_FROM and config.memory == "auto" and len(set(config.widths)) == 1
    fast = config.network == "fractional" and (deep or config.memory == "fast")
    return "never" if fast and config.compile == "auto" else config.compile


def make_network(config: TrainConfig, splits: Splits) -> TimeVariableNetwork:
    """The network, with as many inputs and outputs as the data ask for; its weights follow torch's global generator."""
    make_activation(config.activation)
    if config.network == "resnet-v2":
        return _convolutional(config, splits)
    options: dict[str, Any] = {}
    if config.network == "resnet":
        options["scheme"] = _scheme(config)
    if config.network == "fractional":
        options = {name: getattr(config, name) for name in ("gamma", "memory_from", "memory", "tolerance")}
        options |= {"gamma": LearnedOrder(config.gamma, config.learn_order)} if config.learn_order else {}
    if config.network != "fractional" or config.lower_bound is not None:
        options["lower_bound"] = config.lower_bound
    in_features, out_features = features(splits)
    return BUILDERS[config.network](
        in_features,
        config.width if isinstance(config.width, int) else list(config.width),
        out_features,
        config.hidden_layers,
        activation=config.activation,
        horizon=config.total_time,
        constraint=config.constraint,
        init=_initial_steps(config),
        skips=config.skips,
        dtype=_DTYPES[config.precision],
        **options,
    )


def _scheme(config: TrainConfig) -> str | Momentum:
    return Momentum(config.epsilon) if config.scheme == "momentum" else config.scheme


def _convolutional(config: TrainConfig, splits: Splits) -> TimeVariableNetwork:
    shape = tuple(splits.train.inputs.shape[1:])
    if len(shape) != 3 or splits.classes is None:
        raise ValueError(
            f"network must not be 'resnet-v2' with data {config.data!r}, whose inputs have shape {shape}: it is for "
            "images (channels, height, width) with classes"
        )
    return resnet_v2(
        3 if config.blocks_per_stage is None else config.blocks_per_stage,
        splits.classes,
        shape[0],
        (16, 32, 64) if config.channels is None else config.channels,
        scheme=_scheme(config),
        activation=config.activation,
        stem_stride=config.stem_stride,
        horizon=config.total_time,
        constraint=config.constraint,
        lower_bound=config.lower_bound,
        init=_initial_steps(config),
        dtype=_DTYPES[config.precision],
    )


def make_pruning(config: TrainConfig) -> Pruning | None:
    """The policy of pruning, or None for none."""
    if config.prune_blocks is not None:
        by = Pruning.by if config.prune_by is None else config.prune_by
        return Pruning(target_blocks=config.prune_blocks, by=by)
    if config.prune is None:
        return None
    return Pruning(config.prune, config.prune_every)


def make_refinement(config: TrainConfig) -> Refinement | None:
    """The policy of refinement, or None for none."""
    if config.refine is None:
        return None
    return Refinement(config.refine, until=Refinement.until if config.refine_until is None else config.refine_until)


def check_room(config: TrainConfig, policies: Adaptation) -> None:
    """Refuse targets for which the training is too short, before there is a run."""
    try:
        policies.begin(None)
    except ValueError as error:
        if config.refine is None:
            raise
        raise ValueError(
            f"refine must be a number of layers that the training leaves room for, got {config.refine} ({error}): ask "
            "for fewer, train for more epochs, or choose a later refine_until"
        ) from error


def _initial_steps(config: TrainConfig) -> float | list[float] | None:
    """The time steps at the start; random ones leave the random weights as they are."""
    if config.init == "uniform":
        bound = config.lower_bound or 0.0
        draws = torch.rand(config.hidden_layers, generator=torch.Generator().manual_seed(config.seed)).tolist()
        return [bound + (1.0 - bound) * max(draw, _SMALLEST_DRAW) for draw in draws]
    return list(config.init) if isinstance(config.init, tuple) else config.init


def batch_size(config: TrainConfig, samples: int) -> int:
    """The samples per iteration that the settings mean; a small set gets small batches, for more of them.

    Example:
        >>> [batch_size(TrainConfig(batch_size=size), 60000) for size in ("auto", "full", 500)]
        [100, 60000, 500]
    """
    size = config.batch_size
    if size == "full":
        size = samples
    elif size == "auto":
        size = 10 if samples < _FEW_SAMPLES else 100
    if config.accumulate > size:
        raise ValueError(f"accumulate must not exceed the batch size {size}, got {config.accumulate}: set batch_size")
    return size


def make_loss(config: TrainConfig, *, classes: bool) -> tuple[str, Loss]:
    """The loss and its name."""
    name = config.loss if config.loss != "auto" else "cross_entropy" if classes else "mse"
    if classes != (name == "cross_entropy"):
        fitting = "'cross_entropy'" if classes else "'mse' or 'half_mse'"
        kind = "classes" if classes else "values"
        raise ValueError(
            f"loss must be 'auto' or {fitting} with data {config.data!r}, whose targets are {kind}, got {name!r}"
        )
    return name, _LOSSES[name]


def make_penalties(config: TrainConfig, loss: Loss | None = None) -> list[penalties.Penalty]:
    """The penalties with a weight."""
    weighted: list[tuple[float, Callable[[float], penalties.Penalty]]] = [
        (config.l1, lambda weight: penalties.L1(weight, config.proximal)),
        (config.l2, penalties.L2),
        (config.elastic_net, penalties.ElasticNet),
        (config.time_horizon, lambda weight: penalties.TimeHorizon(weight=weight)),
        (config.weight_elastic_net, penalties.WeightElasticNet),
        (config.group_lasso, penalties.GroupLasso),
        (config.bias_ordering, penalties.BiasOrdering),
    ]
    found = [make(weight) for weight, make in weighted if weight]
    if config.stage_cost or config.depth_losses:
        found.append(_stage_cost(config, _LOSSES[config.loss] if loss is None else loss))
    return found


def _stage_cost(config: TrainConfig, loss: Loss) -> penalties.StageCost:
    first = 0 if config.network == "resnet-v2" else 1
    factors = config.stage_factors
    return penalties.StageCost(
        config.stage_cost,
        loss,
        schedule=config.stage_cost_schedule,
        factors=None if factors is None else dict(enumerate(factors, start=first)),
        terminal_only=config.depth_losses,
    )


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser of torch.optim, or steepest descent, with the time steps in a group of their own.

    L-BFGS has one group. On full batches it takes one iteration per step, its size by the strong Wolfe conditions.
    """
    known: dict[str, Callable[..., torch.optim.Optimizer]] = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in _UNFIT
    }
    known["steepest_descent"] = SteepestDescent
    kind = known.get(config.optimizer.lower())
    if kind is None:
        raise unknown_name("optimizer", config.optimizer, known)
    takes = inspect.signature(kind).parameters
    for name in ("momentum", "weight_decay"):
        if getattr(config, name) and name not in takes:
            raise ValueError(f"{name} must be left out with optimizer {config.optimizer!r}, which does not take it")
    if kind is torch.optim.LBFGS:
        if config.tau_lr is not None:
            raise ValueError("tau_lr must be left out with optimizer 'lbfgs', which has one learning rate for all")
        search: dict[str, Any] = (
            {"max_iter": 1, "line_search_fn": "strong_wolfe"} if config.batch_size == "full" else {}
        )
        return kind(model.parameters(), lr=config.lr, **search)
    groups = parameter_groups(model, config.lr, config.tau_lr, config.weight_decay)
    options: dict[str, Any] = {"momentum": config.momentum} if "momentum" in takes else {}
    return kind(groups, lr=config.lr, **options)


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, iterations: int) -> LRScheduler | None:
    """The scheduler of the learning rates, or None for constant ones."""
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs)
    if config.scheduler == "step":
        return StepLR(optimizer, step_size=-(-config.epochs // 3), gamma=0.1)
    if config.scheduler == "onecycle":
        largest = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=largest, total_steps=iterations, cycle_momentum=False)
    return None
