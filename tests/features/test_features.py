"""The log-mel front end: its description, its counts, arrays and tensors."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec, log_mel, log_mel_frames

SPEC = LogMelSpec()


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        LogMelSpec(sample_rate_hz=8000, n_fft=256, hop_samples=80, n_mels=40, f_max_hz=4000),
        LogMelSpec(n_fft=512, n_mels=64, f_min_hz=60.0, f_max_hz=7600.0),
    ],
    ids=LogMelSpec.describe,
)
def test_filters_and_window_are_torchaudios_bit_for_bit(spec):
    peer = torchaudio.transforms.MelSpectrogram(
        spec.sample_rate_hz,
        spec.n_fft,
        hop_length=spec.hop_samples,
        n_mels=spec.n_mels,
        f_min=spec.f_min_hz,
        f_max=spec.f_max_hz,
    )
    assert torch.equal(spec.filters(), peer.mel_scale.fb)
    assert torch.equal(spec.window(), peer.spectrogram.window)
    waveform = 0.1 * torch.randn(7001)
    torch.testing.assert_close(
        log_mel(waveform, spec=spec), torch.log(peer(waveform) + spec.floor).T, atol=2e-5, rtol=0
    )


def test_an_empty_filter_is_refused_by_its_number():
    with pytest.raises(InputError, match="n_mels: mel filter 0 of 128 holds none of the 129"):
        LogMelSpec(n_fft=256, n_mels=128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_fft": 401}, "n_fft: expected an even number, got 401"),
        ({"n_fft": 0}, "n_fft: expected a whole number above 0, got 0"),
        ({"hop_samples": 320.0}, r"hop_samples: expected a whole number above 0, got 320\.0"),
        ({"n_mels": True}, "n_mels"),
        ({"f_max_hz": 9000.0}, "f_min_hz, f_max_hz: expected 0 <= f_min_hz < f_max_hz <= 8000"),
        ({"f_min_hz": 8000.0}, "f_min_hz, f_max_hz"),
        ({"floor": 0.0}, "floor: expected a finite number above 0"),
        ({"floor": math.nan}, "floor"),
        ({"floor": "small"}, "floor: expected a number, got 'small'"),
    ],
)
def test_nonsense_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        LogMelSpec(**values)


def test_there_and_back():
    spec = LogMelSpec(n_mels=40, floor=1e-5)
    assert LogMelSpec.from_dict(spec.to_dict()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert replace(spec, n_mels=80).filters().shape == (201, 80)
    assert spec != SPEC
    assert len({spec, SPEC, LogMelSpec()}) == 2
    assert spec.describe() == (
        "log-mel 16000 Hz, n_fft 400, hop 320, 40 HTK mels 0-8000 Hz, floor 1e-05"
    )
    with pytest.raises(InputError, match="front end: unknown key 'hop'"):
        LogMelSpec.from_dict({"hop": 320})


def test_one_rule_counts_frames():
    counts = {0: 0, 1: 1, 319: 1, 320: 2, 321: 2, 16_000: 51}
    for n_samples, n_frames in counts.items():
        assert log_mel_frames(n_samples, SPEC) == n_frames
        assert log_mel(torch.zeros(n_samples)).shape == (n_frames, 80)
        assert log_mel(torch.zeros(2, n_samples)).shape == (2, n_frames, 80)
    keys, values = list(counts), list(counts.values())
    assert log_mel_frames(torch.tensor(keys), SPEC).tolist() == values
    assert log_mel_frames(np.array(keys), SPEC).tolist() == values
    assert isinstance(log_mel_frames(5, SPEC), int)


def test_numpy_in_numpy_out():
    waveform = (0.1 * np.random.default_rng(0).standard_normal((2, 1000))).astype(np.float32)
    expected = log_mel(torch.from_numpy(waveform), torch.tensor([1000, 640])).numpy()
    for given in (waveform, waveform.astype(np.float64), waveform[:, ::-1][:, ::-1]):
        got = log_mel(given, np.array([1000, 640]))
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)
    waveform.flags.writeable = False
    np.testing.assert_allclose(log_mel(waveform)[1], log_mel(waveform[1]), atol=1e-5)


@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_either_byte_order(dtype):
    waveforms = np.random.default_rng(0).integers(-30, 30, (2, 5000)).astype(f"<{dtype}")
    lengths = np.array([5000, 4000])
    swapped = log_mel(waveforms.astype(f">{dtype}"), lengths.astype(">i8"))
    np.testing.assert_array_equal(swapped, log_mel(waveforms, lengths))


@pytest.mark.parametrize("shift", [0, 1, 191, 320, 999, 1000, 5000])
def test_shift_drops_leading_samples(shift):
    waveform, lengths = 0.1 * torch.randn(2, 1000), torch.tensor([1000, 500])
    got = log_mel(waveform, lengths, shift_samples=shift)
    expected = log_mel(waveform[:, shift:], (lengths - shift).clamp_min(0))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    alone = log_mel(waveform[0], shift_samples=shift)
    torch.testing.assert_close(alone, expected[0], atol=1e-5, rtol=0)


def test_a_shifted_frame_is_centred_where_it_says():
    """A click shows in the frame whose centre is nearest."""
    click = torch.zeros(8000)
    click[320 * 7 + 191] = 1.0
    energy = log_mel(click, shift_samples=191).sum(1)
    assert int(energy.argmax()) == 7
    assert energy[7] > energy[6]
    assert energy[6] == pytest.approx(float(energy[8]), rel=1e-5)


def test_gradient_reaches_the_waveform():
    waveform = (0.1 * torch.randn(1000)).requires_grad_()
    log_mel(waveform, shift_samples=10).sum().backward()
    assert (waveform.grad[:10] == 0).all()
    assert (waveform.grad[10:] != 0).any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_first_use_in_inference_mode_leaves_gradients_possible(device):
    waveform = torch.zeros(1000, device=device)
    with torch.inference_mode():
        spec = LogMelSpec(n_mels=41)
        log_mel(waveform, spec=spec)
    leaf = torch.zeros(1000, device=device, requires_grad=True)
    log_mel(leaf, spec=spec).sum().backward()
    assert leaf.grad.shape == (1000,)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_lengths_of_any_integers(dtype):
    waveform, lengths = np.random.default_rng(0).standard_normal((2, 700)), [200, 10]
    found = log_mel(waveform, np.array(lengths, dtype))
    np.testing.assert_array_equal(found, log_mel(waveform, np.array(lengths)))
    with pytest.raises(InputError, match=r"lengths_samples\[1\]: expected 0 to 8, got 9"):
        log_mel(waveform[:, :8], np.array([8, 9], dtype))


def test_user_errors():
    with pytest.raises(InputError, match=r"waveform: expected \(S,\) or \(B, S\)"):
        log_mel(torch.zeros(1, 1, 100))
    with pytest.raises(InputError, match="looks like samples by channels"):
        log_mel(torch.zeros(16_000, 2))
    assert log_mel(torch.zeros(400, 16)).shape == (400, 1, 80)
    with pytest.raises(InputError, match="lengths_samples: only with a batch"):
        log_mel(torch.zeros(100), torch.tensor([100]))
    with pytest.raises(InputError, match=r"lengths_samples\[1\]: expected 0 to 100, got 101"):
        log_mel(torch.zeros(2, 100), torch.tensor([100, 101]))
    with pytest.raises(InputError, match=r"lengths_samples: expected \(2,\) whole numbers"):
        log_mel(torch.zeros(2, 100), torch.tensor([100.0, 50.0]))
    with pytest.raises(InputError, match=r"lengths_samples: expected \(2,\) whole numbers"):
        log_mel(torch.zeros(2, 100), torch.tensor([True, False]))
    with pytest.raises(InputError, match="shift_samples"):
        log_mel(torch.zeros(100), shift_samples=-1)
    with pytest.raises(TypeError, match="waveform: expected a tensor or an array, got list"):
        log_mel([0.0] * 100)
    with pytest.raises(TypeError, match="waveform"):
        log_mel(torch.zeros(100, dtype=torch.int64))


def test_no_graph_break():
    compiled = torch.compile(log_mel, fullgraph=True, backend="aot_eager")
    waveform = 0.1 * torch.randn(2, 1000)
    torch.testing.assert_close(compiled(waveform), log_mel(waveform))


def test_published_front_end(shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden/conformer_plain/io.safetensors")
    got = log_mel(golden["wav"][:, 0]).transpose(1, 2)
    # the stored frames are float32 themselves, and 1.7e-4 off float64 in the quietest bands
    torch.testing.assert_close(got, golden["log_mel"], atol=3e-4, rtol=0)


def test_a_front_end_is_the_same_whatever_torchs_defaults_are():
    plain, dtype = LogMelSpec(n_mels=40), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            other = LogMelSpec(n_mels=40)
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(other.filters(), plain.filters())
    assert torch.equal(other.window(), plain.window())
    assert other.filters().dtype == other.window().dtype == torch.float32
