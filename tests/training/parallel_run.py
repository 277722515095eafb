"""One process of a data parallel training: torchrun --nproc-per-node 2 -m training.parallel_run FOLDER NAME ...

Each NAME is one of the functions below, or of the two files beside this one. It leaves in FOLDER/NAME what the tests
look at: RANK.safetensors with the record and all tensors, or RANK.error with the error that it ended with.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

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
from taulearn import Pruning, Refinement
from taulearn.files import write_tensors
from taulearn.penalties import L1, Distillation, StageCost
from taulearn.training.history import Recorder
from training import parallel_faults, parallel_wrappers
from training.parallel_base import RANK, leave, model_and_optimizer, train
from training.support import digits, network, run_fit


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


def counted(folder: Path) -> None:
    """Labels that are ignored, few on one process and all on another, and weights of classes."""
    inputs, targets = digits(240, torch.float64)
    targets[torch.arange(240) % 60 < 33] = -1
    targets[50:60] = -1
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=60)
    model, optimizer = model_and_optimizer()
    loss = nn.CrossEntropyLoss(torch.linspace(0.5, 2, 10, dtype=torch.float64), ignore_index=-1)
    penalties = [L1(0.05), StageCost(0.1, loss)]
    history = run_fit(model, batches, optimizer, loss=loss, penalties=penalties, accumulate=2)
    leave(folder, model, history, optimizer)


def summed(folder: Path) -> None:
    """A sum over a batch, the last of which leaves one process without a sample, under a line search."""
    model = model_and_optimizer()[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    data = digits(43, torch.float64)
    history = run_fit(model, data, optimizer, loss=loss, penalties=[L1(0.05)], epochs=2, batch_size=42)
    leave(folder, model, history)


def own_shares(folder: Path) -> None:
    """A DistributedSampler, of whose samples one process ignores more than the other."""
    inputs, targets = digits(240, torch.float64)
    targets[::2] = torch.where(torch.arange(120) % 3 > 0, -100, targets[::2])
    data = TensorDataset(inputs, targets)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parts = DistributedSampler(data, size, RANK, shuffle=False)
    model, optimizer = model_and_optimizer()
    leave(folder, model, run_fit(model, DataLoader(data, batch_size=60 // size, sampler=parts), optimizer), optimizer)


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


class Speaker(nn.Module):
    """A model of its own loss, that of the next token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.network = nn.Embedding(9, 8), taulearn.nn.resnet(8, 6, 9, 4)
        self.double()
        self.time_steps = self.network.time_steps

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids) * attention_mask[..., None]
        logits = self.network(x.flatten(0, 1)).view(*input_ids.shape, 9)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class Teaching(nn.Module):
    """A teacher of that model, which wants no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.linspace(-1, 1, 81, dtype=torch.float64).view(9, 9).sin())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        answer: Tensor = self.words(input_ids)
        return answer


def text(folder: Path) -> None:
    """Dictionaries of sentences of different lengths, the longest of which comes first; the last has one sentence."""
    items = [{"input_ids": torch.arange(12) * (i + 2) % 9, "length": max(3, 12 - i)} for i in range(25)]

    def padded(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.stack([each["input_ids"] for each in some])[:, : max(each["length"] for each in some)]
        mask = torch.arange(ids.shape[1]) < torch.tensor([[each["length"]] for each in some])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask, -100)}

    model = Speaker()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches: Any = DataLoader(items, batch_size=6, collate_fn=padded)  # type: ignore[arg-type]
    options = {"penalties": [L1(0.05), Distillation(Teaching(), 0.5, 2.0)], "accumulate": 2, "epochs": 2}
    history = run_fit(model, batches, optimizer, loss=None, **options)
    leave(folder, model, history, optimizer)


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


def dropout(folder: Path) -> None:
    """Dropout masks differ between the processes; the weights do not."""
    model = network(4, dropout=0.5)
    masks: list[Tensor] = []
    drop = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    drop.register_forward_hook(lambda module, args, output: masks.append(output == 0) if module.training else None)
    history = run_fit(model, digits(80), torch.optim.SGD(model.parameters(), lr=0.1), epochs=2)
    write_tensors(folder / f"masks-{RANK}.safetensors", {"masks": torch.cat(masks)}, {})
    leave(folder, model, history)


def compiled(folder: Path) -> None:
    """Compiled steps average their gradients, too."""
    train(folder, compile="always", epochs=3)


def target(folder: Path) -> None:
    """A policy that has to come down to four layers."""
    train(folder, penalties=[], pruning=Pruning(target_blocks=4, criterion="contribution"))


def refined(folder: Path) -> None:
    """Layers come, by the batch that all processes share, and go."""
    pruning, loss = Pruning(target_blocks=6, criterion="contribution"), torch.nn.functional.cross_entropy
    train(folder, penalties=[], pruning=pruning, refinement=Refinement(11, until=0.4, rest=2, loss=loss))


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


def batch_norm_last(folder: Path) -> None:
    """A last batch of three samples, of which one process would have a single one, goes with the one before."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh()) for _ in range(2))
    model = taulearn.wrap(nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10)), ["1", "2"])
    history = run_fit(model, digits(83), torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, accumulate=30)
    leave(folder, model, history)


class Gate(nn.Linear):
    """A layer that the second process alone uses, with a parameter that none uses."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if RANK == 1 else x


def gated(folder: Path) -> None:
    """A gradient that one process has and the other has not, and one that nobody has."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
    model = taulearn.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Gate(), *blocks, nn.Linear(8, 10)), ["3", "4"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    write_tensors(folder / f"before-{RANK}.safetensors", {"gate": model[2].weight.detach().clone()}, {})
    leave(folder, model, run_fit(model, digits(80), optimizer, epochs=2), optimizer)


def light(folder: Path) -> None:
    """How much memory a row of the record holds on to until it is flushed, in numbers beyond its own."""
    beyond: set[int] = set()
    add = Recorder.add

    def watch(recorder: Recorder, rows: Tensor) -> None:
        beyond.add(rows.untyped_storage().nbytes() // rows.element_size() - rows.numel())
        add(recorder, rows)

    with mock.patch.object(Recorder, "add", watch):
        train(folder, epochs=1)
    (folder / f"{RANK}.said").write_text(str(max(beyond)))


def main(folder: Path, names: list[str]) -> None:
    """Run the functions of these names, one after the other; only the last one may end the process by its error."""
    rooms = (sys.modules[__name__], parallel_faults, parallel_wrappers)
    for name in names:
        (folder / name).mkdir(exist_ok=True, parents=True)
        try:
            function = next(getattr(room, name) for room in rooms if hasattr(room, name))
            function(folder / name)
        except Exception as error:
            (folder / name / f"{RANK}.error").write_text(f"{type(error).__name__}: {error}")
            if name == names[-1]:
                raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
