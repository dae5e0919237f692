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
// The refinement: a block of 8 warps has 256 frames, 8 mask words a component. Its warps take
// groups of 8 components in turns, so that a block reads a component's parameters once.
constexpr int kRefineWarps = 8;
constexpr int kBlockTiles = 8;
constexpr int kBlockFrames = kBlockTiles * kTileFrames;
constexpr int kRefineComponents = 8;
// Pairs (frame, component) refined between two updates of the frames' sums.
constexpr int kBatch = 32;
// Log-densities that a warp remembers until the frames' sums are known, 370 to 450 in the mean. The
// pairs beyond stay, negligible or not.
constexpr int kRemembered = 768;
// Log of the weight below which a pair leaves the statistics: 1e-14.
constexpr double kLogNegligible = -32.236191301916641;
// Tiles whose words a warp of the moments reads at a time, two a lane: 2,048 frames. Segments begin
// at an even tile.
constexpr int kMomentTiles = 64;
// No component, above all that there are.
constexpr uint16_t kNone = 0xffff;
// Beyond this z^2 times a precision may leave float32's range; such a frame is computed directly.
constexpr float kLargest = 1e12f;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Frames between two launches: 32 MB of mask words for each of the two masks. At K = 1,024 that is
// 262,144 frames or four blocks of the refinement for each place on an H200: with less, all would
// wait for the slowest.
GMM_JEPA_BOTH int64_t chunk_frames(int64_t n_components) {
    const int64_t n = (int64_t(1) << 28) / n_components / kBlockFrames * kBlockFrames;
    return n < 262144 ? n : 262144;
}

// A chunk's moments are added up in this many parts, each in the order of its frames: 8,192 frames
// at K = 1,024, for a component may have ten times as many as others, and one warp has them all.
GMM_JEPA_BOTH int n_segments(int64_t n_components) {
    const int64_t n = 32768 / n_components;
    return static_cast<int>(n < 4 ? 4 : n > 256 ? 256 : n);
}

// First tile of a segment; that of segment `segments` is the end, or a tile behind it.
GMM_JEPA_BOTH int segment_start(int64_t n_tiles, int segment, int segments) {
    return static_cast<int>(2 * ((n_tiles + 1) / 2 * segment / segments));
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

// Features are packed 0, 2, 4, ..., then 1, 5, 9, ..., then 3, 7, 11, ...: whatever part of the
// depth comes first, it is spread over all mel bins. Neighbours resemble each other, and what has
// more of them than its share tells the components worse, not better.
GMM_JEPA_BOTH int feature_position(int d, int n_dims) {
    if (d % 2 == 0) return d / 2;
    return (n_dims + 1) / 2 + (d % 4 == 1 ? 0 : (n_dims + 2) / 4) + d / 4;
}

// Steps of the depth that the first sweep takes to guess a frame's best component, 7 of 10. Pairs
// that survive, a frame of bench.cuda_em: 19.8 after 5 steps (722 of one frame), 13.8 after 6, 11.7
// after 7, 11.0 after all; on speech 13.8, 13.9, 13.8, 13.7.
GMM_JEPA_BOTH constexpr int guess_steps(int steps) { return (2 * steps + 2) / 3; }

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
    uint16_t component = kNone;  // the first one at `largest`
    double pending = largest;

    // Components in their order.
    GMM_JEPA_BOTH void see(double value, int k) {
        if (value > pending || (value == pending && component == kNone)) {
            pending = value;
            component = static_cast<uint16_t>(k);
        }
    }

    // After all pairs of a batch were seen.
    GMM_JEPA_BOTH void raise() {
        sum *= share(largest, pending);
        largest = pending;
    }

    GMM_JEPA_BOTH void add(double part) { sum += part; }

    // Takes in the same frame's sum over other components.
    GMM_JEPA_BOTH void merge(const LogSumExp& other) {
        const bool equal = other.largest == largest && other.component < component;
        if (other.largest > largest || equal) component = other.component;
        pending = other.largest > largest ? other.largest : largest;
        raise();
        sum += other.sum * share(other.largest, largest);
    }

    GMM_JEPA_BOTH double value(bool hard) const {
        return hard && sum == sum ? largest : largest + log(sum);
    }

    // Kept apart: where log-densities are huge, their sum with a logarithm would lose the latter.
    // Of a hard assignment the best component alone is left, and its share of itself is one.
    GMM_JEPA_BOTH Normaliser normaliser(bool hard) const {
        return {largest, hard ? 1.0 : 1.0 / sum};
    }
};

// Whether a log-density lies below `cut`; it was rounded, so what lies near stays. So does not a
// number, for it must reach the statistics.
GMM_JEPA_BOTH bool is_negligible(float rounded, double cut) {
    const double value = rounded;
    return value + 0x1p-23 * fabs(value) < cut;
}

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
