"""One table of bad inputs: the error, the argument that its message names, the call, and what the message says.

No sentence is pinned: `says` holds facts that stand somewhere in the message, such as the value that was got, its
place, or the nearest name. Calls on a model check that it is afterwards what it was.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import taulearn
from small_networks import assert_same_bits, network as small
from taulearn import (
    Criterion,
    Pruning,
    Refinement,
    TimeSteps,
    adjoint,
    attach,
    data,
    diagnostics,
    prune,
    refine,
    unwrap,
    wrap,
)
from taulearn.adaptivity.estimate import MEASURED, Power
from taulearn.calibration import recalibrate_
from taulearn.caputo import ExponentialKernel, derivative, exponential_memory, l1_weights, solve
from taulearn.data import maxwell
from taulearn.data.synthetic import nested_spheres
from taulearn.depth.truncate import truncate
from taulearn.depth.wrapped_states import intermediate_outputs
from taulearn.export import export_model
from taulearn.functional import half_mse_loss
from taulearn.nn import (
    ComposedSkips,
    Fractional,
    IdentitySkips,
    Residual,
    SmoothReLU,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
    resnet_v2,
)
from taulearn.nn.builders import BUILDERS
from taulearn.nn.time_steps import time_steps_of
from taulearn.optim import SteepestDescent, parameter_groups, register_projection
from taulearn.penalties import (
    L1,
    L2,
    BiasOrdering,
    Distillation,
    ElasticNet,
    GroupLasso,
    StageCost,
    TimeHorizon,
    WeightElasticNet,
)
from taulearn.report import figures, write_html
from taulearn.report.catalogue import write_catalogue
from taulearn.report.records import running_mean
from taulearn.training import History
from training.support import digits, network, sgd
from wrapping.hosts import sequential

NAN, INF = math.nan, math.inf
DOUBLE = torch.float64


class Refusal(NamedTuple):
    """A call that must raise the error, with the argument's name and these facts in the message."""

    error: type[Exception]
    argument: str
    call: Callable[[], object]
    says: tuple[str, ...] = ()


R = Refusal


def each(error: type[Exception], argument: str, call: Callable[[Any], object], *values: Any) -> list[Refusal]:
    """One row a value, which the message repeats."""
    return [R(error, argument, partial(call, value), (repr(value),)) for value in values]


def on(make: Callable[[], nn.Module], act: Callable[[Any], object]) -> Callable[[], None]:
    """The call of `act` on a fresh model, which must be left as it was."""

    def look(model: nn.Module) -> list[Any]:
        names = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        return [names, [list(vars(m)) for m in model.modules()], [m.training for m in model.modules()]]

    def call() -> None:
        model = make()
        before, state = look(model), copy.deepcopy(model.state_dict())
        try:
            act(model)
        finally:
            assert look(model) == before
            assert_same_bits(dict(model.state_dict()), dict(state))

    return call


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


TAU = torch.ones(3, dtype=DOUBLE)
KERNEL = ExponentialKernel(0.5, 0.5, 4.0, 1e-3)


def slope(t: Tensor, y: Tensor) -> Tensor:
    return y


FORMULAS = [
    R(ValueError, "target", lambda: half_mse_loss(torch.zeros(4, 1), torch.zeros(4)), ("(4, 1)", "(4,)")),
    *each(ValueError, "gamma", lambda gamma: l1_weights(TAU, gamma), 0, 1, -0.5, 1.5, NAN),
    *each(TypeError, "gamma", lambda gamma: l1_weights(TAU, gamma), "a", None, [0.5]),
    R(TypeError, "gamma", lambda: l1_weights(TAU, torch.tensor(0.5)), ("tensor",)),
    *each(TypeError, "gamma", lambda gamma: solve(slope, torch.zeros(2), TAU, gamma), "a", None, [0.5]),
    *[
        R(ValueError, "tau", partial(call, torch.tensor([1.0, 1.0, value, -1.0])), ("tau[2]", "lower bound"))
        for value in (0.0, -1.0, NAN, INF)
        for call in (lambda tau: l1_weights(tau, 0.5), lambda tau: solve(slope, torch.ones(()), tau, 0.5))
    ],
    *[
        R(TypeError, "tau", partial(call, tau), (type(tau).__name__, "torch.as_tensor"))
        for tau in ([0.1, 0.1], 0.5, None)
        for call in (lambda tau: l1_weights(tau, 0.5), lambda tau: derivative(torch.zeros(3), tau, 0.5))
    ],
    # They gave NaN.
    *[
        R(ValueError, "tau", partial(l1_weights, torch.tensor(steps, dtype=DOUBLE), 0.5), ("orders of magnitude",))
        for steps in ([1e200, 1e-200], [1.0, 1e-160], [1e308, 1e308])
    ],
    R(ValueError, "tau", lambda: l1_weights(TAU[None], 0.5), ("(1, 3)",)),
    R(ValueError, "tau", lambda: l1_weights(TAU[:0], 0.5), ("(0,)",)),
    R(TypeError, "tau", lambda: l1_weights(TAU.long(), 0.5), ("torch.int64",)),
    R(ValueError, "side", lambda: l1_weights(TAU, 0.5, "rigth"), ("'rigth'", "'right'")),
    R(ValueError, "y", lambda: derivative(torch.ones(3), TAU, 0.5), ("4", "(3,)")),
    R(TypeError, "y", lambda: derivative([1.0] * 4, TAU, 0.5), ("list",)),
    R(TypeError, "y0", lambda: solve(slope, 1.0, TAU, 0.5), ("float",)),
    R(ValueError, "f", lambda: solve(lambda t, y: y.sum(), torch.ones(2), TAU, 0.5), ("(2,)", "()")),
    *[
        R(TypeError, "f", partial(solve, lambda t, y, value=value: value, torch.zeros(2), TAU, 0.5), (kind, "(2,)"))
        for value, kind in ((None, "NoneType"), (1.0, "float"), ([1.0, 1.0], "list"))
    ],
    R(ValueError, "gamma", lambda: ExponentialKernel(1.0, 1, 2, 1e-3)),
    R(ValueError, "tau_min", lambda: ExponentialKernel(0.5, 0, 2, 1e-3)),
    R(ValueError, "horizon", lambda: ExponentialKernel(0.5, 1, 0.5, 1e-3)),
    R(ValueError, "tolerance", lambda: ExponentialKernel(0.5, 1, 2, 0)),
    R(ValueError, "max_nodes", lambda: ExponentialKernel(0.5, 1.0, 2.0, 1e-3, max_nodes=0)),
    R(ValueError, "tolerance", lambda: ExponentialKernel(0.5, 1e-3, 1.0, 1e-10, max_nodes=8), ("1e-10", "8")),
    R(ValueError, "differences", lambda: exponential_memory(torch.ones(4), TAU, KERNEL), ("3", "(4,)")),
    R(ValueError, "tau", lambda: exponential_memory(TAU, torch.tensor([1.0, 0.1, 1.0]), KERNEL), ("0.5", "0.1")),
    R(ValueError, "tau", lambda: exponential_memory(TAU, 2 * TAU, KERNEL), ("<= 4",)),
]

