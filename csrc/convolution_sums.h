// What convolutions of three taps have in common: the product, and the gradients of its weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convolution_windows.h"
#include "kernels.h"

namespace gmm_jepa {

constexpr int64_t kBlockFloats = 16384;  // of a block's own frames: 64 KB

// Threads that are worth it for a shape of residual units.
template <typename Shape>
int threads_for(const Shape& shape, int n_threads) {
    const int64_t work = shape.n_rows * shape.n_frames * shape.n_channels;
    return static_cast<int>(std::clamp<int64_t>(n_threads, 1, 1 + work / kBlockFloats));
}

// Pairs of bfloat16 where they are wanted and possible: channels fill whole vectors.
template <typename Shape>
bool takes_pairs(const Shape& shape, const Kernels& kernels) {
    return shape.narrow && kernels.pair_products && shape.n_channels % kernels.lanes == 0;
}

// to (n, width) = convolution of a window with packed weights.
template <typename Word>
void convolve(const Kernels& kernels, const Panels& panels, const Window<Word>& window,
              const std::vector<Word>& weights, const std::vector<float>& bias, int n, float* to) {
    const int words = window.row_words();
    multiply(kernels, ProductsOf<Word>{window.tap_rows(0), words, 1, window.stride() * words,
                                       weights.data(), bias.data(), to, panels.width(), n,
                                       panels.n_panels(), kTaps, words, false, panels.is_half()});
}

// Gradients of one convolution's weights, summed by one thread.
template <typename Word>
class WeightSums {
  public:
    WeightSums(const Kernels& kernels, const Panels& panels, int n_channels, int64_t most_frames)
        : kernels_(kernels),
          panels_(panels),
          n_channels_(n_channels),
          width_(panels.width()),
          stride_rows_(n_channels + kMostRows),
          weight_(size_t(kTaps) * stride_rows_ * width_),
          bias_(width_),
          grads_(size_t(most_frames + 1) * width_) {
        if (kValues<Word> == 2) pairs_.resize(size_t(most_frames + 1) / 2 * n_channels + kMostRows);
    }

    // Windows of the convolution's input, and of n gradients (n, C) of its output, of which n_real
    // are not zero.
    void add(const Window<Word>& inputs, const Window<Word>& window, const float* grads,
             int64_t n_real, int n) {
        const int C = n_channels_;
        kernels_.sum_rows(grads, n_real, C, bias_.data());
        const Word* b = window.tap_rows(1);
        if (kValues<Word> == 2 || width_ != C || panels_.n_panels() > 1) {
            panels_.put_rows(b, n, grads_.data());
            b = grads_.data();
        }
        for (int tap = 0; tap < kTaps; ++tap) {
            const Word* a = side_by_side(inputs.tap_rows(tap), n);
            multiply(kernels_, ProductsOf<Word>{a, 1, C, 0, b, nullptr,
                                                &weight_[size_t(tap) * stride_rows_ * width_], width_,
                                                C, panels_.n_panels(), 1,
                                                (n + kValues<Word> - 1) / kValues<Word>, true,
                                                panels_.is_half()});
        }
    }

    void add_to(float* weight, float* bias) const {
        constexpr int kTogether = 16;  // outputs, whose places in `weight` are far apart
        const int C = n_channels_;
        for (int o = 0; o < C; ++o) bias[o] += bias_[o];
        for (int first = 0; first < C; first += kTogether) {
            for (int i = 0; i < C; ++i) {
                for (int tap = 0; tap < kTaps; ++tap) {
                    const float* sums = &weight_[(size_t(tap) * stride_rows_ + i) * width_];
                    for (int o = first; o < std::min(C, first + kTogether); ++o) {
                        weight[(size_t(o) * C + i) * kTaps + tap] += sums[o];
                    }
                }
            }
        }
    }

  private:
    // n rows as words of C columns, each word with its neighbours in time.
    const float* side_by_side(const float* rows, int) { return rows; }
    const uint32_t* side_by_side(const uint32_t* rows, int n) {
        const int row = n_channels_ / 2;
        uint32_t* to = pairs_.data();
        for (int t = 0; t < n; t += 2, rows += 2 * row, to += n_channels_) {
            kernels_.pair_rows(rows, t + 1 < n ? rows + row : nullptr, n_channels_, to);
        }
        return pairs_.data();
    }

    const Kernels& kernels_;
    const Panels& panels_;
    int n_channels_, width_, stride_rows_;
    std::vector<float> weight_, bias_;  // (3, stride_rows, width), (width,)
    std::vector<Word> grads_;           // panels of (frames, columns)
    std::vector<uint32_t> pairs_;       // (pairs of frames, C)
};

}  // namespace gmm_jepa
