// What follows the screen: exact log-densities of the pairs it left, each frame's log-sum-exp, and
// the moments of each component. Float64 throughout: an H200 does half as many of these operations
// a second as in float32, and the loads of parameters take longer than either.
#pragma once

#include "screen.cuh"

namespace gmm_jepa::cuda {

constexpr int kRefineWarps = 8;
constexpr int kMomentWarps = 8;
// Pairs that a warp refines side by side; how many such sets have their loads under way at the same
// time, and for how many features each: all of them up to D = 96. Two sets of as much would spill.
constexpr int kTeams = 32 / kPairLanes;
constexpr int kRefinePairs = 1;
constexpr int kRefineRounds = 3;

// Sum of the lanes below this one, and of all.
__device__ __forceinline__ int places_before(int count, int lane, int& total) {
    int sum = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += other;
    }
    total = __shfl_sync(kAllLanes, sum, 31);
    return sum - count;
}

// What one warp shares between its lanes: a batch of pairs, by component, then by frame.
struct Batch {
    double values[kBatch];           // log-densities, then shares
    uint16_t pairs[kBatch];          // 32 (component - first of the group) + frame
    uint32_t of_frame[kTileFrames];  // bit i: pair i is the frame's
};

// Log-densities of the pairs of a batch of n from i on.
template <typename T>
__device__ __forceinline__ void refine_pairs(const ChunkView<T>& x, const Operands& mixture,
                                             int first_frame, int first_component, Batch& batch,
                                             int i, int n) {
    const int team = (threadIdx.x & 31) / kPairLanes, lane = threadIdx.x & (kPairLanes - 1);
    int frames[kRefinePairs], k[kRefinePairs];
    double joints[kRefinePairs];
#pragma unroll
    for (int p = 0; p < kRefinePairs; ++p) {
        const int pair = batch.pairs[min(i + p * kTeams + team, n - 1)];
        frames[p] = first_frame + (pair & 31);
        k[p] = first_component + pair / 32;
    }
    log_joints_of<kRefinePairs, kRefineRounds>(x, frames, mixture, k, lane, joints);
#pragma unroll
    for (int p = 0; p < kRefinePairs; ++p) {
        const int mine = i + p * kTeams + team;
        if (mine < n && !lane) batch.values[mine] = joints[p];
    }
}

// One warp: 32 frames, all pairs that the screen left. `likelihoods` gains the sum of log p(x).
template <typename T>
__global__ void __launch_bounds__(32 * kRefineWarps, 2)
    em_refine_kernel(const __grid_constant__ ChunkView<T> x,
                     const __grid_constant__ Operands mixture, bool hard, uint32_t* mask,
                     Normaliser* normalisers, double* likelihoods) {
    __shared__ Batch batches[kRefineWarps];
    Batch& batch = batches[threadIdx.x / 32];
    const int lane = threadIdx.x & 31, K = int(mixture.n_components);
    const int block = blockIdx.x * kRefineWarps + threadIdx.x / 32;
    const int first = block * kTileFrames;
    if (first >= x.n_rows) return;
    uint32_t* words = mask + int64_t(block) * K;
    LogSumExp sum;  // of frame `lane`
    const auto bits_of = [&](int k) {
        const uint64_t bits = k < K ? words[k] : 0;
        return k + 1 < K ? bits | uint64_t(words[k + 1]) << 32 : bits;
    };
    uint64_t next = bits_of(2 * lane);
    for (int start = 0; start < K; start += kMaskComponents) {
        uint64_t bits = next;
        next = bits_of(start + kMaskComponents + 2 * lane);
        while (true) {
            int n;
            int place = places_before(__popcll(bits), lane, n);
            if (!n) break;
            for (; bits && place < kBatch; ++place, bits &= bits - 1) {
                batch.pairs[place] = uint16_t(64 * lane + __ffsll(bits) - 1);
            }
            __syncwarp();
            n = min(n, kBatch);
            batch.of_frame[lane] = 0;
            for (int i = 0; i < n; i += kRefinePairs * kTeams) {
                refine_pairs(x, mixture, first, start, batch, i, n);
            }
            __syncwarp();
            // Lanes behind the last pair are no frame's.
            const int owner = lane < n ? batch.pairs[lane] & 31 : 32;
            const uint32_t peers = __match_any_sync(kAllLanes, owner);
            if (lane < n) batch.of_frame[owner] = peers;
            __syncwarp();
            const uint32_t own = batch.of_frame[lane];
            for (uint32_t left = own; left; left &= left - 1) {
                const int i = __ffs(left) - 1;
                sum.see(batch.values[i], start + batch.pairs[i] / 32);
            }
            __syncwarp();
            sum.raise();
            const double largest = __shfl_sync(kAllLanes, sum.largest, owner & 31);
            if (lane < n) batch.values[lane] = share(batch.values[lane], largest);
            __syncwarp();
            for (uint32_t left = own; left; left &= left - 1) {
                sum.add(batch.values[__ffs(left) - 1]);
            }
            __syncwarp();
        }
    }
    const bool is_there = first + lane < x.n_rows;
    const double value = is_there ? sum.value(hard) : 0.0;
    if (is_there) normalisers[first + lane] = sum.normaliser();
    const double total = lane_sum<32>(value);
    if (!lane) likelihoods[block] += total;
    if (!hard) return;
    for (int start = 0; start < K; start += 32) {
        const int k = start + lane;
        uint32_t word = k < K ? words[k] : 0;
        for (uint32_t left = __ballot_sync(kAllLanes, word != 0); left; left &= left - 1) {
            const int other = __ffs(left) - 1;
            const uint32_t owners =
                __ballot_sync(kAllLanes, is_there && sum.component == start + other);
            if (lane == other) word &= owners;
        }
        if (k < K) words[k] = word;
    }
}

