// Random numbers and checks of the sanitizers' rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

namespace gmm_jepa {

inline std::mt19937 generator(0);

inline int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

inline double normal() { return std::normal_distribution<double>()(generator); }

inline std::vector<float> drawn(int64_t n, float scale = 1.0f) {
    std::vector<float> values(n);
    for (float& v : values) v = scale * static_cast<float>(normal());
    return values;
}

inline std::vector<int64_t> drawn_lengths(int64_t n, int64_t least, int64_t most) {
    std::vector<int64_t> lengths(n);
    for (int64_t& length : lengths) length = any(least, most);
    return lengths;
}

inline void demand_finite(const std::vector<float>& values, const char* what,
                          const Kernels& kernels) {
    for (float value : values) {
        if (std::isfinite(value)) continue;
        std::printf("%s of %s is not finite\n", what, kernels.name);
        std::exit(1);
    }
}

inline float width_scale(int64_t n) { return 1.0f / std::sqrt(static_cast<float>(n)); }

// Of rows, some of no frames, at times all of them; or a null pointer.
struct Lengths {
    Lengths(int64_t n_rows, int64_t n_frames)
        : values(drawn_lengths(n_rows, 0, any(0, 4) ? n_frames : 0)),
          given(any(0, 3)) {}
    const int64_t* data() const { return given ? values.data() : nullptr; }

    std::vector<int64_t> values;
    bool given;
};

// Results of one run, each of exact size and NaN before.
class Results {
  public:
    float* add(int64_t n) {
        values_.emplace_back(n, NAN);
        return values_.back().data();
    }

    void demand_finite(const char* what, const Kernels& kernels) const {
        for (const std::vector<float>& values : values_) {
            gmm_jepa::demand_finite(values, what, kernels);
        }
    }

    void demand_same(const Results& others, const char* what, const Kernels& kernels) const {
        for (size_t i = 0; i < values_.size(); ++i) {
            const size_t n = values_[i].size() * sizeof(float);
            if (!n || !std::memcmp(values_[i].data(), others.values_[i].data(), n)) continue;
            std::printf("%s of %s: result %d differs\n", what, kernels.name, int(i));
            std::exit(1);
        }
    }

  private:
    std::vector<std::vector<float>> values_;
};

// run(threads, results), with as many threads as given; finite, and the same both times.
template <typename Run>
void run_twice(const char* what, const Kernels& kernels, int first, int second, const Run& run) {
    Results one, other;
    run(first, &one);
    run(second, &other);
    one.demand_finite(what, kernels);
    one.demand_same(other, what, kernels);
}

// Results that do not depend on the number of threads.
template <typename Run>
void on_any_threads(const char* what, const Kernels& kernels, const Run& run) {
    run_twice(what, kernels, 1, static_cast<int>(any(2, 4)), run);
}

// The parts of a conformer block (blocks.cpp).
void block_round(const Kernels& kernels);

// The convolutions of a front end (front_end.cpp).
void front_end_round(const Kernels& kernels);

}  // namespace gmm_jepa
