"""Small products of matrices for the compiled step on a CPU, computed by products.cpp.

For layers of width 100 and batches of 100 the library that torch calls gets 85 GFLOP/s out of a core whose peak is 116,
and 130 out of two of them; products.cpp gets 100 and 195 (EPYC of the fourth generation, AVX-512). It is compiled once,
by the compiler that torch.compile needs anyway, and the code that torch.compile makes calls it directly.
"""

import ctypes
import functools
import platform
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

_MM = torch.ops.aten.mm.default
SOURCE = Path(__file__).with_name("products.cpp")
_SHIM = "AOTITorchError aoti_torch_cpu_small_product(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* c)"
_LONGEST, _FEWEST = 1024, 64


@torch.library.custom_op("taulearn::small_product", mutates_args=(), device_types="cpu")
def small_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices; what is compiled computes it by products.cpp."""
    return torch.mm(a, b)


@small_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


class _Shims(dict[Any, list[str]]):
    """Operators and the declarations of what computes them; pickled by name, so that compiled code can be cached."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _shims, ()


def _shims() -> _Shims:
    return _Shims({torch.ops.taulearn.small_product.default: [_SHIM]})


@functools.cache
def options() -> dict[str, Any]:
    """Options of torch.compile that let it call products.cpp, which is compiled here unless it was before."""
    from torch._inductor import config

    if not hasattr(config.aot_inductor, "custom_ops_to_c_shims"):
        return {}
    return {"aot_inductor.custom_ops_to_c_shims": _shims()} if _load() else {}


def _load() -> bool:
    """Compile products.cpp, unless it was before, and take it into use; a warning tells where that fails."""
    try:
        from torch._inductor.codecache import CppCodeCache

        # kept libraries are found by the text alone
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        key = f"// torch {torch.__version__}, Python {platform.python_version()}, {processor}\n"
        library = CppCodeCache.load(key + SOURCE.read_text("utf-8"), device_type="cpu")
        ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)  # global, as code that is compiled later looks for it there
    except Exception as error:  # noqa: BLE001  compilers raise anything, and torch does without
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])
        warnings.warn(
            f"compiled steps use torch's matrix products, up to a quarter slower, as {SOURCE.name} did not compile: "
            f"{reason} (install a current g++ or set CXX; set TORCHINDUCTOR_CACHE_DIR where the cache cannot be "
            "written)",
            stacklevel=3,
        )
        return False
    return True


def call_small_products(graph: fx.Graph) -> None:
    """Let the graph of a function call ``taulearn::small_product`` where that is faster."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _MM and _pays(node):
            node.target = torch.ops.taulearn.small_product.default


def _pays(node: fx.Node) -> bool:
    """Whether products.cpp was measured to be faster.

    It is not where sums are longer than a thousand, whose strips leave the cache, nor where so few rows read a matrix
    stored by columns that turning it costs more than it saves.
    """
    a, b = (cast(fx.Node, each).meta["val"] for each in node.args)
    (rows, k), by_rows = a.shape, b.stride(1) == 1
    if a.dtype is not torch.float32 or a.device.type != "cpu" or k > _LONGEST:
        return False
    if 1 not in b.stride() or 0 in b.stride():
        return False
    return bool(by_rows or rows >= _FEWEST or k >= 4 * rows)
