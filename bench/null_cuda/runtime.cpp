// A CUDA runtime and driver without a device: memory is the host's, kernels are counted and not run.
//
// Functions that give nothing back but success are generated (build.py); here are those that must
// give something. What they say of the device is said of an H200.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "counts.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Counts null_cuda_counts = {};

namespace {

constexpr size_t kMemory = size_t(139) << 30;

std::atomic<bool> capturing{false};
thread_local int current_device = 0;

bool computes_values() {
    static const bool computes = [] {
        const char* const given = std::getenv("NULL_CUDA");
        return given && std::strcmp(given, "values") == 0;
    }();
    return computes;
}

// What was allocated here: address -> bytes, of pinned or of the device's memory. Never destroyed,
// since torch frees memory after main.
class Blocks {
  public:
    cudaError_t allocate(void** address, size_t bytes) {
        if (posix_memalign(address, 4096, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
        // So that what a kernel forgets to write shows: NaN, -1.
        if (computes_values()) std::memset(*address, 0xff, bytes);
        const std::lock_guard<std::mutex> guard(lock_);
        sizes_[uintptr_t(*address)] = bytes;
        return cudaSuccess;
    }

    cudaError_t release(void* address) {
        const std::lock_guard<std::mutex> guard(lock_);
        if (sizes_.erase(uintptr_t(address))) std::free(address);
        return cudaSuccess;
    }

    bool hold(const void* address) {
        const std::lock_guard<std::mutex> guard(lock_);
        auto block = sizes_.upper_bound(uintptr_t(address));
        if (block == sizes_.begin()) return false;
        --block;
        return uintptr_t(address) < block->first + block->second;
    }

  private:
    std::mutex lock_;
    std::map<uintptr_t, size_t> sizes_;
};

Blocks& pinned() {
    static auto* const blocks = new Blocks;
    return *blocks;
}

Blocks& on_device() {
    static auto* const blocks = new Blocks;
    return *blocks;
}

// Streams, events, graphs, modules, functions: any value that is not null nor given twice.
template <typename Handle>
Handle fresh_handle() {
    static std::atomic<uintptr_t> last{0x1000};
    return reinterpret_cast<Handle>(last += 0x10);
}

int n_devices() {
    const char* const given = std::getenv("NULL_CUDA_DEVICES");
    return given ? std::atoi(given) : 1;
}

int attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrL2CacheSize: return 60 << 20;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 3201000;
        case cudaDevAttrGlobalMemoryBusWidth: return 6144;
        default: return 0;
    }
}

cudaError_t launched(dim3 grid, dim3 block, size_t shared_bytes) {
    ++null_cuda_counts.launches;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    const bool fits = grid.x && grid.x <= 2147483647u && grid.y && grid.y <= 65535 && grid.z &&
                      grid.z <= 65535 && threads && threads <= 1024 && block.x <= 1024 &&
                      block.y <= 1024 && block.z <= 64 && shared_bytes <= 232448;
    if (fits) return cudaSuccess;
    ++null_cuda_counts.impossible;
    return cudaErrorInvalidConfiguration;
}

// No graph can hold a wait.
cudaError_t waited() {
    ++null_cuda_counts.waits;
    return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    void* stream;
};
thread_local std::vector<Launch> configured;

}  // namespace

// Devices.
EXPORT cudaError_t cudaGetDeviceCount(int* n) { return *n = n_devices(), cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid launch configuration";
        case cudaErrorStreamCaptureUnsupported: return "a wait while a graph is recorded";
        default: return "unknown error";
    }
}
EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORT cudaError_t cudaDriverGetVersion(int* version) {
    return *version = CUDA_VERSION, cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
    return *version = CUDA_VERSION, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    return *value = attribute(which), cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    std::strcpy(properties->name, "no GPU (null CUDA)");
    properties->totalGlobalMem = kMemory;
    properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
    properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    properties->warpSize = attribute(cudaDevAttrWarpSize);
    properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    properties->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    for (int axis = 0; axis < 3; ++axis) {
        properties->maxThreadsDim[axis] = attribute(cudaDevAttrMaxBlockDimX + axis);
        properties->maxGridSize[axis] = attribute(cudaDevAttrMaxGridDimX + axis);
    }
    properties->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    properties->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    properties->textureAlignment = 512;
    properties->unifiedAddressing = properties->concurrentKernels = 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int) {
    return std::strncpy(id, "0000:00:00.0", bytes), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }

