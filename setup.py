"""Packages of the house and the native module; the metadata is in pyproject.toml.

``gmm_jepa._native`` is built wherever a C++17 compiler is found. Without one, or if the build
fails, the package installs all the same and its operators run on torch alone; ``gmm-jepa doctor``
tells. ``GMM_JEPA_NATIVE=0`` leaves the native module out.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

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
    "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
}


class BuildNative(build_ext):
    """Compile each source with its own flags; a failure costs the module, not the installation."""

    def run(self):
        """Build, or say in one line why not."""
        try:
            super().run()
        except Exception as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(f"gmm_jepa._native is not built, torch takes its place: {first[0]}")
            if os.environ.get("GMM_JEPA_NATIVE") == "1":
                raise

    def build_extension(self, extension):
        """Objects one by one, then the library."""
        import pybind11

        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[("GMM_JEPA_X86", "1")] if IS_X86 else [],
                include_dirs=[pybind11.get_include(), *self.include_dirs],
                extra_postargs=[*FLAGS, *FLAGS_OF.get(Path(source).stem, [])],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(chain.from_iterable(pool.map(compiled, extension.sources)))
        path = self.get_ext_fullpath(extension.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, path, extra_postargs=["-pthread"], target_lang="c++"
        )


def native_extensions() -> list[Extension]:
    """The native module, unless it is unwanted or nothing could compile it."""
    if os.environ.get("GMM_JEPA_NATIVE") == "0" or sys.platform == "win32":
        return []
    names = sorted(path.name for path in CSRC.glob("*.cpp"))
    if not IS_X86:
        names = [name for name in names if Path(name).stem not in FLAGS_OF]
    return [Extension("gmm_jepa._native", [str(CSRC / name) for name in names], optional=True)]


setup(
    packages=[*find_packages(include=["gmm_jepa", "gmm_jepa.*"]), "gmm_jepa.kernels"],
    package_dir={"gmm_jepa.kernels": "kernels"},
    package_data={"gmm_jepa": ["data/*.txt", "evaluate/*.css", "evaluate/*.html"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
)
