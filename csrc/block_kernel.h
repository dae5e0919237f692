// What lies between the linear maps of a conformer block; included by kernels_impl.h after
// dropout_kernel.h. Runs fill whole vectors.

// 1 / v within 2 ulp, of v from 1 to 1e30.
inline Floats inverse(Floats v) {
#if GMM_JEPA_BYTES == 64
    const Floats near = (Floats)_mm512_rcp14_ps((__m512)v);
    return near * (2.0f - v * near);  // dividing takes four times as long
#else
    return 1.0f / v;
#endif
}

inline Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// The normal distribution's (1 + erf(x / sqrt 2)) / 2, and exp(-x^2 / 2). Abramowitz and Stegun
// 7.1.26: within 1.5e-7, and the exponential is the one that the density needs.
inline Floats normal_share(Floats x, Floats* bell) {
    const Floats z = magnitude(x) * 0.70710678f;
    const Floats t = inverse(1.0f + 0.3275911f * z);
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
void gelu_rows(const gmm_jepa::DroppedRows& rows, const float* x, Word* kept, Word* out) {
    for (int row = 0; row < rows.n_rows; ++row) {
        const KeepRow keep(rows.dropping, rows.first + row);
        for (int i = 0; i < rows.n; i += kLanes) {
            const ptrdiff_t at = ptrdiff_t(row) * rows.n + i;
            const Floats v = load_floats(x + at);
            if (kept) put_floats(kept, at, v);
            Floats bell;
            put_floats(out, at, keep.of(v * normal_share(v, &bell), i));
        }
    }
}

template <typename Word>
void gelu_backward_rows(const gmm_jepa::DroppedRows& rows, const Word* x, float* grad, Word* value,
                        Word* rounded) {
    for (int row = 0; row < rows.n_rows; ++row) {
        const KeepRow keep(rows.dropping, rows.first + row);
        for (int i = 0; i < rows.n; i += kLanes) {
            const ptrdiff_t at = ptrdiff_t(row) * rows.n + i;
            const Floats v = get_floats(x, at);
            Floats bell;
            const Floats share = normal_share(v, &bell), kept = keep.of(Floats{} + 1.0f, i);
            const Floats g = load_floats(grad + at) * kept * (share + v * (0.39894228f * bell));
            put_floats(value, at, v * share * kept);
            store_floats(grad + at, g);
            put_floats(rounded, at, g);
        }
    }
}

void add_scaled_rows(const gmm_jepa::DroppedRows& rows, const float* x, const float* y, float scale,
                     float* out) {
    for (int row = 0; row < rows.n_rows; ++row) {
        const KeepRow keep(rows.dropping, rows.first + row);
        for (int i = 0; i < rows.n; i += kLanes) {
            const ptrdiff_t at = ptrdiff_t(row) * rows.n + i;
            const Floats scaled = keep.of(scale * load_floats(y + at), i);
            store_floats(out + at, x ? load_floats(x + at) + scaled : scaled);
        }
    }
}

// 1 / (1 + exp(-x)); the exponential takes what is not positive.
inline Floats sigmoid(Floats x) {
    const Floats small = exponential(-magnitude(x));
    return (x < 0.0f ? small : Floats{} + 1.0f) * inverse(1.0f + small);
}

template <typename Word>
void glu_rows(const float* x, int n_rows, int n, Word* kept, float* out) {
    for (int row = 0; row < n_rows; ++row, x += 2 * n, out += n) {
        for (int i = 0; i < n; i += kLanes) {
            const Floats value = load_floats(x + i), gate = load_floats(x + n + i);
            put_floats(kept, ptrdiff_t(row) * 2 * n + i, value);
            put_floats(kept, ptrdiff_t(row) * 2 * n + n + i, gate);
            store_floats(out + i, value * sigmoid(gate));
        }
    }
}

template <typename Word>
void glu_again(const Word* kept, int n_rows, int n, float* out) {
    for (int row = 0; row < n_rows; ++row, out += n) {
        const ptrdiff_t at = ptrdiff_t(row) * 2 * n;
        for (int i = 0; i < n; i += kLanes) {
            store_floats(out + i, get_floats(kept, at + i) * sigmoid(get_floats(kept, at + n + i)));
        }
    }
}

template <typename Word>
void glu_backward(const Word* kept, const float* grad, int n_rows, int n, float* out) {
    for (int row = 0; row < n_rows; ++row, grad += n, out += 2 * n) {
        const ptrdiff_t at = ptrdiff_t(row) * 2 * n;
        for (int i = 0; i < n; i += kLanes) {
            const Floats open = sigmoid(get_floats(kept, at + n + i));
            const Floats g = load_floats(grad + i) * open;
            store_floats(out + i, g);
            store_floats(out + n + i, g * get_floats(kept, at + i) * (1.0f - open));
        }
    }
}

double sum_of_values(const float* x, ptrdiff_t n) {
    Doubles sums[2] = {};
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        sums[0] += load(x + i);
        sums[1] += load(x + i + kWide);
    }
    return sum_of(sums[0] + sums[1]);
}

double squares_about(const float* x, ptrdiff_t n, double centre) {
    Doubles sums[2] = {};
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        for (int half = 0; half < 2; ++half) {
            const Doubles v = load(x + i + half * kWide) - centre;
            sums[half] += v * v;
        }
    }
    return sum_of(sums[0] + sums[1]);
}