// Memory.
EXPORT cudaError_t cudaMalloc(void** address, size_t bytes) {
    return on_device().allocate(address, bytes);
}
EXPORT cudaError_t cudaFree(void* address) { return on_device().release(address); }
EXPORT cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
    return pinned().allocate(address, bytes);
}
EXPORT cudaError_t cudaFreeHost(void* address) { return pinned().release(address); }
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return *total = kMemory, *free = kMemory - (size_t(1) << 30), cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
    // The device's own work takes no time; what it does not read need not be there.
    if (kind == cudaMemcpyDeviceToDevice && !computes_values()) return cudaSuccess;
    if (bytes) std::memmove(to, from, bytes);
    // To pageable memory it returns once the device is there.
    const bool waits = kind == cudaMemcpyDeviceToHost && !pinned().hold(to);
    return waits ? waited() : cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (bytes) std::memmove(to, from, bytes);
    return waited();
}
EXPORT cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
    if (computes_values()) std::memset(address, value, bytes);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* address, int value, size_t bytes) {
    return cudaMemsetAsync(address, value, bytes, nullptr);
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                            const void* address) {
    *attributes = {};
    attributes->type = pinned().hold(address)      ? cudaMemoryTypeHost
                       : on_device().hold(address) ? cudaMemoryTypeDevice
                                                   : cudaMemoryTypeUnregistered;
    attributes->devicePointer = const_cast<void*>(address);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    return on_device().allocate(address, 1 << 16);
}

// Streams, events and graphs. Every event takes a millisecond.
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return *stream = fresh_handle<cudaStream_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    return *stream = fresh_handle<cudaStream_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    return *priority = 0, cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited(); }
EXPORT cudaError_t cudaDeviceSynchronize() { return waited(); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited(); }
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return *event = fresh_handle<cudaEvent_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = fresh_handle<cudaEvent_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
    return *ms = 1.0f, cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return capturing = true, cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    return capturing = false, *graph = fresh_handle<cudaGraph_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** nodes,
                                            const cudaGraphEdgeData** edges, size_t* n) {
    if (id) *id = 1;
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(0x10);
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaStreamIsCapturing(stream, status);
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
    return *n = 1, cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t,
                                                 unsigned long long) {
    return *graph = fresh_handle<cudaGraphExec_t>(), cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    return ++null_cuda_counts.graphs, cudaSuccess;
}

// Kernels that the runtime knows.
EXPORT void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                            cudaStream_t stream) {
    configured.push_back({grid, block, shared_bytes, stream});
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                              void* stream) {
    const Launch last = configured.back();
    configured.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared_bytes = last.shared_bytes;
    *static_cast<void**>(stream) = last.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = cudaKernel_t(function), cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t bytes,
                                      cudaStream_t) {
    return launched(grid, block, bytes);
}
EXPORT cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t bytes,
                                    cudaStream_t) {
    return launched(grid, block, bytes);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void*, dim3 grid, dim3 block, void**,
                                               size_t bytes, cudaStream_t) {
    return launched(grid, block, bytes);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void*, void**) {
    return launched(launch->gridDim, launch->blockDim, launch->dynamicSmemBytes);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int,
                                                                 size_t) {
    return *n = 2, cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int,
                                                                          size_t, unsigned) {
    return *n = 2, cudaSuccess;
}

// The driver, which Triton and torch.compile call.
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* n) { return *n = n_devices(), CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int i) { return *device = i, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    return *value = attribute(which), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
    return *context = reinterpret_cast<CUcontext>(0x10), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    return cuCtxGetCurrent(context);
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return *flags = 0, *active = device == current_device, CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) {
    return *module = fresh_handle<CUmodule>(), CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
    return cuModuleLoad(module, nullptr);
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
    return cuModuleLoad(module, nullptr);
}
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
    return *function = fresh_handle<CUfunction>(), CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 64
             : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult, const char** text) {
    return *text = "no error", CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
    return *n = 2, CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
    return *n = 16, CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction, unsigned x, unsigned y, unsigned z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream,
                               void**, void**) {
    return CUresult(launched(dim3(x, y, z), dim3(block_x, block_y, block_z), shared_bytes));
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction, void**, void**) {
    const CUlaunchConfig& l = *launch;
    return CUresult(launched(dim3(l.gridDimX, l.gridDimY, l.gridDimZ),
                             dim3(l.blockDimX, l.blockDimY, l.blockDimZ), l.sharedMemBytes));
}
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
    const void* const given = reinterpret_cast<const void*>(address);
    if (!on_device().hold(given) && !pinned().hold(given)) return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr*>(value) = address;
    return CUDA_SUCCESS;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (found) {
        *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    }
    return cudaSuccess;
}
