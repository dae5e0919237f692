import dataclasses
import json
from math import inf, nan
from typing import get_args

import pytest

from gmm_jepa.cli.parse import ModelName, PresetName
from gmm_jepa.config import (
    DataConfig,
    MixtureConfig,
    ObjectiveConfig,
    Recipe,
    Sources,
    TrainConfig,
    from_dict,
    to_dict,
)
from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.presets import MODELS, PRESETS, SYSTEMS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    recipe = PRESETS[name]()
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_the_paper_preset_holds_the_published_settings():
    recipe = PRESETS["paper"]()
    assert recipe.mixture.n_components == 1024
    assert recipe.mixture.variance_floor == 0.1
    assert recipe.data.batch_s == 32 * 15
    assert recipe.train.steps == 50_000
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.betas == (0.8, 0.99)
    assert recipe.train.teacher_decay == 0.996
    assert recipe.objective.anchor_end == 0.01
    assert recipe.objective.unmasked_weight == 0.0
    assert not recipe.encoder.unit_rms


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("model", [None, "transformer-cpu"])
def test_systems_survive_json(system, model):
    recipe = preset("cpu", system=system, model=model)
    assert recipe.system == system
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("system", "objective", "named"),
    [
        ("gmm-anchored", {"anchor_start": 0.0, "anchor_end": 0.0}, "system gmm-anchored"),
        ("gmm-anchored", {"labels": "kmeans", "targets": "hard"}, "system gmm-anchored"),
        ("pure-jepa", {"anchor_start": 1.0, "anchor_end": 1.0}, "system pure-jepa"),
        ("pure-jepa", {"jepa_weight": 0.0}, "nothing is left to learn"),
        ("wavlm-style", {"iterations": 2, "relabel_layer": 1}, "system wavlm-style"),
        ("wavlm-style", {"targets": "soft"}, "targets: expected hard"),
        ("hubert-style", {"relabel_layer": None}, "expected a layer"),
        ("hubert-style", {"relabel_layer": 3}, "relabel_layer: expected 0 to 2, got 3"),
        ("hubert-style", {"iterations": 1, "relabel_layer": None}, "system hubert-style"),
        ("online-gmm", {"labels": "mixture"}, "system online-gmm"),
        ("online-gmm", {"online_seeding": 0.5}, "online_seeding"),
        ("online-gmm", {"online_layer": 9}, "online_layer: expected 0 to 2"),
        ("online-gmm", {"targets": "hard"}, "targets: expected soft"),
        ("gmm-anchored", {"targets": "hard", "ensemble": (1.0, 1.0)}, "ensemble"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(system, objective, named):
    recipe = preset("cpu", system=system)
    with pytest.raises(InputError, match=named):
        dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, **objective))


