// The CUDA half of gmm_jepa._native, and its emulation. As in module.cpp, the caller owns the
// memory and has checked shapes, types and devices.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "em.h"
#include "tile.h"

namespace py = pybind11;

namespace gmm_jepa::cuda {
namespace {

template <typename T>
T* pointer(const py::handle& address) {
    return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

template <typename T>
Matrix<T> matrix_of(const py::tuple& t) {
    const Matrix<T> matrix{pointer<const T>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
                           t[3].cast<int64_t>(), t[4].cast<int64_t>()};
    if (matrix.n_rows < 0 || matrix.n_columns < 1 || (matrix.n_rows > 0 && !matrix.data)) {
        throw std::invalid_argument("frames: expected an address, rows >= 0, columns >= 1, got " +
                                    std::to_string(matrix.n_rows) + " x " +
                                    std::to_string(matrix.n_columns));
    }
    return matrix;
}

// Eight addresses in the order of Operands, then K.
Operands operands_of(const py::tuple& t, int64_t n_dims) {
    const Operands operands{pointer<const uint16_t>(t[0]),
                            pointer<const float>(t[1]),
                            pointer<const float>(t[2]),
                            pointer<const double>(t[3]),
                            pointer<const double>(t[4]),
                            pointer<const float>(t[5]),
                            pointer<const float>(t[6]),
                            pointer<const double>(t[7]),
                            t[8].cast<int64_t>(),
                            n_dims};
    for (int i = 0; i < 8; ++i) {
        if (!t[i].cast<uintptr_t>()) throw std::invalid_argument("mixture: expected addresses");
    }
    if (operands.n_components < 1 || operands.n_components > kMostComponents ||
        n_dims > kMostFeatures) {
        throw std::invalid_argument("mixture: expected 1 to " + std::to_string(kMostComponents) +
                                    " components, 1 to " + std::to_string(kMostFeatures) +
                                    " features, got " + std::to_string(operands.n_components) +
                                    " and " + std::to_string(n_dims));
    }
    return operands;
}

Statistics statistics_of(const py::tuple& out) {
    return {pointer<double>(out[0]), pointer<double>(out[1]), pointer<double>(out[2]),
            pointer<double>(out[3])};
}

int64_t emulated_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
                    const py::tuple& out, bool hard, double margin) {
    const Operands operands = operands_of(mixture, frames[2].cast<int64_t>());
    const Statistics statistics = statistics_of(out);
    const auto run = [&](const auto& matrix) {
        const py::gil_scoped_release release;
        return em_statistics_emulated(matrix, operands, {hard, margin}, statistics);
    };
    return is_float64 ? run(matrix_of<double>(frames)) : run(matrix_of<float>(frames));
}

#if GMM_JEPA_CUDA
// workspace: address and bytes; place: device and stream
void cuda_at(const py::tuple& frames, bool is_float64, const py::tuple& mixture,
             const py::tuple& out, bool hard, double margin, const py::tuple& workspace,
             const py::tuple& place) {
    const Operands operands = operands_of(mixture, frames[2].cast<int64_t>());
    const Statistics statistics = statistics_of(out);
    const size_t needed = workspace_bytes(operands.n_components, operands.n_dims);
    const size_t given = workspace[0].cast<uintptr_t>() ? workspace[1].cast<size_t>() : 0;
    if (given < needed) {
        throw std::invalid_argument("workspace: expected " + std::to_string(needed) +
                                    " bytes, got " + std::to_string(given));
    }
    void* const memory = pointer<void>(workspace[0]);
    const int device = place[0].cast<int>();
    void* const stream = pointer<void>(place[1]);
    const auto run = [&](const auto& matrix) {
        const py::gil_scoped_release release;
        em_statistics(matrix, operands, {hard, margin}, statistics, memory, device, stream);
    };
    is_float64 ? run(matrix_of<double>(frames)) : run(matrix_of<float>(frames));
}

// Pairs and spilled chunks of the last call with a workspace.
py::tuple refined_at(uintptr_t workspace, int64_t n_components, int64_t n_dims,
                     const py::tuple& place) {
    void* const stream = pointer<void>(place[1]);
    const int device = place[0].cast<int>();
    const auto refined = [&] {
        const py::gil_scoped_release release;
        return last_refined(reinterpret_cast<void*>(workspace), n_components, n_dims, device,
                            stream);
    }();
    return py::make_tuple(refined.pairs, refined.spilled_chunks);
}
#endif

}  // namespace

void define(py::module_& module) {
    module.def("em_statistics_emulated", &emulated_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("hard"), py::arg("margin"),
               "The CUDA kernels' algorithm, one step after another on the CPU; returns how many "
               "pairs its screen left.");
#if GMM_JEPA_CUDA
    module.attr("cuda_architectures") = GMM_JEPA_CUDA_ARCHITECTURES;
    module.def("cuda_device_count", &device_count);
    module.def("em_workspace_bytes", &workspace_bytes, py::arg("n_components"), py::arg("n_dims"));
    module.def("em_statistics_cuda", &cuda_at, py::arg("frames"), py::arg("is_float64"),
               py::arg("mixture"), py::arg("out"), py::arg("hard"), py::arg("margin"),
               py::arg("workspace"), py::arg("place"));
    module.def("em_refined", &refined_at, py::arg("workspace"), py::arg("n_components"),
               py::arg("n_dims"), py::arg("place"),
               "Pairs and spilled chunks of the last call with a workspace; waits for it.");
#else
    module.attr("cuda_architectures") = "";
#endif
}

}  // namespace gmm_jepa::cuda
