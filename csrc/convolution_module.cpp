// Passes over blocks of frames, where the maps are, and over rows, where the norms and the taps are;
// what passes hand on stays in the outer caches.
#include "convolution_module.h"

#include <algorithm>
#include <cmath>

#include "depthwise.h"
#include "linear_maps.h"

namespace gmm_jepa {
namespace {

void glu(const Kernels& kernels, const float* x, int n_rows, int n, float* kept, float* out) {
    kernels.glu_rows(x, n_rows, n, kept, out);
}
void glu(const Kernels& kernels, const float* x, int n_rows, int n, uint32_t* kept, float* out) {
    kernels.glu_words(x, n_rows, n, kept, out);
}

void glu_backward(const Kernels& kernels, const float* kept, const float* grad, int n_rows, int n,
                  float* out) {
    kernels.glu_backward_rows(kept, grad, n_rows, n, out);
}
void glu_backward(const Kernels& kernels, const uint32_t* kept, const float* grad, int n_rows,
                  int n, float* out) {
    kernels.glu_backward_words(kept, grad, n_rows, n, out);
}

void glu_again(const Kernels& kernels, const float* kept, int n_rows, int n, float* out) {
    kernels.glu_again_rows(kept, n_rows, n, out);
}
void glu_again(const Kernels& kernels, const uint32_t* kept, int n_rows, int n, float* out) {
    kernels.glu_again_words(kept, n_rows, n, out);
}

template <typename Word>
class Module {
  public:
    Module(const ConvolutionModuleShape& shape, const ConvolutionModuleWeights& weights,
           const float* x, const ConvolutionModuleKept& kept, const Kernels& kernels,
           int n_threads)
        : shape_(shape),
          weights_(weights),
          x_(x),
          up_made_(static_cast<Word*>(kept.up)),
          convolved_(kept.convolved),
          statistics_(kept.statistics),
          kernels_(kernels),
          n_threads_(n_threads),
          D_(shape.n_dims),
          N_(shape.n_rows * shape.n_frames),
          block_(map_block<Word>(kernels)) {}

    void forward(float* out) const {
        const PackedWeight<Word> up(kernels_, weights_.up, 2 * D_, D_, false, n_threads_);
        const PackedWeight<Word> down(kernels_, weights_.down, D_, D_, false, n_threads_);
        take_statistics(x_, 0);
        Buffer<float> gated(size_t(N_) * D_);
        each_block([&](int64_t, int64_t first, int n, Scratch& s) {
            each_run(first, n, [&](int64_t row, int64_t at, int count, int) {
                kernels_.norm_rows(norm_in(row), x_ + at * D_, count,
                                   &s.made[(at - first) * D_]);
            });
            put_values(kernels_, s.made.data(), ptrdiff_t(n) * D_, false, s.rows.data());
            up.multiply(s.rows.data(), n, weights_.up_bias, s.made.data());
            glu(kernels_, s.made.data(), n, D_, up_made_ + first * 2 * D_ / kValues<Word>,
                &gated[first * D_]);
            zero_padding(first, n, &gated[first * D_]);
        });
        depthwise_conv(taps_shape(), gated.data(), weights_.taps, weights_.taps_bias, convolved_,
                       kernels_, n_threads_);
        take_statistics(convolved_, 2);
        each_block([&](int64_t, int64_t first, int n, Scratch& s) {
            each_run(first, n, [&](int64_t row, int64_t at, int count, int) {
                kernels_.norm_silu_rows(norm_out(row), convolved_ + at * D_, count,
                                        &s.made[(at - first) * D_]);
            });
            put_values(kernels_, s.made.data(), ptrdiff_t(n) * D_, false, s.rows.data());
            down.multiply(s.rows.data(), n, weights_.down_bias, s.made.data());
            zero_padding(first, n, s.made.data());
            kernels_.add_scaled_rows(rows(first, n), x_ + first * D_, s.made.data(), 1.0f,
                                     out + first * D_);
        });
    }

