"""The study runner: settings, keys, tables and that finished runs are not run again."""

from __future__ import annotations

import argparse
from functools import partial

import pytest

from bench import study
from gmm_jepa.compare import job
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.probe import LinearProbe
from gmm_jepa.presets import preset
from gmm_jepa.train.metrics import read_metrics
from tests.audio import write_corpus


@pytest.mark.parametrize("factor", study.FACTORS)
def test_every_factor_is_a_recipe_that_differs_from_the_base(factor):
    recipe = study.recipe_of(factor, "cpu", 100)
    assert recipe.train.steps == 100
    base = study.recipe_of("base", "cpu", 100)
    assert (recipe == base) == (factor == "base")


def test_a_system_is_a_factor():
    recipe = study.recipe_of("pure-jepa", "cpu", None)
    assert recipe.system == "pure-jepa"
    assert study.recipe_of("wavlm-style", "cpu", None).objective.cluster_head == "linear"
    aligned = study.recipe_of("wavlm-style-aligned", "cpu", None)
    assert (aligned.system, aligned.objective.align_targets) == ("wavlm-style", True)


def test_mistakes_name_what_is_wrong():
    with pytest.raises(InputError, match="got 'nonsense'"):
        study.recipe_of("nonsense", "cpu", None)
    with pytest.raises(InputError, match=r"nothing: no such setting"):
        study.override(preset("cpu"), {"objective.nothing": 1})
    with pytest.raises(InputError, match="expected NAME=TRAIN"):
        study.sources_of("speech.jsonl")


def test_settings_that_hold_only_together_are_set_together():
    settings = {"system": "wavlm-style", "train.steps": 7}
    settings |= {"objective.labels": "kmeans", "objective.targets": "hard"}
    recipe = study.override(preset("cpu"), settings)
    assert (recipe.objective.labels, recipe.objective.targets) == ("kmeans", "hard")
    assert recipe.train.steps == 7


def line(factor, seed, accuracy):
    features = {"trained, all layers": accuracy, "log-mel": 0.5, "majority": 0.1}
    return {
        "corpus": "demo", "factor": factor, "seed": seed, "probes": {"phones": features},
        "usage_entropy": None, "target_entropy": 0.06, "effective_rank": 70.0,
        "mean_cosine": 0.1, "wall_s": 100.0,
    }  # fmt: skip


def test_differences_are_taken_over_the_seeds_of_both():
    lines = [line("base", 0, 0.6), line("base", 1, 0.5), line("hard", 1, 0.54)]
    rows = study.table([*lines, {**line("base", 2, 0.0), "corpus": "other"}], "demo").splitlines()
    assert rows[0].startswith("| factor | seeds | phones % | ± base | usage entropy |")
    assert rows[2].startswith("| base | 2 | 55.0 | +0.0 | – | 0.060 | 70.0 | 0.100 |")
    assert rows[3].startswith("| hard | 1 | 54.0 | +4.0 |")
    assert rows[4].startswith("| log-mel |  | 50.0 |")
    assert len({row.count("|") for row in rows}) == 1


def test_what_has_its_line_is_not_run_again(tmp_path, monkeypatch, capsys):
    manifest = write_corpus(tmp_path / "audio", 16, seconds=(0.6, 1.0))
    options = argparse.Namespace(
        corpus=[f"babble={manifest}"], out=tmp_path / "out", factors=["base", "jepa-0"],
        seeds=[0], preset="smoke", steps=2, jobs=1,
    )  # fmt: skip
    started: list[str] = []

    def run_here(planned, *, jobs, on_done) -> None:
        for p in planned:
            started.append(p.name)
            assert job.finish(p.folder)
            on_done(p)

    monkeypatch.setattr(study, "run_all", run_here)
    monkeypatch.setattr("gmm_jepa.evaluate.evaluation.LinearProbe", partial(LinearProbe, steps=20))
    monkeypatch.setattr(
        "gmm_jepa.pipeline.write_report", lambda root, evaluation, _: evaluation.save(root)
    )
    study.study(options, tmp_path)
    assert started == ["base", "jepa-0"]
    lines = read_metrics(tmp_path / "study.jsonl")
    assert [line["factor"] for line in lines] == started
    assert all(line["steps"] == 2 and line["wall_s"] > 0 for line in lines)
    assert "log-mel" in lines[0]["probes"]["text"]
    capsys.readouterr()

    study.study(options, tmp_path)
    assert started == ["base", "jepa-0"]
    assert len(read_metrics(tmp_path / "study.jsonl")) == 2
    assert "| jepa-0 | 1 |" in capsys.readouterr().out
