// A mixture's parameters as a screen multiplies them, and the bound of the screen's error.
//
// The score S of a component is an upper bound of its log-density, as far as it matters:
//   l <= S + alpha + beta sqrt(Q) + gamma Q,   Q = sum_d (x_d - m_d)^2 / v_d;
// README.md derives alpha, beta and gamma for each kind of operands.
#pragma once

#include <vector>

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

// Components further below a frame's best are left out: exp(-34) = 2e-15 of its weight each.
constexpr double kMarginNats = 34.0;

// One mixture in double precision; rows of n_dims_padded values.
struct MixtureRows {
    int n_components, n_dims, n_dims_padded;
    const double* log_weights;
    const double *means, *precisions;  // the latter 1 / v
    const double* constants;           // (K,), log-density on the mean
    const double *centre, *spread;     // (D,), mean and variance of the mixture
};

struct ScreenParameters {
    ScreenParameters(const MixtureRows& mixture, const Screen& screen);

    // Operands of a frame of n_dims features; false where it must be computed directly.
    bool pack(const float* x, uint32_t* words) const {
        return screen->pack_float(x, shift.data(), inverse_scale.data(), int(shift.size()), words);
    }
    bool pack(const double* x, uint32_t* words) const {
        return screen->pack_double(x, shift.data(), inverse_scale.data(), int(shift.size()), words);
    }

    // Scores (n_frames, bias.size()) of packed frames, and the best of each.
    void run(const uint32_t* words, int n_frames, float* scores, float* best) const {
        screen->run({words, n_frames, n_words, weights.data(), bias.data(), steps.data(), n_panels,
                     depth, scores, best});
    }

    // Scores at or above this belong to components that may come within `margin` of `best`.
    float threshold(double best, double margin) const;

    const Screen* screen;
    int n_words, n_panels, depth;             // of ScreenProducts
    std::vector<float> shift, inverse_scale;  // (D,), z = (x - shift) inverse_scale
    AlignedVector<uint32_t> weights;          // (n_panels, n_words, panel)
    AlignedVector<float> bias, steps;         // (n_panels * panel,)
    std::vector<int32_t> unscreened;          // components whose bound would be too loose
    double gain = 0.0;                        // how much the bound loosens per nat of a low best

  private:
    // What is known of a screened component.
    struct Bound {
        double bias, alpha, beta;
    };

    void choose_floats(const MixtureRows& mixture);
    void choose_integers(const MixtureRows& mixture);
    bool affine_is_usable() const;
    Bound pack_floats(int k, const std::vector<double>& mu, const std::vector<double>& precision,
                      double constant);
    Bound pack_integers(int k, const std::vector<double>& mu, const std::vector<double>& precision,
                        double constant);
    float integer_step(const std::vector<double>& mu, const std::vector<double>& precision) const;
    void lift(const MixtureRows& mixture, const std::vector<Bound>& bounds);
    uint32_t* words_of(int k);

    double gamma_ = 0.0;  // error per unit of Q
    double nu_ = 0.0;     // relative, of a float32 sum of a score's terms
};

}  // namespace gmm_jepa
