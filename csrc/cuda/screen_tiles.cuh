// The screen at D = 73 to 80 on GPUs that have products of warpgroups (Hopper): the same two sweeps
// as in screen.cuh, with 16 frames a warp and a tile of 64 components at a time.
#pragma once

#include "screen.cuh"

namespace gmm_jepa::cuda {

constexpr int kWarpgroups = 3;
constexpr int kTileScreenWarps = 4 * kWarpgroups;
constexpr int kTileScreenFrames = kTileScreenWarps * kWarpFrames;

// One tile of components on its way through shared memory.
struct alignas(128) TileStage {
    uint16_t weights[2 * kTileSteps * kTileComponents][8];  // in the order of piece_at
    float bias[kTileComponents];
};

struct TileScreenShared {
    static constexpr int kRow = kTileSteps * kStepDepth + kRowPad;
    TileStage stages[kStages];
    uint16_t features[kTileScreenWarps][kWarpFrames][kRow];  // in the order of warp_row
};

struct TileScreen {
    __device__ TileScreen(const ChunkView<float>& frames, const Operands& operands,
                          TileScreenShared& block)
        : x(frames),
          mixture(operands),
          shared(block),
          warp(threadIdx.x / 32),
          lane(threadIdx.x & 31),
          first((int(blockIdx.x) * kTileScreenWarps + warp) * kWarpFrames),
          tiles(int((operands.n_components + kTileComponents - 1) / kTileComponents)) {}

    // Features of the warp's frames; true in the lane of a frame that the screen can read.
    __device__ bool pack() {
        const int D = int(mixture.n_dims), n = x.n_rows - first;
        uint32_t unusable = ~first_bits(n);
#pragma unroll 1
        for (int d = lane; d < kTileSteps * kStepDepth / 2; d += 32) {
            const bool is_feature = d < D;
            const int position = is_feature ? feature_position(d, D) : d;
            const float shift = is_feature ? mixture.shift[d] : 0.0f;
            const float inverse_scale = is_feature ? mixture.inverse_scale[d] : 0.0f;
            const float* from = x.row(first) + d * x.stride_column;
            float values[kWarpFrames];
#pragma unroll
            for (int f = 0; f < kWarpFrames; ++f, from += x.stride_row) {
                values[f] = is_feature && f < n ? __ldg(from) : 0.0f;
            }
#pragma unroll
            for (int f = 0; f < kWarpFrames; ++f) {
                const float z = standardised(values[f], shift, inverse_scale);
                unusable |= uint32_t(!is_usable(z)) << f;
                uint32_t* row = reinterpret_cast<uint32_t*>(shared.features[warp][warp_row(f)]);
                row[position] = feature_word(z);
            }
        }
        unusable = __reduce_or_sync(kAllLanes, unusable);
        __syncwarp();
        return has_frame() && !(unusable >> own_frame() & 1u);
    }

    // The frame that the lane takes care of, where it does: the inverse of lane_of.
    __device__ bool has_frame() const { return (lane & 2) == 0; }
    __device__ int own_frame() const { return 2 * (lane >> 2) + (lane & 1); }

    // Copies of a pass's first tiles get under way. All threads of the block take part.
    template <int kSteps>
    __device__ void begin(const Pass& pass) {
        __syncthreads();  // the stages are free
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) fetch<kSteps>(pass, i);
    }

    // Starts copying a tile: a warp takes 16 rows of a step of the depth at a time.
    template <int kSteps>
    __device__ __forceinline__ void fetch(const Pass& pass, int tile) {
        if (tile < tiles) {
            constexpr int kBlocks = kTileComponents / 16 * kSteps;
            TileStage& stage = shared.stages[tile % kStages];
            const uint16_t* const from =
                mixture.weights + int64_t(tile) * kTileComponents * kTileSteps * kStepDepth;
#pragma unroll
            for (int i = 0; i < kBlocks; i += kTileScreenWarps) {
                const int block = i + warp;
                if (block >= kBlocks) break;
                const int row = block % 4 * 16 + (lane & 15), piece = block / 4 * 2 + (lane >> 4);
                copy_async(stage.weights[piece_at(row, piece)],
                           from + row * kTileSteps * kStepDepth + 8 * piece);
            }
            const int part = 4 * threadIdx.x;
            if (part < kTileComponents) {
                copy_async(stage.bias + part, pass.bias + tile * kTileComponents + part);
            }
        }
        end_copy_group();  // an empty one keeps the count
    }

