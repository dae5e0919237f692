// The screen: which components may matter for which frames.
//
// A warp owns 32 frames, a block kWarps of them; tiles of 64 components stream through shared
// memory. Two sweeps: the first, over part of the depth, guesses each frame's best component, whose
// exact log-density gives the threshold; the second compares and leaves one bit a pair.
#pragma once

#include "device.cuh"
#include "em.h"
#include "tile.h"

namespace gmm_jepa::cuda {

constexpr int kStages = 4;
// Steps of 16 of the depth that a stage holds: all of them at D = 80.
constexpr int kStageSteps = 10;
// 16 bytes behind each row put the eight rows of a tile into different banks.
constexpr int kRowPad = 8;
constexpr int kStageRow = kStageSteps * kStepDepth + kRowPad;
// A stage is a tile's weights, and behind them what its sums start from.
constexpr int kStageWeights = kTileComponents * kStageRow;
constexpr int kStageValues = kStageWeights + 2 * kTileComponents;
// A warp looks through 32 components in this many pieces, which take turns with products.
constexpr int kPieces = 12;

// Frames of one chunk: row 0 is the first of the chunk.
template <typename T>
struct ChunkView {
    const T* data;
    int64_t stride_row, stride_column;
    uint32_t row_bytes;  // of stride_row; em_statistics sees to it that they are no more
    int n_rows;

    __device__ __forceinline__ const T* row(int frame) const { return data + frame * stride_row; }
};

inline size_t screen_shared_bytes(int warps, int n_dims) {
    const size_t row = depth_of(n_dims) + kRowPad;
    return 2 * (warps * kTileFrames * row + size_t(kStages) * kStageValues);
}

// The exact log-densities of kPairs frames under a component each, by kPairLanes adjacent lanes, of
// which this is `lane`. A lane has kRounds of 4 features of each pair on their way at a time.
// kFixedDims: the features where they are adjacent and their number is known, a multiple of
// kPairLanes, else 0.
template <int kPairs, int kRounds, int kFixedDims = 0, typename T>
__device__ __forceinline__ void log_joints_of(const ChunkView<T>& x, const int (&frames)[kPairs],
                                              const Operands& mixture, const int (&k)[kPairs],
                                              int lane, double (&joints)[kPairs]) {
    constexpr int kLaneParts = kParts / kPairLanes, kLoads = kRounds * kLaneParts;
    static_assert(kFixedDims % kPairLanes == 0, "as many features in every lane");
    const int D = kFixedDims ? kFixedDims : static_cast<int>(mixture.n_dims);
    const int64_t stride = kFixedDims ? 1 : x.stride_column, hop = kPairLanes * stride;
    const int own = kFixedDims ? 0 : lane;  // which features are there does not depend on the lane
    const double2* rows[kPairs];
    const T* features[kPairs];
    double parts[kPairs][kLaneParts] = {}, constants[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        rows[p] = reinterpret_cast<const double2*>(mixture.table) + int64_t(k[p]) * D + lane;
        features[p] = x.row(frames[p]) + lane * stride;
        constants[p] = __ldg(mixture.constants + k[p]);
    }
    for (int start = own; start < D; start += kRounds * kParts) {
        double2 parameters[kPairs][kLoads];
        T values[kPairs][kLoads];
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i, features[p] += hop) {
                if (start + i * kPairLanes >= D) continue;
                parameters[p][i] = load_passing(rows[p] + i * kPairLanes);
                values[p][i] = __ldg(features[p]);
            }
            rows[p] += kRounds * kParts;
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                if (start + i * kPairLanes >= D) continue;
                double& part = parts[p][i % kLaneParts];
                part = add_square(part, values[p][i], parameters[p][i].x, parameters[p][i].y);
            }
        }
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        // 16 apart, then 8
        const double sum = (parts[p][0] + parts[p][2]) + (parts[p][1] + parts[p][3]);
        joints[p] = log_joint(constants[p], lane_sum<kPairLanes>(sum));
    }
}

// One of the two sweeps: what its sums start from, and how many steps of the depth it takes.
struct Pass {
    const float* bias;
    int steps;
};

// kFixedSteps: steps of the depth where they are known and fit a stage, else 0.
template <typename T, int kWarps, int kFixedSteps>
struct Screen {
    static constexpr int kThreads = 32 * kWarps;

    __device__ Screen(const ChunkView<T>& frames, const Operands& operands, uint16_t* shared)
        : x(frames),
          mixture(operands),
          lane(threadIdx.x & 31),
          first(int(blockIdx.x * kWarps + threadIdx.x / 32) * kTileFrames),
          steps(kFixedSteps ? kFixedSteps : depth_of(int(operands.n_dims)) / kStepDepth),
          tiles(int((operands.n_components + kTileComponents - 1) / kTileComponents)),
          feature_row(steps * kStepDepth + kRowPad),
          features(shared + threadIdx.x / 32 * kTileFrames * feature_row),
          stages(shared + kWarps * kTileFrames * feature_row) {}

