// Matrix products of a convolution over frames; included by kernels_impl.h.

constexpr int kProductLanes = kLanes * GMM_JEPA_PRODUCT_VECTORS;  // columns of a panel

// kRows rows by one panel of columns, sums in registers over all taps.
template <int kRows>
void product_tile(const gmm_jepa::Products& p, const float* a, const float* b, const float* bias,
                  float* c) {
    constexpr int kV = GMM_JEPA_PRODUCT_VECTORS;
    Floats sum[kRows][kV];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kV; ++v) {
            const float* from = p.accumulate ? c + r * p.stride_c : bias;
            sum[r][v] = *reinterpret_cast<const Floats*>(from + v * kLanes);
        }
    }
    for (int tap = 0; tap < p.n_taps; ++tap, a += p.stride_tap) {
        const float* x = a;
        for (int k = 0; k < p.n_k; ++k, x += p.stride_k, b += kProductLanes) {
            Floats w[kV];
#pragma GCC unroll 8
            for (int v = 0; v < kV; ++v) w[v] = *reinterpret_cast<const Floats*>(b + v * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const float value = x[r * p.stride_a];
#pragma GCC unroll 8
                for (int v = 0; v < kV; ++v) sum[r][v] += value * w[v];
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

void products(const gmm_jepa::Products& p) {
    constexpr int kRows = GMM_JEPA_PRODUCT_ROWS;
    const ptrdiff_t panel_size = ptrdiff_t(p.n_taps) * p.n_k * kProductLanes;
    for (int panel = 0; panel < p.n_panels; ++panel) {
        const float* b = p.b + panel * panel_size;
        float* c = p.c + panel * kProductLanes;
        for (int row = 0; row < p.n_rows; row += kRows) {
            product_tile<kRows>(p, p.a + row * p.stride_a, b, p.bias + panel * kProductLanes,
                                c + row * p.stride_c);
        }
    }
}
