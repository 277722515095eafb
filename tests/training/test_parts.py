"""Parts of a batch weigh what the loss counts in them: the step and the figures are those of the whole batch."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taulearn
from taulearn import fit, parameter_groups
from taulearn.diagnostics import depth_profile
from taulearn.nn import resnet
from taulearn.penalties import L1, StageCost, WeightElasticNet
from taulearn.training import Diverged, accuracy, evaluate

torch.manual_seed(0)
N, CLASSES = 17, 4
X = torch.randn(N, 6, dtype=torch.float64)
LABELS = torch.randint(CLASSES, (N,))
SOME_IGNORED = LABELS.masked_fill(torch.arange(N) < 6, -100)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
REAL = torch.randn(N, CLASSES, dtype=torch.float64)
BINARY = (REAL > 0).double()

Loss = Callable[[Any, Tensor], Tensor]


def own(output: Tensor, target: Tensor) -> Tensor:
    """Not one of torch's: a mean over samples."""
    return (output - target).abs().amax(1).mean()


class Halved(nn.CrossEntropyLoss):
    """A loss of torch with something of its own inside."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002  torch calls it so
        return super().forward(input / 2, target)


CASES: dict[str, tuple[Loss, Tensor]] = {
    "ignored": (F.cross_entropy, SOME_IGNORED),
    "ignored, module": (nn.CrossEntropyLoss(), SOME_IGNORED),
    "another ignored label": (nn.CrossEntropyLoss(ignore_index=2), LABELS),
    "negative ignored label": (nn.CrossEntropyLoss(ignore_index=-1), SOME_IGNORED.clamp(min=-1)),
    "large ignored label": (nn.CrossEntropyLoss(ignore_index=255), torch.where(SOME_IGNORED < 0, 255, LABELS)),
    "class weights": (nn.CrossEntropyLoss(WEIGHT), LABELS),
    "class weights and ignored": (nn.CrossEntropyLoss(WEIGHT), SOME_IGNORED),
    "a class of weight 0": (nn.CrossEntropyLoss(torch.tensor([0.0, 0.0, 1.0, 2.0]).double()), LABELS.sort().values),
    "smoothed": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SOME_IGNORED),
    "sum": (nn.CrossEntropyLoss(WEIGHT, reduction="sum"), SOME_IGNORED),
    "probabilities": (nn.CrossEntropyLoss(WEIGHT), REAL.softmax(1)),
    "likelihood": (lambda y, z: F.nll_loss(y.log_softmax(1), z, WEIGHT), SOME_IGNORED),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1), LABELS),
    "a function around it": (lambda y, z: F.cross_entropy(2 * y, z.flatten().long()), SOME_IGNORED.unsqueeze(1)),
    "a subclass": (Halved(WEIGHT), SOME_IGNORED),
    "another multiple": (lambda y, z: 0.5 * -F.cross_entropy(y, z) / -2, SOME_IGNORED),
    "several": (
        lambda y, z: sum((F.cross_entropy(y * k, z, WEIGHT) for k in (1, 2)), F.cross_entropy(y, z, WEIGHT)) / 3,
        SOME_IGNORED,
    ),
    "its own mean": (lambda y, z: F.cross_entropy(y, z).mean(), SOME_IGNORED),
    "an offset": (lambda y, z: 1 + F.cross_entropy(y, z), SOME_IGNORED),
    "sum by number": (lambda y, z: F.cross_entropy(y, z, reduction="sum") / len(z), SOME_IGNORED),
    "copied labels": (lambda y, z: F.cross_entropy(y, z.clone().type(torch.int64)), SOME_IGNORED.int()),
    "a column": (lambda y, z: F.cross_entropy(y, z[:, 1]), torch.stack([LABELS + 9, SOME_IGNORED], 1)),
    "the last column": (lambda y, z: F.cross_entropy(y, z[..., -1]), torch.stack([LABELS + 9, SOME_IGNORED], 1)),
    "margin": (nn.MultiMarginLoss(weight=WEIGHT), LABELS),
    "mse": (F.mse_loss, REAL),
    "mse sum": (nn.MSELoss(reduction="sum"), REAL),
    "a multiple": (lambda y, z: 2.0 * F.cross_entropy(y, z, WEIGHT) / 3, SOME_IGNORED),
    "sum inside": (lambda y, z: F.l1_loss(2 * y, 2 * z, reduction="sum"), REAL),
    "huber": (nn.HuberLoss(delta=0.3), REAL),
    "binary": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), BINARY),
    "divergence": (lambda y, z: F.kl_div(y.log_softmax(1), z, reduction="batchmean"), REAL.softmax(1)),
    "multilabel": (nn.MultiLabelSoftMarginLoss(WEIGHT), BINARY),
    "own": (own, REAL),
}


def model() -> Any:
    torch.manual_seed(1)
    return resnet(6, 8, CLASSES, 3, activation="tanh", dtype=torch.float64)


def train(net: nn.Module, targets: Tensor, loss: Loss, **options: Any) -> taulearn.training.History:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    defaults = {"epochs": 2, "batch_size": N, "progress": False, "compile": "never"}
    return fit(net, (X, targets), loss=loss, optimizer=optimizer, **defaults | options)


def assert_same(net: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("parts", [4, 17])
@pytest.mark.parametrize("case", CASES)
def test_parts_make_the_step_of_the_whole_batch(case: str, parts: int) -> None:
    loss, targets = CASES[case]
    ours, plain = model(), model()
    history = train(ours, targets, loss, accumulate=parts)
    optimizer, losses = torch.optim.SGD(plain.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(plain(X), targets)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    np.testing.assert_allclose(history.iterations["loss"], losses, rtol=1e-13)
    assert_same(ours, plain)


def test_a_sum_as_it_was_written_once() -> None:
    with pytest.warns(UserWarning, match="size_average"):
        loss = nn.CrossEntropyLoss(size_average=False)
    net = model()
    found = evaluate(net, (X, SOME_IGNORED), loss=loss, batch_size=5)
    assert found["loss"] == pytest.approx(loss(net(X), SOME_IGNORED).item(), rel=1e-13)


def test_a_last_batch_that_is_smaller() -> None:
    """Batches of 7, 7 and 3, in 3 parts; penalties count once."""
    penalties = [L1(0.1), WeightElasticNet(1e-3), StageCost(0.5, F.cross_entropy)]
    ours, whole = model(), model()
    parts = train(ours, SOME_IGNORED, F.cross_entropy, batch_size=7, seed=2, accumulate=3, penalties=penalties)
    expected = train(whole, SOME_IGNORED, F.cross_entropy, batch_size=7, seed=2, penalties=penalties)
    assert_same(ours, whole)
    for name, column in expected.iterations.items():
        np.testing.assert_allclose(parts.iterations[name], column, rtol=1e-12, err_msg=name)


def test_a_stage_cost_counts_by_its_own_loss() -> None:
    cost = StageCost(0.5, nn.CrossEntropyLoss(WEIGHT))
    ours, whole = model(), model()
    parts = train(ours, LABELS, F.cross_entropy, accumulate=4, penalties=cost)
    expected = train(whole, LABELS, F.cross_entropy, penalties=cost)
    assert_same(ours, whole)
    np.testing.assert_allclose(parts.iterations["stage_loss"], expected.iterations["stage_loss"], rtol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["tokens", "pixels"])
def test_several_labels_a_sample(shape: tuple[int, ...]) -> None:
    """(n, classes, ...) against (n, ...), as for tokens and pixels; all of the first samples' labels are ignored."""
    size = int(np.prod(shape))
    labels = torch.randint(CLASSES, (N, *shape), generator=torch.Generator().manual_seed(0))
    labels[:9] = -100
    labels[12:, ..., 0] = -100

    def build() -> Any:
        torch.manual_seed(0)
        return resnet(6, 8, CLASSES * size, 2, dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.unflatten(1, (CLASSES, *shape)), target)

    ours, whole = build(), build()
    parts = train(ours, labels, loss, accumulate=4, validation=(X, labels))
    expected = train(whole, labels, loss)
    assert_same(ours, whole)
    np.testing.assert_allclose(parts.iterations["loss"], expected.iterations["loss"], rtol=1e-13)
    right = F.cross_entropy(ours(X).unflatten(1, (CLASSES, *shape)), labels).item()
    assert parts.epochs["validation.loss"][-1] == pytest.approx(right, rel=1e-13)
    assert evaluate(ours, (X, labels), loss=loss, batch_size=4)["loss"] == pytest.approx(right, rel=1e-13)


