#include "screen_parameters.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half_types.h"

namespace gmm_jepa {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// A bound looser than this, for a frame at a usual distance, finds nothing out.
constexpr double kLoosestNats = 40.0;
// Precisions of standardised features beyond this could underflow against a tiny z^2.
constexpr double kLargestPrecision = 1e30;
// Integers hold features to this many standard deviations around every component; beyond it a
// feature counts as if it lay there.
constexpr double kReach = 4.0;
// Features whose products integers add up before they become float32: the more, the coarser.
constexpr int kMostDepth = 96;

// What rounding floats does to log-densities; the names are README.md's.
struct Rounding {
    explicit Rounding(bool bfloat16) : u((bfloat16 ? 0x1p-8 : 0.0) + 0x1p-21) {}

    double square() const { return u * (1 + u) * (1 + u) * (1 + u); }

    double u;  // relative, of one operand; 2^-21 holds what float32 adds before
};

}  // namespace

ScreenParameters::ScreenParameters(const MixtureRows& mixture, const Screen& kernels)
    : screen(&kernels),
      n_words(static_cast<int>(round_up(
          mixture.n_dims * (kernels.operands == Operands::kFloat32 ? 2 : 1), kernels.words))),
      n_panels(static_cast<int>(round_up(mixture.n_components, kernels.panel) / kernels.panel)),
      depth(n_words),
      shift(mixture.n_dims),
      inverse_scale(mixture.n_dims),
      weights(size_t(n_panels) * n_words * kernels.panel),
      bias(size_t(n_panels) * kernels.panel, -static_cast<float>(kInfinity)),
      steps(bias.size()) {
    const bool integers = kernels.operands == Operands::kInt16;
    for (int d = 0; d < mixture.n_dims; ++d) shift[d] = static_cast<float>(mixture.centre[d]);
    integers ? choose_integers(mixture) : choose_floats(mixture);
    const bool usable = affine_is_usable();
    std::vector<double> mu(mixture.n_dims), precision(mixture.n_dims);
    std::vector<Bound> bounds(mixture.n_components);
    for (int k = 0; k < mixture.n_components; ++k) {
        if (mixture.log_weights[k] == -kInfinity) continue;  // out: its bias stays minus infinity
        const double* mean = mixture.means + size_t(k) * mixture.n_dims_padded;
        const double* of_mean = mixture.precisions + size_t(k) * mixture.n_dims_padded;
        for (int d = 0; d < mixture.n_dims; ++d) {
            const double scale = inverse_scale[d];
            mu[d] = (mean[d] - shift[d]) * scale;
            precision[d] = of_mean[d] / (scale * scale);
        }
        bounds[k] = integers ? pack_integers(k, mu, precision, mixture.constants[k])
                             : pack_floats(k, mu, precision, mixture.constants[k]);
        if (!usable) bounds[k].alpha = kInfinity;
    }
    lift(mixture, bounds);
}

// One affine for all components: zero mean and unit variance of the mixture.
void ScreenParameters::choose_floats(const MixtureRows& mixture) {
    for (int d = 0; d < mixture.n_dims; ++d) {
        inverse_scale[d] = static_cast<float>(1.0 / std::sqrt(mixture.spread[d]));
    }
    const Rounding rounding(screen->operands == Operands::kBfloat16);
    const double u = rounding.u;
    nu_ = 0x1p-23 * (2.0 * mixture.n_dims + 4.0);
    gamma_ = 0.5 * ((1 + u) * (1 + u) * (1 + u) - 1.0 + rounding.square()) + 0.53 * nu_;
}

// The integers' range spans all components.
void ScreenParameters::choose_integers(const MixtureRows& mixture) {
    for (int d = 0; d < mixture.n_dims; ++d) {
        double range = 0.0;
        for (int k = 0; k < mixture.n_components; ++k) {
            if (mixture.log_weights[k] == -kInfinity) continue;
            const size_t at = size_t(k) * mixture.n_dims_padded + d;
            range = std::max(range, std::fabs(mixture.means[at] - shift[d]) +
                                        kReach / std::sqrt(mixture.precisions[at]));
        }
        inverse_scale[d] = static_cast<float>(kRange / range);
    }
    const int n_blocks = (n_words + kMostDepth - 1) / kMostDepth;
    depth = (n_words + n_blocks - 1) / n_blocks;
    nu_ = 0x1p-23 * (n_blocks + 1);
}

bool ScreenParameters::affine_is_usable() const {
    for (size_t d = 0; d < shift.size(); ++d) {
        if (!std::isfinite(shift[d]) || !(inverse_scale[d] > 1e-30f && inverse_scale[d] < 1e30f)) {
            return false;
        }
    }
    return true;
}

uint32_t* ScreenParameters::words_of(int k) {
    return &weights[size_t(k / screen->panel) * n_words * screen->panel + k % screen->panel];
}

