"""Trainer, Lightning and accelerate on two processes against one, in float64: the same steps, the same layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taulearn
from taulearn.files import read_tensors

pytest.importorskip("transformers")
pytest.importorskip("lightning")

ROOM, SOURCE = Path(__file__).parents[1], Path(taulearn.__file__).parents[1]


def run(folder: Path, processes: int, *names: str) -> None:
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = alone | {"PYTHONPATH": f"{ROOM}{os.pathsep}{SOURCE}", "OMP_NUM_THREADS": "1"}
    runner = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    command = [sys.executable, "-m", *(runner if processes > 1 else ()), "integrations.parallel_trainers"]
    done = subprocess.run(
        [*command, str(folder), *names], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize("name", ["trainer", "lightning", "lightning_sharded", "accelerate"])
def test_two_processes_do_what_one_does(name: str, tmp_path: Path) -> None:

    resumed = [f"{name}_resumed"] if name == "trainer" else []
    run(tmp_path / "one", 1, name)
    run(tmp_path / "two", 2, name, *resumed)
    tensors, about = read_tensors(tmp_path / "one" / name / "0.safetensors")
    assert tensors["tau"].shape == (32, 6)
    assert tensors["model/time_steps.values"].shape == (3,)
    others = [tmp_path / "two" / each / f"{rank}.safetensors" for each in (name, *resumed) for rank in range(2)]
    if resumed:  # what two processes wrote, one goes on with
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / "runs").symlink_to(tmp_path / "two" / "runs")
        run(tmp_path / "alone", 1, *resumed)
        others.append(tmp_path / "alone" / resumed[0] / "0.safetensors")
    for place in others:
        found, said = read_tensors(place)
        assert said == about
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, equal_nan=True, msg=key)
