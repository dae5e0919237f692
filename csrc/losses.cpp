#include "losses.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr int64_t kValuesOfThread = 1 << 15;  // at least, or threads cost more than they bring

// work(i, gradient row or null, scratch row) for rows with a weight; zeros for the others.
template <typename Work>
void over_rows(const WeightedRows& rows, RowLoss* losses, int n_threads, const Work& work) {
    const int64_t values = rows.n_rows * rows.n_columns;
    const auto make = [&] { return std::vector<float>(rows.n_columns); };
    over_shares(rows.n_rows, 1 + values / kValuesOfThread, n_threads, make,
                [&](int64_t i, std::vector<float>& scratch) {
        float* gradient = rows.gradient ? rows.gradient + i * rows.n_columns : nullptr;
        if (rows.weights[i] != 0.0f) return work(i, gradient, scratch.data());
        losses[i] = {0.0f, 0.0f, 0.0f};
        if (gradient) std::fill_n(gradient, rows.n_columns, 0.0f);
    });
}

}  // namespace

void masked_kl(const WeightedRows& logits, const float* targets, const int64_t* of_row,
               RowLoss* losses, const Kernels& kernels, int n_threads) {
    over_rows(logits, losses, n_threads, [&](int64_t i, float* gradient, float* scratch) {
        kernels.kl_row(logits.values + i * logits.stride, targets + of_row[i] * logits.n_columns,
                       logits.n_columns, logits.weights[i], scratch, &losses[i], gradient);
    });
}

void masked_cross_entropy(const WeightedRows& logits, const int64_t* labels, RowLoss* losses,
                          const Kernels& kernels, int n_threads) {
    for (int64_t i = 0; i < logits.n_rows; ++i) {
        if (logits.weights[i] == 0.0f) continue;
        if (labels[i] < 0 || labels[i] >= logits.n_columns) {
            throw std::out_of_range("labels: expected 0 to K - 1 where the weight is not 0");
        }
    }
    over_rows(logits, losses, n_threads, [&](int64_t i, float* gradient, float* scratch) {
        kernels.cross_entropy_row(logits.values + i * logits.stride, labels[i], logits.n_columns,
                                  logits.weights[i], scratch, &losses[i], gradient);
    });
}

void masked_mse(const WeightedRows& predictions, const float* targets, RowLoss* losses,
                const Kernels& kernels, int n_threads) {
    const int K = predictions.n_columns;
    over_rows(predictions, losses, n_threads, [&](int64_t i, float* gradient, float*) {
        losses[i] = {kernels.squared_error_row(predictions.values + i * predictions.stride,
                                               targets + i * K, K,
                                               predictions.weights[i], gradient),
                     0.0f, 0.0f};
    });
}

}  // namespace gmm_jepa