    void backward(const float* grad, const ConvolutionModuleGradients& out) const {
        const PackedWeight<Word> up(kernels_, weights_.up, 2 * D_, D_, true, n_threads_);
        const PackedWeight<Word> down(kernels_, weights_.down, D_, D_, true, n_threads_);
        const int64_t n_blocks = (N_ + block_ - 1) / block_;

        // Through the last map and the norm before it.
        Factor<Word> of_output(kernels_, N_, D_, false), activated(kernels_, N_, D_, true);
        ColumnSums down_bias(kernels_, n_blocks, D_);
        ColumnSums out_weight(kernels_, n_blocks, D_), out_bias(kernels_, n_blocks, D_);
        Buffer<float> gated(size_t(N_) * D_), of_normal(size_t(N_) * D_);
        each_block([&](int64_t i, int64_t first, int n, Scratch& s) {
            kernels_.add_scaled_rows(rows(first, n), nullptr, grad + first * D_, 1.0f,
                                     s.made.data());
            zero_padding(first, n, s.made.data());
            down_bias.put(i, s.made.data(), n);
            put_values(kernels_, s.made.data(), ptrdiff_t(n) * D_, false, s.rows.data());
            of_output.put(first, s.rows.data(), n);
            down.multiply(s.rows.data(), n, nullptr, s.made.data());
            each_run(first, n, [&](int64_t row, int64_t at, int count, int) {
                const int64_t here = (at - first) * D_;
                const NormGradients to{&s.value[here], &of_normal[at * D_], out_weight.part(i),
                                       out_bias.part(i)};
                kernels_.norm_silu_backward_rows(norm_out(row), convolved_ + at * D_,
                                                 &s.made[here], count, to);
            });
            put_values(kernels_, s.value.data(), ptrdiff_t(n) * D_, false, s.rows.data());
            activated.put(first, s.rows.data(), n);
            glu_again(kernels_, up_made_ + first * 2 * D_ / kValues<Word>, n, D_,
                      &gated[first * D_]);
            zero_padding(first, n, &gated[first * D_]);
        });
        multiply_over_rows(of_output, activated, out.down, n_threads_);
        down_bias.add_up(out.down_bias);
        out_weight.add_up(out.norm_out);
        out_bias.add_up(out.norm_out_bias);
        through_norms(2, convolved_, nullptr, of_normal.data());

        // Through the taps.
        Buffer<float> of_gated(size_t(N_) * D_);
        depthwise_conv_backward(taps_shape(), of_normal.data(), gated.data(), weights_.taps,
                                {of_gated.data(), out.taps, out.taps_bias}, kernels_, n_threads_);

        // Through the first map and the norm before it.
        Factor<Word> of_up(kernels_, N_, 2 * D_, false), inputs(kernels_, N_, D_, true);
        ColumnSums up_bias(kernels_, n_blocks, 2 * D_);
        ColumnSums in_weight(kernels_, n_blocks, D_), in_bias(kernels_, n_blocks, D_);
        each_block([&](int64_t i, int64_t first, int n, Scratch& s) {
            zero_padding(first, n, &of_gated[first * D_]);
            glu_backward(kernels_, up_made_ + first * 2 * D_ / kValues<Word>,
                         &of_gated[first * D_], n, D_, s.made.data());
            zero_padding(first, n, s.made.data(), 2 * D_);
            up_bias.put(i, s.made.data(), n);
            put_values(kernels_, s.made.data(), ptrdiff_t(n) * 2 * D_, false, s.rows.data());
            of_up.put(first, s.rows.data(), n);
            up.multiply(s.rows.data(), n, nullptr, s.made.data());
            each_run(first, n, [&](int64_t row, int64_t at, int, int real) {
                const int64_t here = (at - first) * D_;
                const NormGradients to{&s.value[here], out.x + at * D_, in_weight.part(i),
                                       in_bias.part(i)};
                kernels_.norm_backward_rows(norm_in(row), x_ + at * D_, &s.made[here], real, to);
            });
            zero_padding(first, n, s.value.data());
            put_values(kernels_, s.value.data(), ptrdiff_t(n) * D_, false, s.rows.data());
            inputs.put(first, s.rows.data(), n);
        });
        multiply_over_rows(of_up, inputs, out.up, n_threads_);
        up_bias.add_up(out.up_bias);
        in_weight.add_up(out.norm_in);
        in_bias.add_up(out.norm_in_bias);
        through_norms(0, x_, grad, out.x);
    }

  private:
    struct Scratch {
        Buffer<Word> rows;   // up to 2 D values each
        Buffer<float> made;  // the same
        Buffer<float> value;
    };

    template <typename Run>
    void each_block(const Run& run) const {
        const size_t n = size_t(block_ + kMostRows) * 2 * D_;
        over_blocks(N_, block_, n_threads_, [n] {
            return Scratch{Buffer<Word>(n / kValues<Word>), Buffer<float>(n), Buffer<float>(n / 2)};
        }, run);
    }

