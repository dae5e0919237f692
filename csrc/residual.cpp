// Frames go through in blocks that stay in cache. A block's input is copied into a window with the
// frames that its taps reach, activated on the way; the products read windows and panels of weights.
#include "residual.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr int kTaps = 3;
constexpr float kSlope = 0.1f;
constexpr int kBlockFloats = 16384;  // of a block's frames: 64 KB
constexpr int kMostRows = 16;        // that products may go beyond a matrix

inline float activated(float value) { return std::max(value, kSlope * value); }

// Weights (C_out, C_in, 3) in panels, for products of windows: rows by tap and input channel.
class Panels {
  public:
    Panels(const Kernels& kernels, int n_channels)
        : columns_(kernels.product_columns),
          n_panels_((n_channels + columns_ - 1) / columns_),
          n_channels_(n_channels) {}

    int n_panels() const { return n_panels_; }
    int width() const { return n_panels_ * columns_; }

    // `transposed` is the adjoint: inputs and outputs change places, taps run backwards.
    std::vector<float> packed(const float* weight, bool transposed) const {
        const int C = n_channels_;
        std::vector<float> out(size_t(width()) * kTaps * C);
        float* row = out.data();
        for (int first = 0; first < C; first += columns_) {
            const int n = std::min(columns_, C - first);
            for (int tap = 0; tap < kTaps; ++tap) {
                for (int k = 0; k < C; ++k, row += columns_) {
                    const float* from = transposed
                                            ? weight + (size_t(k) * C + first) * kTaps + 2 - tap
                                            : weight + (size_t(first) * C + k) * kTaps + tap;
                    const size_t step = transposed ? kTaps : size_t(kTaps) * C;
                    for (int c = 0; c < n; ++c) row[c] = from[c * step];
                }
            }
        }
        return out;
    }

    std::vector<float> padded(const float* bias) const {
        std::vector<float> out(width());
        if (bias) std::copy_n(bias, n_channels_, out.begin());
        return out;
    }

    // A row of C values to its place in panels of n_rows rows.
    void put_row(const float* values, int row, int n_rows, float* to) const {
        for (int c = 0; c < n_channels_; c += columns_) {
            std::copy_n(values + c, std::min(columns_, n_channels_ - c), to + size_t(row) * columns_);
            to += size_t(n_rows) * columns_;
        }
    }

  private:
    int columns_, n_panels_, n_channels_;
};

struct Block {
    int64_t row, start;
    int n;  // frames
};

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

    int64_t length(int64_t row) const {
        return shape_.lengths ? shape_.lengths[row] : shape_.n_frames;
    }

  protected:
    // Frames of a block and what three taps `dilation` apart reach around them. Frame
    // start + r + (tap - 1) dilation is row r + tap * stride(): one run of rows where taps are near,
    // one of each tap where they are far.
    class Window {
      public:
        Window(const Residual& owner, int64_t dilation)
            : dilation_(dilation), n_channels_(owner.shape_.n_channels) {
            const int64_t most = owner.block_ + 2;
            rows_.resize((most + 2 * std::min(dilation, most) + kMostRows) * n_channels_);
        }

        // n frames from `start` on; zero where the row has none, and from `stop` on. `source(t)`
        // points to the channels of frame t.
        template <bool kActivate, typename Source>
        void fill(int64_t start, int n, int64_t stop, const Source& source) {
            stride_ = std::min<int64_t>(dilation_, n);
            if (stride_ == dilation_) {
                return copy<kActivate>(start - dilation_, n + 2 * dilation_, stop, source,
                                       rows_.data());
            }
            for (int tap = 0; tap < kTaps; ++tap) {
                copy<kActivate>(start + (tap - 1) * dilation_, n, stop, source,
                                &rows_[tap * stride_ * n_channels_]);
            }
        }

        const float* rows() const { return rows_.data(); }
        int64_t stride() const { return stride_; }

      private:
        template <bool kActivate, typename Source>
        void copy(int64_t start, int64_t n, int64_t stop, const Source& source, float* to) const {
            for (int64_t t = start; t < start + n; ++t, to += n_channels_) {
                if (t < 0 || t >= stop) {
                    std::fill_n(to, n_channels_, 0.0f);
                    continue;
                }
                const float* from = source(t);
                for (int c = 0; c < n_channels_; ++c) {
                    to[c] = kActivate ? activated(from[c]) : from[c];
                }
            }
        }

        int64_t dilation_, stride_ = 0;
        int n_channels_;
        std::vector<float> rows_;
    };

    // to (n, width) = convolution of a window with packed weights.
    void convolve(const Window& window, const std::vector<float>& weights,
                  const std::vector<float>& bias, int n, float* to) const {
        const int C = shape_.n_channels;
        kernels_.products({window.rows(), C, 1, window.stride() * C, weights.data(), bias.data(), to,
                           panels_.width(), n, panels_.n_panels(), kTaps, C, false});
    }

    const ResidualShape& shape_;
    const Kernels& kernels_;
    Panels panels_;
    int64_t block_, blocks_a_row_;
};

