// How functions become those of the Python module: `define` makes one of a function of C++. Python
// gives its parameters one by one: for a pointer the address, for a struct the tuple of its fields
// in their order, for a vector a list, for kernels the name of their set, and else the value.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"
#include "kernels.h"

namespace gmm_jepa {

namespace py = pybind11;

struct ScreenedMixture;

template <typename T>
T of_python(const py::handle& value);

// Becomes what the struct that it is given to has in its place.
struct Field {
    py::handle value;

    template <typename T>
    operator T() const {
        return of_python<T>(value);
    }
};

template <typename Struct, typename Indices, typename = void>
struct Takes : std::false_type {};
template <typename Struct, size_t... I>
struct Takes<Struct, std::index_sequence<I...>,
             std::void_t<decltype(Struct{(void(I), std::declval<Field>())...})>>
    : std::true_type {};

// Counted, for a struct would be filled up with zeros where the number was given and too small.
template <typename Struct, size_t n = 1>
constexpr size_t n_fields() {
    if constexpr (Takes<Struct, std::make_index_sequence<n + 1>>::value) {
        return n_fields<Struct, n + 1>();
    } else {
        return n;
    }
}

template <typename Struct, size_t... I>
Struct of_tuple(const py::tuple& fields, std::index_sequence<I...>) {
    if (fields.size() != sizeof...(I)) {
        throw std::invalid_argument("expected a tuple of " + std::to_string(sizeof...(I)) +
                                    ", got one of " + std::to_string(fields.size()));
    }
    return Struct{Field{PyTuple_GET_ITEM(fields.ptr(), I)}...};
}

template <typename T>
constexpr bool kIsVector = false;
template <typename T>
constexpr bool kIsVector<std::vector<T>> = true;

template <typename T>
T of_python(const py::handle& value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value.cast<uintptr_t>());
    } else if constexpr (std::is_aggregate_v<T>) {
        return of_tuple<T>(value.cast<py::tuple>(), std::make_index_sequence<n_fields<T>()>());
    } else if constexpr (kIsVector<T>) {
        T items;
        for (const py::handle item : value.cast<py::list>()) {
            items.push_back(of_python<typename T::value_type>(item));
        }
        return items;
    } else {
        return value.cast<T>();
    }
}

template <>
inline const Kernels& of_python(const py::handle& value) {
    return kernels(value.cast<std::string>().c_str());
}

// Of a seed and a probability; none with probability 0. Throws std::invalid_argument.
template <>
Dropout of_python(const py::handle& value);

// What is kept of a parameter for the length of a call: a copy, but of what lives longer.
template <typename T>
constexpr bool kLivesLonger = std::is_same_v<T, Kernels> || std::is_same_v<T, ScreenedMixture>;
template <typename Parameter>
using Held = std::conditional_t<kLivesLonger<std::decay_t<Parameter>>, Parameter,
                                std::decay_t<Parameter>>;

template <typename>
using Given = py::handle;

// `check`(first argument, kernels) refuses what `function` must not be called with. Both run while
// other threads of Python do; what is Python's has been read before.
template <typename Check = std::nullptr_t, typename Result, typename... Parameters>
void define(py::module_& module, const char* name, Result (*function)(Parameters...),
            Check check = nullptr) {
    module.def(name, [function, check](Given<Parameters>... given) {
        const std::tuple<Held<Parameters>...> arguments{of_python<Held<Parameters>>(given)...};
        const py::gil_scoped_release release;
        if constexpr (!std::is_null_pointer_v<Check>) {
            check(std::get<0>(arguments), std::get<const Kernels&>(arguments));
        }
        return std::apply(function, arguments);
    });
}

// A matrix whose type is told beside it.
struct Rows {
    const void* data;
    int64_t n_rows, n_columns, stride_row, stride_column;

    // Throws std::invalid_argument.
    void check() const {
        if (n_rows < 0 || n_columns < 1 || (n_rows > 0 && !data)) {
            throw std::invalid_argument("frames: expected an address, rows >= 0, columns >= 1");
        }
    }

    template <typename T>
    Matrix<T> as() const {
        return {static_cast<const T*>(data), n_rows, n_columns, stride_row, stride_column};
    }
};

// run(frames), in their type, which have a mixture's n_dims features. Throws std::invalid_argument.
template <typename Run>
auto on_frames(const Rows& frames, bool is_float64, int64_t n_dims, const Run& run) {
    frames.check();
    if (frames.n_columns != n_dims) {
        throw std::invalid_argument("frames: expected as many features as the mixture has");
    }
    return is_float64 ? run(frames.as<double>()) : run(frames.as<float>());
}

// Throws unless there are none, or one a row, each 0 to n_frames.
void check_lengths(const int64_t* lengths, int64_t n_rows, int64_t n_frames);

// After the modules of gmm_jepa/ops/ that call what each defines; lists.py with the losses, and
// native_mixture.py the last.
void define_front_end(py::module_& module);
void define_encoder(py::module_& module);
void define_blocks(py::module_& module);
void define_losses(py::module_& module);
void define_cuda(py::module_& module);

}  // namespace gmm_jepa
