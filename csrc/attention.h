// Self-attention with a gated relative position bias, one block of queries at a time.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

struct AttentionShape {
    int64_t n_rows, n_heads, n_frames;
    int n_dims;
    const int64_t* key_lengths;  // (B,), each 1 to T; null: all T
};

// (B, H, T, d) float32; the last stride is one.
struct HeadRows {
    const float* data;
    int64_t stride_row, stride_head, stride_frame;

    const float* at(int64_t row, int64_t head, int64_t frame) const {
        return data + row * stride_row + head * stride_head + frame * stride_frame;
    }
};

struct AttentionInputs {
    HeadRows q, k, v;
    const float* table;  // (H, 2 T - 1), contiguous
    const float* gate;   // (B, H, T), contiguous
};

// softmax(q k' / sqrt(d) + table[h, j - i] gate[b, h, i]) v to out, and the logarithm of each
// softmax's sum to log_sum (B, H, T). `out` has the memory of (B, T, H, d), written in full.
void gated_bias_attention(const AttentionShape& shape, const AttentionInputs& inputs,
                          const Dropout& dropout, float* out, float* log_sum,
                          const Kernels& kernels, int n_threads);

// q, k, v with the memory of (B, T, H, d); table (H, 2 T - 1), gate (B, H, T). Written in full.
struct AttentionGradients {
    float *q, *k, *v, *table, *gate;
};

// grad and out are as HeadRows. The same bits for any n_threads, as those of the output.
void gated_bias_attention_backward(const AttentionShape& shape, const AttentionInputs& inputs,
                                   const Dropout& dropout, const HeadRows& grad,
                                   const HeadRows& out, const float* log_sum,
                                   const AttentionGradients& gradients, const Kernels& kernels,
                                   int n_threads);

}  // namespace gmm_jepa
