"""The check of an exported file: it has to give what the model gives on random inputs, NaN and infinity included."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import Arguments, answers, outputs
from .trace import Runner, output_of

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest output where that exceeds 1."""

_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 1e-1}


def outputs_on(model: nn.Module, example: Arguments) -> dict[str, Tensor]:
    """The tensors that a model returns for the example, by name."""
    output = output_of(model, example)
    found = outputs(output)
    if not any(value.numel() for value in found.values()):
        raise ValueError(
            f"model must return a tensor, or a tuple or a dictionary of tensors, got a {type(output).__name__} with "
            "none (nested ones are left out): return them side by side"
        )
    return found


@torch.no_grad()
def compare(
    model: nn.Module,
    run: Runner,
    example: Arguments,
    sizes: Sequence[int],
    format: str,  # noqa: A002  it is called so everywhere
    others: Sequence[str],
) -> tuple[float, float]:
    """Compare a file with the model it was made of."""
    difference = size = 0.0
    names = dict.fromkeys(outputs(output_of(model, example)), False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number in sizes:
            inputs = example.of_batch(number)
            for name, found, expected in zip(names, run(inputs), answers(model, inputs), strict=True):
                tolerance = _TOLERANCES.get(expected.dtype, TOLERANCE)
                apart, largest = _apart(found.double(), expected.double())
                difference, size = max(difference, apart), max(size, largest)
                names[name] |= not expected.numel() or not bool(expected.isnan().all())
                if apart > tolerance * max(1.0, largest):
                    raise ValueError(_refusal(model, inputs, tolerance, apart, largest, number, format, others))
    empty = [name for name, seen in names.items() if not seen]
    if empty:
        raise ValueError(
            f"model must give numbers on random inputs like example_inputs, got NaN alone in {empty[0]!r}, with which "
            "no file can be compared: give weights that are finite, and other example_inputs"
        )
    return difference, size


def _apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest difference where both are finite (infinity if only one is) and largest finite expected value."""
    finite = expected.isfinite()
    largest = float(expected[finite].abs().amax()) if bool(finite.any()) else 0.0
    if found.shape != expected.shape:
        return float("inf"), largest
    same = torch.where(finite, found.isfinite(), (found == expected) | (found.isnan() & expected.isnan()))
    if not bool(same.all()):
        return float("inf"), largest
    return float((found - expected)[finite].abs().amax()) if bool(finite.any()) else 0.0, largest


def _refusal(
    model: nn.Module,
    inputs: Arguments,
    tolerance: float,
    apart: float,
    largest: float,
    number: int,
    format: str,  # noqa: A002
    others: Sequence[str],
) -> str:
    once, again = answers(model, inputs), answers(model, inputs)
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(once, again, strict=True)):
        return (
            "model must give the same twice in evaluation mode, got one that draws random numbers there, so that no "
            "file can be compared with it: draw them outside, and hand them over as an input"
        )
    gap = f"a difference of {apart:.2g}" if math.isfinite(apart) else "other shapes, or NaN or infinity elsewhere,"
    return (
        f"the exported file must agree with the model to {tolerance:g} on random inputs, got {gap} in a batch of "
        f"{number} (outputs up to {largest:.2g}): format {format!r} does not express this model; use "
        f"{' or '.join(map(repr, others))}"
    )
