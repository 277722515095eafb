"""Shared by the functions of the package: checks of their arguments, their precision, own gradients."""

import math
from typing import Any, cast

import torch
from torch import Tensor


def to_double(y: Tensor) -> Tensor:
    """Cast y to double precision, real or complex."""
    return y.to(torch.promote_types(y.dtype, torch.float64))


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which has no type."""
    return cast(Any, function).apply(*arguments)


def check_order(gamma: float) -> float:
    """Check that gamma is a number in (0, 1) and return it as a float that is a constant under torch.compile."""
    if isinstance(gamma, Tensor):
        raise TypeError("gamma must be a number, got a tensor: gradients with respect to the order are not computed")
    if gamma is None or isinstance(gamma, (str, bytes, list, tuple)):
        raise TypeError(f"gamma must be a number in (0, 1), got {gamma!r}: it is the order of the derivative")
    # A call the compiler evaluates while tracing. A float left symbolic gave wrong results (pytorch issue 194976).
    order = math.fsum((gamma,))
    if not 0.0 < order < 1.0:
        raise ValueError(
            f"gamma must lie in (0, 1), got {order:g}: it is the order of the derivative, and 1 is the residual scheme"
        )
    return order


def check_steps(tau: Tensor, *, validate: bool) -> None:
    """Check that tau is a vector of step sizes, and their values too where they can be looked at."""
    if not isinstance(tau, Tensor):
        raise TypeError(f"tau must be a tensor of step sizes, got {type(tau).__name__}: write torch.as_tensor(tau)")
    if not tau.is_floating_point():
        raise TypeError(f"tau must be a floating point tensor, got {tau.dtype}: give step sizes as float32 or float64")
    if tau.ndim != 1 or tau.shape[0] == 0:
        raise ValueError(f"tau must be a vector of at least one step size, got shape {tuple(tau.shape)}")
    if validate and not torch.compiler.is_compiling():
        bad = ~((tau > 0) & torch.isfinite(tau)).detach()
        try:
            found = bool(bad.any())
        except RuntimeError as error:
            raise RuntimeError("validate must be False under torch.func.vmap: the values of tau are hidden") from error
        if found:
            index = int(bad.int().argmax())
            raise ValueError(
                f"tau must be positive and finite, got tau[{index}] = {tau[index].item():g}: "
                "a fractional scheme needs steps with a lower bound, such as lower_bound=1e-4"
            )
        steps = tau.detach().double()
        if not bool(torch.isfinite((steps.sum() / steps.min()).square())):
            raise ValueError(
                "tau must span less than 150 orders of magnitude, got steps from "
                f"{steps.min().item():g} to {steps.max().item():g}: squares of their ratios overflow"
            )
