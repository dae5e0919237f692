// What the files that make up the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace gmm_jepa {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The operators of encoders and of their losses.
void define_encoder(pybind11::module_& module);

}  // namespace gmm_jepa
