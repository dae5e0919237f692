// The arithmetic and the layout of the EM kernels, for device and host alike: em.cu runs these
// functions on a GPU, emulate.cpp one after another on the CPU, so that tests reach them anywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define GMM_JEPA_BOTH __host__ __device__ __forceinline__
#else
#define GMM_JEPA_BOTH inline
#endif

namespace gmm_jepa::cuda {

// A warp owns 32 frames: bit i of a mask word is frame i of the 32.
constexpr int kTileFrames = 32;
// Components of a tile of the screen: 8 accumulator tiles of mma.m16n8k16.
constexpr int kTileComponents = 64;
// Depth of one mma: 8 features, each with its square beside it.
constexpr int kStepDepth = 16;
// A sum of squares is taken in 32 parts, part p over features p, p + 32, ..., and the parts are
// added 16 apart, then 8, 4, 2, 1: the same bits in the refinement, where kPairLanes lanes have
// four parts each, and in the moments, where 32 lanes have one each.
constexpr int kParts = 32;
constexpr int kPairLanes = 8;
// Pairs (frame, component) refined between two updates of a frame's sum.
constexpr int kBatch = 32;
// Components whose mask words a warp reads at a time, two a lane.
constexpr int kMaskComponents = 64;
// Beyond this z^2 times a precision may leave float32's range; such a frame is computed directly.
constexpr float kLargest = 1e12f;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Frames between two launches. Their masks (128 B each at K = 1,024) and values (320 B at D = 80)
// stay in the second-level cache: 8 + 21 MB.
GMM_JEPA_BOTH int64_t chunk_frames(int64_t n_components) {
    return n_components <= 8192 ? 65536 : 8192;
}

// A chunk's moments are added up in this many parts, each in the order of its frames.
GMM_JEPA_BOTH int n_segments(int64_t n_components) {
    const int64_t n = 8192 / n_components;
    return static_cast<int>(n < 2 ? 2 : n > 64 ? 64 : n);
}

GMM_JEPA_BOTH int depth_of(int n_dims) {
    return (2 * n_dims + kStepDepth - 1) / kStepDepth * kStepDepth;
}

// ---- screen ----

GMM_JEPA_BOTH uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

GMM_JEPA_BOTH float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; the value is finite.
GMM_JEPA_BOTH uint32_t bfloat16_bits(float value) {
    const uint32_t bits = float_bits(value);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <typename T>
GMM_JEPA_BOTH float standardised(T x, float shift, float inverse_scale) {
    return static_cast<float>((x - shift) * inverse_scale);
}

GMM_JEPA_BOTH bool is_usable(float z) { return fabsf(z) <= kLargest; }

// The operand of one feature: z in the lower half, z^2 of the rounded z in the upper.
GMM_JEPA_BOTH uint32_t feature_word(float z) {
    if (!is_usable(z)) return 0;
    const uint32_t rounded = bfloat16_bits(z);
    const float z_hat = bits_float(rounded << 16);
    return rounded | (bfloat16_bits(z_hat * z_hat) << 16);
}

// Scores at or above this may lie within `margin` of `best`, an exact log-density of the frame.
GMM_JEPA_BOTH float score_threshold(double best, double margin, double gain) {
    const double lowest = (1.0 + gain) * (best - margin);
    if (!(lowest > -1e30)) return -static_cast<float>(kInfinity);
    return static_cast<float>(lowest - 0x1p-22 * fabs(lowest));
}

// Not a number survives: only what is certainly below is left out.
GMM_JEPA_BOTH bool survives(float score, float threshold) { return !(score < threshold); }

// mma.m16n8k16 gives a lane four of 16 x 8 values, c[0] to c[3]: their frame and component.
GMM_JEPA_BOTH int accumulator_frame(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
GMM_JEPA_BOTH int accumulator_component(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

// A ballot over c[i] holds in bit 4 g + t frame g (of 8) and component 2 t + (i & 1). The eight
// bits of component pair t, as a byte.
GMM_JEPA_BOTH uint32_t ballot_frames(uint32_t ballot, int t) {
    uint32_t bits = (ballot >> t) & 0x11111111u;
    bits = (bits | (bits >> 3)) & 0x03030303u;
    bits = (bits | (bits >> 6)) & 0x000f000fu;
    return (bits | (bits >> 12)) & 0xffu;
}

// The better of two (score, component); the first component of equals.
GMM_JEPA_BOTH bool is_better(float score, int component, float than, int than_component) {
    return score > than || (score == than && component < than_component);
}

// The mask word of one component of an accumulator tile, out of ballots over c[i] of the upper and
// the lower 16 frames.
GMM_JEPA_BOTH uint32_t component_word(const uint32_t ballots[2][4], int component) {
    // Selected, not indexed: a run-time index would move the ballots out of registers.
    const bool odd = component & 1;
    const int t = component >> 1;
    return ballot_frames(odd ? ballots[0][1] : ballots[0][0], t) |
           ballot_frames(odd ? ballots[0][3] : ballots[0][2], t) << 8 |
           ballot_frames(odd ? ballots[1][1] : ballots[1][0], t) << 16 |
           ballot_frames(odd ? ballots[1][3] : ballots[1][2], t) << 24;
}

// The first n of 32 bits.
GMM_JEPA_BOTH uint32_t first_bits(int64_t n) {
    return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u;
}

// ---- refinement ----

GMM_JEPA_BOTH double add_square(double sum, double x, double mean, double precision) {
    const double difference = x - mean;
    return fma(difference * difference, precision, sum);
}

GMM_JEPA_BOTH double log_joint(double constant, double squares) { return constant - 0.5 * squares; }

// exp(value - largest), and nothing of what has no weight whatever `largest` is.
GMM_JEPA_BOTH double share(double value, double largest) {
    return value == -kInfinity ? 0.0 : exp(value - largest);
}

// What turns a frame's log-densities into responsibilities.
struct alignas(16) Normaliser {
    double largest, inverse_sum;

    GMM_JEPA_BOTH double responsibility(double value) const {
        return share(value, largest) * inverse_sum;
    }
};

// A frame's log-sum-exp, some pairs at a time: raise `largest`, then add their shares of it.
struct LogSumExp {
    double largest = -kInfinity;
    double sum = 0.0;
    int component = -1;  // the first one at `largest`

    GMM_JEPA_BOTH void see(double value, int k) {
        if (value > pending || (value == pending && component < 0)) {
            pending = value;
            component = k;
        }
    }

    // After all pairs of a batch were seen.
    GMM_JEPA_BOTH void raise() {
        sum *= share(largest, pending);
        largest = pending;
    }

    GMM_JEPA_BOTH void add(double part) { sum += part; }

    GMM_JEPA_BOTH double value(bool hard) const {
        return hard && sum == sum ? largest : largest + log(sum);
    }

    // Kept apart: where log-densities are huge, their sum with a logarithm would lose the latter.
    GMM_JEPA_BOTH Normaliser normaliser() const { return {largest, 1.0 / sum}; }

    double pending = -kInfinity;
};

// ---- moments about the component's own mean ----

GMM_JEPA_BOTH void add_moments(double r, double difference, double& first, double& second) {
    const double weighted = r * difference;
    first += weighted;
    second = fma(weighted, difference, second);
}

// Moments about `mean` become moments about zero.
GMM_JEPA_BOTH double first_about_zero(double count, double mean, double first) {
    return fma(count, mean, first);
}

GMM_JEPA_BOTH double second_about_zero(double count, double mean, double first, double second) {
    return fma(mean, fma(count, mean, 2.0 * first), second);
}

}  // namespace gmm_jepa::cuda
