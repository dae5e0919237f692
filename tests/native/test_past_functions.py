"""Operators called by their names, past the functions that check what they are given."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.ops import native

if not native.instruction_sets():
    pytest.skip(f"native module: {native.status()}", allow_module_level=True)


def _ones(*shapes):
    return [torch.ones(shape) for shape in shapes]


def test_operators_called_past_their_functions_check_shapes():
    frames, log_weights, means, variances = _ones((5, 8), (4,), (4, 8), (4, 8))
    options = (1.0, False, "fast", torch.float32)
    operator = torch.ops.gmm_jepa.gmm_posterior
    for wrong in (
        (frames, log_weights, means, variances[:1]),
        (frames, log_weights[:1], means, variances),
        (frames[:, :3], log_weights, means, variances),
        (frames[None], log_weights, means, variances),
    ):
        with pytest.raises(InputError, match="expected"):
            operator(*wrong, *options)
    spec = LogMelSpec()
    with pytest.raises(InputError, match=r"lengths: expected torch.int64 \(3,\)"):
        torch.ops.gmm_jepa.log_mel(
            torch.zeros(3, 4000),
            torch.tensor([4000]),
            spec.window(),
            spec.filters(),
            320,
            1e-6,
            torch.float32,
        )


X, HEADS = (1, 40, 32), (1, 2, 9, 16)
UNIT = ((32, 32, 3), (32,), (32, 32, 3), (32,))
ATTENTION = (*[HEADS] * 3, (2, 17), (1, 2, 9))
MODULE = ((32,), (32,), (64, 32), (64,), (32, 1, 5), (32,), (32,), (32,), (32, 32), (32,))
FEED_FORWARD = ((64, 32), (64,), (32, 64), (32,))
SELF_ATTENTION = ((96, 32), (96,), (32, 32), (32,), (2, 79), (2, 16), (2, 16), (2,))
# Shapes that fit, and what follows them.
PAST_FUNCTIONS = {
    "convolution_module": ((X, *MODULE), (None, None, 1e-5, 0.0, False)),
    "convolution_module_backward": (
        (X, X, (1, 40, 64), X, (1, 4), *MODULE),
        (None, None, 0.0, False),
    ),
    "density_attention": ((X, (4, 4), (4, 4)), (None,)),
    "density_attention_backward": ((X, X, (4, 4), (4, 4)), (None,)),
    "depthwise_conv": ((X, (32, 1, 3), (32,)), ()),
    "depthwise_conv_backward": ((X, X, (32, 3)), (True,)),
    "feed_forward": ((X, *FEED_FORWARD), (None, None, None, 1.0, 1e-5, 0.0, True, False)),
    "feed_forward_backward": (
        (X, X, (1, 40, 64), *FEED_FORWARD),
        (None, None, None, 1.0, 1e-5, 0.0, False),
    ),
    "gated_bias_attention": (ATTENTION, (None, None, 0.0)),
    "gated_bias_attention_backward": (
        (HEADS, HEADS, (1, 2, 9), *ATTENTION),
        (None, None, 0.0),
    ),
    "masked_kl": (((9, 5), (9, 8), (9,), (5,), (5, 8), (5, 8)), (1.0, True)),
    "masked_kl_targets": (((9, 5), (9, 5), (9,)), (True,)),
    "masked_mse": (((9, 5), (9, 5), (9,)), (True,)),
    "residual_block": ((X, (2, *UNIT[0]), (2, 32), (2, *UNIT[0]), (2, 32)), (None, [1, 3], False)),
    "residual_block_backward": (
        (X, X, (2, *UNIT[0]), (2, 32), (2, *UNIT[0]), (2, 32)),
        (None, [1, 3], False),
    ),
    "residual_unit": ((X, *UNIT), (None, 1, True, False)),
    "residual_unit_backward": ((X, X, X, *UNIT), (None, 1, False)),
    "self_attention": ((X, *SELF_ATTENTION), (None, None, 0.0, False)),
    "self_attention_backward": (
        (X, X, (1, 40, 96), X, (1, 2, 40), (1, 2, 40), *SELF_ATTENTION),
        (None, None, 0.0, False),
    ),
    "snake": ((X, (32,)), (None,)),
    "snake_backward": ((X, X, (32,)), (None,)),
    "strided_conv": ((X, (32, 32, 8), (32,)), (4, False)),
    "strided_conv_backward": (((1, 10, 32), X, (32, 32, 8)), (4, False)),
}


@pytest.mark.parametrize("name", PAST_FUNCTIONS)
def test_operators_called_past_their_functions_read_within_their_tensors(name):
    """Each tensor but the one that the others are to fit is too short, along each axis in turn."""
    shapes, options = PAST_FUNCTIONS[name]
    operator = getattr(torch.ops.gmm_jepa, name)
    operator(*_ones(*shapes), *options)
    fitted = 0 if not name.endswith("_backward") else 3 if HEADS in shapes else 1
    for i, shape in enumerate(shapes):
        if i == fitted:
            continue
        for axis in range(len(shape)):
            shorter = list(shapes)
            shorter[i] = (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :])
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                operator(*_ones(*shorter), *options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_and_lengths_called_past_their_functions(dtype):
    library = torch.ops.gmm_jepa
    labels = torch.zeros(9, dtype=dtype)
    logits, weights = torch.zeros(9, 5), torch.ones(9)
    if dtype == torch.int32:
        with pytest.raises(InputError, match=r"labels: expected torch.int64 \(9,\)"):
            library.masked_cross_entropy(logits, labels, weights, True)
    with pytest.raises(InputError, match="labels: expected"):
        library.masked_cross_entropy(logits, labels[:8], weights, True)
    x, a, spec = torch.zeros(2, 8, 16), torch.ones(16), LogMelSpec()
    library.snake(x, a, torch.tensor([8, 3], dtype=dtype))
    with pytest.raises(InputError, match="lengths: expected"):
        library.snake(x, a, torch.tensor([8], dtype=dtype))
    rest = (spec.window(), spec.filters(), 320, 1e-6, torch.float32)
    lengths = torch.tensor([1600, 800])
    got = library.log_mel(torch.randn(2, 1600), lengths.to(dtype), *rest)
    assert got[1].any(1).tolist() == [True] * 3 + [False] * 3


def test_an_average_of_lists_that_do_not_match():
    with pytest.raises(InputError, match="others: expected"):
        torch.ops.gmm_jepa.ema_update(_ones((9,)), _ones((8,)), 0.5)


def test_the_module_refuses_a_tuple_with_too_few_fields():
    weights = (0, 0, 0, 0)
    with pytest.raises(ValueError, match="expected a tuple of 6, got one of 5"):
        native.call("residual_unit", (0, 9, 16, 1, 0), weights, 0, 0, 0)
    with pytest.raises(ValueError, match="expected a tuple of 4, got one of 3"):
        native.call("residual_unit", (0, 9, 16, 1, 0, False), weights[1:], 0, 0, 0)
