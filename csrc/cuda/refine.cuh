// What follows the screen: exact log-densities of the pairs it left, and each frame's log-sum-exp.
// Float64 throughout: an H200 does half as many of these operations a second as in float32, and the
// frames take longer to load.
#pragma once

#include <type_traits>

#include "screen.cuh"

namespace gmm_jepa::cuda {

// The pairs of a chunk, those of a section and a component side by side, by frame. Where they begin
// is as blocks get there; whatever is made of them does not depend on it.
struct PairList {
    double* values;     // log-densities, then shares of their frame's largest
    uint32_t* pairs;    // frame of the chunk, component
    int2* ranges;       // (sections, K): where pairs begin, how many
    uint32_t* used;     // by the chunk at hand, whether they fitted or not
    uint32_t* spilled;  // that they did not
    Refined* refined;   // by the call so far
    uint32_t capacity;

    __device__ bool fits() const { return *used <= capacity; }
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

// One component in the lanes of a warp: lane l has features l, l + 32, ...
// kFixedDims: the features where they are adjacent and their number is known, else 0.
template <typename T, int kSlots, int kFixedDims>
struct Component {
    __device__ Component(const ChunkView<T>& frames, const Operands& mixture, int component)
        : row_bytes(frames.row_bytes),
          hop(kFixedDims ? 32 : 32 * frames.stride_column),
          D(kFixedDims ? kFixedDims : int(mixture.n_dims)),
          lane(threadIdx.x & 31),
          k(component),
          constant(__ldg(mixture.constants + component)) {
        const double2* row = reinterpret_cast<const double2*>(mixture.table) + int64_t(k) * D;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const double2 parameters = has(s) ? __ldg(row + lane + 32 * s) : make_double2(0.0, 0.0);
            mean[s] = parameters.x;
            precision[s] = parameters.y;
        }
    }

    // Whether there is a feature in a slot of this lane.
    __device__ __forceinline__ bool has(int slot) const {
        return kFixedDims && 32 * (slot + 1) <= kFixedDims ? true : lane + 32 * slot < D;
    }

    // The lane's features of frames that begin at `rows`, zeros in slots that have none.
    template <int kPairs>
    __device__ __forceinline__ void load(const T* rows, const int (&places)[kPairs],
                                         T (&values)[kPairs][kSlots]) const {
        const char* const from = reinterpret_cast<const char*>(rows + lane * (hop / 32));
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const T* value = reinterpret_cast<const T*>(row_at(from, places[i], row_bytes));
#pragma unroll
            for (int s = 0; s < kSlots; ++s, value += hop) {
                values[i][s] = has(s) ? __ldg(value) : T(0);
            }
        }
    }

    // Log-densities, that of frame i in lanes 32 i / kPairs and those that follow. Where there is
    // no feature the precision is zero.
    template <int kPairs>
    __device__ __forceinline__ double log_joint_of(const T (&values)[kPairs][kSlots]) const {
        double squares[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            squares[i] = 0.0;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                squares[i] = add_square(squares[i], values[i][s], mean[s], precision[s]);
            }
        }
        return log_joint(constant, parted_sum(squares));
    }

    uint32_t row_bytes;
    int64_t hop;
    int D, lane, k;
    double constant, mean[kSlots], precision[kSlots];
};

// Frames on their way to the warps of a block of the refinement: while four of a warp are used, the
// next twelve are under way.
struct RefineRows {
    static constexpr int kPairs = 4, kGroups = 4, kDims = 80;
    __align__(16) float rows[kRefineWarps][kGroups][kPairs][kDims];
};
struct NoRows {};

// One component over four frames in shared memory, 8 lanes each: lane j has pairs of features j,
// j + 8, ... Two rows are as far apart as all banks and a half, so that no two lanes meet.
struct RowsComponent {
    static constexpr int kDims = RefineRows::kDims, kEach = kDims / (2 * kPairLanes);
    static_assert(kDims % (2 * kPairLanes) == 0, "as many features in every lane");
    static_assert(kDims % 32 == 16, "no lane meets another");

    __device__ RowsComponent(const Operands& mixture, int component)
        : lane(threadIdx.x & 31), constant(__ldg(mixture.constants + component)) {
        const double2* row = reinterpret_cast<const double2*>(mixture.table) +
                             int64_t(component) * kDims + 2 * (lane % kPairLanes);
#pragma unroll
        for (int i = 0; i < 2 * kEach; ++i) {
            parameters[i] = __ldg(row + i / 2 * 2 * kPairLanes + i % 2);
        }
    }

