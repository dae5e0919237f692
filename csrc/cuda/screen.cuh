// The screen: which components may matter for which frames.
//
// A warp owns 32 frames, a block kWarps of them; tiles of 64 components stream through shared
// memory. Two sweeps: the first finds each frame's best score, whose exact log-density gives the
// threshold; the second compares and leaves one bit a pair.
#pragma once

#include "device.cuh"
#include "em.h"
#include "tile.h"

namespace gmm_jepa::cuda {

constexpr int kStages = 3;
// Steps of 16 of the depth that a stage holds: all of them at D = 80.
constexpr int kStageSteps = 10;
// 16 bytes behind each row put the eight rows of a tile into different banks.
constexpr int kRowPad = 8;
constexpr int kStageRow = kStageSteps * kStepDepth + kRowPad;
constexpr int kStageValues = kTileComponents * kStageRow;

// Frames of one chunk: row 0 is the first of the chunk.
template <typename T>
struct ChunkView {
    const T* data;
    int64_t stride_row, stride_column;
    int n_rows;

    __device__ __forceinline__ const T* row(int frame) const { return data + frame * stride_row; }
};

inline size_t screen_shared_bytes(int warps, int n_dims) {
    const size_t row = depth_of(n_dims) + kRowPad;
    return 2 * (warps * kTileFrames * row + size_t(kStages) * kStageValues);
}

// The exact log-density of a frame by kPairLanes adjacent lanes, of which this is `lane`.
template <typename T>
__device__ __forceinline__ double log_joint_of(const ChunkView<T>& x, int frame,
                                               const Operands& mixture, int k, int lane) {
    const int D = static_cast<int>(mixture.n_dims);
    const T* values = x.row(frame);
    const double2* row = reinterpret_cast<const double2*>(mixture.table) + int64_t(k) * D;
    double parts[kParts / kPairLanes] = {};
    for (int start = lane; start < D; start += kParts) {
#pragma unroll
        for (int i = 0; i < kParts / kPairLanes; ++i) {
            const int d = start + i * kPairLanes;
            if (d >= D) continue;
            const double2 parameters = __ldg(row + d);
            const double value = values[d * x.stride_column];
            parts[i] = add_square(parts[i], value, parameters.x, parameters.y);
        }
    }
    const double sum = (parts[0] + parts[2]) + (parts[1] + parts[3]);  // 16 apart, then 8
    return log_joint(__ldg(mixture.constants + k), lane_sum<kPairLanes>(sum));
}

// A thread's part of a warp's 32 frames by 64 components.
struct Accumulators {
    float c[2][kTileComponents / 8][4];
};

template <typename T, int kWarps, int kFixedSteps>
struct Screen {
    static constexpr int kThreads = 32 * kWarps;

    __device__ Screen(const ChunkView<T>& frames, const Operands& operands, uint16_t* shared)
        : x(frames),
          mixture(operands),
          lane(threadIdx.x & 31),
          first(int(blockIdx.x * kWarps + threadIdx.x / 32) * kTileFrames),
          steps(kFixedSteps ? kFixedSteps : depth_of(int(operands.n_dims)) / kStepDepth),
          chunks(kFixedSteps ? 1 : (steps + kStageSteps - 1) / kStageSteps),
          tiles(int((operands.n_components + kTileComponents - 1) / kTileComponents)),
          feature_row(steps * kStepDepth + kRowPad),
          features(shared + threadIdx.x / 32 * kTileFrames * feature_row),
          stages(shared + kWarps * kTileFrames * feature_row) {}

    // Features of the warp's frames; true in the lane of a frame that the screen can read.
    __device__ bool pack() {
        const int D = int(mixture.n_dims), words = steps * kStepDepth / 2;
        uint32_t unusable = ~first_bits(int64_t(x.n_rows) - first);
#pragma unroll 8
        for (int i = lane; i < kTileFrames * words; i += 32) {
            const int f = i / words, d = i % words;
            uint32_t word = 0;
            if (first + f < x.n_rows && d < D) {
                const T value = x.row(first + f)[d * x.stride_column];
                const float z = standardised(value, mixture.shift[d], mixture.inverse_scale[d]);
                unusable |= uint32_t(!is_usable(z)) << f;
                word = feature_word(z);
            }
            reinterpret_cast<uint32_t*>(features + f * feature_row)[d] = word;
        }
        unusable = __reduce_or_sync(kAllLanes, unusable);
        __syncwarp();
        return !(unusable >> lane & 1u);
    }

