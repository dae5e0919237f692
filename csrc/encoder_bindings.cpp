#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "bindings.h"
#include "density.h"
#include "depthwise.h"
#include "dropout.h"
#include "kernels.h"
#include "lists.h"
#include "losses.h"
#include "residual.h"
#include "residual_block.h"
#include "snake.h"
#include "waveform.h"

namespace gmm_jepa {

void check_lengths(const int64_t* lengths, int64_t n_rows, int64_t n_frames) {
    for (int64_t row = 0; lengths && row < n_rows; ++row) {
        if (lengths[row] < 0 || lengths[row] > n_frames) {
            throw std::invalid_argument("lengths_frames: expected 0 to T each");
        }
    }
}

Dropout dropout_of(const pybind11::tuple& t) {
    const double p = t[1].cast<double>();
    if (!(p >= 0.0 && p < 1.0)) throw std::invalid_argument("p: expected 0 <= p < 1");
    const double threshold = std::min(std::round(p * 4294967296.0), 4294967295.0);
    return {t[0].cast<uint64_t>(), static_cast<int32_t>(threshold - 2147483648.0),
            static_cast<float>(4294967296.0 / (4294967296.0 - threshold)), threshold > 0.0};
}

namespace {

namespace py = pybind11;

// shape: B, T, C, dilation, address of lengths or 0, whether narrow
ResidualShape residual_shape(const py::tuple& t) {
    const ResidualShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                              t[3].cast<int64_t>(), pointer<const int64_t>(t[4].cast<uintptr_t>()),
                              t[5].cast<bool>()};
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels < 1 || shape.dilation < 1) {
        throw std::invalid_argument("shape: expected sizes, and a dilation of at least 1");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

ResidualWeights residual_weights(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<const float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3)};
}

void residual_forward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                         uintptr_t hidden, uintptr_t out, int n_threads,
                         const std::string& instruction_set) {
    const ResidualShape sizes = residual_shape(shape);
    const ResidualWeights parameters = residual_weights(weights);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    residual_forward(sizes, parameters, pointer<const float>(x), pointer<float>(hidden),
                     pointer<float>(out), table, n_threads);
}

void residual_backward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                          uintptr_t hidden, uintptr_t grad, const py::tuple& out, int n_threads,
                          const std::string& instruction_set) {
    const ResidualShape sizes = residual_shape(shape);
    const ResidualWeights parameters = residual_weights(weights);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const ResidualGradients gradients{at(0), at(1), at(2), at(3), at(4)};
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    residual_backward(sizes, parameters, pointer<const float>(x), pointer<const float>(hidden),
                      pointer<const float>(grad), gradients, table, n_threads);
}

// shape: B, S, T, stride, K, C
WaveformShape waveform_shape(const py::tuple& t) {
    const WaveformShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                              t[3].cast<int64_t>(), t[4].cast<int>(),     t[5].cast<int>()};
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.stride < 1 || shape.n_taps < 1 ||
        shape.n_channels < 1 ||
        (shape.n_frames - 1) * shape.stride + shape.n_taps > shape.n_samples) {
        throw std::invalid_argument("shape: expected sizes, and samples for all frames");
    }
    return shape;
}

void waveform_conv_at(const py::tuple& shape, uintptr_t x, uintptr_t taps, uintptr_t bias,
                      uintptr_t out, int n_threads, const std::string& instruction_set) {
    const WaveformShape sizes = waveform_shape(shape);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    waveform_conv(sizes, pointer<const float>(x), pointer<const float>(taps),
                  pointer<const float>(bias), pointer<float>(out), table, n_threads);
}

void waveform_conv_backward_at(const py::tuple& shape, uintptr_t x, uintptr_t grad, uintptr_t taps,
                               uintptr_t bias, int n_threads, const std::string& instruction_set) {
    const WaveformShape sizes = waveform_shape(shape);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    waveform_conv_backward(sizes, pointer<const float>(x), pointer<const float>(grad),
                           pointer<float>(taps), pointer<float>(bias), table, n_threads);
}

