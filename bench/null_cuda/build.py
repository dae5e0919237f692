"""Builds the libraries that take the place of NVIDIA's.

Each function that torch or the CUDA driver's header names and that the C++ files here do not have
is made up: it takes anything and returns 0, which is success everywhere.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = (HERE / "runtime.cpp", HERE / "libraries.cpp")
PREFIXES = ("__cuda", "cuda", "cublas", "cudnn", "cufft", "cupti", "curand", "cusolver")
PREFIXES += ("cusparse", "nccl", "nvrtc")
KEPT = HERE.parents[1] / "build" / "null_cuda"
"""Where libraries are kept, a folder for each state of the sources."""


class CannotBuildError(Exception):
    """Something that it takes is not there."""


def build() -> Path:
    """The folder of the libraries, built where they are not there yet (6 s).

    Raises:
        CannotBuildError: torch is not built for CUDA, or headers, compiler or nm are missing.
    """
    parts = [Path(__file__), HERE / "counts.h", *SOURCES]
    state = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
    state.update(torch.__version__.encode())
    folder = KEPT / state.hexdigest()[:16]
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as made:
            _compile(Path(made))
            try:
                Path(made).rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
            Path(made).mkdir(exist_ok=True)  # what the context removes
    return folder


def _compile(folder: Path) -> None:
    headers = _headers()
    made_up = folder / "made_up.c"
    made_up.write_text(_made_up(_wanted(headers)))
    # Of the compiler's headers ("crt/..."), which pip does not bring with torch, Triton has a copy.
    triton = Path(torch.__file__).parents[1] / "triton/backends/nvidia/include"
    common = ["-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{triton}"]
    # The driver, which dlopen finds by this name, and NVRTC, which torch opens apart.
    for name in ("libcuda.so.1", f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"):
        objects = folder / "made_up.o"
        _run("gcc", "-c", "-fPIC", "-w", made_up, "-o", objects)
        _run("g++", *common, *SOURCES, objects, f"-Wl,-soname,{name}", "-ldl", "-o", folder / name)


def _headers() -> Path:
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is not built for CUDA")
    found = list(Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda_runtime_api.h"))
    if not found:
        raise CannotBuildError("NVIDIA's headers are not beside torch, as pip installs them")
    return found[0].parent


def _wanted(headers: Path) -> set[str]:
    """Functions of NVIDIA's that torch calls, and all of the driver's."""
    driver = (headers / "cuda.h").read_text()
    names = set(re.findall(r"CUDAAPI\s+(cu\w+)\s*\(", driver))
    names |= set(re.findall(r"#define\s+cu\w+\s+(cu\w+_v\d+)", driver))
    for library in (Path(torch.__file__).parent / "lib").glob("lib*.so"):
        listed = _run("nm", "-D", "--undefined-only", library)
        names |= set(re.findall(rf"\b((?:{'|'.join(PREFIXES)})\w+)", listed))
    return names


def _made_up(names: set[str]) -> str:
    text = "".join(source.read_text() for source in SOURCES)
    written = set(re.findall(r"^EXPORT [^(]*?(\w+)\(", text, re.MULTILINE))
    return "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - written))


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotBuildError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise CannotBuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