    // Features of the warp's frames; true in the lane of a frame that the screen can read.
    __device__ bool pack() {
        const int D = int(mixture.n_dims), words = steps * kStepDepth / 2;
        const int n = min(kTileFrames, x.n_rows - first);
        uint32_t unusable = ~first_bits(n);
        uint32_t* to = reinterpret_cast<uint32_t*>(features);
        for (int d = lane; d < words; d += 32) {
            const bool is_feature = d < D;
            const int position = is_feature ? feature_position(d, D) : d;
            const float shift = is_feature ? mixture.shift[d] : 0.0f;
            const float inverse_scale = is_feature ? mixture.inverse_scale[d] : 0.0f;
            const T* from = x.row(first) + d * x.stride_column;
            T values[kTileFrames];
#pragma unroll
            for (int f = 0; f < kTileFrames; ++f, from += x.stride_row) {
                values[f] = is_feature && f < n ? __ldg(from) : T(0);
            }
#pragma unroll
            for (int f = 0; f < kTileFrames; ++f) {
                const float z = standardised(values[f], shift, inverse_scale);
                unusable |= uint32_t(!is_usable(z)) << f;
                to[operand_row(f) * (feature_row / 2) + position] = feature_word(z);
            }
        }
        unusable = __reduce_or_sync(kAllLanes, unusable);
        __syncwarp();
        return !(unusable >> lane & 1u);
    }

