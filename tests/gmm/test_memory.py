"""The peak memory of a fit does not grow with the number of frames."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
torch.set_num_threads(1)
from gmm_jepa import GaussianMixture

def batches(n_frames):
    for start in range(0, n_frames, 20_000):
        generator = torch.Generator().manual_seed(start)
        yield torch.randn(20_000, 40, generator=generator)

n_frames = int(sys.argv[1])
gm = GaussianMixture(8, max_iter=2, tol=0.0, n_init_frames=10_000)
gm.fit(lambda: batches(n_frames))
assert gm.n_frames_ == n_frames
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak_bytes(n_frames: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n_frames)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout)


def test_peak_memory_of_a_fit_is_independent_of_the_frames():
    """Ten times the frames, 144 MB more of them: within 24 MB (noise of the allocator)."""
    few, many = _peak_bytes(100_000), _peak_bytes(1_000_000)
    assert abs(many - few) < 24 * 2**20
