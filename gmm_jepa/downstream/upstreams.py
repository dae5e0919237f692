"""What is probed: our encoders, Hugging Face's, the same untrained, and log-mel frames.

Every upstream gives an utterance ``max(1, round(samples / hop))`` frames of all its layers. An
encoder's own count may differ by less than five: more are cut, fewer repeat the last (s3prl's
rule). A feature never depends on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmm_jepa.config import to_dict
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.encoder import SpeechEncoder, load_encoder
from gmm_jepa.errors import InputError, first_line, require
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.files import read_json, readable
from gmm_jepa.models.build import build_encoder

Kind = Literal["trained", "untrained", "log-mel"]
TOLERANCE_FRAMES = 5
UNTRAINED_SEED = 0
LOG_MEL_MEAN, LOG_MEL_STD = -6.0, 4.0
"""About those of speech (-6.0 and 3.6, -6.9 and 5.2 on two corpora of read English)."""


class Upstream(ABC, nn.Module):
    """Frozen features of waveforms.

    Args:
        name: of the row in tables.
        kind: trained, or which control.
    """

    n_layers: int
    """L."""
    width: int
    """D."""
    hop_samples: int
    """Samples a frame."""

    def __init__(self, name: str, kind: Kind) -> None:
        super().__init__()
        self.name, self.kind = name, kind

    @abstractmethod
    def layers(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms (S_i,) to all layers (T_i, L, D), T_i as the encoder counts."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, for the record; equal ones make equal untrained encoders."""

    @abstractmethod
    def untrained(self) -> Upstream | None:
        """The same with fresh weights, seed 0; None where there are none."""

    def n_frames(self, n_samples: int) -> int:
        """Frames of an utterance of so many samples at 16 kHz."""
        return max(1, round(n_samples / self.hop_samples))

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms (S_i,) float32, 16 kHz -> (T_i, L, D) float32, ``T_i = n_frames(S_i)``.

        Raises:
            InputError: an utterance is too short for one frame.
        """
        made = self.layers(waveforms)
        return [self._matched(rows, len(wav)) for rows, wav in zip(made, waveforms)]

    def fingerprint(self) -> str:
        """Hexadecimal hash of settings and weights."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _matched(self, rows: Tensor, n_samples: int) -> Tensor:
        n = self.n_frames(n_samples)
        if not len(rows):
            raise InputError(f"{n_samples} samples are too short for one frame of {self.name}")
        assert abs(len(rows) - n) < TOLERANCE_FRAMES, (self.name, len(rows), n)
        return rows[torch.arange(n, device=rows.device).clamp(max=len(rows) - 1)].float()


