"""What a training step takes on this machine: a few real steps on synthetic audio, timed.

The step is the trainer's own, with loader, masks, losses, update and teacher; only decoding is
missing, since the audio is made in memory. Beside it stand the times of a line of metrics and of a
checkpoint, and the machine's rate of matrix products, to which the step's operations are compared.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from gmm_jepa import flops
from gmm_jepa.config import Recipe, from_dict, to_dict
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.buckets import QUANTUM_SAMPLES
from gmm_jepa.data.loader import make_loader
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json
from gmm_jepa.gmm import GaussianMixture, KMeans
from gmm_jepa.objectives.build import Labels
from gmm_jepa.objectives.prepare import MaskAndDisturb
from gmm_jepa.train.state import TrainState
from gmm_jepa.train.timing import device_name, matrix_rate, timed
from gmm_jepa.train.trainer import batch_plan, training_step

STEPS, WARM_UP_STEPS, LEAST_STEPS = 12, 2, 3
"""Steps that are timed at most, steps before them, and steps that are timed at least."""
LONGEST_S = 60.0
"""Seconds after which no further step is begun."""
STEP_S = 3.0
"""Rows are left out of the batch until a step takes about so many seconds at `EXPECTED_SHARE`."""
EXPECTED_SHARE = 0.3
"""Of the rate of matrix products, to choose the rows; not a result."""
CHECKPOINT_BYTES = 2e9
"""Larger checkpoints are not written to try how long that takes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured."""

    device: str
    """Name of the processor or GPU."""
    threads: int
    """Of PyTorch on a CPU; 0 on a GPU."""
    torch_version: str
    memory_bytes: float
    """Of the GPU; 0 on a CPU."""
    precision: str
    """fp32 or bf16, as the recipe has it."""
    settings: str
    """What the cost of a step depends on, as JSON, see `cost_settings`."""
    rows: int
    """Rows of a timed step."""
    segment_s: float
    """Audio seconds of a row."""
    flops_per_step: float
    """Operations of a timed step, see `step_flops`."""
    step_s: float
    """Seconds a step, median."""
    step_p20_s: float
    step_p80_s: float
    n_steps: int
    """Steps that were timed."""
    log_s: float
    """Seconds that a line of metrics takes beyond a step."""
    checkpoint_s: float
    """Seconds to write a checkpoint; 0 where it would be too large to try."""
    matrix_flops_per_s: float
    """Rate of matrix products in the recipe's precision."""

    @property
    def share(self) -> float:
        """Of the rate of matrix products that the step reaches."""
        return self.flops_per_step / self.step_s / self.matrix_flops_per_s

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: the file is absent or holds something else.
        """
        if not path.is_file():
            raise InputError(f"calibration: {path}: no such file; make it with plan --calibrate")
        return from_dict(cls, read_json(path), where=f"calibration: {path}")


def cost_settings(recipe: Recipe) -> str:
    """The settings that the cost of a step depends on, as JSON."""
    train, objective = recipe.train, recipe.objective
    settings = {
        "encoder": to_dict(recipe.encoder),
        "n_components": recipe.mixture.n_components,
        "labels": objective.labels,
        "predicts": objective.needs_predictor,
        "teaches": objective.needs_teacher,
        "cluster_head": objective.cluster_head if objective.anchored else "none",
        "head_input": objective.head_input,
        "mask_place": objective.mask_place,
        "unmasked": objective.unmasked_weight > 0,
        "precision": train.precision,
        "accumulate": train.accumulate,
        "compile": train.compile,
        "cuda_graphs": train.cuda_graphs,
        "checkpoint_blocks": train.checkpoint_blocks,
    }
    return json.dumps(settings, sort_keys=True)


def labelling_flops(recipe: Recipe, rows: int, segment_s: float) -> float:
    """Operations of the frozen encoder that labels a step's rows, the mean over all steps.

    Of a recipe that relabels it is run in every iteration but the first, and what a calibration
    times is the first.
    """
    n = recipe.objective.iterations
    encoder = flops.encoder_flops(recipe.encoder, round(segment_s * SAMPLE_RATE_HZ))
    return (n - 1) / n * rows * encoder


def step_flops(recipe: Recipe, rows: int, segment_s: float) -> float:
    """Operations of a step of a recipe over so many rows of so many seconds."""
    objective = recipe.objective
    return flops.training_step_flops(
        recipe.encoder,
        round(segment_s * SAMPLE_RATE_HZ),
        n_rows=rows,
        n_clusters=recipe.mixture.n_components,
        cluster_head=objective.cluster_head if objective.anchored else "none",
        predicts=objective.needs_predictor,
        teaches=objective.needs_teacher,
        recomputes_blocks=recipe.train.checkpoint_blocks,
    )


def calibrate(
    recipe: Recipe,
    device: torch.device,
    *,
    segment_s: float | None = None,
    gpus: int = 1,
    longest_s: float = LONGEST_S,
) -> Calibration:
    """Time a few steps of a recipe.

    Args:
        recipe: all settings; its batch is made smaller where a step would take long.
        device: where.
        segment_s: seconds of a row; None: `data.max_segment_s`.
        gpus: the batch is shared by so many; one of the shares is timed.
        longest_s: seconds after which no further step is begun.
    """
    segment_s = segment_s or recipe.data.max_segment_s
    rate = matrix_rate(device, recipe.train.precision)
    most = max(1, int(recipe.data.batch_s / segment_s / gpus + 1e-9))
    affordable = int(STEP_S * EXPECTED_SHARE * rate / step_flops(recipe, 1, segment_s))
    rows = min(most, max(1, affordable))
    sized = _with_batch(recipe, rows, segment_s)
    peers = Processes(rank=0, world_size=1, device=device)
    state = TrainState(sized, synthetic_labels(sized), peers)
    state.model.train()
    corpus = SyntheticCorpus(4 * rows, segment_s)
    times, log_s = _timed_steps(state, sized, corpus, peers, longest_s)
    low, middle, high = np.quantile(times, [0.2, 0.5, 0.8])
    on_cuda = device.type == "cuda"
    return Calibration(
        device=device_name(device),
        threads=0 if on_cuda else torch.get_num_threads(),
        torch_version=torch.__version__,
        memory_bytes=float(torch.cuda.get_device_properties(device).total_memory if on_cuda else 0),
        precision=recipe.train.precision,
        settings=cost_settings(recipe),
        rows=rows,
        segment_s=segment_s,
        flops_per_step=step_flops(sized, rows, segment_s),
        step_s=float(middle),
        step_p20_s=float(low),
        step_p80_s=float(high),
        n_steps=len(times),
        log_s=log_s,
        checkpoint_s=_checkpoint_s(state, device),
        matrix_flops_per_s=rate,
    )


class SyntheticCorpus(Corpus):
    """Utterances of equal length in memory: modulated noise, so that no frame is like the next.

    Args:
        n_utterances: how many.
        seconds: of each.
    """

    def __init__(self, n_utterances: int, seconds: float) -> None:
        rng = np.random.default_rng(0)
        n_samples = round(seconds * SAMPLE_RATE_HZ)
        self.durations_samples = np.full(n_utterances, n_samples, np.int64)
        level = np.repeat(rng.uniform(0, 0.2, (n_utterances, n_samples // 800 + 1)), 800, axis=1)
        noise = rng.standard_normal((n_utterances, n_samples), np.float32)
        self._samples = (noise * level[:, :n_samples]).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Never compared."""
        return "synthetic"

    def entry(self, i: int) -> dict:
        """Its number."""
        return {"id": i}

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """Nowhere."""
        return f"synthetic utterance {i}", None, None

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        return self._samples[i, start : start + n]


