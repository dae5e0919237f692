// Convolution of frames with stride s and 2 s taps, padded by s / 2, and its gradients.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gmm_jepa {

// Frame-major, contiguous, float32. n_in is a multiple of 16, n_out and 2 s n_in are of kMapMultiple.
// `narrow`: what is multiplied is rounded to bfloat16; the set has pair_products then.
struct StridedShape {
    int64_t n_rows, n_frames;
    int n_in, n_out, stride;
    bool narrow;

    int64_t frames_out() const { return (n_frames + stride / 2 * 2) / stride - 1; }
};

// x (B, T, C), weight (C', 2 s, C), bias (C',) -> out (B, T', C'). The same bits for any n_threads.
void strided_conv(const StridedShape& shape, const float* x, const float* weight,
                  const float* bias, float* out, const Kernels& kernels, int n_threads);

// Written in full: x (B, T, C), and the weights'. The same bits for any n_threads.
struct StridedGradients {
    float *x, *weight, *bias;
};
void strided_conv_backward(const StridedShape& shape, const float* x, const float* weight,
                           const float* grad, const StridedGradients& out, const Kernels& kernels,
                           int n_threads);

}  // namespace gmm_jepa
