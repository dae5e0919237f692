"""For all tests of the native module."""

from __future__ import annotations

from tests.spoiled import outputs_begin_as_nan  # noqa: F401  # of all tests here
