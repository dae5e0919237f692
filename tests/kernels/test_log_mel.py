"""The log-mel kernel against a float64 transform by definition, and against torchaudio.

Without a CUDA device the launcher runs on CPU tensors in Triton's interpreter; on one, the same
cases run compiled.
"""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gmm_jepa import InputError, LogMelSpec, ops
from gmm_jepa.ops import triton_log_mel
from gmm_jepa.ops.log_mel import log_mel_reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
from gmm_jepa.kernels import log_mel as kept  # noqa: E402
from gmm_jepa.kernels import log_mel_large  # noqa: E402
from gmm_jepa.kernels.log_mel import SIZE, basis, log_mel  # noqa: E402

from bench.null_cuda.interpreter import mend_the_interpreter  # noqa: E402

from .guard_pages import guarded, run_in_child  # noqa: E402

mend_the_interpreter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = 1e-6
MODULE = "tests.kernels.test_log_mel"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


class Case(NamedTuple):
    """One batch: a signal for each row's length, and the front end."""

    lengths: tuple[int, ...]
    signal: str = "noise"
    n_fft: int = 400
    hop: int = 320
    n_mels: int = 80
    dtype: torch.dtype = torch.float32


CASES = {
    "one_frame": Case((319,)),
    "whole_hop": Case((640,)),
    "prime": Case((6007,)),
    "ragged_and_empty": Case((2500, 0, 1, 777, 2499, 320)),
    "all_empty": Case((0, 0)),
    "too_short_to_reflect": Case((1, 2, 3, 150, 199, 200, 201)),
    "several_programs": Case((2600,), hop=37),
    "nothing_to_reflect_in_a_program": Case((8000, 7000), hop=37),
    "int16_nothing_to_reflect": Case((8000,), hop=37, dtype=torch.int16),
    "n_fft_1024_nothing_to_reflect": Case((8000,), n_fft=1024, hop=37),
    "silence": Case((1500,), "silence"),
    "full_scale_square": Case((3000,), "square"),
    "tone": Case((3000,), "tone"),
    "click": Case((2500,), "click"),
    "offset": Case((2500,), "offset"),
    "quiet": Case((2500,), "quiet"),
    "huge": Case((2500,), "huge"),
    "loud_beside_quiet": Case((2500,), "loud_beside_quiet"),
    "int16": Case((2500, 900), dtype=torch.int16),
    "bfloat16": Case((2500, 900), dtype=torch.bfloat16),
    "float16": Case((2500, 900), dtype=torch.float16),
    "n_fft_510": Case((2500,), n_fft=510, hop=160),
    "n_fft_512": Case((2500,), n_fft=512, hop=160),
    "n_fft_1024_128_mels": Case((1500,), n_fft=1024, hop=256, n_mels=128),
    "n_fft_128": Case((2500,), n_fft=128, hop=64, n_mels=23),
    "128_mels": Case((1500,), n_mels=128),
    "n_fft_402_23_mels": Case((2500, 401), n_fft=402, hop=131, n_mels=23),
    "hop_beyond_n_fft": Case((3001,), hop=577),
    "more_mels_than_a_program": Case((900,), n_mels=131),
}