    // That of row i in lanes 8 i to 8 i + 7.
    __device__ __forceinline__ double log_joint_of(const float (&rows)[4][kDims]) const {
        const float2* from =
            reinterpret_cast<const float2*>(rows[lane / kPairLanes]) + lane % kPairLanes;
        double parts[4] = {};
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float2 features = from[i * kPairLanes];
            const double2 even = parameters[2 * i], odd = parameters[2 * i + 1];
            double& part = parts[i % 2];
            double& other = parts[i % 2 + 2];
            part = add_square(part, features.x, even.x, even.y);
            other = add_square(other, features.y, odd.x, odd.y);
        }
        const double sum = (parts[0] + parts[2]) + (parts[1] + parts[3]);
        return log_joint(constant, lane_sum<kPairLanes>(sum));
    }

    int lane;
    double constant;
    double2 parameters[2 * kEach];  // mean, precision
};

// What the warps of a block of the refinement share.
template <int kFixedDims>
struct RefineShared : std::conditional_t<kFixedDims != 0, RefineRows, NoRows> {
    static constexpr int kRow = kSectionTiles + 4;  // other banks for other components
    __align__(16) uint32_t words[kRefineComponents][kRow];
    int counts[kRefineComponents];
    uint32_t start;
    __align__(16) uint16_t places[kRefineWarps][kBatch];
};

// One block: the pairs of 8 components and a section, in batches of 32 that its warps take in
// turns. `emit(value, frame, component, place)` of each, by one lane; place is its number in the
// block.
template <typename T, int kSlots, int kPairs, int kFixedDims>
struct Refinement {
    static_assert(!kFixedDims || (sizeof(T) == 4 && kFixedDims == RefineRows::kDims &&
                                  kPairs == RefineRows::kPairs), "the rows that are kept");
    static_assert(kRefineWarps == 8 && kRefineComponents == 8,
                  "a warp counts a component, and all threads read 64 tiles of 8 in two rounds");
    static constexpr int kAhead = RefineRows::kGroups - 1;
    static constexpr int kPieces = RefineRows::kDims / 4;  // of 16 bytes, of a row

    __device__ Refinement(const ChunkView<T>& frames, const Operands& operands,
                          RefineShared<kFixedDims>& block)
        : x(frames),
          mixture(operands),
          shared(block),
          K(int(operands.n_components)),
          first(int(blockIdx.x) * kRefineComponents),
          warp(threadIdx.x / 32),
          lane(threadIdx.x & 31) {}

    // The block's words of a section, and how many pairs each component has there.
    __device__ void read(const uint32_t* mask, int section) {
        const int tiles = (x.n_rows + kTileFrames - 1) / kTileFrames;
        const int component = int(threadIdx.x) % kRefineComponents;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = int(threadIdx.x) / kRefineComponents + 32 * i;
            const int tile = section * kSectionTiles + row, k = first + component;
            const bool is_there = tile < tiles && k < K;
            shared.words[component][row] = is_there ? mask[int64_t(tile) * K + k] : 0u;
        }
        __syncthreads();
        const int n = __reduce_add_sync(kAllLanes, __popcll(bits_of(warp)));
        if (!lane) shared.counts[warp] = n;
        __syncthreads();
        count = lane < kRefineComponents ? shared.counts[lane] : 0;
        int total_batches;
        before = places_before(count, lane, total);
        batches_before = places_before((count + kBatch - 1) / kBatch, lane, total_batches);
        batches = total_batches;
        pieces = reinterpret_cast<const char*>(x.row(section * kSectionFrames)) + 16 * lane;
    }

    // Two tiles of the section are a lane's.
    __device__ uint64_t bits_of(int component) const {
        return reinterpret_cast<const uint64_t*>(shared.words[component])[lane];
    }

    // Places of a component's pairs from number `skipped` on, up to 32; those behind the last are
    // of some frame that is there.
    __device__ void find(int component, int skipped) {
        uint64_t bits = bits_of(component);
        int n;
        int number = places_before(__popcll(bits), lane, n) - skipped;
        uint16_t* const places = shared.places[warp];
        __syncwarp();  // the batch before is done with
        places[lane] = 0;
        __syncwarp();
        for (; bits && number < kBatch; ++number, bits &= bits - 1) {
            if (number >= 0) places[number] = uint16_t(64 * lane + __ffsll(bits) - 1);
        }
        __syncwarp();
    }

    // Log-densities of n frames of a section, that of place i in lane i.
    __device__ double values(int component, int section, int n) {
        double mine = 0.0;
        if constexpr (kFixedDims != 0) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) fetch(i, n);
            const RowsComponent of(mixture, component);
