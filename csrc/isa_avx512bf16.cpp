// See kernels_impl.h; built with flags of its own by setup.py, where the compiler knows them.
#if defined(__AVX512BF16__)
#include <immintrin.h>

#define GMM_JEPA_NAME "avx512bf16"
#define GMM_JEPA_BYTES 64
#define GMM_JEPA_TILE 6
#define GMM_JEPA_VECTORS 4
#define GMM_JEPA_NARROW Bfloat16
#define GMM_JEPA_PRODUCT_ROWS 12
#define GMM_JEPA_PRODUCT_VECTORS 2
#include "kernels_impl.h"

namespace gmm_jepa {
const Kernels* kernels_avx512bf16() { return &kTable; }
}  // namespace gmm_jepa
#else
#include "kernels.h"

namespace gmm_jepa {
const Kernels* kernels_avx512bf16() { return nullptr; }
}  // namespace gmm_jepa
#endif
