// The components that matter for each frame of a group, and their exact log-densities.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "screened_mixture.h"

namespace gmm_jepa {

// Scratch of one thread. Frames are rows of n_dims_padded values, zero behind the last dimension.
class Candidates {
  public:
    // Groups hold mixture.group() frames, or n_frames where these are fewer.
    Candidates(const ScreenedMixture& mixture, double margin, int64_t n_frames)
        : mixture_(mixture),
          margin_(margin),
          group_(static_cast<int>(std::clamp<int64_t>(n_frames, 1, mixture.group()))),
          words_(size_t(padded(group_)) * mixture.screen.n_words),
          stride_(static_cast<int>(mixture.screen.bias.size())),
          scores_(size_t(padded(group_)) * stride_),
          frame_(mixture.n_dims_padded),
          found_(stride_ + mixture.n_components),
          log_joint_(found_.size()),
          usable_(padded(group_)),
          best_(padded(group_)) {}

    int group() const { return group_; }

    // Screens `n` <= group() frames; `find` then refers to them.
    template <typename T>
    void screen(const T* frames, int n) {
        const ScreenParameters& p = mixture_.screen;
        for (int i = 0; i < n; ++i) {
            const T* x = frames + size_t(i) * mixture_.n_dims_padded;
            usable_[i] = p.pack(x, &words_[size_t(i) * p.n_words]);
        }
        std::fill(words_.begin() + size_t(n) * p.n_words,
                  words_.begin() + size_t(padded(n)) * p.n_words, 0u);
        p.run(words_.data(), padded(n), scores_.data(), best_.data());
    }

    // Finds the components of frame i of the group; returns how many, at least one. NaN in
    // the frame or the mixture leaves NaN among their log-densities, an infinity minus infinity.
    template <typename T>
    int find(const T* frames, int i) {
        const T* x = frames + size_t(i) * mixture_.n_dims_padded;
        std::copy(x, x + mixture_.n_dims_padded, frame_.begin());
        const float* scores = &scores_[size_t(i) * stride_];
        const Kernels& kernels = mixture_.kernels;
        int n = 0;
        float threshold = -std::numeric_limits<float>::infinity();
        if (usable_[i] && best_[i] > threshold) {
            found_[0] = kernels.find(scores, stride_, best_[i]);
            compute(0, 1);
            threshold = mixture_.screen.threshold(log_joint_[0], margin_);
        }
        if (threshold > -std::numeric_limits<float>::infinity()) {
            n = kernels.at_least(scores, stride_, threshold, found_.data());
            const std::vector<int32_t>& always = mixture_.screen.unscreened;
            std::copy(always.begin(), always.end(), &found_[n]);
            n += static_cast<int>(always.size());
            compute(0, n);
        } else {
            n = find_all(frames, i);
        }
        return keep(n);
    }

    // All K components of frame i of the group.
    template <typename T>
    int find_all(const T* frames, int i) {
        const T* x = frames + size_t(i) * mixture_.n_dims_padded;
        std::copy(x, x + mixture_.n_dims_padded, frame_.begin());
        for (int k = 0; k < mixture_.n_components; ++k) found_[k] = k;
        compute(0, mixture_.n_components);
        largest_ = most(mixture_.n_components);
        return mixture_.n_components;
    }

    const int32_t* components() const { return found_.data(); }
    double* log_joint() { return log_joint_.data(); }
    double largest() const { return largest_; }

  private:
    int padded(int n) const { return static_cast<int>(round_up(n, mixture_.screen.screen->tile)); }

    void compute(int start, int stop) {
        mixture_.kernels.distances(frame_.data(), mixture_.means.data(),
                                   mixture_.precisions.data(), mixture_.n_dims_padded,
                                   &found_[start], stop - start, &log_joint_[start]);
        for (int j = start; j < stop; ++j) {
            log_joint_[j] = mixture_.constants[found_[j]] - 0.5 * log_joint_[j];
        }
    }

    double most(int n) const {
        double value = -std::numeric_limits<double>::infinity();
        for (int j = 0; j < n; ++j) value = std::max(value, log_joint_[j]);
        return value;
    }

    // Drops what the exact values put below the margin; NaN is kept, for the caller to see.
    int keep(int n) {
        largest_ = most(n);
        const double lowest = largest_ - margin_;
        int kept = 0;
        for (int j = 0; j < n; ++j) {
            if (log_joint_[j] < lowest) continue;
            found_[kept] = found_[j];
            log_joint_[kept++] = log_joint_[j];
        }
        return kept;
    }

    const ScreenedMixture& mixture_;
    double margin_;
    int group_;
    AlignedVector<uint32_t> words_;
    int stride_;
    AlignedVector<float> scores_;
    std::vector<double> frame_;
    std::vector<int32_t> found_;
    std::vector<double> log_joint_;
    double largest_ = 0.0;
    std::vector<char> usable_;
    std::vector<float> best_;
};

// Copies rows `start` to `start + n` of the caller's frames into padded rows.
template <typename T>
void load_rows(const Matrix<T>& frames, int64_t start, int n, int n_dims_padded, T* rows) {
    for (int i = 0; i < n; ++i, rows += n_dims_padded) {
        const T* x = frames.data + (start + i) * frames.stride_row;
        for (int64_t d = 0; d < frames.n_columns; ++d) rows[d] = x[d * frames.stride_column];
    }
}

// Log-densities over a temperature become posteriors in place; returns the sum of their exponentials
// over that of the largest: NaN where one is not finite.
inline double normalise(double* values, int n, double largest, double temperature) {
    double total = 0.0;
    for (int j = 0; j < n; ++j) {
        values[j] = std::exp((values[j] - largest) / temperature);
        total += values[j];
    }
    for (int j = 0; j < n; ++j) values[j] /= total;
    return total;
}

}  // namespace gmm_jepa