def _signal(name: str, n: int) -> Tensor:
    t = torch.arange(n) / 16_000
    return {
        "noise": lambda: 0.1 * torch.randn(n),
        "silence": lambda: torch.zeros(n),
        "square": lambda: torch.sign(torch.sin(2 * math.pi * 100 * t)),
        "tone": lambda: torch.sin(2 * math.pi * 440 * t),
        "click": lambda: (torch.arange(n) == n // 2).float(),
        "offset": lambda: 0.5 + 0.01 * torch.randn(n),
        "quiet": lambda: 1e-5 * torch.randn(n),
        "huge": lambda: 1e6 * torch.randn(n),
        "loud_beside_quiet": lambda: torch.randn(n) * torch.where(t < t.mean(), 1.0, 1e-3),
    }[name]()


def _by_definition(row: Tensor, window: Tensor, filters: Tensor, hop: int) -> Tensor:
    """float64 (T, n_mels): reflect as far as the row reaches, zeros beyond."""
    n, n_fft = len(row), len(window)
    position = torch.arange(n // hop + 1)[:, None] * hop + torch.arange(-(n_fft // 2), n_fft // 2)
    mirrored = torch.where(position < 0, -position, position)
    mirrored = torch.where(position >= n, 2 * (n - 1) - position, mirrored)
    inside = (mirrored >= 0) & (mirrored < n)
    frames = torch.where(inside, row.double()[mirrored.clamp(0, n - 1)], 0.0)
    spectrum = torch.fft.rfft(frames * window.double())
    return torch.log(spectrum.abs().square() @ filters.double() + FLOOR)


def _front_end(case: Case) -> tuple[Tensor, Tensor]:
    """Window (n_fft,) and filters; random ones where so many mels would leave some empty."""
    try:
        spec = LogMelSpec(n_fft=case.n_fft, hop_samples=case.hop, n_mels=case.n_mels)
    except InputError:
        return torch.hann_window(case.n_fft), torch.rand(case.n_fft // 2 + 1, case.n_mels)
    return spec.window(), spec.filters()


def _batch(case: Case) -> Tensor:
    """(B, S) with rubbish behind each row's length."""
    fill = math.nan if case.dtype.is_floating_point else 32_767
    batch = torch.full((len(case.lengths), max(case.lengths)), fill, dtype=case.dtype)
    for row, n in zip(batch, case.lengths):
        signal = _signal(case.signal, n)
        if case.dtype == torch.int16:
            signal = (32_768 * signal).round().clamp(-32_768, 32_767)
        row[:n] = signal.to(case.dtype)
    return batch


def _run(batch, lengths, window, filters, hop, **options) -> Tensor:
    """On `DEVICE`, strides kept; the result on the CPU."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    tensors = (t.to(DEVICE) for t in (batch, lengths, window, filters))
    return log_mel(*tensors, hop=hop, floor=FLOOR, **options).cpu()


def _assert_close(got: Tensor, expected: Tensor) -> None:
    """The contract: within 1e-3 where mel > 1e-5, 1e-2 elsewhere."""
    assert got.shape == expected.shape
    assert got.isfinite().all()
    error = (got.double() - expected).abs()
    loud = expected > math.log(1e-5 + FLOOR)
    for where, bound in ((loud, 1e-3), (~loud, 1e-2)):
        if error[where].numel():
            assert error[where].max() < bound, f"off by {error[where].max():.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    window, filters = _front_end(case)
    batch = _batch(case)
    got = _run(batch, case.lengths, window, filters, case.hop)
    assert got.dtype == torch.float32
    scale = 1.0 / 32_768 if case.dtype == torch.int16 else 1.0
    for b, n in enumerate(case.lengths):
        valid = n // case.hop + 1 if n else 0
        assert (got[b, valid:] == 0).all()
        if n:
            row = scale * batch[b, :n].double()
            _assert_close(got[b, :valid], _by_definition(row, window, filters, case.hop))


def test_against_torchaudio_on_speech(shared):
    torchaudio = pytest.importorskip("torchaudio")
    soundfile = pytest.importorskip("soundfile")
    folder = shared / "speech"
    line = json.loads((folder / "arctic.jsonl").read_text().splitlines()[0])
    samples, _ = soundfile.read(folder / line["audio_filepath"], dtype="float32", frames=16_000)
    row = torch.from_numpy(samples)
    spec = LogMelSpec()
    got = _run(row[None], [len(row)], spec.window(), spec.filters(), 320)[0]
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=320, n_mels=80)
    _assert_close(got, torch.log(mel.double()(row.double()) + FLOOR).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_out_is_the_rounded_result(dtype):
    spec, batch = LogMelSpec(), 0.1 * torch.randn(2, 1500)
    arguments = (batch, [1500, 400], spec.window(), spec.filters(), 320)
    got, expected = _run(*arguments, out_dtype=dtype), _run(*arguments).to(dtype)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps if DEVICE == "cpu" else 0.0  # the interpreter truncates to bf16
    torch.testing.assert_close(got, expected, rtol=ulp, atol=0)


def test_any_strides_same_bits_and_inputs_untouched():
    spec, wide = LogMelSpec(), 0.1 * torch.randn(1500, 3)
    window, filters = spec.window(), spec.filters().T.contiguous().T
    batch, before = wide.T[::2], wide.clone()
    lengths = torch.tensor([1500, 0, 700])[::2]
    got = _run(batch, lengths, window, filters, 320)
    again = _run(batch.contiguous(), [1500, 700], window, filters.contiguous(), 320)
    assert torch.equal(got, again)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("shape", [(0, 800), (0, 0), (2, 0)])
def test_empty(shape):
    spec = LogMelSpec()
    got = _run(torch.zeros(shape), [0] * shape[0], spec.window(), spec.filters(), 320)
    assert got.shape == (shape[0], shape[1] // 320 + 1, 80)
    assert (got == 0).all()


@pytest.mark.parametrize("n_fft", [2, 6, 8, 400, 510])
def test_tables_hold_22_bits_of_the_transform(n_fft):
    """High and low part together against cosines and sines in float64."""
    high, low = basis(n_fft, torch.device("cpu")).double()
    n, i = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    weight = (4 * n < n_fft) + 0.5 * (4 * n == n_fft)
    for odd in (0, 1):
        k = 2 * i + odd
        angle = 2 * math.pi * (n * k).double() / n_fft
        for table, exact in ((2 * odd, angle.cos()), (2 * odd + 1, angle.sin())):
            error = (high + low)[table] - weight * exact * (k <= n_fft // 2)
            assert error.abs().max() < 2.0**-23


@pytest.mark.parametrize("n_fft", [512, 1024])
def test_large_tables_hold_22_bits_of_the_transform(n_fft):
    size = n_fft // 4 + 1
    high, low = log_mel_large.basis(n_fft, size, size, torch.device("cpu")).double()
    k = torch.arange(size)
    for odd in (0, 1):
        n = 2 * torch.arange(size)[:, None] + odd
        weight = (2 * n < n_fft) + 0.5 * (2 * n == n_fft)
        angle = 2 * math.pi * (n * k).double() / n_fft
        for table, exact in ((odd, angle.cos()), (2 + odd, angle.sin())):
            assert ((high + low)[table] - weight * exact).abs().max() < 2.0**-23


def run_guarded(*names: str) -> None:
    """In a process of its own: each case's inputs, tables and output between guard pages."""
    new_empty, tables = Tensor.new_empty, (kept.basis, log_mel_large.basis)
    for name in names:
        case, window, filters = CASES[name], *_front_end(CASES[name])
        inputs = (_batch(case), torch.tensor(case.lengths), window, filters)
        expected = log_mel(*inputs, hop=case.hop, floor=FLOOR)
        for at_end in (False, True):
            between = partial(guarded, at_end=at_end)
            kept.basis, log_mel_large.basis = (
                lambda *sizes, make=make, between=between: between(make(*sizes)) for make in tables
            )
            Tensor.new_empty = lambda *a, between=between, **k: between(new_empty(*a, **k))
            got = log_mel(*map(between, inputs), hop=case.hop, floor=FLOOR)
            Tensor.new_empty = new_empty
            kept.basis, log_mel_large.basis = tables
            assert torch.equal(got, expected), name


@pytest.mark.skipif(DEVICE == "cuda", reason="compute-sanitizer's work on a GPU")
def test_touches_nothing_beside_its_arguments():
    names = (
        "ragged_and_empty",
        "too_short_to_reflect",
        "nothing_to_reflect_in_a_program",
        "int16",
        "n_fft_512",
        "n_fft_1024_128_mels",
        "n_fft_128",
        "n_fft_402_23_mels",
        "more_mels_than_a_program",
    )
    child = run_in_child(f"{MODULE}:run_guarded", *names)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("side", ["begin", "end"])
def test_guard_pages_end_a_process_that_reads_beside(side):
    child = run_in_child("tests.kernels.guard_pages:read_beside", side)
    assert child.returncode == -signal.SIGSEGV


@needs_cuda
def test_the_op_runs_the_kernel_and_has_its_gradient():
    spec = LogMelSpec()
    lengths = torch.tensor([5000, 0, 3217])
    gradients, results = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        x = (0.1 * torch.randn(3, 5000)).to(device).requires_grad_()
        tensors = (lengths.to(device), spec.window(device), spec.filters(device))
        out = ops.log_mel(x, *tensors, hop=320, floor=FLOOR)
        out.square().sum().backward()
        results.append(out.detach().cpu())
        gradients.append(x.grad.cpu())
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=0)
    size = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3 * size, rtol=0)


@needs_cuda
def test_opcheck_and_no_graph_break_on_cuda():
    spec = LogMelSpec()
    waveform = torch.randn(2, 900, device="cuda", requires_grad=True)
    lengths = torch.tensor([900, 400], device="cuda")
    tensors = (waveform, lengths, spec.window("cuda"), spec.filters("cuda"))
    options = (320, FLOOR, torch.float32)
    torch.library.opcheck(torch.ops.gmm_jepa.log_mel.default, (*tensors, *options))
    compiled = torch.compile(ops.log_mel, fullgraph=True, backend="aot_eager")
    got = compiled(*tensors, hop=320, floor=FLOOR)
    assert torch.equal(got, ops.log_mel(*tensors, hop=320, floor=FLOOR))


@needs_cuda
def test_memory_is_the_output_alone():
    spec = LogMelSpec()
    waveform = 0.1 * torch.randn(32, 240_000, device="cuda")
    lengths = torch.full((32,), 240_000, device="cuda")
    tensors = (waveform, lengths, spec.window("cuda"), spec.filters("cuda"))
    log_mel(*tensors, hop=320, floor=FLOOR)  # makes the tables
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = log_mel(*tensors, hop=320, floor=FLOOR)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 4 + (1 << 20)


@needs_cuda
def test_addresses_beyond_32_bits():
    """Two rows of more than 2^30 samples: the last frames lie behind 2^31 elements."""
    spec, S = LogMelSpec(hop_samples=400), 400 * 2_684_400
    waveform = torch.zeros(2, S, dtype=torch.int16, device="cuda")
    tail = torch.randint(-3000, 3000, (8000,), dtype=torch.int16)
    waveform[1, -8000:] = tail.cuda()
    lengths = torch.tensor([0, S], device="cuda")
    out = log_mel(
        waveform, lengths, spec.window("cuda"), spec.filters("cuda"), hop=400, floor=FLOOR
    )
    row = torch.cat((torch.zeros(8000), tail / 32_768))
    expected = _by_definition(row, spec.window(), spec.filters(), 400)
    _assert_close(out[1, -20:].cpu(), expected[-20:])


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_what_the_kernel_does_not_cover_is_plain_torch(dtypes):
    """What is registered for CUDA, called on a CPU."""
    spec, (dtype, out_dtype) = LogMelSpec(), dtypes
    waveform = 0.1 * torch.randn(2, 2000).to(dtype)
    tensors = (waveform, torch.tensor([2000, 700]), spec.window(), spec.filters())
    got = triton_log_mel.log_mel(*tensors, 320, FLOOR, out_dtype)
    assert got.dtype == out_dtype
    assert torch.equal(got, log_mel_reference(*tensors, 320, FLOOR, out_dtype))
