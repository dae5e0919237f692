// Sufficient statistics of one EM iteration on a CUDA device, and the same algorithm run serially
// on the CPU. ../README.md has the plan and its performance model.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arrays.h"
#include "../em.h"

namespace gmm_jepa::cuda {

// A mixture packed for the screen (gmm_jepa/ops/cuda_em.py makes it), contiguous, where the frames
// are. K_padded is K rounded up to kTileComponents, depth is 2 D rounded up to kStepDepth; features
// stand in the order of feature_position.
struct Operands {
    const uint16_t* weights;     // (K_padded, depth) bfloat16: slope, -precision / 2 of features
    const float* bias;           // (K_padded,), infinity: every frame computes it; minus: none does
    const float* guess;          // (K_padded,), of guess_steps of the depth; minus infinity: never
    const double* table;         // (K, D, 2): mean, 1 / variance
    const double* constants;     // (K,): log-density of a frame on the mean
    const float* shift;          // (D,)
    const float* inverse_scale;  // (D,), z = (x - shift) inverse_scale
    const double* gain;          // (): how much the bound loosens per nat of a low best
    int64_t n_components;
    int64_t n_dims;
};

struct Mode {
    bool hard;      // all of a frame goes to its best component, the first one of equals (k-means)
    double margin;  // nats under the best that are computed
};

// Bytes of device memory that a call needs beside its arguments.
size_t workspace_bytes(int64_t n_components, int64_t n_dims);

// T is float or double; asynchronous on `stream`; the same bits every time. Throws
// std::runtime_error, also where there is no device.
template <typename T>
void em_statistics(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                   const Statistics& out, void* workspace, int device, void* stream);

// What the refinement had to do in a call, over all of its chunks.
struct Refined {
    int64_t pairs;           // (frame, component) that the screen left
    int64_t spilled_chunks;  // whose pairs did not fit the list and were computed again
};

// Of the last call with this workspace; waits for it. For tests.
Refined last_refined(void* workspace, int64_t n_components, int64_t n_dims, int device,
                     void* stream);

// The same tiles, orders and arithmetic, one after another on the CPU; returns how many pairs the
// screen left.
template <typename T>
int64_t em_statistics_emulated(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                               const Statistics& out);

// How many devices there are; 0 without a driver.
int device_count();

}  // namespace gmm_jepa::cuda
