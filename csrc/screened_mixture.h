// A mixture prepared to find the few components that matter for a frame.
//
//   l_k(x) = log w_k - 1/2 sum_d [log(2 pi v_kd) + (x_d - m_kd)^2 / v_kd]
//
// A matrix product in low precision gives an upper bound of every l_k; components whose bound lies
// below the frame's best by more than a margin carry nothing, and the others are computed directly
// in float64. README.md derives the bound.
#pragma once

#include <vector>

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

// Components further below a frame's best are left out: exp(-34) = 2e-15 of its weight each.
constexpr double kMarginNats = 34.0;

struct ScreenedMixture {
    ScreenedMixture(const MixtureView& mixture, const Kernels& kernels);

    // Scores at or above this belong to components that may come within `margin` of `best`.
    float threshold(double best, double margin) const;

    const Kernels& kernels;
    int n_components, n_dims, n_dims_padded, n_words, n_panels;

    std::vector<double> constants;          // (K,), l_k of a frame on the mean
    std::vector<double> means, precisions;  // (K, n_dims_padded), the latter 1 / v
    std::vector<double> centre;             // (n_dims_padded,), the origin of second moments

    std::vector<float> shift, inverse_scale;  // (D,), z = (x - shift) inverse_scale
    std::vector<uint32_t> weights;            // (n_panels, n_words, panel)
    std::vector<float> bias;                  // (n_panels * panel,)
    std::vector<int32_t> unscreened;          // components whose bound would be too loose
    double gain = 0.0;                        // how much the bound loosens per nat of a low best

  private:
    void standardise(const MixtureView& mixture);
    void pack(const MixtureView& mixture);
};

}  // namespace gmm_jepa
