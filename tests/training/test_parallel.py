"""Several processes against one: the same losses, the same deletions, and an end with a message where one fails.

The processes run training/parallel_run.py; each start costs some seconds, so that one of them runs many functions.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import taulearn
from taulearn.files import read_tensors
from taulearn.training import History, Run, distributed
from training import parallel_run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

TESTS, SOURCE = Path(__file__).parents[1], Path(taulearn.__file__).parents[1]
SAME = (
    "train",
    "adam",
    "steepest_descent",
    "uneven",
    "tiny",
    "counted",
    "summed",
    "own_shares",
    "loader",
    "sampler",
    "batch_sampler",
    "text",
    "target",
    "refined",
    "measured",
    "loop_in_ddp",
    "loop_sharded",
)
LONG = ("loop_refined", "fit_sharded")
REFUSED = ("shuffled_loader", "shuffled_batches", "odd_batches", "other_model", "other_arguments", "odd_batch")
ENDED = ("refused_at_once", "meddling", "meddling_unpruned", "failing", "failing_first", "interrupted")
OTHERS = (
    "batch_norm_last",
    "other_weights",
    "dropout",
    "batch_norm",
    "stopping",
    "gated",
    "light",
    "wrapped_in_ddp",
    "sharded",
    "ddp_follows",
    "sharded_follows",
)


def environment(**more: str) -> dict[str, str]:
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return alone | {"PYTHONPATH": f"{TESTS}{os.pathsep}{SOURCE}", "OMP_NUM_THREADS": "1"} | more


def torchrun(processes: int, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, "-m", "--", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_all(processes: int, folder: Path, *names: str) -> Path:
    process = torchrun(processes, "training.parallel_run", folder, *names)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder


def results(folder: Path, processes: int) -> list[dict[str, Tensor]]:
    """The results of each process; seconds apart, the same to the bit."""
    found = [read_tensors(folder / f"{rank}.safetensors") for rank in range(processes)]
    for tensors, metadata in found[1:]:
        assert metadata == found[0][1]
        assert tensors.keys() == found[0][0].keys()
        for name, value in tensors.items():
            assert name == "epoch/seconds" or torch.equal(value.nan_to_num(), found[0][0][name].nan_to_num()), name
    return [tensors for tensors, _ in found]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """The record, the model and the optimiser's state."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in ("epoch/seconds", "deletion/share"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, equal_nan=True, msg=name)


