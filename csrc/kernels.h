// The inner loops that exist once per instruction set, behind one table of functions.
//
// Every isa_*.cpp compiles kernels_impl.h with its own flags and fills one table. These files use
// nothing from the standard library that could be emitted as a shared inline function: the linker
// would be free to keep the AVX-512 copy for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gmm_jepa {

// Tables of a log-mel transform, made by log_mel.cpp; (re, im) pairs are adjacent.
struct LogMelPlan {
    int n_fft, n_mels, n_stages;
    const int* radices;
    float floor;
    const float* window;
    const float* twiddles;  // of each stage: p = 0 .. m - 1, j = 1 .. radix - 1
    const float* roots;     // exp(-2 pi i k / n_fft), k = 0 .. n_fft / 2
    const int* firsts;      // first bin of each mel filter
    const int* counts;      // its bins
    const float* weights;   // their weights, filter after filter
};

// c (n_rows, n_panels panels) = bias + sum over taps and k of a(row, tap, k) b(tap, k), or c += the
// same without the bias. a(row, tap, k) is a[row * stride_a + tap * stride_tap + k * stride_k];
// b holds, panel after panel, rows of one panel's columns. A word is a float, or a pair of bfloat16
// neighbours in k, whose products are summed in float32; strides and n_k count words. n_rows is
// rounded up to the tile's rows: a is read and c written that far.
template <typename Word>
struct ProductsOf {
    const Word* a;
    ptrdiff_t stride_a, stride_k, stride_tap;
    const Word* b;
    const float* bias;  // (n_panels panels,); not read when accumulating
    float* c;
    ptrdiff_t stride_c;
    int n_rows, n_panels, n_taps, n_k;
    bool accumulate;
    bool half_panels = false;  // a panel has `lanes` columns, not `product_columns`
};
using Products = ProductsOf<float>;
using PairProducts = ProductsOf<uint32_t>;

// Of one chunk of density-adaptive attention.
constexpr int kDensityGaussians = 4;
struct DensityParameters {
    float offsets[kDensityGaussians], squared_widths[kDensityGaussians];
};

// A value is kept, times `scale`, where the hash of its row and column is at least `threshold`.
struct Dropout {
    uint64_t seed;
    int32_t threshold;
    float scale;
    bool active;

    // Another mask of the same seed.
    Dropout second() const { return {~seed, threshold, scale, active}; }
};

// Rows `first` to `first` + n_rows - 1 of n values each, and what is dropped of them.
struct DroppedRows {
    int64_t first;
    int n_rows, n;
    Dropout dropping;
};

// What a masked loss says of one row.
struct RowLoss {
    float loss, entropy, agreement;
};

// One query's row on the way back through an attention's softmax.
struct SoftmaxGradient {
    float* scores;            // (n,), become probabilities, as dropout left them
    float* of_probabilities;  // (n,), become the gradients of the scores
    int n;
    float log_sum, delta;
    const float* table;  // (n,), the bias over the gate
    float gate;
    float* grad_table;  // (n,), added to
};

// One frame's queries and the parameters of its gates: (n_heads, n_dims) each, n_dims a multiple of 16,
// and (n_heads,).
struct GateRow {
    const float *queries, *u, *r, *scale;
    int n_heads, n_dims;
};

// The norm of one row's frames, of n channels: (x - mean) scale weight + bias.
struct RowNorm {
    float mean, scale;
    const float *weight, *bias;
    int n;
};

// The norm of frames, each for itself, of n channels.
struct FrameNorm {
    const float *weight, *bias;
    float epsilon;
    int n;
};

// What comes back through a norm and what follows it, by frame: the value behind both, and the
// gradient of (x - mean) scale, both (n_rows, n); added to (n,): of weight and bias.
struct NormGradients {
    float *value, *of_normal, *weight, *bias;
};

// What a screen multiplies; its sums become float32 in any case.
enum class Operands { kFloat32, kBfloat16, kInt16 };

