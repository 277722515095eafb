"""The README's Python runs as it stands, one block after the other, as a reader would paste it."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_blocks_run_and_prune(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    exec(blocks[0], names)
    history = names["history"]
    assert history.epochs["validation.accuracy"][-1] > 0.9
    assert history.deletions
    exec(blocks[1], names)
    assert "deleted layer" in capsys.readouterr().out
    assert names["model"].time_steps.num_steps < 6
