#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(GMM_JEPA_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gmm_jepa {
namespace {

// AMX with bfloat16, and Linux lets this process have the tiles: a thread's state grows by 8 KB.
bool has_tiles() {
#if defined(GMM_JEPA_X86) && defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kEnabled = 3u << 17, kOsXsave = 1u << 27;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsXsave)) return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kEnabled) != kEnabled) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

// Sets that were compiled in and that this processor and its operating system can run.
struct Available {
    Available() {
#ifdef GMM_JEPA_X86
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
        if (bf16 && has_tiles()) add(kernels_amx());
        if (bf16) add(kernels_avx512bf16());
        if (avx512 && __builtin_cpu_supports("avx512vnni")) add(kernels_avx512vnni());
        if (avx512) add(kernels_avx512());
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(kernels_avx2());
#endif
        add(kernels_portable());
    }

    void add(const Kernels* table) {
        if (!table) return;
        tables[n_tables++] = table;
        names += (names.empty() ? "" : ",") + std::string(table->name);
    }

    const Kernels* tables[6] = {};
    int n_tables = 0;
    std::string names;
};

const Available& available() {
    static const Available instance;
    return instance;
}

}  // namespace

const Kernels& kernels(const char* name) {
    if (!*name) return *available().tables[0];
    for (int i = 0; i < available().n_tables; ++i) {
        if (!std::strcmp(available().tables[i]->name, name)) return *available().tables[i];
    }
    throw std::invalid_argument("instruction set: expected one of " + available().names +
                                ", got " + name);
}

bool is_intel() {
#ifdef GMM_JEPA_X86
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

const char* available_kernels() { return available().names.c_str(); }

}  // namespace gmm_jepa