ScreenParameters::Bound ScreenParameters::pack_floats(int k, const std::vector<double>& mu,
                                                      const std::vector<double>& precision,
                                                      double constant) {
    const bool bfloat16 = screen->operands == Operands::kBfloat16;
    const Rounding rounding(bfloat16);
    const double u = rounding.u, square_u = rounding.square();
    const auto round = [bfloat16](double v) {
        return double(bfloat16 ? float(BFloat16(v)) : static_cast<float>(v));
    };
    const int stride = screen->panel;
    uint32_t* word = words_of(k);
    double largest = 0.0, square = 0.0, delta = 0.0, square_hat = 0.0;
    for (size_t d = 0; d < mu.size(); ++d) {
        const double precision_hat = round(precision[d]), slope = round(precision_hat * mu[d]);
        const double mu_hat = precision_hat > 0.0 ? slope / precision_hat : kInfinity;
        largest = std::max({largest, precision[d], std::fabs(slope)});
        square += precision[d] * mu[d] * mu[d];
        delta += precision[d] * (mu_hat - mu[d]) * (mu_hat - mu[d]);
        square_hat += precision_hat * mu_hat * mu_hat;
        const uint32_t first = bits_of(static_cast<float>(slope));
        const uint32_t second = bits_of(static_cast<float>(-0.5 * precision_hat));
        if (bfloat16) {
            word[d * stride] = (first >> 16) | (second & ~0xffffu);
        } else {
            word[2 * d * stride] = first;
            word[(2 * d + 1) * stride] = second;
        }
    }
    const double norm = std::sqrt(square), h = u * norm + std::sqrt(delta);
    Bound bound{constant - 0.5 * square_hat, 0.0, 0.0};
    bound.alpha = 0.5 * (1 + u) * h * h + 0.5 * square_u * square +
                  nu_ * (2.0 * std::fabs(bound.bias) + 1.6 * square) + 1e-6;
    bound.beta = (1 + u) * (1 + u) * h + (square_u + 2.1 * nu_) * norm;
    if (!(largest < kLargestPrecision)) bound.alpha = kInfinity;
    return bound;
}

// The unit of a component's products, in nats: the least with which no sum of a block's products
// leaves 31 bits, whatever the features.
float ScreenParameters::integer_step(const std::vector<double>& mu,
                                     const std::vector<double>& precision) const {
    const int n_dims = static_cast<int>(mu.size());
    double step = 0.0;
    for (int start = 0; start < n_dims; start += depth) {
        double total = 0.0;
        for (int d = start; d < std::min(start + depth, n_dims); ++d) {
            const double first = precision[d] * std::fabs(mu[d]);
            const double second = 0.5 * kSquareUnit * precision[d];
            total += first + second;
            step = std::max({step, first / (kRange - 1), second / (kRange - 1)});
        }
        if (!std::isfinite(total)) return std::numeric_limits<float>::infinity();
        step = std::max(step, total / (2.0 * kRange - depth));
    }
    return static_cast<float>(step * (1.0 + 0x1p-22));
}

// Precisions are cut, means rounded and squares cut: all but the means' rounding raises a score.
ScreenParameters::Bound ScreenParameters::pack_integers(int k, const std::vector<double>& mu,
                                                        const std::vector<double>& precision,
                                                        double constant) {
    const float step = integer_step(mu, precision);
    if (!(step > 1e-30f && step < 1e30f)) return {0.0, kInfinity, kInfinity};
    steps[k] = step;
    constexpr double kRounded = 0.51;  // of z: to an integer, after float32
    uint32_t* word = words_of(k);
    double square_hat = 0.0, distance = 0.0, total = 0.0;
    for (size_t d = 0; d < mu.size(); ++d) {
        const double half = std::floor(0.5 * kSquareUnit * precision[d] / step);
        const double precision_hat = 2.0 / kSquareUnit * half * step;
        const double slope = std::round(precision_hat * mu[d] / step);
        if (half > 0.0) {
            const double mu_hat = slope * step / precision_hat;
            const double off = kRounded + std::fabs(mu_hat - mu[d]);
            square_hat += precision_hat * mu_hat * mu_hat;
            distance += precision_hat * off * off;
        }
        total += half;
        word[d * screen->panel] = (static_cast<uint32_t>(static_cast<int32_t>(slope)) & 0xffffu) |
                                  (static_cast<uint32_t>(-static_cast<int32_t>(half)) << 16);
    }
    // Sums of integers are exact; what follows them is float32.
    const double n_blocks = (n_words + depth - 1) / depth, largest_sum = 0x1p31 * step;
    Bound bound{constant - 0.5 * square_hat - double(kSquareOffset) * step * total, 0.0, 0.0};
    bound.alpha = 0.5 * distance + nu_ * (std::fabs(bound.bias) + n_blocks * largest_sum) + 1e-6;
    bound.beta = std::sqrt(distance);
    return bound;
}

// beta sqrt(Q) <= (theta beta^2 + Q / theta) / 2 with equality at the usual distance, so that the
// bound is a sum of a component's part, added to its bias, and a frame's; Q = 2 (constant - l).
void ScreenParameters::lift(const MixtureRows& mixture, const std::vector<Bound>& bounds) {
    double total = 0.0, mean_beta = 0.0;
    for (int k = 0; k < mixture.n_components; ++k) {
        const double share = std::exp(mixture.log_weights[k]);
        if (std::isfinite(bounds[k].alpha) && share > 0.0) {
            total += share;
            mean_beta += share * bounds[k].beta;
        }
    }
    const double usual = std::sqrt(mixture.n_dims + 2.0 * kMarginNats);
    const double theta = total > 0.0 ? usual / std::max(mean_beta / total, 1e-12) : 1.0;
    gain = 2.0 * gamma_ + 1.0 / theta;
    for (int k = 0; k < mixture.n_components; ++k) {
        if (mixture.log_weights[k] == -kInfinity) continue;
        const Bound& b = bounds[k];
        const double loose = b.alpha + 0.5 * theta * b.beta * b.beta;
        if (!(loose + 0.5 * gain * usual * usual <= kLoosestNats)) {
            unscreened.push_back(k);
            continue;
        }
        const double lift = loose + gain * mixture.constants[k];
        bias[k] = static_cast<float>(b.bias + lift + 2.0 * nu_ * std::fabs(lift));
    }
}

float ScreenParameters::threshold(double best, double margin) const {
    const double lowest = (1.0 + gain) * (best - margin);
    if (!(lowest > -1e30)) return -static_cast<float>(kInfinity);
    return static_cast<float>(lowest - 0x1p-22 * std::fabs(lowest));
}

}  // namespace gmm_jepa
