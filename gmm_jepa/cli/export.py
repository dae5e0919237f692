"""`gmm-jepa export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gmm_jepa.cli.parse import parse
from gmm_jepa.encoder import load_encoder
from gmm_jepa.errors import InputError, require
from gmm_jepa.export.graph import save_onnx, save_program, to_program
from gmm_jepa.export.huggingface import save_huggingface
from gmm_jepa.files import refuse_existing
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.trained import at_path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a pretrained encoder for other tools; one or several formats."""

    source: Path
    """A run folder, one of its checkpoints, a model file, or a published .pt."""
    hf: Path | None = None
    """New folder for Hugging Face: AutoModel.from_pretrained(folder, trust_remote_code=True)."""
    onnx: Path | None = None
    """New ONNX file; inputs: waveform (batch, samples), lengths (batch,)."""
    torch_export: Path | None = None
    """New .pt2 file for torch.export.load; it takes batches of 0.2 s and longer, rows of any."""
    teacher: bool = False
    """The moving average instead of the encoder that was trained."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(ExportOptions, command, arguments)
    if not (options.hf or options.onnx or options.torch_export):
        raise InputError("export: expected --hf, --onnx or --torch-export")
    for path in filter(None, (options.hf, options.onnx, options.torch_export)):
        refuse_existing(path)
    if options.onnx:  # before the slow part
        for package in ("onnx", "onnxscript"):
            require(package, extra="export")
    is_run = RunFolder(options.source).config.exists()
    trained = at_path(options.source) if is_run else None
    source = options.source if trained is None else trained.path
    encoder = load_encoder(source, teacher=options.teacher)
    if options.hf is not None:
        save_huggingface(encoder, options.hf, trained=trained, teacher=options.teacher)
        print(options.hf)
    if options.onnx or options.torch_export:
        program = to_program(encoder)  # the slow part
        for path, save in ((options.torch_export, save_program), (options.onnx, save_onnx)):
            if path is not None:
                save(program, path)
                print(path)
    return 0
