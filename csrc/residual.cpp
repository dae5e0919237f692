// Frames go through in blocks that stay in cache. A block's input is copied into a window with the
// frames that its taps reach, activated on the way; the products read windows and panels of weights.
#include "residual.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "arrays.h"
#include "convolution_sums.h"
#include "convolution_windows.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

struct Block {
    int64_t row, start;
    int n;  // frames
};

template <typename Word>
class Residual {
  public:
    Residual(const ResidualShape& shape, const Kernels& kernels)
        : shape_(shape),
          kernels_(kernels),
          panels_(kernels, shape.n_channels),
          block_(std::clamp<int64_t>(kBlockFloats / shape.n_channels, 16,
                                     std::max<int64_t>(16, shape.n_frames))),
          blocks_a_row_((shape.n_frames + block_ - 1) / block_) {}

    int64_t n_blocks() const { return shape_.n_rows * blocks_a_row_; }

    Block block(int64_t i) const {
        const int64_t start = i % blocks_a_row_ * block_;
        const int64_t n = std::min<int64_t>(block_, shape_.n_frames - start);
        return {i / blocks_a_row_, start, static_cast<int>(n)};
    }

  protected:
    Window<Word> window(int64_t dilation) const {
        return {kernels_, shape_.n_channels, block_, dilation};
    }

    // Frames of a row of a tensor (B, T, C).
    Frames frames(const float* x, int64_t row) const {
        return {x + row * shape_.n_frames * shape_.n_channels, 0, shape_.n_channels};
    }

    // A tile's rows may go beyond the block's.
    std::vector<float> scratch() const {
        return std::vector<float>((block_ + 2 + kMostRows) * panels_.width());
    }

    // to (n, width) = convolution of a window with packed weights.
    void convolve(const Window<Word>& window, const std::vector<Word>& weights,
                  const std::vector<float>& bias, int n, float* to) const {
        gmm_jepa::convolve(kernels_, panels_, window, weights, bias, n, to);
    }

    // Calls run(values in a row of C, values in a row of `width`, how many) for runs that are dense
    // in both: all n rows where the two are the same.
    template <typename Run>
    void over_runs(int64_t n, const Run& run) const {
        const int C = shape_.n_channels, width = panels_.width();
        if (C == width) return run(int64_t(0), int64_t(0), n * C);
        for (int64_t t = 0; t < n; ++t) run(t * C, t * width, int64_t(C));
    }

    const ResidualShape& shape_;
    const Kernels& kernels_;
    Panels panels_;
    int64_t block_, blocks_a_row_;
};

template <typename Word>
class Forward : Residual<Word> {
    using Base = Residual<Word>;
    using Base::block_, Base::kernels_, Base::panels_, Base::shape_;

  public:
    Forward(const ResidualShape& shape, const ResidualWeights& weights, const Kernels& kernels)
        : Base(shape, kernels),
          bias1_(panels_.padded(weights.bias1)),
          bias2_(panels_.padded(weights.bias2)) {
        panels_.pack(weights.weight1, false, &weights1_);
        panels_.pack(weights.weight2, false, &weights2_);
    }

    void run(const float* x, float* hidden, float* out, int n_threads) const {
        parallel(n_threads, [&](int thread) {
            Window<Word> near = this->window(shape_.dilation), between = this->window(1);
            std::vector<float> made = this->scratch();
            const Share share(this->n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                unit(this->block(i), x, hidden, out, near, between, made.data());
            }
        });
    }

  private:
    void unit(const Block& block, const float* x, float* hidden, float* out, Window<Word>& window,
              Window<Word>& between, float* made) const {
        const int C = shape_.n_channels, width = panels_.width();
        const int64_t T = shape_.n_frames, stop = n_real(shape_, block.row);
        const int64_t at = (block.row * T + block.start) * C;
        window.fill(block.start - 1, block.n + 2, T, this->frames(x, block.row), true);
        this->convolve(window, weights1_, bias1_, block.n + 2, made);
        if (hidden) {
            this->over_runs(block.n, [&](int64_t i, int64_t j, int64_t n) {
                std::copy_n(made + width + j, n, hidden + at + i);
            });
        }
        between.fill(block.start, block.n, stop, {made, block.start - 1, width}, true);
        this->convolve(between, weights2_, bias2_, block.n, made);
        const int64_t n_real = std::clamp<int64_t>(stop - block.start, 0, block.n);
        this->over_runs(n_real, [&](int64_t i, int64_t j, int64_t n) {
            kernels_.add_rows(x + at + i, made + j, n, out + at + i);
        });
        std::copy(x + at + n_real * C, x + at + block.n * C, out + at + n_real * C);
    }

    std::vector<Word> weights1_, weights2_;
    std::vector<float> bias1_, bias2_;
};

template <typename Word>
class Backward : Residual<Word> {
    using Base = Residual<Word>;
    using Base::block_, Base::kernels_, Base::panels_, Base::shape_;

  public:
    Backward(const ResidualShape& shape, const ResidualWeights& weights, const Kernels& kernels)
        : Base(shape, kernels), zero_(panels_.padded(nullptr)) {
        panels_.pack(weights.weight1, true, &weights1_);
        panels_.pack(weights.weight2, true, &weights2_);
    }

