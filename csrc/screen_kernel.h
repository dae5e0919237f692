// The screen: scores of all components in low precision; included by kernels_impl.h.

constexpr int kTile = GMM_JEPA_TILE;
constexpr int kVectors = GMM_JEPA_VECTORS;
constexpr int kPanel = kLanes * kVectors;
// Beyond this, z^2 times a precision may leave float32's range; such a frame is computed directly.
constexpr float kLargest = 1e12f;

typedef int32_t Ints __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));

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

// Each kind of operands: words of a feature, whether a float can be used, how words are made, how
// products are added up, and what the sum is in nats.
struct FloatSums {
    typedef Floats Sum;
    static bool is_usable(float z) { return __builtin_fabsf(z) <= kLargest; }
    static Floats nats(Sum sum, const float*) { return sum; }
};

struct Float32 : FloatSums {
    static constexpr gmm_jepa::Operands kOperands = gmm_jepa::Operands::kFloat32;
    static constexpr int kWords = 2;
    static void pack(float z, uint32_t* words) {
        words[0] = as_bits(z);
        words[1] = as_bits(z * z);
    }
    static Sum add(Sum sum, uint32_t feature, const uint32_t* weights) {
        return sum + as_float(feature) * *reinterpret_cast<const Floats*>(weights);
    }
};

#if defined(__AVX512BF16__) && GMM_JEPA_BYTES == 64
struct Bfloat16 : FloatSums {
    static constexpr gmm_jepa::Operands kOperands = gmm_jepa::Operands::kBfloat16;
    static constexpr int kWords = 1;
    static void pack(float z, uint32_t* words) {
        const uint32_t rounded = bfloat16_bits(z);
        const float z_hat = as_float(rounded << 16);
        *words = rounded | (bfloat16_bits(z_hat * z_hat) << 16);
    }
    static Sum add(Sum sum, uint32_t feature, const uint32_t* weights) {
        const __m512i w = _mm512_loadu_si512(weights);
        const __m512i f = _mm512_set1_epi32(static_cast<int>(feature));
        // GCC 12 moves the sums of the intrinsic to memory and back.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(f), "v"(w));
        return sum;
    }
};
#endif

#if (defined(__AVX512VNNI__) && GMM_JEPA_BYTES == 64) || (defined(__AVX2__) && GMM_JEPA_BYTES == 32)
struct Int16 {
    static constexpr gmm_jepa::Operands kOperands = gmm_jepa::Operands::kInt16;
    static constexpr int kWords = 1;
    typedef Ints Sum;
    static bool is_usable(float z) { return __builtin_fabsf(z) <= __FLT_MAX__; }
    static void pack(float z, uint32_t* words) {
        constexpr float kLimit = gmm_jepa::kRange;
        const float held = z < -kLimit ? -kLimit : z <= kLimit ? z : kLimit;
        const int32_t rounded = static_cast<int32_t>(held + __builtin_copysignf(0.5f, held));
        const int32_t square =
            ((rounded * rounded) >> gmm_jepa::kSquareBits) - gmm_jepa::kSquareOffset;
        *words = (static_cast<uint32_t>(rounded) & 0xffffu) | (static_cast<uint32_t>(square) << 16);
    }
    static Sum add(Sum sum, uint32_t feature, const uint32_t* weights) {
#if GMM_JEPA_BYTES == 64
        const __m512i w = _mm512_loadu_si512(weights);
        const __m512i f = _mm512_set1_epi32(static_cast<int>(feature));
        return (Sum)_mm512_dpwssd_epi32((__m512i)sum, f, w);
#else
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
        const __m256i f = _mm256_set1_epi32(static_cast<int>(feature));
        return sum + (Sum)_mm256_madd_epi16(f, w);
#endif
    }
    static Floats nats(Sum sum, const float* steps) {
        return __builtin_convertvector(sum, Floats) * *reinterpret_cast<const Floats*>(steps);
    }
};
#endif

template <typename Kind, typename T>
bool pack(const T* x, const float* centre, const float* inverse_scale, int n_dims,
          uint32_t* words) {
    int unusable = 0;
    for (int d = 0; d < n_dims; ++d) {
        const float z = static_cast<float>((x[d] - centre[d]) * inverse_scale[d]);
        unusable |= !Kind::is_usable(z);
        Kind::pack(z, words + d * Kind::kWords);
    }
    return !unusable;
}

// One register tile: kTile frames by one panel of components.
template <typename Kind>
void screen_tile(const gmm_jepa::ScreenProducts& p, int frame, int panel, Floats* best) {
    typedef typename Kind::Sum Sum;
    const uint32_t* features = p.features + ptrdiff_t(frame) * p.n_words;
    const uint32_t* weights = p.weights + ptrdiff_t(panel) * p.n_words * kPanel;
    const ptrdiff_t stride = ptrdiff_t(p.n_panels) * kPanel;
    float* scores = p.scores + frame * stride + panel * kPanel;
    for (int start = 0; start < p.n_words; start += p.depth) {
        const int stop = start + p.depth < p.n_words ? start + p.depth : p.n_words;
        Sum sum[kTile][kVectors] = {};
        for (int w = start; w < stop; ++w) {
#pragma GCC unroll 8
            for (int f = 0; f < kTile; ++f) {
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    sum[f][v] = Kind::add(sum[f][v], features[f * ptrdiff_t(p.n_words) + w],
                                          weights + ptrdiff_t(w) * kPanel + v * kLanes);
                }
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const int k = v * kLanes;
#pragma GCC unroll 8
            for (int f = 0; f < kTile; ++f) {
                const float* before = start ? scores + f * stride : p.bias + panel * kPanel;
                const Floats score = *reinterpret_cast<const Floats*>(before + k) +
                                     Kind::nats(sum[f][v], p.steps + panel * kPanel + k);
                *reinterpret_cast<Floats*>(scores + f * stride + k) = score;
                if (stop == p.n_words) best[f] = larger(score, best[f]);
            }
        }
    }
}

template <typename Kind>
void screen(const gmm_jepa::ScreenProducts& p) {
    constexpr int kMost = 48;  // frames whose running maxima are kept beside the tile
    for (int start = 0; start < p.n_frames; start += kMost) {
        const int stop = start + kMost < p.n_frames ? start + kMost : p.n_frames;
        Floats most[kMost];
        for (int f = 0; f < kMost; ++f) most[f] = Floats{} - __builtin_inff();
        for (int panel = 0; panel < p.n_panels; ++panel) {
            for (int f = start; f < stop; f += kTile) {
                screen_tile<Kind>(p, f, panel, most + (f - start));
            }
        }
        for (int f = start; f < stop; ++f) {
            float value = most[f - start][0];
            for (int i = 1; i < kLanes; ++i) {
                value = most[f - start][i] > value ? most[f - start][i] : value;
            }
            p.best[f] = value;
        }
    }
}

template <typename Kind>
constexpr gmm_jepa::Screen kScreen = {
    Kind::kOperands, kPanel, kTile, 24, 1, pack<Kind, float>, pack<Kind, double>, screen<Kind>};
