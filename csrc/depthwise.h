// Depthwise convolution over time, one filter of odd length a channel, and its gradients.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// Frame-major, contiguous, channels a multiple of the set's lanes; n_taps is odd.
struct DepthwiseShape {
    int64_t n_rows, n_frames;
    int n_channels, n_taps;
};

// x (B, T, C), weight (C, K), bias (C,) or null -> out (B, T, C). The same bits for any n_threads.
void depthwise_conv(const DepthwiseShape& shape, const float* x, const float* weight,
                    const float* bias, float* out, const Kernels& kernels, int n_threads);

// Written in full; bias may be null. The same bits for any n_threads.
struct DepthwiseGradients {
    float *x, *weight, *bias;
};
void depthwise_conv_backward(const DepthwiseShape& shape, const float* grad, const float* x,
                             const float* weight, const DepthwiseGradients& out,
                             const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
