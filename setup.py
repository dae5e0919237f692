"""Packages of the house and the native module; the metadata is in pyproject.toml.

``gmm_jepa._native`` is built wherever a C++17 compiler is found. Without one, or if the build
fails, the package installs all the same and its operators run on torch alone; ``gmm-jepa doctor``
tells. ``GMM_JEPA_NATIVE=0`` leaves the native module out, ``GMM_JEPA_NATIVE=1`` makes a failing
build an error.

Its CUDA part is built too where nvcc is found; no GPU is looked for. ``GMM_JEPA_CUDA=0`` leaves it
out, ``GMM_JEPA_CUDA=1`` makes its absence an error, and ``GMM_JEPA_CUDA_ARCHITECTURES`` (default
``90a``) names the targets, comma separated: the last of them is kept as PTX, too.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# -ffp-contract=fast: multiply-adds in one instruction where the set has one.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread", "-g0"]
# The inner loops are compiled once per instruction set and chosen when the module is loaded, so
# that one build runs on every processor of the architecture.
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mprefer-vector-width=512"]
FLAGS_OF = {
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": AVX512,
    "isa_avx512vnni": [*AVX512, "-mavx512vnni"],
    "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
    "isa_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# What GCC knows from 11 and 10 on: without its flags such a file says that its set is absent.
# (csrc/sanitize/build.py asks for a compiler that has all.)
NEW_SETS = ("isa_amx", "isa_avx512bf16")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]


class Cuda:
    """nvcc and the runtime beside it; raises FileNotFoundError where one is absent."""

    def __init__(self):
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        found = [shutil.which(f"{home}/bin/nvcc") for home in homes if home]
        found.append(shutil.which("nvcc"))
        self.nvcc = next((path for path in found if path), None)
        if self.nvcc is None:
            raise FileNotFoundError("nvcc is not found: set CUDA_HOME or PATH")
        home = Path(self.nvcc).resolve().parent.parent
        folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
        folders.append(Path("/usr/local/cuda/lib64"))
        has_runtime = (folder for folder in folders if (folder / "libcudart_static.a").exists())
        self.library_folder = next(has_runtime, None)
        if self.library_folder is None:
            raise FileNotFoundError(f"libcudart_static.a is not found beside {self.nvcc}")
        names = os.environ.get("GMM_JEPA_CUDA_ARCHITECTURES", "90a").split(",")
        self.architectures = [name.strip().removeprefix("sm_") for name in names if name.strip()]

    def targets(self) -> list[str]:
        """Machine code for all architectures, PTX for the last one."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        last = self.architectures[-1]
        return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]

    def compiled(self, source: Path, folder: str) -> str:
        """The object made of one source."""
        target = str(Path(folder) / f"{source.stem}_cuda.o")
        Path(folder).mkdir(parents=True, exist_ok=True)
        command = [self.nvcc, *CUDA_FLAGS, *self.targets(), "-c", str(source), "-o", target]
        subprocess.run(command, check=True)
        return target

    def link_flags(self) -> list[str]:
        """Flags that bring the runtime into the module: nothing of CUDA is needed to import it."""
        return [f"-L{self.library_folder}", "-lcudart_static", "-lrt", "-ldl"]


class BuildNative(build_ext):
    """Compile each source with its own flags; a failure costs the module, not the installation."""

    def run(self):
        """Build, or say in one line why not."""
        try:
            super().run()
        except Exception as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(f"gmm_jepa._native is not built, torch takes its place: {first[0]}")
            if "1" in (os.environ.get("GMM_JEPA_NATIVE"), os.environ.get("GMM_JEPA_CUDA")):
                raise

    def build_extension(self, extension):
        """Objects one by one, then the library."""
        import pybind11

        macros = [("GMM_JEPA_X86", "1")] if IS_X86 else []
        cuda_objects, link_flags = [], ["-pthread"]
        cuda = self.cuda_objects(cuda_objects)
        if cuda is not None:
            names = ",".join(f"sm_{name}" for name in cuda.architectures)
            macros += [("GMM_JEPA_CUDA", "1"), ("GMM_JEPA_CUDA_ARCHITECTURES", f'"{names}"')]
            link_flags += cuda.link_flags()

        def compiled(source: str) -> list[str]:
            def with_flags(flags: list[str]) -> list[str]:
                return self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    macros=macros,
                    include_dirs=[pybind11.get_include(), *self.include_dirs],
                    extra_postargs=[*FLAGS, *flags],
                )

            name = Path(source).stem
            try:
                return with_flags(FLAGS_OF.get(name, []))
            except CompileError:
                if name not in NEW_SETS:
                    raise
                self.warn(f"{source} is left out: the compiler does not take it")
                return with_flags([])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(chain.from_iterable(pool.map(compiled, extension.sources)))
        path = self.get_ext_fullpath(extension.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            [*objects, *cuda_objects], path, extra_postargs=link_flags, target_lang="c++"
        )

    def cuda_objects(self, objects: list[str]) -> Cuda | None:
        """Compile csrc/cuda/*.cu into `objects`; None where it is unwanted or nothing could."""
        wanted = os.environ.get("GMM_JEPA_CUDA", "")
        if wanted == "0":
            return None
        try:
            cuda = Cuda()
            for source in sorted(CSRC.glob("cuda/*.cu")):
                objects.append(cuda.compiled(source, self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            if not isinstance(error, FileNotFoundError):
                self.warn(f"the CUDA part of gmm_jepa._native is not built: {error}")
            objects.clear()
            return None
        return cuda


def native_extensions() -> list[Extension]:
    """The native module, unless it is unwanted or nothing could compile it."""
    if os.environ.get("GMM_JEPA_NATIVE") == "0" or sys.platform == "win32":
        return []
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cuda/*.cpp")])
    if not IS_X86:
        sources = [path for path in sources if path.stem not in FLAGS_OF]
    return [Extension("gmm_jepa._native", [str(path) for path in sources])]


setup(
    packages=[*find_packages(include=["gmm_jepa", "gmm_jepa.*"]), "gmm_jepa.kernels"],
    package_dir={"gmm_jepa.kernels": "kernels"},
    package_data={"gmm_jepa": ["data/*.txt", "report/*.css", "report/*.html"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
)
