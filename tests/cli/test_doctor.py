"""What `gmm-jepa doctor` lists."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import gmm_jepa
from gmm_jepa.cli import doctor
from gmm_jepa.ops import fused, native

PACKAGE = Path(gmm_jepa.__file__).parent
FOR_DEVELOPERS = {"pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "ruff"}


def test_every_optional_package_is_listed():
    extras = [line for line in metadata.requires("gmm-jepa") if "extra ==" in line]
    named = {re.match(r"[\w-]+", line)[0].lower() for line in extras} - {"gmm-jepa"}
    listed = {name for name, _ in doctor.versions()}
    assert named - FOR_DEVELOPERS <= listed


def test_a_package_that_is_absent_is_listed_with_what_needs_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    rows = dict(doctor.versions())
    assert rows["scikit-learn"] == "not installed (gmm_jepa.sklearn)"


def test_kernels_that_are_live(monkeypatch):
    monkeypatch.setattr(doctor.triton_gmm, "available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "uses_unproven", False)
    rows = dict(doctor.backends())
    assert rows["triton kernels"].startswith("live (posterior, ")
    assert "attention, depthwise convolution" in rows["triton kernels"]
    assert "GMM_JEPA_UNPROVEN_KERNELS=1" in rows["unproven triton kernels"]
    monkeypatch.setattr(fused, "uses_unproven", True)
    rows = dict(doctor.backends())
    assert rows["unproven triton kernels"].startswith("live (residual unit, snake")


def test_kernels_that_are_not_found_are_not_live(monkeypatch):
    monkeypatch.setattr(doctor.triton_gmm, "available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert dict(doctor.backends())["triton kernels"].startswith("off: gmm_jepa.kernels")


def test_a_checkout_that_hides_an_installed_package_says_so(tmp_path):
    no_binaries = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "checkout" / "gmm_jepa", ignore=no_binaries)
    (tmp_path / "checkout" / "setup.py").touch()
    (tmp_path / "site" / "gmm_jepa").mkdir(parents=True)
    (tmp_path / "site" / "gmm_jepa" / "__init__.py").touch()
    code = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
sys.path.append(sys.argv[1])
from gmm_jepa.cli import doctor
print(dict(doctor.backends())["native module"], dict(doctor.versions())["  imported from"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=tmp_path / "checkout", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"off: {native.BARE_CHECKOUT}")
    assert str(tmp_path / "checkout" / "gmm_jepa") in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert str(tmp_path / "site" / "gmm_jepa") in done.stderr


def test_a_checkout_alone_or_in_a_child_says_nothing(monkeypatch, tmp_path):
    checkout, site = tmp_path / "checkout" / "gmm_jepa", tmp_path / "site" / "gmm_jepa"
    for folder in (checkout, site):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (checkout.parent / "setup.py").touch()
    monkeypatch.chdir(checkout.parent)
    monkeypatch.setattr(native, "_PACKAGE", checkout)
    monkeypatch.setattr(sys, "path", [str(checkout.parent), "", "\0", str(tmp_path / "absent")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native._warn_if_shadowed()
        monkeypatch.setattr(sys, "path", [str(site.parent)])
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
        native._warn_if_shadowed()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    with pytest.warns(RuntimeWarning, match=re.escape(str(site))):
        native._warn_if_shadowed()
    suffix = native.importlib.machinery.EXTENSION_SUFFIXES[0]
    (checkout / f"_native{suffix}").touch()
    assert not native.is_bare_checkout()
