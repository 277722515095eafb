"""Runs that are killed between any two writes, and gone on with, leave what the run left that was let alone."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from killing import Killed, killed_after
from taulearn import Pruning, parameter_groups, wrap
from taulearn.experiments import TrainConfig, resume, train
from taulearn.nn import resnet
from taulearn.penalties import L1
from taulearn.training import Run
from training.support import assert_same_history, run_fit
from wrapping.hosts import Block

Go = Callable[..., None]
ALL = 10**9


def opened(folder: Path, epochs: int) -> dict[str, Any]:
    """As the command line begins a run, or goes on with it."""
    if (folder / "run.toml").exists():
        return {"run": Run.open(folder), "resume": True, "epochs": epochs}
    return {"run": Run.create(folder, {"epochs": epochs}), "epochs": epochs}


def problem(targets: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator), torch.randint(targets, (12,), generator=generator)


def plain(folder: Path, epochs: int = 1) -> None:
    torch.manual_seed(0)
    model = resnet(4, 5, 3, 2)
    run_fit(model, problem(), torch.optim.SGD(model.parameters(), lr=0.1), batch_size=6, **opened(folder, epochs))


def wrapped(folder: Path, epochs: int = 1) -> None:
    """A deletion in each of the first two epochs; averaged weights, a scheduler, validation."""
    torch.manual_seed(0)
    model = wrap(
        nn.Sequential(nn.Linear(4, 5), *(Block(5) for _ in range(4)), nn.Linear(5, 3)),
        example_inputs=problem()[0],
        init=[1.0, 0.02, 1.0, 0.08],
    )
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.01, tau_lr=0.01))
    run_fit(
        model,
        problem(),
        optimizer,
        batch_size=6,
        penalties=[L1(0.1, proximal=True)],
        pruning=Pruning(0.02),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        averaged=AveragedModel(model),
        validation=problem(),
        **opened(folder, epochs),
    )


def targeted(folder: Path, epochs: int = 2) -> None:
    torch.manual_seed(0)
    model = wrap(
        nn.Sequential(nn.Linear(4, 5), *(Block(5) for _ in range(3)), nn.Linear(5, 3)), example_inputs=problem()[0]
    )
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01))
    policy = Pruning(target_blocks=1, by=1, criterion="share", every=1)
    run_fit(model, problem(), optimizer, batch_size=6, pruning=policy, **opened(folder, epochs))


def command(folder: Path, epochs: int = 1) -> None:
    """Train as `taulearn train` and `taulearn resume` do, with all that they write after the training."""
    if (folder / "run.toml").exists():
        resume(folder, progress=False, epochs=epochs)
        return
    settings = {"hidden_layers": 3, "width": 4, "epochs": epochs, "batch_size": 800, "average_weights": True}
    train(
        TrainConfig(run=str(folder), trace="thinned", prune=0.2, optimizer="adam", compile="never", **settings),
        progress=False,
    )


def left(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for the record; in a report and in checkpoints there are seconds."""
    run = Run.open(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    whole = {name: (folder / name).read_bytes() for name in ("model.safetensors", "model.json")}
    return {"names": names, "config": run.config, "decisions": run.decisions, **whole}


def assert_same_run(folder: Path, expected: Path) -> None:
    ours, theirs = left(folder), left(expected)
    for what, value in theirs.items():
        if what != "config" or "run" not in value:
            assert ours[what] == value, what
    assert_same_history(Run.open(folder).history, Run.open(expected).history)


def copy(begun: Path | None, folder: Path) -> Path:
    if begun is not None:
        shutil.copytree(begun, folder)
    return folder


def assert_no_false_end(folder: Path, expected: Path) -> None:
    """Where the newest checkpoint is that of the end, a model that can be loaded is that of the end."""
    newest, last = (max((path / "checkpoint").glob("[0-9]*"), default=path).name for path in (folder, expected))
    manifests = [file.read_text() for name in ("model.json", ".model.json.new") if (file := folder / name).exists()]
    if newest == last and (folder / "model.safetensors").exists():
        weights = (folder / "model.safetensors").read_bytes()
        loadable = any(hashlib.sha256(weights).hexdigest() in manifest for manifest in manifests)
        assert not loadable or weights == (expected / "model.safetensors").read_bytes()


def kill_everywhere(go: Go, tmp_path: Path, *, times: int = 1, begun: Path | None = None, **options: Any) -> list[str]:
    """Kill a run before each of its writes in turn, as often again while it is gone on with; what was written."""
    expected = copy(begun, tmp_path / "expected")
    with killed_after(ALL, expected) as writes:
        go(expected, **options)
    assert all(" ." in write for write in writes if write.startswith("open")), "files are written aside"
    for number in range(len(writes)):
        folder = copy(begun, tmp_path / str(number))
        for last in (number, *[3] * (times - 1)):
            with killed_after(last, folder), pytest.raises(Killed):
                go(folder, **options)
            assert_no_false_end(folder, expected)
        go(folder, **options)
        try:
            assert_same_run(folder, expected)
        except AssertionError as error:
            after = writes[number - 1] if number else "the start"
            raise AssertionError(f"killed after {after}, before {writes[number]}: {error}") from error
    return writes


def test_killed_between_any_two_writes(tmp_path: Path) -> None:
    writes = kill_everywhere(plain, tmp_path)
    assert sum("history.safetensors" in write and "rename" in write for write in writes) >= 2


def test_a_run_that_is_extended_and_killed(tmp_path: Path) -> None:
    """Its folder holds the model and the record of the shorter run meanwhile, which never pass for those of the end."""
    plain(tmp_path / "shorter")
    writes = kill_everywhere(plain, tmp_path, begun=tmp_path / "shorter", epochs=2)
    assert len(writes) > 10


@pytest.mark.long
@pytest.mark.parametrize(
    ("go", "epochs"),
    [(plain, 3), (wrapped, 3), (targeted, 2), (command, 2)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("times", [1, 2])
def test_killed_between_any_two_writes_of_longer_runs(go: Go, epochs: int, times: int, tmp_path: Path) -> None:
    writes = kill_everywhere(go, tmp_path, times=times, epochs=epochs)
    assert len(writes) > 20
