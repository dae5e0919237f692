// What follows the screen: exact log-densities of the pairs it left, and each frame's log-sum-exp.
// Float64 throughout: an H200 does half as many of these operations a second as in float32, and the
// loads of parameters take longer than either.
#pragma once

#include "screen.cuh"

namespace gmm_jepa::cuda {

// Pairs that a warp refines side by side; how many such sets have their loads under way at the same
// time, and for how many features each: all of them up to D = 96. Two sets of as much would spill.
constexpr int kTeams = 32 / kPairLanes;
constexpr int kRefinePairs = 1;
constexpr int kRefineRounds = 3;

// What one warp shares between its lanes: a batch of pairs, by component, then by frame.
struct Batch {
    double values[kBatch];   // log-densities, then shares
    uint16_t pairs[kBatch];  // kBlockFrames (component - first of the group) + frame
};

// What the warps of a block know. After the frames' sums are known, row 0 has the results: in
// `largest` what a log-density must reach, the best component.
struct RefineShared {
    struct alignas(16) Sum {
        double largest, sum;
    };
    Sum sums[kRefineWarps][kBlockFrames];
    uint16_t components[kRefineWarps][kBlockFrames];
    float remembered[kRefineWarps][kRemembered];
    Batch batches[kRefineWarps];

    __device__ LogSumExp load(int warp, int frame) const {
        const Sum& from = sums[warp][frame];
        return {from.largest, from.sum, components[warp][frame], from.largest};
    }

    __device__ void store(int warp, int frame, const LogSumExp& sum) {
        sums[warp][frame] = {sum.largest, sum.sum};
        components[warp][frame] = sum.component;
    }
};

// Log-densities of the pairs of a batch of n from i on.
template <int kFixedDims, typename T>
__device__ __forceinline__ void refine_pairs(const ChunkView<T>& x, const Operands& mixture,
                                             int first_frame, int first_component, Batch& batch,
                                             int i, int n) {
    const int team = (threadIdx.x & 31) / kPairLanes, lane = threadIdx.x & (kPairLanes - 1);
    int frames[kRefinePairs], k[kRefinePairs];
    double joints[kRefinePairs];
#pragma unroll
    for (int p = 0; p < kRefinePairs; ++p) {
        const int pair = batch.pairs[min(i + p * kTeams + team, n - 1)];
        frames[p] = first_frame + pair % kBlockFrames;
        k[p] = first_component + pair / kBlockFrames;
    }
    log_joints_of<kRefinePairs, kRefineRounds, kFixedDims>(x, frames, mixture, k, lane, joints);
#pragma unroll
    for (int p = 0; p < kRefinePairs; ++p) {
        const int mine = i + p * kTeams + team;
        if (mine < n && !lane) batch.values[mine] = joints[p];
    }
}

// Adds a batch of n log-densities to the sums of their frames, each in the order of the batch.
__device__ __forceinline__ void add_batch(RefineShared& shared, int first_component, int n) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    Batch& batch = shared.batches[warp];
    const int frame = batch.pairs[min(lane, n - 1)] % kBlockFrames;
    const double value = batch.values[min(lane, n - 1)];
    // Lanes behind the last pair are no frame's; the first lane of a frame has its sum.
    const uint32_t peers = __match_any_sync(kAllLanes, lane < n ? frame : kBlockFrames + lane);
    const bool leads = lane < n && !(peers & first_bits(lane));
    LogSumExp sum;
    if (leads) {
        sum = shared.load(warp, frame);
        for (uint32_t left = peers; left; left &= left - 1) {
            const int i = __ffs(left) - 1;
            sum.see(batch.values[i], first_component + batch.pairs[i] / kBlockFrames);
        }
        sum.raise();
        shared.sums[warp][frame].largest = sum.largest;
    }
    __syncwarp();
    if (lane < n) batch.values[lane] = share(value, shared.sums[warp][frame].largest);
    __syncwarp();
    if (leads) {
        for (uint32_t left = peers; left; left &= left - 1) {
            sum.add(batch.values[__ffs(left) - 1]);
        }
        shared.store(warp, frame, sum);
    }
    __syncwarp();
}

// The mask words of one block, 8 components and 8 tiles of frames at a time: lane l has component
// l / 4 of the group and the tiles 2 (l % 4) and 2 (l % 4) + 1.
struct BlockWords {
    __device__ BlockWords(const uint32_t* mask, int n_components, int n_rows)
        : K(n_components),
          lane(threadIdx.x & 31),
          tile(int(blockIdx.x) * kBlockTiles + 2 * (lane & 3)),
          left((n_rows + kTileFrames - 1) / kTileFrames - tile),
          low(mask + int64_t(left > 0 ? tile : 0) * K),
          high(mask + int64_t(left > 1 ? tile + 1 : 0) * K) {}

    // What is not there is some word that is, so that nothing waits for it before `bits`.
    __device__ uint2 load(int first_component) const {
        const int k = min(first_component + lane / 4, K - 1);
        return make_uint2(low[k], high[k]);
    }