// shape: B, T, C, dilations, address of lengths or 0, whether narrow
ResidualBlockShape residual_block_shape(const py::tuple& t) {
    ResidualBlockShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(), {},
                             pointer<const int64_t>(t[4].cast<uintptr_t>()), t[5].cast<bool>()};
    for (const py::handle dilation : t[3]) shape.dilations.push_back(dilation.cast<int64_t>());
    for (int64_t dilation : shape.dilations) {
        if (dilation < 1) throw std::invalid_argument("dilations: expected at least 1 each");
    }
    if (shape.n_rows < 0 || shape.n_frames < 0 || !takes_together(shape.n_channels) ||
        shape.dilations.empty()) {
        throw std::invalid_argument("shape: expected sizes, 16 or 32 channels, and units");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

ResidualBlockWeights residual_block_weights(const py::tuple& t) {
    const auto at = [&](int i) { return pointer<const float>(t[i].cast<uintptr_t>()); };
    return {at(0), at(1), at(2), at(3)};
}

void residual_block_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                       uintptr_t out, int n_threads, const std::string& instruction_set) {
    const ResidualBlockShape sizes = residual_block_shape(shape);
    const ResidualBlockWeights parameters = residual_block_weights(weights);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    residual_block(sizes, parameters, pointer<const float>(x), pointer<float>(out), table,
                   n_threads);
}

void residual_block_backward_at(const py::tuple& shape, const py::tuple& weights, uintptr_t x,
                                uintptr_t grad, const py::tuple& out, int n_threads,
                                const std::string& instruction_set) {
    const ResidualBlockShape sizes = residual_block_shape(shape);
    const ResidualBlockWeights parameters = residual_block_weights(weights);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const ResidualBlockGradients gradients{at(0), at(1), at(2), at(3), at(4)};
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    residual_block_backward(sizes, parameters, pointer<const float>(x),
                            pointer<const float>(grad), gradients, table, n_threads);
}

// shape: B, T, C, address of lengths or 0
SnakeShape snake_shape(const py::tuple& t, const Kernels& table) {
    const SnakeShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                           pointer<const int64_t>(t[3].cast<uintptr_t>())};
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels < 1 ||
        shape.n_channels % table.lanes) {
        throw std::invalid_argument("shape: expected sizes, and channels that fill vectors");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

void snake_at(const py::tuple& shape, uintptr_t x, bool is_bfloat16, uintptr_t a, uintptr_t out,
              int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const SnakeShape sizes = snake_shape(shape, table);
    const auto run = [&](const auto* values) {
        snake(sizes, values, pointer<const float>(a), pointer<float>(out), table, n_threads);
    };
    const py::gil_scoped_release release;
    is_bfloat16 ? run(pointer<const uint16_t>(x)) : run(pointer<const float>(x));
}

void snake_backward_at(const py::tuple& shape, uintptr_t x, bool is_bfloat16, uintptr_t a,
                       uintptr_t grad, uintptr_t grad_x, uintptr_t grad_a, int n_threads,
                       const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const SnakeShape sizes = snake_shape(shape, table);
    const auto run = [&](const auto* values, auto* gradient) {
        snake_backward(sizes, values, pointer<const float>(a), pointer<const float>(grad), gradient,
                       pointer<float>(grad_a), table, n_threads);
    };
    const py::gil_scoped_release release;
    is_bfloat16 ? run(pointer<const uint16_t>(x), pointer<uint16_t>(grad_x))
                : run(pointer<const float>(x), pointer<float>(grad_x));
}

// shape: B, T, C, address of lengths or 0
DensityShape density_shape(const py::tuple& t, const Kernels& table) {
    const DensityShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                             pointer<const int64_t>(t[3].cast<uintptr_t>())};
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels % table.lanes) {
        throw std::invalid_argument("shape: expected sizes, and channels that fill vectors");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
    return shape;
}

