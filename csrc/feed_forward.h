// The feed-forward part of a block, x + scale drop(W2 drop(gelu(W1 norm(x) + b1)) + b2), with or
// without a norm of each frame, and its gradients.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// Both sizes are multiples of kMapMultiple. `narrow`: what is multiplied is rounded to bfloat16; the
// set has pair_products then. `dropping`: of hidden values, and a second mask of its seed of outputs;
// a frame's is drawn by its number.
struct FeedForwardShape {
    int64_t n_rows;
    int n_dims, n_hidden;
    float scale, epsilon;
    bool narrow;
    Dropout dropping;
};

// Weights as torch has them: up (n_hidden, n_dims), down (n_dims, n_hidden).
struct FeedForwardWeights {
    const float *up, *up_bias;
    const float *down, *down_bias;
    const float *norm, *norm_bias;  // (n_dims,), or null
};

// x (n_rows, n_dims) -> out, the same. `hidden` (n_rows, n_hidden), bfloat16 if narrow and float32
// else, receives what `up` made, for the gradient; may be null. The same bits for any n_threads.
void feed_forward(const FeedForwardShape& shape, const FeedForwardWeights& weights, const float* x,
                  void* hidden, float* out, const Kernels& kernels, int n_threads);

// Written in full: x (n_rows, n_dims), and the weights', the norm's where there is one.
struct FeedForwardGradients {
    float *x, *up, *up_bias, *down, *down_bias, *norm, *norm_bias;
};
void feed_forward_backward(const FeedForwardShape& shape, const FeedForwardWeights& weights,
                           const float* x, const void* hidden, const float* grad,
                           const FeedForwardGradients& out, const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
