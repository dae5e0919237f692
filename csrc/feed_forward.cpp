// A block of frames goes through both maps while its hidden values are in cache. On the way back every
// block leaves its rows of the four matrices whose products over all frames are the gradients of the
// weights.
#include "feed_forward.h"

#include "linear_maps.h"

namespace gmm_jepa {
namespace {

void gelu(const Kernels& kernels, const DroppedRows& rows, const float* x, float* kept,
          float* out) {
    kernels.gelu_rows(rows, x, kept, out);
}
void gelu(const Kernels& kernels, const DroppedRows& rows, const float* x, uint32_t* kept,
          uint32_t* out) {
    kernels.gelu_words(rows, x, kept, out);
}

void gelu_backward(const Kernels& kernels, const DroppedRows& rows, const float* x, float* grad,
                   float* value, float* rounded) {
    kernels.gelu_backward_rows(rows, x, grad, value, rounded);
}
void gelu_backward(const Kernels& kernels, const DroppedRows& rows, const uint32_t* x, float* grad,
                   uint32_t* value, uint32_t* rounded) {
    kernels.gelu_backward_words(rows, x, grad, value, rounded);
}

FrameNorm norm_of(const FeedForwardShape& shape, const FeedForwardWeights& weights) {
    return {weights.norm, weights.norm_bias, shape.epsilon, shape.n_dims};
}

template <typename Word>
struct Scratch {
    Scratch(int64_t block, const FeedForwardShape& shape)
        : narrow((block + kMostRows) * shape.n_dims / kValues<Word>),
          wide((block + kMostRows) * shape.n_hidden / kValues<Word>),
          activated((block + kMostRows) * shape.n_hidden / kValues<Word>),
          hidden((block + kMostRows) * shape.n_hidden),
          made((block + kMostRows) * shape.n_dims),
          value(block * shape.n_dims) {}

    Buffer<Word> narrow, wide, activated;  // operands of n_dims, n_hidden and n_hidden values
    Buffer<float> hidden, made;            // products of n_hidden and n_dims
    Buffer<float> value;                   // of the norm
};

template <typename Word>
void forward(const FeedForwardShape& shape, const FeedForwardWeights& weights, const float* x,
             Word* hidden, float* out, const Kernels& kernels, int n_threads) {
    const int D = shape.n_dims, H = shape.n_hidden;
    const PackedWeight<Word> up(kernels, weights.up, H, D, false, n_threads);
    const PackedWeight<Word> down(kernels, weights.down, D, H, false, n_threads);
    const int64_t block = map_block<Word>(kernels);
    over_blocks(shape.n_rows, block, n_threads, [&] { return Scratch<Word>(block, shape); },
                [&](int64_t, int64_t first, int n, Scratch<Word>& s) {
        const DroppedRows hidden_rows{first, n, H, shape.dropping};
        const DroppedRows rows{first, n, D, shape.dropping.second()};
        const float* inputs = x + first * D;
        if (weights.norm) {
            kernels.frame_norm_rows(norm_of(shape, weights), inputs, n, s.made.data());
            inputs = s.made.data();
        }
        put_values(kernels, inputs, ptrdiff_t(n) * D, false, s.narrow.data());
        up.multiply(s.narrow.data(), n, weights.up_bias, s.hidden.data());
        gelu(kernels, hidden_rows, s.hidden.data(),
             hidden ? hidden + first * H / kValues<Word> : nullptr, s.wide.data());
        down.multiply(s.wide.data(), n, weights.down_bias, s.made.data());
        kernels.add_scaled_rows(rows, x + first * D, s.made.data(), shape.scale, out + first * D);
    });
}

template <typename Word>
void backward(const FeedForwardShape& shape, const FeedForwardWeights& weights, const float* x,
              const Word* hidden, const float* grad, const FeedForwardGradients& out,
              const Kernels& kernels, int n_threads) {
    const int D = shape.n_dims, H = shape.n_hidden;
    const int64_t N = shape.n_rows, block = map_block<Word>(kernels);
    const PackedWeight<Word> up(kernels, weights.up, H, D, true, n_threads);
    const PackedWeight<Word> down(kernels, weights.down, D, H, true, n_threads);
    Factor<Word> inputs(kernels, N, D, true), of_hidden(kernels, N, H, false);
    Factor<Word> activated(kernels, N, H, true), of_output(kernels, N, D, false);
    const int64_t n_blocks = (N + block - 1) / block;
    ColumnSums up_bias(kernels, n_blocks, H), down_bias(kernels, n_blocks, D);
    ColumnSums norm(kernels, n_blocks, D), norm_bias(kernels, n_blocks, D);
    over_blocks(N, block, n_threads, [&] { return Scratch<Word>(block, shape); },
                [&](int64_t i, int64_t first, int n, Scratch<Word>& s) {
        const DroppedRows hidden_rows{first, n, H, shape.dropping};
        const DroppedRows rows{first, n, D, shape.dropping.second()};
        const ptrdiff_t n_values = ptrdiff_t(n) * D;
        const float* g = grad + first * D;
        kernels.add_scaled_rows(rows, nullptr, g, shape.scale, s.made.data());
        down_bias.put(i, s.made.data(), n);
        put_values(kernels, s.made.data(), n_values, false, s.narrow.data());
        of_output.put(first, s.narrow.data(), n);
        down.multiply(s.narrow.data(), n, nullptr, s.hidden.data());
        gelu_backward(kernels, hidden_rows, hidden + first * H / kValues<Word>, s.hidden.data(),
                      s.activated.data(), s.wide.data());
        activated.put(first, s.activated.data(), n);
        up_bias.put(i, s.hidden.data(), n);
        of_hidden.put(first, s.wide.data(), n);
        up.multiply(s.wide.data(), n, nullptr, s.made.data());
        const float* made_of = x + first * D;
        if (weights.norm) {
            kernels.frame_norm_backward_rows(norm_of(shape, weights), made_of, s.made.data(), g, n,
                                             out.x + first * D, s.value.data(), norm.part(i),
                                             norm_bias.part(i));
            made_of = s.value.data();
        } else {
            kernels.add_rows(g, s.made.data(), n_values, out.x + first * D);
        }
        put_values(kernels, made_of, n_values, false, s.narrow.data());
        inputs.put(first, s.narrow.data(), n);
    });
    multiply_over_rows(of_hidden, inputs, out.up, n_threads);
    multiply_over_rows(of_output, activated, out.down, n_threads);
    up_bias.add_up(out.up_bias);
    down_bias.add_up(out.down_bias);
    if (weights.norm) {
        norm.add_up(out.norm);
        norm_bias.add_up(out.norm_bias);
    }
}

}  // namespace

void feed_forward(const FeedForwardShape& shape, const FeedForwardWeights& weights, const float* x,
                  void* hidden, float* out, const Kernels& kernels, int n_threads) {
    shape.narrow
        ? forward(shape, weights, x, static_cast<uint32_t*>(hidden), out, kernels, n_threads)
        : forward(shape, weights, x, static_cast<float*>(hidden), out, kernels, n_threads);
}

void feed_forward_backward(const FeedForwardShape& shape, const FeedForwardWeights& weights,
                           const float* x, const void* hidden, const float* grad,
                           const FeedForwardGradients& out, const Kernels& kernels,
                           int n_threads) {
    shape.narrow ? backward(shape, weights, x, static_cast<const uint32_t*>(hidden), grad, out,
                            kernels, n_threads)
                 : backward(shape, weights, x, static_cast<const float*>(hidden), grad, out,
                            kernels, n_threads);
}

}  // namespace gmm_jepa