    // Starts the products of a tile.
    template <int kSteps>
    __device__ __forceinline__ void multiply(const Pass& pass, const uint32_t (&a)[kSteps][4],
                                             int tile, TileScores& sums) {
        wait_copy_groups<kStages - 2>();
        show_to_products();
        __syncthreads();  // this tile is there, the one before is done with
        const TileStage& stage = shared.stages[tile % kStages];
        const float2* const bias = reinterpret_cast<const float2*>(stage.bias) + (lane & 3);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 start = bias[4 * j];
            sums.c[j][0] = sums.c[j][2] = start.x;
            sums.c[j][1] = sums.c[j][3] = start.y;
        }
        const Description rows(stage.weights, 16 * piece_at(8, 0), 16 * piece_at(0, 1));
        begin_products(sums.c);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            multiply_tile(sums.c, a[i], rows.at(piece_at(0, 2 * i)));
        }
        end_products();
        fetch<kSteps>(pass, tile + kStages - 1);
    }

    // The tiles in turn call visit(tile, scores), each while the products of the next are under
    // way; where their number is odd one more comes last, of no meaning. None are under way from
    // one turn of the loop to the next: ptxas would wait for each of them at once.
    template <int kSteps, typename Visit>
    __device__ __forceinline__ void sweep(const Pass& pass, const Visit& visit) {
        uint32_t a[kSteps][4];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            load_tiles(a[i], shared.features[warp][lane & 15] + i * kStepDepth + (lane >> 4) * 8);
        }
        TileScores even, odd;
        multiply<kSteps>(pass, a, 0, even);
        wait_products(even.c);
        int tile = 0;
