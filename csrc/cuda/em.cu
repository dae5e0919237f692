// Launches of one EM iteration: chunk by chunk a screen, a refinement and the moments; then sums.
#include "em.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "moments.cuh"
#include "refine.cuh"
#include "screen.cuh"

namespace gmm_jepa::cuda {
namespace {

// Features that kernels of their own are made for: those of a log-mel frame.
constexpr int kUsualDims = 80;

// Codes that mean that this machine cannot run CUDA at all, not that something went wrong.
bool is_no_device(cudaError_t code) {
    return code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver ||
           code == cudaErrorStubLibrary || code == cudaErrorInitializationError ||
           code == cudaErrorSystemDriverMismatch;
}

void check(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not meet this error again
    const std::string reason = std::string(what) + ": " + cudaGetErrorString(code);
    throw std::runtime_error(is_no_device(code) ? "no CUDA device (" + reason + ")" : reason);
}

// The device of a call, and after it the one before.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }

  private:
    int before_ = 0;
};

// How the workspace is laid out; every part is aligned to 256 bytes.
struct Workspace {
    Workspace(void* memory, int64_t K, int64_t D) : base(static_cast<char*>(memory)) {
        const int64_t frames = chunk_frames(K), parts = n_segments(K) * K;
        // Zeroed at the start of a call, in one piece.
        partials.counts = take<double>(parts);
        partials.first = take<double>(parts * D);
        partials.second = take<double>(parts * D);
        likelihoods = take<double>(frames / kTileFrames);
        zeroed = used;
        normalisers = take<Normaliser>(frames);
        mask = take<uint32_t>(frames / kTileFrames * K);
        members = take<uint32_t>(frames / kTileFrames * K);
        stride = frames / kTileFrames;
    }

    template <typename V>
    V* take(int64_t n) {
        V* const part = base ? reinterpret_cast<V*>(base + used) : nullptr;
        used += round_up(n * int64_t(sizeof(V)), 256);
        return part;
    }

    char* base;
    size_t used = 0, zeroed = 0;
    Partials partials;
    double* likelihoods;
    Normaliser* normalisers;
    uint32_t *mask, *members;  // (tiles, K) of the screen, (K, tiles) of the refinement
    int64_t stride;            // tiles of a chunk
};

template <typename T, int kWarps, int kFixedSteps>
void screen(const ChunkView<T>& x, const Operands& mixture, double margin, uint32_t* mask,
            cudaStream_t stream) {
    const auto kernel = em_screen_kernel<T, kWarps, kFixedSteps>;
    const int bytes = static_cast<int>(screen_shared_bytes(kWarps, int(mixture.n_dims)));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory of em_screen_kernel");
    const int frames = kWarps * kTileFrames;
    kernel<<<(x.n_rows + frames - 1) / frames, 32 * kWarps, bytes, stream>>>(x, mixture, margin,
                                                                            mask);
    check(cudaGetLastError(), "em_screen_kernel");
}

// As many warps as the features of their frames leave shared memory for.
template <typename T>
void screen(const ChunkView<T>& x, const Operands& mixture, double margin, uint32_t* mask,
            cudaStream_t stream) {
    const int steps = depth_of(int(mixture.n_dims)) / kStepDepth;
    if (steps == kStageSteps) {
        screen<T, 8, kStageSteps>(x, mixture, margin, mask, stream);
    } else if (steps <= 16) {
        screen<T, 8, 0>(x, mixture, margin, mask, stream);
    } else if (steps <= 32) {
        screen<T, 4, 0>(x, mixture, margin, mask, stream);
    } else {
        screen<T, 2, 0>(x, mixture, margin, mask, stream);
    }
}

template <typename T, int kFixedDims>
void refine(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
            cudaStream_t stream) {
    const auto kernel = em_refine_kernel<T, kFixedDims>;
    constexpr int kBytes = sizeof(RefineShared);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "shared memory of em_refine_kernel");
    const int blocks = (x.n_rows + kBlockFrames - 1) / kBlockFrames;
    kernel<<<blocks, 32 * kRefineWarps, kBytes, stream>>>(x, mixture, hard, space.mask,
                                                          space.members, space.stride,
                                                          space.normalisers, space.likelihoods);
    check(cudaGetLastError(), "em_refine_kernel");
}

