// The snake activation, x + sin(a x)^2 / a with one a for each channel, and its gradients.
#pragma once

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

// T: float, or uint16_t for bfloat16. x (B, T, C), a (C,) -> out (B, T, C). What lies beyond a row's
// length is zero in the output and in the gradient of x. The same bits for any n_threads.
template <typename T>
void snake(const FramesShape& shape, const T* x, const float* a, float* out, const Kernels& kernels,
           int n_threads);

// Written in full: grad_x (B, T, C) and grad_a (C,). The same bits for any n_threads.
template <typename T>
void snake_backward(const FramesShape& shape, const T* x, const float* a, const float* grad,
                    T* grad_x, float* grad_a, const Kernels& kernels, int n_threads);

}  // namespace gmm_jepa
