#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "lists.h"
#include "losses.h"

namespace gmm_jepa {
namespace {

void check_rows(const WeightedRows& rows, const Kernels&) {
    if (rows.n_rows < 0 || rows.n_columns < 1 || rows.stride < 0 || !rows.values) {
        throw std::invalid_argument("rows: expected sizes");
    }
}

template <typename T>
TensorList<T> tensor_list(const std::vector<T*>& tensors, const std::vector<int64_t>& sizes) {
    if (tensors.size() != sizes.size()) {
        throw std::invalid_argument("sizes: expected as many as addresses");
    }
    return {tensors, sizes};
}

double sum_of_squares_at(const std::vector<const float*>& tensors,
                         const std::vector<int64_t>& sizes, const Kernels& table, int n_threads) {
    return sum_of_squares(tensor_list(tensors, sizes), table, n_threads);
}

void move_towards_at(const std::vector<float*>& to, const std::vector<const float*>& from,
                     const std::vector<int64_t>& sizes, float weight, const Kernels& table,
                     int n_threads) {
    move_towards(tensor_list(to, sizes), tensor_list(from, sizes), weight, table, n_threads);
}

}  // namespace

void define_losses(py::module_& module) {
    define(module, "masked_kl", &masked_kl, check_rows);
    define(module, "masked_cross_entropy", &masked_cross_entropy, check_rows);
    define(module, "masked_mse", &masked_mse, check_rows);
    define(module, "sum_of_squares", &sum_of_squares_at);
    define(module, "move_towards", &move_towards_at);
}

}  // namespace gmm_jepa
