// Strided convolution of a waveform, one channel in, and the gradients of its filters.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gmm_jepa {

// Frame t of a row is made of samples t stride to t stride + n_taps - 1, which there are.
struct WaveformShape {
    int64_t n_rows, n_samples, n_frames, stride;
    int n_taps, n_channels;
};

// x (B, S), taps (C, K), bias (C,) -> out (B, T, C). The same bits for any n_threads.
void waveform_conv(const WaveformShape& shape, const float* x, const float* taps,
                   const float* bias, float* out, const Kernels& kernels, int n_threads);

// Written in full: taps (C, K) and bias (C,). The same bits for any n_threads.
void waveform_conv_backward(const WaveformShape& shape, const float* x, const float* grad,
                            float* taps, float* bias, const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