def said(folder: Path, processes: int = 2, kind: str = "error") -> list[str]:
    return [(folder / f"{rank}.{kind}").read_text() for rank in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process."""
    folder = tmp_path_factory.mktemp("one")
    parallel_run.main(folder, [*SAME, "other_weights"])
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, str]:
    """Two processes, one of which is killed in the end: the folder, seconds until the other ended, what it said."""
    folder = tmp_path_factory.mktemp("two")
    survivor, victim = start_by_hand(2, folder, *SAME, *REFUSED, *ENDED, *OTHERS, "killed")
    _, others = victim.communicate(timeout=600)
    _, errors = survivor.communicate(timeout=120)
    assert (survivor.returncode, victim.returncode) == (1, -signal.SIGKILL), errors + others
    return folder, seconds_since(folder / "killed"), errors


@pytest.fixture(scope="module")
def two(killed: tuple[Path, float, str]) -> Path:
    """The results of two processes."""
    return killed[0]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_do_what_one_does(name: str, one: Path, two: Path) -> None:
    assert_same(results(two / name, 2)[0], results(one / name, 1)[0])


def test_layers_went_in_the_middle(two: Path) -> None:
    tensors = results(two / "train", 2)[0]
    assert len(tensors["iteration/loss"]) == 100
    assert len(set(tensors["deletion/iteration"].tolist())) >= 4
    assert tensors["model/time_steps.values"].shape == (3,)


def test_layers_came_and_went(two: Path) -> None:
    tensors = results(two / "refined", 2)[0]
    assert tensors["insertion/iteration"].tolist() == [14, 27, 40]
    assert len(tensors["deletion/iteration"]) == 5
    assert tensors["model/time_steps.values"].shape == (6,)


def test_weights_of_the_first_process_count(one: Path, two: Path) -> None:
    assert_same(results(two / "other_weights", 2)[0], results(one / "other_weights", 1)[0])


def test_random_numbers_differ_between_the_processes(two: Path) -> None:
    masks = [read_tensors(two / "dropout" / f"masks-{rank}.safetensors")[0]["masks"] for rank in range(2)]
    assert masks[0].shape == masks[1].shape
    assert 0.3 < float((masks[0] != masks[1]).float().mean()) < 0.7
    epochs = masks[1].chunk(2)
    assert not torch.equal(*epochs)
    results(two / "dropout", 2)


def test_running_statistics_are_those_of_the_first_process(two: Path) -> None:
    assert len(results(two / "batch_norm", 2)) == 2


def test_a_last_batch_too_small_for_batch_normalisation_goes_with_the_one_before(two: Path) -> None:
    assert [len(each["iteration/loss"]) for each in results(two / "batch_norm_last", 2)] == [4, 4]


def test_the_record_holds_on_to_no_gradients(two: Path) -> None:
    """Each row was a view of the buffer in which gradients are added up, so that all buffers of an epoch stayed."""
    assert [int((two / "light" / f"{rank}.said").read_text()) <= 1 for rank in range(2)] == [True, True]


def test_a_gradient_of_one_process_counts_in_all_and_one_of_none_stays_none(two: Path) -> None:
    tensors = results(two / "gated", 2)[0]
    before = read_tensors(two / "gated" / "before-0.safetensors")[0]["gate"]
    assert not torch.equal(tensors["model/2.weight"], before)
    assert tensors["model/2.spare"].tolist() == [1, 1, 1]  # no weight decay without a gradient
    assert "state/2.spare/momentum_buffer" not in tensors


def test_any_process_may_end_the_training(two: Path) -> None:
    assert [len(each["iteration/loss"]) for each in results(two / "stopping", 2)] == [30, 30]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shuffled_loader", r"ValueError: train must yield the same batches in all 2 processes.*generator="),
        ("shuffled_batches", r"ValueError: train must yield the same batches .*to its sampler, where you"),
        ("odd_batches", r"ValueError: batch_size must be a multiple of the number of processes, 2, got 41: .* use 40"),
        ("other_model", "RanksDisagree: the model's tensors must be the same in all processes, got others on rank 1"),
        ("other_arguments", "RanksDisagree: batches must be the same in all processes, got others on rank 1"),
        ("refused_at_once", "^RuntimeError: TypeError: model must be the model itself[^:]*: hand over wrapper.module$"),
        ("odd_batch", "ValueError: batch_size must be a multiple of the number of processes, 2, got 41: .* use 40"),
        ("meddling", r"RanksDisagree: the time steps after iteration \d+ must be the same .* on rank 1 than on rank 0"),
        ("meddling_unpruned", "RanksDisagree: the time steps after iteration 20 must be the same"),
        ("interrupted", "training was interrupted after iteration 51: go on with"),
    ],
)
def test_all_processes_say_what_is_wrong(name: str, message: str, two: Path) -> None:
    for text in said(two / name):
        assert re.search(message, text), text
    assert name != "odd_batch" or not (two / name / "run").exists()


def test_a_process_that_fails_ends_the_others(two: Path) -> None:
    survivor, failed = said(two / "failing")
    assert failed == "ZeroDivisionError: this one"
    assert re.match(r"RankLost: rank 0 of 2 ends because another process .* \(.*\): what that one printed", survivor)
    failed, survivor = said(two / "failing_first")
    assert failed.startswith("FileExistsError")
    assert survivor.startswith("RankLost: rank 1 ends because rank 0 failed: FileExistsError")


def test_a_live_wrapper_is_refused_and_follows(two: Path) -> None:
    follows = results(two / "wrapped_in_ddp", 2)[0]  # the same weights after two deletions
    assert int(follows["calls"]) == 4
    for rank in range(2):
        pruned, fitted, attached, wrapped, slow, other = (
            (two / "wrapped_in_ddp" / f"{rank}.said").read_text().splitlines()
        )
        for text in (pruned, fitted, attached, wrapped):
            assert re.match(r"TypeError: model must be the model itself, .* hand over wrapper\.module", text)
        assert "would not average the gradients of the time steps" in wrapped
        assert slow.startswith("ValueError: target_latency_ms must be None where several processes train")
        assert other.startswith("RanksDisagree: the layers to delete must be the same in all processes")


def test_a_sharded_model_is_pruned_and_saved(two: Path) -> None:
    assert results(two / "sharded", 2)[0]["answer"].shape == (20, 10)
    for rank in range(2):
        said = (two / "sharded" / f"{rank}.said").read_text().splitlines()
        *refused, together, compiled, penalty, search, larger, split = said
        remedies = ("save_model", "refine it before", "wrap it before")
        for text, remedy in zip(refused, remedies, strict=True):
            assert re.match(r"ValueError: model must not be sharded, got .*" + re.escape(remedy), text)
        assert together.startswith("ValueError: refinement must be None for a model that fully_shard sharded")
        assert compiled.startswith("ValueError: compile must be 'auto' or 'never' for a sharded model")
        assert re.match(r"ValueError: penalties must not look at the weights .* taulearn\.attach", penalty)
        assert search.startswith("ValueError: optimizer must take one gradient a step for a sharded model, got LBFGS")
        assert re.match(r"ValueError: model must be sharded block by block, got 'layers\.\d.*' in a unit with", larger)
        assert "ignored_params={model.time_steps.values}" in split


def test_wrappers_keep_what_they_held_and_are_the_same_in_all_processes(two: Path) -> None:
    for text in said(two / "ddp_follows", kind="said"):
        assert text.startswith("RanksDisagree: the number of DistributedDataParallels around the model must be")


def test_sharded_models_follow_or_are_refused(two: Path) -> None:
    """Prefetched units that were gone, and units of several blocks, ended the process (SIGSEGV)."""
    for text in said(two / "sharded_follows", kind="said"):
        pairs, other, branch, unwrapped = text.splitlines()
        assert re.match(r"ValueError: model must be sharded block by block, got 'layers\.3.*' in a unit with", pairs)
        assert other.startswith("RanksDisagree: the time steps must be the same in all processes")
        assert "delete single branches before fully_shard" in branch
        assert "save it with taulearn.save_model" in unwrapped


def start_by_hand(processes: int, folder: Path, *names: str) -> "list[subprocess.Popen[str]]":
    """Processes that nobody watches over."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "training.parallel_run", str(folder), *names],
            env=environment(RANK=str(r), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(processes)
    ]


def seconds_since(folder: Path) -> float:
    return time.time() - float((folder / "killed").read_text())


def test_a_killed_process_ends_the_others_within_a_minute(killed: tuple[Path, float, str]) -> None:
    _, seconds, errors = killed
    assert seconds < 60
    assert "RankLost: rank 0 of 2 ends because another process of this training ended" in errors


def test_a_killed_run_goes_on_alone(killed: tuple[Path, float, str], one: Path) -> None:
    folder = killed[0]
    parallel_run.main(folder, ["gone_on"])
    assert_same(results(folder / "gone_on", 1)[0], results(one / "train", 1)[0])
    record = History.load(folder / "gone_on" / "run" / "history.safetensors")
    assert record.num_iterations == 100


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_run_goes_on_in_any_number_of_processes(
    processes: int, killed: tuple[Path, float, str], one: Path, tmp_path: Path
) -> None:
    (tmp_path / "killed").symlink_to(killed[0] / "killed")
    run_all(processes, tmp_path, "gone_on")
    assert_same(results(tmp_path / "gone_on", processes)[0], results(one / "train", 1)[0])


@pytest.mark.long
@pytest.mark.parametrize("name", [*SAME, *LONG])
def test_three_processes_do_what_one_does(name: str, one: Path, three: Path) -> None:
    if name in LONG:
        parallel_run.main(one, [name])
    assert_same(results(three / name, 3)[0], results(one / name, 1)[0])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(3, tmp_path_factory.mktemp("three"), *SAME, *LONG)


@pytest.mark.long
def test_compiled_steps_average_their_gradients(tmp_path: Path) -> None:
    parallel_run.main(tmp_path / "one", ["compiled"])
    run_all(2, tmp_path / "two", "compiled")
    assert_same(results(tmp_path / "two" / "compiled", 2)[0], results(tmp_path / "one" / "compiled", 1)[0])


@pytest.mark.long
def test_torchrun_ends_with_a_killed_process(tmp_path: Path) -> None:
    process = torchrun(2, "training.parallel_run", tmp_path, "killed")
    _, errors = process.communicate(timeout=120)
    assert seconds_since(tmp_path / "killed") < 60
    assert process.returncode != 0
    assert re.search(r"SIGKILL|Signal 9", errors)


@pytest.mark.long
def test_a_deletion_in_one_process_alone_ends_within_a_minute(tmp_path: Path) -> None:
    run_all(2, tmp_path, "alone")
    seconds, text, layers = (tmp_path / "alone" / "said").read_text().splitlines()
    assert float(seconds) < 60
    assert text.startswith("the processes of this training do not find each other")
    assert layers == "8"


@pytest.mark.long
def test_a_process_killed_in_a_deletion_ends_the_others(tmp_path: Path) -> None:
    survivor, victim = start_by_hand(2, tmp_path, "killed_deleting")
    _, errors = survivor.communicate(timeout=200)
    victim.communicate()
    assert seconds_since(tmp_path / "killed_deleting") < 60
    assert "RankLost: rank 0 of 2 ends because another process" in errors
    assert (tmp_path / "killed_deleting" / "0.said").exists()


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_sharded_training_goes_on_in_any_number_of_processes(processes: int, one: Path, tmp_path: Path) -> None:
    run_all(2, tmp_path, "fit_sharded_interrupted")
    assert "interrupted after iteration 51" in (tmp_path / "fit_sharded_interrupted" / "0.said").read_text()
    run_all(processes, tmp_path, "fit_sharded_resumed")
    parallel_run.main(one, ["fit_sharded"])
    assert_same(results(tmp_path / "fit_sharded_resumed", processes)[0], results(one / "fit_sharded", 1)[0])


@pytest.mark.long
def test_a_sharded_model_goes_on_from_a_checkpoint_of_torch(tmp_path: Path) -> None:
    run_all(2, tmp_path, "checkpointed")
    run_all(3, tmp_path, "checkpoint_loaded")
    assert_same(results(tmp_path / "checkpoint_loaded", 3)[0], results(tmp_path / "checkpointed", 2)[0], 0.0)


@pytest.mark.long
def test_a_process_that_hangs_ends_the_others_within_a_minute(tmp_path: Path) -> None:
    survivor, hanging = start_by_hand(2, tmp_path, "hanging")
    _, errors = survivor.communicate(timeout=200)
    seconds = seconds_since(tmp_path / "hanging")
    hanging.kill()
    hanging.communicate()
    assert seconds < 60
    assert "RankLost: rank 0 of 2 ends because another process" in errors


def test_a_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"localhost:{port}, where .* is in use by another program: choose"):
            distributed.join()


