// What an optimiser does to all of a model's tensors at once.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace gmm_jepa {

// Tensor i has sizes[i] values.
template <typename T>
struct TensorList {
    std::vector<T*> tensors;
    std::vector<int64_t> sizes;
};

// Sum of the squares of all values. The same bits for any n_threads.
double sum_of_squares(const TensorList<const float>& list, const Kernels& kernels, int n_threads);

// to += weight (from - to), tensor by tensor.
void move_towards(const TensorList<float>& to, const TensorList<const float>& from, float weight,
                  const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
