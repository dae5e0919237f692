"""Whether the native module is there where it can be: without it most tests here are skipped."""

from __future__ import annotations

import os
import shutil

import pytest

from gmm_jepa.ops import native


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("GMM_JEPA_NATIVE") == "0", reason="left out")
def test_a_compiler_gives_a_native_module():
    assert native.instruction_sets(), native.status()
