// Masked losses of rows, with the gradient in the same pass.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// Rows (n, K) of float32, K contiguous, with a weight each. Rows of weight 0 are not read; their
// losses and gradients are 0. `gradient` (n, K), contiguous, is that of the weighted sum; may be null.
struct WeightedRows {
    const float* values;
    int64_t n_rows, stride;
    int n_columns;
    const float* weights;
    float* gradient;
};

// targets: rows (m, K), contiguous; row i has the target `of_row[i]`. losses (n,).
void masked_kl(const WeightedRows& logits, const float* targets, const int64_t* of_row,
               RowLoss* losses, const Kernels& kernels, int n_threads);

// labels (n,), 0 to K - 1 where the weight is not 0. Throws std::out_of_range where one is not, and has
// done nothing then.
void masked_cross_entropy(const WeightedRows& logits, const int64_t* labels, RowLoss* losses,
                          const Kernels& kernels, int n_threads);

// targets (n, K), contiguous; mean over the columns.
void masked_mse(const WeightedRows& predictions, const float* targets, RowLoss* losses,
                const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
