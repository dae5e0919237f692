// Bodies of the functions in kernels.h, in vector extensions of GCC and Clang.
//
// Included once by each isa_*.cpp, which defines
//   GMM_JEPA_BYTES   bytes of a vector register
//   GMM_JEPA_TILE    frames of a register tile of the screen
//   GMM_JEPA_VECTORS vectors of components of a register tile
//   GMM_JEPA_NARROW  Float32, or the faster 16-bit operands of a screen: Bfloat16, Int16
//   GMM_JEPA_TILES   where AMX is to multiply pairs of bfloat16
//   GMM_JEPA_PRODUCT_ROWS, GMM_JEPA_PRODUCT_VECTORS   the same of a convolution's products
//   GMM_JEPA_NAME    what the set is called
// Accumulators (TILE x VECTORS) and VECTORS weights must fit the registers.

#include "kernels.h"

namespace {

constexpr int kLanes = GMM_JEPA_BYTES / 4;
constexpr int kWide = GMM_JEPA_BYTES / 8;
typedef float Floats __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(GMM_JEPA_BYTES), aligned(8), may_alias));
typedef float HalfFloats __attribute__((vector_size(GMM_JEPA_BYTES / 2), aligned(4), may_alias));

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Bit i says whether scores[i] >= threshold, over one panel's vector.
inline uint32_t mask_at_least(const float* scores, float threshold) {
#if GMM_JEPA_BYTES == 64
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(threshold), _CMP_GE_OQ);
#elif GMM_JEPA_BYTES == 32
    return _mm256_movemask_ps(
        _mm256_cmp_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(threshold), _CMP_GE_OQ));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= uint32_t(scores[i] >= threshold) << i;
    return mask;
#endif
}

int find(const float* scores, int n, float value) {
    for (int i = 0; i < n; i += kLanes) {
        const uint32_t mask = mask_at_least(scores + i, value);
        if (mask) return i + __builtin_ctz(mask);
    }
    return -1;
}

int at_least(const float* scores, int n, float threshold, int32_t* indices) {
    int count = 0;
#if GMM_JEPA_BYTES == 64
    // Every vector stores 16 indices and keeps those that count: which do cannot be predicted.
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int i = 0; i < n; i += kLanes, index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes))) {
        const __mmask16 mask = static_cast<__mmask16>(mask_at_least(scores + i, threshold));
        _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(mask, index));
        count += __builtin_popcount(mask);
    }
#else
    for (int i = 0; i < n; i += kLanes) {
        for (uint32_t mask = mask_at_least(scores + i, threshold); mask; mask &= mask - 1) {
            indices[count++] = i + __builtin_ctz(mask);
        }
    }
#endif
    return count;
}

inline double sum_of(Doubles v) {
    double sum[kWide];
    __builtin_memcpy(sum, &v, sizeof v);
    for (int width = kWide / 2; width; width /= 2) {
        for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
    }
    return sum[0];
}

inline Doubles load(const double* p) { return *reinterpret_cast<const Doubles*>(p); }
inline Doubles load(const float* p) {
    return __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(p), Doubles);
}

void distances(const double* x, const double* means, const double* precisions, int n_dims_padded,
               const int32_t* indices, int n, double* distances) {
    for (int i = 0; i < n; ++i) {
        const double* mean = means + ptrdiff_t(indices[i]) * n_dims_padded;
        const double* precision = precisions + ptrdiff_t(indices[i]) * n_dims_padded;
        // Rows of the candidate after next: they lie in the last-level cache.
        const ptrdiff_t ahead = ptrdiff_t(indices[i + 2 < n ? i + 2 : i]) * n_dims_padded;
        Doubles even{}, odd{};
        for (int d = 0; d < n_dims_padded; d += 2 * kWide) {
            for (int line = d; line < d + 2 * kWide; line += 8) {
                __builtin_prefetch(means + ahead + line);
                __builtin_prefetch(precisions + ahead + line);
            }
            const Doubles a = load(x + d) - load(mean + d);
            const Doubles b = load(x + d + kWide) - load(mean + d + kWide);
            even += a * a * load(precision + d);
            odd += b * b * load(precision + d + kWide);
        }
        distances[i] = sum_of(even + odd);
    }
}

