// Density-adaptive attention over one chunk of frames, kLanes channels at a time; included by
// kernels_impl.h. The formulas are gmm_jepa/ops/density.py's.

typedef int32_t Ints __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));

constexpr int kGaussians = gmm_jepa::kDensityGaussians;
constexpr float kFarthest = 10.0f;  // of y

inline Floats load_floats(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store_floats(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats zero_where_not(Ints condition, Floats v) { return (Floats)(condition & (Ints)v); }

// exp(x) for x <= 0, within 2 ulp; zero below -87.
inline Floats exponential(Floats x) {
    const Ints small = x < -87.0f;
    x = small ? Floats{} - 87.0f : x;
    // Adding and taking away 1.5 x 2^23 rounds to an integer.
    const Floats shifted = x * 1.44269504f + 12582912.0f;
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Floats p = Floats{} + 1.98756915e-4f;
    p = p * r + 1.39819994e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const Ints scale = ((Ints)shifted << 23) + (127 << 23);  // the low bits of `shifted` are n
    return zero_where_not(~small, p * (Floats)scale);
}

// Sums by parts: rounding grows with 32 and n / 32 terms, not with n.
template <typename Term>
Floats sum_over(int n, const Term& term) {
    Floats total{};
    for (int start = 0; start < n; start += 32) {
        const int stop = start + 32 < n ? start + 32 : n;
        Floats part{};
        for (int t = start; t < stop; ++t) part += term(t);
        total += part;
    }
    return total;
}

inline Floats square_root(Floats v) {
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

inline Floats clamped(Floats u) {
    u = u > kFarthest ? Floats{} + kFarthest : u;
    return u < -kFarthest ? Floats{} - kFarthest : u;
}

// Statistics of one chunk, and its softmax over time into `weights` (n, kLanes).
struct DensityChunk {
    DensityChunk(const gmm_jepa::DensityParameters& parameters, const float* frames,
                 ptrdiff_t stride_frames, int n_frames, float* scratch)
        : p(parameters), x(frames), stride(stride_frames), n(n_frames), weights(scratch) {
        mean = sum_over(n, [&](int t) { return at(t); }) / float(n);
        const Floats squares = sum_over(n, [&](int t) { return (at(t) - mean) * (at(t) - mean); });
        std = square_root(squares / float(n - 1) + 1e-8f);
        for (int g = 0; g < kGaussians; ++g) middle[g] = mean + p.offsets[g];
        Floats most = Floats{} - __builtin_inff();
        for (int t = 0; t < n; ++t) {
            Floats log_density{};
            for (int g = 0; g < kGaussians; ++g) {
                const Floats y = clamped(distance(t, g));
                log_density -= y * y * (0.5f / p.squared_widths[g]);
            }
            store_floats(weights + t * ptrdiff_t(kLanes), log_density);
            most = larger(log_density, most);
        }
        for (int t = 0; t < n; ++t) {
            float* w = weights + t * ptrdiff_t(kLanes);
            store_floats(w, exponential(load_floats(w) - most));
        }
        const Floats total = sum_over(n, [&](int t) { return weight(t); });
        for (int t = 0; t < n; ++t) store_floats(weights + t * ptrdiff_t(kLanes), weight(t) / total);
    }

    Floats at(int t) const { return load_floats(x + t * stride); }
    Floats weight(int t) const { return load_floats(weights + t * ptrdiff_t(kLanes)); }
    Floats distance(int t, int g) const { return (at(t) - middle[g]) / std; }

    const gmm_jepa::DensityParameters& p;
    const float* x;
    ptrdiff_t stride;
    int n;
    float* weights;
    Floats mean, std, middle[kGaussians];
};

void density_forward(const gmm_jepa::DensityParameters& parameters, const float* x,
                     ptrdiff_t stride, int n, float* scratch, float* out) {
    const DensityChunk chunk(parameters, x, stride, n, scratch);
    for (int t = 0; t < n; ++t) {
        store_floats(out + t * stride, chunk.at(t) + chunk.at(t) * chunk.weight(t));
    }
}

inline double sum_of_lanes(Floats v) {
    double total = 0.0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

// What the way back adds up over the frames.
struct DensitySums {
    Floats of_distance, of_std, by_offset[kGaussians], by_width[kGaussians];

    void add(const DensitySums& other) {
        of_distance += other.of_distance;
        of_std += other.of_std;
        for (int j = 0; j < kGaussians; ++j) {
            by_offset[j] += other.by_offset[j];
            by_width[j] += other.by_width[j];
        }
    }
};

void density_backward(const gmm_jepa::DensityParameters& parameters, const float* x,
                      const float* grad, ptrdiff_t stride, int n, float* scratch, float* grad_x,
                      double* grad_parameters) {
    const DensityChunk chunk(parameters, x, stride, n, scratch);
    const auto g_out = [&](int t) { return load_floats(grad + t * stride); };
    const Floats inner =
        sum_over(n, [&](int t) { return chunk.weight(t) * g_out(t) * chunk.at(t); });
    DensitySums total{};
    for (int start = 0; start < n; start += 32) {
        DensitySums part{};
        for (int t = start; t < n && t < start + 32; ++t) {
            const Floats w = chunk.weight(t), g = g_out(t), value = chunk.at(t);
            const Floats of_density = w * (g * value - inner);
            Floats of_x{};
            for (int j = 0; j < kGaussians; ++j) {
                const float inverse = 1.0f / parameters.squared_widths[j];
                const Floats u = chunk.distance(t, j), y = clamped(u);
                const Floats of_u = zero_where_not(y == u, of_density * y * -inverse);
                of_x += of_u;
                part.of_std += of_u * u;
                part.by_offset[j] += of_u;
                part.by_width[j] += of_density * y * y * (0.5f * inverse * inverse);
            }
            part.of_distance += of_x;
            store_floats(grad_x + t * stride, g + g * w + of_x / chunk.std);
        }
        total.add(part);
    }
    const Floats of_mean = total.of_distance / chunk.std * (-1.0f / float(n));
    const Floats of_variance = total.of_std / (chunk.std * chunk.std) * -0.5f;
    const Floats slope = of_variance * (2.0f / float(n - 1));
    for (int t = 0; t < n; ++t) {
        float* to = grad_x + t * stride;
        store_floats(to, load_floats(to) + of_mean + slope * (chunk.at(t) - chunk.mean));
    }
    for (int j = 0; j < kGaussians; ++j) {
        grad_parameters[j] += sum_of_lanes(-total.by_offset[j] / chunk.std);
        grad_parameters[kGaussians + j] += sum_of_lanes(total.by_width[j]);
    }
}
