// Log-mel frames: window, real FFT, power, sparse mel, log; one pass per group of frames.
#pragma once

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

struct LogMelSettings {
    const float* window;   // (n_fft,)
    const float* filters;  // (n_fft / 2 + 1, n_mels), contiguous
    int n_fft, n_mels;
    int64_t hop;
    float floor;
};

// True where n_fft is even and n_fft / 2 is a product of 2, 3 and 5.
bool log_mel_supports(int n_fft);

// waveform (B, S); lengths (B,) within 0..S; out (B, S / hop + 1, n_mels), contiguous, written in
// full. T is float, or int16_t, which is divided by 32,768. The same bits for any n_threads.
template <typename T>
void log_mel(const Matrix<T>& waveform, const int64_t* lengths, const LogMelSettings& settings,
             float* out, const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
