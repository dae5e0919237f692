"""The operators everything else is built on.

Each is a `torch.library.custom_op` under ``gmm_jepa::`` with a plain-torch kernel for every
device, a fake and (where a gradient makes sense) an autograd registration: PyTorch's dispatcher
picks the backend and `torch.compile` sees through. Faster kernels take the place of the plain
ones by ``register_kernel``. All work in chunks of bounded memory and are deterministic. All but
attention, convolutions and what is built of them accept empty inputs.
"""

from gmm_jepa.ops import (
    native,
    native_blocks,
    native_encoder,
    native_front_end,
    native_losses,
    native_mixture,
    triton_attention,
    triton_depthwise,
    triton_front_end,
    triton_gmm,
    triton_log_mel,
    triton_residual,
)
from gmm_jepa.ops.attention import gated_bias_attention
from gmm_jepa.ops.convolution_module import ConvolutionWeights, convolution_module
from gmm_jepa.ops.density import density_attention
from gmm_jepa.ops.depthwise import depthwise_conv
from gmm_jepa.ops.dropout import dropout
from gmm_jepa.ops.em import EMStatistics, em_statistics, kmeans_assign, kmeans_statistics
from gmm_jepa.ops.ema import ema_update
from gmm_jepa.ops.feed_forward import feed_forward
from gmm_jepa.ops.fused import takes_block, takes_float32
from gmm_jepa.ops.linear import linear, takes_linear
from gmm_jepa.ops.log_mel import log_mel
from gmm_jepa.ops.losses import (
    MaskedLoss,
    masked_cross_entropy,
    masked_kl,
    masked_kl_targets,
    masked_mse,
)
from gmm_jepa.ops.mixture import Ensemble, Mixture
from gmm_jepa.ops.packed import forget_mixtures
from gmm_jepa.ops.posterior import gmm_log_likelihood, gmm_posterior, gmm_topk
from gmm_jepa.ops.residual import residual_unit
from gmm_jepa.ops.residual_block import residual_block, takes_residual_block
from gmm_jepa.ops.self_attention import AttentionWeights, self_attention
from gmm_jepa.ops.snake import snake
from gmm_jepa.ops.strided import strided_conv
from gmm_jepa.ops.waveform import waveform_conv

__all__ = [
    "AttentionWeights",
    "ConvolutionWeights",
    "EMStatistics",
    "Ensemble",
    "MaskedLoss",
    "Mixture",
    "convolution_module",
    "density_attention",
    "depthwise_conv",
    "dropout",
    "em_statistics",
    "ema_update",
    "feed_forward",
    "forget_mixtures",
    "gated_bias_attention",
    "gmm_log_likelihood",
    "gmm_posterior",
    "gmm_topk",
    "kmeans_assign",
    "kmeans_statistics",
    "linear",
    "log_mel",
    "masked_cross_entropy",
    "masked_kl",
    "masked_kl_targets",
    "masked_mse",
    "native",
    "native_blocks",
    "native_encoder",
    "native_front_end",
    "native_losses",
    "native_mixture",
    "residual_block",
    "residual_unit",
    "self_attention",
    "snake",
    "strided_conv",
    "takes_block",
    "takes_float32",
    "takes_linear",
    "takes_residual_block",
    "triton_attention",
    "triton_depthwise",
    "triton_front_end",
    "triton_gmm",
    "triton_log_mel",
    "triton_residual",
    "waveform_conv",
]
