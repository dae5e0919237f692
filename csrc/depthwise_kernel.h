// Depthwise convolution of one vector of channels of one row; included by kernels_impl.h after
// density_kernel.h.

// kFrames outputs from frame t on, of taps first .. last - 1, all of whose frames there are.
template <int kFrames>
inline void depthwise_frames(const float* x, ptrdiff_t stride, int t, const float* taps, int first,
                             int last, int half, Floats start, float* out) {
    Floats sum[kFrames];
#pragma GCC unroll 8
    for (int f = 0; f < kFrames; ++f) sum[f] = start;
    const float* from = x + (t + first - half) * stride;
    for (int j = first; j < last; ++j, from += stride) {
        const Floats tap = load_floats(taps + j * kLanes);
#pragma GCC unroll 8
        for (int f = 0; f < kFrames; ++f) sum[f] += tap * load_floats(from + f * stride);
    }
#pragma GCC unroll 8
    for (int f = 0; f < kFrames; ++f) store_floats(out + (t + f) * stride, sum[f]);
}

void depthwise(const float* x, ptrdiff_t stride, int n, const float* taps, int n_taps,
               const float* start, float* out) {
    constexpr int kFrames = 8;
    const int half = n_taps / 2;
    const Floats bias = load_floats(start);
    for (int t = 0; t < n;) {
        if (t >= half && t + kFrames + half <= n) {
            depthwise_frames<kFrames>(x, stride, t, taps, 0, n_taps, half, bias, out);
            t += kFrames;
            continue;
        }
        const int first = t < half ? half - t : 0;
        const int last = t + half >= n ? n - t + half : n_taps;
        depthwise_frames<1>(x, stride, t, taps, first, last, half, bias, out);
        ++t;
    }
}

// taps[j] += sum over t of grad[t] x[t + j - half] for kTaps taps from `first` on.
template <int kTaps>
inline void depthwise_taps(const float* x, const float* grad, ptrdiff_t stride, int n, int half,
                           int first, float* taps) {
    Floats sum[kTaps];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) sum[j] = load_floats(taps + (first + j) * kLanes);
    const int shift = first - half;  // of the first tap
    for (int t = 0; t < n; ++t) {
        const Floats g = load_floats(grad + t * stride);
        const int from = t + shift;
        if (from >= 0 && from + kTaps <= n) {
#pragma GCC unroll 8
            for (int j = 0; j < kTaps; ++j) sum[j] += g * load_floats(x + (from + j) * stride);
            continue;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kTaps; ++j) {
            if (from + j >= 0 && from + j < n) sum[j] += g * load_floats(x + (from + j) * stride);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) store_floats(taps + (first + j) * kLanes, sum[j]);
}

void depthwise_weights(const float* x, const float* grad, ptrdiff_t stride, int n, int n_taps,
                       float* taps) {
    constexpr int kTaps = 8;
    const int half = n_taps / 2;
    int first = 0;
    for (; first + kTaps <= n_taps; first += kTaps) {
        depthwise_taps<kTaps>(x, grad, stride, n, half, first, taps);
    }
    for (; first < n_taps; ++first) depthwise_taps<1>(x, grad, stride, n, half, first, taps);
}

void sum_columns(const float* x, ptrdiff_t stride, int n, float* sums) {
    Floats sum = load_floats(sums);
    for (int t = 0; t < n; ++t) sum += load_floats(x + t * stride);
    store_floats(sums, sum);
}
