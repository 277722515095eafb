"""The benchmark for a card, with small sizes on the CPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.long
def test_gpu_on_the_cpu() -> None:
    command = [sys.executable, str(GPU), "--device", "cpu", "--quick"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .* \|$", output, re.MULTILINE))
    assert rows.pop("what") == "figure"
    assert re.fullmatch(r"none: no card|\d+ passed", rows.pop("tests marked cuda"))
    assert [name.split(",")[0] for name in rows] == [
        "fit",
        *["ViT"] * 2,
        *["Llama"] * 2,
        "one training",
        "2 seeds at once",
    ]
    assert all(float(figure.split()[0]) > 0 for figure in rows.values())