// Sums of each segment of the chunks, (segments, K) and (segments, K, D), about the means.
struct Partials {
    double* counts;
    double* first;
    double* second;
};

// What a warp knows of the frames of its segment that its component has a part in.
struct Members {
    uint16_t frames[32 * kTileFrames];
};

// One warp: a component over one segment of a chunk, kPairs frames at a time; lanes hold features.
template <typename T, int kSlots, int kPairs>
struct Moments {
    static_assert(kPairs == 1 || kPairs == 2 || kPairs == 4, "one lane a pair");

    __device__ Moments(const ChunkView<T>& frames, const Operands& mixture, int component)
        : x(frames),
          D(int(mixture.n_dims)),
          lane(threadIdx.x & 31),
          k(component),
          constant(mixture.constants[component]) {
        const double2* row = reinterpret_cast<const double2*>(mixture.table) + int64_t(k) * D;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int d = lane + 32 * s;
            const double2 parameters = d < D ? __ldg(row + d) : make_double2(0.0, 0.0);
            mean[s] = parameters.x;
            precision[s] = parameters.y;
            first[s] = second[s] = 0.0;
        }
    }

    // Adds up to kPairs frames, `n` of them there; frame(i) is the i-th.
    template <typename Frame>
    __device__ __forceinline__ void add(const Frame& frame, int n,
                                        const Normaliser* normalisers, bool hard) {
        double difference[kPairs][kSlots], joint[kPairs];
        // Asked for here, for it is as far away as the frames. Lane i's is of pair i.
        const Normaliser normaliser = normalisers[frame(min(lane, n - 1))];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const T* values = x.row(frame(min(i, n - 1)));
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                const int d = lane + 32 * s;
                difference[i][s] = d < D ? double(values[d * x.stride_column]) - mean[s] : 0.0;
            }
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            double squares = 0.0;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                squares = add_square(squares, difference[i][s], 0.0, precision[s]);
            }
            joint[i] = log_joint(constant, lane_sum<32>(squares));
        }
        double mine = joint[0];
        if constexpr (kPairs == 2) mine = lane & 1 ? joint[1] : joint[0];
        if constexpr (kPairs == 4) {
            const double low = lane & 1 ? joint[1] : joint[0];
            mine = lane & 2 ? (lane & 1 ? joint[3] : joint[2]) : low;
        }
        double r = 0.0;
        if (lane < n) r = hard ? 1.0 : normaliser.responsibility(mine);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const double weight = __shfl_sync(kAllLanes, r, i);
            if (i >= n) continue;  // a pair computed again, for want of another
            count += weight;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                add_moments(weight, difference[i][s], first[s], second[s]);
            }
        }
    }

    __device__ void write(const Partials& out, int segment, int K) const {
        const int64_t at = int64_t(segment) * K + k;
        if (!lane) out.counts[at] += count;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int d = lane + 32 * s;
            if (d >= D) continue;
            out.first[at * D + d] += first[s];
            out.second[at * D + d] += second[s];
        }
    }

    const ChunkView<T>& x;
    int D, lane, k;
    double constant, count = 0.0;
    double mean[kSlots], precision[kSlots], first[kSlots], second[kSlots];
};

