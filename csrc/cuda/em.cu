// Launches of one EM iteration: chunk by chunk a screen, a refinement and the moments; then sums.
#include "em.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "moments.cuh"
#include "refine.cuh"
#include "screen.cuh"
#include "screen_tiles.cuh"

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

// The device of a call, and after it the one before. Nothing is set where both are one: that would
// make a context on a device that had none.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~OnDevice() {
        if (device_ != before_) cudaSetDevice(before_);
    }

  private:
    int device_, before_ = 0;
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
        sums = take<FrameSum>(frames);
        list.used = take<uint32_t>(1);
        list.spilled = take<uint32_t>(1);
        list.refined = take<Refined>(1);
        zeroed = used;
        normalisers = take<Normaliser>(frames);
        mask = take<uint32_t>(frames / kTileFrames * K);
        list.capacity = static_cast<uint32_t>(list_pairs(K));
        list.values = take<double>(list.capacity);
        list.pairs = take<uint32_t>(list.capacity);
        list.ranges = take<int2>(n_sections(frames) * K);
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
    FrameSum* sums;
    Normaliser* normalisers;
    uint32_t* mask;  // (tiles, K)
    PairList list;
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

// Whether this GPU has products of warpgroups, and the module machine code with them. Their screen
// has not run on a GPU yet: until it has, it is asked for by name.
bool takes_warpgroups() {
    const char* const asked = std::getenv("GMM_JEPA_UNPROVEN_KERNELS");
    if (asked == nullptr || std::strcmp(asked, "1") != 0) return false;
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, em_tiles_kernel), "em_tiles_kernel");
    return attributes.maxThreadsPerBlock >= 32 * kTileScreenWarps;
}

void screen_tiles(const ChunkView<float>& x, const Operands& mixture, double margin, uint32_t* mask,
                  cudaStream_t stream) {
    constexpr int kBytes = sizeof(TileScreenShared);
    check(cudaFuncSetAttribute(em_tiles_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kBytes),
          "shared memory of em_tiles_kernel");
    const int blocks = (x.n_rows + kTileScreenFrames - 1) / kTileScreenFrames;
    em_tiles_kernel<<<blocks, 32 * kTileScreenWarps, kBytes, stream>>>(x, mixture, margin, mask);
    check(cudaGetLastError(), "em_tiles_kernel");
}