    // Starts copying stage `index` of a sweep: 64 rows of weights, up to kStageSteps of depth.
    __device__ void fetch(int index) {
        if (index < tiles * chunks) {
            const int tile = index / chunks, step = index % chunks * kStageSteps;
            // of 16 bytes, in a row
            const int pieces = 2 * (kFixedSteps ? kFixedSteps : min(kStageSteps, steps - step));
            const int64_t depth = int64_t(steps) * kStepDepth;
            const uint16_t* from =
                mixture.weights + tile * kTileComponents * depth + step * kStepDepth;
            uint16_t* to = stages + index % kStages * kStageValues;
            for (int i = threadIdx.x; i < kTileComponents * pieces; i += kThreads) {
                const int row = i / pieces, piece = i % pieces * 8;
                copy_async(to + row * kStageRow + piece, from + row * depth + piece);
            }
        }
        end_copy_group();  // an empty one keeps the count
    }

    __device__ void start(Accumulators& sums, int tile) const {
#pragma unroll
        for (int j = 0; j < kTileComponents / 8; ++j) {
            const int k = tile * kTileComponents + 8 * j + accumulator_component(lane, 0);
            const float2 bias = *reinterpret_cast<const float2*>(mixture.bias + k);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sums.c[half][j][0] = sums.c[half][j][2] = bias.x;
                sums.c[half][j][1] = sums.c[half][j][3] = bias.y;
            }
        }
    }