#pragma unroll 1
        for (; tile + 2 < tiles; tile += 2) {
            multiply<kSteps>(pass, a, tile + 1, odd);
            visit(tile, even);
            wait_products(odd.c);
            multiply<kSteps>(pass, a, tile + 2, even);
            visit(tile + 1, odd);
            wait_products(even.c);
        }
        multiply<kSteps>(pass, a, tile + 1, odd);
        visit(tile, even);
        wait_products(odd.c);
        visit(tile + 1, odd);
    }

    // The component with the best guess for the lane's own frame; -1 where nothing compares.
    template <int kSteps>
    __device__ __forceinline__ int best(const Pass& pass) {
        float score[2];
        int place[2];  // 16 tile + 2 j + b
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            score[q] = -static_cast<float>(kInfinity);
            place[q] = -1;
        }
        sweep<kSteps>(pass, [&](int tile, const TileScores& scores) {
            if (tile >= tiles) return;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const float value = scores.at(n >> 1, n & 1, q);
                    const bool better = value > score[q];
                    score[q] = better ? value : score[q];
                    place[q] = better ? 16 * tile + n : place[q];
                }
            }
        });
        int mine = -1;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            float s = score[q];
            int k = -1;
            if (place[q] >= 0) {
                k = place[q] / 16 * kTileComponents + (place[q] >> 1 & 7) * 8 + 2 * (lane & 3) +
                    (place[q] & 1);
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
            if ((lane & 3) == q) mine = k;
        }
        return mine;
    }

    // The threshold of the lane's own frame, from the exact log-density of a component of it.
    __device__ float threshold(bool usable, int component, double margin) const {
        constexpr int kPairs = 2, kRounds = 3, kTeams = 32 / kPairLanes;
        float mine = -static_cast<float>(kInfinity);
        const bool has_best = usable && component >= 0;
        const double gain = *mixture.gain;
        const int own = own_frame();
#pragma unroll 1
        for (int f = 0; f < kWarpFrames; f += kPairs * kTeams) {
            int frames[kPairs], k[kPairs];
            double joints[kPairs];
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const int frame = f + p * kTeams + lane / kPairLanes;
                const int found = __shfl_sync(kAllLanes, component, lane_of(frame));
                const bool is_there = __shfl_sync(kAllLanes, int(has_best), lane_of(frame));
                // Lanes without a frame compute some pair that exists: shuffles need all of them.
                frames[p] = is_there ? first + frame : 0;
                k[p] = is_there ? found : 0;
            }
            log_joints_of<kPairs, kRounds>(x, frames, mixture, k, lane & (kPairLanes - 1), joints);
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const double given = __shfl_sync(kAllLanes, joints[p], own % kTeams * kPairLanes);
                if (has_best && own / kTeams == f / kTeams + p) {
                    mine = score_threshold(given, margin, gain);
                }
            }
        }
        return mine;
    }

    // The warp's halves of mask words, one a component.
    template <int kSteps>
    __device__ __forceinline__ void mark(const Pass& pass, float mine, uint32_t* mask) {
        float thresholds[2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            thresholds[q] = __shfl_sync(kAllLanes, mine, (lane & ~3) + q);
        }
        const int K = int(mixture.n_components), tile_of_frames = first / kTileFrames;
        const uint32_t valid = first_bits(x.n_rows - first) & 0xffffu;
        // Where only the other half has frames, this one has zeros.
        const bool is_there = tile_of_frames * kTileFrames < x.n_rows;
        uint16_t* const out = reinterpret_cast<uint16_t*>(mask + int64_t(tile_of_frames) * K) +
                              first / kWarpFrames % 2;
        sweep<kSteps>(pass, [&](int tile, const TileScores& scores) {
            // The sign of a difference is that of the comparison; on a GPU, not a number has none.
            // Last bits first.
            uint32_t below = 0;
#pragma unroll
            for (int i = 31; i >= 0; --i) {
                const float difference = scores.at(i >> 1 & 7, i >> 4, i & 1) - thresholds[i & 1];
                below = __funnelshift_l(float_bits(difference), below, 1);
            }
#pragma unroll
            for (int distance = 4; distance; distance /= 2) {
                const uint32_t other = __shfl_xor_sync(kAllLanes, below, 4 * distance);
                below = exchange_pairs(below, other, lane, distance);
            }
            const int k = tile * kTileComponents + 8 * (lane >> 2) + 2 * (lane & 3);
            if (!is_there) return;
            if (k < K) out[2 * k] = uint16_t(~below & valid);
            if (k + 1 < K) out[2 * k + 2] = uint16_t(~below >> 16 & valid);
        });
    }

    const ChunkView<float>& x;
    const Operands& mixture;
    TileScreenShared& shared;
    int warp, lane, first, tiles;
};

// Machine code for other GPUs has an empty kernel, which em.cu knows by its few threads.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GMM_JEPA_WARPGROUPS 0
#else
#define GMM_JEPA_WARPGROUPS 1
#endif

__global__ void __launch_bounds__(GMM_JEPA_WARPGROUPS ? 32 * kTileScreenWarps : 32, 1)
    em_tiles_kernel(const __grid_constant__ ChunkView<float> x,
                    const __grid_constant__ Operands mixture, double margin, uint32_t* mask) {
#if GMM_JEPA_WARPGROUPS
    extern __shared__ __align__(128) unsigned char tile_bytes[];
    TileScreen screen(x, mixture, *reinterpret_cast<TileScreenShared*>(tile_bytes));
    constexpr int kGuess = guess_steps(kTileSteps);
    const Pass guess{mixture.guess, kGuess}, exact{mixture.bias, kTileSteps};
    screen.begin<kGuess>(guess);
    const bool usable = screen.pack();
    const int component = screen.best<kGuess>(guess);
    screen.begin<kTileSteps>(exact);
    const float threshold = screen.threshold(usable, component, margin);
    screen.mark<kTileSteps>(exact, threshold, mask);
#endif
}

}  // namespace gmm_jepa::cuda