STEPS = [
    *each(ValueError, "num_steps", TimeSteps, 0, -3, 2.0, True, "4"),
    *each(ValueError, "horizon", lambda horizon: TimeSteps(2, horizon=horizon), 0.0, -1.0, NAN, INF, "a"),
    *each(ValueError, "lower_bound", lambda bound: TimeSteps(2, lower_bound=bound), -0.1, NAN, INF, "a"),
    R(ValueError, "constraint", lambda: TimeSteps(2, constraint="simplx"), ("'simplx'", "'simplex'")),
    *[
        R(ValueError, "lower_bound", partial(TimeSteps, 2, constraint=constraint, lower_bound=0.6), ("0.6 * 2", "1.0"))
        for constraint in ("simplex", "dependent")
    ],
    *each(ValueError, "init", lambda init: TimeSteps(3, init=init), "a"),
    R(ValueError, "init", lambda: TimeSteps(2, init=[0.5, 0.5, 0.5]), ("(3,)",)),
    R(ValueError, "init", lambda: TimeSteps(2, init=[[0.5, 0.5]]), ("(1, 2)",)),
    R(ValueError, "init", lambda: TimeSteps(2, init=NAN), ("nan",)),
    R(ValueError, "init", lambda: TimeSteps(2, init=[0.5, 0.01], lower_bound=0.1), ("0.1", "[0.5, 0.01]")),
    R(ValueError, "init", lambda: TimeSteps(2, init=[2.0, -1.0], constraint="simplex"), ("[2.0, -1.0]",)),
    *[
        R(ValueError, "init", partial(TimeSteps, 2, init=[0.5, 0.6], constraint=constraint), ("horizon = 1.0", "1.1"))
        for constraint in ("simplex", "dependent")
    ],
    R(TypeError, "positional", lambda: TimeSteps(2, 1.0)),
    R(ValueError, "indices", on(lambda: TimeSteps(4, constraint="dependent"), lambda s: s.keep_([0, 1])), ("3",)),
    R(TypeError, "model", lambda: time_steps_of(nn.Linear(1, 1)), ("Linear",)),
    R(TypeError, "model", lambda: parameter_groups(nn.Linear(1, 1), lr=0.1), ("Linear",)),
]


def images(number: int = 5, channels: int = 1, **options: Any) -> Tensor:
    return torch.ones(number, channels, 7, 7, **{"dtype": DOUBLE} | options)


def convolutional() -> TimeVariableNetwork:
    return resnet_v2((2, 3), 4, 1, (2, 3), dtype=DOUBLE)


PARTS: Any = [nn.Tanh(), nn.Tanh()], nn.Tanh(), Residual()
FIVE_SKIPS = IdentitySkips(5, from_input=False)

NETWORKS = [
    *[
        R(ValueError, argument, partial(build, *sizes), (repr(got),))
        for build in BUILDERS.values()
        for argument, sizes, got in (
            ("in_features", (0, 3, 1, 2), 0),
            ("in_features", (2.0, 3, 1, 2), 2.0),
            ("width", (2, 0, 1, 2), 0),
            ("width", (2, [3, -1], 1, 2), -1),
            ("width", (2, [3, 3, 3], 1, 2), [3, 3, 3]),
            ("out_features", (2, 3, 0, 2), 0),
            ("hidden_layers", (2, 3, 1, 0), 0),
            ("hidden_layers", (2, 3, 1, True), True),
        )
    ],
    *[R(ValueError, "skips", partial(build, 2, 3, 1, 2, skips="padd"), ("'padd'",)) for build in BUILDERS.values()],
    *[
        R(ValueError, "constraint", partial(build, 2, 3, 1, 2, constraint="fixd"), ("'fixd'", "'fixed'"))
        for build in BUILDERS.values()
    ],
    *[R(TypeError, "activations", partial(build, 2, 3, 1, 2, activations="relu")) for build in BUILDERS.values()],
    *[R(TypeError, "positional", partial(build, 2, 3, 1, 2, "relu")) for build in BUILDERS.values()],
    *[
        R(ValueError, "inputs", partial(build(12, 3, 2, 2), torch.zeros(shape)), ("12", str(shape), "in_features"))
        for build in BUILDERS.values()
        for shape in ((5, 11), (5, 3, 4, 2), (12,))
    ],
    *[
        R(TypeError, "inputs", partial(build(2, 3, 1, 2, dtype=own), torch.ones(1, 2, dtype=got)), (f"{own}", f"{got}"))
        for build in BUILDERS.values()
        for own, got in ((torch.float32, DOUBLE), (DOUBLE, torch.float32))
    ],
    *[
        R(TypeError, "inputs", partial(resnet(2, 3, 1, 2), torch.zeros(1, 2, dtype=got)), (str(got), "inputs.float()"))
        for got in (torch.uint8, torch.int64, torch.bool)
    ],
    *each(ValueError, "eta", SmoothReLU, 0.0, -1.0, NAN),
    *[
        R(ValueError, "activation", partial(resnet, 3, 4, 2, 3, activation=got), (repr(got), repr(nearest)))
        for got, nearest in (("tahn", "tanh"), ("gleu", "gelu"))
    ],
    *each(ValueError, "lower_bound", lambda b: fractional_dnn(2, 3, 1, 2, lower_bound=b), None, 0.0, -1.0, NAN),
    *each(ValueError, "gamma", lambda g: fractional_dnn(2, 3, 1, 2, gamma=g), 0.0, 1.0, -0.5, 1.5, NAN, "a", None),
    *each(ValueError, "gamma", Fractional, 0.0, 1.0, -0.5, 1.5, NAN),
    *each(ValueError, "memory_from", lambda first: Fractional(memory_from=first), 2),
    R(ValueError, "memory", lambda: Fractional(memory="fats"), ("'fats'", "'fast'")),
    *each(ValueError, "tolerance", lambda t: fractional_dnn(2, 3, 1, 2, tolerance=t), 0.0, 1.0, -1.0, NAN, "a"),
    R(ValueError, "time_steps", lambda: TimeVariableNetwork(*PARTS, TimeSteps(3)), ("3", "2")),
    R(ValueError, "skips", lambda: TimeVariableNetwork(*PARTS, TimeSteps(2), FIVE_SKIPS), ("5", "2")),
    R(ValueError, "blocks_per_stage", lambda: resnet_v2((2, 2), 10, 3, (16, 32, 64)), ("3 widths",)),
    R(ValueError, "blocks_per_stage", lambda: resnet_v2([], 10, 3, 4), ("1 widths",)),
    R(ValueError, "blocks_per_stage", lambda: resnet_v2((2, 0), 10, 3, (4, 4)), ("0",)),
    R(ValueError, "widths", lambda: resnet_v2(2, 10, 3, (4, -1)), ("-1",)),
    R(ValueError, "widths", lambda: resnet_v2(2, 10, 3, ()), ("none",)),
    *each(ValueError, "widths", lambda widths: resnet_v2(2, 10, 3, widths), 4.0, None, True),
    R(ValueError, "num_classes", lambda: resnet_v2(2, 0, 3, 4), ("0",)),
    R(ValueError, "in_channels", lambda: resnet_v2(2, 10, 1.5, 4), ("1.5",)),
    R(ValueError, "inputs", on(convolutional, lambda model: model(images(channels=3))), ("(5, 3, 7, 7)",)),
    R(ValueError, "inputs", on(convolutional, lambda model: model(images().flatten(1))), ("(5, 49)", "in_channels")),
    R(TypeError, "inputs", on(convolutional, lambda model: model(images(dtype=torch.uint8))), ("torch.uint8",)),
    R(TypeError, "inputs", on(convolutional, lambda model: model(images(dtype=torch.float32))), (str(DOUBLE),)),
]


