"""Small products of the compiled step, against NumPy in float64 and against themselves on other numbers of threads."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from taulearn.training.fast import products as _products
from taulearn.training.fast.compiler import compile_once
from taulearn.training.fast.layout import Layout

SMALL = torch.ops.taulearn.small_product.default
SHAPES = [(2, 2, 2), (3, 17, 5), (7, 2, 3), (5, 16, 16), (6, 64, 4), (13, 48, 31), (100, 100, 100), (9, 113, 20)]
SHAPES += [(100, 10, 100), (100, 100, 784), (100, 784, 100), (64, 33, 1023), (3, 5, 1024), (65, 66, 67), (250, 31, 9)]
"""Rows, columns and length of the sums; single rows and columns the compiler takes itself."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def operands() -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices of all shapes, by rows and by columns, the first also with gaps between rows."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for m, n, k in SHAPES:
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        gaps = torch.randn(m, k + 3, generator=generator)[:, :k]
        pairs += [(x, y) for x in (a, a.t().contiguous().t(), gaps) for y in (b, b.t().contiguous().t())]
    return pairs


def products(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [torch.mm(a, b) for a, b in pairs]


def calls(function: Any, *arguments: Any) -> list[Any]:
    """The calls of a function after the compiler's pass."""
    module = make_fx(function, tracing_mode="fake")(*arguments)
    Layout(products=True)(module.graph)
    module.graph.lint()
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets for a test whether products.cpp could be compiled."""
    _products.options.cache_clear()
    yield
    monkeypatch.undo()
    _products.options.cache_clear()


@needs_compiler
def test_products_are_those_of_numpy_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "_pays", lambda _: True)
    replaced: list[int] = []
    rewrite = _products.call_small_products

    def watched(graph: torch.fx.Graph) -> None:
        rewrite(graph)
        replaced.append(sum(node.target is SMALL for node in graph.nodes))

    monkeypatch.setattr(_products, "call_small_products", watched)
    pairs, results = operands(), []
    compiled, threads = compile_once(products, fused=True), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch._inductor.config.patch(force_disable_caches=True):
                results.append([each.numpy().copy() for each in compiled(*pairs)])
    finally:
        torch.set_num_threads(threads)
    assert replaced == [len(pairs)]
    for (a, b), one, *others in zip(pairs, *results, strict=True):
        x, y = a.double().numpy(), b.double().numpy()
        bound = 1e-6 * np.abs(x) @ np.abs(y)
        np.testing.assert_array_less(np.abs(one - x @ y), bound + 1e-30)
        for other in others:
            np.testing.assert_array_equal(one, other)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("bits", ["256", "1"])
def test_products_with_shorter_vectors_and_without_any(bits: str) -> None:
    test = f"{__file__}::{test_products_are_those_of_numpy_on_any_number_of_threads.__name__}"
    script = (
        "import sys, pytest, torch\n"
        f"torch._inductor.config.cpp.simdlen = {bits}\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", script, test], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@needs_compiler
def test_matrices_that_come_in_another_layout_than_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor expands single rows and columns with strides 0, whatever torch's own expansion has."""
    monkeypatch.setattr(_products, "_pays", lambda _: True)

    def changes(x: Tensor, w: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda v: torch.mm(x, v).sum())(w)
        w.sub_(gradient)
        return torch.mm(x, x.sum().reshape(1, 1).expand(5, 1))

    torch.manual_seed(0)
    x, w = torch.randn(100, 5), torch.randn(5, 1)
    results = [(function(x, v := w.clone()), v) for function in (compile_once(changes, fused=True), changes)]
    torch.testing.assert_close(results[0], results[1])


@needs_compiler
def test_what_is_compiled_with_them_can_be_cached() -> None:
    """Keys of the compiler's caches are pickles, which operators have none of."""
    options = _products.options()
    assert pickle.loads(pickle.dumps(options)) == options
    assert options


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.zeros(64, 100), torch.zeros(30, 100).t(), True),
        (torch.zeros(63, 100), torch.zeros(30, 100).t(), False),  # too few rows to turn the second for
        (torch.zeros(25, 100), torch.zeros(30, 100).t(), True),  # sums long enough to need no turning
        (torch.zeros(8, 20), torch.zeros(20, 30), True),
        (torch.zeros(100, 1024), torch.zeros(1024, 8), True),
        (torch.zeros(100, 1025), torch.zeros(1025, 8), False),
        (torch.zeros(100, 100, dtype=torch.float64), torch.zeros(100, 100, dtype=torch.float64), False),
        (torch.zeros(100, 100), torch.zeros(200, 200)[::2, ::2], False),
        (torch.zeros(100, 100), torch.zeros(100, 1).expand(100, 100), False),
    ],
)
def test_a_product_is_replaced_where_it_was_measured_to_pay(a: Tensor, b: Tensor, expected: bool) -> None:
    assert (SMALL in calls(torch.mm, a, b)) == expected


def test_uncompiled_it_is_the_product_of_torch() -> None:
    a, b = torch.randn(5, 7), torch.randn(9, 7).t()
    torch.testing.assert_close(_products.small_product(a, b), a @ b, rtol=0, atol=0)
    torch.library.opcheck(SMALL, (a, b))


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_where_products_cannot_be_compiled_those_of_torch_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction: vfmadd\nand much more")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", fail)
    with pytest.warns(UserWarning, match="torch's matrix products.*: no such instruction: vfmadd .install"):
        assert _products.options() == {}
    monkeypatch.undo()
    a, b = torch.randn(70, 7), torch.randn(7, 5)
    torch.testing.assert_close(compile_once(torch.mm, fused=True)(a, b), a @ b)


@needs_compiler
def test_a_compiler_that_does_not_find_them_gets_another_chance(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked: list[bool] = []

    def compile_(function: Any, *, options: dict[str, Any], **_: Any) -> Any:
        own = "aot_inductor.custom_ops_to_c_shims" in options

        def run(*arguments: Any) -> Any:
            asked.append(own)
            if own:
                raise RuntimeError("undefined symbol: aoti_torch_cpu_small_product")
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    half = compile_once(lambda x: 2 / x, fused=True, failed=lambda _: pytest.fail("it did not fail"))
    assert [half(1), half(2)] == [2, 1]
    assert asked == [True, False, False]
    with pytest.raises(ZeroDivisionError):  # nothing is taken twice once it works
        half(0)
    assert asked == [True, False, False, False]
    assert not [each for each in recwarn if "uncompiled" in str(each.message)]
