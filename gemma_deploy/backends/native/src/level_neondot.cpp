// ARM with dot products of bytes.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "table.h"
#include "vector_neon.h"

namespace gemma {
namespace {
const Kernels kTable = TableOf<NeonDot, NeonDotEight>("neondot");
}
const Kernels* const kNeonDot = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kNeonDot = nullptr;
}
#endif