def classifier() -> TimeVariableNetwork:
    return resnet(9, 6, 3, 5, dtype=DOUBLE)


def normalised() -> TimeVariableNetwork:
    return resnet_v2((2, 2), 3, 1, (4, 6), dtype=DOUBLE)


def without_head() -> TimeVariableNetwork:
    model = normalised()
    model.head = nn.Identity()
    return model


def one_output() -> TimeVariableNetwork:
    return resnet(9, 6, 1, 4, dtype=DOUBLE)


NINE = torch.ones(40, 1, 3, 3, dtype=DOUBLE)
NONE = NINE[:0]
CLASSES = torch.zeros(40, dtype=torch.long)
CONFIDENCES = ("0.9", None, 0.0, -0.5, 1.5, NAN)
early_exit = diagnostics.early_exit

EARLY_EXIT = [
    *each(ValueError, "confidence", lambda c: on(classifier, lambda m: m.predict(NINE, c))(), *CONFIDENCES),
    *each(
        ValueError,
        "thresholds",
        lambda c: on(classifier, lambda m: early_exit(m, NINE, CLASSES, (0.5, c)))(),
        *CONFIDENCES,
    ),
    R(TypeError, "thresholds", on(classifier, lambda m: early_exit(m, NINE, CLASSES, 0.9)), ("0.9",)),
    R(ValueError, "batch_size", on(classifier, lambda m: early_exit(m, NINE, CLASSES, batch_size=0)), ("0",)),
    R(TypeError, "targets", on(classifier, lambda m: early_exit(m, NINE, NINE)), ("torch.float64",)),
    R(ValueError, "targets", on(classifier, lambda m: early_exit(m, NINE, CLASSES[:3])), ("3", "40")),
    R(TypeError, "depths", on(classifier, lambda m: m.predict(NINE, 0.9, depths=2)), ("2",)),
    R(ValueError, "depths", on(classifier, lambda m: m.predict(NINE, 0.9, depths=["a", 7])), ("1 .. 5", "['a', 7]")),
    R(ValueError, "depths", on(classifier, lambda m: m.predict(NINE, 0.9, depths=[7, 2, 0])), ("1 .. 5", "[0, 7]")),
    # The softmax over one output is 1, which is no confidence.
    R(ValueError, "outputs", on(one_output, lambda m: m.predict(NINE, 0.9)), ("(40, 1)",)),
    R(ValueError, "outputs", on(one_output, lambda m: early_exit(m, NINE, CLASSES)), ("(40, 1)",)),
    R(ValueError, "outputs", on(without_head, lambda m: m.predict(NINE, 0.9)), ("(40, 6",)),
    R(TypeError, "statistics", on(normalised, lambda m: m.predict(NINE, 0.6, statistics=[1])), ("list",)),
    *[
        R(ValueError, "statistics", on(normalised, lambda m, got=got: m.predict(NINE, 0.6, statistics=got)))
        for got in ({1: "a"}, {1: [3]}, {1: 3}, {"1": []}, {-1: []})
    ],
]


def three() -> TimeVariableNetwork:
    return resnet(3, 4, 2, 3, dtype=DOUBLE)


def three_of(builder: Callable[..., TimeVariableNetwork], **options: Any) -> Callable[[], TimeVariableNetwork]:
    return lambda: builder(3, 4, 2, 3, dtype=DOUBLE, **options)


def without_layers() -> Any:
    model = nn.Linear(2, 2)
    model.time_steps = TimeSteps(2)
    return model


def with_part(**parts: nn.Module) -> Callable[[], TimeVariableNetwork]:
    def make() -> TimeVariableNetwork:
        model = resnet(3, [4, 3], 2, 2, skips="learned", dtype=DOUBLE)
        for name, part in parts.items():
            setattr(model, name, part)
        return model

    return make


def with_step_of_zero() -> TimeVariableNetwork:
    model = fractional_dnn(3, 4, 2, 3, dtype=DOUBLE)
    with torch.no_grad():
        model.time_steps.values[1] = 0.0
    return model


def copying() -> TimeVariableNetwork:
    """Whose states do not depend on each other."""

    class Copies(TimeVariableNetwork):
        def states(self, x: Tensor) -> list[Tensor]:
            return [y.clone() for y in super().states(x)]

    model = three()
    return Copies(model.layers, model.head, model.scheme, model.time_steps, model.skips)


X3, Y2 = torch.ones(6, 3, dtype=DOUBLE), torch.ones(6, 2, dtype=DOUBLE)
profile, propagation = diagnostics.depth_profile, diagnostics.gradient_propagation
every_loss = nn.MSELoss(reduction="none")

DIAGNOSTICS = [
    R(ValueError, "states", on(three, lambda m: m.intermediate_outputs(X3, states=m.states(X3)[:2])), ("y_3", "2")),
    R(TypeError, "network", lambda: profile(nn.Linear(3, 2), X3, Y2, mse_loss), ("Linear",)),
    R(TypeError, "network", lambda: profile(compiled(three()), X3, Y2, mse_loss), ("torch.compile",)),
    R(ValueError, "targets", on(three, lambda m: profile(m, X3, CLASSES[:5], cross_entropy)), ("5", "6")),
    R(ValueError, "loss", on(three, lambda m: profile(m, X3, Y2, every_loss))),
    R(TypeError, "loss", on(three, lambda m: profile(m, X3, Y2, lambda output, target: 1.0)), ("float",)),
    *each(ValueError, "batch_size", lambda size: profile(three(), X3, Y2, mse_loss, batch_size=size), 0, -1, 1.5),
    *each(ValueError, "tolerance", lambda t: profile(three(), X3, Y2, mse_loss).smallest(t), -0.1, NAN, INF),
    R(ValueError, "loss", lambda: profile(three(), X3 * NAN, Y2, mse_loss).smallest(0.1), ("nan",)),
    R(ValueError, "calibration", on(normalised, lambda m: profile(m, NINE, CLASSES, every_loss, calibration=NONE))),
    R(ValueError, "calibration", on(normalised, lambda m: early_exit(m, NINE, CLASSES, calibration=NONE))),
    R(ValueError, "inputs", on(normalised, lambda m: diagnostics.depth_statistics(m, NONE))),
    *[
        R(ValueError, "inputs", on(normalised, partial(lambda m, given: recalibrate_(m, given), given=given)))
        for given in (NONE, (NONE,), {"x": NONE})
    ],
    R(ValueError, "within", on(normalised, lambda m: recalibrate_(m, NINE, within=normalised().head)), ("PooledHead",)),
    R(ValueError, "within", on(normalised, lambda m: recalibrate_(m, NINE, within="head")), ("'head'",)),
    R(ValueError, "method", on(three, lambda m: propagation(m, X3, method="product")), ("'products'",)),
    R(ValueError, "steps", on(three, lambda m: propagation(m, X3, steps=0)), ("0",)),
    R(ValueError, "inputs", on(three, lambda m: propagation(m, X3[0])), ("(3,)",)),
    R(TypeError, "model", lambda: propagation(nn.Linear(3, 3), X3), ("Linear",)),
    R(TypeError, "network", lambda: propagation(without_layers(), X3), ("states(x)",)),
    R(ValueError, "network", on(copying, lambda m: propagation(m, X3)), ("y_1", "y_3")),
    R(
        ValueError,
        "part",
        lambda: diagnostics.plot_propagation(propagation(three(), X3), part="weights"),
        ("'weight'",),
    ),
    R(ValueError, "results", lambda: diagnostics.plot_propagation({})),
    R(ValueError, "panels", lambda: diagnostics.propagation_figure({})),
    R(TypeError, "model", lambda: diagnostics.summary(nn.Linear(2, 2)), ("Linear",)),
    R(TypeError, "model", lambda: diagnostics.summary(without_layers()), ("layers",)),
]

