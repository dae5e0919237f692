"""What is measured: each op, its peers, its check and its least work.

Every case draws its own inputs, so that memory is that of one case at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import floors, mixtures
from bench.shapes import Shape
from gmm_jepa import LogMelSpec, ops
from gmm_jepa.ops.mixture import Quadratic, quadratic, row_chunks

Run = Callable[[], object]
CHECKED_ROWS = 512  # rows compared with the float64 oracle before anything is timed


class Case(NamedTuple):
    """One op at one shape."""

    name: str
    dtype: str
    run: Run
    peers: dict[str, Run]
    check: Callable[[], float]
    """largest error in units of what is allowed, at most 1; against float64 where a mixture or
    log-mel is evaluated, else against plain torch, which is the definition"""
    work: floors.Work
    products: str
    """the unit its products run on; a key of `bench.peaks.Peaks.flops_per_s`"""
    with_gradient: tuple[Tensor, ...] = ()
    """leaves whose gradient is cleared before every run"""


def mixture_of(shape: Shape, device: str) -> ops.Mixture:
    """Of components that overlap, float32."""
    drawn = mixtures.overlapping(shape.components, shape.features, _generator(device))
    return ops.Mixture(*(p.float() for p in drawn))


def frames_of(shape: Shape, mixture: ops.Mixture) -> Tensor:
    """(N, D) float32, drawn from the mixture; some of those that are checked are on borders."""
    draw = _generator(mixture.means.device.type)
    frames = mixtures.frames_of(mixture, shape.frames, draw)
    n = min(CHECKED_ROWS, shape.frames) // 8
    frames[:n] = mixtures.on_borders(mixture, n, draw)
    return frames


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def largest_share(found: Tensor, expected: Tensor) -> float:
    """The largest error, of the largest value; NaN if there is one."""
    found, expected = (t.detach().double().cpu() for t in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def worst(errors: Iterable[float | Tensor]) -> float:
    """The largest of some; NaN if one is, which Python's `max` may pass over."""
    return float(torch.tensor([float(error) for error in errors], dtype=torch.float64).max())


def oracle_log_joint(frames: Tensor, mixture: ops.Mixture) -> Tensor:
    """log p(x, k) (n, K) float64, direct form, on the CPU, a component at a time in memory."""
    log_weights, means, variances = (p.double().cpu() for p in mixture)
    x = frames.double().cpu()
    joint = torch.stack(
        [
            log_weights[k] - 0.5 * ((x - means[k]).square() / variances[k]).sum(1)
            for k in range(len(means))
        ],
        dim=1,
    )
    constant = 0.5 * (2.0 * math.pi * variances).log().sum(1)
    return joint - constant


def oracle_posterior(frames: Tensor, mixture: ops.Mixture) -> Tensor:
    """(n, K) float64."""
    return torch.softmax(oracle_log_joint(frames, mixture), dim=1)


def log_mel(shape: Shape, device: str, out_dtype: torch.dtype = torch.float32) -> Case:
    """Against torchaudio's transform and a logarithm."""
    import torchaudio

    spec, S = LogMelSpec(), shape.samples
    waveform = 0.1 * torch.randn(shape.rows, S, device=device)
    lengths = torch.full((shape.rows,), S, device=device)
    window, filters = spec.window(device), spec.filters(device)
    options = {"hop": spec.hop_samples, "floor": spec.floor}
    peer = {"n_fft": 400, "hop_length": 320, "n_mels": 80}
    transform = torchaudio.transforms.MelSpectrogram(16_000, **peer).to(device)
    wide = torchaudio.transforms.MelSpectrogram(16_000, **peer).double()

    def run():
        return ops.log_mel(waveform, lengths, window, filters, out_dtype=out_dtype, **options)

    def check() -> float:
        expected = torch.log(wide(waveform[-1:].double().cpu()) + spec.floor).mT
        error = (run()[-1:].double().cpu() - expected).abs()
        allowed = 1e-3 if out_dtype == torch.float32 else 0.05
        return float((error / torch.where(expected > math.log(1e-5), allowed, 1e-2)).max())

    on_cuda = device == "cuda"
    work = floors.log_mel(shape.frames, out_bytes=out_dtype.itemsize, folds=2 if on_cuda else 0)
    peers = {"torchaudio": lambda: torch.log(transform(waveform) + spec.floor).mT}
    products = "float16 in three" if on_cuda else "float32"
    return Case("log_mel", f"f32 -> {short_name(out_dtype)}", run, peers, check, work, products)


