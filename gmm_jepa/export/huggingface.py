"""A folder that ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gmm_jepa.config import to_dict
from gmm_jepa.encoder import SpeechEncoder
from gmm_jepa.files import read_json, refuse_existing, write_json, write_text, written_aside
from gmm_jepa.tensor_files import save_tensors
from gmm_jepa.train.trained import Trained

_CODE = ("configuration_gmm_jepa.py", "modeling_gmm_jepa.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_gmm_jepa.GmmJepaConfig",
    "AutoModel": "modeling_gmm_jepa.GmmJepaModel",
}


def save_huggingface(
    encoder: SpeechEncoder, out: Path, *, trained: Trained | None = None, teacher: bool = False
) -> None:
    """Write config, weights, feature extractor, code and model card.

    Args:
        encoder: to be written.
        out: a folder that does not exist yet.
        trained: where it comes from; data, settings and measurements of the run go into the card.
        teacher: it is the moving average, which no evaluation measures.

    Raises:
        InputError: the folder exists.
        ImportError: safetensors is absent.
    """
    refuse_existing(out)
    with written_aside(out) as aside:
        aside.mkdir()
        save_tensors(aside / "model.safetensors", encoder.state_dict(), {"format": "pt"})
        write_json(aside / "config.json", _config(encoder))
        write_json(aside / "preprocessor_config.json", _preprocessor())
        for name in _CODE:
            shutil.copy(Path(__file__).with_name(name), aside / name)
        write_text(aside / "README.md", _card(encoder, trained, teacher=teacher))


def _config(encoder: SpeechEncoder) -> dict[str, Any]:
    settings = to_dict(encoder.encoder.config)
    return {
        "model_type": "gmm_jepa",
        "architectures": ["GmmJepaModel"],
        "auto_map": _AUTO_MAP,
        "encoder": settings,
        "dtype": "float32",
    }


def _preprocessor() -> dict[str, Any]:
    """Padding and nothing else: the encoder takes the waveform as it is."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": False,
        "return_attention_mask": True,
    }


def _card(encoder: SpeechEncoder, trained: Trained | None, *, teacher: bool) -> str:
    """The model card, every figure read from the run."""
    config = encoder.encoder.config
    n_parameters = sum(p.numel() for p in encoder.parameters())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [speech, self-supervised, gmm-jepa]",
        "---",
        "",
        "# Speech encoder pretrained with GMM-JEPA",
        "",
        f"{type(encoder.encoder).__name__}, {n_parameters / 1e6:.1f} M parameters, width "
        f"{config.code_dim}, {config.layers} blocks, one frame every {config.hop_samples} samples "
        "of 16 kHz audio. Method: arXiv 2602.09040.",
        *["These are the weights of the teacher, the encoder's moving average."] * teacher,
        "",
        "```python",
        "from transformers import AutoFeatureExtractor, AutoModel",
        "",
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()',
        'extractor = AutoFeatureExtractor.from_pretrained("FOLDER")',
        'batch = extractor(waveforms, sampling_rate=16000, padding=True, return_tensors="pt")',
        "hidden = model(**batch, output_hidden_states=True).hidden_states",
        "```",
        "",
        "It needs the package `gmm_jepa`.",
        "",
    ]
    if trained is not None:
        lines += _provenance(trained, teacher=teacher)
    return "\n".join(lines)


def _provenance(trained: Trained, *, teacher: bool) -> list[str]:
    """What the run was trained on, how, and what was measured."""
    folder, step = trained.folder, trained.step
    sources, recipe = folder.read()
    lines = [
        "## Training",
        "",
        f"System {recipe.system}, {step} of {recipe.train.steps} steps of "
        f"{recipe.data.batch_s:g} s, learning rate {recipe.train.learning_rate:g}, "
        f"seed {recipe.seed}, on {', '.join(Path(path).name for path in sources.audio)}.",
        "",
    ]
    found = read_json(folder.evaluation) if folder.evaluation.exists() else {}
    if teacher or found.get("steps") != step:
        return [*lines, "These weights were not evaluated."]
    lines += ["## Accuracy of linear probes", "", "| task | test | features | accuracy, % |"]
    lines += ["| --- | --- | --- | --- |"]
    for probe in found["probes"]:
        about = f"| {probe['task']} | {probe['split']} |"
        lines += [
            f"{about} {row['features']} | {100 * row['accuracy']:.1f} |" for row in probe["rows"]
        ]
    return [*lines, ""]
