// x86 with AVX-512 and its VNNI.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "generic_packed.h"
#include "table.h"
#include "vector_avx512.h"

namespace gemma {
namespace {
constexpr Kernels Packed(Kernels table) {
  table.product = ProductOf<PackedProducts<Avx512>, Products8<Avx512Eight>>;
  return table;
}
const Kernels kTable = Packed(TableOf<Avx512, Avx512Eight>("avx512vnni"));
}  // namespace
const Kernels* const kAvx512Vnni = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kAvx512Vnni = nullptr;
}
#endif
