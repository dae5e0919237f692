// See kernels_impl.h; built with flags of its own by setup.py.
#include <immintrin.h>

#define GMM_JEPA_NAME "avx512vnni"
#define GMM_JEPA_BYTES 64
#define GMM_JEPA_TILE 6
#define GMM_JEPA_VECTORS 4
#define GMM_JEPA_NARROW Int16
#define GMM_JEPA_PRODUCT_ROWS 12
#define GMM_JEPA_PRODUCT_VECTORS 2
#include "kernels_impl.h"

namespace gmm_jepa {
const Kernels* kernels_avx512vnni() { return &kTable; }
}  // namespace gmm_jepa
