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

// `rows` and as many rows further, in one instruction.
__device__ __forceinline__ const char* row_at(const char* rows, uint32_t row, uint32_t row_bytes) {
    const char* address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(row_bytes), "l"(rows));
    return address;
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

// ---- products of a warpgroup (PTX ISA, "Asynchronous warpgroup level matrix instructions") ----

// What this thread wrote to shared memory, or had copied there, is visible to the products of the
// threads that meet it at a barrier.
__device__ __forceinline__ void show_to_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The compiler moves no use of these registers across this.
__device__ __forceinline__ void hold(float (&sums)[8][4]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}

// The sums were written before the products that follow add to them.
__device__ __forceinline__ void begin_products(float (&sums)[8][4]) {
    hold(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The products that were begun are in the sums.
__device__ __forceinline__ void wait_products(float (&sums)[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(sums);
}

// Describes rows of 16 values in shared memory to the products, without swizzle: 8 rows of 16 bytes
// are a matrix of 128 bytes; `down` bytes further are the next 8 rows, `along` the next 8 values of
// the same rows. The address is in the lower of two words, so that what is added needs no carry.
struct Description {
    __device__ __forceinline__ Description(const void* matrix, uint32_t down, uint32_t along)
        : low((static_cast<uint32_t>(__cvta_generic_to_shared(matrix)) >> 4 & 0x3fff) |
              (along >> 4) << 16),
          high(down >> 4) {}

    // Of what lies so many times 16 bytes further.
    __device__ __forceinline__ uint64_t at(uint32_t sixteens) const {
        return uint64_t(high) << 32 | (low + sixteens);
    }

    uint32_t low, high;
};

// sums (64 frames x 64 components, 16 frames a warp) += a (64 x 16) b (64 x 16)^T.
__device__ __forceinline__ void multiply_tile(float (&d)[8][4], const uint32_t (&a)[4],
                                              uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n}"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),
          "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),
          "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),
          "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
          "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
          "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
          "+f"(d[7][2]), "+f"(d[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
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
