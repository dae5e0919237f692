#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "convolution_module.h"
#include "feed_forward.h"
#include "kernels.h"
#include "linear_maps.h"
#include "self_attention.h"
#include "strided.h"

namespace gmm_jepa {
namespace {

namespace py = pybind11;

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

// shape: N, D, H, scale, epsilon, whether narrow, what draws dropout
FeedForwardShape feed_forward_shape(const py::tuple& t, const Kernels& table) {
    const FeedForwardShape shape{t[0].cast<int64_t>(), t[1].cast<int>(), t[2].cast<int>(),
                                 t[3].cast<float>(), t[4].cast<float>(), t[5].cast<bool>(),
                                 dropout_of(t[6])};
    if (shape.n_rows < 0) throw std::invalid_argument("shape: expected sizes");
    check_maps(shape.narrow, table, {shape.n_dims, shape.n_hidden});
    return shape;
}

FeedForwardWeights feed_forward_weights(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<const float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

void feed_forward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                     uintptr_t hidden, uintptr_t out, int n_threads,
                     const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const FeedForwardShape sizes = feed_forward_shape(shape, table);
    const FeedForwardWeights parameters = feed_forward_weights(weights);
    const py::gil_scoped_release release;
    feed_forward(sizes, parameters, pointer<const float>(x), pointer<void>(hidden),
                 pointer<float>(out), table, n_threads);
}

void feed_forward_backward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                              uintptr_t hidden, uintptr_t grad, const py::tuple& out,
                              int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const FeedForwardShape sizes = feed_forward_shape(shape, table);
    const FeedForwardWeights parameters = feed_forward_weights(weights);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const FeedForwardGradients gradients{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
    const py::gil_scoped_release release;
    feed_forward_backward(sizes, parameters, pointer<const float>(x), pointer<const void>(hidden),
                          pointer<const float>(grad), gradients, table, n_threads);
}

// shape: B, T, H, D, address of lengths or 0, whether narrow, what draws dropout
SelfAttentionShape self_attention_shape(const py::tuple& t, const Kernels& table) {
    const SelfAttentionShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                                   t[3].cast<int>(), pointer<const int64_t>(t[4].cast<uintptr_t>()),
                                   t[5].cast<bool>(), dropout_of(t[6])};
    check_maps(shape.narrow, table, {shape.n_dims});
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.n_heads < 1 ||
        shape.n_dims % (16 * shape.n_heads)) {
        throw std::invalid_argument("shape: expected sizes, and heads of multiples of 16");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

SelfAttentionWeights self_attention_weights(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<const float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

SelfAttentionKept self_attention_kept(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3)};
}

void self_attention_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                       const py::tuple& kept, uintptr_t out, int n_threads,
                       const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const SelfAttentionShape sizes = self_attention_shape(shape, table);
    const SelfAttentionWeights parameters = self_attention_weights(weights);
    const SelfAttentionKept made = self_attention_kept(kept);
    const py::gil_scoped_release release;
    self_attention(sizes, parameters, pointer<const float>(x), made, pointer<float>(out), table,
                   n_threads);
}

void self_attention_backward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                                const py::tuple& kept, uintptr_t grad, const py::tuple& out,
                                int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const SelfAttentionShape sizes = self_attention_shape(shape, table);
    const SelfAttentionWeights parameters = self_attention_weights(weights);
    const SelfAttentionKept made = self_attention_kept(kept);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const SelfAttentionGradients gradients{at(0), at(1), at(2), at(3), at(4),
                                           at(5), at(6), at(7), at(8)};
    const py::gil_scoped_release release;
    self_attention_backward(sizes, parameters, pointer<const float>(x), made,
                            pointer<const float>(grad), gradients, table, n_threads);
}