def synthetic_labels(recipe: Recipe) -> Labels:
    """Labels of a recipe's kind and size, fitted on nothing."""
    objective, front_end = recipe.objective, recipe.front_end
    if not objective.anchored:
        return Labels()
    rng = np.random.default_rng(0)
    K, D = recipe.mixture.n_components, front_end.n_mels
    means = rng.normal(-5.0, 3.0, (K, D))
    if objective.labels == "kmeans":
        kmeans = KMeans(n_clusters=K)
        kmeans.set_centers(means, np.zeros(K))
        return Labels((kmeans,))
    variances = rng.uniform(0.5, 2.0, (K, D))
    mixture = GaussianMixture.from_parameters(np.full(K, 1.0 / K), means, variances)
    return Labels((mixture,) * max(1, len(objective.ensemble)))


def _with_batch(recipe: Recipe, rows: int, segment_s: float) -> Recipe:
    padded = -(-round(segment_s * SAMPLE_RATE_HZ) // QUANTUM_SAMPLES) * QUANTUM_SAMPLES
    data = dataclasses.replace(
        recipe.data,
        max_segment_s=segment_s,
        min_segment_s=segment_s / 4,
        batch_s=rows * padded / SAMPLE_RATE_HZ,
    )
    return dataclasses.replace(recipe, data=data)


def _timed_steps(
    state: TrainState, recipe: Recipe, corpus: Corpus, peers: Processes, longest_s: float
) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up, and of a line of metrics."""
    device = peers.device
    batches = make_loader(
        corpus,
        batch_plan(corpus, recipe),
        stop_step=1 << 30,
        workers=recipe.data.workers,
        pin_memory=device.type == "cuda",
        prepare=MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=recipe.seed),
    )

    def step() -> None:
        training_step(state, next(batches), recipe, peers)

    begin, times = perf_counter(), []
    try:
        for _ in range(WARM_UP_STEPS):
            step()
        state.meters.read()
        while len(times) < STEPS and (
            len(times) < LEAST_STEPS or perf_counter() - begin < longest_s
        ):
            times.append(timed(step, device))
        step()  # a line of metrics starts with the figures of a step
        log_s = timed(state.meters.read, device)
    finally:
        batches.close()
    return times, log_s


def _checkpoint_s(state: TrainState, device: torch.device) -> float:
    n_bytes = sum(4 * p.numel() for p in state.model.parameters())
    n_bytes += sum(8 * p.numel() for p in state.parameters)
    if n_bytes > CHECKPOINT_BYTES:
        return 0.0
    with tempfile.TemporaryDirectory(prefix="gmm-jepa-") as folder:
        return timed(lambda: state.save(Path(folder), keep=1), device)
