// Density-adaptive attention over time (DAAM) and its gradients; gmm_jepa/ops/density.py has the
// formulas.
#pragma once

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

constexpr int kDensityChunks = 4;

// offsets and squared_widths (4, 4), by chunk and Gaussian; x (B, T, C) -> out, the same. Rows of fewer
// than 8 frames pass unchanged. The same bits for any n_threads.
void density_attention(const FramesShape& shape, const float* offsets,
                       const float* squared_widths, const float* x, float* out,
                       const Kernels& kernels, int n_threads);

// Written in full: grad_x (B, T, C), grad_offsets and grad_squared_widths (4, 4).
void density_attention_backward(const FramesShape& shape, const float* offsets,
                                const float* squared_widths, const float* x, const float* grad,
                                float* grad_x, float* grad_offsets, float* grad_squared_widths,
                                const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