    __device__ uint64_t bits(uint2 loaded, int first_component) const {
        if (first_component + lane / 4 >= K || left < 1) return 0;
        return left > 1 ? loaded.x | uint64_t(loaded.y) << 32 : loaded.x;
    }

    int K, lane, tile, left;  // `left` tiles from its first one on
    const uint32_t *low, *high;
};

// All pairs of one warp: its components, the frames of the block.
template <int kFixedDims, typename T>
__device__ __forceinline__ void refine_components(const ChunkView<T>& x, const Operands& mixture,
                                                  const BlockWords& words,
                                                  RefineShared& shared) {
    constexpr int kStride = kRefineWarps * kRefineComponents;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int first = int(blockIdx.x) * kBlockFrames;
    Batch& batch = shared.batches[warp];
    int seen = 0;
    uint2 next = words.load(kRefineComponents * warp);
    for (int start = kRefineComponents * warp; start < words.K; start += kStride) {
        uint64_t bits = words.bits(next, start);
        next = words.load(start + kStride);
        while (true) {
            int n;
            int place = places_before(__popcll(bits), lane, n);
            if (!n) break;
            for (; bits && place < kBatch; ++place, bits &= bits - 1) {
                batch.pairs[place] = uint16_t(64 * lane + __ffsll(bits) - 1);
            }
            __syncwarp();
            n = min(n, kBatch);
            for (int i = 0; i < n; i += kRefinePairs * kTeams) {
                refine_pairs<kFixedDims>(x, mixture, first, start, batch, i, n);
            }
            __syncwarp();
            if (lane < n && seen + lane < kRemembered) {
                shared.remembered[warp][seen + lane] = static_cast<float>(batch.values[lane]);
            }
            seen += n;
            add_batch(shared, start, n);
        }
    }
}

// The warp's words once more, without the pairs that have no weight or, for a hard assignment, are
// not of the best component; `members` is (K, tiles of a chunk).
__device__ __forceinline__ void write_members(const BlockWords& words, bool hard,
                                              const RefineShared& shared, uint32_t* members,
                                              int64_t stride) {
    constexpr int kStride = kRefineWarps * kRefineComponents;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int seen = 0;
    uint2 next = words.load(kRefineComponents * warp);
    for (int start = kRefineComponents * warp; start < words.K; start += kStride) {
        const uint64_t bits = words.bits(next, start);
        next = words.load(start + kStride);
        const int k = start + lane / 4;
        int n;
        int place = seen + places_before(__popcll(bits), lane, n);
        seen += n;
        uint64_t kept = bits;
        for (uint64_t left = bits; left; left &= left - 1, ++place) {
            const int bit = __ffsll(left) - 1, frame = 64 * (lane & 3) + bit;
            const bool stays = hard ? shared.components[0][frame] == k
                                    : place >= kRemembered ||
                                          !is_negligible(shared.remembered[warp][place],
                                                         shared.sums[0][frame].largest);
            if (!stays) kept &= ~(uint64_t(1) << bit);
        }
        if (k < words.K) *reinterpret_cast<uint64_t*>(members + k * stride + words.tile) = kept;
    }
}

// One block: 256 frames, all pairs that the screen left. `likelihoods` gains the sum of log p(x).
template <typename T, int kFixedDims>
__global__ void __launch_bounds__(32 * kRefineWarps, 2)
    em_refine_kernel(const __grid_constant__ ChunkView<T> x,
                     const __grid_constant__ Operands mixture, bool hard, const uint32_t* mask,
                     uint32_t* members, int64_t stride, Normaliser* normalisers,
                     double* likelihoods) {
    static_assert(kBlockFrames == 32 * kRefineWarps, "one thread a frame");
    extern __shared__ __align__(16) unsigned char bytes[];
    RefineShared& shared = *reinterpret_cast<RefineShared*>(bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int mine = int(threadIdx.x), frame = int(blockIdx.x) * kBlockFrames + mine;
    const BlockWords words(mask, int(mixture.n_components), x.n_rows);
    for (int i = lane; i < kBlockFrames; i += 32) shared.store(warp, i, LogSumExp());
    __syncwarp();
    refine_components<kFixedDims>(x, mixture, words, shared);
    __syncthreads();
    LogSumExp sum = shared.load(0, mine);
    for (int i = 1; i < kRefineWarps; ++i) sum.merge(shared.load(i, mine));
    const bool is_there = frame < x.n_rows;
    const double value = is_there ? sum.value(hard) : 0.0;
    if (is_there) normalisers[frame] = sum.normaliser(hard);
    const double total = lane_sum<32>(value);
    if (!lane) likelihoods[blockIdx.x * kBlockTiles + warp] += total;
    shared.store(0, mine, {value + kLogNegligible, 0.0, sum.component});
    __syncthreads();
    write_members(words, hard, shared, members, stride);
}

}  // namespace gmm_jepa::cuda
