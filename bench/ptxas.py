"""Compile csrc/cuda for sm_90a without a GPU, and record what each kernel needs.

    python -m bench.ptxas

prints registers, spills and shared memory of every kernel as ``ptxas -v`` reports them, counts
instructions in the machine code where cuobjdump is found, and appends one JSON line a kernel to
``bench/results/ptxas.jsonl``. Exit code 1 if a kernel for K = 1,024, D = 80 spills.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"  # not of bench.records: torch is not needed here
TARGET = "90a"
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v", f"-gencode=arch=compute_{TARGET},code=sm_{TARGET}"]
# What float32 frames of D = 80 meet: one of two screens, and `_again` where the list is full.
PAPER = (
    "em_tiles_kernel",
    "em_screen_kernel<float, 8, 10>",
    "em_refine_kernel<float, 3, 4, 80>",
    "em_share_kernel",
    "em_share_again_kernel<float, 3, 4, 80>",
    "em_frame_kernel",
    "em_moments_kernel<float, 3, 4, 80>",
    "em_moments_again_kernel<float, 3, 4, 80>",
    "em_likelihood_kernel",
    "em_finish_kernel",
)
NUMBERS = {
    "registers": r"Used (\d+) registers",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "stack_bytes": r"(\d+) bytes stack frame",
    "static_shared_bytes": r"(\d+) bytes smem",
}


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, or of the copy that Triton brings."""
    folders = ["/usr/local/cuda/bin"]
    if triton := importlib.util.find_spec("triton"):
        folders.append(f"{Path(triton.origin).parent}/backends/nvidia/bin")
    folders += REPOSITORY.glob(".venv/lib/python*/site-packages/triton/backends/nvidia/bin")
    found = (shutil.which(f"{folder}/{name}") for folder in folders)
    return shutil.which(name) or next((path for path in found if path), None)


def plain(symbol: str) -> str:
    """A kernel's name with its template arguments: no namespace, no parameters."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = name.strip().removeprefix("void ").replace("gmm_jepa::cuda::", "")
    return name.split("(", 1)[0]


def dynamic_shared_bytes(kernel: str) -> int:
    """Of a screen kernel at the widest frames it takes, as `screen_shared_bytes` in screen.cuh; of
    the one by warpgroups, `sizeof(TileScreenShared)` in screen_tiles.cuh."""
    if kernel == "em_tiles_kernel":
        return 4 * (2 * 64 * 160 + 4 * 64) + 2 * 12 * 16 * (160 + 8)
    match = re.fullmatch(r"em_screen_kernel<\w+, (\d+), (\d+)>", kernel)
    if not match:
        return 0
    warps, steps = int(match[1]), int(match[2])
    depth = 16 * (steps or {8: 16, 4: 32, 2: 64}[warps])
    return 2 * (warps * 32 * (depth + 8) + 4 * 64 * (160 + 8 + 2))


def instructions(binary: Path) -> dict[str, dict[str, int]]:
    """Of each kernel: tensor-core products, and accesses to local memory (arrays, spills)."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        return {}
    command = [disassembler, "--dump-sass", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    counts = {}
    for symbol, body in zip(parts[::2], parts[1::2], strict=True):
        words = {"mma": "HG?MMA", "ldmatrix": "LDSM", "cp_async": "LDGSTS", "local": "(?:LDL|STL)"}
        counts[plain(symbol)] = {
            name: len(re.findall(rf"\b{word}\b", body)) for name, word in words.items()
        }
    return counts


def kernels(source: Path) -> list[dict]:
    """What every kernel of one source needs."""
    nvcc = tool("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not found")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.o")
        command = [nvcc, *FLAGS, "-c", source, "-o", binary]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(run.stderr)
        counts = instructions(binary)
    parts = re.split(r"Compiling entry function '(\S+)'", run.stderr + run.stdout)[1:]
    lines = []
    for symbol, report in zip(parts[::2], parts[1::2], strict=True):
        line: dict = {"source": source.name, "kernel": plain(symbol), "target": f"sm_{TARGET}"}
        for name, pattern in NUMBERS.items():
            match = re.search(pattern, report)
            line[name] = int(match[1]) if match else 0
        line["dynamic_shared_bytes"] = dynamic_shared_bytes(line["kernel"])
        line["paper"] = line["kernel"] in PAPER
        lines.append(line | counts.get(line["kernel"], {}))
    return lines


def surroundings() -> dict[str, str]:
    """Commit (with a plus where files are changed), compiler and date."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True)
    release = re.search(r"release [\d.]+, V([\d.]+)", version.stdout)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "nvcc": release[1] if release else "unknown",
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    """Compile, print a table, append to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    lines = [
        line for source in sorted(REPOSITORY.glob("csrc/cuda/*.cu")) for line in kernels(source)
    ]
    print(f"{'kernel (* K = 1,024, D = 80)':42} regs  spills  stack  shared KiB  mma  local")
    for line in sorted(lines, key=lambda line: (not line["paper"], line["kernel"])):
        shared = (line["static_shared_bytes"] + line["dynamic_shared_bytes"]) / 1024
        spills = line["spill_store_bytes"] + line["spill_load_bytes"]
        name = f"{line['kernel']} *" if line["paper"] else line["kernel"]
        print(
            f"{name:42} {line['registers']:4}  {spills:6}  {line['stack_bytes']:5}  "
            f"{shared:10.1f}  {line.get('mma', ''):3}  {line.get('local', ''):5}"
        )
    if not options.dry:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "ptxas.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line | surroundings()) + "\n" for line in lines)
    spilling = [line for line in lines if line["paper"] and line["spill_store_bytes"]]
    for line in spilling:
        print(f"{line['kernel']} spills", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
