"""One EM iteration and `predict_proba`, side by side with scikit-learn on log-mel frames.

    python -m bench.em_vs_sklearn --components 256 --frames 20000 --threads 2

Correctness first: both fit from the same start, and the parameters must agree within 1e-3.
An iteration's time is the difference between fits of six and of one iteration, over five, so
that neither side's start-up counts. Both sides alternate; medians, p20 and p80 of `--repeats`.
Frames are log-mel of the audio that ``--corpus`` names, or of ``../shared/speech/arctic.jsonl``
where that lies beside the repository, otherwise drawn from a mixture. Prints which, and one JSON
line, which is appended to ``bench/results/em_vs_sklearn.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.mixture import GaussianMixture as Peer

from bench.records import REPOSITORY, RESULTS, append, surroundings
from gmm_jepa import GaussianMixture, log_mel
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.errors import InputError

FLOOR = 1e-9  # below every variance here, so that it never acts; scikit-learn's reg_covar is 0
ITERATIONS = 5
SPEECH = REPOSITORY.parent / "shared" / "speech" / "arctic.jsonl"


def add_frames(parser: argparse.ArgumentParser) -> None:
    """The options that `frames_of` takes."""
    parser.add_argument("--frames", type=int, default=20_000, help="of speech, or drawn")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=SPEECH if SPEECH.exists() else None,
        help="speech: audio, a manifest or a packed corpus; default: ../shared/speech/arctic.jsonl "
        "beside the repository; where that is absent frames are drawn from a mixture",
    )


def frames_of(options: argparse.Namespace) -> tuple[np.ndarray, str]:
    """(frames, 80) float32, and "speech" or "drawn", which is printed.

    Raises:
        SystemExit: the corpus cannot be opened, or has not so many frames.
    """
    n_frames, corpus = options.frames, options.corpus
    if corpus is None:
        print(f"frames: {n_frames:,}, drawn from a mixture; --corpus takes speech", flush=True)
        return drawn_frames(n_frames), "drawn"
    try:
        frames = speech_frames(n_frames, corpus)
    except InputError as error:
        raise SystemExit(f"--corpus: {error}") from None
    if len(frames) < n_frames:
        raise SystemExit(f"--frames: expected {len(frames)} or less, which {corpus.name} has")
    print(f"frames: {n_frames:,} of speech, {corpus.name}", flush=True)
    return frames, "speech"


def drawn_frames(n_frames: int) -> np.ndarray:
    """(n_frames, 80) float32 around 200 means."""
    random = np.random.default_rng(0)
    means = 3.0 * random.standard_normal((200, 80)) - 4.0
    labels = random.integers(200, size=n_frames)
    return (means[labels] + random.standard_normal((n_frames, 80))).astype("float32")


def speech_frames(n_frames: int, path: Path) -> np.ndarray:
    """(n_frames, 80) float32 of a corpus from its beginning, or fewer where it has no more."""
    corpus = open_corpus(path, rejects=RejectLog())
    frames, total = [], 0
    for i in range(len(corpus)):
        frames.append(log_mel(corpus.read(i, 0, int(corpus.durations_samples[i]))))
        total += len(frames[-1])
        if total >= n_frames:
            break
    return np.concatenate(frames)[:n_frames]


def start_of(frames: np.ndarray, K: int) -> dict[str, np.ndarray]:
    """The common start: frames of the data, its variance, equal weights."""
    rows = np.random.default_rng(0).choice(len(frames), K, replace=False)
    return {
        "weights_init": np.full(K, 1.0 / K),
        "means_init": frames[rows].astype(np.float64),
        "precisions_init": np.tile(1.0 / frames.var(0, dtype=np.float64), (K, 1)),
    }


def fit_both(frames: np.ndarray, K: int, n_iter: int) -> dict[str, Callable]:
    """A function for each side that fits and returns the model."""
    start = start_of(frames, K)
    wide = frames.astype(np.float64)

    def peer(data: np.ndarray) -> Callable:
        options = {"covariance_type": "diag", "reg_covar": 0.0, "tol": 0.0, "max_iter": n_iter}
        narrow = {name: value.astype(data.dtype) for name, value in start.items()}
        return lambda: Peer(K, **options, **narrow).fit(data)

    ours = GaussianMixture(K, tol=0.0, max_iter=n_iter, variance_floor=FLOOR, **start)
    return {
        "ours": lambda: ours.fit(frames),
        "sklearn_float64": peer(wide),
        "sklearn_float32": peer(frames),
    }


def difference(model: GaussianMixture | Peer, reference: Peer) -> float:
    """Largest relative difference of weights, means and variances; (nearly) single frames aside.

    A component on one frame has no variance but the floor, which the two sides set differently.
    """
    several = (reference.covariances_ > 1e-3).all(1)
    scale = np.abs(reference.means_).mean()
    parts = (
        model.weights_ / reference.weights_ - 1.0,
        (model.means_ - reference.means_)[several] / scale,
        (model.covariances_ / reference.covariances_)[several] - 1.0,
    )
    return float(max(np.abs(part).max() for part in parts))


def check(frames: np.ndarray, K: int) -> dict[str, float]:
    """Difference from scikit-learn in float64 after a few iterations; refuses above 1e-3."""
    fits = fit_both(frames, K, ITERATIONS)
    reference = fits["sklearn_float64"]()
    differences = {
        side: difference(fits[side](), reference) for side in ("ours", "sklearn_float32")
    }
    if not differences["ours"] < 1e-3:
        raise SystemExit(f"not equal to scikit-learn: {differences}")
    return differences


def seconds(function: Callable, calls: int = 1) -> float:
    """Wall time of a call, the mean of so many in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def rates(times: dict[str, list[float]], n_frames: int) -> dict[str, dict[str, float]]:
    """Frames per second: median, p20, p80."""
    return {
        side: {
            name: round(n_frames / float(np.percentile(values, percent)))
            for name, percent in (("median", 50), ("p20", 80), ("p80", 20))
        }
        for side, values in times.items()
    }