// kWidth vectors of dimensions over all rows, sums in registers.
template <typename T, int kWidth>
void moments_slice(const T* frames, const double* centre, int stride, const uint32_t* rows,
                   const double* r, int n, double* first, double* second) {
    Doubles s1[kWidth] = {}, s2[kWidth] = {}, c[kWidth];
    for (int v = 0; v < kWidth; ++v) c[v] = load(centre + v * kWide);
    for (int i = 0; i < n; ++i) {
        const T* x = frames + ptrdiff_t(rows[i]) * stride;
#pragma GCC unroll 8
        for (int v = 0; v < kWidth; ++v) {
            const Doubles z = load(x + v * kWide) - c[v];
            const Doubles rz = z * r[i];
            s1[v] += rz;
            s2[v] += rz * z;
        }
    }
    for (int v = 0; v < kWidth; ++v) {
        *reinterpret_cast<Doubles*>(first + v * kWide) += s1[v];
        *reinterpret_cast<Doubles*>(second + v * kWide) += s2[v];
    }
}

template <typename T>
double moments(const T* frames, const double* centre, int n_dims_padded, const uint32_t* rows,
               const double* r, int n, double* first, double* second) {
    constexpr int kWidth = GMM_JEPA_BYTES == 16 ? 2 : 5;
    int d = 0;
    for (; d + kWidth * kWide <= n_dims_padded; d += kWidth * kWide) {
        moments_slice<T, kWidth>(frames + d, centre + d, n_dims_padded, rows, r, n, first + d,
                                 second + d);
    }
    for (; d < n_dims_padded; d += kWide) {
        moments_slice<T, 1>(frames + d, centre + d, n_dims_padded, rows, r, n, first + d,
                            second + d);
    }
    double count = 0.0;
    for (int i = 0; i < n; ++i) count += r[i];
    return count;
}

#include "fingerprint_kernel.h"
#include "screen_kernel.h"
#include "log_mel_kernel.h"
#include "products_kernel.h"
#include "turn_kernel.h"
#if defined(GMM_JEPA_TILES)
#include "tiles_kernel.h"
constexpr gmm_jepa::Screen kNarrow = kTileScreen;
constexpr auto kNarrowProducts = pair_products_by_tiles;
#else
constexpr gmm_jepa::Screen kNarrow = kScreen<GMM_JEPA_NARROW>;
constexpr auto kNarrowProducts = kPairProducts;
#endif
#include "density_kernel.h"
#include "depthwise_kernel.h"
#include "rows_kernel.h"
#include "snake_kernel.h"
#include "dropout_kernel.h"
#include "attention_kernel.h"
#include "loss_kernel.h"
#include "block_kernel.h"

const gmm_jepa::Kernels kTable = {
    GMM_JEPA_NAME,
    kLanes,
    kNarrow,
    kScreen<Float32>,
    find,
    at_least,
    distances,
    moments<float>,
    moments<double>,
    fingerprint,
    log_mel,
    GMM_JEPA_PRODUCT_ROWS,
    kProductLanes,
    products<float>,
    kNarrowProducts,
    activate_rows,
    add_rows,
    leaky_gradient_rows,
    sum_rows,
    sum_of_squares,
    move_towards,
    kRoundRows,
    kPairRows,
    snake<float>,
    snake<uint16_t>,
    snake_backward<float>,
    snake_backward<uint16_t>,
    density_forward,
    density_backward,
    depthwise,
    depthwise_weights,
    sum_columns,
    softmax_row,
    softmax_row_backward,
    dropout,
    kl_row,
    cross_entropy_row,
    squared_error_row,
    turn_words,
    gelu_rows<float>,
    gelu_rows<uint32_t>,
    gelu_backward_rows<float>,
    gelu_backward_rows<uint32_t>,
    add_scaled_rows,
    glu_rows<float>,
    glu_rows<uint32_t>,
    glu_again<float>,
    glu_again<uint32_t>,
    glu_backward<float>,
    glu_backward<uint32_t>,
    sum_of_values,
    squares_about,
    norm_rows<false>,
    norm_rows<true>,
    norm_backward<false>,
    norm_backward<true>,
    norm_gradient,
    frame_norm_rows,
    frame_norm_backward_rows,
    gate_row,
    gate_row_backward,
};

}  // namespace
