// Operands of a convolution over frames, of float32 or of pairs of bfloat16: windows of frames, and
// weights in panels. A `Word` is a float or a pair, see kernels.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace gmm_jepa {

constexpr int kTaps = 3;
constexpr int kMostRows = 16;  // that products may go beyond a matrix

template <typename Word>
constexpr int kValues = std::is_same_v<Word, float> ? 1 : 2;  // of a word

inline void multiply(const Kernels& kernels, const Products& p) { kernels.products(p); }
inline void multiply(const Kernels& kernels, const PairProducts& p) { kernels.pair_products(p); }

inline void put_values(const Kernels& kernels, const float* x, ptrdiff_t n, bool activate,
                       float* to) {
    if (activate) return kernels.activate_rows(x, n, to);
    std::memcpy(to, x, n * sizeof(float));
}
inline void put_values(const Kernels& kernels, const float* x, ptrdiff_t n, bool activate,
                       uint32_t* to) {
    kernels.round_rows(x, n, activate, to);
}

// Weights (C_out, C_in, 3) in panels, for products of windows: rows by tap and input channel.
class Panels {
  public:
    Panels(const Kernels& kernels, int n_channels) : kernels_(kernels), n_channels_(n_channels) {
        const int last = n_channels % kernels.product_columns;
        is_half_ = last && last <= kernels.lanes;
        columns_ = is_half_ ? kernels.lanes : kernels.product_columns;
        n_panels_ = (n_channels + columns_ - 1) / columns_;
    }

    bool is_half() const { return is_half_; }
    int n_panels() const { return n_panels_; }
    int width() const { return n_panels_ * columns_; }

    // `transposed` is the adjoint: inputs and outputs change places, taps run backwards.
    void pack(const float* weight, bool transposed, std::vector<float>* out) const {
        const int C = n_channels_;
        out->assign(size_t(width()) * kTaps * C, 0.0f);
        float* row = out->data();
        for (int first = 0; first < C; first += columns_) {
            const int n = std::min(columns_, C - first);
            for (int tap = 0; tap < kTaps; ++tap) {
                for (int k = 0; k < C; ++k, row += columns_) {
                    const float* from = transposed
                                            ? weight + (size_t(k) * C + first) * kTaps + 2 - tap
                                            : weight + (size_t(first) * C + k) * kTaps + tap;
                    const size_t step = transposed ? kTaps : size_t(kTaps) * C;
                    for (int c = 0; c < n; ++c) row[c] = from[c * step];
                }
            }
        }
    }
    void pack(const float* weight, bool transposed, std::vector<uint32_t>* out) const {
        std::vector<float> wide;
        pack(weight, transposed, &wide);
        out->resize(wide.size() / 2);
        std::vector<uint32_t> pair(columns_);
        for (size_t at = 0; at < out->size(); at += columns_) {
            kernels_.round_rows(&wide[2 * at], 2 * columns_, false, pair.data());
            kernels_.pair_rows(pair.data(), &pair[columns_ / 2], columns_, &(*out)[at]);
        }
    }

    // Filters (C, K) as columns: panels of (K, columns), zero behind the last channel.
    void put_columns(const float* filters, int n_taps, float* to) const {
        for (int first = 0; first < width(); first += columns_) {
            for (int k = 0; k < n_taps; ++k) {
                for (int c = first; c < first + columns_; ++c) {
                    *to++ = c < n_channels_ ? filters[size_t(c) * n_taps + k] : 0.0f;
                }
            }
        }
    }

    std::vector<float> padded(const float* bias) const {
        std::vector<float> out(width());
        if (bias) std::copy_n(bias, n_channels_, out.begin());
        return out;
    }

    // n rows of C values as panels of rows.
    void put_rows(const float* values, int n, float* to) const {
        for (int first = 0; first < n_channels_; first += columns_) {
            const int count = std::min(columns_, n_channels_ - first);
            for (int t = 0; t < n; ++t, to += columns_) {
                std::copy_n(values + int64_t(t) * n_channels_ + first, count, to);
            }
        }
    }
    // The same of pairs of rows, where channels fill vectors.
    void put_rows(const uint32_t* values, int n, uint32_t* to) const {
        const int row = n_channels_ / 2;
        for (int first = 0; first < n_channels_; first += columns_) {
            const int count = std::min(columns_, n_channels_ - first);
            for (int t = 0; t < n; t += 2, to += columns_) {
                const uint32_t* from = values + int64_t(t) * row + first / 2;
                kernels_.pair_rows(from, t + 1 < n ? from + row : nullptr, count, to);
            }
        }
    }

  private:
    const Kernels& kernels_;
    int n_channels_, columns_, n_panels_;
    bool is_half_;
};

// Rows of C values, that of frame t at (t - start) stride.
struct Frames {
    const float* values;
    int64_t start, stride;
    const float* at(int64_t t) const { return values + (t - start) * stride; }
};

// Frames of a block and what three taps `dilation` apart reach around them. Frame
// start + r + (tap - 1) dilation is row r + tap * stride(): one run of rows where taps are near, one
// of each tap where they are far.
template <typename Word>
class Window {
  public:
    Window(const Kernels& kernels, int n_channels, int64_t most_frames, int64_t dilation)
        : kernels_(kernels), dilation_(dilation), n_channels_(n_channels) {
        const int64_t most = most_frames + 2;
        rows_.resize((most + 2 * std::min(dilation, most) + kMostRows) * row_words());
    }

    // n frames from `start` on; zero where the row has none, and from `stop` on.
    void fill(int64_t start, int n, int64_t stop, const Frames& frames, bool activate) {
        stride_ = std::min<int64_t>(dilation_, n);
        if (stride_ == dilation_) {
            return copy(start - dilation_, n + 2 * dilation_, stop, frames, activate, rows_.data());
        }
        for (int tap = 0; tap < kTaps; ++tap) {
            copy(start + (tap - 1) * dilation_, n, stop, frames, activate,
                 &rows_[tap * stride_ * row_words()]);
        }
    }

    int row_words() const { return n_channels_ / kValues<Word>; }
    const Word* tap_rows(int tap) const { return rows_.data() + tap * stride_ * row_words(); }
    int64_t stride() const { return stride_; }

  private:
    void copy(int64_t start, int64_t n, int64_t stop, const Frames& frames, bool activate,
              Word* to) const {
        const int64_t end = start + n, C = n_channels_;
        const int64_t first = std::clamp<int64_t>(0, start, end);
        const int64_t last = std::clamp(stop, first, end);
        std::fill_n(to, (first - start) * row_words(), Word{});
        std::fill_n(to + (last - start) * row_words(), (end - last) * row_words(), Word{});
        to += (first - start) * row_words();
        if (frames.stride == C && first < last) {
            return put_values(kernels_, frames.at(first), (last - first) * C, activate, to);
        }
        for (int64_t t = first; t < last; ++t, to += row_words()) {
            put_values(kernels_, frames.at(t), C, activate, to);
        }
    }

    const Kernels& kernels_;
    int64_t dilation_, stride_ = 0;
    int n_channels_;
    std::vector<Word> rows_;
};

}  // namespace gmm_jepa