def measure(frames: np.ndarray, K: int, repeats: int) -> dict:
    """Rates of an EM iteration and of `predict_proba`, sides in turn."""
    short, long = fit_both(frames, K, 1), fit_both(frames, K, 1 + ITERATIONS)
    models = {side: fit() for side, fit in short.items()}
    em: dict[str, list[float]] = {side: [] for side in long}
    proba: dict[str, list[float]] = {side: [] for side in long}
    for _ in range(repeats):
        for side in long:
            em[side].append((seconds(long[side]) - seconds(short[side])) / ITERATIONS)
            data = frames.astype(np.float64) if side == "sklearn_float64" else frames
            proba[side].append(seconds(lambda s=side, x=data: models[s].predict_proba(x)))
    return {
        "em_frames_per_s": rates(em, len(frames)),
        "predict_proba_frames_per_s": rates(proba, len(frames)),
    }


def main() -> None:
    """Check, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--components", type=int, default=256, help="K")
    add_frames(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    from threadpoolctl import threadpool_limits

    frames, source = frames_of(arguments)
    with threadpool_limits(arguments.threads):
        differences = check(frames, arguments.components)
        measured = measure(frames, arguments.components, arguments.repeats)
    where = surroundings()
    where["versions"] |= {"sklearn": sklearn.__version__}
    line = {
        "name": "em_vs_sklearn",
        "shape": {"frames": len(frames), "components": arguments.components, "features": 80},
        "source": source,
        "dtype": "float32 in, float64 inside",
        "difference_from_sklearn_float64": differences,
        **measured,
        **where,
    }
    print(json.dumps(line))
    append("em_vs_sklearn", line, arguments.out)


if __name__ == "__main__":
    main()
