"""`import gmm_jepa` asks for torch and NumPy alone."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import numpy, torch

BLOCKED = {
    "soundfile", "soxr", "safetensors", "triton", "sklearn", "scipy", "matplotlib", "tqdm",
    "tyro", "tensorboard", "torchaudio", "espeakng_loader", "yaml", "pandas",
}

class Without:
    # the usual finder of modules, blind to the blocked ones

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

for name in [m for m in sys.modules if m.split(".")[0] in BLOCKED]:
    del sys.modules[name]
sys.meta_path = [Without(finder) for finder in sys.meta_path]
import gmm_jepa
from gmm_jepa import GaussianMixture, InputError, LogMelSpec, gmm_posterior, log_mel

assert gmm_jepa.__version__
waveform = numpy.random.default_rng(0).standard_normal(32_000).astype("float32")
frames = log_mel(waveform, spec=LogMelSpec())
gm = GaussianMixture(4, max_iter=5, tol=0).fit(frames)
posterior = gmm_posterior(frames, gm)
assert posterior.shape == (101, 4) and abs(posterior.sum(1) - 1).max() < 1e-5
try:
    gm.save("never.gmm")
except ImportError as error:
    assert 'pip install "gmm-jepa[train]"' in str(error)
else:
    raise AssertionError("saved without safetensors")
print("fine")
"""


def test_torch_and_numpy_are_enough(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"
    assert not list(tmp_path.iterdir())


def test_version_is_the_projects():
    import importlib.metadata

    import gmm_jepa

    assert gmm_jepa.__version__ == importlib.metadata.version("gmm-jepa")


def test_names_and_modules_are_imported_when_they_are_asked_for():
    program = (
        "import sys, gmm_jepa; assert 'torch' not in sys.modules; "
        "assert {'GaussianMixture', 'load_encoder', 'log_mel'} <= set(dir(gmm_jepa)); "
        "gmm_jepa.ops.log_mel, gmm_jepa.gmm.KMeans, gmm_jepa.GaussianMixture; import torch; "
        "torch.ops.gmm_jepa.log_mel; from gmm_jepa import *; load_encoder; "
        "assert not hasattr(gmm_jepa, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
