#include "screened_mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gmm_jepa {
namespace {

// A component computed directly costs a frame as much as this many screened in float32.
constexpr size_t kDirectOverScreened = 16;

}  // namespace

ScreenedMixture::ScreenedMixture(const MixtureView& mixture, const Kernels& table)
    : kernels(table),
      n_components(static_cast<int>(mixture.n_components)),
      n_dims(static_cast<int>(mixture.n_dims)),
      n_dims_padded(static_cast<int>(round_up(n_dims, kRowMultiple))),
      constants(n_components),
      means(size_t(n_components) * n_dims_padded),
      precisions(size_t(n_components) * n_dims_padded),
      centre(n_dims_padded),
      screen(parameters(mixture)) {}

// Fills the tables in double, then packs the screen that suits them.
ScreenParameters ScreenedMixture::parameters(const MixtureView& mixture) {
    for (int k = 0; k < n_components; ++k) {
        double log_determinant = n_dims * std::log(2.0 * M_PI);
        for (int d = 0; d < n_dims; ++d) {
            const double variance = mixture.variances[int64_t(k) * n_dims + d];
            means[size_t(k) * n_dims_padded + d] = mixture.means[int64_t(k) * n_dims + d];
            precisions[size_t(k) * n_dims_padded + d] = 1.0 / variance;
            log_determinant += std::log(variance);
        }
        constants[k] = mixture.log_weights[k] - 0.5 * log_determinant;
    }
    const std::vector<double> spread = moments(mixture);
    const MixtureRows rows{n_components,      n_dims,           n_dims_padded, mixture.log_weights,
                           means.data(),      precisions.data(), constants.data(),
                           centre.data(),     spread.data()};
    ScreenParameters narrow(rows, kernels.narrow);
    const bool is_loose = narrow.unscreened.size() * kDirectOverScreened > size_t(n_components);
    if (is_loose && kernels.narrow.operands != kernels.wide.operands) {
        ScreenParameters wide(rows, kernels.wide);
        if (wide.unscreened.size() < narrow.unscreened.size()) return wide;
    }
    return narrow;
}

// Mean of the mixture, kept as the centre, and its variance.
std::vector<double> ScreenedMixture::moments(const MixtureView& mixture) {
    const double infinity = std::numeric_limits<double>::infinity();
    double total = 0.0, most = -infinity;
    for (int k = 0; k < n_components; ++k) most = std::max(most, mixture.log_weights[k]);
    std::vector<double> share(n_components), spread(n_dims);
    for (int k = 0; k < n_components; ++k) {
        total += share[k] = std::exp(mixture.log_weights[k] - most);
    }
    for (int k = 0; k < n_components; ++k) {
        const double* m = &means[size_t(k) * n_dims_padded];
        for (int d = 0; d < n_dims; ++d) centre[d] += share[k] / total * m[d];
    }
    for (int k = 0; k < n_components; ++k) {
        const double* m = &means[size_t(k) * n_dims_padded];
        for (int d = 0; d < n_dims; ++d) {
            const double z = m[d] - centre[d];
            spread[d] += share[k] / total * (mixture.variances[int64_t(k) * n_dims + d] + z * z);
        }
    }
    return spread;
}

}  // namespace gmm_jepa
