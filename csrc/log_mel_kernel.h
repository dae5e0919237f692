// Bodies of the log-mel function of kernels.h; included by kernels_impl.h, whose vector types it
// uses. A lane of a vector is a frame, so that no step needs to shuffle.
//
// n_fft real samples are the real and imaginary parts of n_fft / 2 complex ones (even and odd
// samples), which go through a Stockham FFT of radices 2, 3, 4 and 5 and are then taken apart.

struct Complex {
    Floats re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(float s, Complex a) { return {s * a.re, s * a.im}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
inline Complex rotated(Complex a, const float* w) {
    return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]};
}

template <int kRadix>
inline void butterfly(Complex* x);

template <>
inline void butterfly<2>(Complex* x) {
    const Complex a = x[0];
    x[0] = a + x[1];
    x[1] = a - x[1];
}

template <>
inline void butterfly<3>(Complex* x) {
    const Complex sum = x[1] + x[2];
    const Complex turn = 0.866025403784438647f * times_minus_i(x[1] - x[2]);
    const Complex middle = x[0] - 0.5f * sum;
    x[0] = x[0] + sum;
    x[1] = middle + turn;
    x[2] = middle - turn;
}

template <>
inline void butterfly<4>(Complex* x) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3];
    const Complex d = times_minus_i(x[1] - x[3]);
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
}

template <>
inline void butterfly<5>(Complex* x) {
    constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;
    constexpr float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;
    const Complex a = x[1] + x[4], b = x[2] + x[3];
    const Complex c = times_minus_i(x[1] - x[4]), d = times_minus_i(x[2] - x[3]);
    const Complex e = x[0] + c1 * a + c2 * b, f = x[0] + c2 * a + c1 * b;
    const Complex g = s1 * c + s2 * d, h = s2 * c - s1 * d;
    x[0] = x[0] + a + b;
    x[1] = e + g;
    x[2] = f + h;
    x[3] = f - h;
    x[4] = e - g;
}

// One Stockham stage: `length` points left, `stride` transforms side by side.
template <int kRadix>
void fft_stage(const Complex* from, Complex* to, int length, int stride, const float* twiddles) {
    const int m = length / kRadix;
    for (int p = 0; p < m; ++p, twiddles += 2 * (kRadix - 1)) {
        for (int q = 0; q < stride; ++q) {
            Complex x[kRadix];
            for (int i = 0; i < kRadix; ++i) x[i] = from[q + stride * (p + m * i)];
            butterfly<kRadix>(x);
            to[q + stride * (kRadix * p)] = x[0];
            for (int j = 1; j < kRadix; ++j) {
                to[q + stride * (kRadix * p + j)] = rotated(x[j], twiddles + 2 * (j - 1));
            }
        }
    }
}

// Natural logarithm within 2 ulp for positive normal numbers; infinity and NaN stay, negative numbers
// have none: NaN (Cephes logf).
inline Floats logarithm(Floats value) {
    typedef int32_t Ints __attribute__((vector_size(GMM_JEPA_BYTES)));
    const Ints bits = (Ints)value;
    // mantissa in [sqrt(1/2), sqrt(2))
    const Ints offset = bits - 0x3f3504f3;
    const Floats exponent = __builtin_convertvector(offset >> 23, Floats);
    const Floats x = (Floats)((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
    Floats y = 7.0376836292e-2f * x - 1.1514610310e-1f;
    y = y * x + 1.1676998740e-1f;
    y = y * x - 1.2420140846e-1f;
    y = y * x + 1.4249322787e-1f;
    y = y * x - 1.6668057665e-1f;
    y = y * x + 2.0000714765e-1f;
    y = y * x - 2.4999993993e-1f;
    y = y * x + 3.3333331174e-1f;
    const Floats square = x * x;
    y = y * x * square - 2.12194440e-4f * exponent - 0.5f * square;
    const Floats result = x + y + 0.693359375f * exponent;
    const Floats known = value < __builtin_inff() ? result : value;
    return value < 0.0f ? __builtin_nanf("") : known;
}

// Power of the bins 0 .. n from the transform Z of the packed samples (n complex points):
// 2 X_k = Z_k + conj Z_(n-k) - i w^k (Z_k - conj Z_(n-k)),  w = exp(-i pi / n).
void power_of(const Complex* packed, int n, const float* roots, Floats* power) {
    for (int k = 0; k <= n; ++k) {
        const Complex a = packed[k == n ? 0 : k], b = packed[k == 0 ? 0 : n - k];
        const Complex even = {a.re + b.re, a.im - b.im};
        const Complex odd = times_minus_i(rotated({a.re - b.re, a.im + b.im}, roots + 2 * k));
        const Complex x = even + odd;
        power[k] = 0.25f * (x.re * x.re + x.im * x.im);
    }
}

void log_mel(const gmm_jepa::LogMelPlan& plan, const float* const* frames, float* scratch,
             float* const* out) {
    const int n = plan.n_fft / 2;
    Complex* from = reinterpret_cast<Complex*>(scratch);
    Complex* to = from + n;
    Floats* samples = reinterpret_cast<Floats*>(scratch);
    for (int i = 0; i < plan.n_fft; ++i) {
        Floats column;
        for (int lane = 0; lane < kLanes; ++lane) column[lane] = frames[lane][i];
        samples[i] = plan.window[i] * column;
    }
    const float* twiddles = plan.twiddles;
    for (int stage = 0, length = n, stride = 1; stage < plan.n_stages; ++stage) {
        const int radix = plan.radices[stage];
        if (radix == 5) fft_stage<5>(from, to, length, stride, twiddles);
        if (radix == 4) fft_stage<4>(from, to, length, stride, twiddles);
        if (radix == 3) fft_stage<3>(from, to, length, stride, twiddles);
        if (radix == 2) fft_stage<2>(from, to, length, stride, twiddles);
        length /= radix;
        stride *= radix;
        twiddles += 2 * (radix - 1) * length;
        Complex* swap = from;
        from = to;
        to = swap;
    }
    Floats* power = reinterpret_cast<Floats*>(to);  // n + 1 vectors fit its 2 n
    power_of(from, n, plan.roots, power);
    const float* weights = plan.weights;
    for (int mel = 0; mel < plan.n_mels; ++mel) {
        Floats sum{};
        for (int i = 0; i < plan.counts[mel]; ++i) sum += *weights++ * power[plan.firsts[mel] + i];
        const Floats value = logarithm(sum + plan.floor);
        for (int lane = 0; lane < kLanes; ++lane) {
            if (out[lane]) out[lane][mel] = value[lane];
        }
    }
}