void density_attention_at(const py::tuple& shape, const py::tuple& parameters, uintptr_t x,
                          uintptr_t out, int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const DensityShape sizes = density_shape(shape, table);
    const auto* offsets = pointer<const float>(parameters[0].cast<uintptr_t>());
    const auto* widths = pointer<const float>(parameters[1].cast<uintptr_t>());
    const py::gil_scoped_release release;
    density_attention(sizes, offsets, widths, pointer<const float>(x), pointer<float>(out), table,
                      n_threads);
}

void density_attention_backward_at(const py::tuple& shape, const py::tuple& parameters,
                                   uintptr_t x, uintptr_t grad, const py::tuple& out,
                                   int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const DensityShape sizes = density_shape(shape, table);
    const auto* offsets = pointer<const float>(parameters[0].cast<uintptr_t>());
    const auto* widths = pointer<const float>(parameters[1].cast<uintptr_t>());
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    float *grad_x = at(0), *grad_offsets = at(1), *grad_widths = at(2);
    const py::gil_scoped_release release;
    density_attention_backward(sizes, offsets, widths, pointer<const float>(x),
                               pointer<const float>(grad), grad_x, grad_offsets, grad_widths,
                               table, n_threads);
}

// (address, strides of row, head and frame)
HeadRows head_rows(const py::handle& t) {
    const auto values = t.cast<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>();
    return {pointer<const float>(std::get<0>(values)), std::get<1>(values), std::get<2>(values),
            std::get<3>(values)};
}

// B, H, T, d, address of key lengths or 0
AttentionShape attention_shape(const py::tuple& t) {
    const AttentionShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                               t[3].cast<int>(), pointer<const int64_t>(t[4].cast<uintptr_t>())};
    if (shape.n_rows < 0 || shape.n_heads < 1 || shape.n_frames < 1 || shape.n_dims < 1) {
        throw std::invalid_argument("shape: expected B, H, T, d");
    }
    for (int64_t row = 0; shape.key_lengths && row < shape.n_rows; ++row) {
        if (shape.key_lengths[row] < 1 || shape.key_lengths[row] > shape.n_frames) {
            throw std::invalid_argument("key_lengths: expected 1 to T each");
        }
    }
    return shape;
}

// q, k, v as head_rows has them; addresses of table and gate
AttentionInputs attention_inputs(const py::tuple& t) {
    return {head_rows(t[0]), head_rows(t[1]), head_rows(t[2]),
            pointer<const float>(t[3].cast<uintptr_t>()),
            pointer<const float>(t[4].cast<uintptr_t>())};
}

void dropout_at(uintptr_t x, int64_t n, const py::tuple& drawn_by, uintptr_t out, int n_threads,
                const std::string& instruction_set) {
    if (n < 0) throw std::invalid_argument("n: expected at least 0");
    const Dropout dropping = dropout_of(drawn_by);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    dropout(pointer<const float>(x), n, dropping, pointer<float>(out), table, n_threads);
}

void attention_at(const py::tuple& shape, const py::tuple& inputs, const py::tuple& dropout,
                  uintptr_t out, uintptr_t log_sum, int n_threads,
                  const std::string& instruction_set) {
    const AttentionShape sizes = attention_shape(shape);
    const AttentionInputs operands = attention_inputs(inputs);
    const Dropout dropping = dropout_of(dropout);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    attention(sizes, operands, dropping, pointer<float>(out), pointer<float>(log_sum), table,
              n_threads);
}

