"""The CPU operators beside scikit-learn, chunked torch and torchaudio, in one run.

    python -m bench.native --threads 2

One EM iteration (sufficient statistics and new parameters, of a mixture that was not seen before),
posteriors of everything, of a batch and of one utterance, and log-mel frames, on log-mel of
speech, ``--corpus``, or where there is none on frames drawn from a mixture: it prints which. The
mixture is the one after ten iterations from frames of the data.
Correctness first; sides in turn, each settled (`bench.records.settle`) before it is timed; median,
p20 and p80 of `--repeats`, for few frames of means of several calls. Chunked torch is
`bench.peers.chunked_torch`, float32; "reference" is the operator's own exact torch form, which
screens as well. ``sgemm_share`` is the arithmetic of the dense problem over measured sgemm, so that
above one means faster than any dense float32 method could be. Denormals are flushed to zero on all
sides, which doubles the speed of chunked torch. Prints JSON lines and appends them to
``bench/results/native.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
import torchaudio
from sklearn.mixture import GaussianMixture as Peer
from threadpoolctl import threadpool_limits

from bench.em_vs_sklearn import add_frames, frames_of, rates, seconds
from bench.peers.chunked_torch import ChunkedMixture
from bench.records import (
    REST_BESIDE_OTHER_POOLS_S,
    RESULTS,
    append,
    settle,
    surroundings,
)
from gmm_jepa import ops
from gmm_jepa.features import LogMelSpec
from gmm_jepa.gmm.em import maximisation
from gmm_jepa.ops import EMStatistics, Mixture, em, native, posterior
from gmm_jepa.ops.log_mel import log_mel_reference

FLOOR = 0.1
ITERATIONS = 10
UTTERANCE = 500  # frames: ten seconds
BATCH = 8_000  # frames, whose posteriors of 1,024 components the allocator keeps: 32 MB
LEAST_FRAMES = 5_000  # timed together


def fitted(frames: torch.Tensor, K: int) -> Mixture:
    """The mixture after ten iterations from frames of the data."""
    rows = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))[:K]
    variances = frames.double().var(0).expand(K, -1).contiguous()
    weights = torch.full((K,), 1.0 / K, dtype=torch.float64).log()
    mixture = Mixture(weights, frames[rows].double(), variances)
    for _ in range(ITERATIONS):
        mixture = maximisation(ops.em_statistics(frames, mixture), mixture, FLOOR)
    return mixture


def peer_of(mixture: Mixture, dtype: type) -> Peer:
    """scikit-learn's mixture with the same parameters."""
    peer = Peer(len(mixture.means), covariance_type="diag", reg_covar=FLOOR)
    peer.weights_ = mixture.log_weights.exp().numpy().astype(dtype)
    peer.means_ = mixture.means.numpy().astype(dtype)
    peer.covariances_ = mixture.variances.numpy().astype(dtype)
    peer.precisions_cholesky_ = 1.0 / np.sqrt(peer.covariances_)
    return peer


def em_sides(frames: torch.Tensor, mixture: Mixture) -> dict[str, Callable]:
    """One EM iteration; after a check of the statistics."""
    small = frames[:4000]
    expected = em.em_statistics_reference(small.double(), *mixture)
    for e, got in zip(expected, ops.em_statistics(small, mixture)):
        torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-12 * float(e.abs().max()))

    def peer(dtype: type) -> Callable:
        model, data = peer_of(mixture, dtype), frames.numpy().astype(dtype)
        return lambda: peer_of(mixture, dtype)._m_step(data, model._e_step(data)[1])

    def iteration(statistics: Callable[[], tuple]) -> Callable:
        return lambda: maximisation(EMStatistics(*statistics()), mixture, FLOOR)

    unseen = itertools.count(1)  # the native side keeps mixtures prepared that it has seen

    def native_statistics() -> EMStatistics:
        log_weights = mixture.log_weights + next(unseen) * 1e-12
        return ops.em_statistics(frames, mixture._replace(log_weights=log_weights))

    return {
        "native": iteration(native_statistics),
        "chunked_torch": iteration(lambda: ChunkedMixture(*mixture).statistics(frames)),
        "reference": iteration(lambda: em.em_statistics_reference(frames, *mixture)),
        "sklearn_float64": peer(np.float64),
        "sklearn_float32": peer(np.float32),
    }


def posterior_sides(frames: torch.Tensor, mixture: Mixture) -> dict[str, Callable]:
    """Exact posteriors (n, K) float32; after a check within 1e-5."""
    models = {dtype: peer_of(mixture, dtype) for dtype in (np.float64, np.float32)}
    data = {dtype: frames.numpy().astype(dtype) for dtype in models}
    got = ops.gmm_posterior(frames[:2000], mixture, precision="exact").numpy()
    expected = models[np.float64].predict_proba(data[np.float64][:2000])
    if not np.abs(got - expected).max() < 1e-5:
        raise SystemExit(f"posteriors differ by {np.abs(got - expected).max()}")
    options = (1.0, False, "exact", torch.float32)
    chunked = ChunkedMixture(*mixture)
    return {
        "native": lambda: ops.gmm_posterior(frames, mixture, precision="exact"),
        "chunked_torch": lambda: chunked.posteriors(frames),
        "reference": lambda: posterior.posterior_reference(frames, *mixture, *options),
        "sklearn_float64": lambda: models[np.float64].predict_proba(data[np.float64]),
        "sklearn_float32": lambda: models[np.float32].predict_proba(data[np.float32]),
    }


