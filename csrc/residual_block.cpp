// A block of frames goes through all units while it is in cache, with as many frames around it as the
// units reach; nothing but x is kept, and the way back makes all values again. With few channels units
// one by one are passes over memory: 8 x 4,000 x 16 in float32 are 2 MB, of which a unit reads and
// writes three and more.
#include "residual_block.h"

#include <algorithm>

#include "arrays.h"
#include "convolution_sums.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

// Frames from `start` to `stop`.
struct Extent {
    int64_t start, stop;
    int n() const { return static_cast<int>(stop - start); }
};

template <typename Word>
class Units {
  public:
    Units(const ResidualBlockShape& shape, const ResidualWeights& weights, bool turned,
          const Kernels& kernels)
        : shape_(shape),
          kernels_(kernels),
          panels_(kernels, shape.n_channels),
          C_(shape.n_channels),
          block_(std::clamp<int64_t>(kBlockFloats / C_, 16, std::max<int64_t>(16, shape.n_frames))),
          in_row_((shape.n_frames + block_ - 1) / block_),
          first_(n_units()),
          second_(n_units()) {
        const size_t n_weights = size_t(C_) * C_ * kTaps;
        for (int u = 0; u < n_units(); ++u) {
            panels_.pack(weights.weight1 + u * n_weights, turned, &first_[u]);
            panels_.pack(weights.weight2 + u * n_weights, turned, &second_[u]);
            bias1_.push_back(panels_.padded(turned ? nullptr : weights.bias1 + u * C_));
            bias2_.push_back(panels_.padded(turned ? nullptr : weights.bias2 + u * C_));
        }
    }

    int n_units() const { return static_cast<int>(shape_.dilations.size()); }
    int64_t n_blocks() const { return shape_.n_rows * in_row_; }
    int64_t block_frames() const { return block_; }

    int64_t row_of(int64_t i) const { return i / in_row_; }
    Extent own(int64_t i) const {
        const int64_t start = i % in_row_ * block_;
        return {start, std::min(start + block_, shape_.n_frames)};
    }
    Extent around(const Extent& own, int64_t reach) const {
        return {std::max<int64_t>(0, own.start - reach),
                std::min(shape_.n_frames, own.stop + reach)};
    }

    // Real frames of a row.
    // Of an extent, how many come before `stop`.
    static int64_t before(const Extent& e, int64_t stop) {
        return std::clamp<int64_t>(stop - e.start, 0, e.stop - e.start);
    }

    // Frames of a row of a tensor (B, T, C).
    Frames frames(const float* x, int64_t row) const {
        return {x + row * shape_.n_frames * C_, 0, C_};
    }
    Frames frames(const Buffer<float>& values, const Extent& e) const {
        return {values.data(), e.start, C_};
    }

    // Of `reach` frames around a block at most.
    Window<Word> window(int64_t dilation, int64_t reach) const {
        return {kernels_, C_, block_ + 2 * std::min(reach, shape_.n_frames), dilation};
    }
    Buffer<float> buffer(int64_t reach) const {
        const int64_t most = block_ + 2 * std::min(reach, shape_.n_frames) + 2 + kMostRows;
        return Buffer<float>(most * C_);
    }

    // hidden of these frames, of x.
    void hide(int u, const Extent& e, const Frames& x, Window<Word>& window, float* hidden) const {
        window.fill(e.start, e.n(), shape_.n_frames, x, true);
        convolve(kernels_, panels_, window, first_[u], bias1_[u], e.n(), hidden);
    }

    // The unit's output of these frames, of x and hidden.
    void finish(int u, const Extent& e, int64_t length, const Frames& x, const Frames& hidden,
                Window<Word>& between, float* made, float* out) const {
        between.fill(e.start, e.n(), length, hidden, true);
        convolve(kernels_, panels_, between, second_[u], bias2_[u], e.n(), made);
        const int64_t n_real = before(e, length);
        kernels_.add_rows(x.at(e.start), made, n_real * C_, out);
        std::copy(x.at(e.start + n_real), x.at(e.stop), out + n_real * C_);
    }

    // Gradients of hidden values of these frames, of those of the output; zero on padding.
    void through_second(int u, const Extent& e, int64_t length, const Frames& grad,
                        const Frames& hidden, Window<Word>& window, float* made,
                        float* out) const {
        window.fill(e.start, e.n(), length, grad, false);
        convolve(kernels_, panels_, window, second_[u], bias2_[u], e.n(), made);
        const int64_t n_real = before(e, length);
        kernels_.leaky_gradient_rows(hidden.at(e.start), made, nullptr, n_real * C_, out);
        std::fill(out + n_real * C_, out + e.n() * C_, 0.0f);
    }

