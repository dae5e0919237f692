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

// Sizes of a mixture that the kernels are made for.
constexpr int kMostComponents = 8192;
constexpr int kMostFeatures = 512;
// A warp owns 32 frames: bit i of a mask word is frame i of the 32.
constexpr int kTileFrames = 32;
// Components of a tile of the screen; a warp takes them in two groups of 32, each of them 4
// accumulator tiles of mma.m16n8k16.
constexpr int kTileComponents = 64;
constexpr int kGroupComponents = 32;
// Depth of one mma: 8 features, each with its square beside it.
constexpr int kStepDepth = 16;
// A sum of squares is taken in 32 parts, part p over features p, p + 32, ..., and the parts are
// added 16 apart, then 8, 4, 2, 1, be it by kPairLanes lanes with four parts each or by 32 lanes.
// (At D = 80 the refinement has its own order: the last digits differ.)
constexpr int kParts = 32;
constexpr int kPairLanes = 8;
// A block of the refinement has 2,048 frames, a section of the chunk, and 8 components; its 8 warps
// take the pairs (frame, component) 32 at a time.
constexpr int kSectionTiles = 64;
constexpr int kSectionFrames = kSectionTiles * kTileFrames;
constexpr int kRefineComponents = 8;
constexpr int kRefineWarps = 8;
constexpr int kBatch = 32;
// Pairs of a chunk whose log-densities are kept, 64 a frame at K = 1,024. A chunk with more keeps
// none of them: they are computed again where they are needed.
constexpr int64_t kListPairs = int64_t(1) << 24;
// A pair of the list: its frame of the chunk in the lower bits, above them its component.
constexpr int kFrameBits = 18;
// A weight below which a pair leaves the statistics.
constexpr double kNegligible = 1e-14;
// A frame's shares are added up as integers of this unit, so that their order does not matter:
// kMostComponents of them reach 2^63 at most.
constexpr double kShareUnit = 0x1p-50;
// Beyond this z^2 times a precision may leave float32's range; such a frame is computed directly.
constexpr float kLargest = 1e12f;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Frames between two launches: up to 32 MB of mask words, and no more than ten times the 192 frames
// of each multiprocessor of an H200, which screens them one block after another (screen_tiles.cuh).
GMM_JEPA_BOTH int64_t chunk_frames(int64_t n_components) {
    const int64_t n = (int64_t(1) << 28) / n_components / kSectionFrames * kSectionFrames;
    constexpr int64_t kMost = 10 * 132 * 192 / kSectionFrames * kSectionFrames;  // 251,904
    static_assert(kMost <= int64_t(1) << kFrameBits, "a pair's frame fits its bits");
    return n < kMost ? n : kMost;
}

GMM_JEPA_BOTH int64_t list_pairs(int64_t n_components) {
    const int64_t n = chunk_frames(n_components) * n_components;
    return n < kListPairs ? n : kListPairs;
}

GMM_JEPA_BOTH int n_sections(int64_t n_frames) {
    return static_cast<int>((n_frames + kSectionFrames - 1) / kSectionFrames);
}

// A chunk's moments are added up in this many parts, each in the order of its frames: 8,192 frames
// at K = 1,024, for a component may have ten times as many as others, and one warp has them all.
GMM_JEPA_BOTH int n_segments(int64_t n_components) {
    const int64_t n = 32768 / n_components;
    return static_cast<int>(n < 4 ? 4 : n > 128 ? 128 : n);
}

