"""Samples, tables of frames, and that batching changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gmm_jepa.data.windows import draw_utterances
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate import embed
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerEncoder


class FakeCorpus:
    """Noise of given lengths; reading utterance `broken` fails."""

    def __init__(self, lengths: list[int], *, broken: int = -1) -> None:
        self.durations_samples = np.array(lengths)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.durations_samples)

    def read(self, i: int, start: int, n: int) -> np.ndarray:
        if i == self.broken:
            raise InputError("truncated")
        random = np.random.default_rng(i).normal(size=int(self.durations_samples[i]))
        return random.astype(np.float32)[start : start + n]

    def entry(self, i: int) -> dict[str, Any]:
        return {"id": i}


def utterances(*lengths: int) -> list[embed.Utterance]:
    corpus = FakeCorpus(list(lengths))
    return [
        embed.Utterance(corpus.read(i, 0, n), corpus.entry(i), True) for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def encoder() -> ConformerEncoder:
    torch.manual_seed(0)
    config = ConformerConfig(
        channels=(4, 4, 8, 8), residual_blocks=1, code_dim=16, layers=2, heads=2, daam=False
    )
    return ConformerEncoder(config)


def test_choice_keeps_to_the_budget_and_repeats() -> None:
    durations = np.full(100, 16_000)
    max_samples = 10 * 16_000
    chosen = draw_utterances(durations, max_samples, seed=3)
    assert len(chosen) == 10
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == draw_utterances(durations, max_samples, seed=3).tolist()
    assert chosen.tolist() != draw_utterances(durations, max_samples, seed=4).tolist()


def test_choice_takes_one_even_if_it_is_too_long() -> None:
    found = draw_utterances(np.array([9_000_000]), 10, seed=0)
    assert found.tolist() == [0]


def test_sample_skips_and_counts_what_cannot_be_read() -> None:
    corpus = FakeCorpus([16_000] * 5, broken=2)
    found, unreadable = embed.load_sample(corpus, max_s=60, seed=0, heldout=False)
    assert [u.entry["id"] for u in found] == [0, 1, 3, 4]
    assert unreadable == 1
    assert embed.load_sample(FakeCorpus([]), max_s=60, seed=0, heldout=True) == ([], 0)


def test_of_a_long_utterance_the_beginning_is_taken() -> None:
    found, _ = embed.load_sample(
        FakeCorpus([80_000]), max_s=60, seed=0, heldout=True, longest_s=1.5
    )
    assert len(found[0].waveform) == 24_000


def test_encoding_does_not_depend_on_batches_or_order(encoder: ConformerEncoder) -> None:
    sample = utterances(8_000, 20_011, 5_000, 20_000, 320)
    encoder.train()
    together = embed.encode(encoder, sample, batch_s=3.0)
    assert encoder.training
    alone = [embed.encode(encoder, [utterance]) for utterance in sample]
    assert together.output.offsets[-1] == sum(len(a.output.values) for a in alone)
    for u, single in enumerate(alone):
        torch.testing.assert_close(together.output.rows(u), single.output.values, rtol=0, atol=1e-4)
        torch.testing.assert_close(together.layers.rows(u), single.layers.values, rtol=0, atol=1e-4)
    assert together.layers.values.shape[1] == 3 * 16
    torch.testing.assert_close(together.layer_weights.sum(1), torch.ones(5))


def test_nothing_to_encode(encoder: ConformerEncoder) -> None:
    with pytest.raises(InputError, match="no utterance"):
        embed.encode(encoder, [])


def test_frame_centres(encoder: ConformerEncoder) -> None:
    table = embed.encode(encoder, utterances(16_000)).output
    centres = table.centres_s(0)
    assert centres[0] == pytest.approx(encoder.frame_centre_samples / 16_000)
    assert centres[1] - centres[0] == pytest.approx(0.02)


def test_log_mel_table_is_the_front_end_cut_to_length() -> None:
    spec = LogMelSpec()
    sample = utterances(16_000, 4_800)
    table = embed.log_mel_table(sample, spec, np.array([49, 15]))
    for u, n in enumerate((49, 15)):
        expected = log_mel(torch.from_numpy(sample[u].waveform), spec=spec)[:n]
        torch.testing.assert_close(table.rows(u), expected)
    assert table.centres_s(1)[3] == pytest.approx(3 * 0.02)
    shifted = embed.log_mel_table(sample, spec, np.array([49, 15]), shift_samples=160)
    assert shifted.centres_s(0)[0] == pytest.approx(0.01)


def test_context_repeats_the_ends_of_each_utterance() -> None:
    values = torch.tensor([[1.0], [2.0], [3.0], [7.0]])
    table = embed.FrameTable(values, np.array([0, 3, 3, 4]), 320, 0.0)
    wide = embed.with_context(table, 1).values
    assert wide.tolist() == [[1, 1, 2], [1, 2, 3], [2, 3, 3], [7, 7, 7]]


def test_pooling_means_over_the_frames_of_each_utterance() -> None:
    values = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 5.0]])
    table = embed.FrameTable(values, np.array([0, 2, 2, 3]), 320, 0.0)
    assert table.pooled().tolist() == [[2, 2], [0, 0], [5, 5]]
