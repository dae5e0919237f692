// A vector of channels at a time: its filters lie side by side, a tap a vector. The gradient of x is
// the convolution of the gradient with the taps turned round; those of the weights are summed over
// all rows by the thread that has the channels.
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

// (K, lanes) of `lanes` channels of weight (C, K).
void lay_out(const float* weight, int n_taps, int lanes, bool turned, float* taps) {
    for (int j = 0; j < n_taps; ++j) {
        const int from = turned ? n_taps - 1 - j : j;
        for (int c = 0; c < lanes; ++c) taps[j * lanes + c] = weight[c * n_taps + from];
    }
}

// Calls run(row, first channel) for all rows and vectors of channels.
template <typename Run>
void over_vectors(int64_t n_rows, const DepthwiseShape& shape, int lanes, int n_threads,
                  const Run& run) {
    const int64_t n = n_rows * (shape.n_channels / lanes);
    over_shares(n, n, n_threads, [&](int64_t i) { run(i % n_rows, i / n_rows * lanes); });
}

void convolve(const DepthwiseShape& shape, const float* x, const float* weight, const float* bias,
              bool turned, float* out, const Kernels& kernels, int n_threads) {
    const int lanes = kernels.lanes;
    AlignedVector<float> taps(size_t(shape.n_taps) * shape.n_channels), none(lanes);
    for (int c = 0; c < shape.n_channels; c += lanes) {
        lay_out(weight + int64_t(c) * shape.n_taps, shape.n_taps, lanes, turned,
                &taps[size_t(c) * shape.n_taps]);
    }
    over_vectors(shape.n_rows, shape, lanes, n_threads, [&](int64_t row, int64_t c) {
        const int64_t at = row * shape.n_frames * shape.n_channels + c;
        kernels.depthwise(x + at, shape.n_channels, int(shape.n_frames), &taps[c * shape.n_taps],
                          shape.n_taps, bias ? bias + c : none.data(), out + at);
    });
}

}  // namespace

void depthwise_conv(const DepthwiseShape& shape, const float* x, const float* weight,
                    const float* bias, float* out, const Kernels& kernels, int n_threads) {
    convolve(shape, x, weight, bias, false, out, kernels, n_threads);
}

void depthwise_conv_backward(const DepthwiseShape& shape, const float* grad, const float* x,
                             const float* weight, const DepthwiseGradients& out,
                             const Kernels& kernels, int n_threads) {
    convolve(shape, grad, weight, nullptr, true, out.x, kernels, n_threads);
    const int lanes = kernels.lanes, K = shape.n_taps;
    over_vectors(1, shape, lanes, n_threads, [&](int64_t, int64_t c) {
        AlignedVector<float> of_row(size_t(K + 1) * lanes);  // taps, then the bias
        std::vector<double> sums(of_row.size());
        float* of_bias = &of_row[size_t(K) * lanes];
        for (int64_t row = 0; row < shape.n_rows; ++row) {
            const int64_t at = row * shape.n_frames * shape.n_channels + c;
            std::fill(of_row.begin(), of_row.end(), 0.0f);
            kernels.depthwise_weights(x + at, grad + at, shape.n_channels, int(shape.n_frames), K,
                                      of_row.data());
            kernels.sum_columns(grad + at, shape.n_channels, int(shape.n_frames), of_bias);
            for (size_t i = 0; i < sums.size(); ++i) sums[i] += of_row[i];
        }
        for (int i = 0; i < lanes; ++i) {
            for (int j = 0; j < K; ++j) {
                out.weight[(c + i) * K + j] = float(sums[size_t(j) * lanes + i]);
            }
            if (out.bias) out.bias[c + i] = float(sums[size_t(K) * lanes + i]);
        }
    });
}

}  // namespace gmm_jepa
