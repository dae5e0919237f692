"""Log-mel frames of a padded batch of waveforms.

    frame t  = window * x[hop t - n_fft/2 : hop t + n_fft/2], reflected at both ends of the row
    mel      = |rfft(frame)|^2 @ filters
    log_mel  = log(mel + floor)

as `torchaudio.transforms.MelSpectrogram(center=True, pad_mode="reflect", power=2)` and a log.
Each row is reflected at its own end, so padding never reaches a valid frame.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import kind_of
from gmm_jepa.ops.operator import Operator, without_autocast

# Frames in flight. Real FFT of 1,024 frames of 400 samples keeps every buffer in the L2 cache:
# on two Zen 4 cores 1.0 M frames/s (256: 0.90 M; 4,096: 0.90 M; all 30,000 at once: 0.49 M),
# against 0.44 M for a folded DFT and 0.37 M for a plain DFT as a matrix product, and 0.19 M for
# torchaudio in the same run.
CHUNK_FRAMES = 1024

_WAVEFORM_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int16)


def log_mel(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    *,
    hop: int,
    floor: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel frames; differentiable in a floating-point waveform.

    Args:
        waveform: (B, S) float in [-1, 1], or int16, which is divided by 32,768.
        lengths_samples: (B,) int64, 0 to S; what lies behind a row's length is never read.
        window: (n_fft,) with n_fft even.
        filters: (n_fft // 2 + 1, n_mels).
        hop: samples between frames.
        floor: added to the mel energies before the logarithm; above zero.
        out_dtype: of the result; arithmetic is float32 (float64 for a float64 waveform).

    Returns:
        (B, S // hop + 1, n_mels). Row b has ``lengths_samples[b] // hop + 1`` valid frames, none
        if its length is 0; later frames are 0. A row too short to be reflected by n_fft / 2
        samples is reflected as far as it reaches and is zero beyond.

    Raises:
        InputError: shapes, devices, hop or floor make no sense.
        TypeError: the waveform is of an unknown type.
    """
    _check(waveform, lengths_samples, window, filters, hop, floor)
    return _log_mel(waveform, lengths_samples, window, filters, hop, float(floor), out_dtype)


def _check(waveform, lengths_samples, window, filters, hop: int, floor: float) -> None:
    if not isinstance(waveform, Tensor) or waveform.dtype not in _WAVEFORM_TYPES:
        raise TypeError(f"waveform: expected float or int16 tensor, got {kind_of(waveform)}")
    if waveform.ndim != 2:
        raise InputError(f"waveform: expected (B, S), got {tuple(waveform.shape)}")
    if lengths_samples.dtype != torch.int64 or lengths_samples.shape != waveform.shape[:1]:
        raise InputError(
            f"lengths_samples: expected int64 ({waveform.shape[0]},), "
            f"got {lengths_samples.dtype} {tuple(lengths_samples.shape)}"
        )
    n_fft = window.shape[0]
    if window.ndim != 1 or n_fft % 2 or n_fft == 0:
        raise InputError(f"window: expected (n_fft,) with n_fft even, got {tuple(window.shape)}")
    if filters.ndim != 2 or filters.shape[0] != n_fft // 2 + 1:
        raise InputError(f"filters: expected ({n_fft // 2 + 1}, n_mels), got {filters.shape}")
    if hop < 1 or not floor > 0.0:
        raise InputError(f"hop, floor: expected hop >= 1 and floor > 0, got {hop} and {floor}")
    if any(t.device != waveform.device for t in (lengths_samples, window, filters)):
        raise InputError("waveform, lengths_samples, window, filters: expected one device")