    // Gradients of x of these frames.
    void through_first(int u, const Extent& e, const Frames& grad, const Frames& of_hidden,
                       const Frames& x, Window<Word>& window, float* made, float* out) const {
        window.fill(e.start, e.n(), shape_.n_frames, of_hidden, false);
        convolve(kernels_, panels_, window, first_[u], bias1_[u], e.n(), made);
        kernels_.leaky_gradient_rows(x.at(e.start), made, grad.at(e.start), e.n() * int64_t(C_),
                                     out);
    }

    int64_t length(int64_t row) const { return n_real(shape_, row); }
    const Kernels& kernels() const { return kernels_; }
    const Panels& panels() const { return panels_; }

  private:
    const ResidualBlockShape& shape_;
    const Kernels& kernels_;
    Panels panels_;
    int C_;
    int64_t block_, in_row_;
    std::vector<std::vector<Word>> first_, second_;  // packed weights
    std::vector<std::vector<float>> bias1_, bias2_;
};

template <typename Word>
void forward(const ResidualBlockShape& shape, const ResidualWeights& weights, const float* x,
             float* out, const Kernels& kernels, int n_threads) {
    const Units<Word> units(shape, weights, false, kernels);
    const int U = units.n_units(), C = shape.n_channels;
    std::vector<int64_t> reach(U + 1);  // frames around a block that unit u's input needs
    for (int u = U; u-- > 0;) reach[u] = reach[u + 1] + shape.dilations[u] + 1;
    parallel(n_threads, [&](int thread) {
        Window<Word> between = units.window(1, reach[0]);
        std::vector<Window<Word>> windows;
        for (int64_t dilation : shape.dilations) {
            windows.push_back(units.window(dilation, reach[0]));
        }
        Buffer<float> hidden = units.buffer(reach[0]), made = units.buffer(reach[0]);
        std::vector<Buffer<float>> values;
        for (int i = 0; i < 2; ++i) values.push_back(units.buffer(reach[0]));
        const Share share(units.n_blocks(), thread, n_threads);
        for (int64_t i = share.first; i < share.last; ++i) {
            const int64_t row = units.row_of(i), length = units.length(row);
            const Extent own = units.own(i);
            Frames in = units.frames(x, row);
            for (int u = 0; u < U; ++u) {
                const Extent e = units.around(own, reach[u + 1]);
                const Extent wider = units.around(e, 1);
                float* to = u + 1 < U ? values[u % 2].data()
                                      : out + (row * shape.n_frames + own.start) * C;
                units.hide(u, wider, in, windows[u], hidden.data());
                units.finish(u, e, length, in, units.frames(hidden, wider), between, made.data(),
                             to);
                in = {to, e.start, C};
            }
        }
    });
}

template <typename Word>
class Backward {
  public:
    Backward(const ResidualBlockShape& shape, const ResidualWeights& weights,
             const Kernels& kernels)
        : shape_(shape),
          units_(shape, weights, false, kernels),
          turned_(shape, weights, true, kernels),
          U_(units_.n_units()),
          C_(shape.n_channels),
          of_x_(U_ + 1),
          hidden_reach_(U_),
          x_reach_(U_) {
        // Frames around a block: where gradients of a unit's input are wanted, where its hidden
        // values, and where its input.
        for (int u = 0; u < U_; ++u) of_x_[u + 1] = of_x_[u] + shape.dilations[u] + 1;
        for (int u = U_; u-- > 0;) {
            const int64_t next = u + 1 < U_ ? x_reach_[u + 1] + 1 : 0;
            hidden_reach_[u] = std::max(of_x_[u] + shape.dilations[u], next);
            x_reach_[u] = hidden_reach_[u] + shape.dilations[u];
        }
    }

    void run(const float* x, const float* grad, const ResidualGradients& out,
             int n_threads) const {
        std::vector<std::vector<WeightSums<Word>>> sums(n_threads);
        for (auto& of_thread : sums) {
            for (int i = 0; i < 2 * U_; ++i) {
                of_thread.emplace_back(units_.kernels(), units_.panels(), C_, units_.block_frames());
            }
        }
        parallel(n_threads, [&](int thread) {
            Scratch scratch(*this);
            const Share share(units_.n_blocks(), thread, n_threads);
            for (int64_t i = share.first; i < share.last; ++i) {
                block(i, x, grad, out.x, scratch, sums[thread]);
            }
        });
        const size_t n_weights = size_t(C_) * C_ * kTaps;
        std::fill_n(out.weight1, U_ * n_weights, 0.0f);
        std::fill_n(out.weight2, U_ * n_weights, 0.0f);
        std::fill_n(out.bias1, U_ * C_, 0.0f);
        std::fill_n(out.bias2, U_ * C_, 0.0f);
        for (const auto& of_thread : sums) {
            for (int u = 0; u < U_; ++u) {
                of_thread[2 * u].add_to(out.weight1 + u * n_weights, out.bias1 + u * C_);
                of_thread[2 * u + 1].add_to(out.weight2 + u * n_weights, out.bias2 + u * C_);
            }
        }
    }

