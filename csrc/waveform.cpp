// Frames are rows of a product whose neighbours lie a stride apart and share samples: nothing is
// unfolded. A block's samples and results go through scratch, for products take whole tiles.
#include "waveform.h"

#include <algorithm>

#include "linear_maps.h"

namespace gmm_jepa {
namespace {

constexpr int64_t kBlockFrames = 512;

int64_t n_blocks(const WaveformShape& shape) {
    return shape.n_rows * ((shape.n_frames + kBlockFrames - 1) / kBlockFrames);
}

}  // namespace

void waveform_conv(const WaveformShape& shape, const float* x, const float* taps,
                   const float* bias, float* out, const Kernels& kernels, int n_threads) {
    const int C = shape.n_channels, K = shape.n_taps;
    const Panels panels(kernels, C);
    const int width = panels.width();
    std::vector<float> packed(size_t(width) * K);
    panels.put_columns(taps, K, packed.data());
    const std::vector<float> padded_bias = panels.padded(bias);
    struct Scratch {
        std::vector<float> samples;
        Buffer<float> made;
    };
    const int64_t most = kBlockFrames + kMostRows;
    const auto make = [&] {
        return Scratch{std::vector<float>(most * shape.stride + K), Buffer<float>(most * width)};
    };
    over_row_blocks(shape.n_rows, shape.n_frames, kBlockFrames, n_threads, make,
                    [&](int64_t, int64_t row, int64_t first, int n, Scratch& s) {
        std::copy_n(x + row * shape.n_samples + first * shape.stride, (n - 1) * shape.stride + K,
                    s.samples.begin());
        multiply(kernels, Products{s.samples.data(), shape.stride, 1, 0, packed.data(),
                                   padded_bias.data(), s.made.data(), width, n, panels.n_panels(),
                                   1, K, false, panels.is_half()});
        float* to = out + (row * shape.n_frames + first) * C;
        if (width == C) return static_cast<void>(std::copy_n(s.made.data(), int64_t(n) * C, to));
        for (int t = 0; t < n; ++t) std::copy_n(&s.made[int64_t(t) * width], C, to + int64_t(t) * C);
    });
}

void waveform_conv_backward(const WaveformShape& shape, const float* x, const float* grad,
                            float* taps, float* bias, const Kernels& kernels, int n_threads) {
    const int C = shape.n_channels, K = shape.n_taps;
    const Panels panels(kernels, C);
    const int width = panels.width();
    const int64_t blocks = n_blocks(shape), stride_block = int64_t(K + kMostRows) * width;
    Buffer<float> parts(blocks * stride_block);  // (blocks, K, width)
    const std::vector<float> zeros(width);
    ColumnSums bias_sums(kernels, blocks, C);
    struct Scratch {
        std::vector<float> samples;
        Buffer<float> grads;
    };
    const auto make = [&] {
        return Scratch{std::vector<float>(kBlockFrames * shape.stride + K + kMostRows),
                       Buffer<float>(kBlockFrames * width)};
    };
    over_row_blocks(shape.n_rows, shape.n_frames, kBlockFrames, n_threads, make,
                    [&](int64_t i, int64_t row, int64_t first, int n, Scratch& s) {
        std::copy_n(x + row * shape.n_samples + first * shape.stride, (n - 1) * shape.stride + K,
                    s.samples.begin());
        const float* g = grad + (row * shape.n_frames + first) * C;
        bias_sums.put(i, g, n);
        panels.put_rows(g, n, s.grads.data());
        multiply(kernels, Products{s.samples.data(), 1, shape.stride, 0, s.grads.data(),
                                   zeros.data(), &parts[i * stride_block], width, K,
                                   panels.n_panels(), 1, n, false, panels.is_half()});
    });
    std::vector<double> sums(size_t(K) * width);
    for (int64_t i = 0; i < blocks; ++i) {
        for (size_t j = 0; j < sums.size(); ++j) sums[j] += parts[i * stride_block + j];
    }
    for (int k = 0; k < K; ++k) {
        for (int c = 0; c < C; ++c) taps[c * K + k] = static_cast<float>(sums[k * width + c]);
    }
    bias_sums.add_up(bias);
}

}  // namespace gmm_jepa