// scores (n_frames, n_panels * panel) = bias + features (n_frames, n_words) @ weights, and the
// largest score of each frame.
struct ScreenProducts {
    const uint32_t* features;
    int n_frames;  // a multiple of `tile`
    int n_words;   // of a frame
    const uint32_t* weights;
    const float* bias;
    const float* steps;  // of each component, the unit of its products; read for int16
    int n_panels;
    int depth;  // words whose products may be summed before they become float32
    float* scores;
    float* best;
};

// Operands are 32-bit words: z and z^2 as two floats, or as one pair of bfloat16 or int16.
struct Screen {
    Operands operands;
    int panel;  // components of a weight panel
    int tile;   // frames of a register tile
    int group;  // frames to screen together, a multiple of `tile`: their scores stay in cache
    int words;  // a frame's are a multiple of this, zeros behind the last

    // z = (x - centre) * inverse_scale of n_dims features, then operands. False where a value is
    // not finite or, for floats, too large for the screen. Integers: z is rounded and held within
    // +-kRange, and of its square, in units of kSquareUnit, kSquareOffset is subtracted.
    bool (*pack_float)(const float* x, const float* centre, const float* inverse_scale, int n_dims,
                       uint32_t* words);
    bool (*pack_double)(const double* x, const float* centre, const float* inverse_scale,
                        int n_dims, uint32_t* words);
    void (*run)(const ScreenProducts& products);
};
constexpr int kRange = 32767, kSquareBits = 14, kSquareUnit = 1 << kSquareBits;
constexpr int kSquareOffset = 32768;

struct Kernels {
    const char* name;
    int lanes;      // floats of a vector register
    Screen narrow;  // the fastest; may be coarse
    Screen wide;    // float32

    // First index at which `scores` has `value`, or -1.
    int (*find)(const float* scores, int n, float value);

    // Indices of scores >= threshold, rising; returns how many. `indices` has room for all n.
    int (*at_least)(const float* scores, int n, float threshold, int32_t* indices);

    // distances[i] = sum_d (x_d - mean_d)^2 precision_d of component indices[i]; rows of
    // n_dims_padded doubles, zero behind the last dimension.
    void (*distances)(const double* x, const double* means, const double* precisions,
                      int n_dims_padded, const int32_t* indices, int n, double* distances);

    // first += sum_i r_i (x_i - centre), second += sum_i r_i (x_i - centre)^2 over n rows of
    // `frames`, returns sum_i r_i. Each call sums in its own registers before it adds.
    double (*moments_float)(const float* frames, const double* centre, int n_dims_padded,
                            const uint32_t* rows, const double* r, int n, double* first,
                            double* second);
    double (*moments_double)(const double* frames, const double* centre, int n_dims_padded,
                             const uint32_t* rows, const double* r, int n, double* first,
                             double* second);

    // 64 bits that tell arrays apart by their bytes. Sets differ in them.
    uint64_t (*fingerprint)(const void* data, size_t n_bytes);

    // Log-mel of `lanes` frames of n_fft samples each; out[lane] (n_mels,) may be null. `scratch`:
    // 2 n_fft lanes floats, aligned to 64 bytes.
    void (*log_mel)(const LogMelPlan& plan, const float* const* frames, float* scratch,
                    float* const* out);

    int product_rows;     // of a register tile
    int product_columns;  // of a panel
    void (*products)(const Products& operands);
    void (*pair_products)(const PairProducts& operands);  // null where the set has none

    // Between the products of a residual unit, on runs of n values: leaky ReLU; x + y; `grad` through
    // the leaky ReLU of `at`, with `added` where it is not null; sums of n columns, added to.
    void (*activate_rows)(const float* x, ptrdiff_t n, float* out);
    void (*add_rows)(const float* x, const float* y, ptrdiff_t n, float* out);
    void (*leaky_gradient_rows)(const float* at, const float* grad, const float* added, ptrdiff_t n,
                                float* out);
    void (*sum_rows)(const float* rows, ptrdiff_t n_rows, int n, float* sums);
    // Sum of n squares, and to += weight (from - to).
    double (*sum_of_squares)(const float* x, ptrdiff_t n);
    void (*move_towards)(float* to, const float* from, float weight, ptrdiff_t n);
    // Null without pair_products, n a multiple of `lanes`: to bfloat16, two a word, after a leaky
    // ReLU if asked for; and words of equal places in two such rows of n, zero for a null one.
    void (*round_rows)(const float* x, ptrdiff_t n, bool activate, uint32_t* out);
    void (*pair_rows)(const uint32_t* first, const uint32_t* second, ptrdiff_t n, uint32_t* out);

