"""How processes join and leave their group, and what becomes of one that fails."""

from __future__ import annotations

import atexit
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from gmm_jepa.distributed import Processes, processes


@pytest.fixture
def group(monkeypatch) -> list[str]:
    """What is done to the process group of two; there is none."""
    done: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: done.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    monkeypatch.setattr(atexit, "register", lambda what: done.append(what.__name__))
    return done


def use_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)


@pytest.mark.parametrize(("cuda", "backend"), [(False, "gloo"), (True, "nccl")])
def test_whoever_is_done_leaves(cuda, backend, group, monkeypatch):
    if cuda:
        use_cuda(monkeypatch)
    with processes() as peers:
        assert (peers.rank, peers.world_size) == (1, 2)
    assert group == [backend, "left"]


def test_whoever_fails_on_a_gpu_waits_for_nobody(group, monkeypatch):
    """The others may be in a sum that this process will not come to."""
    use_cuda(monkeypatch)
    with pytest.raises(OSError, match="disk"), processes():
        raise OSError("disk")
    assert group == ["nccl", "_end_at_once"]


def test_whoever_fails_on_a_cpu_leaves(group):
    with pytest.raises(OSError, match="disk"), processes():
        raise OSError("disk")
    assert group == ["gloo", "left"]


def test_an_end_at_once_loses_no_output():
    program = (
        "import atexit; from gmm_jepa.distributed import _end_at_once; "
        "atexit.register(print, 'never'); atexit.register(_end_at_once); print('said', end='')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "said"), ended.stderr


def test_the_main_process_alone_says_something(capsys):
    for rank in range(2):
        peers = Processes(rank=rank, world_size=2, device=torch.device("cpu"))
        peers.say(f"a {rank}", "b")
    assert capsys.readouterr().out == "a 0\nb\n"
