"""Blocks whose inside is computed again for the gradient: the same numbers, dropout included."""

from __future__ import annotations

import copy

import pytest
import torch

from gmm_jepa.models import ConformerConfig, TransformerConfig
from gmm_jepa.models.build import build_encoder

CONFIGS = {
    "conformer": ConformerConfig(
        channels=(4, 8), strides=(8,), residual_blocks=1, code_dim=16, layers=3, heads=4
    ),
    "transformer": TransformerConfig(conv_dim=8, code_dim=16, layers=3, heads=4, ffn_dim=32),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_and_gradients_with_dropout(kind, padded, precision):
    encoder = build_encoder(CONFIGS[kind]).train()
    again = copy.deepcopy(encoder)
    again.recomputes_blocks = True
    waveform = torch.randn(3, 4000)
    lengths = torch.tensor([4000, 2500, 1200]) if padded else None
    found = []
    for model in (encoder, again):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            encoded = model(waveform, lengths)
        encoded.output.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((encoded, gradients))
    (plain, expected), (other, gradients) = found
    torch.testing.assert_close(other.output, plain.output, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.layers, plain.layers, rtol=1e-6, atol=1e-7)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_less_is_kept_and_nothing_without_a_gradient():
    config = TransformerConfig(conv_dim=4, code_dim=32, layers=6, heads=4, ffn_dim=128)
    encoder = build_encoder(config).train()
    waveform, kept = torch.randn(2, 8000), []
    for encoder.recomputes_blocks in (False, True):
        held = {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoder(waveform)
        kept.append(sum(storage.nbytes() for storage in held.values()))
    assert kept[1] < 0.7 * kept[0]
    with torch.no_grad():
        assert not encoder(waveform).output.requires_grad