def log_mel_reference(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    hop: int,
    floor: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`log_mel` in plain torch."""
    if not waveform.shape[0]:
        return waveform.new_empty(
            (0, waveform.shape[1] // hop + 1, filters.shape[1]), dtype=out_dtype
        )
    window, filters = _cast(window, filters, waveform)
    padded = _reflect(waveform, lengths_samples, window.shape[0], hop)
    frames = padded.view(-1).unfold(0, window.shape[0], hop)  # rows end to end, see _reflect
    B, n_slots, T = padded.shape[0], padded.shape[1] // hop, waveform.shape[1] // hop + 1
    mel = padded.new_empty((B * n_slots, filters.shape[1]))
    for chunk in _chunks(frames):
        spectrum = torch.view_as_real(torch.fft.rfft(frames[chunk] * window))
        power = spectrum[..., 0].square().addcmul_(spectrum[..., 1], spectrum[..., 1])
        torch.mm(power, filters, out=mel[chunk]).add_(floor).log_()
    valid = _valid(lengths_samples, T, hop)
    return torch.where(valid[..., None], mel.view(B, n_slots, -1)[:, :T], 0.0).to(out_dtype)


_log_mel = Operator("gmm_jepa::log_mel", log_mel_reference)


@_log_mel.register_fake
def _(waveform, lengths_samples, window, filters, hop, floor, out_dtype):
    B, S = waveform.shape
    return waveform.new_empty((B, S // hop + 1, filters.shape[1]), dtype=out_dtype)


@torch.library.custom_op("gmm_jepa::log_mel_backward", mutates_args=())
def _log_mel_backward(
    grad: Tensor,
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    hop: int,
    floor: float,
) -> Tensor:
    if not waveform.shape[0]:
        return torch.empty_like(waveform)
    (B, S), (_, T, n_mels), n_fft = waveform.shape, grad.shape, window.shape[0]
    window, filters = _cast(window, filters, waveform)
    padded = _reflect(waveform, lengths_samples, n_fft, hop)
    frames = padded.view(-1).unfold(0, n_fft, hop)
    n_slots, blocks = padded.shape[1] // hop, -(-n_fft // hop)  # a frame spans `blocks` hops
    valid = _valid(lengths_samples, n_slots, hop).view(-1, 1)
    g_mel = padded.new_zeros((B, n_slots, n_mels))
    g_mel[:, :T] = grad
    g_mel = g_mel.view(-1, n_mels)
    overlapped = padded.new_zeros((B * n_slots + blocks, hop))
    for chunk in _chunks(frames):
        g_frames = _frames_vjp(frames[chunk], g_mel[chunk], window, filters, floor)
        g_frames.masked_fill_(~valid[chunk], 0.0)
        g_frames = torch.nn.functional.pad(g_frames, (0, blocks * hop - n_fft))
        for j in range(blocks):
            g_block = g_frames[:, j * hop : (j + 1) * hop]
            overlapped[chunk.start + j : chunk.stop + j] += g_block
    g_padded = overlapped[: B * n_slots].reshape(B, -1)
    return _reflect_vjp(g_padded, lengths_samples, S, n_fft).to(waveform.dtype)


@_log_mel_backward.register_fake
def _(grad, waveform, lengths_samples, window, filters, hop, floor):
    return torch.empty_like(waveform)


def _setup(ctx, inputs, output):
    waveform, lengths_samples, window, filters, hop, floor, _ = inputs
    ctx.save_for_backward(waveform, lengths_samples, window, filters)
    ctx.options = (hop, floor)


def _vjp(ctx, grad):
    return _log_mel_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


_log_mel.register_autograd(_vjp, setup_context=_setup)
without_autocast(_log_mel, _log_mel_backward)


def _cast(window: Tensor, filters: Tensor, waveform: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    return window.to(dtype), filters.to(dtype)


def _valid(lengths_samples: Tensor, n_frames: int, hop: int) -> Tensor:
    """(B, n_frames) bool: the frames that a row has."""
    frames = torch.where(lengths_samples > 0, lengths_samples // hop + 1, 0)
    return torch.arange(n_frames, device=frames.device) < frames[:, None]


def _chunks(frames: Tensor) -> Iterator[slice]:
    for start in range(0, frames.shape[0], CHUNK_FRAMES):
        yield slice(start, min(start + CHUNK_FRAMES, frames.shape[0]))


def _reflect(waveform: Tensor, lengths_samples: Tensor, n_fft: int, hop: int) -> Tensor:
    """Rows (B, S) -> (B, P), each reflected by n_fft / 2 about its first and its last sample.

    P is a multiple of the hop, so that with the rows laid end to end every frame of every row is
    one of ``unfold(n_fft, hop)``: frame t of row b is number ``b P / hop + t``.
    """
    B, S = waveform.shape
    width = -(-(S + n_fft) // hop) * hop
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    padded = waveform.new_zeros((B, width), dtype=dtype)
    inner = padded[:, n_fft // 2 : n_fft // 2 + S]
    inner.copy_(waveform)
    if waveform.dtype == torch.int16:
        inner.mul_(1.0 / 32768.0)
    image, source, inside = _mirrors(lengths_samples, n_fft // 2, S)
    return padded.scatter_(1, image, torch.where(inside, padded.gather(1, source), 0.0))


def _reflect_vjp(g_padded: Tensor, lengths_samples: Tensor, S: int, n_fft: int) -> Tensor:
    """Transpose of `_reflect`: the gradient at every mirror image goes back to its sample."""
    half = n_fft // 2
    image, source, inside = _mirrors(lengths_samples, half, S)
    # two images of one sample (left and right) are added in two steps: no order to depend on
    g = g_padded.clone()
    for side in (slice(0, half), slice(half, n_fft)):
        values = torch.where(inside[:, side], g_padded.gather(1, image[:, side]), 0.0)
        g.scatter_add_(1, source[:, side], values)
    behind = torch.arange(S, device=g.device) >= lengths_samples[:, None]
    return g[:, half : half + S].masked_fill(behind, 0.0)


def _mirrors(lengths_samples: Tensor, half: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where reflection reads and writes in a row padded by `half` on the left.

    Returns three (B, 2 half): the place of every mirror image, the place of the sample it shows,
    and whether the row has that sample. Without reading a length on the host.
    """
    offset = torch.arange(1, half + 1, device=lengths_samples.device)
    last = lengths_samples.clamp(1, max(1, S))[:, None] - 1
    image = torch.cat(((half - offset).expand(last.shape[0], -1), half + last + offset), 1)
    source = torch.cat((offset.expand(last.shape[0], -1), last - offset), 1)
    inside = (source >= 0) & (source <= last)
    return image, half + torch.where(inside, source, 0), inside


def _frames_vjp(
    frames: Tensor, grad: Tensor, window: Tensor, filters: Tensor, floor: float
) -> Tensor:
    """Gradient (n, n_mels) of log(|rfft(w f)|^2 @ filters + floor) -> gradient (n, n_fft) of f.

    With X = rfft(w f) and g_k the gradient of |X_k|^2 it is
    w_n sum_{k=0..N/2} 2 g_k Re(X_k exp(2 pi i k n / N)).
    """
    n_fft = frames.shape[1]
    spectrum = torch.fft.rfft(frames * window)
    power = torch.view_as_real(spectrum).square().sum(-1)
    g_power = (grad.to(power.dtype) / (power @ filters + floor)) @ filters.T
    # irfft divides by N and counts every bin twice but the first and the last
    g_spectrum = spectrum * g_power
    g_spectrum[:, 0] *= 2.0
    g_spectrum[:, -1] *= 2.0
    return torch.fft.irfft(g_spectrum, n=n_fft).mul_(n_fft) * window
