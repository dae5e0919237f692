"""A fit whose frames are on a GPU ends as one on the CPU; no audio files are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gmm_jepa.calibration import SyntheticCorpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.distributed import Processes
from gmm_jepa.fitting import FitReport, FitSettings, fit_mixture
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.presets import preset

RECIPE = preset("smoke")
RECIPE = replace(RECIPE, mixture=replace(RECIPE.mixture, n_components=12, max_iter=5, tol=0.0))
METHODS = {
    "em": FitSettings(heldout_fraction=0.3),
    "stepwise": FitSettings(method="stepwise", mini_batch_frames=300, heldout_fraction=0.3),
}


def fitted(device: str, settings: FitSettings) -> tuple[GaussianMixture, list[FitReport]]:
    peers = Processes(rank=0, world_size=1, device=torch.device(device))
    reports: list[FitReport] = []
    mixture = fit_mixture(
        SyntheticCorpus(12, 2.0),
        RECIPE,
        RejectLog(None),
        peers,
        settings,
        on_report=reports.append,
    )
    return mixture, reports


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_on_cuda_is_that_on_the_cpu(method):
    (mixture, reports), (other, expected) = (
        fitted(device, METHODS[method]) for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(mixture.means_, other.means_, rtol=1e-3, atol=1e-2)
    heldout = [[r.heldout_log_likelihood for r in made] for made in (reports, expected)]
    np.testing.assert_allclose(*heldout, rtol=1e-3)
