// Rounds of the operators that hold a conformer block's linear maps: what is written was NaN before,
// and comes out the same from any number of threads.
#include <cstdint>

#include "convolution_module.h"
#include "feed_forward.h"
#include "linear_maps.h"
#include "sanitize/drawn.h"
#include "self_attention.h"

namespace gmm_jepa {
namespace {

// n values of float32, or of bfloat16 two to a word.
std::vector<uint32_t> kept_words(int64_t n, bool narrow) {
    return std::vector<uint32_t>(narrow ? n / 2 : n, 0x7fc07fc0);  // NaN as either
}

Dropout any_dropout() {
    return {uint64_t(any(0, 1 << 30)), -1000000000, 1.4f, any(0, 1) == 1};
}

void feed_forward_round(const Kernels& kernels, bool narrow) {
    const int D = static_cast<int>(kMapMultiple * any(1, 4));
    const int H = static_cast<int>(kMapMultiple * any(1, 6));
    const int64_t N = any(0, 2) ? any(0, 150) : any(0, 3);
    const std::vector<float> x = drawn(N * D), grad = drawn(N * D), up_bias = drawn(H),
                             down_bias = drawn(D), norm = drawn(D), norm_bias = drawn(D),
                             up = drawn(int64_t(H) * D, width_scale(D)),
                             down = drawn(int64_t(D) * H, width_scale(H));
    const FeedForwardShape shape{N, D, H, 0.5f, 1e-5f, narrow, any_dropout()};
    const bool has_norm = any(0, 1);
    const FeedForwardWeights weights{up.data(),
                                     up_bias.data(),
                                     down.data(),
                                     down_bias.data(),
                                     has_norm ? norm.data() : nullptr,
                                     has_norm ? norm_bias.data() : nullptr};
    on_any_threads("feed-forward", kernels, [&](int threads, Results* to) {
        std::vector<uint32_t> hidden = kept_words(N * H, narrow);
        feed_forward(shape, weights, x.data(), nullptr, to->add(N * D), kernels, threads);
        feed_forward(shape, weights, x.data(), hidden.data(), to->add(N * D), kernels, threads);
        const FeedForwardGradients gradients{to->add(N * D),
                                             to->add(int64_t(H) * D),
                                             to->add(H),
                                             to->add(int64_t(D) * H),
                                             to->add(D),
                                             has_norm ? to->add(D) : nullptr,
                                             has_norm ? to->add(D) : nullptr};
        feed_forward_backward(shape, weights, x.data(), hidden.data(), grad.data(), gradients,
                              kernels, threads);
    });
}

void self_attention_round(const Kernels& kernels, bool narrow) {
    const int64_t B = any(0, 3), T = any(0, 2) ? any(1, 90) : any(1, 3);
    const int heads[] = {1, 2, 4};
    const int H = heads[any(0, 2)], d = static_cast<int>(kMapMultiple * any(1, 2)), D = H * d;
    const int64_t n = B * T * D, n_table = H * (2 * T - 1);
    const std::vector<float> x = drawn(n), grad = drawn(n),
                             qkv = drawn(3 * int64_t(D) * D, width_scale(D)),
                             qkv_bias = drawn(3 * D), last = drawn(int64_t(D) * D, width_scale(D)),
                             last_bias = drawn(D), table = drawn(n_table), gate_u = drawn(D),
                             gate_r = drawn(D), gate_scale = drawn(H);
    const Lengths lengths(B, T);
    const SelfAttentionShape shape{B, T, H, D, lengths.data(), narrow, any_dropout()};
    const SelfAttentionWeights weights{qkv.data(),    qkv_bias.data(), last.data(),
                                       last_bias.data(), table.data(), gate_u.data(),
                                       gate_r.data(), gate_scale.data()};
    on_any_threads("self-attention", kernels, [&](int threads, Results* to) {
        const SelfAttentionKept kept{to->add(3 * n), to->add(n), to->add(B * H * T),
                                     to->add(B * H * T)};
        self_attention(shape, weights, x.data(), kept, to->add(n), kernels, threads);
        const SelfAttentionGradients gradients{
            to->add(n),          to->add(3 * int64_t(D) * D), to->add(3 * D),
            to->add(int64_t(D) * D), to->add(D),              to->add(n_table),
            to->add(D),          to->add(D),                  to->add(H)};
        self_attention_backward(shape, weights, x.data(), kept, grad.data(), gradients, kernels,
                                threads);
    });
}

void convolution_module_round(const Kernels& kernels, bool narrow) {
    const int64_t B = any(0, 3), T = any(0, 2) ? any(1, 100) : any(1, 3);
    const int D = static_cast<int>(kMapMultiple * any(1, 4));
    const int K = static_cast<int>(2 * any(0, 16) + 1);
    const int64_t n = B * T * D;
    const std::vector<float> x = drawn(n), grad = drawn(n), norm_in = drawn(D),
                             norm_in_bias = drawn(D),
                             up = drawn(2 * int64_t(D) * D, width_scale(D)), up_bias = drawn(2 * D),
                             taps = drawn(int64_t(D) * K, width_scale(K)), taps_bias = drawn(D),
                             norm_out = drawn(D), norm_out_bias = drawn(D),
                             down = drawn(int64_t(D) * D, width_scale(D)), down_bias = drawn(D);
    const Lengths lengths(B, T);
    const ConvolutionModuleShape shape{B, T, D, K, lengths.data(), 1e-5f, narrow,
                                       any_dropout()};
    const ConvolutionModuleWeights weights{
        norm_in.data(),   norm_in_bias.data(), up.data(),            up_bias.data(),
        taps.data(),      taps_bias.data(),    norm_out.data(),      norm_out_bias.data(),
        down.data(),      down_bias.data()};
    on_any_threads("convolution module", kernels, [&](int threads, Results* to) {
        std::vector<uint32_t> made = kept_words(2 * n, narrow);
        const ConvolutionModuleKept kept{made.data(), to->add(n), to->add(4 * B)};
        convolution_module(shape, weights, x.data(), kept, to->add(n), kernels, threads);
        const ConvolutionModuleGradients gradients{
            to->add(n),
            to->add(D),
            to->add(D),
            to->add(2 * int64_t(D) * D),
            to->add(2 * D),
            to->add(int64_t(D) * K),
            to->add(D),
            to->add(D),
            to->add(D),
            to->add(int64_t(D) * D),
            to->add(D)};
        convolution_module_backward(shape, weights, x.data(), kept, grad.data(), gradients,
                                    kernels, threads);
    });
}

}  // namespace

void block_round(const Kernels& kernels) {
    for (const bool narrow : {false, true}) {
        if (narrow && !kernels.pair_products) continue;
        feed_forward_round(kernels, narrow);
        self_attention_round(kernels, narrow);
        convolution_module_round(kernels, narrow);
    }
}

}  // namespace gmm_jepa
