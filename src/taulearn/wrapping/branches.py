"""Branch steps: time steps that fold into the weights (MATH.md section 11).

A block is often a chain of residual branches, x <- x + g_1(x), then x <- x + g_2(x) (attention and MLP). With

    B_tau = (I + tau g_m) o ... o (I + tau g_1)

it is one Lie-Trotter step of size tau of x' = g_1(x) + .. + g_m(x): the block itself at tau = 1 and the identity at
tau = 0, to the bit. Branches side by side, x + tau (g_1(x) + g_2(x)), are one Euler step. Where the last map of each
branch is affine in its own parameters, g_i(x) = A_i h_i(x) + c_i, the step folds into them,

    A_i <- tau A_i,   c_i <- tau c_i,

and the model is again a plain one of its class. Where a normalisation scales by 1 + w, w <- tau (1 + w) - 1.

A step multiplies the output of the outermost module that holds its branch and nothing else (the site), so that it costs
one multiplication and needs no access to weights, which may be frozen, quantised, or have adapters. Only folding
changes parameters, those of the ends. The steps replace ``forward`` on the instances, as those of form "whole" do; the
block itself is watched, as code that takes the weights of an end without calling the site would leave its step out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.time_steps import TimeSteps
from .state_argument import Form


class End(NamedTuple):
    """A parameter into which a step folds."""

    parameter: str  # its name in the block
    offset: int  # 1 where it enters as 1 + w, as the scales of some normalisations do; else 0


@dataclass(frozen=True)
class Branch:
    """A residual branch of a block."""

    site: str  # name in the block of the module whose output the step multiplies
    form: Form  # where that output holds the increment; its argument is one that has the increment's size
    sizes: tuple[tuple[int, int], ...]  # dimensions in which the increment differs from that argument, and their sizes
    ends: tuple[End, ...]
    not_folded: str = ""  # why the step does not fold, or nothing
    not_deleted: str = ""  # why the branch cannot be deleted alone, or nothing


def folded(value: Tensor, tau: float, offset: int) -> Tensor:
    """A parameter of an end with a step in it: tau (offset + w) - offset.

    Example:
        >>> folded(torch.tensor([2.0]), 0.5, 0), folded(torch.tensor([1.0]), 0.5, 1)
        (tensor([1.]), tensor([0.]))
    """
    exact = value.to(torch.promote_types(value.dtype, torch.float32))  # rounded once, as 1 + w is not in bfloat16
    return (tau * (offset + exact) - offset).to(value.dtype)


@dataclass(eq=False)
class Run:
    """What a block and its sites tell each other in a forward pass."""

    indices: tuple[int, ...]  # positions of the sites' steps among those of the host
    taus: tuple[Tensor, ...] = ()  # the sites' steps while the block runs
    sites: list[int] = field(default_factory=list)  # numbers of those that ran

    def __reduce__(self) -> tuple[type["Run"], tuple[tuple[int, ...]]]:
        return Run, (self.indices,)  # in copies nothing runs


@dataclass(frozen=True, eq=False)
class BranchStep:
    """The step of a site, whose ``forward`` is :meth:`forward`.

    torch.compile would compile anew for each object that is a forward, but not for each that has one; and for each
    number that it finds inside of modules, which is why the index comes from the block.
    """

    inner: Callable[..., Any]
    steps: TimeSteps  # the time steps of the host
    form: Form  # where the increment is in the output
    own: bool  # whether ``inner`` was an attribute of the instance already
    number: int  # of the site in its block
    run: Run  # the block's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output with tau g in the place of the increment g."""
        output, run = self.inner(*args, **kwargs), self.run
        run.sites.append(self.number)
        g = output if isinstance(output, Tensor) else self.form.leaving(output)
        if g is None:
            raise ValueError(f"the output of a branch must hold a tensor, got {type(output).__name__}: {_REMEDY}")
        # in a branch that activation checkpointing computes again, its block does not run
        tau = run.taus[self.number] if run.taus else self.steps.tau[run.indices[self.number]]
        if tau.dtype != g.dtype or tau.device != g.device:
            tau = tau.to(device=g.device, dtype=g.dtype)
        if g is output:
            return g * tau
        if type(output) is tuple and output[0] is g:
            return g * tau, *output[1:]
        return self.form.replaced(output, g * tau)


@dataclass(frozen=True, eq=False)
class WatchedBlock:
    """The ``forward`` of a block with branch steps: each site must run once in a pass, none in one that is skipped."""

    inner: Callable[..., Any]
    steps: TimeSteps  # the time steps of the host
    form: Form  # where the block's state is
    name: str  # the block's name in the host when it was wrapped
    sites: dict[int, str]  # names of its sites by number
    indices: tuple[int, ...]  # positions of their steps among those of the host; of gone ones any
    together: bool  # whether they have one step
    run: Run
    own: bool

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function whose signature ``inspect.signature`` shows."""
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own output."""
        run, tau = self.run, self.steps.tau
        alike = (tau[self.indices[0]],) * len(self.indices) if self.together else None
        run.indices, run.sites, run.taus = self.indices, [], alike or tuple(tau[index] for index in self.indices)
        try:
            output = self.inner(*args, **kwargs)
        finally:
            run.taus = ()
        if sorted(run.sites) != list(self.sites):
            if not run.sites and self.form.leaving(output) is self.form.arriving(args, kwargs):
                return output  # skipped, by stochastic depth in training, say
            times = {name: run.sites.count(number) for number, name in self.sites.items()}
            raise ValueError(
                f"each branch of block {self.name!r} must run once in a forward pass, got {times}: {_REMEDY}"
            )
        return output


def step_of(module: nn.Module) -> Any:
    """What a module has as its forward on the instance: of a site the step, of others the callable, or None."""
    forward = vars(module).get("forward")
    holder = getattr(forward, "__self__", None)
    return holder if isinstance(holder, BranchStep) else forward


_REMEDY = (
    "a fast path that takes weights without calling the modules leaves the steps out; switch it off "
    "(torch.backends.mha.set_fastpath_enabled(False) for torch's encoder), or wrap with form='whole'; threads that run "
    "one model at once need a copy each, or the model unwrapped"
)
