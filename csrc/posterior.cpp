#include "posterior.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "candidates.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Fresh memory of a large result is a third of the time of posteriors in pages of 4 KB.
void prefer_huge_pages(void* data, size_t n_bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = uintptr_t(1) << 21;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
    const uintptr_t stop = (reinterpret_cast<uintptr_t>(data) + n_bytes) & ~(kPage - 1);
    if (stop > start) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#else
    (void)data, (void)n_bytes;
#endif
}

// Calls each(candidates, padded rows, place in the group, row) for every frame.
template <typename T, typename Each>
void for_each_frame(const Matrix<T>& frames, const ScreenedMixture& mixture, double margin,
                    int n_threads, const Each& each) {
    const int64_t groups = std::max<int64_t>(1, frames.n_rows / mixture.group());
    n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, groups));
    parallel(n_threads, [&](int thread) {
        const Share share(frames.n_rows, thread, n_threads);
        Candidates candidates(mixture, margin, share.last - share.first);
        const int group = candidates.group();
        std::vector<T> rows(size_t(group) * mixture.n_dims_padded);
        for (int64_t start = share.first; start < share.last; start += group) {
            const int n = static_cast<int>(std::min<int64_t>(group, share.last - start));
            load_rows(frames, start, n, mixture.n_dims_padded, rows.data());
            candidates.screen(rows.data(), n);
            for (int i = 0; i < n; ++i) each(candidates, rows.data(), i, start + i);
        }
    });
}

template <typename T>
double squared_distance(const Matrix<T>& frames, int64_t row, const ScreenedMixture& mixture,
                        int64_t k) {
    const double* mean = &mixture.means[size_t(k) * mixture.n_dims_padded];
    double square = 0.0;
    for (int64_t d = 0; d < mixture.n_dims; ++d) {
        const double z = double(frames(row, d)) - mean[d];
        square += z * z;
    }
    return square;
}

}  // namespace

template <typename T, typename Out>
void posterior(const Matrix<T>& frames, const ScreenedMixture& mixture, double temperature,
               Out* out, int n_threads) {
    const int64_t K = mixture.n_components;
    prefer_huge_pages(out, sizeof(Out) * size_t(frames.n_rows) * size_t(K));
    const auto each = [=](Candidates& candidates, const T* rows, int i, int64_t row) {
        const int n = candidates.find(rows, i);
        double* values = candidates.log_joint();
        const double total = normalise(values, n, candidates.largest(), temperature);
        Out* to = out + row * K;
        std::fill_n(to, K, std::isfinite(total) ? Out(0.0) : Out(kNaN));
        if (!std::isfinite(total)) return;
        for (int j = 0; j < n; ++j) to[candidates.components()[j]] = static_cast<Out>(values[j]);
    };
    for_each_frame(frames, mixture, kMarginNats * temperature, n_threads, each);
}

template <typename T>
void log_likelihood(const Matrix<T>& frames, const ScreenedMixture& mixture, double* out,
                    int n_threads) {
    const auto each = [=](Candidates& candidates, const T* rows, int i, int64_t row) {
        const int n = candidates.find(rows, i);
        const double total = normalise(candidates.log_joint(), n, candidates.largest(), 1.0);
        out[row] = candidates.largest() + std::log(total);
    };
    for_each_frame(frames, mixture, kMarginNats, n_threads, each);
}

template <typename T>
void topk(const Matrix<T>& frames, const ScreenedMixture& mixture, int k, double temperature,
          float* posteriors, int64_t* indices, int n_threads) {
    const auto each = [=](Candidates& candidates, const T* rows, int i, int64_t row) {
        int n = candidates.find(rows, i);
        if (n < k) n = candidates.find_all(rows, i);
        const double* values = candidates.log_joint();
        const double total = normalise(candidates.log_joint(), n, candidates.largest(), temperature);
        std::vector<int> order(n);
        std::iota(order.begin(), order.end(), 0);
        const int32_t* components = candidates.components();
        if (std::isfinite(total)) {
            const auto before = [=](int a, int b) {
                return values[a] != values[b] ? values[a] > values[b]
                                              : components[a] < components[b];
            };
            std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
        }
        for (int j = 0; j < k; ++j) {
            posteriors[row * k + j] = static_cast<float>(values[order[j]]);
            indices[row * k + j] = components[order[j]];
        }
    };
    for_each_frame(frames, mixture, kMarginNats * temperature, n_threads, each);
}

template <typename T>
void nearest(const Matrix<T>& frames, const ScreenedMixture& mixture, int64_t* labels,
             float* squared_distances, int n_threads) {
    const auto each = [=](Candidates& candidates, const T* rows, int i, int64_t row) {
        const int n = candidates.find(rows, i);
        // Where distances are small beside the constant of a density, unequal ones have equal
        // densities.
        int64_t label = 0;
        double least = kNaN;
        for (int j = 0; j < n; ++j) {
            if (candidates.log_joint()[j] != candidates.largest()) continue;
            const int64_t k = candidates.components()[j];
            const double square = squared_distance(frames, row, mixture, k);
            if (square > least || (square == least && k > label)) continue;
            label = k;
            least = square;
        }
        labels[row] = label;
        squared_distances[row] = static_cast<float>(least);
    };
    for_each_frame(frames, mixture, 0.0, n_threads, each);
}

#define GMM_JEPA_POSTERIOR(T, Out) \
    template void posterior(const Matrix<T>&, const ScreenedMixture&, double, Out*, int);
#define GMM_JEPA_INSTANTIATE(T)                                                                  \
    GMM_JEPA_POSTERIOR(T, float)                                                                 \
    GMM_JEPA_POSTERIOR(T, double)                                                                \
    GMM_JEPA_POSTERIOR(T, BFloat16)                                                              \
    GMM_JEPA_POSTERIOR(T, Float16)                                                               \
    template void log_likelihood(const Matrix<T>&, const ScreenedMixture&, double*, int);        \
    template void nearest(const Matrix<T>&, const ScreenedMixture&, int64_t*, float*, int);      \
    template void topk(const Matrix<T>&, const ScreenedMixture&, int, double, float*, int64_t*, int);
GMM_JEPA_INSTANTIATE(float)
GMM_JEPA_INSTANTIATE(double)
#undef GMM_JEPA_INSTANTIATE
#undef GMM_JEPA_POSTERIOR

}  // namespace gmm_jepa
