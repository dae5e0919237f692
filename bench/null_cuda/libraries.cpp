// What the stand-ins for CUDA's libraries must give back: cuBLAS, cuFFT, CUPTI, NVRTC, NCCL. The
// rest is generated (build.py). Statuses are int, of which 0 is success everywhere. cuDNN has no
// stand-in: `site/sitecustomize.py` turns it off.
#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "counts.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// What a product or a transform does here: build.py makes them up with this.
extern "C" int null_cuda_computed() {
    ++null_cuda_counts.launches;
    return 0;
}

namespace {

// cublasLtMatmulHeuristicResult_t
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

}  // namespace

EXPORT int cublasCreate_v2(void** handle) { return *handle = &null_cuda_counts, 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }  // on the host
EXPORT int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                          Heuristic* found, int* n) {
    return *found = {}, *n = 1, 0;
}

EXPORT int cufftCreate(int* plan) { return *plan = 1, 0; }
EXPORT int cufftXtMakePlanMany(int, int, long long*, long long*, long long, long long, int,
                               long long*, long long, long long, int, long long, size_t* workspace,
                               int) {
    return *workspace = 0, 0;
}

EXPORT int cuptiGetVersion(uint32_t* version) { return *version = CUDA_VERSION, 0; }
EXPORT int cuptiGetResultString(int, const char** text) { return *text = "no error", 0; }
EXPORT int cuptiActivityGetNextRecord(uint8_t*, size_t, void**) { return 12; }  // no more
EXPORT int cuptiActivityGetNumDroppedRecords(void*, uint32_t, size_t* n) { return *n = 0, 0; }

EXPORT int nvrtcVersion(int* major, int* minor) {
    return *major = CUDA_VERSION / 1000, *minor = CUDA_VERSION % 1000 / 10, 0;
}
EXPORT int nvrtcGetPTXSize(void*, size_t* bytes) { return *bytes = 1, 0; }
EXPORT int nvrtcGetCUBINSize(void*, size_t* bytes) { return *bytes = 1, 0; }
EXPORT int nvrtcGetProgramLogSize(void*, size_t* bytes) { return *bytes = 1, 0; }
EXPORT int nvrtcGetLoweredName(void*, const char*, const char** name) { return *name = "", 0; }
EXPORT const char* nvrtcGetErrorString(int) { return "no error"; }

EXPORT size_t cudnnGetVersion() { return 91000; }
EXPORT size_t cudnnGetCudartVersion() { return CUDA_VERSION; }
EXPORT const char* cudnnGetErrorString(int) { return "no error"; }

EXPORT int ncclGetVersion(int* version) { return *version = 22800, 0; }
EXPORT int ncclCommGetAsyncError(void*, int* error) { return *error = 0, 0; }
EXPORT const char* ncclGetErrorString(int) { return "no error"; }
EXPORT const char* ncclGetLastError(void*) { return "no error"; }
