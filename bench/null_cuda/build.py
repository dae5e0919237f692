"""Builds the libraries that take the place of NVIDIA's.

Each function that torch or the CUDA driver's header names and that the C++ files here do not have
is made up: it takes anything and returns 0, which is success everywhere.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = (HERE / "runtime.cpp", HERE / "libraries.cpp")
PREFIXES = ("__cuda", "cuda", "cublas", "cudnn", "cufft", "cupti", "curand", "cusolver")
PREFIXES += ("cusparse", "nccl", "nvrtc")
COMPUTES = re.compile(r"cublas\w*(gemm|gemv|dot|trsm)|cublasLtMatmul$|cufftXtExec", re.IGNORECASE)
KEPT = HERE.parents[1] / "build" / "null_cuda"
"""Where libraries are kept, a folder for each state of the sources and version of torch."""


class CannotBuildError(Exception):
    """Something that it takes is not installed."""


def build() -> Path:
    """The folder of the libraries, built where they are not there yet (4 s).

    Raises:
        CannotBuildError: torch is not built for CUDA, or headers, gcc or nm are missing.
    """
    parts = [Path(__file__), HERE / "counts.h", *SOURCES]
    state = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
    state.update(torch.__version__.encode())
    folder = KEPT / state.hexdigest()[:16]
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=KEPT))
        try:
            _compile(made)
            made.chmod(0o755)
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _compile(folder: Path) -> None:
    headers = _headers()
    made_up, objects = folder / "made_up.c", folder / "made_up.o"
    made_up.write_text(_made_up(_wanted(headers)))
    _run("gcc", "-c", "-fPIC", "-w", made_up, "-o", objects)
    # Of the compiler's headers ("crt/..."), which pip does not bring with torch, Triton has a copy.
    triton = Path(torch.__file__).parents[1] / "triton/backends/nvidia/include"
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{headers}", f"-I{triton}"]
    # The driver, which dlopen finds by this name, and NVRTC, which torch opens apart.
    for name in ("libcuda.so.1", f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"):
        output = ["-Wl,-soname," + name, "-ldl", "-o", folder / name]
        _run("g++", *flags, *SOURCES, objects, *output)


def _headers() -> Path:
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is not built for CUDA")
    major, minor = torch.version.cuda.split(".")[:2]
    wanted = f"#define CUDA_VERSION {1000 * int(major) + 10 * int(minor)}"
    for header in Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda.h"):
        if wanted in header.read_text():
            return header.parent
    raise CannotBuildError(f"headers of CUDA {torch.version.cuda} are not beside torch")


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
    lines = ["int null_cuda_computed(void);\n"]
    for name in sorted(names - written):
        result = "null_cuda_computed()" if COMPUTES.match(name) else "0"
        lines.append(f"int {name}(void) {{ return {result}; }}\n")
    return "".join(lines)


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CannotBuildError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise RuntimeError(f"null CUDA: {command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
