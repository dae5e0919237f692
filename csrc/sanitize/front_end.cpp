// Rounds of a front end's operators that take blocks of frames: what is written was NaN before.
#include <cstdint>
#include <numeric>

#include "linear_maps.h"
#include "residual_block.h"
#include "sanitize/drawn.h"
#include "strided.h"
#include "waveform.h"

namespace gmm_jepa {
namespace {

// Of a row: few, some, or at times around a block's own.
int64_t drawn_frames(int64_t block) {
    if (!any(0, 4)) return block * any(1, 2) + any(-1, 1);
    return any(0, 2) ? any(1, 150) : any(1, 3);
}

void waveform_round(const Kernels& kernels) {
    const int64_t B = any(0, 3), T = drawn_frames(512), stride = any(1, 12);
    const int K = static_cast<int>(any(1, 70)), C = static_cast<int>(any(1, 70));
    const int64_t S = (T - 1) * stride + K + any(0, stride - 1);
    const std::vector<float> x = drawn(B * S), grad = drawn(B * T * C), bias = drawn(C),
                             taps = drawn(int64_t(C) * K, width_scale(K));
    const WaveformShape shape{B, S, T, stride, K, C};
    on_any_threads("waveform convolution", kernels, [&](int threads, Results* to) {
        waveform_conv(shape, x.data(), taps.data(), bias.data(), to->add(B * T * C), kernels,
                      threads);
        float* grad_taps = to->add(int64_t(C) * K);
        waveform_conv_backward(shape, x.data(), grad.data(), grad_taps, to->add(C), kernels,
                               threads);
    });
}

void strided_round(const Kernels& kernels, bool narrow) {
    const int strides[] = {1, 2, 3, 5, 8, 16, 32};
    const int stride = strides[any(0, 6)], multiple = 16 / std::gcd(16, stride);
    // Rounding takes whole vectors of what a block of frames sees.
    const int n_in = static_cast<int>((narrow ? 16 : multiple) * any(1, 3));
    const int n_out = static_cast<int>(kMapMultiple * any(1, 3));
    const int64_t B = any(0, 3), wanted = drawn_frames(32);
    const int64_t T = (wanted + 1) * stride - stride / 2 * 2 + any(0, stride - 1);
    const StridedShape shape{B, T, n_in, n_out, stride, narrow};
    const int64_t n = B * T * n_in, n_made = B * shape.frames_out() * n_out;
    const int64_t n_weights = int64_t(n_out) * 2 * stride * n_in;
    const std::vector<float> x = drawn(n), grad = drawn(n_made), bias = drawn(n_out),
                             weight = drawn(n_weights, width_scale(2 * stride * n_in));
    on_any_threads("strided convolution", kernels, [&](int threads, Results* to) {
        strided_conv(shape, x.data(), weight.data(), bias.data(), to->add(n_made), kernels,
                     threads);
        const StridedGradients gradients{to->add(n), to->add(n_weights), to->add(n_out)};
        strided_conv_backward(shape, x.data(), weight.data(), grad.data(), gradients, kernels,
                              threads);
    });
}

void residual_block_round(const Kernels& kernels, bool narrow) {
    const int C = any(0, 1) ? 16 : 32;
    const int64_t B = any(0, 2), T = drawn_frames(16384 / C), n = B * T * C;
    std::vector<int64_t> dilations(any(1, 4));
    for (int64_t& dilation : dilations) dilation = any(0, 2) ? any(1, 5) : any(1, 40);
    const int64_t U = static_cast<int64_t>(dilations.size()), n_weights = U * C * C * 3;
    const std::vector<float> x = drawn(n), grad = drawn(n),
                             weight1 = drawn(n_weights, width_scale(3 * C)),
                             weight2 = drawn(n_weights, width_scale(3 * C)),
                             bias1 = drawn(U * C), bias2 = drawn(U * C);
    const Lengths lengths(B, T);
    const ResidualBlockShape shape{B, T, C, dilations, lengths.data(), narrow};
    const ResidualWeights weights{weight1.data(), bias1.data(), weight2.data(), bias2.data()};
    on_any_threads("residual block", kernels, [&](int threads, Results* to) {
        residual_block(shape, weights, x.data(), to->add(n), kernels, threads);
    });
    const int threads = static_cast<int>(any(1, 4));
    run_twice("gradients of a residual block", kernels, threads, threads, [&](int, Results* to) {
        const ResidualGradients gradients{to->add(n), to->add(n_weights), to->add(U * C),
                                          to->add(n_weights), to->add(U * C)};
        residual_block_backward(shape, weights, x.data(), grad.data(), gradients, kernels, threads);
    });
}

}  // namespace

void front_end_round(const Kernels& kernels) {
    waveform_round(kernels);
    for (const bool narrow : {false, true}) {
        // Without products of bfloat16 a residual block takes `narrow` for a permission.
        residual_block_round(kernels, narrow);
        if (narrow && !kernels.pair_products) continue;
        strided_round(kernels, narrow);
    }
}

}  // namespace gmm_jepa
