from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import soundfile as sf

from gmm_jepa.data import audio as audio_module
from gmm_jepa.data import containers
from gmm_jepa.data.audio import AudioError, probe_audio, read_audio, read_samples
from gmm_jepa.errors import InputError

FORMATS = ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"]


def reason_of(path) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("name", FORMATS)
def test_reads_every_format_and_its_windows(write_audio, name):
    path = write_audio(name, seconds=3.0)
    whole = read_audio(path)
    assert whole.dtype == np.float32
    assert whole.shape == (48_000,)
    assert probe_audio(path).n_samples == 48_000
    for start, n in [(0, 48_000), (0, 1), (47_999, 1), (31_007, 4_801), (48_000, 0), (700, 320)]:
        np.testing.assert_array_equal(read_samples(path, start, n), whole[start : start + n])
    expected, _ = sf.read(path, dtype="float32")
    np.testing.assert_allclose(whole, expected, atol=1e-7)  # MP3: sf.read seeks first


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_001, 22_050, 44_100, 48_000, 96_000])
def test_resamples_any_rate_whole_and_in_windows(write_audio, rate_hz):
    t = np.arange(2 * rate_hz) / rate_hz
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    path = write_audio("tone.wav", rate_hz=rate_hz, signal=tone, subtype="FLOAT")
    whole = read_audio(path)
    assert whole.shape == (32_000,)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    np.testing.assert_allclose(whole[500:-500], expected[500:-500], atol=2e-4)
    for start, n in [(0, 1_000), (9_999, 7_001), (31_500, 500), (31_999, 1)]:
        window = read_samples(path, start, n)
        assert window.shape == (n,)
        np.testing.assert_allclose(window, whole[start : start + n], atol=2e-6)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("frames", [1, 3, 441, 4_801])
def test_probed_length_is_the_decoded_length(write_audio, rate_hz, frames):
    path = write_audio("a.wav", rate_hz=rate_hz, signal=np.full(frames, 0.1))
    if probe_length := round(frames * 16_000 / rate_hz):
        assert len(read_audio(path)) == probe_audio(path).n_samples == probe_length


def test_channels_are_averaged(write_audio):
    left = np.array([0.5, -0.25, 0.125, 0.0])
    path = write_audio("stereo.wav", signal=np.stack([left, -left / 2, left * 0], axis=1))
    np.testing.assert_array_equal(read_audio(path), (left / 6).astype(np.float32))
    six = write_audio("six.flac", rate_hz=44_100, channels=6)
    assert read_audio(six).shape == (8_000,)


def test_seconds_select_a_window(write_audio):
    path = write_audio("a.flac", seconds=1.0)
    whole = read_audio(path)
    np.testing.assert_array_equal(
        read_audio(path, offset_s=0.25, duration_s=0.5), whole[4000:12000]
    )
    np.testing.assert_array_equal(read_audio(path, offset_s=0.75), whole[12000:])
    for past in ({"duration_s": 1.1}, {"offset_s": 1.1}):
        with pytest.raises(AudioError, match="truncated"):
            read_audio(path, **past)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="offset_s"):
            read_audio(path, offset_s=bad)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3"])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_what_lies_before_a_window_is_decoded_in_blocks(write_audio, monkeypatch, name, rate_hz):
    path = write_audio(name, seconds=4.0, rate_hz=rate_hz)
    whole, sizes, decode = read_audio(path), [], audio_module._decode

    def noting(path, file, n_frames):
        sizes.append(n_frames)
        return decode(path, file, n_frames)

    monkeypatch.setattr(audio_module, "_decode", noting)
    monkeypatch.setattr(audio_module, "_BLOCK_FRAMES", 5_000)
    window = read_audio(path, offset_s=3.0, duration_s=0.1)
    np.testing.assert_allclose(window, whole[48_000:49_600], atol=1e-6)
    assert len(sizes) > 4
    assert max(sizes) < 0.35 * rate_hz


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0.35, 0.7, 0.97])
def test_a_cut_file_is_truncated(write_audio, name, kept):
    path = write_audio(name, seconds=4.0)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert reason_of(path).startswith("truncated")


def test_wav_and_ogg_cuts_show_in_the_header_check(write_audio):
    for name in ("a.wav", "a.ogg"):
        path = write_audio(name, seconds=4.0)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(AudioError, match="truncated"):
            probe_audio(path)
    wav = write_audio("b.wav", seconds=1.0)
    wav.write_bytes(wav.read_bytes()[:-2000])
    assert "promises 16000 samples, the file holds 15000" in reason_of(wav)


@pytest.mark.parametrize(("kind", "channels"), [("NIST", 1), ("NIST", 2), ("RF64", 2)])
def test_cuts_of_other_wav_files_show_in_the_header_check(tmp_path, kind, channels):
    path = tmp_path / "a.wav"
    samples = 0.1 * np.ones((16_000, channels))
    sf.write(path, samples, 16_000, format=kind, subtype="PCM_16")
    assert probe_audio(path).n_samples == 16_000
    path.write_bytes(path.read_bytes()[: -2000 * channels])
    assert "promises 16000 samples, the file holds 15000" in reason_of(path)


