"""A second device without a card: tensors that say they lie elsewhere, and refuse operations with those that do not.

Their entries lie in a tensor on the CPU, so that code which reads values runs too, and gives the CPU's results to the
bit. (torch's FakeTensorMode has no values: the builders' checks of tau already ask for them.) The rules are CUDA's:
tensors of one operation lie on one device, but for numbers (no dimension) outside lists and for what says where to
look (indices on the CPU); copies move between devices.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ELSEWHERE = torch.device("lazy", 0)  # a type of which the CPU's build knows the name and nothing else
aten = torch.ops.aten
_MOVES = (aten._to_copy.default, aten.copy_.default)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Far(Tensor):
    """A tensor elsewhere, whose entries are those of ``near``."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        like = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = Tensor._make_wrapper_subclass(cls, near.shape, **like, device=ELSEWHERE)
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        return self.near.tolist()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def set_(self, *where: Any) -> "Far":
        return Far(self.near.set_(*where))  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            twin: Tensor = Far(copy.deepcopy(self.near))
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near})"


class SecondDevice(TorchDispatchMode):
    """While it holds, tensors can be made on, and moved to, ``ELSEWHERE``."""

    def __enter__(self) -> "SecondDevice":
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=) asks the mode too, as torch's own
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do an operation on the entries, and say where its results lie."""
    far = [each for each in tree_iter((args, kwargs)) if isinstance(each, Far)]
    if far and operation not in _MOVES:
        refuse_mixed(operation, args)
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
        elsewhere = torch.device(device).type == ELSEWHERE.type
    elif operation is aten.copy_.default:
        elsewhere = isinstance(args[0], Far)
    else:
        elsewhere = bool(far)
    result = operation(*each_tensor(near, args), **each_tensor(near, kwargs))
    if not elsewhere:
        return result
    known = {id(each.near): each for each in far}  # an operation in place returns what it was given
    return each_tensor(lambda each: known[id(each)] if id(each) in known else Far(each), result)


def refuse_mixed(operation: Any, args: tuple[Any, ...]) -> None:
    looked_at = args[::2] if operation.name().partition(".")[0] in _INDEXING else args
    places = set()
    for each in looked_at:
        if isinstance(each, list | tuple):
            places |= {isinstance(one, Far) for one in each if isinstance(one, Tensor)}
        elif isinstance(each, Tensor) and (isinstance(each, Far) or each.ndim > 0):
            places.add(isinstance(each, Far))
    if len(places) > 1:
        raise RuntimeError(f"{operation} is given tensors on two devices")


def near(tensor: Tensor) -> Tensor:
    return tensor.near if isinstance(tensor, Far) else tensor


def each_tensor(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    return tree_map(lambda each: function(each) if isinstance(each, Tensor) else each, values)
