// Dropout of n values in one pass.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// out[i] = x[i] scale, or 0. The same bits for any n_threads.
void dropout(const float* x, int64_t n, const Dropout& dropping, float* out, const Kernels& kernels,
             int n_threads);

}  // namespace gmm_jepa
