"""Steps on a GPU are those on a CPU: other kernels, other ways through the models, the same run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmm_jepa.presets import preset
from tests.train.steps import alone, steps_of

N_STEPS = 2
LOSSES = {
    "gmm-anchored": {"jepa", "kl"},
    "pure-jepa": {"jepa"},
    "wavlm-style": {"cross_entropy"},
}
PARTS = {"online", "teacher", "predictor", "cluster_head"}
TIMED = {"audio_s_per_s", "wait_share"}


def run(device: str, system: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics, and by how much all weights changed, the teacher's too."""
    torch.manual_seed(0)
    peers = alone(torch.device(device))
    step, state = steps_of(preset("smoke", system=system), peers=peers)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    for i in range(N_STEPS):
        step(i)
    after = state.model.state_dict()
    return state.meters.read(), {name: (after[name] - before[name]).cpu() for name in before}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("system", LOSSES)
def test_they_are_those_of_the_cpu(system):
    """Metrics and changes of weights; convolutions may round to TF32 on a GPU.

    AdamW's first steps are as long where a gradient is within rounding of zero, either way: hence a
    fifth.
    """
    (found, moved), (expected, expected_moves) = (run(d, system) for d in ("cuda", "cpu"))
    assert found.keys() == expected.keys() > {"loss", "gradient_norm"} | LOSSES[system]
    for name in expected.keys() - TIMED:
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name
    for part in PARTS & {name.split(".")[0] for name in expected_moves}:
        names = [name for name in expected_moves if name.startswith(f"{part}.")]
        ours, theirs = (
            torch.cat([moves[name].double().flatten() for name in names])
            for moves in (moved, expected_moves)
        )
        assert float(theirs.norm()) > 0, part
        assert float((ours - theirs).norm() / theirs.norm()) < 0.2, part
