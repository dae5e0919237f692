#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gmm_jepa {
namespace {

// Sets that were compiled in and that this processor and its operating system can run.
struct Available {
    Available() {
#ifdef GMM_JEPA_X86
        __builtin_cpu_init();
        const bool avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (avx512 && __builtin_cpu_supports("avx512bf16")) add(kernels_avx512bf16());
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

    const Kernels* tables[5] = {};
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

const char* available_kernels() { return available().names.c_str(); }

}  // namespace gmm_jepa