    // x + sin(a x)^2 / a of rows of channels that fill vectors, x float32 or bfloat16. Backward writes
    // grad_x and, summed over these rows, grad_a.
    void (*snake_float)(const float* x, const float* a, int n_rows, int n_channels, float* out);
    void (*snake_bfloat16)(const uint16_t* x, const float* a, int n_rows, int n_channels,
                           float* out);
    void (*snake_backward_float)(const float* x, const float* a, const float* grad, int n_rows,
                                 int n_channels, float* grad_x, float* grad_a);
    void (*snake_backward_bfloat16)(const uint16_t* x, const float* a, const float* grad,
                                    int n_rows, int n_channels, uint16_t* grad_x, float* grad_a);

    // x + x softmax(log-density) over n >= 2 frames, `stride` floats apart, of `lanes` channels;
    // `scratch` holds n lanes floats. Backward writes grad_x and adds to the gradients of offsets,
    // then squared widths.
    void (*density_forward)(const DensityParameters& parameters, const float* x, ptrdiff_t stride,
                            int n, float* scratch, float* out);
    void (*density_backward)(const DensityParameters& parameters, const float* x,
                             const float* grad, ptrdiff_t stride, int n, float* scratch,
                             float* grad_x, double* grad_parameters);

    // Of `lanes` channels of one row, n frames `stride` floats apart: out[t] = start + sum over j of
    // taps[j] x[t + j - n_taps / 2], zero beyond the row. taps (n_taps, lanes), start (lanes,). The
    // others add to the gradients of taps, and to sums (lanes,).
    void (*depthwise)(const float* x, ptrdiff_t stride, int n, const float* taps, int n_taps,
                      const float* start, float* out);
    void (*depthwise_weights)(const float* x, const float* grad, ptrdiff_t stride, int n,
                              int n_taps, float* taps);
    void (*sum_columns)(const float* x, ptrdiff_t stride, int n, float* sums);

    // Rows of n scores, read and written in whole vectors, minus infinity behind the last. Forward:
    // exp(score - largest), dropped out; returns the largest, and the sum without dropout. Backward
    // returns the gradient of the gate. `row` is the row's number among all.
    float (*softmax_row)(float* scores, int n, const Dropout& dropout, uint64_t row, float* total);
    float (*softmax_row_backward)(const SoftmaxGradient& gradient, const Dropout& dropout,
                                  uint64_t row);

    // out[i] = x[i] scale or 0, for n values of row `row`.
    void (*dropout)(const float* x, int n, const Dropout& dropping, uint64_t row, float* out);

    // KL of softmax(logits) to targets, and cross-entropy to a label, of rows of n; `scratch` holds n
    // floats. `gradient` (n,) is that of weight x loss; may be null.
    void (*kl_row)(const float* logits, const float* targets, int n, float weight, float* scratch,
                   RowLoss* out, float* gradient);
    void (*cross_entropy_row)(const float* logits, int64_t label, int n, float weight,
                              float* scratch, RowLoss* out, float* gradient);
    // Returns the mean over the row.
    float (*squared_error_row)(const float* prediction, const float* target, int n, float weight,
                               float* gradient);

    // to[w][r] = from[r][w] of 16 x 16 words, rows so many words apart.
    void (*turn_words)(const uint32_t* from, ptrdiff_t stride, uint32_t* to, ptrdiff_t to_stride);

