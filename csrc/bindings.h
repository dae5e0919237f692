// What the files that make up the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace gmm_jepa {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Throws unless there are none, or one a row, each 0 to n_frames.
void check_lengths(const int64_t* lengths, int64_t n_rows, int64_t n_frames);

// Of a seed and a probability; none with probability 0. Throws std::invalid_argument.
Dropout dropout_of(const pybind11::tuple& drawn_by);

// The operators of encoders and of their losses; the parts of conformer blocks.
void define_encoder(pybind11::module_& module);
void define_blocks(pybind11::module_& module);

}  // namespace gmm_jepa
