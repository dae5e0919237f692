"""The whole evaluation and its report on a toy, with the real mixture, front end and networks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.evaluate import Evaluation, evaluate, summary_rows, write_report
from gmm_jepa.evaluate.tracks import follow
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.objectives.targets import (
    Centroids,
    LayerFrames,
    LogMelFrames,
    SoftMixture,
    Targets,
)
from gmm_jepa.report import theme

SPEC = LogMelSpec(n_mels=20)
TONES_HZ = {"a": 300.0, "b": 1200.0, "c": 4000.0}
METRICS = [
    {
        "step": step,
        "loss": 1.0,
        "jepa": 0.5 / step,
        "kl": 2.0 / step,
        "lambda": 1 - step / 50,
        "agreement": None if step == 10 else 0.5,
        "gradient_norm": float("nan"),
        "audio_s_per_s": 40.0,
    }
    for step in range(5, 50, 5)
]


class Tones:
    """A corpus whose phones are tones in noise: 0.1 s each, four speakers who differ in level."""

    def __init__(self, n: int, speakers: str, *, labels: bool = True) -> None:
        self.speakers, self.labels = speakers, labels
        self.durations_samples = np.array([16_000 + 640 * (i % 5) for i in range(n)])

    def __len__(self) -> int:
        return len(self.durations_samples)

    def _phones(self, i: int) -> list[list[Any]]:
        random = np.random.default_rng([i, ord(self.speakers[0])])
        duration_s = self.durations_samples[i] / 16_000
        starts = np.arange(0, duration_s, 0.1)
        return [
            [float(s), float(min(s + 0.1, duration_s)), str(random.choice(list(TONES_HZ)))]
            for s in starts
        ]

    def read(self, i: int, start: int, n: int) -> np.ndarray:
        random = np.random.default_rng(i)
        wave = 0.01 * random.normal(size=int(self.durations_samples[i]))
        times = np.arange(len(wave)) / 16_000
        for begin, end, phone in self._phones(i):
            inside = (times >= begin) & (times < end)
            wave[inside] += 0.3 * np.sin(2 * np.pi * TONES_HZ[phone] * times[inside])
        return wave.astype(np.float32)[start : start + n]

    def entry(self, i: int) -> dict[str, Any]:
        if not self.labels:
            return {"id": i}
        speaker = self.speakers[i % len(self.speakers)]
        return {"id": i, "text": f"<b>{i}</b>", "speaker": speaker, "phones": self._phones(i)}


def networks(seed: int) -> JepaModel:
    torch.manual_seed(seed)
    config = ConformerConfig(
        channels=(4, 4, 8, 8),
        residual_blocks=1,
        code_dim=16,
        layers=2,
        heads=2,
        daam=False,
        dropout=0.1,
    )
    return JepaModel(config, n_clusters=6)


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theme, "DPI", 40)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    corpus = Tones(8, "abc")
    frames = torch.cat(
        [log_mel(torch.from_numpy(corpus.read(i, 0, 16_000)), spec=SPEC) for i in range(8)]
    )
    return GaussianMixture(n_components=6, max_iter=10).fit(frames)


def targets_of(mixture: GaussianMixture, temperature: float = 1.0) -> Targets:
    return Targets(LogMelFrames(SPEC), SoftMixture([mixture.mixture()], temperature=temperature))


@pytest.fixture(scope="module")
def evaluation(mixture: GaussianMixture) -> Evaluation:
    stages: list[str] = []
    result = evaluate(
        networks(0),
        networks(1),
        targets_of(mixture),
        SPEC,
        Tones(12, "abc"),
        Tones(8, "xy"),
        mixture=mixture,
        max_train_s=60,
        max_test_s=60,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert {"encoding", "encoding, untrained", "probing log-mel"} <= set(stages)
    return result


def test_every_number_is_there_and_is_json(evaluation: Evaluation) -> None:
    numbers = evaluation.numbers
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["sample"]["heldout_utterances"] == 8
    assert numbers["sample"]["train_s"] == pytest.approx(
        Tones(12, "a").durations_samples.sum() / 16e3
    )
    clusters = numbers["clusters"]
    assert clusters["n_clusters"] == 6
    assert evaluation.arrays["usage_head"].sum() == clusters["n_frames"]
    assert 0 <= clusters["head"]["entropy"] <= 1
    assert clusters["mixture"]["used"] >= 3
    assert clusters["kl"] > 0
    assert sum(numbers["layer_weights"]) == pytest.approx(1)
    assert len(numbers["layer_weights"]) == 3
    assert set(numbers["embedding"]) > {"std", "effective_rank", "mean_cosine", "untrained"}
    assert len(numbers["mixture"]["train_curve"]) == numbers["mixture"]["n_iter"]
    assert np.isfinite(numbers["mixture"]["log_likelihood"])


def test_probes_stand_beside_their_controls(evaluation: Evaluation) -> None:
    phones, speaker = evaluation.numbers["probes"]
    assert phones["task"] == "phones"
    assert "2 unseen speakers" in phones["split"]
    assert "none of 8 from the training corpus" in phones["split"]
    assert speaker["task"] == "speaker"
    assert "3 of 5 from the training corpus" in speaker["split"]
    accuracy = {row["features"]: row["accuracy"] for row in phones["rows"]}
    assert list(accuracy) == [
        "trained, all layers",
        "trained, output z",
        "untrained, all layers",
        "untrained, output z",
        "log-mel",
        "log-mel, 3 frames each side",
    ]
    assert accuracy["log-mel"] > 0.8  # tones are easy; only frames at the seams are not
    assert phones["majority"] < 0.5
    assert [row["dimensions"] for row in phones["rows"]] == [48, 16, 48, 16, 20, 140]


def test_the_same_seed_gives_the_same_numbers_and_the_mode_is_put_back(
    mixture: GaussianMixture,
) -> None:
    corpora = Tones(3, "a", labels=False), Tones(9, "a", labels=False)
    model = networks(0).train()
    first, second, other = (
        evaluate(model, None, targets_of(mixture), SPEC, *corpora, max_test_s=4, seed=seed).numbers
        for seed in (0, 0, 1)
    )
    assert model.online.training
    assert model.cluster_head.training
    del first["seconds"], second["seconds"]
    assert first == second
    assert first["clusters"] != other["clusters"]


def test_without_labels_nothing_is_probed(mixture: GaussianMixture, tmp_path: Path) -> None:
    corpora = Tones(3, "a", labels=False), Tones(3, "a", labels=False)
    result = evaluate(networks(0), None, targets_of(mixture), SPEC, *corpora)
    assert result.numbers["probes"] == []
    assert result.numbers["sample"]["train_utterances"] == 0
    assert "untrained" not in result.numbers["embedding"]
    page = write_report(tmp_path, result).read_text(encoding="utf-8")
    assert "<h2>Probes</h2>" not in page
    assert "<h2>Utterances</h2>" in page
    rows = summary_rows(result.numbers)
    assert rows[0] == ["measure", "trained", "untrained"]
    assert {len(row) for row in rows} == {3}


def test_a_model_without_a_head_is_measured_but_for_its_clusters(tmp_path: Path) -> None:
    model = JepaModel(networks(0).config, 0, cluster_head="none")
    result = evaluate(model, None, None, SPEC, Tones(6, "abc"), Tones(4, "xy"))
    assert "clusters" not in result.numbers
    assert "mixture" not in result.numbers
    assert result.numbers["probes"][0]["rows"][0]["features"] == "trained, all layers"
    assert "<h2>Probes</h2>" in write_report(tmp_path, result).read_text(encoding="utf-8")
    assert not any("cluster" in row[0] for row in summary_rows(result.numbers))


def test_clusters_of_any_kind_are_followed() -> None:
    """Hard labels of a layer of the encoder, read by a head on the predictor."""
    model = JepaModel(networks(0).config, 6, cluster_head="linear")
    clusters = Centroids(torch.randn(6, 16))
    targets = Targets(LayerFrames(networks(1).online, 1), clusters)
    corpora = Tones(3, "a", labels=False), Tones(3, "a", labels=False)
    numbers = evaluate(model, None, targets, SPEC, *corpora, head_input="predictor").numbers
    assert numbers["clusters"]["target_entropy"] == 0
    assert numbers["clusters"]["kl"] > 0
    assert numbers["clusters"]["head_entropy"] > 0


def test_nothing_held_out_is_an_error(mixture: GaussianMixture) -> None:
    with pytest.raises(InputError, match="heldout_corpus"):
        evaluate(networks(0), None, targets_of(mixture), SPEC, Tones(3, "a"), Tones(0, "a"))


def test_kl_and_agreement_by_definition(mixture: GaussianMixture) -> None:
    model, z, frames = networks(0), torch.randn(50, 16), 3 * torch.randn(50, 20) - 5
    tracks = follow(model, z, frames, targets_of(mixture, 2.0).clusters, chunk_frames=7)
    model.eval()
    q = model.cluster_head(z).double().log_softmax(-1)
    weights, means, variances = (
        torch.as_tensor(np.asarray(part), dtype=torch.float64)
        for part in (mixture.weights_, mixture.means_, mixture.covariances_)
    )
    x = frames.double()[:, None]
    joint = weights.log() - 0.5 * (
        (2 * torch.pi * variances).log() + (x - means) ** 2 / variances
    ).sum(-1)
    p = (joint / 2).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(tracks.kl, kl.detach().numpy(), rtol=1e-4, atol=1e-4)
    entropy = -(p.exp() * p).sum(-1).numpy()
    np.testing.assert_allclose(tracks.mixture_entropy, entropy, rtol=1e-4, atol=1e-4)
    assert tracks.mixture.tolist() == p.argmax(-1).tolist()
    assert tracks.head.tolist() == q.argmax(-1).tolist()


def test_what_is_saved_can_be_read(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.save(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation.numbers
    with np.load(tmp_path / "plots" / "data.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(evaluation.arrays)
        for name, array in evaluation.arrays.items():
            np.testing.assert_array_equal(arrays[name], array)


def test_report_is_whole_and_needs_nothing_else(evaluation: Evaluation, tmp_path: Path) -> None:
    tmp_path /= "A & B"
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {"seed": 3, "on": True}}))
    rejects = [{"file": "<x>.wav", "line": 4, "reason": "truncated: 3 of 9"}] * 20
    lines = "\n".join(map(json.dumps, rejects)) + '\n{"file": "cut sh'
    (tmp_path / "rejects.jsonl").write_text(lines)
    path = write_report(tmp_path, evaluation, METRICS)
    page = path.read_text(encoding="utf-8")
    for head in ("Probes", "Training", "Mixture and clusters", "Embedding", "Utterances"):
        assert f"<h2>{head}</h2>" in page
    assert "A &amp; B" in page
    assert "&lt;x&gt;.wav, line 4" in page
    assert "20 inputs could not be used: 20 × truncated" in page
    assert "<td>yes</td>" in page
    assert "<b>0</b>" not in page  # transcripts are escaped
    assert "<script" not in page
    assert "$" not in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith(("data:image/png", "#")) for source in sources)
    pictures = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    assert pictures == {
        "losses", "meters", "optimisation", "mixture_fit", "cluster_usage", "transitions",
        "layer_weights", "embedding", "probes", "example_1", "example_2", "example_3",
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.gmm-jepa-part"))


def test_pictures_of_a_richer_report_do_not_stay(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    for name in ("losses", "cluster_usage", "example_1", "example_2", "mine"):
        (tmp_path / "plots" / f"{name}.png").write_text("of before")
    numbers = {**evaluation.numbers, "examples": evaluation.numbers["examples"][:1]}
    arrays = {k: v for k, v in evaluation.arrays.items() if not k.startswith("usage")}
    write_report(tmp_path, Evaluation(numbers, arrays))
    assert {file.stem for file in (tmp_path / "plots").glob("*.png")} == {
        "mixture_fit", "transitions", "layer_weights", "embedding", "probes", "example_1", "mine",
    }  # fmt: skip


def test_broken_numbers_are_shown_as_dashes(evaluation: Evaluation, tmp_path: Path) -> None:
    numbers = json.loads(json.dumps(evaluation.numbers))
    numbers["clusters"]["kl"] = numbers["embedding"]["mean_cosine"] = None
    numbers["mixture"]["log_likelihood"] = numbers["clusters"]["head"]["adjacent_consistency"] = (
        None
    )
    assert "–" in write_report(tmp_path, Evaluation(numbers)).read_text(encoding="utf-8")
    assert ["KL to targets, nats", "–", "", "", ""] in summary_rows(numbers)


def test_summary_is_a_table(evaluation: Evaluation) -> None:
    rows = summary_rows(evaluation.numbers)
    assert {len(row) for row in rows} == {5}
    assert all(isinstance(cell, str) for row in rows for cell in row)
    assert rows[1][0] == "phones accuracy %, all layers"
    assert all(rows[1])
