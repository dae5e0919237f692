// The taps of a frame are one run of memory, so frames are rows of a product, a stride apart, that
// share values: only a block's own are copied. Cut into blocks of s frames, block b of the input gets
// its gradient from frames b - 1 and b of the output.
#include "strided.h"

#include <algorithm>

#include "linear_maps.h"

namespace gmm_jepa {
namespace {

template <typename Word>
class Strided {
  public:
    Strided(const StridedShape& shape, const Kernels& kernels, int n_threads)
        : shape_(shape),
          kernels_(kernels),
          n_threads_(n_threads),
          T_(shape.frames_out()),
          reach_(2 * shape.stride * shape.n_in),
          block_(map_block<Word>(kernels)) {}

    void forward(const float* x, const float* weight, const float* bias, float* out) const {
        const int C = shape_.n_out;
        const PackedWeight<Word> taps(kernels_, weight, C, reach_, false, n_threads_);
        each_block(T_, [&](int64_t, int64_t row, int64_t first, int n, Scratch& s) {
            fill(x, row, first, n, s);
            taps.multiply(s.window.data(), n, bias, s.made.data(), step());
            std::copy_n(s.made.data(), int64_t(n) * C, out + (row * T_ + first) * C);
        });
    }

    void backward(const float* x, const float* weight, const float* grad,
                  const StridedGradients& out) const {
        const int C = shape_.n_out;
        const PackedWeight<Word> taps(kernels_, weight, C, reach_, true, n_threads_);
        // Rows of the batch begin with a word of their own.
        const int64_t n_row = round_up(T_, kValues<Word>), n_blocks = shape_.n_rows * blocks_of(T_);
        Factor<Word> grads(kernels_, shape_.n_rows * n_row, C, false);
        Factor<Word> windows(kernels_, shape_.n_rows * n_row, reach_, true);
        ColumnSums bias(kernels_, n_blocks, C);
        each_block(T_, [&](int64_t i, int64_t row, int64_t first, int n, Scratch& s) {
            const float* g = grad + (row * T_ + first) * C;
            bias.put(i, g, n);
            put_values(kernels_, g, ptrdiff_t(n) * C, false, s.grads.data());
            grads.put(row * n_row + first, s.grads.data(), n);
            fill(x, row, first, n, s);
            windows.put(row * n_row + first, s.window.data(), n, step());
        });
        multiply_over_rows(grads, windows, out.weight, n_threads_);
        bias.add_up(out.bias);
        each_block(T_ + 1, [&](int64_t, int64_t row, int64_t first, int n, Scratch& s) {
            through_taps(taps, grad, row, first, n, s, out.x);
        });
    }

  private:
    struct Scratch {
        Buffer<Word> window, grads;
        Buffer<float> made;
    };

    int64_t blocks_of(int64_t n_frames) const { return (n_frames + block_ - 1) / block_; }

    // Words from one frame's taps to the next one's.
    int step() const { return shape_.stride * shape_.n_in / kValues<Word>; }

    // Calls run(block, row, first, n, scratch) for blocks of n_frames frames of every row.
    template <typename Run>
    void each_block(int64_t n_frames, const Run& run) const {
        const int64_t most = block_ + 1 + kMostRows;
        const auto make = [&] {
            return Scratch{Buffer<Word>((most + 2) * step()),
                           Buffer<Word>(most * shape_.n_out / kValues<Word>),
                           Buffer<float>(most * std::max(shape_.n_out, reach_))};
        };
        over_row_blocks(shape_.n_rows, n_frames, block_, n_threads_, make, run);
    }

    // What n frames from `first` on see, zero where the row has none.
    void fill(const float* x, int64_t row, int64_t first, int n, Scratch& s) const {
        const int64_t C = shape_.n_in, T = shape_.n_frames;
        const int64_t start = first * shape_.stride - shape_.stride / 2;
        const int64_t stop = start + (n + 1) * int64_t(shape_.stride);
        const int64_t from = std::clamp<int64_t>(start, 0, T), to = std::clamp<int64_t>(stop, 0, T);
        Word* words = s.window.data();
        std::fill_n(words, (from - start) * C / kValues<Word>, Word{});
        words += (from - start) * C / kValues<Word>;
        put_values(kernels_, x + (row * T + from) * C, (to - from) * C, false, words);
        words += (to - from) * C / kValues<Word>;
        std::fill_n(words, (stop - to) * C / kValues<Word>, Word{});
    }

    // Gradients of blocks `first` to first + n - 1 of a row of x, of s frames each.
    void through_taps(const PackedWeight<Word>& taps, const float* grad, int64_t row,
                      int64_t first, int n, Scratch& s, float* grad_x) const {
        const int64_t C = shape_.n_in, T = shape_.n_frames, half = reach_ / 2;
        // Frames of the output that there are, of first - 1 to first + n - 1.
        const int64_t from = std::max<int64_t>(0, first - 1), to = std::min(T_, first + n);
        put_values(kernels_, grad + (row * T_ + from) * shape_.n_out, (to - from) * shape_.n_out,
                   false, s.grads.data());
        taps.multiply(s.grads.data(), static_cast<int>(to - from), nullptr, s.made.data());
        for (int64_t b = first; b < first + n; ++b) {
            const float* earlier = b > 0 ? &s.made[(b - 1 - from) * reach_ + half] : nullptr;
            const float* later = b < T_ ? &s.made[(b - from) * reach_] : nullptr;
            const int64_t at = b * shape_.stride - shape_.stride / 2;
            const int64_t begin = std::max<int64_t>(at, 0), end = std::min(at + shape_.stride, T);
            if (begin >= end) continue;
            const int64_t skip = (begin - at) * C, count = (end - begin) * C;
            float* to_x = grad_x + (row * T + begin) * C;
            if (earlier && later) {
                kernels_.add_rows(earlier + skip, later + skip, count, to_x);
            } else {
                std::copy_n((earlier ? earlier : later) + skip, count, to_x);
            }
        }
        if (first + n > T_) {  // frames behind the last taps
            const int64_t seen = (T_ + 1) * shape_.stride - shape_.stride / 2;
            if (seen < T) std::fill(grad_x + (row * T + seen) * C, grad_x + (row + 1) * T * C, 0.0f);
        }
    }

    const StridedShape& shape_;
    const Kernels& kernels_;
    int n_threads_;
    int64_t T_;
    int reach_;  // values that a frame sees
    int64_t block_;
};

}  // namespace

void strided_conv(const StridedShape& shape, const float* x, const float* weight,
                  const float* bias, float* out, const Kernels& kernels, int n_threads) {
    shape.narrow ? Strided<uint32_t>(shape, kernels, n_threads).forward(x, weight, bias, out)
                 : Strided<float>(shape, kernels, n_threads).forward(x, weight, bias, out);
}

void strided_conv_backward(const StridedShape& shape, const float* x, const float* weight,
                           const float* grad, const StridedGradients& out, const Kernels& kernels,
                           int n_threads) {
    shape.narrow ? Strided<uint32_t>(shape, kernels, n_threads).backward(x, weight, grad, out)
                 : Strided<float>(shape, kernels, n_threads).backward(x, weight, grad, out);
}

}  // namespace gmm_jepa
