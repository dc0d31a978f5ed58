// Products of codes by activations of 8 bits for many rows, with tiles T (tiles.h) and vectors E, in which a row has the
// bits that Products8<E> gives it alone.
#pragma once

#include <cstring>

#include "generic_product8.h"
#include "generic_tiles.h"

namespace gemma {
namespace {

template <class E, class T>
struct TileProducts8 {
  using F = typename E::F;
  using Wide = TileProducts<E, T>;
  static constexpr int kRows = Wide::kRows;

  // Inputs that share all scales.
  static int PieceOf(const Matrix& m) { return m.group != 0 && m.group < m.input_group ? m.group : m.input_group; }

  static void Run(const Product& work) {
    if (work.count < Wide::kFew || PieceOf(*work.matrix) < kBlock) return Products8<E>::Run(work);
    T::Begin();
    for (int span = work.first; span < work.last; span++)
      for (int panel = work.begin; panel < work.end; panel += 2) Pair(work, panel, span);
    T::End();
  }

  // One panel, or two, and all rows.
  static void Pair(const Product& work, int panel, int span) {
    const int begin = span * kSpan, end = begin + kSpan < work.matrix->columns ? begin + kSpan : work.matrix->columns;
    const int count = panel + 1 < work.end ? 2 : 1;
    alignas(64) uint8_t wide[2][kSpan * kLanes];  // of int4
    const uint8_t* panels[2];
    Wide::PanelsOf(*work.matrix, panel, count, begin, end, wide, panels);
    for (int row = 0; row < work.count; row += kRows) {
      const int rows = row + kRows <= work.count ? kRows : work.count - row;
      Block{work, panels, panel, count, row, rows, span, begin, end, {}}.Run();
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
      alignas(64) int8_t codes[kRows][kSpan];
      for (int r = 0; r < rows; r++) std::memcpy(codes[r], RowSpan(r).codes, static_cast<size_t>(end - begin));
      for (int r = rows; r < kRows; r++) std::memset(codes[r], 0, static_cast<size_t>(end - begin));
      std::memset(inner, 0, sizeof inner);
      const Matrix& m = *work.matrix;
      const int piece = PieceOf(m), offset = m.form == kInt8 ? 128 : 8;
      for (int k0 = begin; k0 < end; k0 += piece) {
        const int k1 = k0 + piece < end ? k0 + piece : end;
        alignas(64) int32_t sums[2][kRows][kLanes];
        Multiply(codes[0], k0 - begin, k1 - begin, sums);
        for (int r = 0; r < rows; r++) {
          const int32_t* before = RowSpan(r).sums;
          const auto less = E::SetInt(offset * (before[(k1 - begin) / kSums] - before[(k0 - begin) / kSums]));
          const F scale = E::Set(RowSpan(r).scale[(k0 - begin) / m.input_group]);
          for (int p = 0; p < count; p++) {
            const F both = m.group == 0 ? scale : E::Mul(scale, Products<E>::GroupScale(m, panel + p, k0 / m.group));
            const F sum = E::Float(E::Sub(E::LoadInt(sums[p][r]), less));
            E::Store(inner[p][r], E::Fma(sum, both, E::Load(inner[p][r])));
          }
        }
      }
      for (int r = 0; r < rows; r++)
        for (int p = 0; p < count; p++) Products<E>::Finish(work, row + r, panel + p, span, E::Load(inner[p][r]), 1.0f);
    }

    // Sums of the span's inputs k0..k1 (multiples of 64).
    void Multiply(const int8_t* codes, int k0, int k1, int32_t (*sums)[kRows][kLanes]) const {
      T::template Zero<0>();
      T::template Zero<1>();
      for (int k = k0; k < k1; k += kBlock) {
        T::template Load<4>(codes + k, kSpan);
        T::template Load<6>(panels[0] + static_cast<size_t>(k) * kLanes, 64);
        T::template Load<7>(panels[1] + static_cast<size_t>(k) * kLanes, 64);
        T::template Multiply<0, 4, 6>();
        T::template Multiply<1, 4, 7>();
      }
      T::template Store<0>(sums[0], 64);
      T::template Store<1>(sums[1], 64);
    }
  };
};

}  // namespace
}  // namespace gemma
