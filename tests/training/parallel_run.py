"""One process of a data parallel training: torchrun --nproc-per-node 2 -m training.parallel_run FOLDER NAME ...

Each NAME is one of the functions below. It leaves in FOLDER/NAME what the tests look at: RANK.safetensors with the
record and all tensors, or RANK.error with the error that it ended with.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import taulearn
from taulearn import Pruning, parameter_groups
from taulearn.files import write_tensors
from taulearn.penalties import L1
from taulearn.training import EpochEnd, History, Interrupted
from training.support import digits, network, run_fit

RANK = int(os.environ.get("RANK", "0"))
STEPS = [0.5, 0.03, 0.3, 0.1, 0.2, 0.17, 0.3, 0.25]


def model_and_optimizer(kind: str = "sgd", **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = network(8, dtype=torch.float64, init=STEPS, horizon=sum(STEPS), **options)
    groups = parameter_groups(model, lr=0.05, tau_lr=0.02, weight_decay=1e-4)
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adam": lambda: torch.optim.Adam(groups, lr=2e-3),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
        "steepest_descent": lambda: taulearn.optim.SteepestDescent(model.parameters()),
    }
    return model, kinds[kind]()


def leave(folder: Path, model: nn.Module, history: History, optimizer: torch.optim.Optimizer | None = None) -> None:
    """What the tests look at: the record, all tensors of the model, and of the optimiser's state."""
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        tensors |= {
            f"state/{names[id(p)]}/{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    write_tensors(folder / f"{RANK}.safetensors", tensors | history.tensors(), {"origin": str(model.time_steps.origin)})


def train(folder: Path, kind: str = "sgd", **options: Any) -> None:
    """100 iterations, during which layers go."""
    model, optimizer = model_and_optimizer(kind)
    defaults: dict[str, Any] = {
        "epochs": 10,
        "batch_size": 42,
        "penalties": [L1(0.2, proximal=True)],
        "pruning": Pruning(0.02, every=7),
        "validation": digits(60, torch.float64),
    }
    history = run_fit(model, digits(420, torch.float64), optimizer, **defaults | options)
    leave(folder, model, history, optimizer)


def adam(folder: Path) -> None:
    train(folder, "adam", penalties=[L1(0.05)], clip_norm=0.5, accumulate=2)


def lbfgs(folder: Path) -> None:
    train(folder, "lbfgs", penalties=[], pruning=None, epochs=2)


def steepest_descent(folder: Path) -> None:
    train(folder, "steepest_descent", penalties=[], pruning=None, epochs=2)


def uneven(folder: Path) -> None:
    """406 samples in batches of 42: the last one has 28 samples, with 3 processes parts of 10, 9 and 9."""
    model, optimizer = model_and_optimizer()
    history = run_fit(model, digits(406, torch.float64), optimizer, batch_size=42, epochs=2)
    leave(folder, model, history, optimizer)


def tiny(folder: Path) -> None:
    """Batches of 6, the last one of a single sample: the other processes take part without one."""
    model, optimizer = model_and_optimizer()
    history = run_fit(model, digits(61, torch.float64), optimizer, batch_size=6, epochs=2)
    leave(folder, model, history, optimizer)


def loader(folder: Path) -> None:
    """A DataLoader with an order of its own, which all processes draw alike."""
    model, optimizer = model_and_optimizer()
    data = TensorDataset(*digits(240, torch.float64))
    batches = DataLoader(data, batch_size=60, shuffle=True, generator=torch.Generator().manual_seed(3))
    leave(folder, model, run_fit(model, batches, optimizer), optimizer)


def sampler(folder: Path) -> None:
    """A DistributedSampler: each process loads its own part, here the same samples as one process in another order."""
    model, optimizer = model_and_optimizer()
    data = TensorDataset(*digits(240, torch.float64))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parts = DistributedSampler(data, size, RANK, shuffle=True, seed=1)
    leave(folder, model, run_fit(model, DataLoader(data, batch_size=60 // size, sampler=parts), optimizer), optimizer)


def batch_sampler(folder: Path) -> None:
    """The same with the sampler inside a batch sampler."""
    model, optimizer = model_and_optimizer()
    data = TensorDataset(*digits(240, torch.float64))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parts = BatchSampler(DistributedSampler(data, size, RANK, shuffle=True, seed=1), 60 // size, drop_last=False)
    leave(folder, model, run_fit(model, DataLoader(data, batch_sampler=parts), optimizer), optimizer)


def shuffled_batches(folder: Path) -> None:
    model, optimizer = model_and_optimizer()
    data = TensorDataset(*digits(200, torch.float64))
    batches = BatchSampler(RandomSampler(data), 40, drop_last=False)
    run_fit(model, DataLoader(data, batch_sampler=batches), optimizer)


def odd_batches(folder: Path) -> None:
    model, optimizer = model_and_optimizer()
    data = TensorDataset(*digits(200, torch.float64))
    batches = BatchSampler(SequentialSampler(data), 41, drop_last=False)
    run_fit(model, DataLoader(data, batch_sampler=batches), optimizer)


def shuffled_loader(folder: Path) -> None:
    model, optimizer = model_and_optimizer()
    run_fit(model, DataLoader(TensorDataset(*digits(200, torch.float64)), batch_size=40, shuffle=True), optimizer)


def other_weights(folder: Path) -> None:
    """Each process starts with weights of its own: those of rank 0 count."""
    model, optimizer = model_and_optimizer(seed=RANK)
    history = run_fit(model, digits(200, torch.float64), optimizer)
    leave(folder, model, history, optimizer)


def other_model(folder: Path) -> None:
    model = network(4 + RANK)
    run_fit(model, digits(200), torch.optim.SGD(model.parameters(), lr=0.1))


def other_arguments(folder: Path) -> None:
    model = network(4)
    run_fit(model, digits(200), torch.optim.SGD(model.parameters(), lr=0.1), batch_size=40 + 40 * RANK)


def odd_batch(folder: Path) -> None:
    train(folder, batch_size=41, run=folder / "run")


def wrapped_in_ddp(folder: Path) -> None:
    """What fit and prune say to a live DistributedDataParallel, and what a stale one says after a deletion."""
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
    """What prune says to a model that fully_shard sharded, and that the remedy works."""
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


def dropout(folder: Path) -> None:
    """Dropout masks differ between the processes; the weights do not."""
    model = network(4, dropout=0.5)
    masks: list[Tensor] = []
    drop = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    drop.register_forward_hook(lambda module, args, output: masks.append(output == 0) if module.training else None)
    history = run_fit(model, digits(80), torch.optim.SGD(model.parameters(), lr=0.1), epochs=2)
    write_tensors(folder / f"masks-{RANK}.safetensors", {"masks": torch.cat(masks)}, {})
    leave(folder, model, history)


def meddling(folder: Path) -> None:
    """A callback changes a time step on rank 1 alone, by very little."""

    def meddle(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            with torch.no_grad():
                end.model.time_steps.values[0] += 1e-12

    train(folder, callbacks=[meddle])


def meddling_unpruned(folder: Path) -> None:
    """The same where no layer goes."""

    def meddle(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            with torch.no_grad():
                end.model.time_steps.values[0] += 1e-12

    train(folder, callbacks=[meddle], pruning=None, epochs=3)


def stopping(folder: Path) -> None:
    """A callback ends the training on rank 1 alone."""

    def stop(end: EpochEnd) -> None:
        if end.epoch == 3 and RANK == 1:
            raise taulearn.training.StopTraining

    train(folder, callbacks=[stop])


def failing(folder: Path) -> None:
    """A callback fails on rank 1 alone."""

    def fail(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            raise ZeroDivisionError("this one")

    train(folder, callbacks=[fail])


def failing_first(folder: Path) -> None:
    """Rank 0 cannot write its checkpoint."""

    def fail(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 0:
            checkpoints = folder / "run" / "checkpoint"
            checkpoints.rename(folder / "elsewhere")
            checkpoints.touch()

    train(folder, callbacks=[fail], run=folder / "run")


def undisturbed(folder: Path) -> None:
    """What :func:`killed` and :func:`gone_on` amount to without the kill."""
    train(folder, run=folder / "run")


def killed(folder: Path) -> None:
    """Rank 1 dies in the fifth epoch, and leaves the time."""

    def kill(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, run=folder / "run", callbacks=[kill])


def gone_on(folder: Path) -> None:
    """The run of :func:`killed`, to its end."""
    run = folder.parent / "killed" / "run"
    shutil.copytree(run, folder / "run", dirs_exist_ok=True)
    train(folder, run=folder / "run", resume=True)


def hanging(folder: Path) -> None:
    """Rank 1 stops answering in the fifth epoch."""

    def hang(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            (folder / "killed").write_text(str(time.time()))
            end.model.register_forward_pre_hook(lambda *_: time.sleep(300))

    train(folder, callbacks=[hang])


def interrupted(folder: Path) -> None:
    """Rank 1 alone is interrupted in the fifth epoch."""

    def interrupt(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            signal.raise_signal(signal.SIGINT)

    try:
        train(folder, run=folder / "run", callbacks=[interrupt])
    except Interrupted as error:
        raise RuntimeError(str(error)) from error


def compiled(folder: Path) -> None:
    """Compiled steps average their gradients, too."""
    train(folder, compile="always", epochs=3)


def target(folder: Path) -> None:
    """A policy that has to come down to four layers."""
    train(folder, penalties=[], pruning=Pruning(target_blocks=4))


def measured(folder: Path) -> None:
    """A policy that goes by contributions."""
    train(folder, penalties=[], pruning=Pruning(0.11, criterion="contribution"))


def batch_norm(folder: Path) -> None:
    """Running statistics are those of rank 0 in all processes at the end."""
    torch.manual_seed(0)

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), block(), block(), nn.Linear(8, 10))
    taulearn.wrap(model, ["2", "3"])
    history = run_fit(model, digits(200), torch.optim.SGD(model.parameters(), lr=0.1), validation=digits(60))
    leave(folder, model, history)


def main(folder: Path, names: list[str]) -> None:
    """Run the functions of these names, one after the other."""
    for name in names:
        (folder / name).mkdir(exist_ok=True, parents=True)
        try:
            globals()[name](folder / name)
        except Exception as error:
            (folder / name / f"{RANK}.error").write_text(f"{type(error).__name__}: {error}")
            if len(names) == 1:
                raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
