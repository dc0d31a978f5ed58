// Any processor.
#include "table.h"
#include "vector_plain.h"

namespace gemma {
namespace {
const Kernels kTable = TableOf<Plain, PlainEight>("plain");
}
const Kernels* const kPlain = &kTable;
}  // namespace gemma
