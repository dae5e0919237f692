// Bodies of the functions in kernels.h, in vector extensions of GCC and Clang.
//
// Included once by each isa_*.cpp, which defines
//   GMM_JEPA_BYTES   bytes of a vector register
//   GMM_JEPA_TILE    frames of a register tile
//   GMM_JEPA_VECTORS vectors of components of a register tile
//   GMM_JEPA_BF16    1 for bfloat16 operands
//   GMM_JEPA_PRODUCT_ROWS, GMM_JEPA_PRODUCT_VECTORS   the same of a convolution's products
//   GMM_JEPA_NAME    what the set is called
// Accumulators (TILE x VECTORS) and VECTORS weights must fit the registers.

#include "kernels.h"

namespace {

constexpr int kLanes = GMM_JEPA_BYTES / 4;
constexpr int kWide = GMM_JEPA_BYTES / 8;
constexpr int kTile = GMM_JEPA_TILE;
constexpr int kVectors = GMM_JEPA_VECTORS;
constexpr int kPanel = kLanes * kVectors;
// Beyond this, z^2 times a precision may leave float32's range; such a frame is computed directly.
constexpr float kLargest = 1e12f;

typedef float Floats __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(GMM_JEPA_BYTES), aligned(8), may_alias));
typedef float HalfFloats __attribute__((vector_size(GMM_JEPA_BYTES / 2), aligned(4), may_alias));

inline float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// Round to nearest even; the value is finite.
inline uint32_t bfloat16_bits(float value) {
    const uint32_t bits = as_bits(value);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <typename T>
bool pack(const T* x, const float* centre, const float* inverse_scale, int n_dims,
          uint32_t* words) {
    int too_large = 0;
    for (int d = 0; d < n_dims; ++d) {
        const float z = static_cast<float>((x[d] - centre[d]) * inverse_scale[d]);
        too_large |= !(__builtin_fabsf(z) <= kLargest);
#if GMM_JEPA_BF16
        const uint32_t rounded = bfloat16_bits(z);
        const float z_hat = as_float(rounded << 16);
        words[d] = rounded | (bfloat16_bits(z_hat * z_hat) << 16);
#else
        words[2 * d] = as_bits(z);
        words[2 * d + 1] = as_bits(z * z);
#endif
    }
    return !too_large;
}

inline Floats product_sum(Floats sum, uint32_t feature, const uint32_t* weights) {
#if GMM_JEPA_BF16
    const __m512i w = _mm512_loadu_si512(weights);
    const __m512i f = _mm512_set1_epi32(static_cast<int>(feature));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)f, (__m512bh)w);
#else
    const Floats w = *reinterpret_cast<const Floats*>(weights);
    return sum + as_float(feature) * w;
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// One register tile: kTile frames by one panel of components.
void screen_tile(const uint32_t* features, int n_words, const uint32_t* weights, const float* bias,
                 float* scores, ptrdiff_t stride_frame, Floats* best) {
    Floats sum[kTile][kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const Floats b = *reinterpret_cast<const Floats*>(bias + v * kLanes);
        for (int f = 0; f < kTile; ++f) sum[f][v] = b;
    }
    for (int w = 0; w < n_words; ++w) {
#pragma GCC unroll 8
        for (int f = 0; f < kTile; ++f) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                sum[f][v] = product_sum(sum[f][v], features[f * ptrdiff_t(n_words) + w],
                                        weights + ptrdiff_t(w) * kPanel + v * kLanes);
            }
        }
    }
#pragma GCC unroll 8
    for (int f = 0; f < kTile; ++f) {
        Floats most = best[f];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            *reinterpret_cast<Floats*>(scores + f * stride_frame + v * kLanes) = sum[f][v];
            most = larger(sum[f][v], most);
        }
        best[f] = most;
    }
}

void screen(const uint32_t* features, int n_frames, int n_words, const uint32_t* weights,
            const float* bias, int n_panels, float* scores, float* best) {
    constexpr int kMost = 48;  // frames whose running maxima are kept beside the tile
    const ptrdiff_t stride_frame = ptrdiff_t(n_panels) * kPanel;
    for (int start = 0; start < n_frames; start += kMost) {
        const int stop = start + kMost < n_frames ? start + kMost : n_frames;
        Floats most[kMost];
        for (int f = 0; f < kMost; ++f) most[f] = Floats{} - __builtin_inff();
        for (int p = 0; p < n_panels; ++p) {
            for (int f = start; f < stop; f += kTile) {
                screen_tile(features + ptrdiff_t(f) * n_words, n_words,
                            weights + ptrdiff_t(p) * n_words * kPanel, bias + p * kPanel,
                            scores + f * stride_frame + p * kPanel, stride_frame,
                            most + (f - start));
            }
        }
        for (int f = start; f < stop; ++f) {
            float value = most[f - start][0];
            for (int i = 1; i < kLanes; ++i) {
                value = most[f - start][i] > value ? most[f - start][i] : value;
            }
            best[f] = value;
        }
    }
}

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
    for (int i = 0; i < n; i += kLanes) {
        for (uint32_t mask = mask_at_least(scores + i, threshold); mask; mask &= mask - 1) {
            indices[count++] = i + __builtin_ctz(mask);
        }
    }
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
        if (i + 2 < n) {  // rows of the candidate after next: they lie in the last-level cache
            const ptrdiff_t ahead = ptrdiff_t(indices[i + 2]) * n_dims_padded;
            for (int d = 0; d < n_dims_padded; d += 8) {
                __builtin_prefetch(means + ahead + d);
                __builtin_prefetch(precisions + ahead + d);
            }
        }
        Doubles even{}, odd{};
        for (int d = 0; d < n_dims_padded; d += 2 * kWide) {
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

#include "log_mel_kernel.h"
#include "products_kernel.h"
#include "density_kernel.h"
#include "dropout_kernel.h"
#include "attention_kernel.h"
#include "loss_kernel.h"

const gmm_jepa::Kernels kTable = {
    GMM_JEPA_NAME,  GMM_JEPA_BF16 != 0, kPanel, kTile,    kLanes,    pack<float>,
    pack<double>,   screen,             find,   at_least, distances, moments<float>,
    moments<double>, log_mel,           GMM_JEPA_PRODUCT_ROWS, kProductLanes, products,
    density_forward, density_backward,  softmax_row, softmax_row_backward,
    dropout,        kl_row,             cross_entropy_row, squared_error_row,
};

}  // namespace
