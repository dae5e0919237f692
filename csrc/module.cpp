// gmm_jepa._native: addresses, sizes and strides in; results are written to addresses, but for
// prepared mixtures and single numbers, which are returned. The callers (gmm_jepa/ops/) own the memory
// that the addresses are of, and have checked shapes, types and devices.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/bindings.h"
#include "em.h"
#include "half_types.h"
#include "kernels.h"
#include "log_mel.h"
#include "parallel.h"
#include "posterior.h"
#include "screened_mixture.h"

namespace py = pybind11;

namespace gmm_jepa {
namespace {

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
std::unique_ptr<ScreenedMixture> screened_mixture(const py::tuple& t, int64_t n_dims,
                                                  const std::string& instruction_set) {
    const MixtureView mixture{pointer<const double>(t[0].cast<uintptr_t>()),
                              pointer<const double>(t[1].cast<uintptr_t>()),
                              pointer<const double>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(),
                              n_dims};
    const int64_t most = int64_t(1) << 28;  // twice as many, and some padding, are an int
    if (mixture.n_components < 1 || mixture.n_components > most || n_dims < 1 || n_dims > most ||
        !mixture.log_weights || !mixture.means || !mixture.variances) {
        throw std::invalid_argument("mixture: expected addresses, 1 to 2^28 components, features");
    }
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    return std::make_unique<ScreenedMixture>(mixture, table);
}

// Frames that have the mixture's features.
struct FramesOfMixture : MatrixArguments {
    FramesOfMixture(const py::tuple& frames, const ScreenedMixture& mixture)
        : MatrixArguments(frames) {
        if (n_columns != mixture.n_dims) {
            throw std::invalid_argument("frames: expected as many features as the mixture has");
        }
    }
};

void use_openmp_at(const py::tuple& t) {
    use_openmp({reinterpret_cast<decltype(OpenMP::parallel)>(t[0].cast<uintptr_t>()),
                reinterpret_cast<decltype(OpenMP::thread_num)>(t[1].cast<uintptr_t>()),
                reinterpret_cast<decltype(OpenMP::num_threads)>(t[2].cast<uintptr_t>())});
}

void em_statistics_at(const py::tuple& frames, bool is_float64, const ScreenedMixture& mixture,
                      const py::tuple& out, int n_threads) {
    const FramesOfMixture x(frames, mixture);
    const Statistics statistics{
        pointer<double>(out[0].cast<uintptr_t>()), pointer<double>(out[1].cast<uintptr_t>()),
        pointer<double>(out[2].cast<uintptr_t>()), pointer<double>(out[3].cast<uintptr_t>())};
    const py::gil_scoped_release release;
    const auto run = [&](auto matrix) { em_statistics(matrix, mixture, statistics, n_threads); };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

// out_type: float64, float32, bfloat16 or float16
void posterior_at(const py::tuple& frames, bool is_float64, const ScreenedMixture& mixture,
                  double temperature, uintptr_t out, const std::string& out_type, int n_threads) {
    const FramesOfMixture x(frames, mixture);
    const auto write = [&](auto* to) {
        const py::gil_scoped_release release;
        const auto run = [&](auto rows) { posterior(rows, mixture, temperature, to, n_threads); };
        is_float64 ? run(x.as<double>()) : run(x.as<float>());
    };
    if (out_type == "float64") return write(pointer<double>(out));
    if (out_type == "float32") return write(pointer<float>(out));
    if (out_type == "bfloat16") return write(pointer<BFloat16>(out));
    if (out_type == "float16") return write(pointer<Float16>(out));
    throw std::invalid_argument("out_type: not supported");
}

void log_likelihood_at(const py::tuple& frames, bool is_float64, const ScreenedMixture& mixture,
                       uintptr_t out, int n_threads) {
    const FramesOfMixture x(frames, mixture);
    const py::gil_scoped_release release;
    const auto run = [&](auto rows) {
        log_likelihood(rows, mixture, pointer<double>(out), n_threads);
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

void topk_at(const py::tuple& frames, bool is_float64, const ScreenedMixture& mixture, int64_t k,
             double temperature, uintptr_t posteriors, uintptr_t indices, int n_threads) {
    const FramesOfMixture x(frames, mixture);
    if (k < 1 || k > mixture.n_components) throw std::invalid_argument("k: expected 1 to K");
    const py::gil_scoped_release release;
    const auto run = [&](auto rows) {
        topk(rows, mixture, static_cast<int>(k), temperature, pointer<float>(posteriors),
             pointer<int64_t>(indices), n_threads);
    };
    is_float64 ? run(x.as<double>()) : run(x.as<float>());
}

void nearest_at(const py::tuple& frames, bool is_float64, const ScreenedMixture& mixture,
                uintptr_t labels, uintptr_t squared_distances, int n_threads) {
    const FramesOfMixture x(frames, mixture);
    const py::gil_scoped_release release;
    const auto run = [&](auto rows) {
        nearest(rows, mixture, pointer<int64_t>(labels), pointer<float>(squared_distances),
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

}  // namespace
}  // namespace gmm_jepa

PYBIND11_MODULE(_native, module) {
    using namespace gmm_jepa;
    module.doc() = "Kernels for CPUs, and for CUDA where built with nvcc; see gmm_jepa.ops.native.";
    module.def("instruction_sets", [] { return std::string(available_kernels()); },
               "Names of the sets that this processor can run, best first, comma separated.");
    module.def("is_intel", &is_intel, "Whether the processor is Intel's.");
    module.def("use_openmp", &use_openmp_at, py::arg("addresses"),
               "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads.");
    module.def("fingerprint",
               [](uintptr_t address, size_t n_bytes, const std::string& instruction_set) {
                   const Kernels& chosen = kernels(instruction_set.c_str());
                   return chosen.fingerprint(pointer<const void>(address), n_bytes);
               },
               py::arg("address"), py::arg("n_bytes"), py::arg("instruction_set") = "",
               "64 bits that tell arrays apart, others by each set.");
    py::class_<ScreenedMixture>(module, "ScreenedMixture", "A mixture prepared, see csrc/README.md.")
        .def(py::init(&screened_mixture), py::arg("mixture"), py::arg("n_dims"),
             py::arg("instruction_set") = "");
    module.def("em_statistics", &em_statistics_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("n_threads"));
    module.def("posterior", &posterior_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("temperature"), py::arg("out"), py::arg("out_type"),
               py::arg("n_threads"));
    module.def("log_likelihood", &log_likelihood_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("n_threads"));
    module.def("topk", &topk_at, py::arg("frames"), py::arg("is_float64"), py::arg("mixture"),
               py::arg("k"), py::arg("temperature"), py::arg("posteriors"), py::arg("indices"),
               py::arg("n_threads"));
    module.def("nearest", &nearest_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("labels"), py::arg("squared_distances"),
               py::arg("n_threads"));
    module.def("log_mel", &log_mel_at, py::arg("waveform"), py::arg("is_int16"),
               py::arg("lengths"), py::arg("settings"), py::arg("out"), py::arg("n_threads"),
               py::arg("instruction_set") = "");
    module.def("log_mel_supports", &log_mel_supports, py::arg("n_fft"));
    define_encoder(module);
    define_blocks(module);
    cuda::define(module);
}