// First section of a segment; that of segment `segments` is the end.
GMM_JEPA_BOTH int segment_start(int sections, int segment, int segments) {
    return static_cast<int>(int64_t(sections) * segment / segments);
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

// ---- screen by warpgroups: a warp has 16 frames, a tile of 64 components at a time ----

constexpr int kWarpFrames = 16;
// Steps of the depth that it takes, those of D = 73 to 80.
constexpr int kTileSteps = 10;

// The row of a frame in a warp's 16 x depth operand. A lane of wgmma has values of the rows
// g = lane / 4 and g + 8, which so are frames 2 g and 2 g + 1.
GMM_JEPA_BOTH int warp_row(int frame) { return 8 * (frame & 1) + (frame >> 1); }

// The lane that takes care of a frame: one of those that have its row.
GMM_JEPA_BOTH int lane_of(int frame) { return 4 * (frame >> 1) + (frame & 1); }

// One lane's part of the scores of a warp's frames and a tile's components: of columns 8 j to 8 j +
// 7, value i is row g + 8 (i >> 1) and component 8 j + 2 (lane & 3) + (i & 1).
struct TileScores {
    float c[8][4];

    // Frame 2 g + q; component 8 j + 2 (lane & 3) + b.
    GMM_JEPA_BOTH float at(int j, int b, int q) const { return c[j][2 * q + b]; }
};

// A lane's word holds in bit 16 b + 2 j + q that of frame 2 g + q and component 8 j + 2 t + b. As
// exchange_nibbles, of pairs of bits in each half: at the end lane 4 g + t has in half b component
// 8 g + 2 t + b, frame by frame.
GMM_JEPA_BOTH uint32_t exchange_pairs(uint32_t mine, uint32_t other, int lane, int distance) {
    const uint32_t lower = distance == 4 ? 0x00ff00ffu : distance == 2 ? 0x0f0f0f0fu : 0x33333333u;
    const int shift = 2 * distance;
    return lane & 4 * distance ? (mine & ~lower) | ((other >> shift) & lower)
                               : (mine & lower) | ((other << shift) & ~lower);
}

// Where a row's piece of 16 bytes lies in a tile of weights in shared memory: 8 rows of a piece are
// 128 bytes, those of the next 8 rows follow, then the next piece.
GMM_JEPA_BOTH int piece_at(int row, int piece) { return piece * kTileComponents + row; }

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

// Orders log-densities as integers, so that the largest can be found in any order; zero is below
// all of them, and not a number above.
GMM_JEPA_BOTH uint64_t ordered_bits(double value) {
    if (value != value) return ~uint64_t(0);
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

GMM_JEPA_BOTH double ordered_value(uint64_t ordered) {
    const uint64_t bits = ordered >> 63 ? ordered & ~(uint64_t(1) << 63) : ~ordered;
    double value;
    memcpy(&value, &bits, 8);
    return value;  // of ~0 not a number, of 0 neither
}

// A share as a whole number of units; what is not a number is none.
GMM_JEPA_BOTH uint64_t whole_share(double share) {
    return share > 0.0 ? static_cast<uint64_t>(share * (1.0 / kShareUnit) + 0.5) : 0;
}

// Of a hard assignment, whose frames have the largest of these in place of a sum: the first
// component of equals, and none where it is zero.
GMM_JEPA_BOTH uint64_t hard_rank(int component) { return 0xffffffffu - uint32_t(component); }

// What turns a frame's log-densities into responsibilities.
struct alignas(16) Normaliser {
    double largest;
    double scale;  // of a share of `largest`; of a hard assignment, the component that has it

    // Of a pair, from its share. Not a number stays, for it must reach the statistics.
    GMM_JEPA_BOTH double responsibility(double share_of_largest) const {
        const double r = share_of_largest * scale;
        return r < kNegligible ? 0.0 : r;
    }

    GMM_JEPA_BOTH double hard_responsibility(int component) const {
        return scale == double(component) ? 1.0 : 0.0;
    }
};

// A frame's log-sum-exp, or its largest log-density alone; `sum` are shares or a hard rank.
struct alignas(16) FrameSum {
    uint64_t largest, sum;

    GMM_JEPA_BOTH double value(bool hard) const {
        const double best = ordered_value(largest);
        return hard ? best : best + log(double(sum) * kShareUnit);
    }

    GMM_JEPA_BOTH Normaliser normaliser(bool hard) const {
        const double scale = hard ? double(hard_rank(0) - sum) : 1.0 / (double(sum) * kShareUnit);
        return {ordered_value(largest), scale};
    }
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
