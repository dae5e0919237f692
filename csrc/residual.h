// One unit of a residual block, x + conv(lrelu(conv(lrelu(x)))), and its gradients.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// Frame-major, contiguous, float32. Rows b have lengths[b] real frames, the first; null: all.
// `narrow`: what is multiplied may be rounded to bfloat16, where the set has such products.
struct ResidualShape {
    int64_t n_rows, n_frames;
    int n_channels;
    int64_t dilation;
    const int64_t* lengths;
    bool narrow;
};

// Convolutions of three taps, C -> C, as torch has them: weight (C, C, 3) by output, input, tap; of
// several units, one after the other.
struct ResidualWeights {
    const float *weight1, *bias1;  // dilated
    const float *weight2, *bias2;
};

// x (B, T, C), zero beyond a row's length -> out, the same. `hidden` (B, T, C) receives what the
// first convolution made, for the gradient; may be null. The same bits for any n_threads.
void residual_unit(const ResidualShape& shape, const ResidualWeights& weights, const float* x,
                   float* hidden, float* out, const Kernels& kernels, int n_threads);

// Written in full: grad_x (B, T, C) and those of the weights, of the weights' shapes. The same bits
// for the same n_threads.
struct ResidualGradients {
    float *x, *weight1, *bias1, *weight2, *bias2;
};
void residual_unit_backward(const ResidualShape& shape, const ResidualWeights& weights,
                            const float* x, const float* hidden, const float* grad,
                            const ResidualGradients& out, const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