// As many warps as the features of their frames leave shared memory for.
template <typename T>
void screen(const ChunkView<T>& x, const Operands& mixture, double margin, uint32_t* mask,
            cudaStream_t stream) {
    const int steps = depth_of(int(mixture.n_dims)) / kStepDepth;
    if constexpr (sizeof(T) == 4) {
        if (steps == kTileSteps && takes_warpgroups()) {
            screen_tiles(x, mixture, margin, mask, stream);
            return;
        }
    }
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

// Rows of blocks that share what there is of a chunk whose pairs were not kept: few, for most often
// there is nothing.
constexpr int kAgainRows = 8;

// Log-densities of the pairs that the screen left, and what normalises the frames.
template <typename T, int kSlots, int kPairs, int kFixedDims>
void refine(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
            cudaStream_t stream) {
    constexpr int kThreads = 32 * kRefineWarps;
    const unsigned columns = (mixture.n_components + kRefineComponents - 1) / kRefineComponents;
    em_refine_kernel<T, kSlots, kPairs, kFixedDims>
        <<<dim3(columns, n_sections(x.n_rows)), kThreads, 0, stream>>>(x, mixture, space.mask,
                                                                       space.sums, space.list);
    check(cudaGetLastError(), "em_refine_kernel");
    em_share_kernel<<<1024, 256, 0, stream>>>(space.sums, space.list, hard);
    check(cudaGetLastError(), "em_share_kernel");
    em_share_again_kernel<T, kSlots, kPairs, kFixedDims>
        <<<dim3(columns, kAgainRows), kThreads, 0, stream>>>(x, mixture, space.mask, space.sums,
                                                             space.list, hard);
    check(cudaGetLastError(), "em_share_again_kernel");
    em_frame_kernel<<<(x.n_rows + 255) / 256, 256, 0, stream>>>(
        space.sums, x.n_rows, hard, space.normalisers, space.likelihoods, space.list);
    check(cudaGetLastError(), "em_frame_kernel");
}

template <typename T, int kSlots, int kPairs, int kFixedDims>
void moments(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
             cudaStream_t stream) {
    const unsigned K = unsigned(mixture.n_components);
    const int segments = n_segments(K);
    em_moments_kernel<T, kSlots, kPairs, kFixedDims><<<dim3(K, segments), 32, 0, stream>>>(
        x, mixture, hard, space.normalisers, space.list, space.partials);
    check(cudaGetLastError(), "em_moments_kernel");
    em_moments_again_kernel<T, kSlots, kPairs, kFixedDims>
        <<<dim3(K, std::min(segments, kAgainRows)), 32, 0, stream>>>(
            x, mixture, hard, space.mask, space.normalisers, space.list, segments, space.partials);
    check(cudaGetLastError(), "em_moments_again_kernel");
}

template <typename T, int kSlots, int kPairs, int kFixedDims = 0>
void add_chunk(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
               cudaStream_t stream) {
    refine<T, kSlots, kPairs, kFixedDims>(x, mixture, hard, space, stream);
    moments<T, kSlots, kPairs, kFixedDims>(x, mixture, hard, space, stream);
}

// As many features a lane as there are, and as many pairs at a time as these leave registers for.
template <typename T>
void add_chunk(const ChunkView<T>& x, const Operands& mixture, bool hard, const Workspace& space,
               cudaStream_t stream) {
    const int64_t D = mixture.n_dims;
    if constexpr (sizeof(T) == 4) {
        // Rows are copied 16 bytes at a time.
        const bool is_aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
        const bool is_dense = x.stride_column == 1 && x.stride_row % 4 == 0;
        if (D == kUsualDims && is_aligned && is_dense) {
            add_chunk<T, 3, 4, kUsualDims>(x, mixture, hard, space, stream);
            return;
        }
    }
    if (D <= 32) {
        add_chunk<T, 1, 4>(x, mixture, hard, space, stream);
    } else if (D <= 96) {
        add_chunk<T, 3, 4>(x, mixture, hard, space, stream);
    } else if (D <= 256) {
        add_chunk<T, 8, 2>(x, mixture, hard, space, stream);
    } else {
        add_chunk<T, 16, 1>(x, mixture, hard, space, stream);
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

Refined last_refined(void* workspace, int64_t n_components, int64_t n_dims, int device,
                     void* stream_handle) {
    const OnDevice on_device(device);
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const Workspace space(workspace, n_components, n_dims);
    Refined refined;
    check(cudaMemcpyAsync(&refined, space.list.refined, sizeof refined, cudaMemcpyDeviceToHost,
                          stream),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return refined;
}

template <typename T>
void em_statistics(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                   const Statistics& out, void* workspace, int device, void* stream_handle) {
    if (!device_count()) throw std::runtime_error("no CUDA device");
    if (frames.stride_row < 0 || frames.stride_row >= (int64_t(1) << 32) / int64_t(sizeof(T))) {
        throw std::runtime_error("frames: expected rows less than 4 GB apart, got " +
                                 std::to_string(frames.stride_row) + " values of " +
                                 std::to_string(sizeof(T)) + " bytes");
    }
    const OnDevice on_device(device);
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int64_t K = mixture.n_components, chunk = chunk_frames(K);
    const Workspace space(workspace, K, mixture.n_dims);
    check(cudaMemsetAsync(workspace, 0, space.zeroed, stream), "cudaMemsetAsync");
    for (int64_t start = 0; start < frames.n_rows; start += chunk) {
        const int n = static_cast<int>(std::min(chunk, frames.n_rows - start));
        const ChunkView<T> x{frames.data + start * frames.stride_row, frames.stride_row,
                             frames.stride_column,
                             static_cast<uint32_t>(frames.stride_row * int64_t(sizeof(T))), n};
        screen(x, mixture, mode.margin, space.mask, stream);
        add_chunk(x, mixture, mode.hard, space, stream);
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