@pytest.mark.parametrize("kind", ["lbfgs", "steepest descent"])
def test_line_searches_see_the_objective_of_the_whole_batch(kind: str) -> None:
    def made(net: nn.Module) -> torch.optim.Optimizer:
        if kind == "lbfgs":
            return torch.optim.LBFGS(net.parameters(), max_iter=3)
        return taulearn.optim.SteepestDescent(net.parameters())

    nets = [model(), model()]
    for net, parts in zip(nets, (4, 1), strict=True):
        options = {"batch_size": N, "epochs": 2, "progress": False, "compile": "never", "accumulate": parts}
        fit(net, (X, SOME_IGNORED), loss=nn.CrossEntropyLoss(WEIGHT), optimizer=made(net), **options)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("batch_size", [3, 5])
@pytest.mark.parametrize("case", CASES)
def test_evaluation_gives_the_loss_of_the_whole_data(case: str, batch_size: int) -> None:
    loss, targets = CASES[case]
    net = model()
    found = evaluate(net, (X, targets), loss=loss, batch_size=batch_size)
    assert found["loss"] == pytest.approx(loss(net(X), targets).item(), rel=1e-13)


@pytest.mark.parametrize("ignored", [-100, -1, 255])
def test_ignored_labels_have_no_accuracy(ignored: int) -> None:
    targets = torch.where(SOME_IGNORED < 0, ignored, LABELS)
    net = model()
    expected = (net(X).argmax(1) == targets)[targets != ignored].double().mean().item()
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    found = evaluate(net, (X, targets), loss=loss, batch_size=3)
    assert found["accuracy"] == pytest.approx(expected, abs=1e-6)
    by_name = {"share": functools.partial(accuracy, ignore_index=ignored)}
    assert evaluate(net, (X, targets), metrics=by_name, batch_size=3)["share"] == pytest.approx(expected, abs=1e-6)
    history = train(copy.deepcopy(net), targets, loss, validation=(X, targets))
    assert history.epochs["validation.accuracy"][0] == pytest.approx(expected, abs=1e-6)


