// Products of codes for many rows, with tiles T (tiles.h) and vectors V whose codes of activations lie as two planes:
// of every 64 inputs 64 bytes code >> 7, signed, and 64 bytes code & 127.
//
// A tile of 16 rows times 64 inputs of a panel is one instruction for each plane. Sums of whole numbers are exact, and
// what is done with them afterwards is what Products<V> does in the same order: a row has the bits that it has alone.
#pragma once

#include <cstring>

#include "generic_product.h"

namespace gemma {
namespace {

template <class V, class T>
struct TileProducts {
  using F = typename V::F;
  static constexpr int kRows = 16;
  static constexpr int kFew = 4;  // fewer rows are vectors' work: a tile costs what 16 rows cost
  static constexpr size_t kPiece = static_cast<size_t>(kBlock) * kLanes;  // bytes of 64 inputs of a panel

  static bool Fits(const Product& work) {
    const Matrix& m = *work.matrix;
    if (work.exact || work.count < kFew) return false;
    return m.form == kInt8 ? m.group == 0 || m.group >= kBlock : m.form == kInt4 && (m.group == 0 || m.group >= 2 * kBlock);
  }

  static void Run(const Product& work) {
    if (!Fits(work)) return Products<V>::Run(work);
    T::Begin();
    for (int span = work.first; span < work.last; span++)
      for (int panel = work.begin; panel < work.end; panel += 2) Pair(work, panel, span);
    T::End();
  }

  // One panel, or two, and all rows.
  static void Pair(const Product& work, int panel, int span) {
    const Matrix& m = *work.matrix;
    const int begin = span * kSpan, end = begin + kSpan < m.columns ? begin + kSpan : m.columns;
    const int count = panel + 1 < work.end ? 2 : 1;
    alignas(64) uint8_t wide[2][kSpan * kLanes];  // of int4
    const uint8_t* panels[2];
    PanelsOf(m, panel, count, begin, end, wide, panels);
    for (int row = 0; row < work.count; row += kRows) {
      const int rows = row + kRows <= work.count ? kRows : work.count - row;
      Block{work, panels, panel, count, row, rows, span, begin, end, {}}.Run();
    }
  }

  // Bytes of inputs begin..end of two panels, or twice of one; nibbles become bytes in `wide`.
  static void PanelsOf(const Matrix& m, int panel, int count, int begin, int end, uint8_t (*wide)[kSpan * kLanes],
                       const uint8_t** panels) {
    for (int p = 0; p < 2; p++) {
      const uint8_t* at = m.panels + (panel + p % count) * PanelBytes(m.form, m.columns);
      if (m.form == kInt8) {
        panels[p] = at + static_cast<size_t>(begin) * kLanes;
      } else {
        panels[p] = wide[p % count];
        if (p < count) Widen(at + static_cast<size_t>(begin) * kLanes / 2, end - begin, wide[p]);
      }
    }
  }

  // Nibbles as bytes: of every 128 inputs the low ones first.
  static void Widen(const uint8_t* from, int inputs, uint8_t* to) {
    for (int k = 0; k < inputs; k += 2 * kBlock, from += kPiece, to += 2 * kPiece) {
      for (size_t i = 0; i < kPiece; i++) to[i] = from[i] & 15;
      for (size_t i = 0; i < kPiece; i++) to[kPiece + i] = from[i] >> 4;
    }
  }

  struct Block {
    const Product& work;
    const uint8_t* const* panels;  // bytes of the span
    int panel, count;              // count panels from `panel` on
    int row, rows;                 // at most kRows
    int span, begin, end;          // inputs of all
    alignas(64) float inner[2][kRows][kLanes];

    const Span& RowSpan(int r) const {
      return work.rows[static_cast<size_t>(row + r) * work.row_spans + (span - work.first)];
    }

    void Run() {
      alignas(64) int8_t copied[kRows * 2 * kSpan];
      size_t stride = 0;
      const int8_t* codes = Codes(copied, &stride);
      std::memset(inner, 0, sizeof inner);
      const Matrix& m = *work.matrix;
      const int piece = m.group != 0 && m.group < kExact ? m.group : kExact, offset = m.form == kInt8 ? 128 : 8;
      for (int k0 = begin; k0 < end; k0 += piece) {
        const int k1 = k0 + piece < end ? k0 + piece : end;
        alignas(64) int32_t sums[4][kRows][kLanes];  // of the first panel high and low, of the second
        Multiply(codes, stride, k0 - begin, k1 - begin, sums);
        for (int r = 0; r < rows; r++) {
          const int32_t* before = RowSpan(r).sums;
          const auto less = V::SetInt(offset * (before[(k1 - begin) / kSums] - before[(k0 - begin) / kSums]));
          for (int p = 0; p < count; p++) {
            const F sum = V::Float(V::Sub(V::Join(sums[2 * p][r], sums[2 * p + 1][r]), less));
            const F old = V::Load(inner[p][r]);
            V::Store(inner[p][r], m.group == 0 ? V::Add(old, sum)
                                               : V::Fma(sum, Products<V>::GroupScale(m, panel + p, k0 / m.group), old));
          }
        }
      }
      for (int r = 0; r < rows; r++)
        for (int p = 0; p < count; p++)
          Products<V>::Finish(work, row + r, panel + p, span, V::Load(inner[p][r]), *RowSpan(r).scale);
    }

    // The rows' codes where a tile reads them: as they are, if there are sixteen at equal distances, else copied.
    const int8_t* Codes(int8_t* copied, size_t* stride) const {
      const int8_t* first = RowSpan(0).codes;
      const ptrdiff_t step = rows == kRows ? RowSpan(1).codes - first : 0;
      bool even = step > 0;
      for (int r = 1; r < rows && even; r++) even = RowSpan(r).codes - first == r * step;
      *stride = even ? static_cast<size_t>(step) : 2 * static_cast<size_t>(kSpan);
      if (even) return first;
      for (int r = 0; r < rows; r++) std::memcpy(copied + r * *stride, RowSpan(r).codes, 2 * static_cast<size_t>(end - begin));
      for (int r = rows; r < kRows; r++) std::memset(copied + r * *stride, 0, 2 * static_cast<size_t>(end - begin));
      return copied;
    }

    // Sums of the span's inputs k0..k1 (multiples of 64).
    void Multiply(const int8_t* codes, size_t stride, int k0, int k1, int32_t (*sums)[kRows][kLanes]) const {
      T::template Zero<0>();
      T::template Zero<1>();
      T::template Zero<2>();
      T::template Zero<3>();
      for (int k = k0; k < k1; k += kBlock) {
        T::template Load<4>(codes + 2 * static_cast<size_t>(k), stride);
        T::template Load<5>(codes + 2 * static_cast<size_t>(k) + kBlock, stride);
        T::template Load<6>(panels[0] + static_cast<size_t>(k) * kLanes, 64);
        T::template Load<7>(panels[1] + static_cast<size_t>(k) * kLanes, 64);
        T::template Multiply<0, 4, 6>();
        T::template Multiply<1, 5, 6>();
        T::template Multiply<2, 4, 7>();
        T::template Multiply<3, 5, 7>();
      }
      T::template Store<0>(sums[0], 64);
      T::template Store<1>(sums[1], 64);
      T::template Store<2>(sums[2], 64);
      T::template Store<3>(sums[3], 64);
    }
  };
};

}  // namespace
}  // namespace gemma
