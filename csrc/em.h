// Sufficient statistics of one EM iteration.
#pragma once

#include "arrays.h"
#include "screened_mixture.h"

namespace gmm_jepa {

// All float64, contiguous, written in full.
struct Statistics {
    double* counts;          // (K,), sum of responsibilities
    double* first;           // (K, D), responsibilities' x frames
    double* second;          // (K, D), responsibilities' x frames squared
    double* log_likelihood;  // (), sum of log p(x)
};

// T is float or double. The same bits for any number of threads; NaN throughout where a frame is
// not finite. Throws std::bad_alloc, and what `parallel` does.
template <typename T>
void em_statistics(const Matrix<T>& frames, const ScreenedMixture& mixture, const Statistics& out,
                   int n_threads);

}  // namespace gmm_jepa
