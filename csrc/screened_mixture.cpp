#include "screened_mixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gmm_jepa {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A bound looser than this, for a frame at a usual distance, finds nothing out.
constexpr double kLoosestNats = 40.0;
// Precisions of standardised features beyond this could underflow against a tiny z^2.
constexpr double kLargestPrecision = 1e30;

double to_bfloat16(double value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    float rounded;
    std::memcpy(&rounded, &bits, 4);
    return rounded;
}

uint32_t float_bits(double value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    return bits;
}

// What rounding does to log-densities; the names are README.md's.
struct Rounding {
    Rounding(bool bfloat16, int n_dims)
        : u((bfloat16 ? 0x1p-8 : 0.0) + 0x1p-21),
          nu(0x1p-23 * (2.0 * n_dims + 4.0)),
          square(u * (1 + u) * (1 + u) * (1 + u)),
          gamma(0.5 * ((1 + u) * (1 + u) * (1 + u) - 1.0 + square) + 0.53 * nu) {}

    double u;       // relative, of one operand; 2^-21 holds what float32 adds before
    double nu;      // relative, of a float32 sum in any order
    double square;  // of z^2
    double gamma;   // error per unit of Q
};

// The screened form of one component: error <= alpha + beta sqrt(Q) + gamma Q.
struct Bound {
    double bias = 0.0, alpha = 0.0, beta = 0.0;
};

Bound bound_of(const double* mu, const double* precision, const double* mu_hat,
               const double* precision_hat, int n_dims, double constant, const Rounding& rounding) {
    double square = 0.0, delta = 0.0, square_hat = 0.0;
    for (int d = 0; d < n_dims; ++d) {
        square += precision[d] * mu[d] * mu[d];
        delta += precision[d] * (mu_hat[d] - mu[d]) * (mu_hat[d] - mu[d]);
        square_hat += precision_hat[d] * mu_hat[d] * mu_hat[d];
    }
    const double u = rounding.u, norm = std::sqrt(square);
    const double h = u * norm + std::sqrt(delta);
    Bound bound;
    bound.bias = constant - 0.5 * square_hat;
    bound.alpha = 0.5 * (1 + u) * h * h + 0.5 * rounding.square * square +
                  rounding.nu * (2.0 * std::fabs(bound.bias) + 1.6 * square) + 1e-6;
    bound.beta = (1 + u) * (1 + u) * h + (rounding.square + 2.1 * rounding.nu) * norm;
    return bound;
}

}  // namespace

ScreenedMixture::ScreenedMixture(const MixtureView& mixture, const Kernels& table)
    : kernels(table),
      n_components(static_cast<int>(mixture.n_components)),
      n_dims(static_cast<int>(mixture.n_dims)),
      n_dims_padded(static_cast<int>(round_up(n_dims, kRowMultiple))),
      n_words(n_dims * (table.bfloat16 ? 1 : 2)),
      n_panels(static_cast<int>(round_up(n_components, table.panel) / table.panel)),
      constants(n_components),
      means(size_t(n_components) * n_dims_padded),
      precisions(size_t(n_components) * n_dims_padded),
      centre(n_dims_padded),
      shift(n_dims),
      inverse_scale(n_dims),
      weights(size_t(n_panels) * n_words * table.panel),
      bias(size_t(n_panels) * table.panel, -static_cast<float>(kInfinity)) {
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
    standardise(mixture);
    pack(mixture);
}

// One affine for all components: zero mean and unit variance of the mixture.
void ScreenedMixture::standardise(const MixtureView& mixture) {
    double total = 0.0, most = -kInfinity;
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
    for (int d = 0; d < n_dims; ++d) {
        shift[d] = static_cast<float>(centre[d]);
        inverse_scale[d] = static_cast<float>(1.0 / std::sqrt(spread[d]));
    }
}

void ScreenedMixture::pack(const MixtureView& mixture) {
    const Rounding rounding(kernels.bfloat16, n_dims);
    const auto round = [this](double v) {
        return kernels.bfloat16 ? to_bfloat16(v) : double(static_cast<float>(v));
    };
    bool usable = true;
    for (int d = 0; d < n_dims; ++d) {
        usable &= std::isfinite(shift[d]) && inverse_scale[d] > 1e-30f && inverse_scale[d] < 1e30f;
    }
    std::vector<double> mu(n_dims), precision(n_dims), mu_hat(n_dims), precision_hat(n_dims);
    std::vector<Bound> bounds(n_components);
    double total = 0.0, mean_beta = 0.0;
    for (int k = 0; k < n_components; ++k) {
        double largest = 0.0;
        for (int d = 0; d < n_dims; ++d) {
            const size_t at = size_t(k) * n_dims_padded + d;
            const double scale = inverse_scale[d];
            mu[d] = (means[at] - shift[d]) * scale;
            precision[d] = precisions[at] / (scale * scale);
            precision_hat[d] = round(precision[d]);
            const double slope = round(precision_hat[d] * mu[d]);
            mu_hat[d] = precision_hat[d] > 0.0 ? slope / precision_hat[d] : kInfinity;
            largest = std::max({largest, precision[d], std::fabs(slope)});
            const size_t panel = k / kernels.panel, lane = k % kernels.panel;
            uint32_t* word = &weights[(panel * n_words) * kernels.panel + lane];
            if (kernels.bfloat16) {
                word[size_t(d) * kernels.panel] = (float_bits(slope) >> 16) |
                                                  (float_bits(-0.5 * precision_hat[d]) & ~0xffffu);
            } else {
                word[size_t(2 * d) * kernels.panel] = float_bits(slope);
                word[size_t(2 * d + 1) * kernels.panel] = float_bits(-0.5 * precision_hat[d]);
            }
        }
        bounds[k] = bound_of(mu.data(), precision.data(), mu_hat.data(), precision_hat.data(),
                             n_dims, constants[k], rounding);
        if (!usable || !(largest < kLargestPrecision)) bounds[k].alpha = kInfinity;
        const double share = std::exp(mixture.log_weights[k]);
        if (std::isfinite(bounds[k].alpha) && share > 0.0) {
            total += share;
            mean_beta += share * bounds[k].beta;
        }
    }
    // beta sqrt(Q) <= (theta beta^2 + Q / theta) / 2 with equality at the usual distance, so that
    // the bound is a sum of a component's part and a frame's; Q = 2 (constant - threshold).
    const double usual = std::sqrt(n_dims + 2.0 * kMarginNats);
    const double theta = total > 0.0 ? usual / std::max(mean_beta / total, 1e-12) : 1.0;
    gain = 2.0 * rounding.gamma + 1.0 / theta;
    for (int k = 0; k < n_components; ++k) {
        if (mixture.log_weights[k] == -kInfinity) continue;  // out: its bias is minus infinity
        const Bound& b = bounds[k];
        const double loose = b.alpha + 0.5 * theta * b.beta * b.beta;
        if (!(loose + 0.5 * gain * usual * usual <= kLoosestNats)) {
            unscreened.push_back(k);
            continue;
        }
        const double lift = loose + gain * constants[k];
        bias[k] = static_cast<float>(b.bias + lift + 2.0 * rounding.nu * std::fabs(lift));
    }
}

float ScreenedMixture::threshold(double best, double margin) const {
    const double lowest = (1.0 + gain) * (best - margin);
    if (!(lowest > -1e30)) return -static_cast<float>(kInfinity);
    return static_cast<float>(lowest - 0x1p-22 * std::fabs(lowest));
}

}  // namespace gmm_jepa
