#include "dropout.h"

#include <algorithm>

#include "parallel.h"

namespace gmm_jepa {

void dropout(const float* x, int64_t n, const Dropout& dropping, float* out, const Kernels& kernels,
             int n_threads) {
    constexpr int64_t kRow = 4096, kRowsOfThread = 16;
    const int64_t rows = (n + kRow - 1) / kRow;
    over_shares(rows, 1 + rows / kRowsOfThread, n_threads, [&](int64_t row) {
        const int64_t at = row * kRow;
        const int count = static_cast<int>(std::min(kRow, n - at));
        kernels.dropout(x + at, count, dropping, static_cast<uint64_t>(row), out + at);
    });
}

}  // namespace gmm_jepa
