"""Every system on a tiny model and one batch: what learns, what only follows, what stays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.config import Recipe
from gmm_jepa.distributed import Processes
from gmm_jepa.features import log_mel
from gmm_jepa.gmm import GaussianMixture, KMeans
from gmm_jepa.models import build_encoder
from gmm_jepa.objectives.batch import MaskedBatch
from gmm_jepa.objectives.build import Labels, build_objective, initial_model
from gmm_jepa.objectives.masks import draw_mask, masked_count
from gmm_jepa.objectives.online import OnlineTargets
from gmm_jepa.objectives.schedules import Schedule, schedule_at
from gmm_jepa.objectives.targets import (
    Centroids,
    HardMixture,
    LogMelFrames,
    SoftMixture,
    Targets,
    layer_frames,
)
from gmm_jepa.presets import SYSTEMS, preset
from gmm_jepa.train.state import TrainState
from tests.audio import babble

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
K, STEPS = 5, 30


def recipe_of(system: str, **objective) -> Recipe:
    recipe = preset("smoke", system=system)
    return dataclasses.replace(
        recipe,
        mixture=dataclasses.replace(recipe.mixture, n_components=K),
        objective=dataclasses.replace(recipe.objective, **objective),
        train=dataclasses.replace(recipe.train, steps=STEPS, warmup_share=0.0),
    )


@pytest.fixture(scope="module")
def waveform() -> torch.Tensor:
    return torch.from_numpy(np.stack([babble(16_000, seed) for seed in range(4)]))


@pytest.fixture(scope="module")
def frames(waveform) -> torch.Tensor:
    return log_mel(waveform).flatten(0, 1)


@pytest.fixture(scope="module")
def mixture(frames) -> GaussianMixture:
    return GaussianMixture(n_components=K, max_iter=5, tol=0.0).fit(frames)


@pytest.fixture(scope="module")
def kmeans(frames) -> KMeans:
    return KMeans(n_clusters=K, max_iter=5).fit(frames)


@pytest.fixture(scope="module")
def batch(waveform) -> MaskedBatch:
    """Half the frames masked, the losses on all of them; the last row is shorter."""
    lengths = torch.tensor([16_000, 16_000, 16_000, 9_000])
    n_frames = recipe_of("gmm-anchored").encoder.n_frames
    mask = torch.zeros(4, n_frames(16_000), dtype=torch.bool)
    real = torch.zeros_like(mask)
    rng = np.random.default_rng(0)
    for row, length in enumerate(lengths.tolist()):
        n = n_frames(length)
        n_masked = masked_count(n, rng, share=(0.4, 0.6))
        drawn = draw_mask(n, n_masked, rng, span_frames=(5, 9))
        mask[row, :n], real[row, :n] = torch.from_numpy(drawn), True
    masked, all_real = mask.flatten().nonzero()[:, 0], real.flatten().nonzero()[:, 0]
    return MaskedBatch(
        waveform,
        waveform,
        lengths,
        ~mask,
        masked,
        torch.full((len(masked),), 1 / len(masked)),
        all_real,
        torch.full((len(all_real),), 1 / len(all_real)),
        (real & ~mask).flatten().nonzero()[:, 0],
    )


@pytest.fixture(scope="module")
def labels(mixture, kmeans):
    """The labels of the first iteration of a recipe."""

    def labels_of(recipe: Recipe) -> Labels:
        if not recipe.objective.anchored:
            return Labels()
        return Labels((kmeans if recipe.objective.labels == "kmeans" else mixture,))

    return labels_of


def step(state: TrainState, batch: MaskedBatch, recipe: Recipe):
    """One optimiser step; the losses before it."""
    schedule = schedule_at(recipe, state.step)
    losses = state.forward(batch, schedule)
    losses.total.backward()
    state.update(schedule, 1.0)
    return losses


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_loss_falls_on_one_batch(system, batch, labels):
    recipe = recipe_of(system)
    state = TrainState(recipe, labels(recipe), ALONE)
    state.model.train()
    n_steps = recipe.iterations[0].n_steps
    found = [step(state, batch, recipe) for _ in range(min(n_steps, 8))]  # before any new labels
    for name in ("jepa", "kl", "cross_entropy"):
        if name in found[0].parts:
            assert found[-1].parts[name] < found[0].parts[name], name
    assert set(found[0].parts) == set(state.objective.parts)
    assert ("teacher" in found[0].embeddings) == (state.model.teacher is not None)
    assert (found[0].clusters is None) == (system == "pure-jepa")


@pytest.mark.parametrize("system", ["gmm-anchored", "wavlm-style"])
def test_a_full_batch_needs_no_masks(system, waveform, labels):
    """Masked in the latents or at the input; with one graph for all batches lengths are kept."""
    recipe = recipe_of(system)
    lengths = torch.full((4,), 16_000)
    n_frames = recipe.encoder.n_frames(16_000)
    mask = torch.arange(n_frames).expand(4, -1) % 3 == 0
    places = torch.arange(4 * n_frames)
    rows = [(r, torch.full((len(r),), 1 / len(r))) for r in (places[mask.flatten()], places)]
    batch = MaskedBatch(
        waveform, waveform, lengths, ~mask, *rows[0], *rows[1], places[~mask.flatten()]
    )
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        train = dataclasses.replace(recipe.train, compile=compiled)
        model = initial_model(recipe)
        fitted = labels(recipe)
        objective = build_objective(dataclasses.replace(recipe, train=train), model, fitted)
        assert (objective._lengths(batch) is None) is not compiled
        assert objective._lengths(batch._replace(lengths_samples=lengths - 1)) is not None
        loss = objective(batch, schedule_at(recipe, 0)).total
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_where_the_moments_see_them(batch, labels):
    """The optimiser divides by the scale that it is given, and leaves a step of no number out."""
    recipe = recipe_of("gmm-anchored")
    state = TrainState(recipe, labels(recipe), ALONE)
    schedule = schedule_at(recipe, state.step)
    state.forward(batch, schedule).total.backward()
    gradients = [p.grad.clone() for p in state.parameters]
    norm = torch.cat([g.flatten().double() for g in gradients]).norm()
    found, skipped = state.update(schedule, 0.25 * float(norm))
    torch.testing.assert_close(found.double(), norm, rtol=1e-5, atol=0.0)
    assert not skipped
    for parameter, gradient in zip(state.parameters, gradients):
        moment = state.optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, (1 - recipe.train.betas[0]) * gradient / 4)

    before = [p.detach().clone() for p in state.parameters]
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    _, skipped = state.update(schedule, 1.0)
    assert skipped
    assert all(torch.equal(p, b) for p, b in zip(state.parameters, before))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_trained_parameter_gets_a_gradient_and_no_target_does(system, batch, labels):
    recipe = recipe_of(system)
    model = initial_model(recipe)
    objective = build_objective(recipe, model, labels(recipe))
    objective(batch, schedule_at(recipe, 0)).total.backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    if model.teacher is not None:
        assert not any(p.requires_grad for p in model.teacher.parameters())


@pytest.mark.parametrize("system", ["gmm-anchored", "pure-jepa", "online-gmm"])
def test_the_teacher_moves_by_the_average_alone(system, batch, labels):
    recipe = recipe_of(system)
    state = TrainState(recipe, labels(recipe), ALONE)
    state.model.train()
    step(state, batch, recipe)
    before = [p.clone() for p in state.model.teacher.parameters()]
    step(state, batch, recipe)
    for old, now, online in zip(
        before, state.model.teacher.parameters(), state.model.online.parameters()
    ):
        torch.testing.assert_close(now, 0.996 * old + 0.004 * online, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("system", "settings", "idle"),
    [
        ("gmm-anchored", {"jepa_weight": 0.0, "head_input": "predictor"}, "teacher"),
        ("online-gmm", {"jepa_weight": 0.0, "head_input": "encoder"}, "predictor"),
    ],
)
def test_networks_that_no_term_needs_do_not_run(system, settings, idle, batch, labels):
    recipe = recipe_of(system, **settings)
    model = initial_model(recipe)
    ran = []
    for name in ("online", "teacher", "predictor"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    build_objective(recipe, model, labels(recipe))(batch, schedule_at(recipe, 0))
    assert set(ran) == {"online", "teacher", "predictor"} - {idle}


def test_masking_at_the_input_hides_frames_from_the_encoder(batch, mixture):
    for place, hidden in (("input", True), ("latent", False)):
        recipe = recipe_of("gmm-anchored", mask_place=place)
        model = initial_model(recipe).eval()
        encodings = []
        model.online.register_forward_hook(lambda _m, _a, out, kept=encodings: kept.append(out))
        build_objective(recipe, model, Labels((mixture,)))(batch, schedule_at(recipe, 0))
        masked = encodings[-1].layers[0].flatten(0, 1)[batch.predicted_rows]
        assert bool((masked == model.mask_token).all()) == hidden


@pytest.mark.parametrize("head_input", ["encoder", "predictor"])
@pytest.mark.parametrize("jepa_weight", [0.0, 2.0])
def test_terms_add_up_with_their_weights(batch, mixture, jepa_weight, head_input):
    recipe = recipe_of("gmm-anchored", jepa_weight=jepa_weight, head_input=head_input)
    objective = build_objective(recipe, initial_model(recipe), Labels((mixture,)))
    schedule = schedule_at(recipe, 15)
    found = objective(batch, schedule)
    expected = schedule.anchor_weight * found.parts["kl"]
    expected = expected + jepa_weight * found.parts.get("jepa", torch.zeros(()))
    torch.testing.assert_close(found.total.detach(), expected)
    found.total.backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_hard_labels_are_the_nearest_centroid_and_the_best_component(frames, kmeans, mixture):
    centres = torch.from_numpy(kmeans.cluster_centers_)
    distances = (frames.double()[:, None] - centres).square().sum(-1)
    labels = Centroids(centres.float()).labels(frames)
    assert torch.equal(labels, distances.argmin(1))
    best = torch.from_numpy(np.asarray(mixture.predict_proba(frames))).argmax(1)
    assert torch.equal(HardMixture(mixture.mixture()).labels(frames), best)
    one_hot = HardMixture(mixture.mixture()).log_posterior(frames).exp()
    assert torch.equal(one_hot.argmax(1), best)
    assert torch.equal(one_hot.sum(1), torch.ones(len(frames)))


def test_an_ensemble_is_the_weighted_mean_of_posteriors(frames, mixture):
    other = GaussianMixture(n_components=K, max_iter=1, tol=0.0, means_init=mixture.means_ + 0.5)
    both = [m.mixture() for m in (mixture, other.fit(frames[:150]))]
    found = SoftMixture(both, weights=(3.0, 1.0)).log_posterior(frames).exp()
    one, two = (ops.gmm_posterior(frames, m, precision="exact") for m in both)
    torch.testing.assert_close(found, (0.75 * one + 0.25 * two).float(), rtol=1e-5, atol=1e-6)


def online(mixture, **options) -> OnlineTargets:
    first = Targets(LogMelFrames(preset("smoke").front_end), SoftMixture([mixture.mixture()]))
    settings = {"start": 0.5, "seeding": 0.4, "decay": 0.9, "layer": 1}
    settings |= {"temperature": 1.0, "variance_floor": 0.05} | options
    return OnlineTargets(first, 32, **settings)


def at(step: int, n_steps: int = 10) -> Schedule:
    return Schedule(1.0, 1e-3, 0.99, step, n_steps)


def run_online(targets: OnlineTargets, batch: MaskedBatch, encoder, first: int, stop: int):
    """Frames of every step, on an encoder that changes from step to step."""
    logits = torch.zeros(len(batch.anchored_rows), K)
    heard = []
    for s in range(first, stop):
        with torch.no_grad():
            taught = encoder(batch.clean * (1 + 0.2 * s), batch.lengths_samples)
        rows = torch.cat((batch.predicted_rows, batch.visible_rows))
        heard.append(layer_frames(taught, 1).flatten(0, 1)[rows].double())
        targets.loss(logits, batch, taught, at(s))
        targets.after_step(at(s), ALONE)
    return heard


def test_online_statistics_are_a_forgetting_sum_of_those_of_the_batches(batch, mixture):
    """Seeding sums hard statistics; then S <- decay S + S(batch) under the mixture of that step."""
    torch.manual_seed(0)
    encoder = build_encoder(recipe_of("online-gmm").encoder).eval()
    targets = online(mixture)
    assert targets.steps(10) == (1, 5)
    heard = run_online(targets, batch, encoder, 0, 5)
    start = heard[0][torch.linspace(0, len(heard[0]) - 1, K).round().long()]
    counts, first, centres = torch.zeros(K, dtype=torch.float64), torch.zeros_like(start), start
    for x in heard[1:]:
        share = torch.nn.functional.one_hot(
            (x[:, None] - centres).square().sum(-1).argmin(1), K
        ).double()
        counts, first = counts + share.sum(0), first + share.T @ x
        centres = torch.where(counts[:, None] > 0, first / counts[:, None].clamp(min=1), centres)
    torch.testing.assert_close(targets.counts, counts)
    torch.testing.assert_close(targets.first, first)
    torch.testing.assert_close(targets.means, centres)

    before = [getattr(targets, n).clone() for n in ("counts", "first", "second")]
    mixture_then = targets.mixture
    x = run_online(targets, batch, encoder, 5, 6)[0]
    p = ops.gmm_posterior(x, ops.Mixture(*(t.double() for t in mixture_then)), precision="exact")
    new = (p.sum(0), p.T @ x, p.T @ x.square())
    for name, old, added in zip(("counts", "first", "second"), before, new):
        torch.testing.assert_close(getattr(targets, name), 0.9 * old + added, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.means, targets.first / targets.counts[:, None])
    variances = targets.second / targets.counts[:, None] - targets.means.square()
    torch.testing.assert_close(targets.variances, variances.clamp(min=0.05))


def test_online_targets_chooses_the_layer_of_highest_effective_rank(batch, mixture):
    recipe = recipe_of("online-gmm")
    config = dataclasses.replace(recipe.encoder, layers=3)
    taught = build_encoder(config).eval()(batch.clean, batch.lengths_samples)
    narrow = taught.layers[1].clone()
    narrow[..., 2:] = 0.0
    taught = taught._replace(layers=(taught.layers[0], narrow, narrow, taught.layers[3]))
    targets = online(mixture, layer=None)
    targets.loss(torch.zeros(len(batch.anchored_rows), K), batch, taught, at(0))
    targets.after_step(at(0), ALONE)
    assert targets.layer == 3


def test_online_targets_go_on_from_their_state(batch, mixture):
    torch.manual_seed(0)
    encoder = build_encoder(recipe_of("online-gmm").encoder).eval()
    whole, cut = online(mixture), online(mixture)
    run_online(whole, batch, encoder, 0, 8)
    run_online(cut, batch, encoder, 0, 4)
    state = {name: value.clone() for name, value in cut.state().items()}
    resumed = online(mixture)
    resumed.load_state(state)
    run_online(resumed, batch, encoder, 4, 8)
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    fixed = resumed.fixed(encoder)
    assert fixed.clusters.n_clusters == K
    assert fixed.frames.layer == 1