// shape: B, T, D, K, address of lengths or 0, epsilon, whether narrow, what draws dropout
ConvolutionModuleShape convolution_module_shape(const py::tuple& t, const Kernels& table) {
    const ConvolutionModuleShape shape{t[0].cast<int64_t>(),
                                       t[1].cast<int64_t>(),
                                       t[2].cast<int>(),
                                       t[3].cast<int>(),
                                       pointer<const int64_t>(t[4].cast<uintptr_t>()),
                                       t[5].cast<float>(),
                                       t[6].cast<bool>(),
                                       dropout_of(t[7])};
    check_maps(shape.narrow, table, {shape.n_dims});
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.n_taps < 1 || shape.n_taps % 2 == 0) {
        throw std::invalid_argument("shape: expected sizes, and an odd number of taps");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

ConvolutionModuleWeights convolution_module_weights(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<const float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

ConvolutionModuleKept convolution_module_kept(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2)};
}

void convolution_module_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                           const py::tuple& kept, uintptr_t out, int n_threads,
                           const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const ConvolutionModuleShape sizes = convolution_module_shape(shape, table);
    const ConvolutionModuleWeights parameters = convolution_module_weights(weights);
    const ConvolutionModuleKept made = convolution_module_kept(kept);
    const py::gil_scoped_release release;
    convolution_module(sizes, parameters, pointer<const float>(x), made, pointer<float>(out),
                       table, n_threads);
}

void convolution_module_backward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                                    const py::tuple& kept, uintptr_t grad, const py::tuple& out,
                                    int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const ConvolutionModuleShape sizes = convolution_module_shape(shape, table);
    const ConvolutionModuleWeights parameters = convolution_module_weights(weights);
    const ConvolutionModuleKept made = convolution_module_kept(kept);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const ConvolutionModuleGradients gradients{at(0), at(1), at(2), at(3), at(4), at(5),
                                               at(6), at(7), at(8), at(9), at(10)};
    const py::gil_scoped_release release;
    convolution_module_backward(sizes, parameters, pointer<const float>(x), made,
                                pointer<const float>(grad), gradients, table, n_threads);
}

// shape: B, T, C, C', stride, whether narrow
StridedShape strided_shape(const py::tuple& t, const Kernels& table) {
    const StridedShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                             t[3].cast<int>(),     t[4].cast<int>(),     t[5].cast<bool>()};
    if (shape.n_rows < 0 || shape.stride < 1 || shape.n_in < 1 || shape.frames_out() < 1) {
        throw std::invalid_argument("shape: expected sizes, and frames for an output");
    }
    check_maps(shape.narrow, table, {shape.n_out, 2 * shape.stride * shape.n_in});
    if (shape.n_in % 16) throw std::invalid_argument("shape: expected inputs that fill vectors");
    return shape;
}

void strided_conv_at(const py::tuple& shape, uintptr_t x, uintptr_t weight, uintptr_t bias,
                     uintptr_t out, int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const StridedShape sizes = strided_shape(shape, table);
    const py::gil_scoped_release release;
    strided_conv(sizes, pointer<const float>(x), pointer<const float>(weight),
                 pointer<const float>(bias), pointer<float>(out), table, n_threads);
}

void strided_conv_backward_at(const py::tuple& shape, uintptr_t x, uintptr_t weight, uintptr_t grad,
                              const py::tuple& out, int n_threads,
                              const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const StridedShape sizes = strided_shape(shape, table);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const StridedGradients gradients{at(0), at(1), at(2)};
    const py::gil_scoped_release release;
    strided_conv_backward(sizes, pointer<const float>(x), pointer<const float>(weight),
                          pointer<const float>(grad), gradients, table, n_threads);
}

}  // namespace

void define_blocks(py::module_& module) {
    module.def("feed_forward", &feed_forward_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("hidden"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("feed_forward_backward", &feed_forward_backward_at, py::arg("shape"),
               py::arg("weights"), py::arg("x"), py::arg("hidden"), py::arg("grad"),
               py::arg("out"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("strided_conv", &strided_conv_at, py::arg("shape"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("strided_conv_backward", &strided_conv_backward_at, py::arg("shape"), py::arg("x"),
               py::arg("weight"), py::arg("grad"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("convolution_module", &convolution_module_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("kept"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("convolution_module_backward", &convolution_module_backward_at, py::arg("shape"),
               py::arg("weights"), py::arg("x"), py::arg("kept"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("self_attention", &self_attention_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("kept"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("self_attention_backward", &self_attention_backward_at, py::arg("shape"),
               py::arg("weights"), py::arg("x"), py::arg("kept"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
}

}  // namespace gmm_jepa
