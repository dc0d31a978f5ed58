// x86 with AVX2, FMA and F16C.
#if defined(__AVX2__)
#include "table.h"
#include "vector_avx2.h"

namespace gemma {
namespace {
const Kernels kTable = TableOf<Avx2, Avx2Eight>("avx2");
}
const Kernels* const kAvx2 = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kAvx2 = nullptr;
}
#endif
