// A mixture prepared to find the few components that matter for a frame.
//
//   l_k(x) = log w_k - 1/2 sum_d [log(2 pi v_kd) + (x_d - m_kd)^2 / v_kd]
//
// A matrix product in low precision gives an upper bound of every l_k; components whose bound lies
// below the frame's best by more than a margin carry nothing, and the others are computed directly
// in float64.
#pragma once

#include <vector>

#include "arrays.h"
#include "kernels.h"
#include "screen_parameters.h"

namespace gmm_jepa {

struct ScreenedMixture {
    ScreenedMixture(const MixtureView& mixture, const Kernels& kernels);

    // Frames to screen together: their scores stay in the second-level cache, while a panel of
    // weights is read from memory once for all of them.
    int group() const { return screen.screen->group; }

    const Kernels& kernels;
    int n_components, n_dims, n_dims_padded;

    std::vector<double> constants;          // (K,), l_k of a frame on the mean
    std::vector<double> means, precisions;  // (K, n_dims_padded), the latter 1 / v
    std::vector<double> centre;             // (n_dims_padded,), the origin of second moments
    ScreenParameters screen;

  private:
    ScreenParameters parameters(const MixtureView& mixture);
    std::vector<double> moments(const MixtureView& mixture);
};

}  // namespace gmm_jepa
