// A table of which single rows are read: its rows lie one behind another in the parameter file, which is mapped.
#pragma once

#include <cstdint>

namespace gemma {

// A row has `columns` numbers of a form (layout.h): floats, bytes code + 128, or bytes of two codes + 8, the first in
// the low half.
struct RowTable {
  const uint8_t* values;
  const float* scales;  // [rows][columns / group], of codes
  int32_t form;         // of layout.h
  int32_t rows, columns;
  int32_t group;  // columns that share a scale
};

// y = the numbers begin..begin + count of a row, times `factor`. Groups and pairs of codes may be cut anywhere.
void ReadRow(const RowTable& table, int row, int begin, int count, float factor, float* y);

}  // namespace gemma