  private:
    // Of one thread: for every unit its input and hidden values, and for all the same gradients.
    struct Scratch {
        explicit Scratch(const Backward& b)
            : near(b.units_.window(1, b.most())),
              inputs_near(b.units_.window(1, b.most())),
              made(b.units_.buffer(b.most())),
              of_hidden(b.units_.buffer(b.most())) {
            for (int64_t dilation : b.shape_.dilations) {
                far.push_back(b.units_.window(dilation, b.most()));
                inputs_far.push_back(b.units_.window(dilation, b.most()));
                x.push_back(b.units_.buffer(b.most()));
                hidden.push_back(b.units_.buffer(b.most()));
            }
            for (int i = 0; i < 2; ++i) grads.push_back(b.units_.buffer(b.most()));
        }

        Window<Word> near, inputs_near;
        std::vector<Window<Word>> far, inputs_far;
        std::vector<Buffer<float>> x, hidden, grads;
        Buffer<float> made, of_hidden;
    };

    int64_t most() const { return x_reach_[0] + 1; }

    void block(int64_t i, const float* x, const float* grad, float* grad_x, Scratch& s,
               std::vector<WeightSums<Word>>& sums) const {
        const int64_t row = units_.row_of(i), length = units_.length(row);
        const Extent own = units_.own(i);
        std::vector<Frames> inputs, hidden;
        inputs.push_back(units_.frames(x, row));
        for (int u = 0; u < U_; ++u) {
            const Extent e = units_.around(own, hidden_reach_[u]);
            units_.hide(u, e, inputs[u], s.far[u], s.hidden[u].data());
            hidden.push_back(units_.frames(s.hidden[u], e));
            if (u + 1 == U_) break;
            const Extent next = units_.around(own, x_reach_[u + 1]);
            units_.finish(u, next, length, inputs[u], hidden[u], s.near, s.made.data(),
                          s.x[u + 1].data());
            inputs.push_back(units_.frames(s.x[u + 1], next));
        }
        Frames of_out = units_.frames(grad, row);
        const int n = own.n();
        const int64_t n_real = Units<Word>::before(own, length);
        for (int u = U_; u-- > 0;) {
            const Extent e = units_.around(own, of_x_[u] + shape_.dilations[u]);
            turned_.through_second(u, e, length, of_out, hidden[u], s.near, s.made.data(),
                                   s.of_hidden.data());
            s.inputs_near.fill(own.start, n, length, hidden[u], true);
            s.near.fill(own.start, n, length, of_out, false);
            sums[2 * u + 1].add(s.inputs_near, s.near, of_out.at(own.start), n_real, n);

            const Frames of_hidden = units_.frames(s.of_hidden, e);
            const Extent back = units_.around(own, of_x_[u]);
            float* to = u > 0 ? s.grads[u % 2].data()
                              : grad_x + (row * shape_.n_frames + own.start) * C_;
            turned_.through_first(u, back, of_out, of_hidden, inputs[u], s.far[u], s.made.data(),
                                  to);
            s.inputs_far[u].fill(own.start, n, shape_.n_frames, inputs[u], true);
            s.far[u].fill(own.start, n, shape_.n_frames, of_hidden, false);
            sums[2 * u].add(s.inputs_far[u], s.far[u], of_hidden.at(own.start), n, n);
            of_out = {to, back.start, C_};
        }
    }

    const ResidualBlockShape& shape_;
    Units<Word> units_, turned_;
    int U_, C_;
    std::vector<int64_t> of_x_, hidden_reach_, x_reach_;
};

}  // namespace

void residual_block(const ResidualBlockShape& shape, const ResidualWeights& weights,
                    const float* x, float* out, const Kernels& kernels, int n_threads) {
    n_threads = threads_for(shape, n_threads);
    takes_pairs(shape, kernels) ? forward<uint32_t>(shape, weights, x, out, kernels, n_threads)
                                : forward<float>(shape, weights, x, out, kernels, n_threads);
}

void residual_block_backward(const ResidualBlockShape& shape, const ResidualWeights& weights,
                             const float* x, const float* grad, const ResidualGradients& out,
                             const Kernels& kernels, int n_threads) {
    n_threads = threads_for(shape, n_threads);
    takes_pairs(shape, kernels)
        ? Backward<uint32_t>(shape, weights, kernels).run(x, grad, out, n_threads)
        : Backward<float>(shape, weights, kernels).run(x, grad, out, n_threads);
}

}  // namespace gmm_jepa
