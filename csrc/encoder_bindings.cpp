#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "attention.h"
#include "bindings.h"
#include "depthwise.h"
#include "dropout.h"
#include "kernels.h"

namespace gmm_jepa {

void check_lengths(const int64_t* lengths, int64_t n_rows, int64_t n_frames) {
    for (int64_t row = 0; lengths && row < n_rows; ++row) {
        if (lengths[row] < 0 || lengths[row] > n_frames) {
            throw std::invalid_argument("lengths_frames: expected 0 to T each");
        }
    }
}

template <>
Dropout of_python(const py::handle& value) {
    const auto [seed, p] = value.cast<std::pair<uint64_t, double>>();
    if (!(p >= 0.0 && p < 1.0)) throw std::invalid_argument("p: expected 0 <= p < 1");
    const double threshold = std::min(std::round(p * 4294967296.0), 4294967295.0);
    return {seed, static_cast<int32_t>(threshold - 2147483648.0),
            static_cast<float>(4294967296.0 / (4294967296.0 - threshold)), threshold > 0.0};
}

namespace {

void check_attention(const AttentionShape& shape, const Kernels&) {
    if (shape.n_rows < 0 || shape.n_heads < 1 || shape.n_frames < 1 || shape.n_dims < 1) {
        throw std::invalid_argument("shape: expected B, H, T, d");
    }
    for (int64_t row = 0; shape.key_lengths && row < shape.n_rows; ++row) {
        if (shape.key_lengths[row] < 1 || shape.key_lengths[row] > shape.n_frames) {
            throw std::invalid_argument("key_lengths: expected 1 to T each");
        }
    }
}

void check_depthwise(const DepthwiseShape& shape, const Kernels& table) {
    if (shape.n_rows < 1 || shape.n_frames < 1 || shape.n_channels < 1 ||
        shape.n_channels % table.lanes || shape.n_taps < 1 || shape.n_taps % 2 == 0) {
        throw std::invalid_argument("shape: expected sizes, channels that fill vectors, odd taps");
    }
}

void dropout_at(const float* x, int64_t n, const Dropout& dropping, float* out,
                const Kernels& table, int n_threads) {
    if (n < 0) throw std::invalid_argument("n: expected at least 0");
    dropout(x, n, dropping, out, table, n_threads);
}

}  // namespace

void define_encoder(py::module_& module) {
    define(module, "gated_bias_attention", &gated_bias_attention, check_attention);
    define(module, "gated_bias_attention_backward", &gated_bias_attention_backward,
           check_attention);
    define(module, "depthwise_conv", &depthwise_conv, check_depthwise);
    define(module, "depthwise_conv_backward", &depthwise_conv_backward, check_depthwise);
    define(module, "dropout", &dropout_at);
}

}  // namespace gmm_jepa