choose = diagnostics.choose_layers

DEPTH = [
    *each(ValueError, "depth", lambda depth: on(three, lambda m: truncate(m, depth))(), 0, -1, 1.5, True),
    R(ValueError, "depth", on(three, lambda m: truncate(m, 4)), ("3", "4")),
    R(ValueError, "model", on(three_of(resnet, constraint="dependent"), lambda m: truncate(m, 2)), ("'dependent'",)),
    R(TypeError, "model", lambda: truncate(compiled(three()), 1), ("torch.compile",)),
    R(TypeError, "model", lambda: truncate(nn.Linear(1, 1), 1), ("Linear",)),
    R(ValueError, "model", on(three, lambda m: torch.inference_mode()(truncate)(m, 2)), ("inference_mode",)),
    *each(
        ValueError,
        "tolerance",
        lambda t: on(three, lambda m: choose(m, X3, Y2, mse_loss, tolerance=t))(),
        *(None, "0.1", -1.0, NAN),
    ),
    R(ValueError, "network", on(three_of(densenet), lambda m: choose(m, X3, Y2, mse_loss, by_stage=True))),
    *[
        R(error, argument, on(make, partial(choose, inputs=x, targets=Y2, loss=mse_loss, by_stage=by_stage)), says)
        for by_stage in (False, True)
        for error, argument, make, x, says in (
            (ValueError, "loss", three, X3 * NAN, ("nan",)),
            (ValueError, "network", three_of(resnet, constraint="dependent"), X3, ("'dependent'",)),
        )
    ],
    R(ValueError, "model", lambda: intermediate_outputs(nn.Linear(2, 2), torch.ones(1, 2)), ("Linear",)),
]


def adjoint_of(make: Callable[[], Any], x: Tensor = X3, loss: Any = mse_loss, **options: Any) -> Callable[[], None]:
    return on(make, lambda model: adjoint.gradients(model, x, Y2, loss, **options))


ADJOINT = [
    R(ValueError, "method", adjoint_of(three, method="optimise-then-discretise"), ("'optimize-then-discretize'",)),
    *[
        R(ValueError, "network", on(three_of(builder), lambda m, call=call: call(m, X3, Y2, mse_loss)), (repr(name),))
        for builder, name in ((feedforward, "feedforward"), (densenet, "dense"))
        for call in (adjoint.gradients, adjoint.deviation)
    ],
    R(TypeError, "network", adjoint_of(lambda: nn.Linear(3, 2)), ("Linear",)),
    R(ValueError, "network", adjoint_of(three_of(resnet, activation="prelu")), ("PReLU", "layer 0")),
    *[
        R(ValueError, "network", adjoint_of(three_of(resnet, activation=activation)), (name,))
        for activation, name in ((nn.Softmax(dim=-1), "Softmax"), (nn.RReLU(), "RReLU"))
    ],
    R(ValueError, "layers", adjoint_of(with_part(layers=nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])))),
    R(ValueError, "head", adjoint_of(with_part(head=nn.Sequential(nn.Linear(3, 2))))),
    R(ValueError, "stem", adjoint_of(with_part(stem=nn.Linear(3, 3)))),
    R(ValueError, "skips", adjoint_of(with_part(skips=ComposedSkips([None, nn.Linear(4, 3)]))), ("Linear",)),
    R(ValueError, "skips", adjoint_of(with_part(skips=ComposedSkips([None, nn.Conv1d(1, 1, 1)]))), ("Conv1d",)),
    R(ValueError, "tau", adjoint_of(with_step_of_zero), ("tau[1] = 0",)),
    R(ValueError, "inputs", adjoint_of(three, torch.ones(6, 4, dtype=DOUBLE))),
    R(ValueError, "loss", adjoint_of(three, loss=every_loss), ("(6, 2)",)),
]


def at_half(schedule: Any) -> None:
    StageCost(1.0, mse_loss, schedule=schedule).start_epoch(0, 1)


def distil(model: Any, teacher: nn.Module, **options: Any) -> Tensor:
    return Distillation(teacher, 1.0, **options)(model, X3, outputs=model(X3))


def without_the_second() -> nn.Module:
    model = three()
    prune(model, keep=[0, 2])
    return model