#pragma unroll 1
            for (int i = 0; kPairs * i < n; ++i) {
                wait_copy_groups<kAhead - 1>();
                __syncwarp();  // these rows are there, those before are done with
                fetch(i + kAhead, n);
                take(of.log_joint_of(shared.rows[warp][i % RefineRows::kGroups]), kPairs * i, mine);
            }
        } else {
            const Component<T, kSlots, 0> of(x, mixture, component);
            const T* const rows = x.row(section * kSectionFrames);
#pragma unroll 1
            for (int i = 0; i < n; i += kPairs) {
                int places[kPairs];
#pragma unroll
                for (int j = 0; j < kPairs; ++j) places[j] = shared.places[warp][i + j];
                T features[kPairs][kSlots];
                of.load(rows, places, features);
                take(of.log_joint_of(features), i, mine);
            }
        }
        return mine;
    }

    // Starts copying the rows of group i of the places, a piece of 16 bytes a lane. The compiler
    // would wait for half of as many loads into registers before it asks for the other half.
    __device__ __forceinline__ void fetch(int i, int n) {
        if (kPairs * i < n && lane < kPieces) {
            const uint64_t four =
                *reinterpret_cast<const uint64_t*>(shared.places[warp] + kPairs * i);
            auto& to = shared.rows[warp][i % RefineRows::kGroups];
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const uint32_t place = uint32_t(four >> 16 * j) & 0xffffu;
                copy_async(to[j] + 4 * lane, row_at(pieces, place, x.row_bytes));
            }
        }
        end_copy_group();  // an empty one keeps the count
    }

    // Of kPairs log-densities from place i on, the one of the lane's own place, if it is there.
    __device__ __forceinline__ void take(double joint, int i, double& mine) const {
        const int place = lane - i;
        const double given = __shfl_sync(kAllLanes, joint, place * (32 / kPairs) & 31);
        if (unsigned(place) < unsigned(kPairs)) mine = given;
    }

    // Before the first emission all threads of the block call begin().
    template <typename Begin, typename Emit>
    __device__ void run(int section, const Begin& begin, const Emit& emit) {
        for (int batch = warp; batch < batches || batch == warp; batch += kRefineWarps) {
            int place = 0, n = 0, k = 0;
            double value = 0.0;
            if (batch < batches) {
                // The last component that begins at or before this batch has it.
                const bool begins = lane < kRefineComponents && count && batches_before <= batch;
                const int component = 31 - __clz(__ballot_sync(kAllLanes, begins));
                const int skipped =
                    kBatch * (batch - __shfl_sync(kAllLanes, batches_before, component));
                n = min(kBatch, __shfl_sync(kAllLanes, count, component) - skipped);
                place = __shfl_sync(kAllLanes, before, component) + skipped + lane;
                k = first + component;
                find(component, skipped);
                value = values(k, section, n);
            }
            if (batch == warp) begin();
            if (lane < n) {
                emit(value, section * kSectionFrames + shared.places[warp][lane], k, place);
            }
        }
    }

    const ChunkView<T>& x;
    const Operands& mixture;
    RefineShared<kFixedDims>& shared;
    int K, first, warp, lane;
    const char* pieces;  // the lane's, of the section's first frame
    // Of lane c's component: pairs, pairs of those before, batches of those before; of the block.
    int count = 0, before = 0, batches_before = 0, total = 0, batches = 0;
};

// Log-densities of a section's pairs under 8 components into the list, and each frame's largest.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__global__ void __launch_bounds__(32 * kRefineWarps, kSlots > 3 ? 2 : 3)
    em_refine_kernel(const __grid_constant__ ChunkView<T> x,
                     const __grid_constant__ Operands mixture, const uint32_t* mask,
                     FrameSum* sums, const __grid_constant__ PairList list) {
    __shared__ RefineShared<kFixedDims> shared;
    const int section = blockIdx.y;
    Refinement<T, kSlots, kPairs, kFixedDims> block(x, mixture, shared);
    block.read(mask, section);
    if (!block.total) {
        const int k = block.first + int(threadIdx.x);
        if (threadIdx.x < kRefineComponents && k < block.K) {
            list.ranges[int64_t(section) * block.K + k] = make_int2(0, 0);
        }
        return;
    }
    // Asked for before the first log-densities, needed behind them.
    uint32_t start = 0;
    if (!threadIdx.x) start = atomicAdd(list.used, uint32_t(block.total));
    const auto begin = [&] {
        if (!threadIdx.x) shared.start = start;
        __syncthreads();
        start = shared.start;
        const int k = block.first + int(threadIdx.x);
        if (threadIdx.x < kRefineComponents && k < block.K) {
            list.ranges[int64_t(section) * block.K + k] =
                make_int2(int(start) + block.before, block.count);
        }
    };
    block.run(section, begin, [&](double value, int frame, int k, int place) {
        const uint64_t at = uint64_t(start) + uint32_t(place);
        if (at < list.capacity) {
            list.values[at] = value;
            list.pairs[at] = uint32_t(frame) | uint32_t(k) << kFrameBits;
        }
        atomicMax(reinterpret_cast<unsigned long long*>(&sums[frame].largest),
                  static_cast<unsigned long long>(ordered_bits(value)));
    });
}

