"""Members: their names, their seeds, and what tells them apart."""

from taulearn.app.members import digest
from taulearn.experiments import TrainConfig


def test_digest_tells_settings_apart_but_not_places_and_machines():
    plain = digest(TrainConfig())
    assert digest(TrainConfig(run="x", overwrite=True, threads=1, checkpoint_every=7)) == plain
    assert (
        len({plain, digest(TrainConfig(l1=0.01)), digest(TrainConfig(seed=1)), digest(TrainConfig(trace="thinned"))})
        == 4
    )