    // Calls run(row, first frame, frames, real frames) for the parts of a block that are of one row.
    template <typename Run>
    void each_run(int64_t first, int n, const Run& run) const {
        const int64_t T = shape_.n_frames, stop = first + n;
        for (int64_t at = first; at < stop;) {
            const int64_t row = at / T, end = std::min(stop, (row + 1) * T);
            const int64_t real = std::clamp<int64_t>(row * T + n_real(shape_, row) - at, 0, end - at);
            run(row, at, static_cast<int>(end - at), static_cast<int>(real));
            at = end;
        }
    }

    DroppedRows rows(int64_t first, int n) const { return {first, n, D_, shape_.dropping}; }

    // n frames from `first` on, of D values.
    void zero_padding(int64_t first, int n, float* frames) const {
        zero_padding(first, n, frames, D_);
    }
    void zero_padding(int64_t first, int n, float* frames, int width) const {
        if (!shape_.lengths) return;
        each_run(first, n, [&](int64_t, int64_t at, int count, int real) {
            std::fill(frames + (at - first + real) * width, frames + (at - first + count) * width,
                      0.0f);
        });
    }

    template <typename Run>
    void each_row(const Run& run) const {
        over_blocks(shape_.n_rows, 1, n_threads_, [] { return 0; },
                    [&](int64_t row, int64_t, int, int) { run(row); });
    }

    // Mean and inverse deviation of the rows of `frames`, to this place of their statistics.
    void take_statistics(const float* frames, int place) const {
        each_row([&](int64_t row) {
            const float* values = frames + row * shape_.n_frames * D_;
            const int64_t n = n_real(shape_, row) * D_, count = std::max<int64_t>(n, 1);
            const double mean = kernels_.sum_of_values(values, n) / count;
            const double squares = kernels_.squares_about(values, n, mean);
            statistics_[4 * row + place] = static_cast<float>(mean);
            statistics_[4 * row + place + 1] =
                static_cast<float>(1.0 / std::sqrt(squares / count + shape_.epsilon));
        });
    }

    RowNorm norm_at(int64_t row, int place, const float* weight, const float* bias) const {
        const float* found = statistics_ + 4 * row + place;
        return {found[0], found[1], weight, bias, D_};
    }
    RowNorm norm_in(int64_t row) const {
        return norm_at(row, 0, weights_.norm_in, weights_.norm_in_bias);
    }
    RowNorm norm_out(int64_t row) const {
        return norm_at(row, 2, weights_.norm_out, weights_.norm_out_bias);
    }

    // Gradients of normalised frames become those of the frames, plus `added` where there is some.
    void through_norms(int place, const float* frames, const float* added, float* grads) const {
        each_row([&](int64_t row) {
            const int64_t at = row * shape_.n_frames * D_, n = n_real(shape_, row) * D_;
            const int64_t stop = shape_.n_frames * D_;
            kernels_.norm_gradient(norm_at(row, place, nullptr, nullptr), frames + at,
                                   added ? added + at : nullptr, n, grads + at);
            if (added) {
                std::copy(added + at + n, added + at + stop, grads + at + n);
            } else {
                std::fill(grads + at + n, grads + at + stop, 0.0f);
            }
        });
    }

    DepthwiseShape taps_shape() const {
        return {shape_.n_rows, shape_.n_frames, D_, shape_.n_taps};
    }

    const ConvolutionModuleShape& shape_;
    const ConvolutionModuleWeights& weights_;
    const float* x_;
    Word* up_made_;
    float *convolved_, *statistics_;
    const Kernels& kernels_;
    int n_threads_, D_;
    int64_t N_, block_;
};

}  // namespace

void convolution_module(const ConvolutionModuleShape& shape,
                        const ConvolutionModuleWeights& weights, const float* x,
                        const ConvolutionModuleKept& kept, float* out, const Kernels& kernels,
                        int n_threads) {
    shape.narrow ? Module<uint32_t>(shape, weights, x, kept, kernels, n_threads).forward(out)
                 : Module<float>(shape, weights, x, kept, kernels, n_threads).forward(out);
}

void convolution_module_backward(const ConvolutionModuleShape& shape,
                                 const ConvolutionModuleWeights& weights, const float* x,
                                 const ConvolutionModuleKept& kept, const float* grad,
                                 const ConvolutionModuleGradients& out, const Kernels& kernels,
                                 int n_threads) {
    shape.narrow
        ? Module<uint32_t>(shape, weights, x, kept, kernels, n_threads).backward(grad, out)
        : Module<float>(shape, weights, x, kept, kernels, n_threads).backward(grad, out);
}

}  // namespace gmm_jepa
