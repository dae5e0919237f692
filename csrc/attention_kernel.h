// Rows of scores of an attention, in whole vectors; included by kernels_impl.h after
// dropout_kernel.h. Behind the last key scores are minus infinity, up to a whole vector.

inline float largest_lane(Floats v) {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

inline float total_of_lanes(Floats v) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

float softmax_row(float* scores, int n, const gmm_jepa::Dropout& dropout, uint64_t row,
                  float* total) {
    Floats most = Floats{} - __builtin_inff();
    for (int j = 0; j < n; j += kLanes) most = larger(load_floats(scores + j), most);
    const float top = largest_lane(most);
    Floats sum{};
    const KeepRow keep(dropout, row);
    for (int j = 0; j < n; j += kLanes) {
        const Floats p = exponential(load_floats(scores + j) - top);
        sum += p;
        store_floats(scores + j, keep.of(p, j));
    }
    *total = total_of_lanes(sum);
    return top;
}

float softmax_row_backward(const gmm_jepa::SoftmaxGradient& g, const gmm_jepa::Dropout& dropout,
                           uint64_t row) {
    const KeepRow keep(dropout, row);
    Floats of_gate{};
    for (int j = 0; j < g.n; j += kLanes) {
        const Floats p = exponential(load_floats(g.scores + j) - g.log_sum);
        const Floats kept = keep.of(Floats{} + 1.0f, j);
        const Floats of_score = p * (load_floats(g.of_probabilities + j) * kept - g.delta);
        store_floats(g.scores + j, p * kept);
        store_floats(g.of_probabilities + j, of_score);
        of_gate += of_score * load_floats(g.table + j);
        store_floats(g.grad_table + j, load_floats(g.grad_table + j) + of_score * g.gate);
    }
    return total_of_lanes(of_gate);
}
