// What follows the refinement: the moments of each component over the frames it has weight in, and
// the sums at the end.
#pragma once

#include "screen.cuh"

namespace gmm_jepa::cuda {

// Sums of each segment of the chunks, (segments, K) and (segments, K, D), about the means.
struct Partials {
    double* counts;
    double* first;
    double* second;
};

// Sums over all lanes of kPairs values, of value i in lanes 32 i / kPairs and those that follow: at
// the first distances each of two lanes goes on with half of the values. Orders as in lane_sum.
template <int kPairs>
__device__ __forceinline__ double parted_sum(double (&values)[kPairs]) {
    const int lane = threadIdx.x & 31;
    int distance = 16;
#pragma unroll
    for (int half = kPairs / 2; half; half /= 2, distance /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const double other = upper ? values[i] : values[i + half];
            values[i] = upper ? values[i + half] : values[i];
            values[i] += __shfl_xor_sync(kAllLanes, other, distance);
        }
    }
    return lane_sum<32 / kPairs>(values[0]);
}

// What a warp shares: places of its component's frames among 2,048, and what normalises the pairs
// at hand and those after.
template <int kPairs>
struct MomentsShared {
    struct alignas(2 * kPairs) Places {
        uint16_t at[kPairs];
    };
    Normaliser normalisers[2][kPairs];
    Places places[kMomentTiles * kTileFrames / kPairs + 1];
};

// One warp: a component over one segment of a chunk, kPairs frames at a time; lanes hold features.
// kFixedDims: the features where they are adjacent and their number is known, else 0.
template <typename T, int kSlots, int kPairs, int kFixedDims>
struct Moments {
    static_assert(kPairs == 1 || kPairs == 2 || kPairs == 4, "halves of halves of a warp");
    using Shared = MomentsShared<kPairs>;

    __device__ Moments(const ChunkView<T>& frames, const Operands& mixture, int component,
                       const Normaliser* of_frames, Shared& of_warp)
        : shared(of_warp),
          normalisers(of_frames),
          stride(frames.stride_row),
          hop(kFixedDims ? 32 : 32 * frames.stride_column),
          D(kFixedDims ? kFixedDims : int(mixture.n_dims)),
          lane(threadIdx.x & 31),
          k(component),
          column(frames.data + lane * (kFixedDims ? 1 : frames.stride_column)),
          constant(mixture.constants[component]) {
        const double2* row = reinterpret_cast<const double2*>(mixture.table) + int64_t(k) * D;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const double2 parameters = has(s) ? __ldg(row + lane + 32 * s) : make_double2(0.0, 0.0);
            mean[s] = parameters.x;
            precision[s] = parameters.y;
            first[s] = second[s] = 0.0;
        }
    }

    // Whether there is a feature in a slot of this lane.
    __device__ __forceinline__ bool has(int slot) const {
        return kFixedDims && 32 * (slot + 1) <= kFixedDims ? true : lane + 32 * slot < D;
    }

    // Adds the n frames from `tile` on whose bits are in the lanes' words, two words a lane.
    __device__ __forceinline__ void add(int tile, uint64_t bits, int place, int n) {
        uint16_t* const places = shared.places[0].at;
        for (; bits; ++place, bits &= bits - 1) {
            places[place] = uint16_t(2 * kTileFrames * lane + __ffsll(bits) - 1);
        }
        if (lane < kPairs) places[n + lane] = 0;  // some frame that is there, of no weight
        __syncwarp();
        const int64_t start = int64_t(tile) * kTileFrames;
        fetch(normalisers + start, 0, n);
        for (int i = 0; i < n; i += kPairs) {
            fetch(normalisers + start, i + kPairs, n);
            add(column + start * stride, i, n - i);
        }
        __syncwarp();
    }

    // Starts copying what normalises the pairs from i on: pairs ahead, for the compiler would move
    // a load of the pairs at hand down to where it is used.
    __device__ __forceinline__ void fetch(const Normaliser* of_places, int i, int n) {
        if (i < n && lane < kPairs) {
            copy_async(&shared.normalisers[i / kPairs % 2][lane],
                       of_places + shared.places[i / kPairs].at[lane]);
        }
        end_copy_group();
    }

    // Adds the pairs from `first_pair` on, up to n of them; lanes hold features.
    __device__ __forceinline__ void add(const T* from, int first_pair, int n) {
        const typename Shared::Places places = shared.places[first_pair / kPairs];
        const int own = lane / (32 / kPairs);  // the pair whose density ends up in this lane
        double difference[kPairs][kSlots], squares[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const T* value = from + places.at[i] * stride;
#pragma unroll
            for (int s = 0; s < kSlots; ++s, value += hop) {
                difference[i][s] = has(s) ? double(__ldg(value)) - mean[s] : 0.0;
            }
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            squares[i] = 0.0;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                squares[i] = add_square(squares[i], difference[i][s], 0.0, precision[s]);
            }
        }
        const double joint = log_joint(constant, parted_sum(squares));
        wait_copy_groups<1>();
        __syncwarp();
        const Normaliser normaliser = shared.normalisers[first_pair / kPairs % 2][own];
        const double r = own < n ? normaliser.responsibility(joint) : 0.0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const double weight = __shfl_sync(kAllLanes, r, i * (32 / kPairs));
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
            if (!has(s)) continue;
            out.first[at * D + lane + 32 * s] += first[s];
            out.second[at * D + lane + 32 * s] += second[s];
        }
    }

    Shared& shared;
    const Normaliser* normalisers;
    int64_t stride, hop;
    int D, lane, k;
    const T* column;
    double constant, count = 0.0;
    double mean[kSlots], precision[kSlots], first[kSlots], second[kSlots];
};

// A block is a warp: of several, the one with the most frequent component would keep all places.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__global__ void __launch_bounds__(32, kSlots > 3 ? 8 : 24)
    em_moments_kernel(const __grid_constant__ ChunkView<T> x,
                      const __grid_constant__ Operands mixture, const uint32_t* members,
                      int64_t stride, const Normaliser* normalisers,
                      const __grid_constant__ Partials out) {
    __shared__ MomentsShared<kPairs> shared;
    const int lane = threadIdx.x, K = int(mixture.n_components), k = blockIdx.x;
    const int tiles = (x.n_rows + kTileFrames - 1) / kTileFrames;
    const int begin = segment_start(tiles, blockIdx.y, gridDim.y);
    const int end = segment_start(tiles, blockIdx.y + 1, gridDim.y);
    // Of the two tiles of a lane; a refined block has them, whether there are frames or not.
    const auto bits_of = [&](int tile) {
        return tile < end ? *reinterpret_cast<const uint64_t*>(members + k * stride + tile) : 0;
    };
    uint64_t next = bits_of(begin + 2 * lane);
    Moments<T, kSlots, kPairs, kFixedDims> moments(x, mixture, k, normalisers, shared);
    bool any = false;
    for (int from = begin; from < end; from += kMomentTiles) {
        const uint64_t bits = next;
        next = bits_of(from + kMomentTiles + 2 * lane);
        int n;
        const int place = places_before(__popcll(bits), lane, n);
        if (!n) continue;
        any = true;
        moments.add(from, bits, place, n);
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
