"""Changes of the layers of a model that several processes hold; each of them must make them, and at the same time.

DistributedDataParallel keeps a list of the parameters that it was made with. After a change it would go on without an
error, average the gradients of the old list, and let the replicas drift apart: so it is made anew, in its place, that
loops which hold it need not know.

fully_shard keeps a list, too, but of units, each with its own parameters; a unit that is not called any more is never
gathered. So a deletion takes whole units out, and frees the memory of their shards, which the list holds on to. Time
steps are left out of the sharding (``ignored_params``): each process has all of them, and their gradients are averaged
as they come.
"""

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._meeting import groups
from ._ranks import RankLost, Ranks

_GATHER = (
    "or gather the weights (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), "
    "load them into a fresh model, prune that one, and shard it anew"
)


class Together:
    """A model that several processes hold while its layers change.

    Args:
        model: The model itself.
        wrappers: Each DistributedDataParallel around it.
        shards: The sign that it is sharded, or None.

    Raises:
        ValueError: If it is sharded in a way in which no layer can be taken out.
    """

    def __init__(self, model: nn.Module, wrappers: Sequence[Any], shards: str | None) -> None:
        self.model, self.wrappers, self.sharded = model, wrappers, shards is not None
        self._ranks: Ranks | None = None
        for each in wrappers:
            if each.mixed_precision is not None:
                raise ValueError(
                    "mixed_precision must be None in the DistributedDataParallel of a model whose layers change, got "
                    "a policy, whose copies of the parameters cannot follow: use torch.autocast"
                )
        if shards is not None:
            _check_sharded(model)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The means of figures over the processes, which are equal in all of them to the bit."""
        if self._ranks is None:
            self._ranks = Ranks(*groups())  # for the next time, too
        device = next(p.device for p in self.model.parameters())
        total: list[float] = self._ranks.add(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
        return [each / self._ranks.size for each in total]

    def _check_units(self, blocks: Iterable[nn.Module]) -> None:
        """Refuse to take out blocks whose parameters are in a unit of fully_shard with those of others."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        inside = {part for block in blocks for part in block.modules()}
        units: dict[Any, list[Any]] = {}  # the modules that a call of fully_shard was handed, by their state
        unit_of: dict[Any, list[Any]] = {}
        for name, module in self.model.named_modules():
            above = self.model.get_submodule(name.rpartition(".")[0])
            unit_of[module] = unit_of.get(above, [])
            if isinstance(module, FSDPModule):
                unit_of[module] = units.setdefault(cast(Any, fully_shard).state(module), [])
                unit_of[module].append(module)
        for name, p in self.model.named_parameters(remove_duplicate=False):
            module = self.model.get_submodule(name.rpartition(".")[0])
            others = [each for each in unit_of[module] if each not in inside]
            if module in inside and _is_sharded(p) and others:
                raise ValueError(
                    f"model must be sharded block by block, got {name!r} in a unit with {type(others[0]).__name__!r}: "
                    f"call fully_shard on each block before the whole model, {_GATHER}"
                )

    @contextmanager
    def changing(self, what: str, chosen: Mapping[int, nn.Module | None], tau: Tensor) -> Iterator[None]:
        """Change layers, by their positions with the modules that go, in all processes alike or in none.

        Args:
            what: What is done to them, for the message.
            chosen: The positions.
            tau: The time steps now, which must be the same in all processes.

        Raises:
            RanksDisagree: If others chose something else, or have other time steps.
            ConnectionError: If others do not come, or do not answer.
            ValueError: If a module that goes is sharded together with others.
        """
        if self.sharded:
            self._check_units(module for module in chosen.values() if module is not None)
        with Ranks(*groups()) as ranks:
            ranks.same("the time steps", tau.tolist(), "average their gradients over the processes, as attach does")
            ranks.same(what, sorted(chosen), "let all processes do the same, with the same steps and data")
            ranks.same(
                "the number of DistributedDataParallels around the model",
                len(self.wrappers),
                "let go of those that are not called any more",
            )
            try:
                yield
            except BaseException:
                ranks.any(True)
                raise
            if ranks.any(False):
                raise RankLost("the layers stay as they were: another process failed to change them, and says why")

    def follow(self, gone: Iterable[nn.Module], values: Tensor, before: Tensor) -> None:
        """Let wrappers and shards follow, now that modules are gone and other time steps may be in place."""
        for wrapper in self.wrappers:
            renew(wrapper)
        if self.sharded:
            if values is not before:
                average_gradient(values)
            left = set(self.model.parameters())
            for module in gone:
                _free(module, left)
            self._forget_prefetching()

    def _forget_prefetching(self) -> None:
        """Let no unit gather one that is gone ahead of time; torch's own prefetching goes on."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_forward_prefetch([])
                module.set_modules_to_backward_prefetch([])


def wrappers_around(model: nn.Module) -> list[Any]:
    """Every DistributedDataParallel that there is around a model, for which all objects are gone through."""

    def found() -> list[Any]:
        wrappers = (each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))
        return [each for each in wrappers if any(part is model for part in each.modules())]

    if len(wrappers := found()) > 1:
        del wrappers
        gc.collect()  # of one that nobody holds any more
        wrappers = found()
    return wrappers


def renew(wrapper: Any) -> None:
    """Make a DistributedDataParallel anew in its place, in all processes at once; what else it holds stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        fresh = DistributedDataParallel(
            wrapper.module,
            device_ids=wrapper.device_ids,
            output_device=wrapper.output_device,
            dim=wrapper.dim,
            broadcast_buffers=wrapper.broadcast_buffers,
            process_group=wrapper.process_group,
            bucket_cap_mb=wrapper.bucket_bytes_cap / 2**20,
            find_unused_parameters=wrapper.find_unused_parameters,
            gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
            static_graph=wrapper.static_graph,
        )
    for hook, state in getattr(wrapper, "_comm_hooks", ()):  # of register_comm_hook
        fresh.register_comm_hook(state, hook)
    kept = vars(nn.Module()).keys()  # hooks and parts
    vars(wrapper).update({name: value for name, value in vars(fresh).items() if name not in kept})


