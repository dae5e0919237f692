// Density-adaptive attention over time (DAAM) and its gradients; gmm_jepa/ops/density.py has the
// formulas.
#pragma once

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

constexpr int kDensityChunks = 4;

// Frame-major (B, T, C), contiguous, float32; C is a multiple of kernels.lanes. Rows b have
// lengths[b] real frames, the first; null: all. Rows of fewer than 8 pass unchanged.
struct DensityShape {
    int64_t n_rows, n_frames;
    int n_channels;
    const int64_t* lengths;
};

// offsets and squared_widths (4, 4), by chunk and Gaussian. The same bits for any n_threads.
void density_attention(const DensityShape& shape, const float* offsets,
                       const float* squared_widths, const float* x, float* out,
                       const Kernels& kernels, int n_threads);

// Written in full: grad_x (B, T, C), grad_offsets and grad_squared_widths (4, 4).
void density_attention_backward(const DensityShape& shape, const float* offsets,
                                const float* squared_widths, const float* x, const float* grad,
                                float* grad_x, float* grad_offsets, float* grad_squared_widths,
                                const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