PENALTIES = [
    *[
        refusal
        for make, argument in (
            (L1, "alpha"),
            (L2, "weight"),
            (ElasticNet, "weight"),
            (WeightElasticNet, "weight"),
            (GroupLasso, "weight"),
            (BiasOrdering, "beta"),
            (lambda weight: TimeHorizon(weight=weight), "weight"),
            (lambda weight: StageCost(weight, mse_loss), "weight"),
        )
        for refusal in each(ValueError, argument, make, -1.0, NAN, "a", None)
    ],
    *each(ValueError, "horizon", TimeHorizon, 0.0, -2.0, NAN, "a"),
    R(TypeError, "model", lambda: L1(1.0)(nn.Linear(1, 1)), ("Linear",)),
    R(TypeError, "model", lambda: GroupLasso(1.0)(without_layers()), ("Linear",)),
    R(TypeError, "loss", lambda: StageCost(1.0, "cross_entropy"), ("'cross_entropy'",)),
    R(ValueError, "schedule", lambda: StageCost(1.0, mse_loss, schedule="linear"), ("'linear'", "'falling'")),
    *each(TypeError, "schedule", lambda schedule: StageCost(1.0, mse_loss, schedule=schedule), 0.5, None, ["rising"]),
    R(TypeError, "factors", lambda: StageCost(1.0, mse_loss, factors=[1.0, 2.0]), ("[1.0, 2.0]",)),
    R(ValueError, "factors", lambda: StageCost(1.0, mse_loss, factors={2: -1.0}), ("[2]", "-1.0")),
    *[R(ValueError, "factors", partial(StageCost, 1.0, mse_loss, factors={key: 2.0})) for key in ("1", -1)],
    R(ValueError, "schedule", lambda: at_half(lambda progress: -progress), ("-0.5", "0.5")),
    R(ValueError, "schedule", lambda: at_half(lambda progress: "a"), ("'a'", "0.5")),
    R(ValueError, "loss", on(three, lambda m: StageCost(1.0, every_loss)(m, X3, Y2)), ("(6, 2)",)),
    R(TypeError, "loss", on(three, lambda m: StageCost(1.0, lambda output, target: 1.0)(m, X3, Y2)), ("float",)),
    R(TypeError, "model", lambda: StageCost(1.0, mse_loss)(compiled(three()), X3, Y2), ("torch.compile",)),
    R(TypeError, "model", lambda: StageCost(1.0, mse_loss)(nn.Linear(1, 1), X3, Y2), ("Linear",)),
    R(ValueError, "inputs", on(three, StageCost(1.0, mse_loss)), ("targets", "None")),
    *each(TypeError, "teacher", lambda teacher: Distillation(teacher, 1.0), None, "bert"),
    R(TypeError, "teacher", lambda: Distillation(nn.Linear, 1.0), ("Linear",)),  # type: ignore[arg-type]
    *each(ValueError, "weight", lambda weight: Distillation(nn.Linear(1, 2), weight), -1.0, NAN, INF, "a lot", None),
    *each(ValueError, "temperature", lambda t: Distillation(nn.Linear(1, 2), 1.0, t), 0, -1.0, NAN, INF, "hot"),
    *each(ValueError, "hidden", lambda hidden: Distillation(nn.Linear(1, 2), 1.0, hidden=hidden), -1.0, NAN, "some"),
    R(TypeError, "teacher", lambda: Distillation(nn.Linear(1, 2), 1.0, hidden=1.0), ("Linear", "taulearn.wrap")),
    R(ValueError, "inputs", on(three, lambda m: Distillation(three(), 1.0)(m, X3)), ("outputs", "None")),
    R(ValueError, "teacher", on(three, lambda m: distil(m, m)), ("copy",)),
    R(ValueError, "teacher", on(three, lambda m: distil(m, resnet(3, 4, 5, 3, dtype=DOUBLE))), ("2", "5")),
    R(
        ValueError,
        "teacher",
        on(three, lambda m: distil(m, nn.Sequential(three(), nn.Unflatten(0, (3, 2))))),
        ("(6, 2)",),
    ),
    R(ValueError, "teacher", on(three, lambda m: distil(m, without_the_second(), hidden=1.0)), ("[0, 1, 2]", "[1]")),
    R(
        ValueError,
        "teacher",
        on(three, lambda m: distil(m, resnet(3, 5, 2, 3, dtype=DOUBLE), hidden=1.0)),
        ("(6, 4)", "(6, 5)"),
    ),
    R(TypeError, "outputs", on(three, lambda m: Distillation(three(), 1.0)(m, X3, outputs=[1.0])), ("list",)),
    R(
        TypeError,
        "teacher",
        on(three, lambda m: Distillation(nn.Linear(3, 2), 1.0)(m, {"x": X3}, outputs=m(X3))),
        ("Linear", "'x'"),
    ),
    R(ValueError, "outputs", on(three, lambda m: Distillation(three(), 1.0)(m, X3, outputs=Y2[:, :1])), ("(6, 1)",)),
]

WEIGHT = nn.Parameter(torch.ones(2))

OPTIM = [
    *each(ValueError, "lr", lambda lr: SteepestDescent([WEIGHT], lr=lr), 0.0, NAN),
    *each(ValueError, "decrease", lambda decrease: SteepestDescent([WEIGHT], decrease=decrease), 1.0),
    *each(ValueError, "shrink", lambda shrink: SteepestDescent([WEIGHT], shrink=shrink), 1.0),
    *each(ValueError, "growth", lambda growth: SteepestDescent([WEIGHT], growth=growth), 0.9),
    *each(ValueError, "max_trials", lambda trials: SteepestDescent([WEIGHT], max_trials=trials), 0),
    R(ValueError, "lr", lambda: SteepestDescent([{"params": [WEIGHT], "lr": -1.0}]), ("-1.0",)),
    R(TypeError, "optimizer", on(small, lambda m: register_projection("a", m)), ("'a'",)),
    R(TypeError, "optimizer", on(small, lambda m: register_projection([sgd(m), sgd(m)], m)), ("list of 2",)),
    R(ValueError, "optimizer", on(small, lambda m: register_projection(sgd(m.head), m)), ("time steps",)),
    R(ValueError, "optimizer", on(small, lambda m: register_projection(sgd(small()), m)), ("none of them",)),
]


MASKS = ([True, False, True, True, True], [torch.tensor(l > 1) for l in range(5)])


def pruned(make: Callable[[], nn.Module] = small, *arguments: Any, **options: Any) -> Callable[[], None]:
    """prune of a model that must be left as it was."""
    return on(make, lambda model: prune(model, *arguments, **options))


def with_nan() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.time_steps.values[1] = NAN
    return model


def wrapped() -> nn.Module:
    return wrap(sequential(), example_inputs=torch.ones(1, 4))


class Watching(Criterion):
    """It watches the training."""

    def scores(self, model: nn.Module) -> Tensor:
        return torch.ones(5)

    def measuring(self) -> Any:
        return warnings.catch_warnings()


def surviving(model: nn.Module) -> None:
    """A target whose survivors are 1, for a model that may not allow it."""
    attach(model, sgd(model), pruning=Pruning(target_blocks=2, survivors="one"), iterations=50)


PAIRS = [(torch.ones(6, 3, dtype=DOUBLE), torch.arange(6) % 2)]

