// What follows the refinement: the moments of each component over the frames it has weight in, and
// the sums at the end.
#pragma once

#include "refine.cuh"

namespace gmm_jepa::cuda {

// Sums of each segment of the chunks, (segments, K) and (segments, K, D), about the means.
struct Partials {
    double* counts;
    double* first;
    double* second;
};

// A component's sums in the lanes of a warp, which hold features.
template <typename T, int kSlots, int kFixedDims>
struct Moments {
    using Of = Component<T, kSlots, kFixedDims>;

    template <int kPairs>
    __device__ __forceinline__ void add(const Of& of, const double (&weights)[kPairs],
                                        const T (&values)[kPairs][kSlots]) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            count += weights[i];
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                add_moments(weights[i], values[i][s] - of.mean[s], first[s], second[s]);
            }
        }
    }

    __device__ void write(const Of& of, const Partials& out, int segment, int K) const {
        const int64_t at = int64_t(segment) * K + of.k;
        if (!of.lane) out.counts[at] += count;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            if (!of.has(s)) continue;
            out.first[at * of.D + of.lane + 32 * s] += first[s];
            out.second[at * of.D + of.lane + 32 * s] += second[s];
        }
    }

    double count = 0.0, first[kSlots] = {}, second[kSlots] = {};
};

// Pairs of one warp that have weight, until they are enough to go through.
struct Members {
    static constexpr int kMost = 256;
    double weights[kMost];
    __align__(16) int frames[kMost];

    // All lanes give a pair each; those of weight are appended in their order.
    __device__ void append(int& n, double weight, int frame) {
        const int lane = threadIdx.x & 31;
        const bool stays = !(weight == 0.0);  // so does not a number
        const uint32_t those = __ballot_sync(kAllLanes, stays);
        if (stays) {
            const int at = n + __popc(those & first_bits(lane));
            weights[at] = weight;
            frames[at] = frame;
        }
        n += __popc(those);
    }
};

// Adds the n pairs that were appended, kPairs at a time.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__device__ __forceinline__ void add_members(const Component<T, kSlots, kFixedDims>& of,
                                            const T* rows, Members& members, int n,
                                            Moments<T, kSlots, kFixedDims>& moments) {
    if (of.lane < kPairs && n + of.lane < Members::kMost) {
        members.weights[n + of.lane] = 0.0;  // of some frame that is there
        members.frames[n + of.lane] = 0;
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < n; i += kPairs) {
        int frames[kPairs];
        double weights[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; ++j) frames[j] = members.frames[i + j];
        T values[kPairs][kSlots];
        of.load(rows, frames, values);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) weights[j] = members.weights[i + j];
        moments.add(of, weights, values);
    }
    __syncwarp();
}

// A warp, which is a block, takes a component over one segment of the chunk: of several, the one
// with the most frequent component would keep all places.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__global__ void __launch_bounds__(32, kSlots > 8 ? 8 : kSlots > 3 ? 12 : 32)
    em_moments_kernel(const __grid_constant__ ChunkView<T> x,
                      const __grid_constant__ Operands mixture, bool hard,
                      const Normaliser* normalisers, const __grid_constant__ PairList list,
                      const __grid_constant__ Partials out) {
    __shared__ Members members;
    if (*list.spilled) return;
    const int lane = threadIdx.x, K = int(mixture.n_components), k = blockIdx.x;
    const int sections = n_sections(x.n_rows);
    const int begin = segment_start(sections, blockIdx.y, gridDim.y);
    const int end = segment_start(sections, blockIdx.y + 1, gridDim.y);
    const Component<T, kSlots, kFixedDims> of(x, mixture, k);
    Moments<T, kSlots, kFixedDims> moments;
    bool any = false;
    int n = 0;
    for (int first = begin; first < end; first += 32) {
        // The pairs of up to 32 sections, a section a lane, as if they were side by side.
        const bool is_there = first + lane < end;
        const int2 range = is_there ? list.ranges[int64_t(first + lane) * K + k] : make_int2(0, 0);
        int total;
        const int before = places_before(range.y, lane, total);
        any |= total > 0;
        for (int start = 0; start < total; start += 32) {
            const int place = start + lane;
            int at = 0;
            for (int s = 0; s < min(32, end - first); ++s) {
                const int from = __shfl_sync(kAllLanes, before, s);
                const int skip = __shfl_sync(kAllLanes, range.x - before, s);
                if (place >= from) at = skip + place;
            }
            double weight = 0.0;
            int frame = 0;
            if (place < total) {
                frame = int(list.pairs[at] & first_bits(kFrameBits));
                weight = hard ? normalisers[frame].hard_responsibility(k)
                              : normalisers[frame].responsibility(list.values[at]);
            }
            members.append(n, weight, frame);
            if (n > Members::kMost - 32) {
                add_members<T, kSlots, kPairs, kFixedDims>(of, x.data, members, n, moments);
                n = 0;
            }
        }
    }
    if (n) add_members<T, kSlots, kPairs, kFixedDims>(of, x.data, members, n, moments);
    if (any) moments.write(of, out, blockIdx.y, K);
}

// The same where the pairs did not fit the list, from log-densities computed again.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__global__ void __launch_bounds__(32, kSlots > 3 ? 8 : 16)
    em_moments_again_kernel(const __grid_constant__ ChunkView<T> x,
                            const __grid_constant__ Operands mixture, bool hard,
                            const uint32_t* mask, const Normaliser* normalisers,
                            const __grid_constant__ PairList list, int segments,
                            const __grid_constant__ Partials out) {
    if (!*list.spilled) return;
    const int K = int(mixture.n_components), sections = n_sections(x.n_rows);
    const int tiles = (x.n_rows + kTileFrames - 1) / kTileFrames;
    const Component<T, kSlots, kFixedDims> of(x, mixture, blockIdx.x);
    constexpr int kLanes = 32 / kPairs;  // that have the same pair's log-density
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        Moments<T, kSlots, kFixedDims> moments;
        const int begin = kSectionTiles * segment_start(sections, segment, segments);
        const int end = min(tiles, kSectionTiles * segment_start(sections, segment + 1, segments));
        uint32_t next = begin < end ? mask[int64_t(begin) * K + of.k] : 0;
        for (int tile = begin; tile < end; ++tile) {
            uint32_t bits = next;
            next = mask[int64_t(min(tile + 1, end - 1)) * K + of.k];
            while (bits) {
                const int n = __popc(bits);
                int places[kPairs];
                int mine = 0;
#pragma unroll
                for (int i = 0; i < kPairs; ++i) {
                    places[i] = bits ? __ffs(bits) - 1 : 0;
                    bits &= bits - 1;
                    if (of.lane / kLanes == i) mine = places[i];
                }
                T values[kPairs][kSlots];
                of.load(x.row(tile * kTileFrames), places, values);
                const double joint = of.log_joint_of(values);
                const Normaliser normaliser = normalisers[tile * kTileFrames + mine];
                const double r =
                    hard ? normaliser.hard_responsibility(of.k)
                         : normaliser.responsibility(share(joint, normaliser.largest));
                const double own = of.lane / kLanes < n ? r : 0.0;
                double weights[kPairs];
#pragma unroll
                for (int i = 0; i < kPairs; ++i) {
                    weights[i] = __shfl_sync(kAllLanes, own, i * kLanes);
                }
                moments.add(of, weights, values);
            }
        }
        moments.write(of, out, segment, K);
    }
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
