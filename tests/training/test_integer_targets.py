"""Integers as targets are class numbers only where the loss takes them for such: whatever torch evaluates trains."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from taulearn import fit
from taulearn.nn import resnet
from taulearn.training import evaluate
from training.support import run_fit, sgd

N = 24
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(N) % 3
SOME = torch.arange(N) % 4 == 0
TOKENS = (torch.arange(5 * N) % 3).view(N, 5)
RANKS = torch.arange(N) % 4


def ordinal(output: Tensor, target: Tensor) -> Tensor:
    """A rank of 0 .. 3 by three thresholds."""
    passed = (target.unsqueeze(1) > torch.arange(3)).float()
    return F.binary_cross_entropy_with_logits(output, passed)


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Embeddings of samples of the same of many people lie close; compares every sample with every other."""
    same = target.unsqueeze(1) == target
    return torch.where(same, torch.cdist(output, output), 0).mean()


def ranking(output: Tensor, target: Tensor) -> Tensor:
    """A single score, whose differences have the sign of the targets'."""
    signs = (target.unsqueeze(1) - target).sign()
    return F.softplus(-signs * (output - output.squeeze(1))).mean()


CASES: dict[str, tuple[int, Tensor, Callable[[Tensor, Tensor], Tensor], bool]] = {
    # outputs, targets, loss, whether there is an accuracy
    "ignored -1": (3, torch.where(SOME, -1, CLASSES), nn.CrossEntropyLoss(ignore_index=-1), True),
    "ignored 255": (3, torch.where(SOME, 255, CLASSES), nn.CrossEntropyLoss(ignore_index=255), True),
    "bytes": (3, torch.where(SOME, 255, CLASSES).byte(), nn.CrossEntropyLoss(ignore_index=255), True),
    "likelihood": (
        3,
        torch.where(SOME, 7, CLASSES),
        lambda y, z: F.nll_loss(y.log_softmax(1), z, ignore_index=7),
        True,
    ),
    "a column": (3, CLASSES.unsqueeze(1), lambda y, z: F.cross_entropy(y, z.squeeze(1)), True),
    "counted from one": (3, CLASSES + 1, lambda y, z: F.cross_entropy(y, z - 1), False),
    "margins": (3, CLASSES, nn.MultiMarginLoss(), True),
    "one logit": (1, SOME.long(), lambda y, z: F.binary_cross_entropy_with_logits(y.squeeze(1), z.float()), False),
    "one logit, a column": (
        1,
        SOME.long()[:, None],
        lambda y, z: F.binary_cross_entropy_with_logits(y, z.float()),
        False,
    ),
    "truth": (1, SOME, lambda y, z: F.binary_cross_entropy_with_logits(y.squeeze(1), z.float()), False),
    "signs": (1, SOME.long() * 2 - 1, lambda y, z: F.soft_margin_loss(y.squeeze(1), z), False),
    "ranks": (3, RANKS, ordinal, False),
    "people": (3, torch.arange(N) * 37 // 5, contrastive, False),
    "several labels": (3, F.one_hot(CLASSES, 3), lambda y, z: F.binary_cross_entropy_with_logits(y, z.float()), False),
    "several truths": (3, F.one_hot(CLASSES, 3).bool(), lambda y, z: F.mse_loss(y.sigmoid(), z.float()), False),
    "label sets": (3, torch.tensor([[2, 0, -1], [1, -1, -1]]).repeat(N // 2, 1), nn.MultiLabelMarginLoss(), False),
    "tokens": (15, TOKENS, lambda y, z: F.cross_entropy(y.unflatten(1, (3, 5)), z), False),
    "tokens in a row": (
        15,
        torch.where(TOKENS == 2, -100, TOKENS),
        lambda y, z: F.cross_entropy(y.unflatten(1, (5, 3)).flatten(0, 1), z.flatten()),
        False,
    ),
    "numbers": (1, torch.arange(N) - 9, lambda y, z: F.mse_loss(y.squeeze(1), z.float()), False),
    "numbers as they are": (1, torch.arange(N)[:, None], F.mse_loss, False),
    "counts": (1, torch.arange(N)[:, None], F.poisson_nll_loss, False),
    "scores": (1, RANKS, ranking, False),
    "real numbers, flat": (1, torch.linspace(0, 1, N), lambda y, z: F.mse_loss(y.squeeze(1), z), False),
    "unused": (2, torch.arange(N) + 1000, lambda y, _: y.square().mean(), False),
}


def network(outputs: int) -> Any:
    torch.manual_seed(0)
    return resnet(4, 6, outputs, 2)


@pytest.mark.parametrize("kind", ["tensors", "loader"])
@pytest.mark.parametrize("case", CASES)
def test_what_torch_evaluates_trains(case: str, kind: str) -> None:
    outputs, targets, loss, has_accuracy = CASES[case]
    ours, plain = network(outputs), network(outputs)
    data = (X, targets) if kind == "tensors" else DataLoader(TensorDataset(X, targets), batch_size=N)
    history = run_fit(ours, data, sgd(ours), loss=loss, batch_size=N, epochs=2, validation=data)
    optimizer, losses = sgd(plain), []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(plain(X), targets)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    np.testing.assert_array_equal(history.iterations["loss"], np.float32(losses))
    right = loss(plain(X), targets).item()
    assert history.epochs["validation.loss"][-1] == pytest.approx(right, rel=1e-6)
    found = evaluate(ours, (X, targets), loss=loss)
    assert found["loss"] == pytest.approx(right, rel=1e-6)
    assert ("accuracy" in found) == ("validation.accuracy" in history.epochs) == has_accuracy


def test_labels_that_the_loss_does_not_ignore_are_still_refused() -> None:
    for ignored, bad in ((-1, -100), (255, -1), (-100, 255)):
        targets = torch.where(SOME, bad, CLASSES)
        model = network(3)
        with pytest.raises(ValueError, match=rf"train must .*got {bad} at sample 0: .*ignore_index"):
            run_fit(model, (X, targets), sgd(model), loss=nn.CrossEntropyLoss(ignore_index=ignored))


def test_a_byte_is_a_class_whatever_it_is_as_a_signed_number() -> None:
    """-100 as a byte is 156."""
    labels = (torch.arange(N) % 2 * 156).byte()
    model = network(157)
    expected = F.cross_entropy(model(X), labels.long()).item(), (model(X).argmax(1) == labels).float().mean().item()
    found = evaluate(model, (X, labels), loss=F.cross_entropy, batch_size=7)
    assert (found["loss"], found["accuracy"]) == pytest.approx(expected)
    history = run_fit(model, (X, labels), sgd(model), batch_size=N, accumulate=5, epochs=1)
    assert history.iterations["loss"][0] == pytest.approx(expected[0])


def test_labels_of_tokens_out_of_range_are_named() -> None:
    targets, model = TOKENS.clone(), network(15)
    targets[7, 2] = 3
    with pytest.raises(ValueError, match=r"train must .*got 3 at sample 7"):
        run_fit(model, (X, targets), sgd(model), loss=lambda y, z: F.cross_entropy(y.unflatten(1, (3, 5)), z))


BROADCAST: dict[str, tuple[bool, Tensor, Callable[[Tensor, Tensor], Tensor], str]] = {
    # whether outputs are flat, targets, loss, remedy
    "torch's": (False, torch.zeros(N), F.mse_loss, "unsqueeze"),
    "torch's without a warning": (False, torch.zeros(N), F.poisson_nll_loss, "unsqueeze"),
    "own": (False, torch.zeros(N), lambda y, z: (y - z).square().mean(), "unsqueeze"),
    "own, of something else": (False, torch.zeros(N), lambda y, z: (z - y.sigmoid()).abs().mean(), "unsqueeze"),
    "own, integers": (False, torch.zeros(N).long(), lambda y, z: (y - z.float()).square().mean(), "unsqueeze"),
    "flat outputs": (True, torch.zeros(N, 1), lambda y, z: (y - z).square().mean(), "squeeze"),
}


@pytest.mark.parametrize("case", BROADCAST)
def test_every_sample_is_compared_with_every_other_only_on_purpose(case: str) -> None:
    flat, targets, loss, remedy = BROADCAST[case]

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(1)
            self.time_steps = self.network.time_steps

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.network(x)
            return y.squeeze(1) if flat else y

    model = Flat()
    with pytest.raises(ValueError, match=rf"train must hold targets .*got shape \(24,.*{remedy}"):
        fit(model, (X, targets), loss=loss, optimizer=sgd(model), epochs=1, progress=False)
