// Several residual units in a row, each x + conv(lrelu(conv(lrelu(x)))), and their gradients.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "residual.h"

namespace gmm_jepa {

// Channels for which the module takes units together: their panels are full in every set.
inline bool takes_together(int n_channels) { return n_channels == 16 || n_channels == 32; }

// As ResidualShape, with a dilation for every unit; n_channels as above.
struct ResidualBlockShape {
    int64_t n_rows, n_frames;
    int n_channels;
    std::vector<int64_t> dilations;
    const int64_t* lengths;
    bool narrow;
};

// Of U units: weights (U, C, C, 3), biases (U, C). x (B, T, C), zero beyond a row's length -> out, the
// same. The same bits for any n_threads.
void residual_block(const ResidualBlockShape& shape, const ResidualWeights& weights,
                    const float* x, float* out, const Kernels& kernels, int n_threads);

// Written in full: grad_x (B, T, C) and those of the weights. The same bits for the same n_threads.
void residual_block_backward(const ResidualBlockShape& shape, const ResidualWeights& weights,
                             const float* x, const float* grad, const ResidualGradients& out,
                             const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
