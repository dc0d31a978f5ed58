// How weights, activations and caches lie in memory. Everything here is plain data: no code but sizes.
//
// A matrix [N, K] (N output features, K input features) is stored in panels of 16 output features. N is padded to a
// multiple of 16, K to a multiple of 64, with zeros. Within a panel:
//   int8      [K/4][16 n][4 k]        unsigned bytes, code + 128
//   int4      [K/128][16][16 n][4 k]  bytes: low nibble of input k, high nibble of input k + 64, code + 8;
//                                     K is padded to a multiple of 128
//   bfloat16  [K/2][16 n][2 k]
//   float16   [K][16 n]
//   float32   [K][16 n]
//   planes    8 bits in two halves, for a head that is screened (screening.h): panels of code + 128 >> 4 as those of
//             int4, and behind those of all rows the low halves row by row, [N][K/64][32] bytes: low nibble of input k,
//             high nibble of input k + 32; K is padded to a multiple of 128
// A vector kernel reads a panel as one stream, and 64 inputs of an int8 panel are a B tile of AMX.
//
// Scales: one for each row, [N], or for each group of inputs, [N/16][groups][16]; of planes [N][groups]. A group is 32 to 2048 inputs, a power
// of two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma {

constexpr int kLanes = 16;   // output features of a panel
constexpr int kBlock = 64;   // K is a multiple of it
constexpr int kSpan = 2048;  // inputs that share a scale of the activations
constexpr int kSums = 32;    // inputs between two entries of an activation row's running sums
constexpr int kCodeMax = 127 * 128;  // activations are rounded to -kCodeMax .. kCodeMax
// Inputs whose products are summed as integers: 255 * kCodeMax * 512 is less than 2^31, so that no sum overflows.
constexpr int kExact = 512;
// Of 8 bits activations are rounded to -kByteMax .. kByteMax, and a span is summed as integers: 255 * 127 * 2048 < 2^27.
constexpr int kByteMax = 127;
constexpr int kPage = 128;   // positions of a page of a cache: also what attention adds up at once

enum Form : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4, kPlanes = 5 };

// A matrix as it lies in a parameter file.
struct Matrix {
  const uint8_t* panels;
  const uint8_t* scales;  // null for floats
  int32_t form;           // of the panels
  int32_t scale_form;     // kFloat32, kFloat16 or kBFloat16
  int32_t rows;           // N, padded
  int32_t columns;        // K, padded
  int32_t group;          // inputs that share a scale; 0: all of them
  int32_t input_group;    // of codes: 0 for activations of 15 bits; else these have 8, and a scale for so many inputs
};

// How what a matrix reads is rounded: not at all, to 15 bits, or to 8 in groups of so many inputs.
constexpr int kUnrounded = -1;
constexpr int RoundingOf(const Matrix& m) { return m.form >= kInt8 ? m.input_group : kUnrounded; }

// Bytes of one panel of 16 output features; of planes those of its high halves.
constexpr size_t PanelBytes(int32_t form, int32_t columns) {
  const size_t inputs = static_cast<size_t>(columns) * kLanes;
  return form >= kInt4 ? inputs / 2 : form == kInt8 ? inputs : form == kFloat32 ? inputs * 4 : inputs * 2;
}

// The low halves of a row of planes.
inline const uint8_t* LowHalves(const Matrix& m, int row) {
  const size_t half = static_cast<size_t>(m.columns) / 2;
  return m.panels + (static_cast<size_t>(m.rows) + static_cast<size_t>(row)) * half;
}

// Rows first..first + count of a matrix, of whole panels; not of planes.
inline Matrix RowsOf(const Matrix& m, int first, int count) {
  Matrix some = m;
  some.panels += first / kLanes * PanelBytes(m.form, m.columns);
  const size_t scales = static_cast<size_t>(first) * (m.group == 0 ? 1 : m.columns / m.group);
  if (m.scales != nullptr) some.scales += scales * (m.scale_form == kFloat32 ? 4 : 2);
  some.rows = count;
  return some;
}

// At most kSpan activations of one row: as floats, and rounded, x ~ scale * code.
struct Span {
  const float* values;
  int8_t* codes;  // 2 bytes for each input; their order is the level's own
  float* scale;   // of 8 bits [inputs / input_group], else one
  int32_t* sums;  // [inputs / kSums + 1]: sum of the codes before input 32 * i
};

constexpr int Spans(int columns) { return (columns + kSpan - 1) / kSpan; }

// The keys and values of kPage positions of one KV head, one of these forms:
//   bfloat16  keys [kPage / 16][D / 2][16 positions][2 channels], values [D / 16][kPage / 2][16 channels][2 positions]
//   float32   keys [kPage / 16][D][16 positions], values [D / 16][kPage][16 channels]
//   int8      keys [kPage / 16][D / 4][16 positions][4 channels], values [D / 16][kPage / 4][16 channels][4 positions],
//             code + 128; beside them a scale for each position
struct Page {
  int32_t form;
  uint8_t* keys;
  uint8_t* values;
  float* key_scales;  // [kPage], of int8
  float* value_scales;
};

// Bytes of the keys, and of the values, of a page of one KV head; scales not counted.
constexpr size_t HalfPageBytes(int32_t form, int head_dim) {
  return static_cast<size_t>(kPage) * head_dim * (form == kInt8 ? 1 : form == kFloat32 ? 4 : 2);
}

// Bytes of a page of one KV head: keys, values, scales of keys, scales of values.
constexpr size_t PageBytes(int32_t form, int head_dim) {
  return 2 * (HalfPageBytes(form, head_dim) + (form == kInt8 ? kPage * sizeof(float) : 0));
}

// The page of one KV head that begins at `at`.
inline Page PageAt(uint8_t* at, int32_t form, int head_dim) {
  const size_t half = HalfPageBytes(form, head_dim);
  float* scales = form == kInt8 ? reinterpret_cast<float*>(at + 2 * half) : nullptr;
  return Page{form, at, at + half, scales, scales == nullptr ? nullptr : scales + kPage};
}

}  // namespace gemma
