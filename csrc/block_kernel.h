// What lies between the linear maps of a conformer block; included by kernels_impl.h after
// density_kernel.h and snake_kernel.h. Runs fill whole vectors.

inline Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// The normal distribution's (1 + erf(x / sqrt 2)) / 2, and exp(-x^2 / 2). Abramowitz and Stegun
// 7.1.26: within 1.5e-7, and the exponential is the one that the density needs.
inline Floats normal_share(Floats x, Floats* bell) {
    const Floats z = magnitude(x) * 0.70710678f;
    const Floats t = 1.0f / (1.0f + 0.3275911f * z);
    Floats p = Floats{} + 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    *bell = exponential(-z * z);
    const Floats beyond = 0.5f * p * t * *bell;
    return x < 0.0f ? beyond : 1.0f - beyond;
}

// Whole vectors of values to where they are multiplied next: float32, or two to a word.
inline void put_floats(float* to, ptrdiff_t i, Floats v) { store_floats(to + i, v); }
inline void put_floats(uint32_t* to, ptrdiff_t i, Floats v) {
#if defined(__AVX512BF16__) && GMM_JEPA_BYTES == 64
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)rounded);
#else
    store_narrow(reinterpret_cast<uint16_t*>(to) + i, v);
#endif
}
inline Floats get_floats(const float* from, ptrdiff_t i) { return load_floats(from + i); }
inline Floats get_floats(const uint32_t* from, ptrdiff_t i) {
    return load_wide(reinterpret_cast<const uint16_t*>(from) + i);
}

template <typename Word>
void gelu_rows(const float* x, ptrdiff_t n, Word* kept, Word* out) {
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const Floats v = load_floats(x + i);
        if (kept) put_floats(kept, i, v);
        Floats bell;
        put_floats(out, i, v * normal_share(v, &bell));
    }
}

template <typename Word>
void gelu_backward_rows(const Word* x, ptrdiff_t n, float* grad, Word* value, Word* rounded) {
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const Floats v = get_floats(x, i);
        Floats bell;
        const Floats share = normal_share(v, &bell);
        const Floats g = load_floats(grad + i) * (share + v * (0.39894228f * bell));
        put_floats(value, i, v * share);
        store_floats(grad + i, g);
        put_floats(rounded, i, g);
    }
}

void add_scaled_rows(const float* x, const float* y, float scale, ptrdiff_t n, float* out) {
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const Floats scaled = scale * load_floats(y + i);
        store_floats(out + i, x ? load_floats(x + i) + scaled : scaled);
    }
}

inline float dot(const float* a, const float* b, int n) {
    Floats sum{};
    for (int i = 0; i < n; i += kLanes) sum += load_floats(a + i) * load_floats(b + i);
    return total_of_lanes(sum);
}

// 1 / (1 + exp(-x)); the exponential takes what is not positive.
inline Floats sigmoid(Floats x) {
    const Floats small = exponential(-magnitude(x));
    return (x < 0.0f ? small : Floats{} + 1.0f) / (1.0f + small);
}

// u and r of one head.
inline void gate_parts(const gmm_jepa::GateRow& row, int head, float* u, float* r) {
    const ptrdiff_t at = ptrdiff_t(head) * row.n_dims;
    Floats both{};
    both[0] = dot(row.queries + at, row.u + at, row.n_dims);
    both[1] = dot(row.queries + at, row.r + at, row.n_dims);
    both = sigmoid(both);
    *u = both[0];
    *r = both[1];
}

void gate_row(const gmm_jepa::GateRow& row, float* gates) {
    for (int h = 0; h < row.n_heads; ++h) {
        float u, r;
        gate_parts(row, h, &u, &r);
        gates[h] = 1.0f + u + (1.0f - u) * r * row.scale[h];
    }
}

void gate_row_backward(const gmm_jepa::GateRow& row, const float* grad, float* grad_queries,
                       float* grad_u, float* grad_r, float* grad_scale) {
    for (int h = 0; h < row.n_heads; ++h) {
        const ptrdiff_t at = ptrdiff_t(h) * row.n_dims;
        float u, r;
        gate_parts(row, h, &u, &r);
        const float of_u = grad[h] * (1.0f - r * row.scale[h]) * u * (1.0f - u);
        const float of_r = grad[h] * (1.0f - u) * row.scale[h] * r * (1.0f - r);
        grad_scale[h] += grad[h] * (1.0f - u) * r;
        for (ptrdiff_t i = at; i < at + row.n_dims; i += kLanes) {
            const Floats q = load_floats(row.queries + i);
            store_floats(grad_queries + i, load_floats(grad_queries + i) +
                                               of_u * load_floats(row.u + i) +
                                               of_r * load_floats(row.r + i));
            store_floats(grad_u + i, load_floats(grad_u + i) + of_u * q);
            store_floats(grad_r + i, load_floats(grad_r + i) + of_r * q);
        }
    }
}
