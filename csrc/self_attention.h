// The self-attention of a block with the maps around it, x + W_o attention(W_qkv x + b_qkv) + b_o, where
// the attention is attention.h's and its gates are made of the queries; and the gradients.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// n_dims is a multiple of kMapMultiple, n_dims / n_heads of 16. Rows b have lengths[b] real frames, the
// first, and attend to these, or to frame 0 where there are none; null: all. `narrow`: what the maps
// multiply is rounded to bfloat16; the set has pair_products then. `dropping`: of probabilities.
struct SelfAttentionShape {
    int64_t n_rows, n_frames;
    int n_heads, n_dims;
    const int64_t* lengths;
    bool narrow;
    Dropout dropping;

    int head_dims() const { return n_dims / n_heads; }
};

// gate = 1 + u + (1 - u) r scale_h with u = sigmoid(q . gate_u_h), r = sigmoid(q . gate_r_h).
struct SelfAttentionWeights {
    const float *qkv, *qkv_bias;              // (3 D, D): queries, keys, values, by head; (3 D,)
    const float *out, *out_bias;              // (D, D), (D,)
    const float* table;                       // (H, 2 T - 1)
    const float *gate_u, *gate_r, *gate_scale;  // (H, d), (H, d), (H,)
};

// What the gradient needs; written in full.
struct SelfAttentionKept {
    float* qkv;       // (B, T, 3 D)
    float* attended;  // (B, T, D)
    float* log_sum;   // (B, H, T)
    float* gate;      // (B, H, T)
};

// x (B, T, D) -> out, the same. The same bits for any n_threads.
void self_attention(const SelfAttentionShape& shape, const SelfAttentionWeights& weights,
                    const float* x, const SelfAttentionKept& kept, float* out,
                    const Kernels& kernels, int n_threads);

// Written in full: x (B, T, D), and the weights'.
struct SelfAttentionGradients {
    float *x, *qkv, *qkv_bias, *out, *out_bias, *table, *gate_u, *gate_r, *gate_scale;
};
void self_attention_backward(const SelfAttentionShape& shape, const SelfAttentionWeights& weights,
                             const float* x, const SelfAttentionKept& kept, const float* grad,
                             const SelfAttentionGradients& out, const Kernels& kernels,
                             int n_threads);

}  // namespace gmm_jepa
