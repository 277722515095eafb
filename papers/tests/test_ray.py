"""A sweep on a Ray cluster; the cluster is embedded, with two workers."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from taulearn.app.members import Member
from taulearn.app.run_members import run_members
from taulearn.experiments import TrainConfig
from taulearn_papers.engines import ray as engine
from taulearn_papers.engines.ray import check_answers


def test_address_that_does_not_answer_is_named_soon():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} did not answer .* `ray start --head`"):
        check_answers(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_that_listens_but_is_not_ray_is_named_soon(monkeypatch, scheme):
    pytest.importorskip("ray")
    monkeypatch.setattr(engine, "JOIN_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"{scheme}127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"{address} did not answer within 2 s .* `ray start --head`"):
            check_answers(address)


def test_cluster_that_cannot_be_joined_says_why(monkeypatch):
    monkeypatch.setattr(engine, "_JOIN", "print('it has another version'); raise SystemExit(1)")
    with pytest.raises(
        ConnectionError, match=r"at auto cannot be joined \(it has another version\): give all machines the same"
    ):
        check_answers("auto")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*accelerator devices")
def test_address_of_a_cluster_is_taken():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        check_answers(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "ray://host"])
def test_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match="address must be HOST:PORT"):
        check_answers(address)


def test_engine_without_ray_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'taulearn-papers\[ray\]'"):
        run_members([Member("a", 0, TrainConfig(width=8, epochs=1))], tmp_path, engine="ray")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*accelerator devices")
def test_all_members_finish_once_though_a_worker_is_killed_in_the_middle(tmp_path):
    pytest.importorskip("ray")
    members = [Member("a", seed, TrainConfig(width=16, epochs=40, seed=seed)) for seed in range(5)]
    killed, finished = [], []

    def kill_one(event):
        finished.append(event.member)
        if not killed:
            _wait_for(lambda: _busy_workers(tmp_path))
            killed.append(_busy_workers(tmp_path)[0])
            os.kill(killed[0], signal.SIGKILL)

    outcome = run_members(members, tmp_path, engine="ray", workers=2, on_event=kill_one)
    assert killed
    assert sorted(outcome.finished) == sorted(finished) == [member.name for member in members]
    assert not outcome.failed
    again = run_members(members, tmp_path, engine="ray", workers=2)
    assert again.skipped == [member.name for member in members]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*accelerator devices", "ignore::ResourceWarning")
def test_all_members_finish_though_a_node_of_the_cluster_dies_in_the_middle(tmp_path):
    """Two raylets on this machine, of one core each; the second takes its workers with it."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    members = [Member("a", seed, TrainConfig(width=16, epochs=40, seed=seed)) for seed in range(4)]
    seen, finished = [], []

    def end_the_other(event):
        finished.append(event.member)
        if not seen:
            _wait_for(lambda: _busy_workers(tmp_path))
            seen.append(sum(node["Alive"] for node in ray.nodes()))
            cluster.remove_node(other, allow_graceful=False)

    try:
        outcome = run_members(members, tmp_path, engine="ray", address=cluster.address, on_event=end_the_other)
    finally:
        cluster.shutdown()
    assert seen == [2]
    assert not outcome.failed
    assert sorted(outcome.finished) == sorted(finished) == [member.name for member in members]


def _busy_workers(out: Path) -> list[int]:
    """Processes that hold the lock of a member, whose training has left a checkpoint."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
            held = [file.readlink() for file in (process / "fd").iterdir()]
        except OSError:
            continue
        locks = [file for file in held if file.name.endswith(".lock") and out in file.parents]
        trained = [lock.parent / lock.name[1:].removesuffix(".lock") / "checkpoint" for lock in locks]
        if name.startswith(b"ray::") and any(any(folder.glob("*.safetensors")) for folder in trained):
            found.append(int(process.name))
    return found


def _wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
