"""What `gmm-jepa doctor` lists."""

from __future__ import annotations

import re
from importlib import metadata

from gmm_jepa.cli import doctor
from gmm_jepa.ops import fused

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
