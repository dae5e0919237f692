// What the module receives from Python: an address, sizes, and strides in elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gmm_jepa {

template <typename T>
struct Matrix {
    const T* data;
    int64_t n_rows;
    int64_t n_columns;
    int64_t stride_row;
    int64_t stride_column;

    const T& operator()(int64_t row, int64_t column) const {
        return data[row * stride_row + column * stride_column];
    }
};

// Parameters of a diagonal mixture: float64, contiguous.
struct MixtureView {
    const double* log_weights;  // (K,)
    const double* means;        // (K, D)
    const double* variances;    // (K, D)
    int64_t n_components;
    int64_t n_dims;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

}  // namespace gmm_jepa
