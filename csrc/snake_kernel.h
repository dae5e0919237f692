// x + sin(a x)^2 / a and its gradients; included by kernels_impl.h after screen_kernel.h and
// density_kernel.h.

typedef uint16_t Halves __attribute__((vector_size(GMM_JEPA_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));

inline Floats load_wide(const float* p) { return load_floats(p); }
inline Floats load_wide(const uint16_t* p) {  // bfloat16
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

inline void store_narrow(float* p, Floats v) { store_floats(p, v); }
inline void store_narrow(uint16_t* p, Floats v) {  // to nearest even; NaN stays
    const Words bits = (Words)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words kept = v == v ? rounded : (bits >> 16) | 0x40u;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(kept, Halves);
}

// v a less its nearest multiple of pi, within a float's rounding wherever v a < 1e15
// (1e9 where multiply-adds are not fused).
inline Floats around_pi(Floats v, const double* a) {
    constexpr double kInverse = 0.31830988618379067154, kPi = 3.14159265358979311600,
                     kRest = 1.22464679914735317e-16, kRound = 6755399441055744.0;
    float parts[kLanes];
    store_floats(parts, v);
    for (int half = 0; half < 2; ++half) {
        float* part = parts + half * kWide;
        const Doubles u = load(part) * load(a + half * kWide);
        const Doubles turns = (u * kInverse + kRound) - kRound;
        const Doubles rest = (u - turns * kPi) - turns * kRest;
        *reinterpret_cast<HalfFloats*>(part) = __builtin_convertvector(rest, HalfFloats);
    }
    return load_floats(parts);
}

// Sine squared, and sine times cosine, of v a: both have a period of pi.
struct SineSquared {
    SineSquared(Floats v, const double* a) {
        const Floats h = 0.5f * around_pi(v, a), z = h * h;  // within pi / 4
        const Floats sine =
            h + h * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
        const Floats cosine = 1.0f - 0.5f * z +
                              z * z * (4.166664568298827e-2f +
                                       z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
        const Floats whole = 2.0f * sine * cosine;
        square = whole * whole;
        product = whole * (1.0f - 2.0f * sine * sine);
    }
    Floats square, product;
};

// a of kLanes channels as doubles.
struct Frequencies {
    explicit Frequencies(const float* a) : inverse(1.0f / load_floats(a)) {
        for (int i = 0; i < kLanes; ++i) wide[i] = a[i];
    }
    double wide[kLanes];
    Floats inverse;
};

template <typename T>
void snake(const T* x, const float* a, int n_rows, int n_channels, float* out) {
    for (int c = 0; c < n_channels; c += kLanes) {
        const Frequencies of(a + c);
        for (ptrdiff_t at = c; at < ptrdiff_t(n_rows) * n_channels; at += n_channels) {
            const Floats v = load_wide(x + at);
            store_floats(out + at, v + SineSquared(v, of.wide).square * of.inverse);
        }
    }
}

template <typename T>
void snake_backward(const T* x, const float* a, const float* grad, int n_rows, int n_channels,
                    T* grad_x, float* grad_a) {
    for (int c = 0; c < n_channels; c += kLanes) {
        const Frequencies of(a + c);
        Floats total{};
        for (ptrdiff_t at = c; at < ptrdiff_t(n_rows) * n_channels; at += n_channels) {
            const Floats v = load_wide(x + at), g = load_floats(grad + at);
            const SineSquared sine(v, of.wide);
            store_narrow(grad_x + at, g + 2.0f * g * sine.product);
            total += g * (2.0f * sine.product * v - sine.square * of.inverse);
        }
        store_floats(grad_a + c, total * of.inverse);
    }
}
