// x86 with AMX's tiles of bytes, and with AVX-512 and its VNNI for all that is no product of many rows.
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#include "generic_tiles.h"
#include "generic_tiles8.h"
#include "table.h"
#include "tiles.h"
#include "vector_amx.h"

namespace gemma {
namespace {
constexpr Kernels WithTiles(Kernels table) {
  table.product = ProductOf<TileProducts<Amx512, AmxTiles>, TileProducts8<Avx512Eight, AmxTiles>>;
  return table;
}
const Kernels kTable = WithTiles(TableOf<Amx512, Avx512Eight>("amx"));
}  // namespace
const Kernels* const kAmx = &kTable;
}  // namespace gemma
#else
#include "kernels.h"
namespace gemma {
const Kernels* const kAmx = nullptr;
}
#endif