class Forward : Residual {
  public:
    Forward(const ResidualShape& shape, const ResidualWeights& weights, const Kernels& kernels)
        : Residual(shape, kernels),
          weights1_(panels_.packed(weights.weight1, false)),
          weights2_(panels_.packed(weights.weight2, false)),
          bias1_(panels_.padded(weights.bias1)),
          bias2_(panels_.padded(weights.bias2)) {}

    void run(const float* x, float* hidden, float* out, int n_threads) const {
        parallel(n_threads, [&](int thread) {
            Window near(*this, shape_.dilation), between(*this, 1);
            std::vector<float> made((block_ + 2 + kMostRows) * panels_.width());
            const Share share(n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                unit(block(i), x, hidden, out, near, between, made.data());
            }
        });
    }

  private:
    void unit(const Block& block, const float* x, float* hidden, float* out, Window& window,
              Window& between, float* made) const {
        const int C = shape_.n_channels, width = panels_.width();
        const int64_t T = shape_.n_frames, stop = length(block.row), first = block.row * T;
        window.fill<true>(block.start - 1, block.n + 2, T,
                          [&](int64_t t) { return x + (first + t) * C; });
        convolve(window, weights1_, bias1_, block.n + 2, made);
        const auto made_at = [&](int64_t t) { return made + (t - block.start + 1) * width; };
        for (int64_t t = block.start; hidden && t < block.start + block.n; ++t) {
            std::copy_n(made_at(t), C, hidden + (first + t) * C);
        }
        between.fill<true>(block.start, block.n, stop, made_at);
        convolve(between, weights2_, bias2_, block.n, made);
        for (int t = 0; t < block.n; ++t) {
            const int64_t at = (first + block.start + t) * C;
            const float keep = block.start + t < stop ? 1.0f : 0.0f;
            for (int c = 0; c < C; ++c) out[at + c] = x[at + c] + keep * made[int64_t(t) * width + c];
        }
    }

    std::vector<float> weights1_, weights2_, bias1_, bias2_;
};

// Gradients of one convolution's weights, summed by one thread.
class WeightSums {
  public:
    WeightSums(int n_channels, int width, int64_t most_frames)
        : n_channels_(n_channels),
          width_(width),
          stride_rows_(n_channels + kMostRows),
          weight_(size_t(kTaps) * stride_rows_ * width),
          bias_(width),
          grads_(size_t(most_frames) * width),
          zeros_(width) {}

    // inputs: rows of a window whose taps lie `stride` rows apart; grads (n, C).
    void add(const Kernels& kernels, const Panels& panels, const float* inputs, int64_t stride,
             const float* grads, int n) {
        const int C = n_channels_;
        for (int t = 0; t < n; ++t, grads += C) {
            for (int c = 0; c < C; ++c) bias_[c] += grads[c];
            panels.put_row(grads, t, n, grads_.data());
        }
        for (int tap = 0; tap < kTaps; ++tap) {
            kernels.products({inputs + tap * stride * C, 1, C, 0, grads_.data(), zeros_.data(),
                              &weight_[size_t(tap) * stride_rows_ * width_], width_, C,
                              panels.n_panels(), 1, n, true});
        }
    }

    void add_to(float* weight, float* bias) const {
        constexpr int kTogether = 16;  // outputs, whose places in `weight` are far apart
        const int C = n_channels_;
        for (int o = 0; o < C; ++o) bias[o] += bias_[o];
        for (int first = 0; first < C; first += kTogether) {
            for (int i = 0; i < C; ++i) {
                for (int tap = 0; tap < kTaps; ++tap) {
                    const float* sums = &weight_[(size_t(tap) * stride_rows_ + i) * width_];
                    for (int o = first; o < std::min(C, first + kTogether); ++o) {
                        weight[(size_t(o) * C + i) * kTaps + tap] += sums[o];
                    }
                }
            }
        }
    }

  private:
    int n_channels_, width_, stride_rows_;
    std::vector<float> weight_, bias_;  // (3, stride_rows, width), (width,)
    std::vector<float> grads_;          // panels of (frames, columns)
    std::vector<float> zeros_;
};

class Backward : Residual {
  public:
    Backward(const ResidualShape& shape, const ResidualWeights& weights, const Kernels& kernels)
        : Residual(shape, kernels),
          weights1_(panels_.packed(weights.weight1, true)),
          weights2_(panels_.packed(weights.weight2, true)),
          zero_(panels_.padded(nullptr)) {}

