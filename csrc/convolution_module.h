// The convolution module of a conformer block with its residual: group norm, pointwise to 2 D, GLU,
// depthwise, group norm, SiLU, pointwise; and the gradients.
#pragma once

#include "kernels.h"

namespace gmm_jepa {

// n_dims is a multiple of kMapMultiple, n_taps is odd. Rows b have lengths[b] real frames, the first;
// null: all. The norms are of one group over a row's real frames and all channels, with divisor n.
// `narrow`: what the maps multiply is rounded to bfloat16; the set has pair_products then. `dropping`:
// of what is added to x; a frame's is drawn by its number.
struct ConvolutionModuleShape {
    int64_t n_rows, n_frames;
    int n_dims, n_taps;
    const int64_t* lengths;
    float epsilon;
    bool narrow;
    Dropout dropping;
};

struct ConvolutionModuleWeights {
    const float *norm_in, *norm_in_bias;    // (D,)
    const float *up, *up_bias;              // (2 D, D), (2 D,)
    const float *taps, *taps_bias;          // (D, K), (D,)
    const float *norm_out, *norm_out_bias;  // (D,)
    const float *down, *down_bias;          // (D, D), (D,)
};

// What the gradient needs; written in full.
struct ConvolutionModuleKept {
    void* up;           // (B, T, 2 D), bfloat16 if narrow and float32 else: what `up` made
    float* convolved;   // (B, T, D)
    float* statistics;  // (B, 4): mean and inverse deviation before `up`, and behind the taps
};

// x (B, T, D) -> x + what the module makes of it; x alone beyond a row's length. The same bits for any
// n_threads.
void convolution_module(const ConvolutionModuleShape& shape,
                        const ConvolutionModuleWeights& weights, const float* x,
                        const ConvolutionModuleKept& kept, float* out, const Kernels& kernels,
                        int n_threads);

// Written in full: x (B, T, D), and the weights'.
struct ConvolutionModuleGradients {
    float *x, *norm_in, *norm_in_bias, *up, *up_bias, *taps, *taps_bias, *norm_out, *norm_out_bias,
        *down, *down_bias;
};
void convolution_module_backward(const ConvolutionModuleShape& shape,
                                 const ConvolutionModuleWeights& weights, const float* x,
                                 const ConvolutionModuleKept& kept, const float* grad,
                                 const ConvolutionModuleGradients& out, const Kernels& kernels,
                                 int n_threads);

}  // namespace gmm_jepa
