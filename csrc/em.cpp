// E- and M-step in blocks of frames. Threads share a block's frames in the E-step and its
// components in the M-step, where each component adds up its frames in their order: so sums do not
// depend on the number of threads, and there is one table of moments, not one per thread.
#include "em.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "candidates.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

// Rows of a block: enough that a component meets several of its frames, few enough that the frames
// stay in cache (2,048 x 80 floats are 640 KB), and at most 2^21 pairs if nothing is sparse.
constexpr int64_t kMostRows = 2048;
constexpr int64_t kMostPairs = int64_t(1) << 21;

// Components that a thread takes at a time in the M-step.
constexpr int kComponents = 16;

struct Pair {
    uint32_t row;
    uint32_t component;
    double responsibility;
};

int64_t block_rows(int64_t n_frames, const ScreenedMixture& mixture) {
    const int64_t least = mixture.group();
    const int64_t rows = std::clamp(kMostPairs / mixture.n_components, least, kMostRows);
    return std::max(int64_t(1), std::min(rows, n_frames));
}

template <typename T>
class Expectation {
  public:
    Expectation(const Matrix<T>& frames, const ScreenedMixture& mixture, int n_threads)
        : frames_(frames),
          mixture_(mixture),
          n_threads_(n_threads),
          rows_(block_rows(frames.n_rows, mixture)),
          block_(size_t(rows_) * mixture.n_dims_padded),
          log_likelihoods_(rows_),
          pairs_(n_threads),
          places_(size_t(n_threads) * mixture.n_components),
          starts_(mixture.n_components + 1),
          sorted_rows_(new uint32_t[rows_ * mixture.n_components]),
          sorted_responsibilities_(new double[rows_ * mixture.n_components]),
          counts_(mixture.n_components),
          first_(size_t(mixture.n_components) * mixture.n_dims_padded),
          second_(first_.size()),
          barrier_(n_threads) {
        // Room for the densest block, so that nothing throws between barriers; pages that no pair
        // reaches are never touched.
        const int64_t most = (rows_ + n_threads - 1) / n_threads;
        for (auto& pairs : pairs_) pairs.reserve(most * mixture.n_components);
    }

    void run() {
        std::vector<Candidates> candidates(n_threads_, Candidates(mixture_, kMarginNats, rows_));
        parallel(n_threads_, [&](int thread) {
            for (int64_t start = 0; start < frames_.n_rows; start += rows_) {
                const int n = static_cast<int>(std::min(rows_, frames_.n_rows - start));
                expect(thread, candidates[thread], start, n);
                barrier_.wait();
                if (thread == 0) lay_out(n);
                barrier_.wait();
                sort(thread);
                barrier_.wait();
                maximise();
                barrier_.wait();
            }
        });
    }

    // Moments about the centre, mapped back to those about zero.
    void write(const Statistics& out) const {
        const int D = mixture_.n_dims;
        for (int k = 0; k < mixture_.n_components; ++k) {
            const double n = counts_[k];
            out.counts[k] = n;
            for (int d = 0; d < D; ++d) {
                const double c = mixture_.centre[d];
                const double z1 = first_[size_t(k) * mixture_.n_dims_padded + d];
                const double z2 = second_[size_t(k) * mixture_.n_dims_padded + d];
                out.first[int64_t(k) * D + d] = n * c + z1;
                out.second[int64_t(k) * D + d] = n * c * c + 2.0 * c * z1 + z2;
            }
        }
        *out.log_likelihood = log_likelihood_;
    }

    bool is_finite() const { return std::isfinite(log_likelihood_); }

  private:
    void expect(int thread, Candidates& candidates, int64_t start, int n) {
        const Share share(n, thread, n_threads_);
        std::vector<Pair>& pairs = pairs_[thread];
        uint32_t* places = &places_[size_t(thread) * mixture_.n_components];
        pairs.clear();
        std::fill_n(places, mixture_.n_components, 0u);
        for (int64_t group = share.first; group < share.last; group += candidates.group()) {
            const int size =
                static_cast<int>(std::min<int64_t>(candidates.group(), share.last - group));
            T* rows = &block_[size_t(group) * mixture_.n_dims_padded];
            load_rows(frames_, start + group, size, mixture_.n_dims_padded, rows);
            candidates.screen(rows, size);
            for (int i = 0; i < size; ++i) {
                const int found = candidates.find(rows, i);
                const double total =
                    normalise(candidates.log_joint(), found, candidates.largest(), 1.0);
                log_likelihoods_[group + i] = candidates.largest() + std::log(total);
                for (int j = 0; j < found; ++j) {
                    const uint32_t k = candidates.components()[j];
                    pairs.push_back({uint32_t(group + i), k, candidates.log_joint()[j]});
                    ++places[k];
                }
            }
        }
    }

