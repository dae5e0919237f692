"""Log-mel frames against torchaudio and against a float64 transform."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torchaudio

from gmm_jepa import ops
from gmm_jepa.errors import InputError

FLOOR = 1e-6
WINDOW = torch.hann_window(400)
FILTERS = torchaudio.functional.melscale_fbanks(201, 0.0, 8000.0, 80, 16_000)


def _frames(waveform, lengths, *, hop=320, window=WINDOW, filters=FILTERS, **kwargs):
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return ops.log_mel(waveform, lengths, window, filters, hop=hop, floor=FLOOR, **kwargs)


def _torchaudio(row, *, hop=320, dtype=torch.float32):
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=hop, n_mels=80)
    return torch.log(mel.to(dtype)(row.to(dtype)) + FLOOR).T


def _by_definition(row, hop):
    """float64, frame by frame: reflect as far as the row reaches, zeros beyond."""
    x, half = row.double().tolist(), 200
    n = len(x)

    def at(i):
        mirrored = -i if i < 0 else 2 * (n - 1) - i if i >= n else i
        return x[mirrored] if 0 <= mirrored < n else 0.0

    frames = [[at(t * hop + j) for j in range(-half, half)] for t in range(n // hop + 1)]
    spectrum = torch.fft.rfft(torch.tensor(frames, dtype=torch.float64) * WINDOW.double())
    return torch.log(spectrum.abs().square() @ FILTERS.double() + FLOOR)


LENGTHS = {
    "one_frame": 319,
    "a_whole_hop": 640,
    "one_more": 641,
    "prime": 15_013,
    "shortest_reflected": 201,
    "two_seconds": 32_000,
    "several_chunks": 320 * 2100 + 7,
}


@pytest.mark.parametrize("hop", [320, 160, 400, 512])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_equals_torchaudio(length, hop):
    """In float64, to the rounding of float32: a bin's is that of the frame's largest amplitudes.

    In this unit torchaudio's float32 is up to 1.1 off, too.
    """
    row = 0.1 * torch.randn(length)
    expected = _torchaudio(row, hop=hop, dtype=torch.float64)
    got = _frames(row[None], [length], hop=hop)[0]
    assert got.shape == (length // hop + 1, 80)
    power = expected.exp()
    unit = torch.finfo(torch.float32).eps * (power.sum(1, keepdim=True) / power).sqrt()
    assert ((got.double() - expected).abs() <= 2 * unit).all()


SIGNALS = {
    "noise": lambda t: torch.randn(t.shape),
    "quiet": lambda t: 1e-5 * torch.randn(t.shape),
    "silence": lambda t: torch.zeros(t.shape),
    "tone": lambda t: torch.sin(2 * math.pi * 440 * t),
    "full_scale_square": lambda t: torch.sign(torch.sin(2 * math.pi * 100 * t)),
    "click": lambda t: (t == t[1234]).float(),
    "offset": lambda t: 0.5 + 0.01 * torch.randn(t.shape),
}


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)
def test_within_contract_of_float64(signal):
    """1e-3 where mel > 1e-5, 1e-2 elsewhere."""
    row = signal(torch.arange(8000) / 16_000)
    expected = _torchaudio(row, dtype=torch.float64)
    error = (_frames(row[None], [8000])[0].double() - expected).abs()
    loud = expected > math.log(1e-5 + FLOOR)
    assert error[loud].numel() == 0 or error[loud].max() < 1e-3
    assert error[~loud].numel() == 0 or error[~loud].max() < 1e-2


@pytest.mark.parametrize("length", [1, 2, 3, 150, 199, 200, 201, 321, 400])
def test_short_rows_are_reflected_as_far_as_they_reach(length):
    row = 0.1 * torch.randn(length)
    got = _frames(row[None], [length])[0]
    torch.testing.assert_close(got.double(), _by_definition(row, 320), atol=2e-5, rtol=0)


def test_silence_is_the_floor():
    got = _frames(torch.zeros(1, 4000), [4000])
    torch.testing.assert_close(got, torch.full_like(got, math.log(FLOOR)))


@pytest.mark.parametrize("rubbish", [0.0, 1.0, math.nan, math.inf])
def test_padding_never_reaches_a_frame(rubbish):
    lengths = [5000, 0, 1, 200, 3217, 4999, 320]
    waveform = 0.1 * torch.randn(len(lengths), 5000)
    padded = waveform.clone()
    for row, length in zip(padded, lengths):
        row[length:] = rubbish
    got = _frames(padded, lengths)
    assert got.shape == (7, 16, 80)
    for b, length in enumerate(lengths):
        n = length // 320 + 1 if length else 0
        alone = _frames(waveform[b : b + 1, :length], [length])[0, :n]
        torch.testing.assert_close(got[b, :n], alone, atol=1e-5, rtol=0)
        assert (got[b, n:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 800), (0, 0), (2, 0)])
def test_empty(shape):
    got = _frames(torch.zeros(shape), [0] * shape[0])
    assert got.shape == (shape[0], shape[1] // 320 + 1, 80)
    assert (got == 0).all()


def test_int16_is_a_fraction_of_full_scale():
    samples = torch.randint(-32_768, 32_768, (2, 3000), dtype=torch.int16)
    as_float = samples.float() / 32_768
    assert torch.equal(_frames(samples, [3000, 1000]), _frames(as_float, [3000, 1000]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outside_single_inside(dtype):
    waveform = (0.1 * torch.randn(2, 2000)).to(dtype)
    full = _frames(waveform.float(), [2000, 700])
    assert torch.equal(_frames(waveform, [2000, 700]), full)
    assert torch.equal(_frames(waveform, [2000, 700], out_dtype=dtype), full.to(dtype))


def test_chunks_change_nothing(monkeypatch):
    waveform = 0.1 * torch.randn(3, 9000)
    whole = _frames(waveform, [9000, 100, 4321])
    monkeypatch.setattr(importlib.import_module("gmm_jepa.ops.log_mel"), "CHUNK_FRAMES", 7)
    torch.testing.assert_close(_frames(waveform, [9000, 100, 4321]), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hop", [320, 160, 37, 512])
@pytest.mark.parametrize("length", [1, 150, 201, 399, 1600, 15_013])
def test_gradient_equals_torchs_own(length, hop):
    """Oracle: autograd in float64 through an explicit gather of every frame's samples."""
    row = (0.1 * torch.randn(1, length)).double()
    filters = torch.rand(201, 7)  # mel filters never touch the first and the last bin
    padding = 300
    position = torch.arange(length // hop + 1)[:, None] * hop + torch.arange(-200, 200)
    mirrored = torch.where(position < 0, -position, position)
    mirrored = torch.where(position >= length, 2 * (length - 1) - position, mirrored)
    inside = (mirrored >= 0) & (mirrored < length)
    reference = row.clone().requires_grad_()
    gathered = torch.where(inside, reference[0][mirrored.clamp(0, length - 1)], 0.0)
    spectrum = torch.fft.rfft(gathered * WINDOW.double())
    power = torch.view_as_real(spectrum).square().sum(-1)
    expected = torch.log(power @ filters.double() + FLOOR)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weight).sum().backward()

    waveform = torch.cat((row, torch.full((1, padding), math.nan)), 1).requires_grad_()
    got = _frames(waveform, [length], hop=hop, filters=filters, out_dtype=torch.float64)[0]
    (got[: weight.shape[0]] * weight).sum().backward()
    size = float(reference.grad.abs().max())
    torch.testing.assert_close(
        waveform.grad[:, :length], reference.grad, atol=1e-9 * size, rtol=1e-7
    )
    assert (waveform.grad[:, length:] == 0).all()


