// gmm_jepa._native: addresses, sizes and strides in, nothing returned but through them. The caller
// (gmm_jepa/ops/native.py) owns the memory and has checked shapes, types and devices.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "cuda/bindings.h"
#include "density.h"
#include "em.h"
#include "kernels.h"
#include "log_mel.h"
#include "parallel.h"
#include "posterior.h"
#include "residual.h"

namespace py = pybind11;

namespace gmm_jepa {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, n_rows, n_columns, stride_row, stride_column)
struct MatrixArguments {
    explicit MatrixArguments(const py::tuple& t)
        : address(t[0].cast<uintptr_t>()),
          n_rows(t[1].cast<int64_t>()),
          n_columns(t[2].cast<int64_t>()),
          stride_row(t[3].cast<int64_t>()),
          stride_column(t[4].cast<int64_t>()) {
        if (n_rows < 0 || n_columns < 1 || (n_rows > 0 && !address)) {
            throw std::invalid_argument("frames: expected an address, rows >= 0, columns >= 1");
        }
    }

    template <typename T>
    Matrix<T> as() const {
        return {pointer<const T>(address), n_rows, n_columns, stride_row, stride_column};
    }

    uintptr_t address;
    int64_t n_rows, n_columns, stride_row, stride_column;
};

// (log_weights, means, variances, n_components): addresses of contiguous float64
MixtureView mixture_view(const py::tuple& t, int64_t n_dims) {
    const MixtureView mixture{pointer<const double>(t[0].cast<uintptr_t>()),
                              pointer<const double>(t[1].cast<uintptr_t>()),
                              pointer<const double>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(),
                              n_dims};
    const int64_t most = int64_t(1) << 30;
    if (mixture.n_components < 1 || mixture.n_components > most || n_dims > most ||
        !mixture.log_weights || !mixture.means || !mixture.variances) {
        throw std::invalid_argument("mixture: expected addresses and 1 to 2^30 components");
    }
    return mixture;
}

void use_openmp_at(const py::tuple& t) {
    use_openmp({reinterpret_cast<decltype(OpenMP::parallel)>(t[0].cast<uintptr_t>()),
                reinterpret_cast<decltype(OpenMP::thread_num)>(t[1].cast<uintptr_t>()),
                reinterpret_cast<decltype(OpenMP::num_threads)>(t[2].cast<uintptr_t>())});
}

void em_statistics_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
                      const py::tuple& out, int n_threads, const std::string& instruction_set) {
    const MatrixArguments x(frames);
    const MixtureView view = mixture_view(mixture, x.n_columns);
    const Statistics statistics{
        pointer<double>(out[0].cast<uintptr_t>()), pointer<double>(out[1].cast<uintptr_t>()),
        pointer<double>(out[2].cast<uintptr_t>()), pointer<double>(out[3].cast<uintptr_t>())};
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    if (is_float64) {
        em_statistics(x.as<double>(), view, statistics, table, n_threads);
    } else {
        em_statistics(x.as<float>(), view, statistics, table, n_threads);
    }
}

void posterior_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
                  double temperature, uintptr_t out, bool out_is_float64, int n_threads,
                  const std::string& instruction_set) {
    const MatrixArguments x(frames);
    const MixtureView view = mixture_view(mixture, x.n_columns);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) {
        if (out_is_float64) {
            posterior(matrix, view, temperature, pointer<double>(out), table, n_threads);
        } else {
            posterior(matrix, view, temperature, pointer<float>(out), table, n_threads);
        }
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

void log_likelihood_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
                       uintptr_t out, int n_threads, const std::string& instruction_set) {
    const MatrixArguments x(frames);
    const MixtureView view = mixture_view(mixture, x.n_columns);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) {
        log_likelihood(matrix, view, pointer<double>(out), table, n_threads);
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

void topk_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture, int64_t k,
             double temperature, uintptr_t posteriors, uintptr_t indices, int n_threads,
             const std::string& instruction_set) {
    const MatrixArguments x(frames);
    const MixtureView view = mixture_view(mixture, x.n_columns);
    if (k < 1 || k > view.n_components) throw std::invalid_argument("k: expected 1 to K");
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) {
        topk(matrix, view, static_cast<int>(k), temperature, pointer<float>(posteriors),
             pointer<int64_t>(indices), table, n_threads);
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

void nearest_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
                uintptr_t labels, uintptr_t squared_distances, int n_threads,
                const std::string& instruction_set) {
    const MatrixArguments x(frames);
    const MixtureView view = mixture_view(mixture, x.n_columns);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) {
        nearest(matrix, view, pointer<int64_t>(labels), pointer<float>(squared_distances), table,
                n_threads);
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

// settings: addresses of window and filters, n_fft, n_mels, hop, floor
void log_mel_at(const py::tuple& waveform, bool is_int16, uintptr_t lengths,
                const py::tuple& settings, uintptr_t out, int n_threads,
                const std::string& instruction_set) {
    const MatrixArguments x(waveform);
    const LogMelSettings s{pointer<const float>(settings[0].cast<uintptr_t>()),
                           pointer<const float>(settings[1].cast<uintptr_t>()),
                           settings[2].cast<int>(),
                           settings[3].cast<int>(),
                           settings[4].cast<int64_t>(),
                           settings[5].cast<float>()};
    if (!log_mel_supports(s.n_fft) || s.n_mels < 1 || s.hop < 1) {
        throw std::invalid_argument("n_fft, n_mels, hop: not supported");
    }
    for (int64_t row = 0; row < x.n_rows; ++row) {
        const int64_t length = pointer<const int64_t>(lengths)[row];
        if (length < 0 || length > x.n_columns) {
            throw std::invalid_argument("lengths_samples: expected 0 to the width of the waveform");
        }
    }
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) {
        log_mel(matrix, pointer<const int64_t>(lengths), s, pointer<float>(out), table, n_threads);
    };
    is_int16 ? run(x.as<int16_t>()) : run(x.as<float>());
}

