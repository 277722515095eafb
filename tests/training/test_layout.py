"""The compiler's pass: same numbers, tall matrices stored by columns, nothing touched where it would not pay."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import taulearn
from taulearn.functional import half_mse_loss
from taulearn.nn import fractional_dnn, resnet
from taulearn.optim import SteepestDescent
from taulearn.training import History
from taulearn.training.fast.layout import Layout

ATEN = torch.ops.aten
# inductor's graphs know permute alone
PERMUTED = {
    ATEN.t.default: lambda x: ATEN.permute.default(x, [1, 0]),
    ATEN.transpose.int: lambda x, i, j: ATEN.permute.default(x, [1, 0]) if x.ndim == 2 else NotImplemented,
    ATEN.detach.default: lambda x: x,
}


def gradients(model: torch.nn.Module, rows: int, loss: Any = half_mse_loss) -> tuple[Any, tuple[Any, ...]]:
    """The gradient of a full-batch loss as a function of the parameters, and its arguments."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (7, 3))

    def total(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (inputs,)), targets)

    return torch.func.grad_and_value(total), ({n: p.detach() for n, p in model.named_parameters()}, inputs, targets)


def passed(function: Any, arguments: tuple[Any, ...], **options: Any) -> torch.fx.GraphModule:
    table = select_decomp_table() | PERMUTED
    module: torch.fx.GraphModule = make_fx(function, decomposition_table=table, tracing_mode="fake")(*arguments)
    Layout(**options)(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def count(module: torch.fx.GraphModule, target: Any) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def tall_products(module: torch.fx.GraphModule) -> int:
    return sum(n.target is ATEN.mm.default and n.meta["val"].shape[0] >= 1000 for n in module.graph.nodes)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("width", [5, 50])
@pytest.mark.parametrize("loss", [half_mse_loss, torch.nn.functional.mse_loss, torch.nn.functional.cross_entropy])
def test_the_numbers_stay(loss: Any, width: int, by_columns: bool) -> None:
    torch.manual_seed(0)
    model = resnet(7, width, 3, 4, activation="smooth_relu", dtype=torch.float64)
    function, arguments = gradients(model, 1200, loss)
    module = passed(function, arguments, by_columns=by_columns)
    torch.testing.assert_close(module(*arguments), function(*arguments), rtol=1e-12, atol=1e-14)
    assert count(module, ATEN.addmm.default) == 0
    assert (tall_products(module) == 0) == by_columns


@pytest.mark.parametrize(("rows", "width"), [(200, 5), (1200, 80)])
def test_short_and_wide_matrices_stay(rows: int, width: int) -> None:
    function, arguments = gradients(resnet(7, width, 60, 2, dtype=torch.float64), rows)
    arguments = (*arguments[:2], torch.zeros(rows, 60, dtype=torch.float64))
    before, after = (passed(function, arguments, by_columns=each) for each in (False, True))
    hidden = [n for n in after.graph.nodes if n.target is ATEN.clone.default and n.meta["val"].shape[0] == width]
    assert not hidden
    torch.testing.assert_close(after(*arguments), before(*arguments), rtol=1e-12, atol=1e-14)


def test_matrices_that_are_stacked_stay() -> None:
    """The memory of a fractional network, uncompiled, stacks its states: by columns they would be copied back."""
    function, arguments = gradients(fractional_dnn(7, 5, 3, 4, dtype=torch.float64), 1200)
    module = passed(function, arguments, by_columns=True)
    assert tall_products(module) > 0
    torch.testing.assert_close(module(*arguments), function(*arguments), rtol=1e-12, atol=1e-14)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("build", [resnet, fractional_dnn])
def test_a_compiled_line_search_takes_the_same_steps(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = (each[:1200].double() for each in taulearn.data.load("maxwell"))

    def train(how: str) -> tuple[torch.nn.Module, History]:
        torch.manual_seed(0)
        model = build(7, 5, 3, 4, activation="smooth_relu", init=1.0, dtype=torch.float64)
        optimizer = SteepestDescent(model.parameters())
        options: dict[str, Any] = {"epochs": 6, "batch_size": 1200, "progress": False, "compile": how}
        return model, taulearn.fit(model, (inputs, targets), loss=half_mse_loss, optimizer=optimizer, **options)

    by_rows: list[int] = []
    rewrite = Layout.__call__

    def watched(self: Layout, graph: torch.fx.Graph) -> None:
        rewrite(self, graph)
        by_rows.append(sum(n.target is ATEN.mm.default and n.meta["val"].shape[0] == 1200 for n in graph.nodes))

    monkeypatch.setattr(Layout, "__call__", watched)
    with torch._inductor.config.patch(force_disable_caches=True):
        (compiled, record), (eager, expected) = train("always"), train("never")
    assert by_rows == [0, 0]  # the value and the gradient
    np.testing.assert_allclose(record.iterations["total"], expected.iterations["total"], rtol=1e-10)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-9, atol=1e-11)
