"""The module in processes that were forked, and where threads cannot be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.ops import Mixture, native
from tests.mixtures import drawn

if not native.instruction_sets():
    pytest.skip(f"native module: {native.status()}", allow_module_level=True)


@pytest.fixture
def outputs_begin_as_nan() -> None:
    """They do not here: to fill them takes torch's threads, which a forked process has not."""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1.0)  # torch's threads have begun
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forked_process_computes_too(dtype, two_threads):
    """Where torch's own threads are gone: whatever it would share among them waits for ever."""
    frames, mixture = drawn(300, 1024, 80, dtype=dtype)
    mixture = Mixture(*(p.to(dtype) for p in mixture))

    def results():
        posterior = ops.gmm_posterior(frames, mixture).numpy()
        labels, _ = ops.kmeans_assign(frames, mixture.means)
        return posterior, ops.em_statistics(frames, mixture).counts.numpy(), labels.numpy()

    expected = results()
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(np.array_equal, expected, results())) else 1)
    deadline = time.monotonic() + 60.0
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if status[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)


def run_alone(code):
    """A program of its own: exit status, or None after a minute."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    try:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | threads, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def test_a_forked_process_may_be_the_first_to_import():
    """Torch's threads were there before, in the parent alone."""
    code = """
import os, signal, sys, torch
torch.exp(torch.randn(2000, 2000))
child = os.fork()
if child == 0:
    signal.alarm(30)
    import numpy as np
    from gmm_jepa import ops
    K, D = 64, 80
    frames, means = (torch.from_numpy(np.ones(s, dtype="f4")) for s in ((4000, D), (K, D)))
    mixture = ops.Mixture(torch.zeros(K), means, means)
    for _ in range(2):
        ops.gmm_posterior(frames, mixture)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    assert run_alone(code) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_threads_that_cannot_be_made_raise():
    """Each wants a stack of 8 MB; the process goes on."""
    code = """
import os, resource, sys, torch
from gmm_jepa.ops import native
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY))
x = torch.ones(1 << 20)
out = torch.zeros(1 << 20)
values = out.numpy()
child = os.fork()
if child:
    sys.exit(os.waitpid(child, 0)[1])
call = lambda n: native._native.dropout(x.data_ptr(), len(x), (0, 0.0), out.data_ptr(), "", n)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (60 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    call(64)
except RuntimeError:
    assert not values.any()
else:
    os._exit(2)
call(2)
os._exit(0 if values.all() else 3)
"""
    assert run_alone(code) == 0


def test_a_module_older_than_its_sources_is_told(monkeypatch, tmp_path):
    module = tmp_path / "_native.so"
    module.touch()
    monkeypatch.setattr(native, "_native", SimpleNamespace(__file__=str(module)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native._warn_if_stale()
    os.utime(module, (0, 0))
    with pytest.warns(RuntimeWarning, match="make native"):
        native._warn_if_stale()
