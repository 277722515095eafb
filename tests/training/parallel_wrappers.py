"""Models of which torch's own parallel wrappers hold a part: what is said to them, and what works."""

from pathlib import Path

import torch
from torch import nn

import taulearn
from training.parallel_base import RANK, model_and_optimizer
from training.support import digits, run_fit


def wrapped_in_ddp(folder: Path) -> None:
    """The refusals of fit and prune of a live DistributedDataParallel, and that of a stale one after a deletion."""
    torch.distributed.is_initialized() or torch.distributed.init_process_group("gloo")
    model, optimizer = model_and_optimizer()
    wrapper = nn.parallel.DistributedDataParallel(model)
    inputs, targets = digits(20, torch.float64)
    said = []
    for act in (
        lambda: taulearn.prune(wrapper, keep=[0, 1, 2]),
        lambda: run_fit(wrapper, (inputs, targets), optimizer),
        lambda: taulearn.prune(model, keep=[0, 1, 2], optimizer=optimizer) and wrapper(inputs),
        lambda: taulearn.wrap(
            nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "0"
        ),
    ):
        try:
            act()
        except (TypeError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    nn.parallel.DistributedDataParallel(model)(inputs).sum().backward()
    (folder / f"{RANK}.said").write_text("\n".join(said))


def sharded(folder: Path) -> None:
    """The refusal by prune of a model that fully_shard sharded; the remedy works."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.is_initialized() or torch.distributed.init_process_group("gloo")
    model, _ = model_and_optimizer()
    inputs, _ = digits(20, torch.float64)
    before = model(inputs).detach()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.testing.assert_close(model(inputs).detach(), before)
    said = []
    for act in (
        lambda: taulearn.prune(model, keep=[0, 1, 2]),
        lambda: run_fit(model, digits(20, torch.float64), torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda: taulearn.save_model(model, folder / "saved"),
        lambda: taulearn.export_model(model, folder / "exported", inputs, format="torch"),
    ):
        try:
            act()
        except ValueError as error:
            said.append(str(error))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    fresh, optimizer = model_and_optimizer()
    fresh.load_state_dict(weights if RANK == 0 else fresh.state_dict())
    taulearn.prune(fresh, keep=[0, 2, 6], optimizer=optimizer)
    pruned = fresh(inputs).detach()
    fully_shard(fresh)
    torch.testing.assert_close(fresh(inputs).detach(), pruned)
    fresh(inputs).sum().backward()
    torch.optim.SGD(fresh.parameters(), lr=0.1).step()
    (folder / f"{RANK}.said").write_text("\n".join(said))
