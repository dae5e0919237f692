"""Tensors on disk: what comes back, and what a disk that is full does."""

from __future__ import annotations

import pathlib
import pickle
import subprocess
import sys

import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.tensor_files import read_state, read_tensors, save_state, save_tensors

FULL = """
import pathlib, resource, signal, sys, torch
from gmm_jepa import tensor_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
save, path = getattr(tensor_files, sys.argv[1]), pathlib.Path(sys.argv[2])
try:
    save(path, {"weights": torch.zeros(100_000)})
except OSError as error:
    print(error)
"""


def test_any_strides_and_devices_come_back(tmp_path):
    tensors = {"turned": torch.randn(3, 4).T, "few": torch.randn(8)[::2].bfloat16()}
    save_tensors(tmp_path / "a.safetensors", tensors, {"said": "so"})
    metadata, found = read_tensors(tmp_path / "a.safetensors", "no")
    assert metadata == {"said": "so"}
    assert {name: torch.equal(found[name], t) for name, t in tensors.items()} == dict.fromkeys(
        tensors, True
    )


def test_a_state_comes_back(tmp_path):
    state = {"step": 3, "lists": [torch.arange(4), {"rate": 0.1}]}
    save_state(tmp_path / "state.pt", state)
    found = read_state(tmp_path / "state.pt", "damaged")
    assert torch.equal(found["lists"].pop(0), state["lists"].pop(0))
    assert found == state


@pytest.mark.parametrize("save", ["save_tensors", "save_state"])
def test_a_full_disk_is_said_in_one_line(save, tmp_path):
    pytest.importorskip("resource")
    words = [sys.executable, "-c", FULL, save, str(tmp_path / "file")]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "file") in run.stdout
    assert "File too large" in run.stdout
    assert len(run.stdout.splitlines()) == 1


def test_what_is_damaged_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"no tensors")
    for read in (read_tensors, read_state):
        with pytest.raises(InputError, match="file: of no use "):
            read(path, "of no use")


def test_what_would_run_code_is_not_unpickled(tmp_path):
    for content in (b"", b"garbage", pickle.dumps(pathlib.PurePath("a"))):
        (tmp_path / "file.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"file\.pt: of no use ") as raised:
            read_state(tmp_path / "file.pt", "of no use")
        assert "weights_only" not in str(raised.value)
        assert "\x1b" not in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
