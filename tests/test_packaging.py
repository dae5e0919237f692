"""What strangers install: metadata, pinned versions, data files, and no trace of one machine."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def tracked_files() -> list[Path]:
    """Files of the repository, committed or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    paths = (REPOSITORY / name for name in listing.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def constraints() -> list[tuple[str, str, str]]:
    """(name, exact version, environment marker) of each line of constraints.txt."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)(?:; (.+))?", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return [(match[1], match[2], match[3] or "") for match in matches]


def test_metadata() -> None:
    about = metadata.metadata("gmm-jepa")
    assert {"train", "demo", "dev"} <= set(about.get_all("Provides-Extra"))
    assert about["Requires-Python"] == ">=3.10"
    scripts = metadata.entry_points(group="console_scripts", name="gmm-jepa")
    assert [script.value for script in scripts] == ["gmm_jepa.cli:main"]


def test_plain_import_needs_only_torch_and_numpy() -> None:
    needed = [line for line in metadata.requires("gmm-jepa") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == {"torch", "numpy"}


def test_license_is_apache_2() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license = "Apache-2.0"' in pyproject


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.11.0"), ("torchaudio", "2.11.0"), ("triton", "3.6.0"), ("setuptools", "80.9.0")],
)
def test_constraints_pin(name: str, version: str) -> None:
    assert [pinned for pin_name, pinned, _ in constraints() if pin_name == name] == [version]


def test_constraints_hold_for_every_supported_python() -> None:
    """A package pinned twice is split at Python 3.11, one line for each side."""
    markers: dict[str, list[str]] = {}
    for name, _, marker in constraints():
        markers.setdefault(name, []).append(marker.split(" and ")[0])
    for name, sides in markers.items():
        assert len(sides) == 1 or sides == [
            'python_version < "3.11"',
            'python_version >= "3.11"',
        ], name
    assert len(markers["numpy"]) == len(markers["scikit-learn"]) == 2


def test_constraints_name_every_requirement() -> None:
    pinned = {name for name, _, _ in constraints()}
    wanted = {re.match(r"[\w-]+", line)[0].lower() for line in metadata.requires("gmm-jepa")}
    assert wanted - {"gmm-jepa"} <= pinned


def test_data_files_are_packaged() -> None:
    text = resources.files("gmm_jepa.data").joinpath("sentences.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) > 400
    assert '"data/*.txt"' in (REPOSITORY / "setup.py").read_text(encoding="utf-8")


def test_kernels_are_a_package_of_gmm_jepa() -> None:
    kernels = importlib.import_module("gmm_jepa.kernels")
    assert (Path(kernels.__file__).parent.resolve()) == REPOSITORY / "kernels"


@pytest.mark.parametrize("wanted", ["", "GMM_JEPA_NATIVE", "GMM_JEPA_CUDA"])
def test_a_failing_build_is_an_error_where_the_module_is_asked_for(wanted: str, tmp_path) -> None:
    (tmp_path / "pybind11.py").write_text("def get_include():\n    return '.'\n")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(tmp_path / "built"), "--build-temp", str(tmp_path / "temp")]
    environment = os.environ | {"CC": "false", "CXX": "false", "PYTHONPATH": str(tmp_path)}
    for name in ("GMM_JEPA_NATIVE", "GMM_JEPA_CUDA"):
        environment[name] = "1" if name == wanted else ""
    environment["CUDA_HOME"] = str(tmp_path)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(wanted), done.stderr
    assert "gmm_jepa._native is not built" in done.stderr


def test_measurements_say_what_they_take_before_they_measure() -> None:
    """Every main of bench/ has --help, those that write --out, and one line where CUDA is absent.

    In a process of its own: one of them changes the environment for Triton.
    """
    names = [
        path.stem
        for path in sorted((REPOSITORY / "bench").glob("*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert len(names) > 10
    code = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    main = importlib.import_module(f"bench.{name}").main
    for argument in ("--help", "--device=cuda" if name != "cuda_em" else "--frames=8"):
        text = io.StringIO()
        if argument == "--device=cuda" and "--device" not in told:
            continue
        sys.argv = [name, argument]
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                main()
            except SystemExit as end:
                code = end.code
        told = text.getvalue()
        if argument == "--help":
            assert code == 0 and ("--out" in told or name == "tiny"), (name, code, told)
        else:
            assert code == 2 and told == "no CUDA device\\n", (name, code, told)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_recent_enough() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 11)


def test_no_file_knows_one_machine() -> None:
    """No path of a home, a work folder or a scratch folder in any text file."""
    homes = re.compile(r"(?<![\w.~*-])/(?:home|root|Users|work|mnt|tmp|opt)/[\w.-]+")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if path != Path(__file__).resolve() and homes.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
