"""Recipes by name: a preset sets sizes and budget, a system its objective, a model its encoder.

What the small presets have that differs from the paper's own was measured in runs of minutes on a
CPU (docs/study.md): a learning rate of 2e-3 for all that learn clusters and of 1e-3 for pure JEPA,
the cluster loss on all frames, a linear cluster head, and targets centred on the encoder's frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

from gmm_jepa.config import (
    DataConfig,
    EvaluateConfig,
    MixtureConfig,
    ObjectiveConfig,
    Recipe,
    System,
    TrainConfig,
)
from gmm_jepa.errors import InputError
from gmm_jepa.models import ConformerConfig, EncoderConfig, TransformerConfig

PURE_JEPA_LEARNING_RATE = 1e-3
"""At most: at 2e-3, where the anchored systems learn best, pure JEPA learns less."""


def preset(name: str, *, system: str | None = None, model: str | None = None) -> Recipe:
    """The recipe of a preset, for a system and with an encoder other than its own if wanted.

    Args:
        name: one of `PRESETS`.
        system: one of `SYSTEMS`; None: gmm-anchored.
        model: one of `MODELS`; None: the preset's own encoder.

    Raises:
        InputError: one of the names is unknown.
    """
    recipe = _named("preset", PRESETS, name)()
    if model is not None:
        encoder = _named("model", MODELS, model)()
        recipe = dataclasses.replace(recipe, encoder=encoder)
    if system is not None:
        recipe = _named("system", SYSTEMS, system)(recipe)
    return recipe


def _named(what: str, table: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    if name not in table:
        raise InputError(f"{what}: expected one of {', '.join(table)}, got {name!r}")
    return table[name]


def _paper() -> Recipe:
    """The published settings: conformer of 32 M, K = 1,024, 32 x 15 s, 50,000 steps."""
    return Recipe()


def _cpu() -> Recipe:
    """A small conformer that learns in minutes on two CPU cores."""
    return Recipe(
        data=DataConfig(
            max_segment_s=2.0,
            min_segment_s=0.2,
            batch_s=16.0,
            workers=1,
            heldout_fraction=0.2,
        ),
        mixture=MixtureConfig(n_components=256, max_iter=20, tol=1e-3, max_fit_s=3600.0),
        encoder=_conformer_cpu(),
        objective=ObjectiveConfig(unmasked_weight=1.0, cluster_head="linear", align_targets=True),
        train=TrainConfig(
            steps=1200,
            learning_rate=2e-3,
            warmup_share=0.1,
            learning_rate_schedule="cosine",
            log_every=20,
            checkpoint_every=200,
        ),
    )


def _cpu_long() -> Recipe:
    """The same small conformer, trained four times as long."""
    short = _cpu()
    return dataclasses.replace(short, train=dataclasses.replace(short.train, steps=5000))


def _smoke() -> Recipe:
    """A toy that runs from audio to report in seconds, to try the tools and to test them."""
    short = _cpu()
    return dataclasses.replace(
        short,
        data=dataclasses.replace(short.data, batch_s=4.0, max_segment_s=1.0, workers=0),
        mixture=dataclasses.replace(short.mixture, n_components=16, max_iter=5, max_fit_s=120.0),
        encoder=dataclasses.replace(
            short.encoder, channels=(4, 4, 8, 8), code_dim=32, layers=1, heads=2
        ),
        train=dataclasses.replace(short.train, steps=20, log_every=5, checkpoint_every=10),
        evaluate=EvaluateConfig(max_train_s=60.0, max_test_s=30.0),
    )


def _large() -> Recipe:
    """A transformer of 315 M, sharded over several GPUs; batch, steps and rates as published."""
    paper = _paper()
    train = dataclasses.replace(paper.train, precision="bf16", checkpoint_blocks=True, shard=True)
    return dataclasses.replace(paper, encoder=_transformer_large(), train=train)


PRESETS: dict[str, Callable[[], Recipe]] = {
    "cpu": _cpu,
    "cpu-long": _cpu_long,
    "smoke": _smoke,
    "paper": _paper,
    "large": _large,
}


def _conformer_cpu() -> ConformerConfig:
    return ConformerConfig(
        channels=(8, 16, 32, 64),
        strides=(8, 8, 5),
        residual_blocks=1,
        code_dim=128,
        layers=2,
        heads=4,
        daam=False,
        dropout=0.0,
        unit_rms=True,
    )


def _transformer_cpu() -> TransformerConfig:
    """Of the small conformer's width, with a block more: its blocks are cheaper."""
    return TransformerConfig(
        conv_dim=48, code_dim=128, layers=3, heads=4, ffn_dim=512, dropout=0.0, unit_rms=True
    )


def _transformer_small() -> TransformerConfig:
    """About 30 M parameters."""
    return TransformerConfig(conv_dim=512, code_dim=512, layers=8, heads=8, ffn_dim=2048)


def _transformer_large() -> TransformerConfig:
    """About 315 M parameters."""
    return TransformerConfig(code_dim=1024, layers=24, heads=16, ffn_dim=4096)


MODELS: dict[str, Callable[[], EncoderConfig]] = {
    "conformer-cpu": _conformer_cpu,
    "transformer-cpu": _transformer_cpu,
    "conformer-base": ConformerConfig,
    "transformer-small": _transformer_small,
    "transformer-base": TransformerConfig,
    "transformer-large": _transformer_large,
}


def _with(recipe: Recipe, system: System, **objective: Any) -> Recipe:
    """The recipe as another system."""
    changed = dataclasses.replace(recipe.objective, **objective)
    return dataclasses.replace(recipe, system=system, objective=changed)


def _gmm_anchored(recipe: Recipe) -> Recipe:
    """JEPA and a decaying KL to a mixture's posteriors."""
    return recipe


def _pure_jepa(recipe: Recipe) -> Recipe:
    """JEPA alone."""
    learning_rate = min(recipe.train.learning_rate, PURE_JEPA_LEARNING_RATE)
    recipe = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, learning_rate=learning_rate)
    )
    return _with(recipe, "pure-jepa", anchor_start=0.0, anchor_end=0.0, unmasked_weight=0.0)


def _wavlm_style(recipe: Recipe) -> Recipe:
    """Masked prediction of k-means labels of log-mel frames, with a linear head."""
    return _with(
        recipe,
        "wavlm-style",
        jepa_weight=0.0,
        anchor_schedule="constant",
        labels="kmeans",
        targets="hard",
        cluster_head="linear",
        mask_place="input",
        align_targets=False,
    )


def _hubert_style(recipe: Recipe) -> Recipe:
    """As WavLM-style, twice: the second time on labels of the first encoder's middle layer."""
    objective = dataclasses.replace(
        _wavlm_style(recipe).objective,
        iterations=2,
        relabel_layer=(recipe.encoder.layers + 1) // 2,
    )
    return dataclasses.replace(recipe, system="hubert-style", objective=objective)


def _online_gmm(recipe: Recipe) -> Recipe:
    """Masked prediction of posteriors, first of a log-mel mixture, then of one that follows the
    teacher's features."""
    return _with(
        recipe,
        "online-gmm",
        jepa_weight=0.0,
        anchor_schedule="constant",
        labels="online",
        cluster_head="linear",
        head_input="predictor",
        mask_place="input",
    )


SYSTEMS: dict[str, Callable[[Recipe], Recipe]] = {
    "gmm-anchored": _gmm_anchored,
    "pure-jepa": _pure_jepa,
    "wavlm-style": _wavlm_style,
    "hubert-style": _hubert_style,
    "online-gmm": _online_gmm,
}
assert set(SYSTEMS) == set(get_args(System))
