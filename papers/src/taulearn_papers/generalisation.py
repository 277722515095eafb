"""What members measure after their training; functions of a run's folder, for :class:`~taulearn.experiments.Member`."""

from pathlib import Path


def generalisation(folder: Path) -> dict[str, float]:
    """Loss and accuracy of the trained network on the training data and on the test data.

    Args:
        folder: The run's folder.

    Returns:
        "train.loss", "test.loss" and, for classes, "train.accuracy", "test.accuracy".

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> result = train(TrainConfig(width=8, epochs=1, run=tempfile.mkdtemp()), progress=False)
        >>> sorted(generalisation(result.run.path))
        ['test.accuracy', 'test.loss', 'train.accuracy', 'train.loss']
    """
    from taulearn.app import build
    from taulearn.app.train import settings_of
    from taulearn.saving import load_model
    from taulearn.training import Run, evaluate

    config = settings_of(Run.open(folder))
    splits = build.load_splits(config)
    loss = build.make_loss(config, classes=splits.classes is not None)[1]
    model = load_model(folder)
    return {
        f"{name}.{figure}": value
        for name, split in (("train", splits.train), ("test", splits.test))
        for figure, value in evaluate(model, tuple(split), loss=loss).items()
    }
