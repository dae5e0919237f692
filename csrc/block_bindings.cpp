#include <initializer_list>
#include <stdexcept>

#include "bindings.h"
#include "convolution_module.h"
#include "feed_forward.h"
#include "kernels.h"
#include "linear_maps.h"
#include "self_attention.h"
#include "strided.h"

namespace gmm_jepa {
namespace {

void check_maps(bool narrow, const Kernels& table, std::initializer_list<int> sizes) {
    if (narrow && !table.pair_products) {
        throw std::invalid_argument("narrow: the set has no products of bfloat16");
    }
    for (int size : sizes) {
        if (size < 1 || size % kMapMultiple) {
            throw std::invalid_argument("shape: expected multiples of 32");
        }
    }
}

void check_feed_forward(const FeedForwardShape& shape, const Kernels& table) {
    if (shape.n_rows < 0) throw std::invalid_argument("shape: expected sizes");
    check_maps(shape.narrow, table, {shape.n_dims, shape.n_hidden});
}

void check_self_attention(const SelfAttentionShape& shape, const Kernels& table) {
    check_maps(shape.narrow, table, {shape.n_dims});
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.n_heads < 1 ||
        shape.n_dims % (16 * shape.n_heads)) {
        throw std::invalid_argument("shape: expected sizes, and heads of multiples of 16");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
}

void check_convolution_module(const ConvolutionModuleShape& shape, const Kernels& table) {
    check_maps(shape.narrow, table, {shape.n_dims});
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.n_taps < 1 || shape.n_taps % 2 == 0) {
        throw std::invalid_argument("shape: expected sizes, and an odd number of taps");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
}

void check_strided(const StridedShape& shape, const Kernels& table) {
    if (shape.n_rows < 0 || shape.stride < 1 || shape.n_in < 1 || shape.frames_out() < 1) {
        throw std::invalid_argument("shape: expected sizes, and frames for an output");
    }
    check_maps(shape.narrow, table, {shape.n_out, 2 * shape.stride * shape.n_in});
    if (shape.n_in % 16) throw std::invalid_argument("shape: expected inputs that fill vectors");
}

}  // namespace

void define_blocks(py::module_& module) {
    define(module, "feed_forward", &feed_forward, check_feed_forward);
    define(module, "feed_forward_backward", &feed_forward_backward, check_feed_forward);
    define(module, "self_attention", &self_attention, check_self_attention);
    define(module, "self_attention_backward", &self_attention_backward, check_self_attention);
    define(module, "convolution_module", &convolution_module, check_convolution_module);
    define(module, "convolution_module_backward", &convolution_module_backward,
           check_convolution_module);
    define(module, "strided_conv", &strided_conv, check_strided);
    define(module, "strided_conv_backward", &strided_conv_backward, check_strided);
}

}  // namespace gmm_jepa
