"""Every bad input is refused with the argument's name and what was got, and nothing is written."""

import re
from pathlib import Path

import pytest

from app.refusals import APP
from refusals import REFUSALS, Refusal
from training.refusals import FIT
from wrapping.refusals import WRAPPING

CASES = [
    pytest.param(refusal, id=f"{room}-{refusal.argument}-{number}")
    for room, refusals in (REFUSALS | {"wrapping": WRAPPING, "fit": FIT, "app": APP}).items()
    for number, refusal in enumerate(refusals)
]


@pytest.mark.parametrize("refusal", CASES)
def test_it_is_refused(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(refusal.error) as caught:
        refusal.call()
    message = str(caught.value)
    assert re.search(rf"(?<!\w){re.escape(refusal.argument)}(?!\w)", message), message
    assert re.search("got|given|must|:", message), message
    missing = [fact for fact in refusal.says if fact not in message]
    assert not missing, message
    assert not list(tmp_path.iterdir())