template <typename T>
void refine(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
            cudaStream_t stream) {
    if (mixture.n_dims == kUsualDims && x.stride_column == 1) {
        refine<T, kUsualDims>(x, mixture, hard, space, stream);
    } else {
        refine<T, 0>(x, mixture, hard, space, stream);
    }
}

template <typename T, int kSlots, int kPairs, int kFixedDims>
void moments(const ChunkView<T>& x, const Operands& mixture, const Workspace& space,
             cudaStream_t stream) {
    const int K = int(mixture.n_components);
    const dim3 grid(K, n_segments(K));
    em_moments_kernel<T, kSlots, kPairs, kFixedDims><<<grid, 32, 0, stream>>>(
        x, mixture, space.members, space.stride, space.normalisers, space.partials);
    check(cudaGetLastError(), "em_moments_kernel");
}

template <typename T>
void moments(const ChunkView<T>& x, const Operands& mixture, const Workspace& space,
             cudaStream_t stream) {
    const int64_t D = mixture.n_dims;
    if (D == kUsualDims && x.stride_column == 1) {
        moments<T, 3, 4, kUsualDims>(x, mixture, space, stream);
    } else if (D <= 32) {
        moments<T, 1, 4, 0>(x, mixture, space, stream);
    } else if (D <= 96) {
        moments<T, 3, 4, 0>(x, mixture, space, stream);
    } else if (D <= 256) {
        moments<T, 8, 2, 0>(x, mixture, space, stream);
    } else {
        moments<T, 16, 1, 0>(x, mixture, space, stream);
    }
}

}  // namespace

int device_count() {
    int n = 0;
    const cudaError_t code = cudaGetDeviceCount(&n);
    if (code == cudaSuccess) return n;
    if (!is_no_device(code)) check(code, "cudaGetDeviceCount");
    cudaGetLastError();
    return 0;
}

size_t workspace_bytes(int64_t n_components, int64_t n_dims) {
    return Workspace(nullptr, n_components, n_dims).used;
}

template <typename T>
void em_statistics(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                   const Statistics& out, void* workspace, int device, void* stream_handle) {
    if (!device_count()) throw std::runtime_error("no CUDA device");
    const OnDevice on_device(device);
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int64_t K = mixture.n_components, chunk = chunk_frames(K);
    const Workspace space(workspace, K, mixture.n_dims);
    check(cudaMemsetAsync(workspace, 0, space.zeroed, stream), "cudaMemsetAsync");
    for (int64_t start = 0; start < frames.n_rows; start += chunk) {
        const int n = static_cast<int>(std::min(chunk, frames.n_rows - start));
        const ChunkView<T> x{frames.data + start * frames.stride_row, frames.stride_row,
                             frames.stride_column, n};
        screen(x, mixture, mode.margin, space.mask, stream);
        refine(x, mixture, mode.hard, space, stream);
        moments(x, mixture, space, stream);
    }
    em_likelihood_kernel<<<1, 256, 0, stream>>>(space.likelihoods, int(chunk / kTileFrames),
                                                out.log_likelihood);
    check(cudaGetLastError(), "em_likelihood_kernel");
    em_finish_kernel<<<unsigned(K), 128, 0, stream>>>(mixture, space.partials, n_segments(K), out);
    check(cudaGetLastError(), "em_finish_kernel");
}

template void em_statistics(const Matrix<float>&, const Operands&, const Mode&, const Statistics&,
                            void*, int, void*);
template void em_statistics(const Matrix<double>&, const Operands&, const Mode&,
                            const Statistics&, void*, int, void*);

}  // namespace gmm_jepa::cuda