void attention_backward_at(const py::tuple& shape, const py::tuple& inputs,
                           const py::tuple& dropout, const py::tuple& grad, const py::tuple& out,
                           uintptr_t log_sum, const py::tuple& gradients, int n_threads,
                           const std::string& instruction_set) {
    const AttentionShape sizes = attention_shape(shape);
    const AttentionInputs operands = attention_inputs(inputs);
    const Dropout dropping = dropout_of(dropout);
    const HeadRows of_out = head_rows(grad), forward_out = head_rows(out);
    const auto at = [&](int i) { return pointer<float>(gradients[i].cast<uintptr_t>()); };
    const AttentionGradients to{at(0), at(1), at(2), at(3), at(4)};
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    attention_backward(sizes, operands, dropping, of_out, forward_out,
                       pointer<const float>(log_sum), to, table, n_threads);
}

// shape: B, T, C, K
DepthwiseShape depthwise_shape(const py::tuple& t, const Kernels& table) {
    const DepthwiseShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                               t[3].cast<int>()};
    if (shape.n_rows < 1 || shape.n_frames < 1 || shape.n_channels < 1 ||
        shape.n_channels % table.lanes || shape.n_taps < 1 || shape.n_taps % 2 == 0) {
        throw std::invalid_argument("shape: expected sizes, channels that fill vectors, odd taps");
    }
    return shape;
}

void depthwise_at(const py::tuple& shape, uintptr_t x, uintptr_t weight, uintptr_t bias,
                  uintptr_t out, int n_threads, const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const DepthwiseShape sizes = depthwise_shape(shape, table);
    const py::gil_scoped_release release;
    depthwise(sizes, pointer<const float>(x), pointer<const float>(weight),
              pointer<const float>(bias), pointer<float>(out), table, n_threads);
}

void depthwise_backward_at(const py::tuple& shape, uintptr_t grad, uintptr_t x, uintptr_t weight,
                           const py::tuple& out, int n_threads,
                           const std::string& instruction_set) {
    const Kernels& table = kernels(instruction_set.c_str());
    const DepthwiseShape sizes = depthwise_shape(shape, table);
    const auto at = [&](int i) { return pointer<float>(out[i].cast<uintptr_t>()); };
    const DepthwiseGradients gradients{at(0), at(1), at(2)};
    const py::gil_scoped_release release;
    depthwise_backward(sizes, pointer<const float>(grad), pointer<const float>(x),
                       pointer<const float>(weight), gradients, table, n_threads);
}

template <typename T>
TensorList<T> tensor_list(const py::list& addresses, const py::list& sizes) {
    TensorList<T> list;
    for (const py::handle address : addresses) {
        list.tensors.push_back(pointer<T>(address.cast<uintptr_t>()));
    }
    for (const py::handle size : sizes) list.sizes.push_back(size.cast<int64_t>());
    if (list.tensors.size() != list.sizes.size()) {
        throw std::invalid_argument("sizes: expected as many as addresses");
    }
    return list;
}

double sum_of_squares_at(const py::list& addresses, const py::list& sizes, int n_threads,
                         const std::string& instruction_set) {
    const auto list = tensor_list<const float>(addresses, sizes);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    return sum_of_squares(list, table, n_threads);
}

void move_towards_at(const py::list& to, const py::list& from, const py::list& sizes, float weight,
                     int n_threads, const std::string& instruction_set) {
    const auto moved = tensor_list<float>(to, sizes);
    const auto others = tensor_list<const float>(from, sizes);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    move_towards(moved, others, weight, table, n_threads);
}

// addresses of values, weights and gradient (or 0), with n, stride and K
WeightedRows weighted_rows(const py::tuple& t) {
    const WeightedRows rows{pointer<const float>(t[0].cast<uintptr_t>()), t[3].cast<int64_t>(),
                            t[4].cast<int64_t>(), t[5].cast<int>(),
                            pointer<const float>(t[1].cast<uintptr_t>()),
                            pointer<float>(t[2].cast<uintptr_t>())};
    if (rows.n_rows < 0 || rows.n_columns < 1 || rows.stride < 0 || !rows.values) {
        throw std::invalid_argument("rows: expected sizes");
    }
    return rows;
}