    // Copies of a pass's first tiles get under way. All threads of the block take part.
    template <int kSteps>
    __device__ void begin(const Pass& pass) {
        __syncthreads();  // the stages are free
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) fetch<kSteps>(pass, i);
    }

    // Starts copying stage `index` of a pass: 64 rows of weights, up to kStageSteps of the depth.
    template <int kSteps>
    __device__ __forceinline__ void fetch(const Pass& pass, int index) {
        const int chunks = kSteps ? 1 : chunks_of(pass);
        if (index < tiles * chunks) {
            constexpr int kRowThreads = kThreads / kTileComponents;
            const int step = index % chunks * kStageSteps, tile = index / chunks;
            // of 16 bytes, in a row
            const int pieces = 2 * (kSteps ? kSteps : min(kStageSteps, pass.steps - step));
            const int row = threadIdx.x / kRowThreads, piece = threadIdx.x % kRowThreads;
            const int64_t component = tile * kTileComponents + row;
            const uint16_t* from =
                mixture.weights + (component * steps + step) * kStepDepth + 8 * piece;
            uint16_t* const stage = stages + index % kStages * kStageValues;
#pragma unroll
            for (int i = 0; i < 2 * kStageSteps; i += kRowThreads) {
                if (piece + i >= pieces) break;
                copy_async(stage + row * kStageRow + 8 * (piece + i), from + 8 * i);
            }
            const int part = 4 * threadIdx.x;
            if (part < kTileComponents) {
                copy_async(stage + kStageWeights + 2 * part,
                           pass.bias + tile * kTileComponents + part);
            }
        }
        end_copy_group();  // an empty one keeps the count
    }

    __device__ int chunks_of(const Pass& pass) const {
        return (pass.steps + kStageSteps - 1) / kStageSteps;
    }

    __device__ __forceinline__ void load_features(uint32_t (&a)[2][4], int step) const {
        const int row = lane & 15, column = (lane >> 4) * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_tiles(a[half],
                       features + (16 * half + row) * feature_row + step * kStepDepth + column);
        }
    }

    // Two accumulator tiles of components at a time: rows 8 to 15 are the second's.
    __device__ __forceinline__ void load_weights(uint32_t (&b)[2][4], const uint16_t* stage,
                                                 int group, int step) const {
        const int component = group * kGroupComponents + (lane & 7) + (lane >> 4) * 8;
        const int depth = step * kStepDepth + (lane >> 3 & 1) * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_tiles(b[i], stage + (component + 16 * i) * kStageRow + depth);
        }
    }

    // What the sums of a lane's components start from: pair j is of accumulator tile j.
    __device__ __forceinline__ void load_bias(float2 (&bias)[4], const uint16_t* stage,
                                              int group) const {
        const float2* from = reinterpret_cast<const float2*>(stage + kStageWeights) +
                             group * (kGroupComponents / 2) + (lane & 3);
#pragma unroll
        for (int j = 0; j < 4; ++j) bias[j] = from[4 * j];
    }

    __device__ __forceinline__ void multiply(Scores& sums, const uint32_t (&a)[2][4],
                                             const uint32_t (&b)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = i / 2, half = i % 2;
            multiply_add(sums.c[j][half], a[half], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1],
                         sums.c[j][half]);
        }
    }

    // The first step: sums that start from the bias.
    __device__ __forceinline__ void multiply(Scores& sums, const uint32_t (&a)[2][4],
                                             const uint32_t (&b)[2][4],
                                             const float2 (&bias)[4]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = i / 2, half = i % 2;
            const float start[4] = {bias[j].x, bias[j].y, bias[j].x, bias[j].y};
            multiply_add(sums.c[j][half], a[half], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1],
                         start);
        }
    }

    // The groups of 32 components in turn, each in kPieces calls visit(group, scores, piece) in
    // their order; all threads of the block take part. A group -1, of no meaning, comes first.
    template <int kSteps, typename Visit>
    __device__ __forceinline__ void sweep(const Pass& pass, const Visit& visit) {
        if constexpr (kSteps != 0) {
            sweep_in_turns<kSteps>(pass, visit);
        } else {
            sweep_any_depth(pass, visit);
        }
    }

    // Features stay in registers. Between the products of one group of components come the pieces
    // of the group before, so that the tensor cores need not wait for these.
    template <int kSteps, typename Visit>
    __device__ __forceinline__ void sweep_in_turns(const Pass& pass, const Visit& visit) {
        uint32_t a[kSteps][2][4], b[2][2][4];
        float2 bias[4];
        Scores sums[2] = {};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) load_features(a[i], i);
        wait_copy_groups<kStages - 2>();
        __syncthreads();  // the first tile is there
        load_weights(b[0], stages, 0, 0);
        load_bias(bias, stages, 0);
        for (int tile = 0; tile < tiles; ++tile) {
            const uint16_t* stage = stages + tile % kStages * kStageValues;
            const uint16_t* next = stages + (tile + 1) % kStages * kStageValues;
#pragma unroll
            for (int at = 0; at < 2 * kSteps; ++at) {
                const int group = at / kSteps, step = at % kSteps;
                if (at == kSteps) {
                    wait_copy_groups<kStages - 3>();
                    __syncthreads();  // the next tile is there, the one before is done with
                    fetch<kSteps>(pass, tile + kStages - 1);
                }
                const int ahead = (at + 1) % (2 * kSteps);
                load_weights(b[ahead % 2], ahead ? stage : next, ahead / kSteps, ahead % kSteps);
                if (step == 0) {
                    multiply(sums[group], a[step], b[at % 2], bias);
                } else {
                    multiply(sums[group], a[step], b[at % 2]);
                }
                if (ahead % kSteps == 0) load_bias(bias, ahead ? stage : next, ahead / kSteps);
#pragma unroll
                for (int i = kPieces * step / kSteps; i < kPieces * (step + 1) / kSteps; ++i) {
                    visit(2 * tile + group - 1, sums[1 - group], i);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) visit(2 * tiles - 1, sums[1], i);
    }

    // A tile may take several stages, one a chunk of the depth.
    template <typename Visit>
    __device__ __forceinline__ void sweep_any_depth(const Pass& pass, const Visit& visit) {
        const int chunks = chunks_of(pass);
        int index = 0;
        for (int tile = 0; tile < tiles; ++tile) {
            Scores sums[2];
            for (int chunk = 0; chunk < chunks; ++chunk, ++index) {
                wait_copy_groups<kStages - 2>();
                __syncthreads();  // this stage is there, the one before is done with
                fetch<0>(pass, index + kStages - 1);
                const uint16_t* stage = stages + index % kStages * kStageValues;
                const int begin = chunk * kStageSteps, end = min(begin + kStageSteps, pass.steps);
                for (int i = begin; i < end; ++i) {
                    uint32_t a[2][4], b[2][4];
                    load_features(a, i);
#pragma unroll
                    for (int group = 0; group < 2; ++group) {
                        load_weights(b, stage, group, i - begin);
                        if (i == 0) {
                            float2 bias[4];
                            load_bias(bias, stage, group);
                            multiply(sums[group], a, b, bias);
                        } else {
                            multiply(sums[group], a, b);
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * kPieces; ++i) {
                visit(2 * tile + i / kPieces, sums[i / kPieces], i % kPieces);
            }
        }
    }

    // The component with the best guess for the lane's own frame; -1 where nothing compares.
    template <int kSteps>
    __device__ __forceinline__ int best(const Pass& pass) {
        float score[4];
        int place[4];  // 8 group + n
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            score[q] = -static_cast<float>(kInfinity);
            place[q] = -1;
        }
        sweep<kSteps>(pass, [&](int group, const Scores& scores, int n) {
            if (n >= 8) return;
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const float value = scores.at(n, q);
                const bool better = value > score[q] && group >= 0;
                score[q] = better ? value : score[q];
                place[q] = better ? 8 * group + n : place[q];
            }
        });
        int mine = -1;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            float s = score[q];
            int k = -1;
            if (place[q] >= 0) {
                k = place[q] / 8 * kGroupComponents + lane_component(lane, place[q] % 8);
            }
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                const float other = __shfl_xor_sync(kAllLanes, s, offset);
                const int other_k = __shfl_xor_sync(kAllLanes, k, offset);
                if (is_better(other, other_k, s, k)) {
                    s = other;
                    k = other_k;
                }
            }
            if ((lane & 3) == q) mine = k;  // of frame 4 (lane / 4) + q
        }
        return mine;
    }

    // The threshold of the lane's own frame, from the exact log-density of a component of it.
    __device__ float threshold(bool usable, int component, double margin) const {
        constexpr int kPairs = 2, kRounds = 3, kTeams = 32 / kPairLanes;
        float mine = -static_cast<float>(kInfinity);
        const bool has_best = usable && component >= 0;
        const double gain = *mixture.gain;
#pragma unroll 1
        for (int f = 0; f < kTileFrames; f += kPairs * kTeams) {
            int frames[kPairs], k[kPairs];
            double joints[kPairs];
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const int frame = f + p * kTeams + lane / kPairLanes;
                const int found = __shfl_sync(kAllLanes, component, frame);
                const bool is_there = __shfl_sync(kAllLanes, int(has_best), frame);
                // Lanes without a frame compute some pair that exists: shuffles need all of them.
                frames[p] = is_there ? first + frame : 0;
                k[p] = is_there ? found : 0;
            }
            log_joints_of<kPairs, kRounds>(x, frames, mixture, k, lane & (kPairLanes - 1), joints);
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const double given = __shfl_sync(kAllLanes, joints[p], lane % kTeams * kPairLanes);
                if (has_best && lane / kTeams == f / kTeams + p) {
                    mine = score_threshold(given, margin, gain);
                }
            }
        }
        return mine;
    }

    // The mask words of the warp's frames, one a component.
    template <int kSteps>
    __device__ __forceinline__ void mark(const Pass& pass, float mine, uint32_t* mask) {
        float thresholds[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            thresholds[q] = __shfl_sync(kAllLanes, mine, (lane & ~3) + q);
        }
        const uint32_t valid = first_bits(int64_t(x.n_rows) - first);
        const int K = int(mixture.n_components);
        uint32_t* out = mask + int64_t(first / kTileFrames) * K;
        uint32_t below = 0, other = 0;
        sweep<kSteps>(pass, [&](int group, const Scores& scores, int piece) {
            if (piece < 8) {
                // The sign of a difference is that of the comparison; on a GPU, not a number has
                // none. Last bits first.
#pragma unroll
                for (int q = 3; q >= 0; --q) {
                    const float difference = scores.at(7 - piece, q) - thresholds[q];
                    below = __funnelshift_l(float_bits(difference), below, 1);
                }
                return;
            }
            if (piece > 8) below = exchange_nibbles(below, other, lane, 4 >> (piece - 9));
            if (piece < kPieces - 1) {
                other = __shfl_xor_sync(kAllLanes, below, 16 >> (piece - 8));
                return;
            }
            const int k = group * kGroupComponents + lane_component(lane, lane >> 2);
            if (unsigned(k) < unsigned(K) && valid) out[k] = ~below & valid;
        });
    }

    const ChunkView<T>& x;
    const Operands& mixture;
    int lane, first, steps, tiles, feature_row;
    uint16_t* features;  // (32, feature_row), the warp's own, in the order of operand_row
    uint16_t* stages;    // (kStages, kStageValues): (kTileComponents, kStageRow) weights, the bias
};

template <typename T, int kWarps, int kFixedSteps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    em_screen_kernel(const __grid_constant__ ChunkView<T> x,
                     const __grid_constant__ Operands mixture, double margin, uint32_t* mask) {
    extern __shared__ __align__(16) uint16_t shared[];
    constexpr int kGuessSteps = guess_steps(kFixedSteps);
    Screen<T, kWarps, kFixedSteps> screen(x, mixture, shared);
    const Pass guess{mixture.guess, guess_steps(screen.steps)}, exact{mixture.bias, screen.steps};
    screen.template begin<kGuessSteps>(guess);
    const bool usable = screen.pack();
    const int component = screen.template best<kGuessSteps>(guess);
    screen.template begin<kFixedSteps>(exact);
    const float threshold = screen.threshold(usable, component, margin);
    screen.template mark<kFixedSteps>(exact, threshold, mask);
}

}  // namespace gmm_jepa::cuda
