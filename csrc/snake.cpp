#include "snake.h"

#include <algorithm>
#include <type_traits>

#include "linear_maps.h"

namespace gmm_jepa {
namespace {

constexpr int kBlockValues = 4096;  // whose gradients of `a` are summed in float32
constexpr int kThreadBlocks = 16;

// Blocks of frames of one row, numbered over all rows.
class Blocks {
  public:
    explicit Blocks(const FramesShape& shape)
        : shape_(shape),
          frames_(std::max<int64_t>(1, kBlockValues / shape.n_channels)),
          a_row_((shape.n_frames + frames_ - 1) / frames_) {}

    int64_t count() const { return shape_.n_rows * a_row_; }

    // Calls run(block, first value, real frames, frames) for all blocks, on threads.
    template <typename Run>
    void over(int n_threads, const Run& run) const {
        over_shares(count(), 1 + count() / kThreadBlocks, n_threads, [&](int64_t i) {
            const int64_t row = i / a_row_, start = i % a_row_ * frames_;
            const int64_t n = std::min(frames_, shape_.n_frames - start);
            run(i, (row * shape_.n_frames + start) * shape_.n_channels,
                std::clamp<int64_t>(n_real(shape_, row) - start, 0, n), n);
        });
    }

  private:
    const FramesShape& shape_;
    int64_t frames_, a_row_;
};

}  // namespace

template <typename T>
void snake(const FramesShape& shape, const T* x, const float* a, float* out, const Kernels& kernels,
           int n_threads) {
    const int C = shape.n_channels;
    Blocks(shape).over(n_threads, [&](int64_t, int64_t at, int64_t n_real, int64_t n) {
        const int rows = static_cast<int>(n_real);
        if constexpr (std::is_same_v<T, float>) {
            kernels.snake_float(x + at, a, rows, C, out + at);
        } else {
            kernels.snake_bfloat16(x + at, a, rows, C, out + at);
        }
        std::fill(out + at + n_real * C, out + at + n * C, 0.0f);
    });
}

template <typename T>
void snake_backward(const FramesShape& shape, const T* x, const float* a, const float* grad,
                    T* grad_x, float* grad_a, const Kernels& kernels, int n_threads) {
    const int C = shape.n_channels;
    const Blocks blocks(shape);
    ColumnSums sums(kernels, blocks.count(), C);
    blocks.over(n_threads, [&](int64_t block, int64_t at, int64_t n_real, int64_t n) {
        const int rows = static_cast<int>(n_real);
        float* part = sums.part(block);
        if constexpr (std::is_same_v<T, float>) {
            kernels.snake_backward_float(x + at, a, grad + at, rows, C, grad_x + at, part);
        } else {
            kernels.snake_backward_bfloat16(x + at, a, grad + at, rows, C, grad_x + at, part);
        }
        std::fill(grad_x + at + n_real * C, grad_x + at + n * C, T{});
    });
    sums.add_up(grad_a);
}

template void snake(const FramesShape&, const float*, const float*, float*, const Kernels&, int);
template void snake(const FramesShape&, const uint16_t*, const float*, float*, const Kernels&, int);
template void snake_backward(const FramesShape&, const float*, const float*, const float*, float*,
                             float*, const Kernels&, int);
template void snake_backward(const FramesShape&, const uint16_t*, const float*, const float*,
                             uint16_t*, float*, const Kernels&, int);

}  // namespace gmm_jepa
