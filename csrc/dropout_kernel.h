// What dropout keeps, drawn by a hash; included by kernels_impl.h after density_kernel.h.

typedef uint32_t Uints __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));

inline uint64_t mixed(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// Scale or zero for each value of one row, by a hash of seed, row and column.
class KeepRow {
  public:
    KeepRow(const gmm_jepa::Dropout& dropout, uint64_t row)
        : threshold_(dropout.threshold), scale_(dropout.scale), active_(dropout.active) {
        const uint64_t key = mixed(dropout.seed ^ mixed(row));
        first_ = static_cast<uint32_t>(key);
        second_ = static_cast<uint32_t>(key >> 32);
        for (int i = 0; i < kLanes; ++i) lane_[i] = uint32_t(i);
    }

    Floats at(int column) const {
        Uints h = lane_ + uint32_t(column) + first_;
        h = (h ^ (h >> 16)) * 0x21f0aaadu;
        h = (h ^ (h >> 15)) * 0x735a2d97u ^ second_;
        h = (h ^ (h >> 15)) * 0x21f0aaadu;
        h ^= h >> 15;
        return zero_where_not((Ints)h >= threshold_, Floats{} + scale_);
    }

    // v, of these columns, where something is dropped at all.
    Floats of(Floats v, int column) const { return active_ ? v * at(column) : v; }

  private:
    Uints lane_;
    uint32_t first_, second_;
    int32_t threshold_;
    float scale_;
    bool active_;
};

void dropout(const float* x, int n, const gmm_jepa::Dropout& dropping, uint64_t row, float* out) {
    const KeepRow keep(dropping, row);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store_floats(out + i, load_floats(x + i) * keep.at(i));
    const Floats last = keep.at(i);
    for (int lane = 0; i + lane < n; ++lane) out[i + lane] = x[i + lane] * last[lane];
}
