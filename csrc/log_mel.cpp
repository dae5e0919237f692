#include "log_mel.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "parallel.h"

namespace gmm_jepa {
namespace {

std::vector<int> radices_of(int n) {
    std::vector<int> radices;
    for (int radix : {5, 4, 3, 2}) {
        for (; n % radix == 0; n /= radix) radices.push_back(radix);
    }
    return n == 1 ? radices : std::vector<int>();
}

void push_root(std::vector<float>& to, double turns) {
    to.push_back(static_cast<float>(std::cos(2.0 * M_PI * turns)));
    to.push_back(static_cast<float>(-std::sin(2.0 * M_PI * turns)));
}

// What a LogMelPlan points to.
struct Tables {
    explicit Tables(const LogMelSettings& s) : radices(radices_of(s.n_fft / 2)) {
        const int n = s.n_fft / 2;
        int length = n;
        for (int radix : radices) {
            for (int p = 0; p < length / radix; ++p) {
                for (int j = 1; j < radix; ++j) push_root(twiddles, double(j) * p / length);
            }
            length /= radix;
        }
        for (int k = 0; k <= n; ++k) push_root(roots, double(k) / s.n_fft);
        for (int mel = 0; mel < s.n_mels; ++mel) add_filter(s, mel);
    }

    // From the first to the last weight that is not zero.
    void add_filter(const LogMelSettings& s, int mel) {
        int first = 0, last = s.n_fft / 2;
        while (first < last && s.filters[int64_t(first) * s.n_mels + mel] == 0.0f) ++first;
        while (last > first && s.filters[int64_t(last) * s.n_mels + mel] == 0.0f) --last;
        firsts.push_back(first);
        counts.push_back(last - first + 1);
        for (int k = first; k <= last; ++k) {
            weights.push_back(s.filters[int64_t(k) * s.n_mels + mel]);
        }
    }

    LogMelPlan plan(const LogMelSettings& s) const {
        return {s.n_fft,         s.n_mels,     static_cast<int>(radices.size()),
                radices.data(),  s.floor,      s.window,
                twiddles.data(), roots.data(), firsts.data(),
                counts.data(),   weights.data()};
    }

    std::vector<int> radices, firsts, counts;
    std::vector<float> twiddles, roots, weights;
};

float sample(float value) { return value; }
float sample(int16_t value) { return value * (1.0f / 32768.0f); }

// Scratch of one thread.
template <typename T>
class Groups {
  public:
    Groups(const Matrix<T>& waveform, const LogMelSettings& settings, const LogMelPlan& plan,
           const Kernels& kernels)
        : waveform_(waveform),
          settings_(settings),
          plan_(plan),
          kernels_(kernels),
          edges_(size_t(kernels.lanes) * settings.n_fft),
          scratch_(size_t(2 * settings.n_fft) * kernels.lanes + 16),
          frames_(kernels.lanes),
          outs_(kernels.lanes) {}

    // Frames `first` to `first + n` (at most one per lane) of a row of `length` samples.
    void run(int64_t row, int64_t length, int64_t first, int n, float* out) {
        for (int lane = 0; lane < kernels_.lanes; ++lane) {
            frames_[lane] = frame(row, length, (first + std::min(lane, n - 1)) * settings_.hop,
                                  &edges_[size_t(lane) * settings_.n_fft]);
            outs_[lane] = lane < n ? out + (first + lane) * settings_.n_mels : nullptr;
        }
        void* place = scratch_.data();
        size_t space = scratch_.size() * sizeof(float);
        place = std::align(64, space - 64, place, space);
        kernels_.log_mel(plan_, frames_.data(), static_cast<float*>(place), outs_.data());
    }

  private:
    // n_fft samples around `centre`, reflected once at either end of the row and zero beyond.
    const float* frame(int64_t row, int64_t length, int64_t centre, float* edge) const {
        const int64_t start = centre - settings_.n_fft / 2, stride = waveform_.stride_column;
        const T* x = waveform_.data + row * waveform_.stride_row;
        const bool inside = start >= 0 && start + settings_.n_fft <= length;
        if (inside && stride == 1) {
            if (const float* direct = as_floats(x + start)) return direct;
        }
        for (int i = 0; i < settings_.n_fft; ++i) {
            int64_t at = start + i < 0 ? -(start + i) : start + i;
            if (start + i >= length) at = 2 * (length - 1) - (start + i);
            edge[i] = at >= 0 && at < length ? sample(x[at * stride]) : 0.0f;
        }
        return edge;
    }

    static const float* as_floats(const float* x) { return x; }
    static const float* as_floats(const int16_t*) { return nullptr; }

    const Matrix<T>& waveform_;
    const LogMelSettings& settings_;
    const LogMelPlan& plan_;
    const Kernels& kernels_;
    std::vector<float> edges_, scratch_;
    std::vector<const float*> frames_;
    std::vector<float*> outs_;
};

}  // namespace

bool log_mel_supports(int n_fft) {
    return n_fft > 2 && n_fft % 2 == 0 && !radices_of(n_fft / 2).empty();
}

template <typename T>
void log_mel(const Matrix<T>& waveform, const int64_t* lengths, const LogMelSettings& settings,
             float* out, const Kernels& kernels, int n_threads) {
    const Tables tables(settings);
    const LogMelPlan plan = tables.plan(settings);
    const int64_t n_frames = waveform.n_columns / settings.hop + 1;
    const int64_t row_groups = (n_frames + kernels.lanes - 1) / kernels.lanes;
    const int64_t n_groups = row_groups * waveform.n_rows;
    const auto make = [&] { return Groups<T>(waveform, settings, plan, kernels); };
    over_shares(n_groups, n_groups, n_threads, make, [&](int64_t group, Groups<T>& groups) {
        const int64_t row = group / row_groups, first = group % row_groups * kernels.lanes;
        const int64_t last = std::min(first + kernels.lanes, n_frames);
        const int64_t valid = lengths[row] > 0 ? lengths[row] / settings.hop + 1 : 0;
        float* to = out + row * n_frames * settings.n_mels;
        const int64_t stop = std::clamp(valid, first, last);
        if (stop > first) groups.run(row, lengths[row], first, int(stop - first), to);
        std::fill(to + stop * settings.n_mels, to + last * settings.n_mels, 0.0f);
    });
}

template void log_mel(const Matrix<float>&, const int64_t*, const LogMelSettings&, float*,
                      const Kernels&, int);
template void log_mel(const Matrix<int16_t>&, const int64_t*, const LogMelSettings&, float*,
                      const Kernels&, int);

}  // namespace gmm_jepa
