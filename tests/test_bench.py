"""The measuring code: every case runs and passes its check, and the checks refuse what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench import cases, encoder_cases, mixtures
from bench.ops import measure, row_of
from bench.peers.chunked_torch import ChunkedMixture
from bench.registry import makers
from bench.shapes import Shape
from bench.train import prove, sized
from gmm_jepa import ops
from gmm_jepa.calibration import SyntheticCorpus
from gmm_jepa.ops import EMStatistics, em
from gmm_jepa.presets import preset

TINY = Shape(rows=2, seconds=1.0, components=1024, channels=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", makers("cpu"))
def test_every_case_passes_its_check(name):
    torch.manual_seed(0)
    assert makers("cpu")[name](TINY).check() <= 1.0


def test_a_case_is_measured():
    case = cases.gmm_log_likelihood(TINY, "cpu")
    measured = measure(case, TINY, "cpu", None, 0.0)
    assert measured["runs"] >= 7
    assert measured["speed_over_peer"]["torch"] > 0
    assert row_of(case, measured).startswith("gmm_log_likelihood")


def test_frames_lie_near_several_components():
    draw = torch.Generator().manual_seed(0)
    mixture = mixtures.overlapping(1024, 80, draw)
    joint = cases.oracle_log_joint(mixtures.frames_of(mixture, 500, draw), mixture)
    near = (joint > joint.amax(1, keepdim=True) - 34).sum(1).double().mean()
    assert 7 < near < 11


def of_posterior(monkeypatch) -> None:
    """From frames that were rounded to bfloat16."""
    right = ops.gmm_posterior
    rounded = lambda frames, *more, **options: right(frames.bfloat16().float(), *more, **options)  # noqa: E731
    monkeypatch.setattr(ops, "gmm_posterior", rounded)


def of_statistics(field: str):
    def spoil(monkeypatch) -> None:
        right = ops.em_statistics

        def wrong(*arguments) -> EMStatistics:
            found = right(*arguments)
            return found._replace(**{field: 1.00001 * getattr(found, field)})

        monkeypatch.setattr(ops, "em_statistics", wrong)

    return spoil


def of_index(monkeypatch) -> None:
    right = ops.gmm_topk

    def wrong(*arguments):
        found, index = right(*arguments)
        return found, torch.zeros_like(index)

    monkeypatch.setattr(ops, "gmm_topk", wrong)


def of_dropout(monkeypatch) -> None:
    monkeypatch.setattr(ops, "dropout", lambda x, p: 100 * torch.nn.functional.dropout(x, p))


def of_attention(change):
    def spoil(monkeypatch) -> None:
        right = ops.gated_bias_attention

        def wrong(*arguments, dropout_p: float):
            return change(right(*arguments, dropout_p=0.0)) if dropout_p else right(*arguments)

        monkeypatch.setattr(ops, "gated_bias_attention", wrong)

    return spoil


@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        (cases.gmm_posterior, of_posterior),
        (cases.gmm_posterior_exact, of_posterior),
        *((cases.em_statistics, of_statistics(field)) for field in EMStatistics._fields),
        (cases.gmm_argmax, of_index),
        (encoder_cases.dropout, of_dropout),
        (encoder_cases.attention_with_dropout, of_attention(lambda y: y)),
        (
            encoder_cases.attention_with_dropout,
            of_attention(lambda y: 7 * torch.nn.functional.dropout(y, 0.1)),
        ),
    ],
)
def test_a_check_refuses_what_is_wrong(make, spoil, monkeypatch):
    torch.manual_seed(0)
    case = make(TINY, "cpu")
    assert case.check() <= 1.0
    spoil(monkeypatch)
    assert not case.check() <= 1.0


def test_chunked_torch_is_right():
    draw = torch.Generator().manual_seed(0)
    mixture = mixtures.overlapping(30, 12, draw)
    frames = mixtures.frames_of(mixture, 300, draw)
    peer = ChunkedMixture(*mixture, chunk_frames=128)
    expected = em.em_statistics_reference(frames.double(), *mixture)
    for found, e in zip(peer.statistics(frames), expected, strict=True):
        torch.testing.assert_close(found.double(), e, rtol=1e-4, atol=1e-3 * float(e.abs().max()))
    exact = ops.gmm_posterior(frames, mixture, precision="exact")
    torch.testing.assert_close(peer.posteriors(frames), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_proof_refuses_another_step(precision, monkeypatch):
    recipe = sized(preset("smoke"), 2, 1.0)
    corpus = SyntheticCorpus(8, 1.0)
    pairs = prove(recipe, corpus, CPU, precision)
    assert all(ours > 0 for ours, _ in pairs)
    monkeypatch.setattr("bench.train.PROOF_TOLERANCE", {precision: 1e-12})
    with pytest.raises(SystemExit, match=f"losses in {precision} differ by"):
        prove(recipe, corpus, CPU, precision)
