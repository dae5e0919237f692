// Matrix products of a convolution over frames; included by kernels_impl.h after screen_kernel.h.

constexpr int kProductLanes = kLanes * GMM_JEPA_PRODUCT_VECTORS;  // columns of a panel

// A word of a row times a vector of words of a panel, added to sums.
inline Floats plus_product(Floats sum, float value, Floats w) { return sum + value * w; }

template <typename Word>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef Floats Type;
};

#if defined(__AVX512BF16__) && GMM_JEPA_BYTES == 64
template <>
struct VectorOf<uint32_t> {
    typedef Ints Type;
};
// By name: of the intrinsic's sums GCC 12 keeps every second one in memory.
inline Floats plus_product(Floats sum, uint32_t value, Ints w) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(value));
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(w));
    return sum;
}
#endif

// kRows rows by one panel of kV vectors, sums in registers over all taps.
template <int kRows, int kV, typename Word>
void product_tile(const gmm_jepa::ProductsOf<Word>& p, const Word* a, const Word* b,
                  const float* bias, float* c) {
    typedef typename VectorOf<Word>::Type Words;
    Floats sum[kRows][kV];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
            const float* from = p.accumulate ? c + r * p.stride_c : bias;
            sum[r][v] = *reinterpret_cast<const Floats*>(from + v * kLanes);
        }
    }
    for (int tap = 0; tap < p.n_taps; ++tap, a += p.stride_tap) {
        const Word* x = a;
        for (int k = 0; k < p.n_k; ++k, x += p.stride_k, b += kV * kLanes) {
            Words w[kV];
#pragma GCC unroll 8
            for (int v = 0; v < kV; ++v) w[v] = *reinterpret_cast<const Words*>(b + v * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Word value = x[r * p.stride_a];
#pragma GCC unroll 8
                for (int v = 0; v < kV; ++v) sum[r][v] = plus_product(sum[r][v], value, w[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
            *reinterpret_cast<Floats*>(c + r * p.stride_c + v * kLanes) = sum[r][v];
        }
    }
}

// All rows by panels of kV vectors; the last tile has a third of the rows where they are enough.
template <int kRows, int kV, typename Word>
void panel_products(const gmm_jepa::ProductsOf<Word>& p) {
    constexpr int kColumns = kV * kLanes, kFew = kRows / 3;
    const ptrdiff_t panel_size = ptrdiff_t(p.n_taps) * p.n_k * kColumns;
    for (int panel = 0; panel < p.n_panels; ++panel) {
        const Word* b = p.b + panel * panel_size;
        const float* bias = p.bias + panel * kColumns;
        float* c = p.c + panel * kColumns;
        int row = 0;
        for (; row + 2 * kFew < p.n_rows; row += kRows) {
            product_tile<kRows, kV>(p, p.a + row * p.stride_a, b, bias, c + row * p.stride_c);
        }
        for (; row < p.n_rows; row += kFew) {
            product_tile<kFew, kV>(p, p.a + row * p.stride_a, b, bias, c + row * p.stride_c);
        }
    }
}

template <typename Word>
void products(const gmm_jepa::ProductsOf<Word>& p) {
    constexpr int kRows = GMM_JEPA_PRODUCT_ROWS;
    static_assert(GMM_JEPA_PRODUCT_VECTORS == 2, "half a panel is one vector");
    p.half_panels ? panel_products<4 * kRows / 3, 1>(p) : panel_products<kRows, 2>(p);
}

#if defined(__AVX512BF16__) && GMM_JEPA_BYTES == 64
constexpr auto kPairProducts = products<uint32_t>;
#else
constexpr void (*kPairProducts)(const gmm_jepa::PairProducts&) = nullptr;
#endif