    void run(const float* x, const float* hidden, const float* grad, const ResidualGradients& out,
             int n_threads) const {
        const int C = shape_.n_channels;
        // Every value is written before it is read.
        const std::unique_ptr<float[]> grad_hidden(
            new float[size_t(shape_.n_rows) * shape_.n_frames * C]);
        std::vector<WeightSums<Word>> sums1, sums2;
        for (int thread = 0; thread < n_threads; ++thread) {
            sums1.emplace_back(kernels_, panels_, C, block_);
            sums2.emplace_back(kernels_, panels_, C, block_);
        }
        // Gradients of the hidden values are needed a dilation away: a pass of their own.
        parallel(n_threads, [&](int thread) {
            Window<Word> grads = this->window(1), inputs = this->window(1);
            std::vector<float> made = this->scratch();
            const Share share(this->n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                outer(this->block(i), hidden, grad, grad_hidden.get(), grads, inputs, sums2[thread],
                      made.data());
            }
        });
        parallel(n_threads, [&](int thread) {
            Window<Word> grads = this->window(shape_.dilation);
            Window<Word> inputs = this->window(shape_.dilation);
            std::vector<float> made = this->scratch();
            const Share share(this->n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                inner(this->block(i), x, grad, grad_hidden.get(), out.x, grads, inputs,
                      sums1[thread], made.data());
            }
        });
        const size_t n_weights = size_t(C) * C * kTaps;
        std::fill_n(out.weight1, n_weights, 0.0f);
        std::fill_n(out.weight2, n_weights, 0.0f);
        std::fill_n(out.bias1, C, 0.0f);
        std::fill_n(out.bias2, C, 0.0f);
        for (const auto& sums : sums1) sums.add_to(out.weight1, out.bias1);
        for (const auto& sums : sums2) sums.add_to(out.weight2, out.bias2);
    }

  private:
    // Through the second convolution: grad_hidden, and the sums of its weights.
    void outer(const Block& block, const float* hidden, const float* grad, float* grad_hidden,
               Window<Word>& grads, Window<Word>& inputs, WeightSums<Word>& sums,
               float* made) const {
        const int C = shape_.n_channels;
        const int64_t stop = n_real(shape_, block.row);
        const int64_t at = (block.row * shape_.n_frames + block.start) * C;
        grads.fill(block.start, block.n, stop, this->frames(grad, block.row), false);
        this->convolve(grads, weights2_, zero_, block.n, made);
        const int64_t n_real = std::clamp<int64_t>(stop - block.start, 0, block.n);
        this->over_runs(n_real, [&](int64_t i, int64_t j, int64_t n) {
            kernels_.leaky_gradient_rows(hidden + at + i, made + j, nullptr, n,
                                         grad_hidden + at + i);
        });
        std::fill(grad_hidden + at + n_real * C, grad_hidden + at + block.n * C, 0.0f);
        inputs.fill(block.start, block.n, stop, this->frames(hidden, block.row), true);
        sums.add(inputs, grads, grad + at, n_real, block.n);
    }

    // Through the first convolution.
    void inner(const Block& block, const float* x, const float* grad, const float* grad_hidden,
               float* grad_x, Window<Word>& grads, Window<Word>& inputs, WeightSums<Word>& sums,
               float* made) const {
        const int64_t T = shape_.n_frames;
        const int64_t at = (block.row * T + block.start) * shape_.n_channels;
        grads.fill(block.start, block.n, T, this->frames(grad_hidden, block.row), false);
        this->convolve(grads, weights1_, zero_, block.n, made);
        this->over_runs(block.n, [&](int64_t i, int64_t j, int64_t n) {
            kernels_.leaky_gradient_rows(x + at + i, made + j, grad + at + i, n, grad_x + at + i);
        });
        inputs.fill(block.start, block.n, T, this->frames(x, block.row), true);
        sums.add(inputs, grads, grad_hidden + at, block.n, block.n);
    }

    std::vector<Word> weights1_, weights2_;
    std::vector<float> zero_;
};

}  // namespace

void residual_unit(const ResidualShape& shape, const ResidualWeights& weights, const float* x,
                   float* hidden, float* out, const Kernels& kernels, int n_threads) {
    const auto run = [&](const auto& forward) {
        forward.run(x, hidden, out, threads_for(shape, n_threads));
    };
    takes_pairs(shape, kernels) ? run(Forward<uint32_t>(shape, weights, kernels))
                                : run(Forward<float>(shape, weights, kernels));
}

void residual_unit_backward(const ResidualShape& shape, const ResidualWeights& weights,
                            const float* x, const float* hidden, const float* grad,
                            const ResidualGradients& out, const Kernels& kernels, int n_threads) {
    const auto run = [&](const auto& backward) {
        backward.run(x, hidden, grad, out, threads_for(shape, n_threads));
    };
    takes_pairs(shape, kernels) ? run(Backward<uint32_t>(shape, weights, kernels))
                                : run(Backward<float>(shape, weights, kernels));
}

}  // namespace gmm_jepa
