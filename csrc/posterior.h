// Posteriors, log-likelihoods and the most probable components of frames.
#pragma once

#include "arrays.h"
#include "half_types.h"
#include "screened_mixture.h"

namespace gmm_jepa {

// out (n_rows, K), contiguous: softmax_k(l_k / temperature); exactly zero where it is below 2e-15
// of the frame's largest, NaN throughout a frame that is not finite. T: float or double; Out: either,
// BFloat16 or Float16.
template <typename T, typename Out>
void posterior(const Matrix<T>& frames, const ScreenedMixture& mixture, double temperature,
               Out* out, int n_threads);

// out (n_rows,): log p(x).
template <typename T>
void log_likelihood(const Matrix<T>& frames, const ScreenedMixture& mixture, double* out,
                    int n_threads);

// The k largest posteriors (n_rows, k), falling, and their components; ties by component.
template <typename T>
void topk(const Matrix<T>& frames, const ScreenedMixture& mixture, int k, double temperature,
          float* posteriors, int64_t* indices, int n_threads);

// The component with the largest log p(x, k), the first one of equals, and the squared Euclidean
// distance to its mean: nearest centroids, for a mixture of equal weights and one variance. 0 and
// NaN or infinity for a frame that is not finite.
template <typename T>
void nearest(const Matrix<T>& frames, const ScreenedMixture& mixture, int64_t* labels,
             float* squared_distances, int n_threads);

}  // namespace gmm_jepa