def test_metrics_that_are_losses_weigh_as_losses() -> None:
    net, metrics = model(), {"weighted": nn.CrossEntropyLoss(WEIGHT), "own": lambda y, _: y.amax(1).mean()}
    found = evaluate(net, (X, SOME_IGNORED), metrics=metrics, batch_size=4)
    assert found["weighted"] == pytest.approx(metrics["weighted"](net(X), SOME_IGNORED).item(), rel=1e-13)
    assert found["own"] == pytest.approx(net(X).amax(1).mean().item(), rel=1e-13)


def test_a_profile_over_depth_is_that_of_the_whole_data() -> None:
    net = model()
    parts = depth_profile(net, X, SOME_IGNORED, F.cross_entropy, batch_size=5)
    whole = depth_profile(net, X, SOME_IGNORED, F.cross_entropy, batch_size=N)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert parts.loss[-1].item() == pytest.approx(F.cross_entropy(net(X), SOME_IGNORED).item())
    counted = SOME_IGNORED >= 0
    assert parts.accuracy is not None
    right = (net(X).argmax(1) == LABELS)[counted].double().mean().item()
    assert parts.accuracy[-1].item() == pytest.approx(right)


def test_two_terms_are_a_mean_over_samples() -> None:
    """The number that a sum of losses counts is not known: documented."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, WEIGHT) + output.square().mean()

    net = model()
    expected = sum(len(z) / N * loss(net(x), z).item() for x, z in zip(X.split(5), LABELS.split(5), strict=True))
    assert evaluate(net, (X, LABELS), loss=loss, batch_size=5)["loss"] == pytest.approx(expected, rel=1e-13)
    parts = zip(X.tensor_split(3), LABELS.tensor_split(3), strict=True)
    expected = sum(len(z) / N * loss(net(x), z).item() for x, z in parts)
    history = train(net, LABELS, loss, accumulate=3, epochs=1)
    assert history.iterations["loss"][0] == pytest.approx(expected, rel=1e-13)


def test_a_batch_of_which_no_label_counts_is_named() -> None:
    """A mean over nothing is 0/0, in parts as in the whole."""
    for loss, targets, message in (
        (F.cross_entropy, torch.where(torch.arange(N) == 3, LABELS, -100), "labels of its batch.* are -100"),
        (nn.CrossEntropyLoss(ignore_index=255), torch.where(torch.arange(N) == 3, LABELS, 255), "are 255"),
    ):
        for parts in (1, 2):
            with pytest.raises(Diverged, match=message):
                train(model(), targets, loss, batch_size=4, accumulate=parts)


@pytest.mark.long
def test_compiled_parts() -> None:
    ours, whole = model(), model()
    loss = nn.CrossEntropyLoss(WEIGHT)
    train(ours, SOME_IGNORED, loss, accumulate=2, compile="always", epochs=1)
    train(whole, SOME_IGNORED, loss, epochs=1)
    assert_same(ours, whole)


def test_a_wrapped_model_with_momentum_and_clipping() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        return taulearn.wrap(nn.Sequential(*blocks, nn.Linear(6, CLASSES)).double(), ["0", "1", "2"])

    nets = [build(), build()]
    for net, parts in zip(nets, (5, 1), strict=True):
        optimizer = torch.optim.SGD(parameter_groups(net, 0.1, 0.05), momentum=0.9)
        options = {"batch_size": 9, "epochs": 3, "progress": False, "compile": "never", "clip_norm": 0.1}
        fit(net, (X, SOME_IGNORED), loss=F.cross_entropy, optimizer=optimizer, accumulate=parts, **options)
    assert_same(nets[0], nets[1])


SHIFTED: dict[str, Loss] = {
    "shifted": lambda y, z: F.cross_entropy(y[:, :-1].flatten(0, 1), z[:, 1:].flatten()),
    "turned": lambda y, z: F.cross_entropy(y.transpose(0, 1).flatten(0, 1), z.T.flatten()),
    "permuted": lambda y, z: F.cross_entropy(y.permute(1, 2, 0), z.permute(1, 0)),
}


@pytest.mark.parametrize("loss", SHIFTED.values(), ids=SHIFTED.keys())
def test_labels_of_sequences(loss: Loss) -> None:
    """Labels that a loss shifts or turns, as language models do, are known again."""
    torch.manual_seed(0)
    host = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]).double()
    x, labels = torch.randn(8, 3, 4, dtype=torch.float64), torch.randint(4, (8, 3))
    labels[torch.arange(8) % 4 > 0, 1:] = -100
    labels[1] = -100
    wrapped = [taulearn.wrap(copy.deepcopy(host), example_inputs=x[:2]) for _ in range(2)]
    for each, accumulate in zip(wrapped, (1, 4), strict=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        fit(each, (x, labels), loss=loss, optimizer=optimizer, epochs=2, batch_size=8, accumulate=accumulate)
    for one, other in zip(*(each.parameters() for each in wrapped), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_mixed_loss_of_ignored_labels_alone() -> None:
    """Of a loss that is not known as a whole, too, such a part counts 0 and ends nothing."""

    def mixed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, WEIGHT) + output.square().mean()

    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    labels = torch.arange(N) % CLASSES
    labels[torch.arange(N) % 3 > 0] = -100
    history = fit(
        network, (X, labels), loss=mixed, optimizer=optimizer, epochs=1, batch_size=N, accumulate=N, compile="never"
    )
    assert np.isfinite(history.iterations["loss"]).all()
    assert np.isfinite(evaluate(network, (X, labels), loss=mixed, batch_size=1)["loss"])


def test_a_compiled_loss_is_looked_at_as_it_is() -> None:
    """Nothing is compiled to see how it counts, and it counts as what it was made of."""
    compiled = torch.compile(F.cross_entropy, fullgraph=True, backend="eager")
    whole = F.cross_entropy(model()(X), SOME_IGNORED).item()
    assert evaluate(model(), (X, SOME_IGNORED), loss=compiled, batch_size=5)["loss"] == pytest.approx(whole, abs=1e-12)


def test_metrics_that_return_numbers() -> None:
    """Numbers of Python and numpy are figures, too."""
    metrics: dict[str, Any] = {
        "hits": lambda y, z: (y.argmax(1) == z).double().mean().item(),
        "numpy": lambda y, z: np.mean((y.argmax(1) == z).numpy()),
    }
    found = evaluate(model(), (X, LABELS), metrics=metrics, batch_size=5)
    right = (model()(X).argmax(1) == LABELS).double().mean().item()
    assert found["hits"] == pytest.approx(right, abs=1e-12)
    assert found["numpy"] == pytest.approx(right, abs=1e-12)
