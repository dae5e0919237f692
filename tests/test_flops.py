"""Operation counts against figures worked out by hand and against PyTorch's own counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import floors
from gmm_jepa import flops
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.models.transformer import TransformerConfig

SMALL = ConformerConfig(
    channels=(4, 8, 16), strides=(8, 5), residual_blocks=2, code_dim=32, layers=2, heads=4
)


def heads_flops(config, n_frames: int) -> float:
    """Predictor and head of 24 clusters."""
    head = flops.cluster_head_flops(config, n_frames, 24)
    return flops.predictor_flops(config, n_frames) + head


def test_a_log_mel_frame():
    frame = flops.log_mel_frame(400)
    assert frame.transform == pytest.approx(161e3, rel=0.01)
    assert frame.mel == pytest.approx(1e3, rel=0.25)
    assert floors.log_mel(1).bytes == 1600
    assert flops.log_mel_frame(400, folds=2).transform == frame.transform / 2
    assert flops.log_mel_frame(512, folds=0).transform == 2.5 * 512 * 9


def test_a_posterior_row():
    assert floors.gmm_posterior(1).flops == pytest.approx(328e3, rel=0.01)
    assert floors.gmm_posterior(1).bytes == pytest.approx(4.4e3, rel=0.01)
    assert floors.gmm_posterior(1, out_bytes=2).bytes == pytest.approx(2.4e3, rel=0.02)


def test_the_losses_and_an_em_iteration():
    assert floors.masked_kl(1).bytes == pytest.approx(4.4e3, rel=0.01)
    assert floors.em_iteration(1).flops == 2 * floors.gmm_posterior(1).flops
    assert floors.em_iteration(1, candidates=10).flops == pytest.approx(328e3 + 8e3, rel=0.01)
    assert floors.em_iteration(1).bytes == 320
    assert floors.masked_mse(1, 512, in_bytes=4).bytes == 3 * 512 * 4


def test_memory_bound_ops_against_hand_counts():
    # 10 rows of 1,024 in bf16: logits, targets and gradient are 6,144 bytes a row
    assert floors.masked_kl_targets(10) == floors.Work(10 * 6 * 1024, 10 * 3 * 2048)
    assert floors.masked_kl_targets(1, in_bytes=4, with_gradient=False).bytes == 2 * 4096
    # logits and gradient: 4 KB in bf16, 8 KB in float32
    assert floors.masked_cross_entropy(10) == floors.Work(10 * 4 * 1024, 10 * 2 * 2048)
    assert floors.masked_cross_entropy(1, in_bytes=4).bytes == 8192
    assert floors.masked_cross_entropy(1, with_gradient=False).bytes == 2048
    # teacher and student read, teacher written
    assert floors.ema_update(1000) == floors.Work(3000, 12_000)
    assert floors.ema_update(1000, value_bytes=2).bytes == 6000
    # x in and out, then the gradient in and out
    assert floors.dropout(1000) == floors.Work(2000, 16_000)


def test_the_direct_form_and_several_mixtures():
    # 80 features by 1,024 components, four operations each
    assert floors.gmm_posterior_direct(1).flops == 4 * 81_920
    assert floors.gmm_posterior_direct(3).bytes == 3 * (320 + 4096)
    assert floors.gmm_posterior_direct(1, out_bytes=0).bytes == 320
    one, two = floors.masked_kl(5), floors.masked_kl(5, n_mixtures=2)
    assert two == floors.Work(2 * one.flops, one.bytes)


def test_a_floor_is_the_longer_of_two_times():
    work = floors.Work(100.0, 10.0)
    assert work.floor_s(flops_per_s=50.0, bytes_per_s=1.0) == 10.0
    assert work.floor_s(flops_per_s=5.0, bytes_per_s=1.0) == 20.0
    assert work + work == work.scaled(2)


def test_a_training_step_of_the_default_conformer():
    seconds = 15
    per_second = flops.training_step_flops(ConformerConfig(), 16_000 * seconds) / seconds
    assert per_second == pytest.approx(25e9, rel=0.05)
    batch = flops.training_step_flops(ConformerConfig(), 16_000 * seconds, n_rows=32)
    assert batch == pytest.approx(32 * seconds * per_second)


@pytest.mark.parametrize("daam", [False, True])
def test_against_pytorchs_counter(daam):
    config = dataclasses.replace(SMALL, daam=daam)
    model, waveform = JepaModel(config, 24).eval(), torch.randn(2, 8000)
    n_frames = config.n_frames(8000)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            z = model.encode(waveform).output
        assert counter.get_total_flops() == pytest.approx(
            2 * flops.encoder_flops(config, 8000), rel=0.03
        )
        with FlopCounterMode(display=False) as counter:
            model.predict(z, torch.ones(z.shape[:2]))
            model.cluster_head(z)
    assert counter.get_total_flops() == pytest.approx(2 * heads_flops(config, n_frames), rel=0.03)


def test_the_transformer_against_pytorchs_counter():
    """Without the position bias, whose gate the counter sees and the formula leaves out."""
    config = TransformerConfig(
        conv_dim=16, code_dim=32, layers=3, heads=4, ffn_dim=64, relative_bias=False
    )
    model, waveform = JepaModel(config, 24, cluster_head="linear").eval(), torch.randn(2, 8000)
    n_frames = config.n_frames(8000)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            z = model.encode(waveform).output
        assert counter.get_total_flops() == pytest.approx(
            2 * flops.encoder_flops(config, 8000), rel=0.03
        )
        with FlopCounterMode(display=False) as counter:
            model.predict(z, torch.ones(z.shape[:2]))
            model.cluster_head(z)
    heads = flops.predictor_flops(config, n_frames)
    heads += flops.cluster_head_flops(config, n_frames, 24, kind="linear")
    assert counter.get_total_flops() == pytest.approx(2 * heads, rel=0.03)


def test_a_step_has_only_the_networks_of_its_system():
    n = 32_000
    whole = flops.training_step_flops(SMALL, n)
    encoder, n_frames = flops.encoder_flops(SMALL, n), SMALL.n_frames(n)
    assert whole - flops.training_step_flops(SMALL, n, teaches=False) == pytest.approx(encoder)
    alone = flops.training_step_flops(
        SMALL, n, teaches=False, predicts=False, cluster_head="none", recomputes_blocks=True
    )
    assert alone == pytest.approx(3 * encoder + 2 * flops.block_flops(SMALL, n_frames))


def test_backward_is_twice_forward():
    """One tap: the counter takes the backward pass of a depthwise convolution for a full one."""
    config = dataclasses.replace(SMALL, conv_kernel=1)
    model, waveform = JepaModel(config, 24).eval(), torch.randn(2, 8000)
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_attention, FlopCounterMode(display=False) as counter:
        z = model.encode(waveform).output
        loss = model.predict(z, torch.ones(z.shape[:2])).sum() + model.cluster_head(z).sum()
        loss.backward()
    forward = flops.encoder_flops(config, 8000)
    forward += heads_flops(config, config.n_frames(8000))
    assert counter.get_total_flops() == pytest.approx(2 * 3 * forward, rel=0.05)
