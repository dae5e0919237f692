"""Every instruction set of the native module against float64 oracles and the torch kernels."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.ops import Mixture, native
from gmm_jepa.ops.log_mel import log_mel_reference

if not native.instruction_sets():
    pytest.skip(f"native module: {native.status()}", allow_module_level=True)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request):
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


def drawn(n, K, D, *, offset=0.0, variance=(0.1, 2.0), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.05
    means = offset + 3.0 * torch.randn(K, D, generator=g, dtype=torch.float64)
    low, high = variance
    v = low + (high - low) * torch.rand(K, D, generator=g, dtype=torch.float64)
    k = torch.randint(K, (n,), generator=g)
    frames = means[k] + v[k].sqrt() * torch.randn(n, D, generator=g, dtype=torch.float64)
    return frames.to(dtype), Mixture((weights / weights.sum()).log(), means, v)


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


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="expected one of"):
        native.use_instruction_set("mmx")


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


def test_operators_called_past_their_functions_check_shapes():
    frames, (log_weights, means, variances) = drawn(5, 4, 8)
    options = (1.0, False, "fast", torch.float32)
    operator = torch.ops.gmm_jepa.gmm_posterior
    for wrong in (
        (frames, log_weights, means, variances[:1]),
        (frames, log_weights[:1], means, variances),
        (frames[:, :3], log_weights, means, variances),
        (frames[None], log_weights, means, variances),
    ):
        with pytest.raises(InputError, match="expected"):
            operator(*wrong, *options)
    spec = LogMelSpec()
    with pytest.raises(InputError, match=r"lengths: expected torch.int64 \(3,\)"):
        torch.ops.gmm_jepa.log_mel(
            torch.zeros(3, 4000),
            torch.tensor([4000]),
            spec.window(),
            spec.filters(),
            320,
            1e-6,
            torch.float32,
        )


def test_log_mel_of_a_negative_energy_is_not_a_number(instruction_set):
    """As the logarithm of the plain torch: filters may have any sign."""
    waveform, filters = 0.1 * torch.randn(1, 4000), torch.randn(201, 9)
    tensors = (waveform, torch.tensor([4000]), torch.hann_window(400), filters)
    got = ops.log_mel(*tensors, hop=160, floor=1e-6)
    expected = log_mel_reference(*tensors, 160, 1e-6, torch.float32)
    assert 0.1 < float(expected.isnan().float().mean()) < 0.9
    assert float((got.isnan() != expected.isnan()).float().mean()) < 0.01  # sums near zero


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
call = lambda n: native._native.dropout(x.data_ptr(), len(x), (0, 0.0), out.data_ptr(), n, "")
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


def _ones(*shapes):
    return [torch.ones(shape) for shape in shapes]


X, HEADS = (1, 40, 32), (1, 2, 9, 16)
UNIT = ((32, 32, 3), (32,), (32, 32, 3), (32,))
ATTENTION = (*[HEADS] * 3, (2, 17), (1, 2, 9))
MODULE = ((32,), (32,), (64, 32), (64,), (32, 1, 5), (32,), (32,), (32,), (32, 32), (32,))
FEED_FORWARD = ((64, 32), (64,), (32, 64), (32,))
SELF_ATTENTION = ((96, 32), (96,), (32, 32), (32,), (2, 79), (2, 16), (2, 16), (2,))
# Shapes that fit, and what follows them.
PAST_FUNCTIONS = {
    "convolution_module": ((X, *MODULE), (None, None, 1e-5, 0.0, False)),
    "convolution_module_backward": (
        (X, X, (1, 40, 64), X, (1, 4), *MODULE),
        (None, None, 0.0, False),
    ),
    "density_attention": ((X, (4, 4), (4, 4)), (None,)),
    "density_attention_backward": ((X, X, (4, 4), (4, 4)), (None,)),
    "depthwise_conv": ((X, (32, 1, 3), (32,)), ()),
    "depthwise_conv_backward": ((X, X, (32, 3)), (True,)),
    "feed_forward": ((X, *FEED_FORWARD), (None, None, None, 1.0, 1e-5, 0.0, True, False)),
    "feed_forward_backward": (
        (X, X, (1, 40, 64), *FEED_FORWARD),
        (None, None, None, 1.0, 1e-5, 0.0, False),
    ),
    "gated_bias_attention": (ATTENTION, (None, None, 0.0)),
    "gated_bias_attention_backward": (
        (HEADS, HEADS, (1, 2, 9), *ATTENTION),
        (None, None, 0.0),
    ),
    "masked_kl": (((9, 5), (9, 8), (9,), (5,), (5, 8), (5, 8)), (1.0, True)),
    "masked_kl_targets": (((9, 5), (9, 5), (9,)), (True,)),
    "masked_mse": (((9, 5), (9, 5), (9,)), (True,)),
    "residual_block": ((X, (2, *UNIT[0]), (2, 32), (2, *UNIT[0]), (2, 32)), (None, [1, 3], False)),
    "residual_block_backward": (
        (X, X, (2, *UNIT[0]), (2, 32), (2, *UNIT[0]), (2, 32)),
        (None, [1, 3], False),
    ),
    "residual_unit": ((X, *UNIT), (None, 1, True, False)),
    "residual_unit_backward": ((X, X, X, *UNIT), (None, 1, False)),
    "self_attention": ((X, *SELF_ATTENTION), (None, None, 0.0, False)),
    "self_attention_backward": (
        (X, X, (1, 40, 96), X, (1, 2, 40), (1, 2, 40), *SELF_ATTENTION),
        (None, None, 0.0, False),
    ),
    "snake": ((X, (32,)), (None,)),
    "snake_backward": ((X, X, (32,)), (None,)),
    "strided_conv": ((X, (32, 32, 8), (32,)), (4, False)),
    "strided_conv_backward": (((1, 10, 32), X, (32, 32, 8)), (4, False)),
}


@pytest.mark.parametrize("name", PAST_FUNCTIONS)
def test_operators_called_past_their_functions_read_within_their_tensors(name):
    """Each tensor but the one that the others are to fit is too short, along each axis in turn."""
    shapes, options = PAST_FUNCTIONS[name]
    operator = getattr(torch.ops.gmm_jepa, name)
    operator(*_ones(*shapes), *options)
    fitted = 0 if not name.endswith("_backward") else 3 if HEADS in shapes else 1
    for i, shape in enumerate(shapes):
        if i == fitted:
            continue
        for axis in range(len(shape)):
            shorter = list(shapes)
            shorter[i] = (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :])
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                operator(*_ones(*shorter), *options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_and_lengths_called_past_their_functions(dtype):
    library = torch.ops.gmm_jepa
    labels = torch.zeros(9, dtype=dtype)
    logits, weights = torch.zeros(9, 5), torch.ones(9)
    if dtype == torch.int32:
        with pytest.raises(InputError, match=r"labels: expected torch.int64 \(9,\)"):
            library.masked_cross_entropy(logits, labels, weights, True)
    with pytest.raises(InputError, match="labels: expected"):
        library.masked_cross_entropy(logits, labels[:8], weights, True)
    x, a, spec = torch.zeros(2, 8, 16), torch.ones(16), LogMelSpec()
    library.snake(x, a, torch.tensor([8, 3], dtype=dtype))
    with pytest.raises(InputError, match="lengths: expected"):
        library.snake(x, a, torch.tensor([8], dtype=dtype))
    rest = (spec.window(), spec.filters(), 320, 1e-6, torch.float32)
    lengths = torch.tensor([1600, 800])
    got = library.log_mel(torch.randn(2, 1600), lengths.to(dtype), *rest)
    assert got[1].any(1).tolist() == [True] * 3 + [False] * 3


def test_an_average_of_lists_that_do_not_match():
    with pytest.raises(InputError, match="others: expected"):
        torch.ops.gmm_jepa.ema_update(_ones((9,)), _ones((8,)), 0.5)