    // Where each thread's pairs of each component go; threads hold rising rows.
    void lay_out(int n) {
        uint32_t place = 0;
        for (int k = 0; k < mixture_.n_components; ++k) {
            starts_[k] = place;
            for (int thread = 0; thread < n_threads_; ++thread) {
                uint32_t& count = places_[size_t(thread) * mixture_.n_components + k];
                place += count;
                count = place - count;
            }
        }
        starts_[mixture_.n_components] = place;
        for (int i = 0; i < n; ++i) log_likelihood_ += log_likelihoods_[i];
        next_component_ = 0;
    }

    void sort(int thread) {
        uint32_t* places = &places_[size_t(thread) * mixture_.n_components];
        for (const Pair& pair : pairs_[thread]) {
            const uint32_t place = places[pair.component]++;
            sorted_rows_[place] = pair.row;
            sorted_responsibilities_[place] = pair.responsibility;
        }
    }

    void maximise() {
        const int K = mixture_.n_components;
        for (int k = next_component_ += kComponents; k - kComponents < K;
             k = next_component_ += kComponents) {
            for (int j = k - kComponents; j < std::min(k, K); ++j) add_moments(j);
        }
    }

    void add_moments(int k) {
        const uint32_t start = starts_[k], n = starts_[k + 1] - start;
        if (!n) return;
        const size_t row = size_t(k) * mixture_.n_dims_padded;
        counts_[k] += moments(block_.data(), &sorted_rows_[start], &sorted_responsibilities_[start],
                              static_cast<int>(n), &first_[row], &second_[row]);
    }

    double moments(const float* block, const uint32_t* rows, const double* r, int n, double* first,
                   double* second) const {
        return mixture_.kernels.moments_float(block, mixture_.centre.data(),
                                              mixture_.n_dims_padded, rows, r, n, first, second);
    }

    double moments(const double* block, const uint32_t* rows, const double* r, int n, double* first,
                   double* second) const {
        return mixture_.kernels.moments_double(block, mixture_.centre.data(),
                                               mixture_.n_dims_padded, rows, r, n, first, second);
    }

    const Matrix<T>& frames_;
    const ScreenedMixture& mixture_;
    int n_threads_;
    int64_t rows_;
    std::vector<T> block_;
    std::vector<double> log_likelihoods_;
    std::vector<std::vector<Pair>> pairs_;         // of each thread, by frame
    std::vector<uint32_t> places_;                 // (n_threads, K)
    std::vector<uint32_t> starts_;                 // (K + 1,)
    std::unique_ptr<uint32_t[]> sorted_rows_;            // by component, then by frame
    std::unique_ptr<double[]> sorted_responsibilities_;  // likewise
    std::vector<double> counts_, first_, second_;
    double log_likelihood_ = 0.0;
    std::atomic<int> next_component_{0};
    Barrier barrier_;
};

}  // namespace

template <typename T>
void em_statistics(const Matrix<T>& frames, const ScreenedMixture& mixture, const Statistics& out,
                   int n_threads) {
    const int64_t groups = std::max<int64_t>(1, frames.n_rows / mixture.group());
    n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, groups));
    Expectation<T> expectation(frames, mixture, n_threads);
    expectation.run();
    expectation.write(out);
    if (expectation.is_finite()) return;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(out.counts, mixture.n_components, nan);
    const int64_t n_moments = int64_t(mixture.n_components) * mixture.n_dims;
    std::fill_n(out.first, n_moments, nan);
    std::fill_n(out.second, n_moments, nan);
    *out.log_likelihood = nan;
}

template void em_statistics(const Matrix<float>&, const ScreenedMixture&, const Statistics&, int);
template void em_statistics(const Matrix<double>&, const ScreenedMixture&, const Statistics&, int);

}  // namespace gmm_jepa
