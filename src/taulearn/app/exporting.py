"""The network of a run as a file that runs without this package."""

import os
from pathlib import Path
from typing import Any

import torch

from ..data.catalog import CATALOGUE
from ..export import Exported, export_model
from .finished import finished_run


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",  # noqa: A002  it is called so everywhere
    overwrite: bool = False,
) -> Exported:
    """Export the network that a run left; see :func:`taulearn.export_model`. The data set need not be there.

    Args:
        run: The run's folder.
        out: Folder for the files.
        format: "onnx", "torch" or "safetensors".
        overwrite: Whether an export in ``out`` is replaced.

    Returns:
        What was written, and how far it is from the network.

    Raises:
        FileNotFoundError: If it is not the folder of a finished run.
        FileExistsError: If ``out`` holds a run, or something that is not to be replaced.
        ImportError: If the format needs packages that are not installed.
        ValueError: If the network cannot be expressed in this format.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = train(TrainConfig(epochs=1, width=8, run=str(folder / "run")), progress=False)
        >>> exported = export_run(folder / "run", folder / "out", format="torch")
        >>> print(exported.inputs[0])
        x, float32 (batch, 1, 8, 8)
    """
    _, config, model = finished_run(run, out, overwrite=overwrite)
    folder = Path(out)
    entry = CATALOGUE[config.data]
    images = entry.kind == "images"
    draw = torch.rand if images else torch.randn
    example = draw(2, *entry.shape, dtype=model.time_steps.values.dtype)
    about: dict[str, Any] = {"data": config.data, "values": "pixels in [0, 1]" if images else "as in the data set"}
    if entry.classes is not None:
        about["classes"] = entry.classes
    return export_model(model, folder, example, format=format, about=about)
