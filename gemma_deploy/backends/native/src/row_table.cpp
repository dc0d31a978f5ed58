#include "row_table.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "half.h"
#include "layout.h"

namespace gemma {
namespace {

// Numbers begin..end of a row of codes; code(k) is that of column k.
template <class Code>
void Scaled(const RowTable& table, int row, int begin, int end, float factor, float* y, const Code& code) {
  const float* scales = table.scales + static_cast<size_t>(row) * (table.columns / table.group);
  for (int k = begin; k < end;) {
    const float scale = scales[k / table.group];
    for (const int stop = std::min(end, (k / table.group + 1) * table.group); k < stop; k++)
      *y++ = static_cast<float>(code(k)) * scale * factor;
  }
}

}  // namespace

void ReadRow(const RowTable& table, int row, int begin, int count, float factor, float* y) {
  const size_t first = static_cast<size_t>(row) * table.columns;
  const int end = begin + count;
  if (table.form == kInt8) {
    const uint8_t* codes = table.values + first;
    Scaled(table, row, begin, end, factor, y, [&](int k) { return codes[k] - 128; });
  } else if (table.form == kInt4) {
    const uint8_t* pairs = table.values + first / 2;
    const auto code = [&](int k) { return (k % 2 ? pairs[k / 2] >> 4 : pairs[k / 2] & 15) - 8; };
    Scaled(table, row, begin, end, factor, y, code);
  } else if (table.form == kFloat32) {
    std::memcpy(y, table.values + (first + begin) * 4, static_cast<size_t>(count) * 4);
    for (int i = 0; i < count; i++) y[i] *= factor;
  } else {
    const uint8_t* halves = table.values + (first + begin) * 2;
    for (int i = 0; i < count; i++) {
      uint16_t half;
      std::memcpy(&half, halves + static_cast<size_t>(i) * 2, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      y[i] = (table.form == kFloat16 ? FromHalf(half) : x) * factor;
    }
  }
}

}  // namespace gemma
