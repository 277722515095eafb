"""``taulearn export``: the network of a run as a file that runs without this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .output import table


@dataclass(frozen=True)
class Export:
    """Write the network of a run as a file (onnx and torch run without this package) and check it on random inputs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    format: Annotated[
        Literal["onnx", "torch", "safetensors"],
        tyro.conf.arg(
            help="onnx: for onnxruntime and others; torch: for torch.export.load; safetensors: weights and "
            "architecture, for taulearn.load_model."
        ),
    ] = "onnx"
    out: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="DIR", help="Folder for the files; RUN/export/FORMAT unless given.", help_behavior_hint=""
        ),
    ] = None
    overwrite: Annotated[bool, tyro.conf.arg(help="Replace an export that is in that folder.")] = False

    def __call__(self) -> None:
        from ..experiments.exporting import export_run

        out = Path(self.run) / "export" / self.format if self.out is None else Path(self.out)
        exported = export_run(self.run, out, format=self.format, overwrite=self.overwrite)
        table([*exported.rows(), ("manifest", str(exported.manifest))])