static_assert(kMostComponents / kShareUnit <= 0x1p63, "whole shares of a frame add up to this");
static_assert(int64_t(kMostComponents) << kFrameBits <= int64_t(1) << 32, "a pair is 32 bits");

// Adds a pair's share to its frame's sum, and returns it; of a hard assignment, ranks a component
// that has the largest log-density.
__device__ __forceinline__ double add_share(FrameSum* sums, int frame, int k, double value,
                                            double largest, bool hard) {
    auto* const sum = reinterpret_cast<unsigned long long*>(&sums[frame].sum);
    if (hard) {
        if (value == largest) atomicMax(sum, static_cast<unsigned long long>(hard_rank(k)));
        return 0.0;
    }
    const double part = share(value, largest);
    atomicAdd(sum, static_cast<unsigned long long>(whole_share(part)));
    return part;
}

// The listed log-densities become shares of their frames' largest, and these are added up.
__global__ void __launch_bounds__(256)
    em_share_kernel(FrameSum* sums, const __grid_constant__ PairList list, bool hard) {
    constexpr int kEach = 4;
    if (!list.fits()) return;
    const uint32_t n = *list.used, stride = gridDim.x * blockDim.x;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += kEach * stride) {
        uint32_t pairs[kEach];
        double values[kEach], largest[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const uint32_t at = i + j * stride < n ? i + j * stride : i;
            pairs[j] = list.pairs[at];
            values[j] = list.values[at];
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const uint32_t frame = pairs[j] & first_bits(kFrameBits);
            largest[j] = ordered_value(__ldcg(&sums[frame].largest));
        }
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (i + j * stride >= n) continue;
            const int frame = int(pairs[j] & first_bits(kFrameBits));
            const double part = add_share(sums, frame, int(pairs[j] >> kFrameBits), values[j],
                                          largest[j], hard);
            if (!hard) list.values[i + j * stride] = part;
        }
    }
}

// The same where the pairs did not fit the list, from log-densities computed again.
template <typename T, int kSlots, int kPairs, int kFixedDims>
__global__ void __launch_bounds__(32 * kRefineWarps, kSlots > 3 ? 2 : 3)
    em_share_again_kernel(const __grid_constant__ ChunkView<T> x,
                          const __grid_constant__ Operands mixture, const uint32_t* mask,
                          FrameSum* sums, const __grid_constant__ PairList list, bool hard) {
    __shared__ RefineShared<kFixedDims> shared;
    if (list.fits()) return;
    Refinement<T, kSlots, kPairs, kFixedDims> block(x, mixture, shared);
    for (int section = blockIdx.y; section < n_sections(x.n_rows); section += gridDim.y) {
        block.read(mask, section);
        block.run(section, [] {}, [&](double value, int frame, int k, int) {
            const double largest = ordered_value(__ldcg(&sums[frame].largest));
            add_share(sums, frame, k, value, largest, hard);
        });
        __syncthreads();  // the words are done with
    }
}

// A thread a frame: what normalises it, and the sum of log p(x) of each tile. Leaves all that a
// chunk adds to as the next one needs it.
__global__ void __launch_bounds__(256)
    em_frame_kernel(FrameSum* sums, int n_rows, bool hard, Normaliser* normalisers,
                    double* likelihoods, const __grid_constant__ PairList list) {
    const int frame = int(blockIdx.x * blockDim.x + threadIdx.x);
    double value = 0.0;
    if (frame < n_rows) {
        const FrameSum sum = sums[frame];
        normalisers[frame] = sum.normaliser(hard);
        value = sum.value(hard);
        sums[frame] = {0, 0};
    }
    const double total = lane_sum<32>(value);
    if (!(threadIdx.x & 31) && frame < n_rows) likelihoods[frame / kTileFrames] += total;
    if (!frame) {
        const bool spilled = !list.fits();
        list.refined->pairs += *list.used;
        list.refined->spilled_chunks += spilled;
        *list.spilled = spilled;
        *list.used = 0;
    }
}

}  // namespace gmm_jepa::cuda
