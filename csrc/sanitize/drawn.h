// Random numbers and checks of the sanitizers' rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

// The parts of a conformer block (blocks.cpp).
void block_round(const Kernels& kernels);

}  // namespace gmm_jepa
