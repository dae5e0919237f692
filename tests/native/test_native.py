"""Every instruction set of the native module against float64 oracles and the torch kernels."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.ops import Mixture, native
from gmm_jepa.ops.log_mel import log_mel_reference
from tests.mixtures import drawn

if not native.instruction_sets():
    pytest.skip(f"native module: {native.status()}", allow_module_level=True)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request):
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


def constant_columns():
    frames, mixture = drawn(200, 20, 12)
    frames[:, ::3] = -13.8
    mixture.means[:, ::3] = -13.8
    mixture.variances[:, ::3] = 1e-6
    return frames, mixture


def duplicates():
    frames, mixture = drawn(90, 33, 12)
    return frames[:3].repeat(30, 1), mixture


def duplicated_components():
    frames, mixture = drawn(90, 33, 12)
    return frames, Mixture(*(p[torch.arange(33) // 11] for p in mixture))


def tiny_variances():
    return drawn(300, 40, 16, variance=(1e-8, 1e-7), dtype=torch.float64)


def mixed_variances():
    """Some components too sharp for the screen."""
    frames, mixture = drawn(300, 70, 16)
    mixture.variances[::7] = 1e-9
    frames[::5] = mixture.means[0].float()
    return frames, mixture


def overlapping():
    frames, mixture = drawn(300, 500, 2)
    return frames, mixture._replace(means=0.1 * mixture.means)


def far_away():
    frames, mixture = drawn(60, 30, 8)
    return frames * 1e4, mixture


def far_apart():
    """Too far for 16-bit integers: screened in float32."""
    frames, mixture = drawn(300, 90, 40)
    k = torch.cdist(frames.double(), mixture.means).argmin(1)
    off = frames - mixture.means[k]
    mixture = mixture._replace(means=3e3 * mixture.means)
    return (mixture.means[k] + off).float(), mixture


def transposed():
    frames, mixture = drawn(120, 30, 17)
    return frames.T.contiguous().T, mixture


def every_other():
    frames, mixture = drawn(120, 30, 34)
    return frames[::2, ::2], Mixture(
        mixture.log_weights, mixture.means[:, ::2], mixture.variances[:, ::2]
    )


def one_out():
    frames, mixture = drawn(120, 30, 8)
    mixture.log_weights[3] = -math.inf
    return frames, mixture


CASES = {
    "usual": lambda: drawn(2500, 257, 80),
    "zero_frames": lambda: drawn(0, 5, 7),
    "one_frame": lambda: drawn(1, 5, 7),
    "one_component": lambda: drawn(50, 1, 80),
    "one_feature": lambda: drawn(333, 65, 1),
    "many_features": lambda: drawn(90, 70, 300),
    "more_components_than_rows": lambda: drawn(7, 130, 19),
    "offset": lambda: drawn(400, 64, 20, offset=1000.0),
    "float64": lambda: drawn(100, 64, 20, dtype=torch.float64),
    "constant_columns": constant_columns,
    "duplicates": duplicates,
    "duplicated_components": duplicated_components,
    "tiny_variances": tiny_variances,
    "mixed_variances": mixed_variances,
    "overlapping": overlapping,
    "far_away": far_away,
    "far_apart": far_apart,
    "transposed": transposed,
    "every_other": every_other,
    "one_out": one_out,
}


def log_joint(frames, mixture):
    w, m, v = (p.double() for p in mixture)
    square = (frames.double()[:, None] - m).square() / v
    return w - 0.5 * (square + v.log() + math.log(2 * math.pi)).sum(-1)


def assert_statistics(frames, mixture):
    joint, x = log_joint(frames, mixture), frames.double()
    r = torch.softmax(joint, 1)
    expected = (r.sum(0), r.T @ x, r.T @ x.square(), torch.logsumexp(joint, 1).sum())
    for e, got in zip(expected, ops.em_statistics(frames, mixture)):
        size = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-12 * size)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_exact(name, instruction_set):
    assert_statistics(*CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_posteriors_are_exact(name, instruction_set):
    frames, mixture = CASES[name]()
    joint = log_joint(frames, mixture)
    for temperature in (1.0, 5.0):
        expected = torch.softmax(joint / temperature, 1)
        got = ops.gmm_posterior(frames, mixture, temperature=temperature, out_dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    likelihood = ops.gmm_log_likelihood(frames.double(), mixture)
    torch.testing.assert_close(likelihood, torch.logsumexp(joint, 1), rtol=1e-9, atol=1e-9)
    k = min(3, joint.shape[1])
    values, indices = ops.gmm_topk(frames, mixture, k)
    best = torch.softmax(joint, 1).topk(k, 1).values
    torch.testing.assert_close(values.double(), best, rtol=1e-6, atol=1e-9)
    picked = torch.softmax(joint, 1).gather(1, indices)
    torch.testing.assert_close(picked, best, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_posteriors_in_half_types_are_float32_ones_rounded(dtype, temperature, instruction_set):
    frames, mixture = overlapping()
    frames[7, 1] = math.nan
    kwargs = {"temperature": temperature}
    expected = ops.gmm_posterior(frames, mixture, **kwargs).to(dtype)
    got = ops.gmm_posterior(frames, mixture, out_dtype=dtype, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got[7].isnan().all()
    least = torch.finfo(dtype).smallest_normal
    assert ((got > 0) & (got < least)).any() == (dtype == torch.float16), "below the normal range"


def test_a_mixture_changed_in_place_is_prepared_anew(instruction_set):
    """By NumPy, too, whose writes to shared memory torch does not see."""
    frames, mixture = drawn(50, 30, 8)
    mixture = mixture._replace(means=torch.from_numpy(means := mixture.means.numpy().copy()))
    assert_statistics(frames, mixture)
    means += 0.5
    assert_statistics(frames, mixture)
    got = ops.gmm_posterior(frames, mixture, out_dtype=torch.float64)
    expected = torch.softmax(log_joint(frames, mixture), 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_nearest_centroids(name, instruction_set):
    frames, (_, centroids, _) = CASES[name]()
    labels, squared = ops.kmeans_assign(frames, centroids)
    expected = (frames.double()[:, None] - centroids).square().sum(-1)
    torch.testing.assert_close(squared.double(), expected.amin(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        expected.gather(1, labels[:, None])[:, 0], expected.amin(1), rtol=1e-12, atol=0
    )


def test_speech(shared, instruction_set):
    soundfile = pytest.importorskip("soundfile")
    folder = shared / "speech"
    paths = [json.loads(line)["audio_filepath"] for line in (folder / "arctic.jsonl").open()][:8]
    frames = [log_mel(soundfile.read(folder / path, dtype="float32")[0]) for path in paths]
    frames = torch.from_numpy(np.concatenate(frames))
    g = torch.Generator().manual_seed(0)
    means = frames[torch.randperm(len(frames), generator=g)[:200]].double()
    mixture = Mixture(torch.full((200,), -math.log(200.0)).double(), means, means.new_ones(200, 80))
    for _ in range(3):
        assert_statistics(frames, mixture)
        counts, first, second, _ = ops.em_statistics(frames, mixture)
        counts = counts.clamp_min(1e-6)[:, None]
        mean = first / counts
        variances = (second / counts - mean.square()).clamp_min(0.1)
        mixture = Mixture((counts[:, 0] / counts.sum()).log(), mean, variances)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_frame_that_is_not_finite_spoils_its_results(value, instruction_set):
    frames, mixture = drawn(100, 30, 8)
    frames[57, 3] = value
    assert all(bool(field.isnan().all()) for field in ops.em_statistics(frames, mixture))
    posterior = ops.gmm_posterior(frames, mixture, precision="exact")
    assert posterior[57].isnan().all()
    assert not posterior[torch.arange(100) != 57].isnan().any()
    assert torch.isfinite(ops.gmm_log_likelihood(frames, mixture)).sum() == 99


def test_same_bits_for_any_number_of_threads(instruction_set):
    frames, mixture = drawn(5000, 100, 24)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append((*ops.em_statistics(frames, mixture), *ops.gmm_topk(frames, mixture, 1)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("n_fft", [400, 512, 2, 6, 150, 254, 1024])
@pytest.mark.parametrize("kind", ["float32", "int16", "strided"])
def test_log_mel(kind, n_fft, instruction_set):
    wave = 0.1 * torch.randn(4, 8001)
    if kind == "int16":
        wave = (wave * 32768).to(torch.int16)
    if kind == "strided":
        wave = wave.T.contiguous().T
    scaled = wave.double() / (32768.0 if kind == "int16" else 1.0)
    lengths = torch.tensor([8001, 0, 3207, 5])
    window = torch.hann_window(n_fft).clamp_min(0.01)
    filters = torch.rand(n_fft // 2 + 1, 5) * (torch.rand(n_fft // 2 + 1, 5) > 0.5)
    got = ops.log_mel(wave, lengths, window, filters, hop=160, floor=1e-6)
    oracle = log_mel_reference(scaled, lengths, window, filters, 160, 1e-6, torch.float64)
    plain = log_mel_reference(scaled.float(), lengths, window, filters, 160, 1e-6, torch.float32)
    error = (got.double() - oracle).abs().max()
    assert error <= 2.0 * (plain.double() - oracle).abs().max() + 1e-5


def test_log_mel_keeps_nan_to_its_frames(instruction_set):
    spec = LogMelSpec()
    wave = 0.1 * torch.randn(1, 16000)
    wave[0, 8000] = math.nan
    frames = log_mel(wave[0], spec=spec)
    spoilt = frames.isnan().any(1).nonzero()[:, 0].tolist()
    assert spoilt == [25]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "sm_90a", True),
        ((8, 9), "sm_90a", False),
        ((10, 0), "sm_90a", False),
        ((8, 9), "sm_80", True),
        ((7, 5), "sm_80", False),
        ((10, 0), "sm_90a,sm_90", True),  # compiled there
        ((10, 0), "sm_90,sm_120", False),
        ((12, 1), "sm_90,sm_120", True),
    ],
)
def test_which_gpus_run_what_was_built(capability, architectures, runs):
    assert native._runs_on(capability, architectures) == runs


@pytest.mark.parametrize("why", ["", "older driver", "other GPU", "little shared memory"])
def test_em_is_left_to_torch_where_its_kernels_do_not_run(why, monkeypatch):
    found = SimpleNamespace(
        major=8 if why == "other GPU" else 9,
        minor=0,
        shared_memory_per_block_optin=101_376 if why == "little shared memory" else 232_448,
    )
    module = SimpleNamespace(
        cuda_architectures="sm_90a", cuda_device_count=lambda: int(why != "older driver")
    )
    monkeypatch.setattr(native, "_native", module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: found)
    monkeypatch.setattr(native, "runs_em_on", native.runs_em_on.__wrapped__)
    assert native.runs_em_on(0) == (not why)
    assert native.cuda_status().startswith("off" if why else "on")


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="expected one of"):
        native.use_instruction_set("mmx")


@pytest.mark.parametrize("far", [1e7, 1e9])
def test_one_far_centroid_hides_no_difference_of_the_others(far, instruction_set):
    g = torch.Generator().manual_seed(0)
    centroids = torch.randn(20, 5, generator=g, dtype=torch.float64)
    centroids[3] = far
    assert_nearest(torch.randn(500, 5, generator=g, dtype=torch.float64), centroids)


def test_centroids_of_any_scale(instruction_set):
    frames, (_, centroids, _) = drawn(300, 20, 5, dtype=torch.float64)
    for scale in (1e-22, 1e15):
        assert_nearest(scale * frames, scale * centroids)


def assert_nearest(frames, centroids):
    labels, squared = ops.kmeans_assign(frames, centroids)
    expected = (frames[:, None] - centroids).square().sum(-1)
    assert torch.equal(labels, expected.argmin(1))
    torch.testing.assert_close(squared, expected.amin(1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-308])
def test_no_temperature_is_too_low(temperature, instruction_set):
    frames, mixture = drawn(50, 30, 8)
    best = log_joint(frames, mixture).argmax(1)
    posterior = ops.gmm_posterior(frames, mixture, temperature=temperature)
    assert torch.equal(posterior, torch.nn.functional.one_hot(best, 30).float())
    assert torch.equal(ops.gmm_topk(frames, mixture, 2, temperature=temperature)[1][:, 0], best)


def test_log_mel_of_a_negative_energy_is_not_a_number(instruction_set):
    """As the logarithm of the plain torch: filters may have any sign."""
    waveform, filters = 0.1 * torch.randn(1, 4000), torch.randn(201, 9)
    tensors = (waveform, torch.tensor([4000]), torch.hann_window(400), filters)
    got = ops.log_mel(*tensors, hop=160, floor=1e-6)
    expected = log_mel_reference(*tensors, 160, 1e-6, torch.float32)
    assert 0.1 < float(expected.isnan().float().mean()) < 0.9
    assert float((got.isnan() != expected.isnan()).float().mean()) < 0.01  # sums near zero