    // One mma step of the depth: `at` of the features, `in_stage` of the weights.
    __device__ __forceinline__ void step(Accumulators& sums, int at, const uint16_t* stage,
                                         int in_stage) const {
        uint32_t a[2][4];
        const int row = lane & 15, column = (lane >> 4) * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_tiles(a[half], features + (16 * half + row) * feature_row + at * kStepDepth +
                                    column);
        }
        // Two accumulator tiles of components at a time: rows 8 to 15 are the second's.
        const int component = (lane & 7) + (lane >> 4) * 8, depth = (lane >> 3 & 1) * 8;
#pragma unroll
        for (int j = 0; j < kTileComponents / 8; j += 2) {
            uint32_t b[4];
            load_tiles(b, stage + (8 * j + component) * kStageRow + in_stage * kStepDepth + depth);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                multiply_add(sums.c[half][j], a[half], b[0], b[1]);
                multiply_add(sums.c[half][j + 1], a[half], b[2], b[3]);
            }
        }
    }

    // All tiles of components in turn: visit(tile, scores). All threads of the block take part.
    template <typename Visit>
    __device__ void sweep(const Visit& visit) {
        __syncthreads();  // the stages are free
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) fetch(i);
        Accumulators sums;
        int index = 0;
        for (int tile = 0; tile < tiles; ++tile) {
            start(sums, tile);
            for (int chunk = 0; chunk < chunks; ++chunk, ++index) {
                wait_copy_groups<kStages - 2>();
                __syncthreads();
                fetch(index + kStages - 1);
                const uint16_t* stage = stages + index % kStages * kStageValues;
                if constexpr (kFixedSteps != 0) {
#pragma unroll
                    for (int i = 0; i < kFixedSteps; ++i) step(sums, i, stage, i);
                } else {
                    const int begin = chunk * kStageSteps, end = min(begin + kStageSteps, steps);
#pragma unroll 2
                    for (int i = begin; i < end; ++i) step(sums, i, stage, i - begin);
                }
            }
            visit(tile, sums);
        }
        wait_copy_groups<0>();
    }

    // The best component of the lane's own frame; -1 where nothing compares.
    __device__ int best() {
        float score[2][2];
        int component[2][2];
        for (int i = 0; i < 4; ++i) {
            score[i / 2][i % 2] = -static_cast<float>(kInfinity);
            component[i / 2][i % 2] = -1;
        }
        sweep([&](int tile, const Accumulators& sums) {
            const int k0 = tile * kTileComponents + accumulator_component(lane, 0);
#pragma unroll
            for (int j = 0; j < kTileComponents / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int half = i >> 2, low = i >> 1 & 1;
                    const float value = sums.c[half][j][i & 3];
                    const bool better = value > score[half][low];
                    score[half][low] = better ? value : score[half][low];
                    component[half][low] = better ? k0 + 8 * j + (i & 1) : component[half][low];
                }
            }
        });
        int mine = -1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float s = score[i / 2][i % 2];
            int k = component[i / 2][i % 2];
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                const float other = __shfl_xor_sync(kAllLanes, s, offset);
                const int other_k = __shfl_xor_sync(kAllLanes, k, offset);
                if (is_better(other, other_k, s, k)) {
                    s = other;
                    k = other_k;
                }
            }
            // Quad g holds frame 16 (i / 2) + 8 (i % 2) + g: frame 8 i + g, for lane 8 i + g.
            const int found = __shfl_sync(kAllLanes, k, 4 * (lane & 7));
            if (lane >> 3 == i) mine = found;
        }
        return mine;
    }

    // The threshold of the lane's own frame, from the exact log-density of its best component.
    __device__ float threshold(bool usable, int component, double margin) const {
        float mine = -static_cast<float>(kInfinity);
        const bool has_best = usable && component >= 0;
        const double gain = *mixture.gain;
        for (int f = 0; f < kTileFrames; f += 32 / kPairLanes) {
            const int frame = f + lane / kPairLanes;
            const int k = __shfl_sync(kAllLanes, component, frame);
            const bool is_there = __shfl_sync(kAllLanes, int(has_best), frame);
            // Lanes without a frame compute some pair that exists: shuffles need all of them.
            const double exact = log_joint_of(x, is_there ? first + frame : 0, mixture,
                                              is_there ? k : 0, lane & (kPairLanes - 1));
            const double given = __shfl_sync(kAllLanes, exact, (lane & 3) * kPairLanes);
            if (has_best && lane >> 2 == f / 4) mine = score_threshold(given, margin, gain);
        }
        return mine;
    }

    // The mask words of the warp's frames, one a component.
    __device__ void mark(float mine, uint32_t* mask) {
        float thresholds[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            thresholds[i / 2][i % 2] = __shfl_sync(kAllLanes, mine, 8 * i + (lane >> 2));
        }
        const uint32_t valid = first_bits(int64_t(x.n_rows) - first);
        const int K = int(mixture.n_components);
        uint32_t* out = mask + int64_t(first / kTileFrames) * K;
        sweep([&](int tile, const Accumulators& sums) {
            // Lane L writes components L and L + 32: column L & 7 of tiles L >> 3 and 4 + (L >> 3)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                uint32_t word = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    uint32_t ballots[2][4];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float score = sums.c[i >> 2][4 * part + j][i & 3];
                        const float threshold = thresholds[i >> 2][i >> 1 & 1];
                        ballots[i >> 2][i & 3] =
                            __ballot_sync(kAllLanes, survives(score, threshold));
                    }
                    if (lane >> 3 == j) word = component_word(ballots, lane & 7);
                }
                const int k = tile * kTileComponents + 32 * part + lane;
                if (k < K && valid) out[k] = (word | (mixture.always[k] ? kAllLanes : 0u)) & valid;
            }
        });
    }

    const ChunkView<T>& x;
    const Operands& mixture;
    int lane, first, steps, chunks, tiles, feature_row;
    uint16_t* features;  // (32, feature_row), the warp's own
    uint16_t* stages;    // (kStages, kTileComponents, kStageRow)
};

template <typename T, int kWarps, int kFixedSteps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    em_screen_kernel(const __grid_constant__ ChunkView<T> x,
                     const __grid_constant__ Operands mixture, double margin, uint32_t* mask) {
    extern __shared__ __align__(16) uint16_t shared[];
    Screen<T, kWarps, kFixedSteps> screen(x, mixture, shared);
    const bool usable = screen.pack();
    const int component = screen.best();
    screen.mark(screen.threshold(usable, component, margin), mask);
}

}  // namespace gmm_jepa::cuda
