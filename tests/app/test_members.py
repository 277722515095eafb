"""Members: their names, their seeds, and what tells them apart."""

import pytest

from taulearn.app.members import Member, digest
from taulearn.experiments import TrainConfig


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/..", "a b", "a/", "ä"])
def test_member_refuses_names_that_make_no_folder(name):
    with pytest.raises(ValueError, match="setting must be names"):
        Member(name, 0, TrainConfig())


def test_member_refuses_another_seed_than_its_settings_have():
    with pytest.raises(ValueError, match="seed must be that of config, 1, got 0"):
        Member("a", 0, TrainConfig(seed=1))


def test_digest_tells_settings_apart_but_not_places_and_machines():
    plain = digest(TrainConfig())
    assert digest(TrainConfig(run="x", overwrite=True, threads=1, checkpoint_every=7)) == plain
    assert (
        len({plain, digest(TrainConfig(l1=0.01)), digest(TrainConfig(seed=1)), digest(TrainConfig(trace="thinned"))})
        == 4
    )