template <bool kSilu>
void norm_rows(const gmm_jepa::RowNorm& norm, const float* x, int n_rows, float* out) {
    for (int row = 0; row < n_rows; ++row, x += norm.n, out += norm.n) {
        for (int i = 0; i < norm.n; i += kLanes) {
            const Floats normal = (load_floats(x + i) - norm.mean) * norm.scale;
            const Floats v = normal * load_floats(norm.weight + i) + load_floats(norm.bias + i);
            store_floats(out + i, kSilu ? v * sigmoid(v) : v);
        }
    }
}

template <bool kSilu>
void norm_backward(const gmm_jepa::RowNorm& norm, const float* x, const float* grad, int n_rows,
                   const gmm_jepa::NormGradients& to) {
    for (int row = 0; row < n_rows; ++row) {
        const ptrdiff_t at = ptrdiff_t(row) * norm.n;
        for (int i = 0; i < norm.n; i += kLanes) {
            const Floats normal = (load_floats(x + at + i) - norm.mean) * norm.scale;
            const Floats weight = load_floats(norm.weight + i);
            const Floats v = normal * weight + load_floats(norm.bias + i);
            Floats g = load_floats(grad + at + i);
            Floats value = v;
            if (kSilu) {
                const Floats open = sigmoid(v);
                value = v * open;
                g *= open + value * (1.0f - open);
            }
            store_floats(to.value + at + i, value);
            store_floats(to.of_normal + at + i, g * weight);
            store_floats(to.weight + i, load_floats(to.weight + i) + g * normal);
            store_floats(to.bias + i, load_floats(to.bias + i) + g);
        }
    }
}

void norm_gradient(const gmm_jepa::RowNorm& norm, const float* x, const float* added, ptrdiff_t n,
                   float* grads) {
    if (!n) return;
    Doubles sums[2] = {}, products[2] = {};
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        for (int half = 0; half < 2; ++half) {
            const Doubles g = load(grads + i + half * kWide);
            sums[half] += g;
            products[half] += g * (load(x + i + half * kWide) - double(norm.mean));
        }
    }
    const float mean = float(sum_of(sums[0] + sums[1]) / n);
    const float along = float(sum_of(products[0] + products[1]) * norm.scale / n);
    for (ptrdiff_t i = 0; i < n; i += kLanes) {
        const Floats normal = (load_floats(x + i) - norm.mean) * norm.scale;
        const Floats g = norm.scale * (load_floats(grads + i) - mean - normal * along);
        store_floats(grads + i, added ? load_floats(added + i) + g : g);
    }
}

// Mean and inverse deviation of n values.
inline void frame_statistics(const float* x, int n, float epsilon, float* mean, float* scale) {
    Floats sum{}, squares{};
    for (int i = 0; i < n; i += kLanes) sum += load_floats(x + i);
    *mean = total_of_lanes(sum) / n;
    for (int i = 0; i < n; i += kLanes) {
        const Floats centred = load_floats(x + i) - *mean;
        squares += centred * centred;
    }
    *scale = 1.0f / __builtin_sqrtf(total_of_lanes(squares) / n + epsilon);
}

void frame_norm_rows(const gmm_jepa::FrameNorm& norm, const float* x, int n_rows, float* out) {
    for (int row = 0; row < n_rows; ++row, x += norm.n, out += norm.n) {
        float mean, scale;
        frame_statistics(x, norm.n, norm.epsilon, &mean, &scale);
        for (int i = 0; i < norm.n; i += kLanes) {
            const Floats normal = (load_floats(x + i) - mean) * scale;
            store_floats(out + i,
                         normal * load_floats(norm.weight + i) + load_floats(norm.bias + i));
        }
    }
}

void frame_norm_backward_rows(const gmm_jepa::FrameNorm& norm, const float* x, const float* grad,
                              const float* added, int n_rows, float* out, float* value,
                              float* weight, float* bias) {
    const int n = norm.n;
    for (int row = 0; row < n_rows; ++row, x += n, grad += n, added += n, out += n, value += n) {
        float mean, scale;
        frame_statistics(x, n, norm.epsilon, &mean, &scale);
        Floats sum{}, product{};
        for (int i = 0; i < n; i += kLanes) {
            const Floats normal = (load_floats(x + i) - mean) * scale;
            const Floats w = load_floats(norm.weight + i), g = load_floats(grad + i);
            store_floats(value + i, normal * w + load_floats(norm.bias + i));
            store_floats(weight + i, load_floats(weight + i) + g * normal);
            store_floats(bias + i, load_floats(bias + i) + g);
            sum += g * w;
            product += g * w * normal;
        }
        const float of_mean = total_of_lanes(sum) / n, along = total_of_lanes(product) / n;
        for (int i = 0; i < n; i += kLanes) {
            const Floats normal = (load_floats(x + i) - mean) * scale;
            const Floats g = load_floats(grad + i) * load_floats(norm.weight + i);
            store_floats(out + i,
                         load_floats(added + i) + scale * (g - of_mean - normal * along));
        }
    }
}

inline float dot(const float* a, const float* b, int n) {
    Floats sum{};
    for (int i = 0; i < n; i += kLanes) sum += load_floats(a + i) * load_floats(b + i);
    return total_of_lanes(sum);
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
