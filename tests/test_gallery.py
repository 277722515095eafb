"""The gallery shows every figure that is kept, and none that is not."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_figure_is_missing() -> None:
    shown = re.findall(r"^!\[.+\]\((.+)\)$", (ROOT / "docs" / "gallery.md").read_text(), re.MULTILINE)
    kept = [*(ROOT / "docs").rglob("*.png"), *(ROOT / "papers" / "results").rglob("*.png")]
    figures = {each for each in kept if "_build" not in each.parts}
    assert len(shown) == len(set(shown)) > 0
    assert {(ROOT / "docs" / each).resolve() for each in shown} == {each.resolve() for each in figures}
