"""Compile csrc/ and csrc/sanitize/ with sanitizers: build.py FOLDER."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS_OF = {  # as in setup.py; the compiler must know them all (GCC 11)
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": AVX512,
    "isa_avx512vnni": [*AVX512, "-mavx512vnni"],
    "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
    "isa_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O1", "-g", "-pthread", "-fno-omit-frame-pointer", f"-I{CSRC}"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["-DGMM_JEPA_X86=1"] if IS_X86 else []


def main(folder: Path) -> None:
    """Objects side by side, then the program ``main``."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    sources = [
        path
        for path in CSRC.glob("*.cpp")
        if path.stem != "module" and not path.stem.endswith("bindings")
    ]
    sources = [path for path in sources if IS_X86 or path.stem not in FLAGS_OF]
    sources.append(CSRC / "cuda" / "emulate.cpp")
    sources.extend((CSRC / "sanitize").glob("*.cpp"))

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        flags = [*FLAGS, *FLAGS_OF.get(source.stem, [])]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *FLAGS, *objects, "-o", str(folder / "main")], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