PRUNING = [
    *[
        refusal
        for call in (Pruning, lambda threshold: pruned(small, threshold)())
        for refusal in each(ValueError, "threshold", call, 0.0, 1.0, -0.1, 1.5, NAN, "a", [0.1], True)
    ],
    *each(ValueError, "every", lambda every: Pruning(every=every), 0, -1, "epochs", 2.5, True, "a"),
    *each(ValueError, "keep", lambda keep: pruned(keep=keep)(), [], [0, 5], [-1, 0]),
    # A position of 1.5 once deleted layer 1 without a word.
    *each(TypeError, "keep", lambda keep: pruned(keep=keep)(), [0, 1.5], [0, "1"], "02", 5, "a", *MASKS),
    R(ValueError, "keep", pruned(keep=[]), ("at least one", "0 .. 4")),
    R(ValueError, "model", on(small, lambda m: torch.inference_mode()(prune)(m, 0.1)), ("inference_mode",)),
    R(ValueError, "keep", pruned(keep=[1, 2]), ("layer 0", "[1, 2]")),
    R(ValueError, "keep", pruned(lambda: small(constraint="dependent"), keep=[0, 1]), ("layer 4", "[0, 1]")),
    R(ValueError, "keep", pruned(lambda: resnet(3, [4, 2, 2], 1, 3), keep=[0, 2]), ("layer 1",)),
    R(ValueError, "keep", pruned(wrapped, keep=[]), ("0 .. 3", "[]")),
    *[
        R(ValueError, "threshold", pruned(small, 0.05, **{other: value}), (other, "0.05"))
        for other, value in (("keep", [0, 1]), ("budget", 3))
    ],
    *[R(ValueError, "model", pruned(partial(b, 3, 4, 2, 1)), ("single layer",)) for b in (resnet, fractional_dnn)],
    R(ValueError, "model", pruned(lambda: wrap(sequential(), "1")), ("single layer",)),
    R(TypeError, "model", pruned(lambda: nn.Linear(2, 2)), ("Linear",)),
    R(TypeError, "model", pruned(lambda: nn.Sequential(small())), ("Sequential",)),
    R(ValueError, "tau", lambda: prune(with_nan()), ("nan", "diverged")),
    R(ValueError, "criterion", pruned(criterion="shares"), ("'shares'", "'share'")),
    R(ValueError, "criterion", pruned(criterion="a"), ("'a'",)),
    *[R(ValueError, "data", pruned(criterion=name, budget=2), (name, "None", "batches")) for name in MEASURED],
    *[R(ValueError, "data", pruned(criterion=given, data=PAIRS), ("'loss'",)) for given in (None, "share", Power())],
    R(ValueError, "budget", pruned(criterion="loss", data=PAIRS, loss=cross_entropy), ("'loss'", "None")),
    R(ValueError, "budget", pruned(small, 0.1, criterion="loss", data=PAIRS, loss=cross_entropy), ("'loss'", "0.1")),
    *[
        R(ValueError, "data", pruned(criterion=name, budget=2, data=data(), loss=cross_entropy), ("none", "iterator"))
        for name in MEASURED
        for data in (list, partial(iter, ()), lambda: DataLoader(TensorDataset(torch.ones(0, 3))))
    ],
    *[
        R(TypeError, "data", pruned(criterion="loss", budget=2, data=data, loss=cross_entropy), (given,))
        for data, given in ((3, "int"), (torch.ones(6, 3), "Tensor"), ([torch.ones(6, 3)], "Tensor"), (["a"], "str"))
    ],
    *[
        R(ValueError, "loss", pruned(criterion=name, budget=2, data=PAIRS), ("None",))
        for name in ("sensitivity", "loss")
    ],
    R(ValueError, "data", pruned(criterion="loss", budget=2, data={"x": PAIRS[0][0]}, loss=mse_loss), ("targets",)),
    *[
        R(
            TypeError,
            "data",
            pruned(criterion=name, budget=2, data={"x": PAIRS[0][0], "mask": 1}),
            ("'mask'", "takes x"),
        )
        for name in MEASURED
    ],
    *[
        R(ValueError, "loss", pruned(criterion=name, budget=2, data=PAIRS, loss=lambda y, _: y), ("scalar",))
        for name in ("sensitivity", "loss")
    ],
    *[
        R(TypeError, "loss", pruned(criterion=name, budget=2, data=PAIRS, loss="mse"), ("'mse'", "mse_loss"))
        for name in MEASURED
    ],
    R(TypeError, "criterion", pruned(criterion=3), ("3",)),
    *[
        R(ValueError, "criterion", pruned(criterion=scores), ("5", "finite"))
        for scores in (
            lambda tau, _: tau[:-1],
            lambda tau, _: -tau,
            lambda tau, _: tau / 0,
            lambda tau, _: None,
            lambda tau, _: "many",
            lambda tau, _: [[1.0], [1.0, 2.0]],
        )
    ],
    *each(ValueError, "budget", lambda budget: pruned(budget=budget)(), 0, True, 2.5, "a"),
    R(ValueError, "budget", pruned(wrapped, budget=0), ("0",)),
    R(ValueError, "budget", pruned(budget=9), ("5", "9")),
    R(ValueError, "budget", pruned(lambda: small(constraint="dependent"), budget=1), ("2", "1")),
    R(ValueError, "budget", pruned(budget=2, keep=[0, 1]), ("keep",)),
    R(ValueError, "budget", pruned(budget={"latency_ms": 1.0}), ("['latency_ms']",)),
    *[
        R(ValueError, "latency_ms", pruned(budget={"latency_ms": limit, "example_inputs": None}), (repr(limit),))
        for limit in (0, NAN)
    ],
    R(TypeError, "optimizer", pruned(optimizer="a"), ("'a'",)),
    R(ValueError, "optimizer", pruned(optimizer=[]), ("empty",)),
    R(TypeError, "optimizer", on(small, lambda m: prune(m, keep=[0], optimizer=[sgd(m), "adam"])), ("'adam'",)),
    R(ValueError, "optimizer", on(small, lambda m: prune(m, optimizer=[sgd(m), sgd(small())])), ("none of them",)),
    R(ValueError, "optimizer", pruned(keep=[0], optimizer=sgd(small())), ("none of them",)),
    R(TypeError, "averaged", pruned(averaged=small()), ("TimeVariableNetwork",)),
    R(ValueError, "averaged", pruned(averaged=AveragedModel(nn.Linear(2, 2)))),
    R(ValueError, "averaged", pruned(keep=[0], averaged=AveragedModel(small([0.5, 0.5, 0.5])))),
    *each(ValueError, "target_blocks", lambda number: Pruning(target_blocks=number), 0, 2.5),
    *each(ValueError, "target_latency_ms", lambda limit: Pruning(target_latency_ms=limit), -1.0, NAN, "4"),
    *each(ValueError, "target_latency_ms", lambda limit: Pruning(target_latency_ms=limit), torch.tensor(4.0)),
    R(ValueError, "target_latency_ms", lambda: Pruning(target_blocks=3, target_latency_ms=1.0), ("target_blocks",)),
    R(ValueError, "threshold", lambda: Pruning(0.01, target_blocks=3), ("target_blocks", "0.01")),
    R(ValueError, "example_inputs", lambda: Pruning(target_blocks=3, example_inputs=1), ("target_blocks",)),
    *each(ValueError, "by", lambda by: Pruning(target_blocks=3, by=by), 1.5, 0),
    *each(ValueError, "by", lambda by: Pruning(target_blocks=3, by=by), "5"),
    R(ValueError, "penalised", lambda: Pruning(target_blocks=3, penalised="last"), ("'last'", "'next'")),
    R(TypeError, "criterion", lambda: Pruning(criterion=5), ("5",)),
    R(ValueError, "criterion", lambda: Pruning(criterion="contributions"), ("'contribution'",)),
    R(ValueError, "data", lambda: Pruning(target_blocks=3, criterion="loss"), ("'loss'", "None")),
    R(ValueError, "data", lambda: Pruning(target_blocks=3, criterion="loss", data=iter(())), ("none", "iterator")),
    R(
        ValueError,
        "data",
        lambda: Pruning(target_blocks=3, criterion="influence", data=PAIRS),
        ("'influence'", "'loss'"),
    ),
    R(ValueError, "criterion", lambda: Pruning(0.1, criterion="loss", data=PAIRS), ("'loss'", "0.1", "target_blocks")),
    R(ValueError, "loss", lambda: Pruning(target_blocks=3, loss=mse_loss), ("criterion",)),
    R(ValueError, "survivors", lambda: Pruning(target_blocks=3, survivors="ones"), ("'ones'", "'one'")),
    R(ValueError, "survivors", lambda: Pruning(survivors="one"), ("target", "'one'")),
    R(
        ValueError,
        "survivors",
        on(
            lambda: resnet(3, 4, 2, 5, init=1.0, horizon=5.0),
            lambda model: attach(
                model,
                sgd(model),
                pruning=Pruning(target_blocks=2, survivors="one"),
                refinement=Refinement(9),
                iterations=50,
            ),
        ),
        ("refinement", "'one'"),
    ),
    R(ValueError, "survivors", lambda: Pruning(target_blocks=3, penalised="all", survivors="one"), ("'all'",)),
    *[
        R(ValueError, "survivors", on(make, surviving), says)
        for make, says in (
            (small, ("0.2",)),
            (lambda: small([1.0] * 5, constraint="simplex"), ("'simplex'",)),
            (lambda: small([1.0] * 5, constraint="dependent"), ("'dependent'",)),
            (lambda: wrap(sequential(), example_inputs=torch.ones(1, 4), units="displacement"), ("displacement",)),
        )
    ],
    R(ValueError, "by", lambda: Pruning(by=3), ("target", "3")),
    R(ValueError, "penalised", lambda: Pruning(penalised="all"), ("target",)),
    R(ValueError, "example_inputs", lambda: Pruning(example_inputs=3), ("target",)),
]


