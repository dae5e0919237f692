"""`gmm-jepa doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gmm_jepa
from gmm_jepa.cli.parse import parse
from gmm_jepa.cli.table import format_table
from gmm_jepa.ops import fused, native, triton_gmm

_OPTIONAL = {
    "triton": "kernels on CUDA",
    "safetensors": "run folders and mixture files",
    "soundfile": "reading audio",
    "soxr": "resampling",
    "tqdm": "progress bars",
    "tyro": "the command line",
    "tensorboard": "TensorBoard events",
    "matplotlib": "the report",
    "espeakng-loader": "the synthetic corpus",
    "transformers": "Hugging Face's encoders",
    "jiwer": "error rates of recognition",
    "onnx": "export to ONNX",
    "onnxscript": "export to ONNX",
    "onnxruntime": "running what was exported to ONNX",
    "scikit-learn": "gmm_jepa.sklearn",
    "torchaudio": "an oracle of the tests",
}

_PROVEN = "posterior, log-likelihood, log-mel, masked losses, attention, depthwise convolution"
_UNPROVEN = "residual unit, snake, density-adaptive attention"
_NOT_ASKED = f"off: GMM_JEPA_UNPROVEN_KERNELS=1 asks for them ({_UNPROVEN})"


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Tell versions, devices and which backends are live, and why others are not."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    parse(DoctorOptions, command, arguments)
    sections = {"versions": versions(), "devices": devices(), "backends": backends()}
    for title, rows in sections.items():
        print(f"{format_table([(title, ''), *rows])}\n")
    return 0


def versions() -> list[tuple[str, str]]:
    """Name and version of what is installed."""
    rows = [
        ("gmm-jepa", _version("gmm-jepa") or "not installed"),
        ("  imported from", str(Path(gmm_jepa.__file__).parent)),
        ("python", sys.version.split()[0]),
        ("torch", torch.__version__),
        ("numpy", _version("numpy") or "not installed"),
    ]
    for name, purpose in _OPTIONAL.items():
        rows.append((name, _version(name) or f"not installed ({purpose})"))
    return rows


def devices() -> list[tuple[str, str]]:
    """The machine's processors and how they are used."""
    rows = [
        ("cpu", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"),
        ("cpu features", torch.backends.cpu.get_cpu_capability()),
        ("bfloat16 products", "yes" if native.multiplies_bfloat16() else "no"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        )
    return rows


def backends() -> list[tuple[str, str]]:
    """Each backend of the ops: live, or why not."""
    cuda = "live" if torch.cuda.is_available() else f"off: {_why_no_cuda()}"
    unproven = _triton_status(_UNPROVEN) if fused.uses_unproven else _NOT_ASKED
    return [
        ("torch on cpu", "live (all ops)"),
        ("torch on cuda", cuda),
        ("triton kernels", _triton_status(_PROVEN)),
        ("unproven triton kernels", unproven),
        ("native module", native.status()),
        ("native EM on cuda", native.cuda_status()),
    ]


def _triton_status(kernels: str) -> str:
    if not triton_gmm.available():
        return "off: triton is not installed"
    if importlib.util.find_spec("gmm_jepa.kernels") is None:
        return "off: gmm_jepa.kernels is not found: pip install -e ., or run elsewhere"
    if not torch.cuda.is_available():
        return f"off: {_why_no_cuda()}"
    return f"live ({kernels})"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return f"no device or driver found (torch is built for CUDA {torch.version.cuda})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
