"""An encoder as a graph without Python: `torch.export` programs and ONNX files.

The graph takes ``waveform`` (B, S) float32 and ``lengths`` (B,) int64, both of any batch and any
length from `MIN_SAMPLES` on, and gives ``last_hidden_state`` (B, T, D), ``hidden_states``
(L, B, T, D) and ``lengths_frames`` (B,). Padding never changes a result, as in the encoder itself.
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmm_jepa.encoder import SpeechEncoder
from gmm_jepa.errors import require
from gmm_jepa.files import refuse_existing, written_aside

MIN_SAMPLES = 3200
"""Shortest padded batch of a graph, 0.2 s; a row of it may be shorter."""
MAX_SAMPLES = 16_000 * 3600
OUTPUTS = ("last_hidden_state", "hidden_states", "lengths_frames")


class _Flat(nn.Module):
    """The encoder with tensors for outputs."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self.encoder(waveform, lengths)
        return encoded.last_hidden_state, torch.stack(encoded.hidden_states), encoded.lengths


def to_program(encoder: SpeechEncoder) -> torch.export.ExportedProgram:
    """Trace an encoder in eval mode, batch and length left open.

    Attention is traced and written out as products and a softmax: the fused operators' own checks
    would fix the batch, and their memory layout, which other backends do not share.
    """
    was_training = encoder.training
    # Sizes that no channel count or kernel equals, so that the tracer takes none for another.
    longest = 10 * MIN_SAMPLES + 7
    example = (torch.zeros(3, longest), torch.tensor([longest, longest, MIN_SAMPLES]))
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    samples = torch.export.Dim("samples", min=MIN_SAMPLES, max=MAX_SAMPLES)
    shapes = ({0: batch, 1: samples}, {0: batch})
    try:
        with sdpa_kernel(SDPBackend.MATH):
            program = torch.export.export(
                _Flat(encoder.eval()),
                example,
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    finally:
        encoder.train(was_training)
    table = torch.export.default_decompositions()
    table[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    with warnings.catch_warnings():
        # PyTorch copies trees of its own in a way it calls deprecated.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        return program.run_decompositions(table)


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` that `torch.export.load` reads, without this package.

    Raises:
        InputError: the file exists.
    """
    refuse_existing(path)
    held = io.BytesIO()  # PyTorch's writer ends the process where a disk is full
    torch.export.save(program, held)
    with written_aside(path) as aside:
        aside.write_bytes(held.getbuffer())


def save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an ONNX file, weights inside.

    Raises:
        InputError: the file exists.
        ImportError: onnx or onnxscript is absent.
    """
    require("onnx", extra="export")
    require("onnxscript", extra="export")
    refuse_existing(path)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        exported = torch.onnx.export(
            program, (), input_names=["waveform", "lengths"], output_names=OUTPUTS, verbose=False
        )
    with written_aside(path) as aside:
        exported.save(str(aside))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of an encoder in eval mode, (B, H, T, d)."""
    assert not any((dropout_p, is_causal, enable_gqa))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    y = scores.softmax(dim=-1) @ v
    return y.transpose(1, 2).contiguous().transpose(1, 2)  # the layout that was traced
