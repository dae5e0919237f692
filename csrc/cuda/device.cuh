// Instructions of the GPU that C++ has no words for, and sums over lanes.
#pragma once

#include <cstdint>

namespace gmm_jepa::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// 16 bytes from global to shared memory without a stop in registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copy_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Parameters on their way through the first-level cache: there for the next pair of the component,
// and the first to make room, so that the frames stay.
__device__ __forceinline__ double2 load_passing(const double2* global) {
    double2 value;
    asm("ld.global.nc.L1::evict_first.v2.f64 {%0, %1}, [%2];"
        : "=d"(value.x), "=d"(value.y)
        : "l"(global));
    return value;
}

// Four 8 x 8 tiles of 16-bit values; lanes 8 i to 8 i + 7 give the rows of tile i.
__device__ __forceinline__ void load_tiles(uint32_t (&tiles)[4], const void* row) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(from)
                 : "memory");
}

// d (16 frames x 8 components) = c + a (16 x 16) b (16 x 8), bfloat16 with float32 sums.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
}

// Sum over aligned groups of kWidth lanes, in all of them; the same bits every time.
template <int kWidth>
__device__ __forceinline__ double lane_sum(double value) {
#pragma unroll
    for (int offset = kWidth / 2; offset; offset /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
}

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

}  // namespace gmm_jepa::cuda
