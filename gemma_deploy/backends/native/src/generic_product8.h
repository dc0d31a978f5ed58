// Products of codes by activations of 8 bits, for any vector type E of sixteen lanes that has them (vector_*.h).
//
// Half the integer products of those of 15 bits. Scales belong to groups of inputs, so that a large number makes those
// around it coarse and no others.
#pragma once

#include "generic_product.h"

namespace gemma {
namespace {

template <class E>
struct Products8 {
  using F = typename E::F;
  // Largest numbers from here on are rounded; smaller ones, whose inverse would be infinite, are zeros.
  static constexpr float kLeast = 1e-35f;

  static void Round(const Span& span, int inputs, int group) {
    span.sums[0] = 0;
    for (int begin = 0; begin < inputs; begin += group) {
      const int end = begin + group < inputs ? begin + group : inputs;
      auto largest = E::Set(0.0f);
      for (int k = begin; k < end; k += 16) largest = E::Max(largest, E::Abs(E::Load(span.values + k)));
      const float most = E::Largest(largest), scale = most > kLeast ? most / kByteMax : 0;
      span.scale[begin / group] = scale;
      const auto inverse = E::Set(scale > 0 ? 1 / scale : 0);
      const auto top = E::Set(static_cast<float>(kByteMax)), bottom = E::Set(-static_cast<float>(kByteMax));
      for (int k = begin; k < end; k += kSums) {
        int32_t sum = 0;
        for (int j = k; j < k + kSums; j += 16) {
          const auto q = E::Min(E::Max(E::Nearest(E::Mul(E::Load(span.values + j), inverse)), bottom), top);
          E::StoreCodes(span.codes, j, q);
          sum += E::SumInt(q);
        }
        span.sums[k / kSums + 1] = span.sums[k / kSums] + sum;
      }
    }
  }

  // R rows times P panels, over the inputs of one span: steps are those of 15 bits, sums end where scales do.
  template <int R, int P>
  struct Block : Products<E>::template Block<R, P> {
    using Steps = typename Products<E>::template Block<R, P>;
    using Accs = typename E::Acc[R][P];
    using Steps::inner, Steps::m, Steps::rows, Steps::start;

    // Sums begin with what codes that are not centred make too high.
    void Begin(Accs& acc, int begin, int end, int offset) const {
      for (int r = 0; r < R; r++) {
        const int32_t* before = rows[r]->sums;
        const int32_t low = E::kCentred ? 0 : offset * (before[(end - start) / kSums] - before[(begin - start) / kSums]);
        for (int p = 0; p < P; p++) acc[r][p] = E::Begin(-low);
      }
    }

    // Adds the sums of inputs from `begin` on, which share all scales.
    void Flush(const Accs& acc, int begin, int panel) {
      for (int r = 0; r < R; r++) {
        const F scale = E::Set(rows[r]->scale[(begin - start) / m.input_group]);
        for (int p = 0; p < P; p++) {
          const F both = m.group == 0 ? scale : E::Mul(scale, Products<E>::GroupScale(m, panel + p, begin / m.group));
          inner[r][p] = E::Fma(E::Float(E::Total(acc[r][p])), both, inner[r][p]);
        }
      }
    }

    // A row alone waits for memory; several take as long as their products, and these longer beside other loads.
    void Ahead(size_t at) {
      if constexpr (R == 1) Steps::Ahead(at);
    }

    void Bytes(int begin, int end, int panel) {
      Accs acc;
      Begin(acc, begin, end, 128);
      for (int k = begin; k < end; k += 4) {
        const size_t at = static_cast<size_t>(k) * kLanes;
        Ahead(at);
        this->template Step<Steps::kWhole>(acc, at, k);
      }
      Flush(acc, begin, panel);
    }

    // Inputs of one block of 128, all low nibbles or all high ones; or those of whole blocks.
    template <bool low, bool high>
    void Nibbles(int begin, int end, int panel) {
      Accs acc;
      Begin(acc, begin, end, 8);
      constexpr int kShift = low ? 0 : kBlock;
      for (int block = begin / (2 * kBlock) * (2 * kBlock); block < end; block += 2 * kBlock) {
        const int first = low && high ? block : begin - kShift, last = low && high ? block + kBlock : end - kShift;
        for (int k = first; k < last; k += 4) {
          const size_t at = static_cast<size_t>(block) * (kLanes / 2) + static_cast<size_t>(k - block) * kLanes;
          if constexpr (low) Ahead(at);
          if constexpr (low) this->template Step<Steps::kLow>(acc, at, k);
          if constexpr (high) this->template Step<Steps::kHigh>(acc, at, k + kBlock);
        }
      }
      Flush(acc, begin, panel);
    }

    void Run(int begin, int end, int panel) {
      this->Clear();
      const int piece = m.group != 0 && m.group < m.input_group ? m.group : m.input_group;
      for (int k = begin; k < end; k += piece) {
        const int stop = k + piece < end ? k + piece : end;
        if (m.form == kInt8) {
          Bytes(k, stop, panel);
        } else if (stop - k > kBlock) {
          Nibbles<true, true>(k, stop, panel);
        } else {
          k % (2 * kBlock) < kBlock ? Nibbles<true, false>(k, stop, panel) : Nibbles<false, true>(k, stop, panel);
        }
      }
    }
  };

  template <int R, int P>
  static void Piece(const Product& work, int row, int panel, int span) {
    const Matrix& m = *work.matrix;
    const int begin = span * kSpan, end = begin + kSpan < m.columns ? begin + kSpan : m.columns;
    Block<R, P> block{{m, {}, {}, begin, {}}};
    for (int r = 0; r < R; r++)
      block.rows[r] = work.rows + static_cast<size_t>(row + r) * work.row_spans + (span - work.first);
    for (int p = 0; p < P; p++) block.panels[p] = m.panels + (panel + p) * PanelBytes(m.form, m.columns);
    block.Run(begin, end, panel);
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) Products<E>::Finish(work, row + r, panel + p, span, block.inner[r][p], 1.0f);
  }

  template <int R, int P>
  static void SomeRows(const Product& work, int row, int rows, int panel, int span) {
    if constexpr (R > 1) {
      if (rows < R) return SomeRows<R - 1, P>(work, row, rows, panel, span);
    }
    Piece<R, P>(work, row, panel, span);
  }

  // As Products.
  template <int P>
  static void AllRows(const Product& work, int panel, int span) {
    const int passes = (work.count + E::kRows - 1) / E::kRows, each = work.count / passes, more = work.count % passes;
    for (int pass = 0, row = 0; pass < passes; pass++) {
      const int rows = each + (pass < more);
      SomeRows<E::kRows, P>(work, row, rows, panel, span);
      row += rows;
    }
  }

  static void Run(const Product& work) {
    for (int span = work.first; span < work.last; span++) {
      int panel = work.begin;
      for (; panel + E::kPanels <= work.end; panel += E::kPanels) AllRows<E::kPanels>(work, panel, span);
      for (; panel < work.end; panel++) AllRows<1>(work, panel, span);
    }
  }
};

}  // namespace
}  // namespace gemma