def chunked_posterior(frames: Tensor, form: Quadratic, dtype: torch.dtype) -> Tensor:
    """Posteriors (N, K) of frames (N, D) in plain torch, chunk by chunk."""
    out = frames.new_empty((len(frames), len(form.bias)), dtype=dtype)
    for rows in row_chunks(*out.shape):
        out[rows] = torch.softmax(form.log_joint(frames[rows]), dim=1)
    return out


def posterior_error(found: Tensor, frames: Tensor, mixture: ops.Mixture) -> float:
    """The largest error of the first rows' posteriors against float64."""
    error = found[:CHECKED_ROWS].double().cpu()
    error -= oracle_posterior(frames[:CHECKED_ROWS], mixture)
    return float(error.abs().max())


def gmm_posterior(shape: Shape, device: str, out_dtype: torch.dtype = torch.float32) -> Case:
    """Against `addmm` and softmax in chunks, and scikit-learn on the CPU."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.gmm_posterior(frames, mixture, out_dtype=out_dtype)

    def check() -> float:
        error = posterior_error(run(), frames, mixture)
        return error / (1e-3 if out_dtype == torch.float32 else 5e-3)

    peers: dict[str, Run] = {"torch": lambda: chunked_posterior(frames, form, out_dtype)}
    if device == "cpu":
        peer, data = scikit_learn(mixture), frames.numpy()
        peers["scikit-learn"] = lambda: peer.predict_proba(data)
    work = floors.gmm_posterior(
        shape.frames, shape.components, shape.features, out_bytes=out_dtype.itemsize
    )
    products = "float16 in three" if device == "cuda" else "bfloat16"  # the CPU may screen in it
    return Case(
        "gmm_posterior", f"f32 -> {short_name(out_dtype)}", run, peers, check, work, products
    )


def gmm_posterior_exact(shape: Shape, device: str) -> Case:
    """As an estimator asks for it, from float64 parameters; against the same in float64 torch."""
    mixture = ops.Mixture(*(p.double() for p in mixture_of(shape, device)))
    frames, form = frames_of(shape, mixture).float(), quadratic(mixture, torch.float64)

    def run():
        return ops.gmm_posterior(frames, mixture, precision="exact")

    def check() -> float:
        return posterior_error(run(), frames, mixture) / 1e-5

    peers = {"torch": lambda: chunked_posterior(frames, form, torch.float32)}
    on_cuda = device == "cuda"  # the direct form; the CPU may screen in bfloat16
    count = floors.gmm_posterior_direct if on_cuda else floors.gmm_posterior
    work = count(shape.frames, shape.components, shape.features)
    products = "float32" if on_cuda else "bfloat16"
    return Case("gmm_posterior exact", "f32", run, peers, check, work, products)


def gmm_log_likelihood(shape: Shape, device: str) -> Case:
    """Against `addmm` and logsumexp in chunks."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.gmm_log_likelihood(frames, mixture, precision="fast")

    def plain():
        chunks = row_chunks(shape.frames, shape.components)
        return torch.cat([form.log_joint(frames[rows]).logsumexp(1) for rows in chunks])

    def check() -> float:
        expected = oracle_log_joint(frames[:CHECKED_ROWS], mixture).logsumexp(1)
        error = run()[:CHECKED_ROWS].double().cpu() - expected
        return float((error.abs() / (5e-3 + 1e-7 * expected.abs())).max())

    work = floors.gmm_posterior(shape.frames, shape.components, shape.features, out_bytes=0)
    products = "float16 in three" if device == "cuda" else "bfloat16"
    return Case("gmm_log_likelihood", "f32", run, {"torch": plain}, check, work, products)