void masked_kl_at(const py::tuple& logits, uintptr_t targets, uintptr_t of_row, uintptr_t losses,
                  int n_threads, const std::string& instruction_set) {
    const WeightedRows rows = weighted_rows(logits);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    masked_kl(rows, pointer<const float>(targets), pointer<const int64_t>(of_row),
              pointer<RowLoss>(losses), table, n_threads);
}

void masked_cross_entropy_at(const py::tuple& logits, uintptr_t labels, uintptr_t losses,
                             int n_threads, const std::string& instruction_set) {
    const WeightedRows rows = weighted_rows(logits);
    const Kernels& table = kernels(instruction_set.c_str());
    bool possible;
    {
        const py::gil_scoped_release release;
        possible = masked_cross_entropy(rows, pointer<const int64_t>(labels),
                                        pointer<RowLoss>(losses), table, n_threads);
    }
    if (!possible) throw py::index_error("labels: expected 0 to K - 1 where the weight is not 0");
}

void masked_squared_error_at(const py::tuple& predictions, uintptr_t targets, int64_t stride,
                             uintptr_t losses, int n_threads,
                             const std::string& instruction_set) {
    const WeightedRows rows = weighted_rows(predictions);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    masked_squared_error(rows, pointer<const float>(targets), stride, pointer<RowLoss>(losses),
                         table, n_threads);
}

}  // namespace

void define_encoder(py::module_& module) {
    module.def("masked_kl", &masked_kl_at, py::arg("logits"), py::arg("targets"),
               py::arg("of_row"), py::arg("losses"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("masked_cross_entropy", &masked_cross_entropy_at, py::arg("logits"),
               py::arg("labels"), py::arg("losses"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("masked_squared_error", &masked_squared_error_at, py::arg("predictions"),
               py::arg("targets"), py::arg("stride"), py::arg("losses"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_forward", &residual_forward_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("hidden"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_backward", &residual_backward_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("hidden"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("sum_of_squares", &sum_of_squares_at, py::arg("addresses"), py::arg("sizes"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("move_towards", &move_towards_at, py::arg("to"), py::arg("from"), py::arg("sizes"),
               py::arg("weight"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("snake", &snake_at, py::arg("shape"), py::arg("x"), py::arg("is_bfloat16"),
               py::arg("a"), py::arg("out"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("snake_backward", &snake_backward_at, py::arg("shape"), py::arg("x"),
               py::arg("is_bfloat16"), py::arg("a"), py::arg("grad"), py::arg("grad_x"),
               py::arg("grad_a"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("density_attention", &density_attention_at, py::arg("shape"),
               py::arg("parameters"), py::arg("x"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("density_attention_backward", &density_attention_backward_at, py::arg("shape"),
               py::arg("parameters"), py::arg("x"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("depthwise", &depthwise_at, py::arg("shape"), py::arg("x"), py::arg("weight"),
               py::arg("bias"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_block", &residual_block_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_block_backward", &residual_block_backward_at, py::arg("shape"),
               py::arg("weights"), py::arg("x"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("waveform_conv", &waveform_conv_at, py::arg("shape"), py::arg("x"),
               py::arg("taps"), py::arg("bias"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("waveform_conv_backward", &waveform_conv_backward_at, py::arg("shape"),
               py::arg("x"), py::arg("grad"), py::arg("taps"), py::arg("bias"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("depthwise_backward", &depthwise_backward_at, py::arg("shape"), py::arg("grad"),
               py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("dropout", &dropout_at, py::arg("x"), py::arg("n"), py::arg("drawn_by"),
               py::arg("out"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("attention", &attention_at, py::arg("shape"), py::arg("inputs"),
               py::arg("dropout"), py::arg("out"), py::arg("log_sum"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("attention_backward", &attention_backward_at, py::arg("shape"), py::arg("inputs"),
               py::arg("dropout"), py::arg("grad"), py::arg("out"), py::arg("log_sum"),
               py::arg("gradients"), py::arg("n_threads"), py::arg("instruction_set") = "");
}

}  // namespace gmm_jepa