def test_presets_and_models_are_found_by_name():
    assert preset("cpu", system="pure-jepa").train.learning_rate == 1e-3
    assert preset("paper", system="pure-jepa").train.learning_rate == 1e-5
    assert preset("cpu", model="transformer-base").encoder.layers == 12
    assert set(get_args(ModelName)) == set(MODELS)
    assert set(get_args(PresetName)) == set(PRESETS)
    with pytest.raises(InputError, match="system: expected one of gmm-anchored"):
        preset("cpu", system="bert")


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (ObjectiveConfig, {"anchor_end": 0.0}, "anchor_end"),
        (ObjectiveConfig, {"jepa_weight": -1.0}, "jepa_weight"),
        (ObjectiveConfig, {"ensemble": (1.0, 0.0)}, "ensemble"),
        (ObjectiveConfig, {"online_decay": 1.0}, "online_decay"),
        (ObjectiveConfig, {"mask_share": (0.7, 0.4)}, "mask_share"),
        (ObjectiveConfig, {"mask_span_frames": (10, 12)}, "mask_span_frames"),
        (ObjectiveConfig, {"mix_probability": 0.9, "noise_probability": 0.2}, "mix_probability"),
        (ObjectiveConfig, {"temperature": 0.0}, "temperature"),
        (ObjectiveConfig, {"anchor_start": inf}, "anchor_start"),
        (ObjectiveConfig, {"anchor_end": nan}, "anchor_end"),
        (ObjectiveConfig, {"temperature": inf}, "temperature"),
        (MixtureConfig, {"tol": nan}, "tol"),
        (MixtureConfig, {"tol": -1.0}, "tol"),
        (MixtureConfig, {"variance_floor": inf}, "variance_floor"),
        (DataConfig, {"batch_s": inf}, "batch_s"),
        (DataConfig, {"max_segment_s": inf}, "max_segment_s"),
        (TrainConfig, {"learning_rate": inf}, "learning_rate"),
        (TrainConfig, {"clip_norm": inf}, "clip_norm"),
        (TrainConfig, {"betas": (0.8,)}, "betas"),
        (DataConfig, {"min_segment_s": 20.0}, "min_segment_s"),
        (DataConfig, {"max_bad_fraction": 2.0}, "max_bad_fraction"),
        (DataConfig, {"workers": -1}, "workers"),
        (TrainConfig, {"steps": 0}, "steps"),
        (TrainConfig, {"teacher_decay": 1.5}, "teacher_decay"),
        (Sources, {"audio": ()}, "audio"),
        (Sources, {"audio": ("a", "b"), "weights": (1.0,)}, "weights"),
    ],
)
def test_nonsense_is_refused_by_name(kind, settings, named):
    with pytest.raises(InputError, match=named):
        kind(**settings)


def test_frame_rates_of_targets_and_encoder_must_agree():
    recipe = PRESETS["cpu"]()
    with pytest.raises(InputError, match=r"hop of 160 samples and an encoder with a hop of 320"):
        dataclasses.replace(recipe, front_end=LogMelSpec(hop_samples=160))
    front_end = LogMelSpec(sample_rate_hz=22_050, n_mels=40)
    with pytest.raises(InputError, match="sample_rate_hz: expected 16000"):
        dataclasses.replace(recipe, front_end=front_end)


def test_unknown_keys_are_refused_and_missing_settings_are_as_they_were():
    values = to_dict(PRESETS["cpu"]())
    values["train"]["stepps"] = 3
    with pytest.raises(InputError, match=r"config\.train.*stepps"):
        from_dict(Recipe, values)
    del values["train"]["stepps"], values["train"]["compile"]
    assert from_dict(Recipe, values) == PRESETS["cpu"]()
    with pytest.raises(InputError, match=r"config.*audio"):
        from_dict(Sources, {})


def test_a_value_outside_its_choices_is_refused():
    values = to_dict(PRESETS["cpu"]())
    values["train"]["precision"] = "fp8"
    with pytest.raises(InputError, match="precision"):
        from_dict(Recipe, values)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("objective", "mask_share", ["a", "b"], r"mask_share\[0\]: expected float, got 'a'"),
        ("objective", "mask_share", [0.1, 0.2, 0.3], "mask_share: expected 2 values"),
        ("objective", "mask_span_frames", [10.5, 25], r"mask_span_frames\[0\]: expected int"),
        ("encoder", "channels", [4, "8", 16, 32], r"channels\[1\]: expected int, got '8'"),
        ("train", "betas", 0.9, "betas: expected a list"),
    ],
)
def test_the_values_of_a_list_are_looked_at(part, name, value, said):
    values = to_dict(PRESETS["cpu"]())
    values[part][name] = value
    with pytest.raises(InputError, match=said):
        from_dict(Recipe, values)


def test_every_field_has_its_unit_line():
    """Each field is followed by a docstring line, which is what --help shows."""
    import ast
    import inspect

    import gmm_jepa.config
    import gmm_jepa.objective_config

    modules = (gmm_jepa.config, gmm_jepa.objective_config)
    trees = [ast.parse(inspect.getsource(module)) for module in modules]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) >= 7
    for node in classes:
        for item, following in zip(node.body, [*node.body[1:], None]):
            if isinstance(item, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{node.name}.{item.target.id}"


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["cpu"]().seed = 3
