// x86 with AVX2 and VNNI of 256 bits.
#if defined(__AVXVNNI__)
#include "table.h"
#include "vector_avx2.h"

namespace gemma {
namespace {
const Kernels kTable = TableOf<AvxVnni, AvxVnniEight>("avxvnni");
}
const Kernels* const kAvxVnni = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kAvxVnni = nullptr;
}
#endif