def test_processes_wait_for_each_other_as_long_as_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the port belongs to another program, the first process ends at once and the others wait in vain."""

    def refuse(timeout: timedelta) -> None:
        raise RuntimeError(f"nobody came for {timeout.seconds} s")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=r"do not find each other at localhost:1: nobody came for 50 s"):
        distributed.join()


def test_a_resumed_run_is_told_numbers_of_processes_alone() -> None:
    three = distributed.TrainingRanks()
    three.size = 3
    with pytest.raises(ValueError, match=r"got 200: it is that of all processes together; use 201, or 2 processes"):
        distributed.check_batch_size(three, 200, 1000)
    with pytest.raises(ValueError, match=r"together; it cannot change in a run: use 2 processes$"):
        distributed.check_batch_size(three, 200, 1000, resumed=True)


@pytest.mark.long
def test_command_line_in_two_processes(tmp_path: Path) -> None:
    steps = ["--init", "0.5,0.2,0.2,0.05,0.3,0.1", "--prune", "0.1", "--l1", "0.05"]
    options = ["--hidden-layers", "6", "--width", "20", "--epochs", "4", *steps, "--precision", "float64"]
    train = ["train", *options, "--batch-size", "20", "--run"]
    process = torchrun(2, "taulearn", *train, tmp_path / "two")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert output.count("epoch 4/4") == output.count("test accuracy") == 1
    alone = [sys.executable, "-m", "taulearn", *train, str(tmp_path / "one")]
    subprocess.run(alone, env=environment(), check=True, capture_output=True)
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for name, column in one.history.iterations.items():
        np.testing.assert_allclose(two.history.iterations[name], column, rtol=0, atol=1e-10)
    assert [d.layer for d in two.history.deletions] == [d.layer for d in one.history.deletions] == [3, 5, 2, 1]
    assert two.decisions["processes"] == "2"
    assert {path.name for path in two.path.iterdir()} == {path.name for path in one.path.iterdir()}

    odd = torchrun(3, "taulearn", *train, tmp_path / "three")
    output, errors = odd.communicate(timeout=200)
    assert "taulearn: error: --batch-size must be a multiple of the number of processes, 3, got 20" in errors
    assert not (tmp_path / "three").exists()