def test_a_compressed_sphere_file_is_left_to_the_decoder(tmp_path):
    path = tmp_path / "a.wav"
    fields = (
        "sample_coding -s26 pcm,embedded-shorten-v2.00\nsample_count -i 9\nsample_n_bytes -i 2\n"
    )
    path.write_bytes(f"NIST_1A\n   1024\n{fields}end_head\n".ljust(1024).encode())
    assert containers.missing_data(str(path), 1024) is None


def test_many_channels_are_held_a_block_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1_000, 3))
    sf.write(path, samples, 16_000, subtype="FLOAT")
    whole = read_audio(path)
    monkeypatch.setattr(audio_module, "_BLOCK_FRAMES", 128)
    assert np.array_equal(read_audio(path), whole)
    np.testing.assert_allclose(whole, samples.mean(1), atol=1e-6)


@pytest.mark.parametrize("size", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"])
def test_wav_from_a_pipe_has_no_length_to_hold_it_to(write_audio, size):
    path = write_audio("a.wav", seconds=1.0)
    content = bytearray(path.read_bytes())
    content[40:44] = size
    path.write_bytes(content)
    assert read_audio(path).shape == (16_000,)


def test_flac_of_unknown_length_is_counted(write_audio):
    path = write_audio("a.flac", seconds=1.5)
    whole = read_audio(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36-bit sample count of STREAMINFO
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert probe_audio(path).n_samples == 24_000
    np.testing.assert_array_equal(read_audio(path), whole)
    np.testing.assert_array_equal(read_samples(path, 5_000, 100), whole[5_000:5_100])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_sample(write_audio, bad):
    signal = np.zeros(8_000)
    signal[1_234] = bad
    path = write_audio("a.wav", signal=signal, subtype="FLOAT")
    assert reason_of(path).startswith("not finite: NaN or infinity at sample 1234")
    assert np.all(read_samples(path, 2_000, 1_000) == 0)
    stereo = write_audio(
        "b.wav", 0.5, 8_000, signal=np.stack([signal, -signal], 1), subtype="DOUBLE"
    )
    assert reason_of(stereo).startswith("not finite")


def test_doubles_past_float32_are_not_finite(write_audio):
    path = write_audio("a.wav", signal=np.full(100, 1e300), subtype="DOUBLE")
    assert reason_of(path).startswith("not finite")


def test_too_loud_for_anything(write_audio):
    signal = np.zeros(8_000)
    signal[1_234] = -1e30
    path = write_audio("a.wav", signal=signal, subtype="FLOAT")
    assert reason_of(path).startswith("too loud: -1e+30 at sample 1234")
    unscaled = write_audio("b.wav", signal=2.0**31 * np.ones(100), subtype="FLOAT")
    assert read_samples(unscaled).max() == 2.0**31


def test_things_that_are_not_audio(tmp_path, write_audio):
    (tmp_path / "text.wav").write_text("once upon a time\n" * 500)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "odd.raw").write_bytes(b"\1\2" * 500)
    (tmp_path / "folder.wav").mkdir()
    zero = write_audio("zero.wav", signal=np.zeros(0))
    head = write_audio("head.wav")
    head.write_bytes(head.read_bytes()[:20])
    assert reason_of(tmp_path / "text.wav").startswith("not audio")
    assert reason_of(tmp_path / "odd.raw").startswith("not audio")
    assert reason_of(tmp_path / "folder.wav").startswith("not audio")
    assert reason_of(tmp_path / "empty.wav") == "empty: the file has 0 bytes"
    assert reason_of(zero) == "empty: zero samples of audio"
    assert reason_of(head).startswith("truncated")
    assert reason_of(tmp_path / "absent.wav") == "missing: no such file"
    assert reason_of("nul\0.wav").startswith("not audio")
    fifo = tmp_path / "pipe.wav"
    os.mkfifo(fifo)
    assert reason_of(fifo).startswith("not audio")  # and does not wait for a writer


def test_every_prefix_and_many_wounds_end_in_audio_error_or_audio(write_audio):
    rng = np.random.default_rng(0)
    for name in FORMATS:
        path = write_audio(name, seconds=0.3)
        content = path.read_bytes()
        for _ in range(40):
            wounded = bytearray(content[: rng.integers(1, len(content) + 1)])
            for at in rng.integers(0, min(len(wounded), 200), 3):
                wounded[at] = rng.integers(256)
            path.write_bytes(wounded)
            try:
                signal = read_audio(path)
            except AudioError:
                continue
            else:
                assert np.isfinite(signal).all()
                assert len(signal) == probe_audio(path).n_samples


def test_promises_and_their_tolerance(write_audio):
    path = write_audio("a.wav", seconds=1.0)
    whole = read_audio(path)
    padded = read_samples(path, 15_900, 200, promised_samples=16_100, tolerance_samples=320)
    np.testing.assert_array_equal(padded, np.concatenate([whole[15_900:], np.zeros(100)]))
    with pytest.raises(AudioError, match="16500 samples expected, the file holds 16000"):
        read_samples(path, 0, 100, promised_samples=16_500, tolerance_samples=320)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "missing: no such file")))
    assert (error.path, error.reason) == ("a.wav", "missing: no such file")


def test_file_name_that_is_not_utf8(write_audio, tmp_path):
    path = write_audio("a.wav")
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.wav"
    os.rename(path, odd)
    assert len(read_audio(os.fsdecode(odd))) == 8_000
