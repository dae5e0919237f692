// Numbers of two bytes: rounded to float32 first and then to nearest even, as torch does it. Code that
// is compiled for one instruction set (kernels.h) or for CUDA has roundings of its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace gmm_jepa {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct BFloat16 {
    explicit BFloat16(double value) {
        const uint32_t wide = bits_of(static_cast<float>(value));
        const bool is_nan = (wide & 0x7fffffffu) > 0x7f800000u;
        bits = is_nan ? 0x7fc0u : (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    }
    explicit operator float() const { return float_of(uint32_t(bits) << 16); }

    uint16_t bits;
};

struct Float16 {
    explicit Float16(double value) {
        const uint32_t wide = bits_of(static_cast<float>(value)), size = wide & 0x7fffffffu;
        uint32_t narrow;
        if (size > 0x7f800000u) {
            narrow = 0x7e00u;
        } else if (size >= 0x477ff000u) {  // 65,520 and up are infinite
            narrow = 0x7c00u;
        } else if (size < 0x38800000u) {  // below 2^-14: multiples of 2^-24, which the sum rounds to
            narrow = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
        } else {
            narrow = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
        }
        bits = static_cast<uint16_t>(narrow | ((wide >> 16) & 0x8000u));
    }

    uint16_t bits;
};

}  // namespace gmm_jepa