class LogMel(Upstream):
    """80 log-mel bands, one layer: what an encoder has to beat.

    All bands are moved and scaled by the same two constants, so that a linear layer starts well
    and the zeros of a mask are middling rather than loud. Nothing is normalised by utterance:
    that would leave a mean over frames nothing to tell.
    """

    n_layers = 1

    def __init__(self, hop_samples: int = 320) -> None:
        super().__init__("log-mel", "log-mel")
        self.spec = LogMelSpec(hop_samples=hop_samples)
        self.hop_samples, self.width = hop_samples, self.spec.n_mels
        self.register_buffer("place", torch.empty(0), persistent=False)

    def layers(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Frames (T, 1, 80)."""
        frames = [log_mel(w.to(self.place.device), spec=self.spec) for w in waveforms]
        return [((x - LOG_MEL_MEAN) / LOG_MEL_STD)[:, None] for x in frames]

    def describe(self) -> dict[str, Any]:
        """The front end."""
        return {"log_mel": self.spec.to_dict(), "mean": LOG_MEL_MEAN, "std": LOG_MEL_STD}

    def untrained(self) -> None:
        """There are no weights."""


class OurEncoder(Upstream):
    """An encoder of this project: the projected front end and every block's output."""

    def __init__(self, name: str, kind: Kind, encoder: SpeechEncoder) -> None:
        super().__init__(name, kind)
        self.encoder = encoder.eval()
        self.hop_samples, self.width = encoder.hop_samples, encoder.width
        self.n_layers = 1 + encoder.encoder.config.layers

    def layers(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Layers (T, L, D)."""
        device = next(self.parameters()).device
        padded = nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True).to(device)
        lengths = torch.tensor([len(w) for w in waveforms], device=device)
        encoded = self.encoder(padded, lengths)
        stacked = torch.stack(encoded.hidden_states, dim=2)
        return [row[:n] for row, n in zip(stacked, encoded.lengths.tolist())]

    def describe(self) -> dict[str, Any]:
        """The encoder's settings."""
        return {"encoder": to_dict(self.encoder.encoder.config)}

    def untrained(self) -> OurEncoder:
        """The same settings, fresh weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            fresh = build_encoder(self.encoder.encoder.config)
        return OurEncoder(f"{self.name}, untrained", "untrained", SpeechEncoder(fresh))


class HuggingFaceEncoder(Upstream):
    """HuBERT, WavLM, wav2vec 2.0 and their kin: all hidden states.

    Where the feature extractor says so, each waveform is brought to mean 0 and variance 1. Models
    whose front end normalises over time ("group") were trained without an attention mask and see
    one utterance at a time, since padding would enter the norm; the others take batches and a mask.

    Args:
        name, kind: see `Upstream`.
        model: of the wav2vec 2.0 family.
        normalise: mean 0 and variance 1.
    """

    def __init__(self, name: str, kind: Kind, model: nn.Module, *, normalise: bool) -> None:
        super().__init__(name, kind)
        self.model, self.normalise = model.eval(), normalise
        config = model.config
        self.masked = config.feat_extract_norm == "layer"
        self.hop_samples = math.prod(config.conv_stride)
        self.width, self.n_layers = config.hidden_size, config.num_hidden_layers + 1

    def layers(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Layers (T, L, D)."""
        if self.normalise:
            waveforms = [_standardised(w) for w in waveforms]
        if not self.masked:
            return [self._stacked(w[None], None)[0] for w in waveforms]
        padded = nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
        lengths = torch.tensor([len(w) for w in waveforms])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        stacked = self._stacked(padded, mask.long())
        return [row[: self._n_own(len(w))] for row, w in zip(stacked, waveforms)]

    def describe(self) -> dict[str, Any]:
        """The model's settings."""
        config = self.model.config.to_dict()
        for own in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            config.pop(own, None)
        return {
            "huggingface": json.loads(json.dumps(config, default=str)),
            "normalise": self.normalise,
        }

    def untrained(self) -> HuggingFaceEncoder:
        """The same settings, fresh weights."""
        auto = require("transformers", extra="probe").AutoModel
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            fresh = auto.from_config(self.model.config)
        name = f"{self.name}, untrained"
        return HuggingFaceEncoder(name, "untrained", fresh, normalise=self.normalise)

    def _stacked(self, waveform: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S) -> (B, T, L, D)."""
        device = next(self.parameters()).device
        least = self._least_samples
        if waveform.shape[1] < least:
            return torch.zeros(len(waveform), 0, self.n_layers, self.width)
        made = self.model(
            waveform.to(device),
            attention_mask=None if mask is None else mask.to(device),
            output_hidden_states=True,
        )
        return torch.stack(made.hidden_states, dim=2)

    @property
    def _least_samples(self) -> int:
        """Samples that make one frame."""
        n = 1
        for kernel, stride in reversed(self._convolutions):
            n = (n - 1) * stride + kernel
        return n

    @property
    def _convolutions(self) -> list[tuple[int, int]]:
        return list(zip(self.model.config.conv_kernel, self.model.config.conv_stride))

    def _n_own(self, n: int) -> int:
        """Frames of the model's front end of `n` samples."""
        for kernel, stride in self._convolutions:
            n = (n - kernel) // stride + 1
        return max(n, 0)


def open_upstream(source: str, name: str | None = None, *, teacher: bool = False) -> Upstream:
    """Open what ``--upstream`` names.

    Args:
        source: a run folder, checkpoint or model file of ours; a folder of Hugging Face's, or the
            name of a model there.
        name: of the row; default: the last part of `source`.
        teacher: of ours, the moving average.

    Raises:
        InputError: it is neither, or no speech encoder, or ours without the teacher asked for.
        ImportError: transformers is needed and absent.
    """
    path = Path(source)
    name = readable(name or path.name or source)
    config = path / "config.json"
    is_hf = (
        path.is_dir() and config.exists() and '"model_type"' in config.read_text(errors="replace")
    )
    if not is_hf and (path.exists() or path.suffix in (".pt", ".safetensors")):
        if not path.exists():
            raise InputError(f"upstream: no such file: {source}")
        return OurEncoder(name, "trained", load_encoder(path, teacher=teacher))
    local = path.parent != Path() and path.parent.is_dir()
    if not is_hf and (local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise InputError(f"upstream: no such file or folder: {source}")
    if is_hf and read_json(config).get("model_type") == "gmm_jepa":
        if teacher:
            raise InputError(f"teacher: {source} holds one encoder alone; give the run")
        return _open_exported(path, name)
    return _open_huggingface(source, name)


def _open_exported(path: Path, name: str) -> OurEncoder:
    """What ``gmm-jepa export --hf`` wrote, by this package's own class."""
    require("transformers", extra="probe")
    from gmm_jepa.export.modeling_gmm_jepa import GmmJepaModel

    try:
        model = GmmJepaModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from None
    return OurEncoder(name, "trained", SpeechEncoder(model.encoder))


def _open_huggingface(source: str, name: str) -> HuggingFaceEncoder:
    transformers = require("transformers", extra="probe")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        for wanted in ("feat_extract_norm", "conv_stride", "num_hidden_layers", "hidden_size"):
            if not hasattr(config, wanted):
                raise InputError(f"upstream: {source} is no speech encoder (no {wanted})")
        model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _not_loaded(source, error) from None
    return HuggingFaceEncoder(name, "trained", model, normalise=_normalises(source, config))


def _not_loaded(source: str | Path, error: Exception) -> InputError:
    """The first line of what the library says."""
    where = "" if Path(source).exists() else "no such folder here, and from Hugging Face "
    return InputError(f"upstream: {source}: {where}it cannot be loaded: {first_line(error)}")


def _normalises(source: str, config: Any) -> bool:
    """What the feature extractor says; without one, what goes with the kind of front end."""
    transformers = require("transformers", extra="probe")
    try:
        extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(source)
    except (OSError, ValueError):
        return config.feat_extract_norm == "layer"
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise InputError(f"upstream: {source} takes {extractor.sampling_rate} Hz, not 16000")
    return bool(extractor.do_normalize)


def _standardised(waveform: Tensor) -> Tensor:
    """Mean 0 and variance 1, as Hugging Face's feature extractor makes them."""
    centred = waveform - waveform.mean()
    return centred / (centred.square().mean() + 1e-7).sqrt()