def test_gradient_in_float32():
    waveform = 0.1 * torch.randn(2, 3000)
    weight = torch.randn(2, 10, 80)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = waveform.to(dtype).clone().requires_grad_()
        got = _frames(x, [3000, 1700], out_dtype=dtype)
        (got * weight.to(dtype)).sum().backward()
        gradients.append(x.grad.double())
    size = float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, atol=1e-5 * size, rtol=0)


def test_user_errors():
    waveform = torch.zeros(2, 800)
    with pytest.raises(InputError, match=r"waveform: expected \(B, S\)"):
        _frames(waveform[0], [800])
    with pytest.raises(InputError, match="lengths_samples: expected int64"):
        _frames(waveform, [800])
    with pytest.raises(InputError, match="window"):
        _frames(waveform, [800, 800], window=torch.ones(399))
    with pytest.raises(InputError, match="filters"):
        _frames(waveform, [800, 800], filters=torch.ones(200, 80))
    with pytest.raises(InputError, match="hop, floor"):
        _frames(waveform, [800, 800], hop=0)
    with pytest.raises(TypeError, match="waveform"):
        _frames(waveform.int(), [800, 800])


@pytest.mark.parametrize("shape", [(2, 900), (0, 900), (2, 0)])
def test_registration_holds_what_it_promises(shape):
    waveform = torch.randn(shape, requires_grad=True)
    lengths = torch.full(shape[:1], shape[1], dtype=torch.int64)
    arguments = (waveform, lengths, WINDOW, FILTERS, 320, FLOOR, torch.float32)
    torch.library.opcheck(torch.ops.gmm_jepa.log_mel.default, arguments)


def test_no_graph_break():
    compiled = torch.compile(_frames, fullgraph=True, backend="aot_eager")
    waveform, lengths = 0.1 * torch.randn(2, 3000), torch.tensor([3000, 1000])
    gradients = []
    for function in (_frames, compiled):
        x = waveform.clone().requires_grad_()
        function(x, lengths).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
