// One row of a masked loss; included by kernels_impl.h after attention_kernel.h.

// n < kLanes values and `fill` behind them.
inline Floats load_part(const float* p, int n, float fill) {
    Floats v = Floats{} + fill;
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
}

// visit(column, count) for whole vectors, then for what is left.
template <typename Visit>
void over_row(int n, const Visit& visit) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) visit(i, kLanes);
    if (i < n) visit(i, n - i);
}

inline Floats load_some(const float* p, int count, float fill) {
    return count == kLanes ? load_floats(p) : load_part(p, count, fill);
}

inline void store_some(float* p, int count, Floats v) {
    if (count == kLanes) return store_floats(p, v);
    for (int i = 0; i < count; ++i) p[i] = v[i];
}

float largest_of(const float* row, int n) {
    Floats most = Floats{} - __builtin_inff();
    over_row(n, [&](int i, int count) {
        most = larger(load_some(row + i, count, -__builtin_inff()), most);
    });
    return largest_lane(most);
}

// The first column of the value, or 0.
int first_of(const float* row, int n, float value) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const uint32_t mask = mask_at_least(row + i, value);
        if (mask) return i + __builtin_ctz(mask);
    }
    for (; i < n; ++i) {
        if (row[i] >= value) return i;
    }
    return 0;
}

// exp(logit - largest) to `out`, and their sum.
float exponentials(const float* logits, int n, float largest, float* out) {
    Floats sum{};
    over_row(n, [&](int i, int count) {
        const Floats e = exponential(load_some(logits + i, count, -__builtin_inff()) - largest);
        sum += e;
        store_some(out + i, count, e);
    });
    return total_of_lanes(sum);
}

void kl_row(const float* logits, const float* targets, int n, float weight, float* scratch,
            gmm_jepa::RowLoss* out, float* gradient) {
    const float top = largest_of(logits, n);
    float* e = gradient ? gradient : scratch;
    const float sum = exponentials(logits, n, top, e);
    Floats masses{}, negative_entropy{}, cross{};
    over_row(n, [&](int i, int count) {
        const Floats p = load_some(targets + i, count, 0.0f);
        const Floats least = Floats{} + 1.17549435e-38f;
        masses += p;
        negative_entropy += p * logarithm(larger(p, least));
        cross += p * (load_some(logits + i, count, 0.0f) - top);
    });
    const float mass = total_of_lanes(masses);
    out->entropy = -total_of_lanes(negative_entropy);
    out->loss = -out->entropy - total_of_lanes(cross) + mass * __builtin_logf(sum);
    out->agreement = first_of(logits, n, top) == first_of(targets, n, largest_of(targets, n));
    if (!gradient) return;
    const float scale = weight * mass / sum;
    over_row(n, [&](int i, int count) {
        const Floats p = load_some(targets + i, count, 0.0f);
        store_some(gradient + i, count, load_some(e + i, count, 0.0f) * scale - p * weight);
    });
}

void cross_entropy_row(const float* logits, int64_t label, int n, float weight, float* scratch,
                       gmm_jepa::RowLoss* out, float* gradient) {
    const float top = largest_of(logits, n);
    float* e = gradient ? gradient : scratch;
    const float sum = exponentials(logits, n, top, e);
    out->entropy = 0.0f;
    out->loss = __builtin_logf(sum) + (top - logits[label]);
    out->agreement = first_of(logits, n, top) == label;
    if (!gradient) return;
    over_row(n, [&](int i, int count) {
        store_some(gradient + i, count, load_some(e + i, count, 0.0f) * (weight / sum));
    });
    gradient[label] -= weight;
}

float squared_error_row(const float* prediction, const float* target, int n, float weight,
                        float* gradient) {
    Floats sum{};
    const float scale = 2.0f * weight / float(n);
    over_row(n, [&](int i, int count) {
        const Floats error =
            load_some(prediction + i, count, 0.0f) - load_some(target + i, count, 0.0f);
        sum += error * error;
        if (gradient) store_some(gradient + i, count, error * scale);
    });
    return total_of_lanes(sum) / float(n);
}
