// See kernels_impl.h; built with flags of its own by setup.py.

#define GMM_JEPA_NAME "portable"
#define GMM_JEPA_BYTES 16
#define GMM_JEPA_TILE 4
#define GMM_JEPA_VECTORS 2
#define GMM_JEPA_NARROW Float32
#define GMM_JEPA_PRODUCT_ROWS 6
#define GMM_JEPA_PRODUCT_VECTORS 2
#include "kernels_impl.h"

namespace gmm_jepa {
const Kernels* kernels_portable() { return &kTable; }
}  // namespace gmm_jepa