// shape: B, T, C, dilation, address of lengths or 0
ResidualShape residual_shape(const py::tuple& t) {
    const ResidualShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                              t[3].cast<int64_t>(), pointer<const int64_t>(t[4].cast<uintptr_t>())};
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels < 1 || shape.dilation < 1) {
        throw std::invalid_argument("shape: expected sizes, and a dilation of at least 1");
    }
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

// shape: B, T, C, address of lengths or 0
DensityShape density_shape(const py::tuple& t, const Kernels& table) {
    const DensityShape shape{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int>(),
                             pointer<const int64_t>(t[3].cast<uintptr_t>())};
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels % table.lanes) {
        throw std::invalid_argument("shape: expected sizes, and channels that fill vectors");
    }
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

// seed and probability; none with probability 0
Dropout dropout_of(const py::tuple& t) {
    const double p = t[1].cast<double>();
    const double threshold = std::min(std::round(p * 4294967296.0), 4294967295.0);
    return {t[0].cast<uint64_t>(), static_cast<int32_t>(threshold - 2147483648.0),
            static_cast<float>(4294967296.0 / (4294967296.0 - threshold)), threshold > 0.0};
}

void dropout_at(uintptr_t x, int64_t n, const py::tuple& dropout, uintptr_t out, int n_threads,
                const std::string& instruction_set) {
    const Dropout dropping = dropout_of(dropout);
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    constexpr int64_t kRow = 4096;
    const int64_t rows = (n + kRow - 1) / kRow;
    n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, 1 + rows / 16));
    parallel(n_threads, [&](int thread) {
        const Share share(rows, thread, n_threads);
        for (int64_t row = share.first; row < share.last; ++row) {
            const int64_t at = row * kRow;
            table.dropout(pointer<const float>(x) + at, int(std::min(kRow, n - at)), dropping,
                          uint64_t(row), pointer<float>(out) + at);
        }
    });
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

}  // namespace
}  // namespace gmm_jepa

PYBIND11_MODULE(_native, module) {
    using namespace gmm_jepa;
    module.doc() = "Kernels for CPUs, and for CUDA where built with nvcc; see gmm_jepa.ops.native.";
    module.def("instruction_sets", [] { return std::string(available_kernels()); },
               "Names of the sets that this processor can run, best first, comma separated.");
    module.def("use_openmp", &use_openmp_at, py::arg("addresses"),
               "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads.");
    module.def("em_statistics", &em_statistics_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("posterior", &posterior_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("temperature"), py::arg("out"),
               py::arg("out_is_float64"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("log_likelihood", &log_likelihood_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("topk", &topk_at, py::arg("frames"), py::arg("is_float64"), py::arg("mixture"),
               py::arg("k"), py::arg("temperature"), py::arg("posteriors"), py::arg("indices"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("nearest", &nearest_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("labels"), py::arg("squared_distances"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("log_mel", &log_mel_at, py::arg("waveform"), py::arg("is_int16"),
               py::arg("lengths"), py::arg("settings"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_forward", &residual_forward_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("hidden"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("residual_backward", &residual_backward_at, py::arg("shape"), py::arg("weights"),
               py::arg("x"), py::arg("hidden"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("density_attention", &density_attention_at, py::arg("shape"),
               py::arg("parameters"), py::arg("x"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("density_attention_backward", &density_attention_backward_at, py::arg("shape"),
               py::arg("parameters"), py::arg("x"), py::arg("grad"), py::arg("out"),
               py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("dropout", &dropout_at, py::arg("x"), py::arg("n"), py::arg("dropout"),
               py::arg("out"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("attention", &attention_at, py::arg("shape"), py::arg("inputs"),
               py::arg("dropout"), py::arg("out"), py::arg("log_sum"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("attention_backward", &attention_backward_at, py::arg("shape"), py::arg("inputs"),
               py::arg("dropout"), py::arg("grad"), py::arg("out"), py::arg("log_sum"),
               py::arg("gradients"), py::arg("n_threads"), py::arg("instruction_set") = "");
    module.def("log_mel_supports", &log_mel_supports, py::arg("n_fft"));
    cuda::define(module);
}
