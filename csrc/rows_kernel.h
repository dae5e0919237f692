// What a residual unit does to rows between its products, and an optimiser to all tensors; included
// by kernels_impl.h after density_kernel.h.

constexpr float kLeakySlope = 0.1f;

inline Floats leaky(Floats v) { return larger(v, kLeakySlope * v); }

// Calls at(i) for whole vectors of n values, and part(i, rest) for what is left.
template <typename At, typename Part>
void over_vectors(ptrdiff_t n, const At& at, const Part& part) {
    ptrdiff_t i = 0;
    for (; i + kLanes <= n; i += kLanes) at(i);
    if (i < n) part(i, n - i);
}

void activate_rows(const float* x, ptrdiff_t n, float* out) {
    over_vectors(
        n, [&](ptrdiff_t i) { store_floats(out + i, leaky(load_floats(x + i))); },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) out[i] = x[i] > 0.0f ? x[i] : kLeakySlope * x[i];
        });
}

void add_rows(const float* x, const float* y, ptrdiff_t n, float* out) {
    over_vectors(
        n, [&](ptrdiff_t i) { store_floats(out + i, load_floats(x + i) + load_floats(y + i)); },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) out[i] = x[i] + y[i];
        });
}

void leaky_gradient_rows(const float* at, const float* grad, const float* added, ptrdiff_t n,
                         float* out) {
    over_vectors(
        n,
        [&](ptrdiff_t i) {
            const Floats g = load_floats(grad + i);
            const Floats through = load_floats(at + i) > 0.0f ? g : kLeakySlope * g;
            store_floats(out + i, added ? load_floats(added + i) + through : through);
        },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) {
                out[i] = (added ? added[i] : 0.0f) + (at[i] > 0.0f ? grad[i] : kLeakySlope * grad[i]);
            }
        });
}

void sum_rows(const float* rows, ptrdiff_t n_rows, int n, float* sums) {
    over_vectors(
        n,
        [&](ptrdiff_t i) {
            Floats sum = load_floats(sums + i);
            for (ptrdiff_t row = 0; row < n_rows; ++row) sum += load_floats(rows + row * n + i);
            store_floats(sums + i, sum);
        },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) {
                for (ptrdiff_t row = 0; row < n_rows; ++row) sums[i] += rows[row * n + i];
            }
        });
}

// In float64 a vector of float32 at a time: squares of large gradients leave float32's range.
double sum_of_squares(const float* x, ptrdiff_t n) {
    Doubles sums[2] = {};
    double rest = 0.0;
    over_vectors(
        n,
        [&](ptrdiff_t i) {
            for (int half = 0; half < 2; ++half) {
                const Doubles v = load(x + i + half * kWide);
                sums[half] += v * v;
            }
        },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) rest += double(x[i]) * x[i];
        });
    return sum_of(sums[0] + sums[1]) + rest;
}

// From the nearer end, so that a weight of one is a copy.
void move_towards(float* to, const float* from, float weight, ptrdiff_t n) {
    const bool far = weight >= 0.5f;
    const auto moved = [=](auto a, auto b) {
        return far ? b - (1.0f - weight) * (b - a) : a + weight * (b - a);
    };
    over_vectors(
        n,
        [&](ptrdiff_t i) {
            store_floats(to + i, moved(load_floats(to + i), load_floats(from + i)));
        },
        [&](ptrdiff_t i, ptrdiff_t) {
            for (; i < n; ++i) to[i] = moved(to[i], from[i]);
        });
}

#if defined(__AVX512BF16__) && GMM_JEPA_BYTES == 64
void round_rows(const float* x, ptrdiff_t n, bool activate, uint32_t* out) {
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const Floats v = load_floats(x + i);
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(activate ? leaky(v) : v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), (__m256i)rounded);
    }
}

void pair_rows(const uint32_t* first, const uint32_t* second, ptrdiff_t n, uint32_t* out) {
    const auto words = [](const uint32_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const __m512i low = words(first + i / 2);
        const __m512i high = second ? words(second + i / 2) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
constexpr auto kRoundRows = round_rows;
constexpr auto kPairRows = pair_rows;
#else
constexpr void (*kRoundRows)(const float*, ptrdiff_t, bool, uint32_t*) = nullptr;
constexpr void (*kPairRows)(const uint32_t*, const uint32_t*, ptrdiff_t, uint32_t*) = nullptr;
#endif
