// What module.cpp adds to the module from this folder.
#pragma once

#include <pybind11/pybind11.h>

namespace gmm_jepa::cuda {

void define(pybind11::module_& module);

}  // namespace gmm_jepa::cuda