def log_mel_sides(n_frames: int) -> dict[str, Callable]:
    """Log-mel of 16 rows; after a check against torchaudio."""
    spec = LogMelSpec()
    S = (n_frames // 16 - 1) * spec.hop_samples
    waveform = 0.1 * torch.randn(16, S)
    lengths = torch.full((16,), S)
    arguments = (waveform, lengths, spec.window(), spec.filters())
    peer = torchaudio.transforms.MelSpectrogram(
        spec.sample_rate_hz, n_fft=spec.n_fft, hop_length=spec.hop_samples, n_mels=spec.n_mels
    )
    options = {"hop": spec.hop_samples, "floor": spec.floor}
    expected = (peer(waveform) + spec.floor).log().transpose(1, 2)
    torch.testing.assert_close(ops.log_mel(*arguments, **options), expected, atol=1e-3, rtol=0)
    plain = (*arguments, spec.hop_samples, spec.floor, torch.float32)
    return {
        "native": lambda: ops.log_mel(*arguments, **options),
        "reference": lambda: log_mel_reference(*plain),
        "torchaudio": lambda: (peer(waveform) + spec.floor).log(),
    }


def sgemm_flops(repeats: int) -> float:
    """Multiply-adds count two; median of 1,024^3 products."""
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    return 2.0 * 1024**3 / float(np.median([seconds(lambda: a @ a) for _ in range(3 * repeats)]))


def measure(sides: dict[str, Callable], n_frames: int, repeats: int) -> dict:
    """Rates of all sides, and how many times native is as fast as each."""
    calls = -(-LEAST_FRAMES // n_frames)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            settle(side, REST_BESIDE_OTHER_POOLS_S)
            times[name].append(seconds(side, calls))
    found = rates(times, n_frames)
    best = found["native"]["median"]
    ratios = {name: round(best / r["median"], 1) for name, r in found.items() if name != "native"}
    return {"frames_per_s": found, "times_as_fast_as": ratios}


def main() -> None:
    """Check, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--components", type=int, default=1024, help="K")
    add_frames(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--instruction-set", default="", help="default: the best")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # before threads start, which take it over; see chunked_torch
    native.use_instruction_set(options.instruction_set)
    torch.set_num_threads(options.threads)
    frames, source = frames_of(options)
    frames = torch.from_numpy(frames)
    mixture = fitted(frames, options.components)
    D = frames.shape[1]
    where = surroundings()
    where["versions"] |= {"torchaudio": torchaudio.__version__, "sklearn": sklearn.__version__}
    with threadpool_limits(options.threads):
        peak = sgemm_flops(options.repeats)
        dense = 4.0 * D * options.components  # [x, x^2] @ (2 D, K), for E and once more for M
        n_mel = options.frames // 16 * 16
        for name, flops, n, sides in (
            ("em_iteration", 2.0 * dense, len(frames), em_sides(frames, mixture)),
            ("posterior", dense, len(frames), posterior_sides(frames, mixture)),
            ("posterior", dense, BATCH, posterior_sides(frames[:BATCH], mixture)),
            ("posterior", dense, UTTERANCE, posterior_sides(frames[:UTTERANCE], mixture)),
            ("log_mel", None, n_mel, log_mel_sides(n_mel)),
        ):
            measured = measure(sides, n, options.repeats)
            share = flops and flops * measured["frames_per_s"]["native"]["median"] / peak
            line = {
                "name": name,
                "shape": {"frames": n, "components": options.components, "features": D},
                "source": source,
                "instruction_set": options.instruction_set or native.instruction_sets()[0],
                "sgemm_gflops": round(peak / 1e9),
                "sgemm_share": share and round(share, 2),
                **measured,
                **where,
            }
            show(line)
            append("native", line, options.out)


def show(line: dict) -> None:
    """One op as a few lines of text."""
    share = "" if line["sgemm_share"] is None else f", {line['sgemm_share']:.2f} of dense sgemm"
    what = f"{line['name']} of {line['shape']['frames']} frames"
    print(f"{what} ({line['instruction_set']}, {line['threads']} threads{share})")
    for side, rate in line["frames_per_s"].items():
        ratio = line["times_as_fast_as"].get(side)
        beside = "" if ratio is None else f"   native is {ratio:.1f} times as fast"
        spread = f"{rate['p20'] / 1e3:.0f} to {rate['p80'] / 1e3:.0f}"
        print(f"  {side:16} {rate['median'] / 1e3:8.0f} k frames/s ({spread}){beside}")


if __name__ == "__main__":
    main()
