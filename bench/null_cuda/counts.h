// What the stand-in for CUDA counts; `bench/null_cuda/counts.py` reads it.
#pragma once

#include <atomic>
#include <cstdint>

struct Counts {
    std::atomic<int64_t> launches;     // of kernels, matrix products of cuBLAS among them
    std::atomic<int64_t> graphs;       // launched; what they hold is counted when it is captured
    std::atomic<int64_t> waits;        // of the host for the device
    std::atomic<int64_t> impossible;   // launches that a device would refuse
};

extern "C" Counts null_cuda_counts;