def gmm_argmax(shape: Shape, device: str) -> Case:
    """Posterior and index of the best component, against `addmm`, softmax and max in chunks."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.gmm_topk(frames, mixture, 1)

    def plain():
        chunks = row_chunks(shape.frames, shape.components)
        return [torch.softmax(form.log_joint(frames[rows]), 1).max(1) for rows in chunks]

    def check() -> float:
        expected = oracle_posterior(frames[:CHECKED_ROWS], mixture)
        best = expected.amax(1, keepdim=True)
        found, index = (t[:CHECKED_ROWS].cpu() for t in run())
        of_index = expected.gather(1, index)  # of equal ones either will do
        return worst((p - best).abs().max() for p in (found, of_index)) / 1e-5

    on_cuda = device == "cuda"  # the direct form
    count = floors.gmm_posterior_direct if on_cuda else floors.gmm_posterior
    work = count(shape.frames, shape.components, shape.features, out_bytes=0)
    products = "float32" if on_cuda else "bfloat16"
    return Case("gmm_argmax", "f32", run, {"torch": plain}, check, work, products)


def scikit_learn(mixture: ops.Mixture):
    """scikit-learn's estimator holding this mixture, in float32."""
    from sklearn.mixture import GaussianMixture

    log_weights, means, variances = (p.cpu().numpy() for p in mixture)
    model = GaussianMixture(len(means), covariance_type="diag", reg_covar=1e-6)
    model.weights_, model.means_ = np.exp(log_weights), means
    model.covariances_, model.precisions_cholesky_ = variances, variances**-0.5
    return model


def em_statistics(shape: Shape, device: str) -> Case:
    """One E-step and its sums, against the same in plain float32 torch, and scikit-learn's EM."""
    mixture = mixture_of(shape, device)
    frames, form = frames_of(shape, mixture), quadratic(mixture, torch.float32)

    def run():
        return ops.em_statistics(frames, mixture)

    def plain():
        counts = frames.new_zeros(shape.components)
        moments = frames.new_zeros(shape.components, 2 * shape.features)
        for rows in row_chunks(shape.frames, shape.components):
            features = form.features(frames[rows])
            share = torch.softmax(torch.addmm(form.bias, features, form.weight), dim=1)
            counts += share.sum(0)
            moments.addmm_(share.T, features)
        return counts, moments

    def check() -> float:
        some = frames[:CHECKED_ROWS]
        joint, x = oracle_log_joint(some, mixture), some.double().cpu()
        r = torch.softmax(joint, dim=1)
        expected = (r.sum(0), r.T @ x, r.T @ x.square(), joint.logsumexp(1).sum())
        pairs = zip(ops.em_statistics(some, mixture), expected, strict=True)
        return worst(largest_share(found, e) for found, e in pairs) / 1e-6

    peers: dict[str, Run] = {"torch": plain}
    if device == "cpu":
        peer, data = scikit_learn(mixture), frames.numpy()
        peers["scikit-learn"] = lambda: peer._m_step(data, peer._e_step(data)[1])
    work = floors.em_iteration(shape.frames, shape.components, shape.features, candidates=10)
    return Case("em_statistics", "f32 -> f64", run, peers, check, work, "bfloat16")


def ema_update(shape: Shape, device: str) -> Case:
    """Sixteen weights of C by 4 C, against one `lerp_` a tensor."""
    size = (shape.channels, 4 * shape.channels)
    student = [torch.randn(size, device=device) for _ in range(16)]
    ours, theirs = ([torch.zeros_like(t) for t in student] for _ in range(2))

    def plain() -> None:
        for teacher, online in zip(theirs, student):
            teacher.lerp_(online, 1.0 - 0.996)

    def check() -> float:
        teacher = [torch.ones_like(t) for t in student]
        ops.ema_update(teacher, student, 0.996)
        expected = (0.996 + 0.004 * online.double() for online in student)
        return max(float((t.double() - e).abs().max()) for t, e in zip(teacher, expected)) / 1e-6

    n = 16 * size[0] * size[1]
    run = lambda: ops.ema_update(ours, student, 0.996)  # noqa: E731
    return Case("ema_update", "f32", run, {"torch": plain}, check, floors.ema_update(n), "float32")


def short_name(dtype: torch.dtype) -> str:
    """As the table has it."""
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
