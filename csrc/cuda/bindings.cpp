// The CUDA half of gmm_jepa._native, and its emulation. As in module.cpp, the caller owns the
// memory and has checked shapes, types and devices.
#include "../bindings.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "em.h"
#include "tile.h"

namespace gmm_jepa {
namespace cuda {
namespace {

struct Workspace {
    void* memory;
    size_t n_bytes;
};

struct Place {
    int device;
    void* stream;
};

void check(const Operands& mixture) {
    if (mixture.n_components < 1 || mixture.n_components > kMostComponents || mixture.n_dims < 1 ||
        mixture.n_dims > kMostFeatures) {
        throw std::invalid_argument("mixture: expected 1 to " + std::to_string(kMostComponents) +
                                    " components, 1 to " + std::to_string(kMostFeatures) +
                                    " features, got " + std::to_string(mixture.n_components) +
                                    " and " + std::to_string(mixture.n_dims));
    }
    for (const void* field : {static_cast<const void*>(mixture.weights),
                              static_cast<const void*>(mixture.bias),
                              static_cast<const void*>(mixture.guess),
                              static_cast<const void*>(mixture.table),
                              static_cast<const void*>(mixture.constants),
                              static_cast<const void*>(mixture.shift),
                              static_cast<const void*>(mixture.inverse_scale),
                              static_cast<const void*>(mixture.gain)}) {
        if (!field) throw std::invalid_argument("mixture: expected addresses");
    }
}

// Returns how many pairs the screen left.
int64_t emulated_at(const Rows& frames, bool is_float64, const Operands& mixture,
                    const Statistics& out, const Mode& mode) {
    check(mixture);
    return on_frames(frames, is_float64, mixture.n_dims, [&](const auto& x) {
        return em_statistics_emulated(x, mixture, mode, out);
    });
}

#if GMM_JEPA_CUDA
void cuda_at(const Rows& frames, bool is_float64, const Operands& mixture, const Statistics& out,
             const Mode& mode, const Workspace& workspace, const Place& place) {
    check(mixture);
    const size_t needed = workspace_bytes(mixture.n_components, mixture.n_dims);
    const size_t given = workspace.memory ? workspace.n_bytes : 0;
    if (given < needed) {
        throw std::invalid_argument("workspace: expected " + std::to_string(needed) +
                                    " bytes, got " + std::to_string(given));
    }
    on_frames(frames, is_float64, mixture.n_dims, [&](const auto& x) {
        em_statistics(x, mixture, mode, out, workspace.memory, place.device, place.stream);
    });
}

// Pairs and spilled chunks of the last call with a workspace, for which it waits.
std::pair<int64_t, int64_t> refined_at(void* workspace, int64_t n_components, int64_t n_dims,
                                       const Place& place) {
    const Refined refined =
        last_refined(workspace, n_components, n_dims, place.device, place.stream);
    return {refined.pairs, refined.spilled_chunks};
}
#endif

}  // namespace
}  // namespace cuda

void define_cuda(py::module_& module) {
    define(module, "em_statistics_emulated", &cuda::emulated_at);
#if GMM_JEPA_CUDA
    module.attr("cuda_architectures") = GMM_JEPA_CUDA_ARCHITECTURES;
    define(module, "cuda_device_count", &cuda::device_count);
    define(module, "em_workspace_bytes", &cuda::workspace_bytes);
    define(module, "em_statistics_cuda", &cuda::cuda_at);
    define(module, "em_refined", &cuda::refined_at);
#else
    module.attr("cuda_architectures") = "";
#endif
}

}  // namespace gmm_jepa