def average_gradient(values: Tensor) -> None:
    """Let the gradient of a parameter that is not sharded be averaged over the processes as it comes.

    Where gradients accumulate over several passes, what was averaged before stays so.
    """
    if not values.requires_grad:
        return

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    values.register_post_accumulate_grad_hook(average)


def whole(value: Tensor) -> Tensor:
    """A figure of sharded weights as every process has it."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else cast(Tensor, full())


@torch.no_grad()
def _free(module: nn.Module, left: set[nn.Parameter]) -> None:
    """Free the shards of a module that is not called any more."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for parameter in set(module.parameters()) - left:
        parameter.grad = None
        if _is_sharded(parameter):
            cast(Any, parameter.detach()).to_local().untyped_storage().resize_(0)


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _check_sharded(model: nn.Module) -> None:
    """Refuse models that are sharded otherwise than by fully_shard, and sharded time steps."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import Shard

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inside = {p for unit in units for p in unit.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"model must be sharded by fully_shard, got the FullyShardedDataParallel {name!r}, in whose flat "
                f"parameters layers have no end: use torch.distributed.fsdp.fully_shard, {_GATHER}"
            )
    p: Any
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(f"model must be sharded by fully_shard, got {name!r} in DeepSpeed's: use fully_shard")
        if not _is_sharded(p):
            continue
        if name.startswith("time_steps."):
            raise ValueError(
                "the time steps must not be sharded, got them as a DTensor: write "
                "fully_shard(model, ignored_params={model.time_steps.values})"
            )
        if p not in inside or sum(isinstance(each, Shard) for each in p.placements) > 1:
            raise ValueError(
                f"model must be sharded by fully_shard alone, got {name!r} as a DTensor of tensor parallelism, whose "
                f"layers compute together: {_GATHER}"
            )


@contextmanager
def gathered(model: nn.Module, optimizers: Sequence[Any] = ()) -> Iterator[Ranks]:
    """The sharded model as the plain one that it was, on the CPU of the first process, to be written; then as before.

    So are its optimisers. All processes must enter at once; the others have no values. Parameter by parameter is
    gathered.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = [*model.modules()]
    units = [module for module in modules if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    held: list[tuple[Any, Any]] = []
    held += [(each, dict(each)) for module in modules for each in (module._parameters, module._buffers)]
    held += [(each, dict(each)) for unit in units for each in (unit._forward_pre_hooks, unit._forward_hooks)]
    held += [(each.state, dict(each.state)) for each in optimizers]
    held += [(group, dict(group)) for each in optimizers for group in each.param_groups]
    kinds, whole = {unit: type(unit) for unit in units}, dict[Tensor, Tensor]()  # tied parameters stay so
    with Ranks(*groups()) as ranks:
        try:
            for module in modules:
                own: dict[str, Any] = module._parameters
                for key, p in own.items():
                    if p is not None and p not in whole:
                        whole[p] = nn.Parameter(_gathered(p, ranks.first), requires_grad=p.requires_grad)
                    own[key] = None if p is None else whole[p]
                for name, b in [*module._buffers.items()]:
                    module._buffers[name] = None if b is None else b.cpu()
            for each in optimizers:
                state = {
                    whole.get(p, p): {k: _gathered(v, ranks.first) for k, v in own.items()}
                    for p, own in each.state.items()
                }
                each.state.clear()
                each.state.update(state)
                for group in each.param_groups:
                    group["params"] = [whole.get(p, p) for p in group["params"]]
            for unit in units:
                for hooks in (unit._forward_pre_hooks, unit._forward_hooks):
                    for number in [number for number, hook in hooks.items() if _of_torch(hook)]:
                        del hooks[number]
                unit.__class__ = type(unit).__mro__[2]  # below FSDPModule, which fully_shard puts in front
            yield ranks
        finally:
            for unit, kind in kinds.items():
                unit.__class__ = kind
            for each, before in held:
                each.clear()
                each.update(before)


def _gathered(value: Any, here: bool) -> Any:
    """All of a tensor on the CPU, or its shape where it is not wanted; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    full: Tensor = cast(Any, value.detach()).full_tensor() if _is_sharded(value) else value.detach()
    return full.cpu() if here else torch.empty_like(full, device="meta")


def _of_torch(hook: Any) -> bool:
    """Whether a hook is one with which fully_shard gathers parameters."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
