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
// Components of a tile of the screen; a warp takes them in two groups of 32, each of them 4
// accumulator tiles of mma.m16n8k16.
constexpr int kTileComponents = 64;
constexpr int kGroupComponents = 32;
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
    const uint32_t rounded = bfloat16_bits(is_usable(z) ? z : 0.0f);
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

// Features are packed 0, 2, 4, ..., then 1, 3, 5, ...: the first half of the depth is every other
// mel bin, which tells the components nearly as well as all of them.
GMM_JEPA_BOTH int feature_position(int d, int n_dims) {
    return d % 2 ? (n_dims + 1) / 2 + d / 2 : d / 2;
}

// Steps of the depth that the first sweep takes to guess a frame's best component.
GMM_JEPA_BOTH constexpr int guess_steps(int steps) { return (steps + 1) / 2; }

// The row of a frame in the 32 x depth operand. A lane of mma.m16n8k16 has values of the rows
// g = lane / 4, g + 8, g + 16 and g + 24, which so are frames 4 g to 4 g + 3.
GMM_JEPA_BOTH int operand_row(int frame) { return 8 * (frame & 3) + (frame >> 2); }

// One lane's part of the scores of 32 frames and 32 components. Of accumulator tile j and rows 16
// h to 16 h + 15, value i is row g + 8 (i >> 1) and component 8 j + 2 (lane & 3) + (i & 1).
struct Scores {
    float c[4][2][4];

    // Frame 4 g + q; n-th of the lane's eight components.
    GMM_JEPA_BOTH float at(int n, int q) const { return c[n >> 1][q >> 1][2 * (q & 1) + (n & 1)]; }
};

// The n-th of a lane's eight components, of 32.
GMM_JEPA_BOTH int lane_component(int lane, int n) {
    return 8 * (n >> 1) + 2 * (lane & 3) + (n & 1);
}

// A lane's word holds in nibble n bits of its n-th component, for its four frames. Between lanes
// whose numbers differ in 4 `distance` alone: each keeps half of its nibbles, in place of the
// others it takes what the other lane gives away. After distances 4, 2 and 1 lane 4 g + t holds
// the word of component lane_component(t, g): nibble i is what lane 4 i + t had.
GMM_JEPA_BOTH uint32_t exchange_nibbles(uint32_t mine, uint32_t other, int lane, int distance) {
    const uint32_t lower = distance == 4 ? 0x0000ffffu : distance == 2 ? 0x00ff00ffu : 0x0f0f0f0fu;
    const int shift = 4 * distance;
    return lane & shift ? (mine & ~lower) | ((other >> shift) & lower)
                        : (mine & lower) | ((other << shift) & ~lower);
}

// The better of two (score, component); the first component of equals.
GMM_JEPA_BOTH bool is_better(float score, int component, float than, int than_component) {
    return score > than || (score == than && component < than_component);
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
