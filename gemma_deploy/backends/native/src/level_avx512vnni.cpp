// x86 with AVX-512 and its VNNI.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "table.h"
#include "vector_avx512.h"

namespace gemma {
namespace {
const Kernels kTable = TableOf<Avx512>("avx512vnni");
}
const Kernels* const kAvx512Vnni = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kAvx512Vnni = nullptr;
}
#endif