    void run(const float* x, const float* hidden, const float* grad, const ResidualGradients& out,
             int n_threads) const {
        const int C = shape_.n_channels;
        std::vector<float> grad_hidden(size_t(shape_.n_rows) * shape_.n_frames * C);
        std::vector<WeightSums> sums1, sums2;
        for (int thread = 0; thread < n_threads; ++thread) {
            sums1.emplace_back(C, panels_.width(), block_);
            sums2.emplace_back(C, panels_.width(), block_);
        }
        // Gradients of the hidden values are needed a dilation away: a pass of their own.
        parallel(n_threads, [&](int thread) {
            Window grads(*this, 1), inputs(*this, 1);
            std::vector<float> made((block_ + kMostRows) * panels_.width());
            const Share share(n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                outer(block(i), hidden, grad, grad_hidden.data(), grads, inputs, sums2[thread],
                      made.data());
            }
        });
        parallel(n_threads, [&](int thread) {
            Window grads(*this, shape_.dilation), inputs(*this, shape_.dilation);
            std::vector<float> made((block_ + kMostRows) * panels_.width());
            const Share share(n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                inner(block(i), x, grad, grad_hidden.data(), out.x, grads, inputs, sums1[thread],
                      made.data());
            }
        });
        const size_t n_weights = size_t(C) * C * kTaps;
        std::fill_n(out.weight1, n_weights, 0.0f);
        std::fill_n(out.weight2, n_weights, 0.0f);
        std::fill_n(out.bias1, C, 0.0f);
        std::fill_n(out.bias2, C, 0.0f);
        for (const WeightSums& sums : sums1) sums.add_to(out.weight1, out.bias1);
        for (const WeightSums& sums : sums2) sums.add_to(out.weight2, out.bias2);
    }

  private:
    // Through the second convolution: grad_hidden, and the sums of its weights.
    void outer(const Block& block, const float* hidden, const float* grad, float* grad_hidden,
               Window& grads, Window& inputs, WeightSums& sums, float* made) const {
        const int C = shape_.n_channels, width = panels_.width();
        const int64_t stop = length(block.row), first = block.row * shape_.n_frames;
        grads.fill<false>(block.start, block.n, stop,
                          [&](int64_t t) { return grad + (first + t) * C; });
        convolve(grads, weights2_, zero_, block.n, made);
        for (int t = 0; t < block.n; ++t) {
            const int64_t at = (first + block.start + t) * C;
            const float keep = block.start + t < stop ? 1.0f : 0.0f;
            for (int c = 0; c < C; ++c) {
                const float slope = hidden[at + c] > 0.0f ? keep : kSlope * keep;
                grad_hidden[at + c] = slope * made[int64_t(t) * width + c];
            }
        }
        inputs.fill<true>(block.start, block.n, stop,
                          [&](int64_t t) { return hidden + (first + t) * C; });
        sums.add(kernels_, panels_, inputs.rows(), inputs.stride(),
                 grads.rows() + grads.stride() * C, block.n);
    }

    // Through the first convolution.
    void inner(const Block& block, const float* x, const float* grad, const float* grad_hidden,
               float* grad_x, Window& grads, Window& inputs, WeightSums& sums, float* made) const {
        const int C = shape_.n_channels, width = panels_.width();
        const int64_t T = shape_.n_frames, first = block.row * T;
        grads.fill<false>(block.start, block.n, T,
                          [&](int64_t t) { return grad_hidden + (first + t) * C; });
        convolve(grads, weights1_, zero_, block.n, made);
        for (int t = 0; t < block.n; ++t) {
            const int64_t at = (first + block.start + t) * C;
            for (int c = 0; c < C; ++c) {
                const float slope = x[at + c] > 0.0f ? 1.0f : kSlope;
                grad_x[at + c] = grad[at + c] + slope * made[int64_t(t) * width + c];
            }
        }
        inputs.fill<true>(block.start, block.n, T,
                          [&](int64_t t) { return x + (first + t) * C; });
        sums.add(kernels_, panels_, inputs.rows(), inputs.stride(),
                 grads.rows() + grads.stride() * C, block.n);
    }

    std::vector<float> weights1_, weights2_, zero_;
};

int threads_for(const ResidualShape& shape, int n_threads) {
    const int64_t work = shape.n_rows * shape.n_frames * shape.n_channels;
    return static_cast<int>(std::clamp<int64_t>(n_threads, 1, 1 + work / kBlockFloats));
}

}  // namespace

void residual_forward(const ResidualShape& shape, const ResidualWeights& weights, const float* x,
                      float* hidden, float* out, const Kernels& kernels, int n_threads) {
    const Forward forward(shape, weights, kernels);
    forward.run(x, hidden, out, threads_for(shape, n_threads));
}

void residual_backward(const ResidualShape& shape, const ResidualWeights& weights, const float* x,
                       const float* hidden, const float* grad, const ResidualGradients& out,
                       const Kernels& kernels, int n_threads) {
    const Backward backward(shape, weights, kernels);
    backward.run(x, hidden, grad, out, threads_for(shape, n_threads));
}

}  // namespace gmm_jepa