def refined(make: Callable[[], nn.Module] = small, *arguments: Any, **options: Any) -> Callable[[], None]:
    """refine of a model that must be left as it was."""
    return on(make, lambda model: refine(model, *arguments, **options))


def with_bound(bound: float, **options: Any) -> Callable[[], nn.Module]:
    return partial(small, lower_bound=bound, **options)


def with_weight_norm() -> nn.Module:
    """A layer with a tensor that was computed, which torch cannot copy."""
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        linear = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model.layers[1] = linear
    return model


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


ONES: dict[str, Any] = {"data": (torch.ones(2, 4), torch.ones(2, 4)), "loss": mse_loss}


def of_two_branches(**options: Any) -> nn.Module:
    return wrap(nn.Sequential(*[TwoBranches() for _ in range(3)]), example_inputs=torch.ones(2, 4), **options)


def in_displacement() -> nn.Module:
    return of_two_branches(units="displacement")


def per_branch() -> nn.Module:
    return of_two_branches(per="branch")


def refined_without_it(model: Any) -> None:
    optimizer = sgd(model)
    twin = copy.deepcopy((model, optimizer))
    refine(twin[0], [1])
    prune(twin[0], keep=[0, 1], optimizer=twin[1])


def unbounded() -> nn.Module:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    return TimeVariableNetwork(layers, nn.Linear(3, 1), Fractional(), TimeSteps(3), stem=nn.Identity())


REFINEMENT = [
    *each(ValueError, "target_blocks", lambda number: Refinement(number), 0, True, 2.5, None),
    *each(ValueError, "every", lambda every: Refinement(9, every=every), 0, True, "epochs", 1.5),
    *each(ValueError, "number", lambda number: Refinement(9, number=number), 0, True, 0.5),
    R(ValueError, "indicator", lambda: Refinement(9, indicator=Watching()), ("Watching", "measuring")),
    *each(ValueError, "bulk", lambda bulk: Refinement(9, bulk=bulk), 0.0, 1.5, NAN),
    *each(ValueError, "theta", lambda theta: Refinement(9, theta=theta), 0.0, 1.0, NAN, "half"),
    *each(ValueError, "until", lambda until: Refinement(9, until=until), 0, 0.0, 1.5, NAN, True, "half"),
    *each(ValueError, "rest", lambda rest: Refinement(9, rest=rest), -1, 1.5, True),
    R(ValueError, "bulk", lambda: Refinement(9, bulk=0.5, number=2), ("0.5", "number")),
    R(ValueError, "by", lambda: Refinement(9, by="halve"), ("'halve'", "'split'")),
    R(ValueError, "theta", lambda: Refinement(9, by="insert", theta=0.3), ("0.3", "'insert'")),
    R(ValueError, "layer", lambda: Refinement(9, layer=lambda each: each), ("'split'",)),
    R(TypeError, "layer", lambda: Refinement(9, by="insert", layer=nn.Linear(2, 2)), ("Linear",)),
    R(ValueError, "indicator", lambda: Refinement(9, indicator="dual"), ("'dual'", "'dual-weighted'")),
    R(TypeError, "indicator", lambda: Refinement(9, indicator=Power), ("Power",)),
    R(ValueError, "loss", lambda: Refinement(9, indicator=lambda tau, _: tau, loss=mse_loss), ("own",)),
    R(ValueError, "data", lambda: Refinement(9, indicator=Power(), data=PAIRS), ("Criterion",)),
    R(TypeError, "data", lambda: Refinement(9, data=torch.ones(3)), ("Tensor",)),
]
REFINING = [
    *each(ValueError, "by", lambda by: refined(small, [1], by=by)(), "splits", None, "in"),
    *each(ValueError, "theta", lambda theta: refined(small, [1], theta=theta)(), 0.0, 1.0, -0.5, NAN, "half", None),
    R(ValueError, "theta", refined(small, [1], by="insert", theta=0.3), ("0.3", "'insert'")),
    *each(ValueError, "train", lambda train: refined(small, [1], train=train)(), "all", True),
    *[
        R(ValueError, "layers", refined(small, **given), ("number", "bulk", *given))
        for given in ({}, {"layers": [1], "number": 2}, {"number": 2, "bulk": 0.5}, {"layers": [1], "bulk": 0.5})
    ],
    *each(TypeError, "layers", lambda layers: refined(small, layers)(), "12", 5, [0, 1.5], *MASKS),
    *each(ValueError, "layers", lambda layers: refined(small, layers)(), [], [-1, 0], [0, 5], [1, 1]),
    R(ValueError, "layers", refined(small, []), ("at least one", "0 .. 4")),
    *[
        R(ValueError, name, refined(small, [1], **{name: value}), ("layers",))
        for name, value in (("indicator", "sensitivity"), ("data", PAIRS), ("loss", mse_loss))
    ],
    R(ValueError, "layers", refined(small, [0, 1]), ("0", "the skip past it is zero")),
    R(ValueError, "layers", refined(lambda: resnet(3, [4, 2, 3], 1, 3), [1]), ("1", "not the identity")),
    R(ValueError, "layers", refined(lambda: resnet(3, [4, 2, 3], 1, 3), [1], by="insert"), ("1", "layer=")),
    R(ValueError, "layers", refined(lambda: resnet_v2((1, 1), 2, widths=(2, 4)), [1]), ("1", "not the identity")),
    R(ValueError, "layers", refined(lambda: small(constraint="fixed"), [1], by="insert"), ("1", "'fixed'")),
    R(ValueError, "layers", refined(lambda: small(constraint="dependent"), [4], by="insert"), ("4", "dependent")),
    R(ValueError, "layers", refined(unbounded, [1], by="insert"), ("1", "lower bound")),
    *[
        R(ValueError, "layers", refined(with_bound(0.12, constraint=constraint), [1]), ("1", "0.12"))
        for constraint in ("free", "simplex", "dependent")
    ],
    *[
        R(ValueError, "lower_bound", refined(with_bound(0.18, constraint=constraint), [1], by="insert"), ("0.18",))
        for constraint in ("simplex", "dependent")
    ],
    *[
        R(ValueError, "model", refined(partial(build, 3, 4, 2, 3), [1], by=by), (build(3, 4, 2, 3).scheme.name,))
        for build in (feedforward, densenet)
        for by in ("split", "insert")
    ],
    R(TypeError, "model", refined(lambda: nn.Linear(2, 2), [0]), ("Linear",)),
    R(TypeError, "model", refined(lambda: nn.DataParallel(small()), [1]), ("DataParallel", "module")),
    *each(ValueError, "number", lambda number: refined(number=number, data=PAIRS, loss=cross_entropy)(), 0, True, 2.5),
    R(ValueError, "number", refined(number=5, data=PAIRS, loss=cross_entropy), ("5", "4", "layer 0")),
    R(ValueError, "number", refined(with_bound(0.2), number=1, data=PAIRS, loss=cross_entropy), ("0", "1")),
    *each(ValueError, "bulk", lambda b: refined(bulk=b, data=PAIRS, loss=cross_entropy)(), 0.0, 1.5, NAN, "all"),
    *[R(ValueError, "data", refined(small, **{name: 1}), ("None", "batches")) for name in ("number", "bulk")],
    R(ValueError, "loss", refined(number=1, data=PAIRS), ("None",)),
    R(ValueError, "indicator", refined(number=1, indicator="sensitivities", data=PAIRS), ("'sensitivity'",)),
    R(ValueError, "layer", refined(small, [1], layer=copy.deepcopy), ("'split'",)),
    R(TypeError, "layer", refined(small, [1], by="insert", layer=nn.Linear(4, 4)), ("Linear",)),
    R(TypeError, "layer", refined(small, [1], by="insert", layer=lambda neighbour: None), ("NoneType",)),
    R(TypeError, "layer", refined(by="insert", layer=lambda _: None, number=1, data=PAIRS, loss=mse_loss), ("None",)),
    R(ValueError, "layer", on(small, lambda m: refine(m, [1], by="insert", layer=lambda _: m.layers[2])), ("shares",)),
    R(ValueError, "model", refined(with_weight_norm, [1]), ("Linear", "parametrizations")),
    R(ValueError, "model", refined(with_weight_norm, [1], by="insert"), ("Linear", "parametrizations")),
    R(ValueError, "layers", refined(in_displacement, [1]), ("displacement", "units='steps'")),
    R(ValueError, "number", refined(in_displacement, number=1, **ONES), ("displacement", "units='steps'")),
    R(ValueError, "layers", refined(per_branch, [1], by="insert"), ("one branch", "per='block'")),
    R(ValueError, "model", refined(per_branch, number=1, **ONES), ("per branch", "per='block'")),
    R(ValueError, "model", on(small, lambda m: torch.inference_mode()(refine)(m, [1])), ("inference_mode",)),
    R(TypeError, "optimizer", refined(small, [1], optimizer="a"), ("'a'",)),
    R(ValueError, "optimizer", refined(small, [1], optimizer=sgd(small())), ("none of them", "refine")),
    R(ValueError, "optimizer", on(small, refined_without_it), ("came or went", "refine")),
    R(TypeError, "averaged", refined(small, [1], averaged=small()), ("TimeVariableNetwork",)),
]