    // What lies between the linear maps of a block, on runs of n values, a multiple of 16; words are
    // of two values of bfloat16.
    // GELU (with the error function), dropped out; `kept` receives x, may be null.
    void (*gelu_rows)(const DroppedRows& rows, const float* x, float* kept, float* out);
    void (*gelu_words)(const DroppedRows& rows, const float* x, uint32_t* kept, uint32_t* out);
    // `grad` behind both becomes that of x, also to `rounded`; what both made goes to `value`.
    void (*gelu_backward_rows)(const DroppedRows& rows, const float* x, float* grad, float* value,
                               float* rounded);
    void (*gelu_backward_words)(const DroppedRows& rows, const uint32_t* x, float* grad,
                                uint32_t* value, uint32_t* rounded);
    // x + scale y, y dropped out; of a null x scale y.
    void (*add_scaled_rows)(const DroppedRows& rows, const float* x, const float* y, float scale,
                            float* out);

    // Half of a row of 2 n values times the sigmoid of the other half; `kept` receives the rows. Again
    // from what was kept; and the gradient (n_rows, 2 n).
    void (*glu_rows)(const float* x, int n_rows, int n, float* kept, float* out);
    void (*glu_words)(const float* x, int n_rows, int n, uint32_t* kept, float* out);
    void (*glu_again_rows)(const float* kept, int n_rows, int n, float* out);
    void (*glu_again_words)(const uint32_t* kept, int n_rows, int n, float* out);
    void (*glu_backward_rows)(const float* kept, const float* grad, int n_rows, int n, float* out);
    void (*glu_backward_words)(const uint32_t* kept, const float* grad, int n_rows, int n,
                               float* out);

    // In float64: the sum of n values, and of their squared distances from a centre.
    double (*sum_of_values)(const float* x, ptrdiff_t n);
    double (*squares_about)(const float* x, ptrdiff_t n, double centre);
    // A norm, and x sigmoid(x) of it; the gradients behind both. At last that of the frames: of n
    // values of a row whose norm has no weight, `grads` become what comes out, `added` (may be null)
    // with them.
    void (*norm_rows)(const RowNorm& norm, const float* x, int n_rows, float* out);
    void (*norm_silu_rows)(const RowNorm& norm, const float* x, int n_rows, float* out);
    void (*norm_backward_rows)(const RowNorm& norm, const float* x, const float* grad, int n_rows,
                               const NormGradients& to);
    void (*norm_silu_backward_rows)(const RowNorm& norm, const float* x, const float* grad,
                                    int n_rows, const NormGradients& to);
    void (*norm_gradient)(const RowNorm& norm, const float* x, const float* added, ptrdiff_t n,
                          float* grads);

    // A norm of frames. On the way back `grad` behind it, plus `added`, becomes that of the frames;
    // `value` receives what the norm made, and weight and bias (n,) are added to.
    void (*frame_norm_rows)(const FrameNorm& norm, const float* x, int n_rows, float* out);
    void (*frame_norm_backward_rows)(const FrameNorm& norm, const float* x, const float* grad,
                                     const float* added, int n_rows, float* out, float* value,
                                     float* weight, float* bias);

    // An attention's gates (n_heads,); and through them: grad_queries, grad_u, grad_r and grad_scale
    // are added to.
    void (*gate_row)(const GateRow& row, float* gates);
    void (*gate_row_backward)(const GateRow& row, const float* grad, float* grad_queries,
                              float* grad_u, float* grad_r, float* grad_scale);
};

// Rows of parameters and of frames are padded with zeros to a multiple of this many values.
constexpr int kRowMultiple = 16;

// The tables compiled in, best first; null where this build or this processor has no such set.
const Kernels* kernels_amx();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// The table called `name`, or the best one for an empty name; throws std::invalid_argument.
const Kernels& kernels(const char* name);

// Whether the processor is one for which MKL, torch's BLAS, uses all instructions that there are.
bool is_intel();

// Names of all tables that this processor can run, best first, comma separated.
const char* available_kernels();

}  // namespace gmm_jepa