template <typename T, int kSlots, int kPairs>
__global__ void __launch_bounds__(32 * kMomentWarps, kSlots > 3 ? 1 : 3)
    em_moments_kernel(const __grid_constant__ ChunkView<T> x,
                      const __grid_constant__ Operands mixture, bool hard, const uint32_t* mask,
                      const Normaliser* normalisers, const __grid_constant__ Partials out) {
    __shared__ Members shared[kMomentWarps];
    uint16_t* members = shared[threadIdx.x / 32].frames;
    const int lane = threadIdx.x & 31, K = int(mixture.n_components);
    const int k = blockIdx.x * kMomentWarps + threadIdx.x / 32;
    if (k >= K) return;
    const int64_t blocks = (x.n_rows + kTileFrames - 1) / kTileFrames;
    const int begin = int(blocks * blockIdx.y / gridDim.y);
    const int end = int(blocks * (blockIdx.y + 1) / gridDim.y);
    Moments<T, kSlots, kPairs> moments(x, mixture, k);
    bool any = false;
    const auto bits_of = [&](int block) {
        return block < end ? mask[int64_t(block) * K + k] : 0;
    };
    uint32_t next = bits_of(begin + lane);
    for (int from = begin; from < end; from += 32) {
        uint32_t bits = next;
        next = bits_of(from + 32 + lane);
        int n;
        int place = places_before(__popc(bits), lane, n);
        if (!n) continue;
        any = true;
        for (; bits; ++place, bits &= bits - 1) {
            members[place] = uint16_t(lane * kTileFrames + __ffs(bits) - 1);
        }
        __syncwarp();
        for (int i = 0; i < n; i += kPairs) {
            const auto frame = [&](int j) { return from * kTileFrames + members[i + j]; };
            moments.add(frame, min(kPairs, n - i), normalisers, hard);
        }
        __syncwarp();
    }
    if (any) moments.write(out, blockIdx.y, K);
}

// The sum of n values by one block, in a fixed order.
__global__ void __launch_bounds__(256)
    em_likelihood_kernel(const double* values, int n, double* total) {
    __shared__ double parts[8];
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += 256) sum += values[i];
    sum = lane_sum<32>(sum);
    if (!(threadIdx.x & 31)) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; ++i) sum += parts[i];
    *total = isfinite(sum) ? sum : sum - sum;
}

// One block a component: segments become statistics about zero, not a number if any frame is not.
__global__ void __launch_bounds__(128)
    em_finish_kernel(const __grid_constant__ Operands mixture,
                     const __grid_constant__ Partials partials, int segments,
                     const __grid_constant__ Statistics out) {
    const int K = int(mixture.n_components), D = int(mixture.n_dims), k = blockIdx.x;
    const double spoil = *out.log_likelihood - *out.log_likelihood;  // zero or not a number
    double count = 0.0;
    for (int s = 0; s < segments; ++s) count += partials.counts[int64_t(s) * K + k];
    if (!threadIdx.x) out.counts[k] = count + spoil;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        double first = 0.0, second = 0.0;
        for (int s = 0; s < segments; ++s) {
            first += partials.first[(int64_t(s) * K + k) * D + d];
            second += partials.second[(int64_t(s) * K + k) * D + d];
        }
        const int64_t at = int64_t(k) * D + d;
        const double mean = mixture.table[2 * at];
        out.first[at] = first_about_zero(count, mean, first) + spoil;
        out.second[at] = second_about_zero(count, mean, first, second) + spoil;
    }
}

}  // namespace gmm_jepa::cuda
