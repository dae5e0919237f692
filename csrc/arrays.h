// What the module receives from Python: addresses, sizes, and strides in elements; and memory of its
// own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace gmm_jepa {

template <typename T>
struct Matrix {
    const T* data;
    int64_t n_rows;
    int64_t n_columns;
    int64_t stride_row;
    int64_t stride_column;

    const T& operator()(int64_t row, int64_t column) const {
        return data[row * stride_row + column * stride_column];
    }
};

// Of frames (B, T, C), contiguous; C is a multiple of the set's lanes. Rows b have lengths[b] real
// frames, the first; null: all.
struct FramesShape {
    int64_t n_rows, n_frames;
    int n_channels;
    const int64_t* lengths;
};

// Parameters of a diagonal mixture: float64, contiguous.
struct MixtureView {
    const double* log_weights;  // (K,)
    const double* means;        // (K, D)
    const double* variances;    // (K, D)
    int64_t n_components;
    int64_t n_dims;
};

// Memory from the start of a cache line on: no vector of a row lies in two of them.
template <typename T>
struct Aligned {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};
    Aligned() = default;
    template <typename Other>
    Aligned(const Aligned<Other>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
    template <typename Other>
    bool operator==(const Aligned<Other>&) const { return true; }
    template <typename Other>
    bool operator!=(const Aligned<Other>&) const { return false; }
};
template <typename T>
using AlignedVector = std::vector<T, Aligned<T>>;

// Memory like that, with whatever it held before.
template <typename T>
class Buffer {
  public:
    explicit Buffer(size_t n)
        : values_(static_cast<T*>(::operator new(n * sizeof(T), Aligned<T>::kLine))) {}
    T* data() { return values_.get(); }
    const T* data() const { return values_.get(); }
    T& operator[](size_t i) { return values_.get()[i]; }
    const T& operator[](size_t i) const { return values_.get()[i]; }

  private:
    struct Free {
        void operator()(T* values) const { ::operator delete(values, Aligned<T>::kLine); }
    };
    std::unique_ptr<T, Free> values_;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Frames of a row that are real, in a shape whose `lengths` may be null: then all are.
template <typename Shape>
int64_t n_real(const Shape& shape, int64_t row) {
    return shape.lengths ? shape.lengths[row] : shape.n_frames;
}

}  // namespace gmm_jepa
