// gmm_jepa._native: addresses, sizes and strides in; results are written to addresses, but for
// prepared mixtures and single numbers, which are returned. The callers (gmm_jepa/ops/) own the memory
// that the addresses are of, and have checked shapes, types and devices.
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "em.h"
#include "half_types.h"
#include "kernels.h"
#include "parallel.h"
#include "posterior.h"
#include "screened_mixture.h"

namespace gmm_jepa {
namespace {

std::unique_ptr<ScreenedMixture> screened_mixture(const py::tuple& parameters,
                                                  const std::string& instruction_set) {
    const auto mixture = of_python<MixtureView>(parameters);
    const int64_t most = int64_t(1) << 28;  // twice as many, and some padding, are an int
    if (mixture.n_components < 1 || mixture.n_components > most || mixture.n_dims < 1 ||
        mixture.n_dims > most || !mixture.log_weights || !mixture.means || !mixture.variances) {
        throw std::invalid_argument("mixture: expected addresses, 1 to 2^28 components, features");
    }
    const Kernels& table = kernels(instruction_set.c_str());
    const py::gil_scoped_release release;
    return std::make_unique<ScreenedMixture>(mixture, table);
}

void em_statistics_at(const Rows& frames, bool is_float64, const ScreenedMixture& mixture,
                      const Statistics& out, int n_threads) {
    on_frames(frames, is_float64, mixture.n_dims,
              [&](const auto& x) { em_statistics(x, mixture, out, n_threads); });
}

// out_type: float64, float32, bfloat16 or float16
void posterior_at(const Rows& frames, bool is_float64, const ScreenedMixture& mixture,
                  double temperature, void* out, const std::string& out_type, int n_threads) {
    const auto write = [&](auto* to) {
        on_frames(frames, is_float64, mixture.n_dims,
                  [&](const auto& x) { posterior(x, mixture, temperature, to, n_threads); });
    };
    if (out_type == "float64") return write(static_cast<double*>(out));
    if (out_type == "float32") return write(static_cast<float*>(out));
    if (out_type == "bfloat16") return write(static_cast<BFloat16*>(out));
    if (out_type == "float16") return write(static_cast<Float16*>(out));
    throw std::invalid_argument("out_type: not supported");
}

void log_likelihood_at(const Rows& frames, bool is_float64, const ScreenedMixture& mixture,
                       double* out, int n_threads) {
    on_frames(frames, is_float64, mixture.n_dims,
              [&](const auto& x) { log_likelihood(x, mixture, out, n_threads); });
}

void topk_at(const Rows& frames, bool is_float64, const ScreenedMixture& mixture, int64_t k,
             double temperature, float* posteriors, int64_t* indices, int n_threads) {
    if (k < 1 || k > mixture.n_components) throw std::invalid_argument("k: expected 1 to K");
    on_frames(frames, is_float64, mixture.n_dims, [&](const auto& x) {
        topk(x, mixture, static_cast<int>(k), temperature, posteriors, indices, n_threads);
    });
}

void kmeans_assign_at(const Rows& frames, bool is_float64, const ScreenedMixture& mixture,
                      int64_t* labels, float* squared_distances, int n_threads) {
    on_frames(frames, is_float64, mixture.n_dims, [&](const auto& x) {
        nearest(x, mixture, labels, squared_distances, n_threads);
    });
}

}  // namespace
}  // namespace gmm_jepa

PYBIND11_MODULE(_native, module) {
    using namespace gmm_jepa;
    module.doc() = "Kernels for CPUs, and for CUDA where built with nvcc; see gmm_jepa.ops.native.";
    module.def("instruction_sets", [] { return std::string(available_kernels()); },
               "Names of the sets that this processor can run, best first, comma separated.");
    module.def("is_intel", &is_intel, "Whether the processor is Intel's.");
    define(module, "use_openmp", &use_openmp);
    module.def("fingerprint",
               [](uintptr_t address, size_t n_bytes, const std::string& instruction_set) {
                   const Kernels& chosen = kernels(instruction_set.c_str());
                   return chosen.fingerprint(reinterpret_cast<const void*>(address), n_bytes);
               },
               py::arg("address"), py::arg("n_bytes"), py::arg("instruction_set") = "",
               "64 bits that tell arrays apart, others by each set.");
    py::class_<ScreenedMixture>(module, "ScreenedMixture", "A mixture prepared, see csrc/README.md.")
        .def(py::init(&screened_mixture));
    define(module, "em_statistics", &em_statistics_at);
    define(module, "posterior", &posterior_at);
    define(module, "log_likelihood", &log_likelihood_at);
    define(module, "topk", &topk_at);
    define(module, "kmeans_assign", &kmeans_assign_at);
    define_front_end(module);
    define_encoder(module);
    define_blocks(module);
    define_losses(module);
    define_cuda(module);
}