SAMPLES = [
    *each(ValueError, "num_samples", maxwell.samples, 0, -3, 2.5, True),
    R(ValueError, "key", lambda: maxwell.samples(5, key=-1), ("-1",)),
    *[
        R(ValueError, "points", partial(maxwell.samples_at, torch.tensor([[0.0, 0.0, 0.5], outside])), ("1 of 2",))
        for outside in ([0.8, 0.8, 0.5], [0.0, 0.0, 1.1], [0.0, 0.0, -0.1])
    ],
    R(ValueError, "points", lambda: maxwell.inputs_at(torch.zeros(4, 2)), ("(4, 2)",)),
    R(ValueError, "points", lambda: maxwell.inputs_at(torch.tensor([[0.0, NAN, 0.0]]))),
    R(ValueError, "num_samples", lambda: nested_spheres(num_samples=0), ("0",)),
    R(ValueError, "dimension", lambda: nested_spheres(num_samples=2, dimension=0), ("0",)),
    *[
        R(ValueError, "name", partial(action, wrong), (repr(wrong), repr(nearest), *map(repr, data.names())))
        for action in (data.load, data.fetch, data.verify)
        for wrong, nearest in (("minst", "mnist"), ("MNIST", "mnist"), ("fashionmnist", "fashion-mnist"))
    ],
    R(ValueError, "split", lambda: data.load("mnist", "validation", root="."), ("'test'", "'validation'")),
]


X = digits(2)[0]


def exported(example: Any, make: Callable[[], Any] = network, **options: Any) -> Callable[[], None]:
    return on(make, lambda model: export_model(model, "out", example, **{"format": "torch"} | options))


FILES = [
    R(ValueError, "format", exported(X, format="onx"), ("'onx'", "'onnx'")),
    R(ValueError, "example_inputs", exported(X[:0]), ("(batch",)),
    R(ValueError, "example_inputs", exported(X.numpy()), ("ndarray", "torch.from_numpy")),
    R(TypeError, "example_inputs", exported({"y": X}), ("y: missing",)),
    R(TypeError, "model", exported(torch.zeros(2, 1), lambda: nn.Linear(1, 1)), ("time steps",)),
    R(TypeError, "about", exported(X, about={"x": X}), ("JSON",)),
    R(TypeError, "model", on(lambda: nn.Linear(2, 2), lambda m: taulearn.save_model(m, "out")), ("Linear",)),
    R(TypeError, "model", lambda: taulearn.save_model(unwrap(wrapped()), "out"), ("Sequential", "taulearn.wrap")),
    R(FileNotFoundError, "path", lambda: taulearn.load_model("nowhere"), ("model.json",)),
    R(ValueError, "by", lambda: figures.losses([], by="second"), ("'second'", "'epoch'")),
    *[R(ValueError, "run", partial(draw, []), ("none",)) for draw in (figures.losses, figures.accuracy)],
    R(ValueError, "run", lambda: write_html([], "report.html"), ("none",)),
    R(ValueError, "history", lambda: figures.tau_trajectories(History())),
    R(ValueError, "smooth", lambda: running_mean(np.ones(3), 0), ("0",)),
    R(ValueError, "path", lambda: write_catalogue("claims.md", "a", "b"), (".html",)),
]

REFUSALS = {
    "formulas": FORMULAS,
    "time steps": STEPS,
    "networks": NETWORKS,
    "early exit": EARLY_EXIT,
    "diagnostics": DIAGNOSTICS,
    "depth": DEPTH,
    "adjoint": ADJOINT,
    "penalties": PENALTIES,
    "optim": OPTIM,
    "pruning": PRUNING,
    "refinement": REFINEMENT,
    "refining": REFINING,
    "data": SAMPLES,
    "files": FILES,
}
