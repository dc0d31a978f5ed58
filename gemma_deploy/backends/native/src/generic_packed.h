// Products of codes for several rows, which are packed first, for vector types V that have registers for it.
//
// The codes of four inputs of all rows of a block lie one behind another, and so do the next four: one pointer runs through
// them, where pointers to each row would neither fit registers nor lie at distances that caches like. Sums stay in
// registers for kExact inputs, or a group's; what is done with them is what Products<V> does, in the same order: a row has
// the bits that it has alone.
//
// V says how many rows its registers hold sums of: kFewRows with 4 panels, kPackedRows with 2, kMostRows with one.
#pragma once

#include "each.h"
#include "generic_product.h"

namespace gemma {
namespace {

// How a panel's bytes hold weights.
enum class Held { kBytes, kLow, kHigh };

template <class V>
struct PackedProducts {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr size_t kGroupBytes = 8;             // codes of four inputs of a row
  static constexpr size_t kChunk = 384 << 10;          // of panels of a span, which stay in a core's cache
  static constexpr int kMost = V::kMostRows;

  // The rows of a block, packed, over the inputs of a span that begins at `start`.
  struct Packed {
    const Product& work;
    int row, span, inputs;
    int piece;       // inputs that are summed as integers
    int8_t* codes;   // [inputs / 4][R][kGroupBytes]
    int32_t* less;   // [pieces][R]: what codes that are not centred make too high, negative
    int ahead;       // bits: panels p % 2 of the next block are fetched while one is computed

    const Span& RowSpan(int r) const {
      return work.rows[static_cast<size_t>(row + r) * work.row_spans + (span - work.first)];
    }
  };

  // R rows times P panels; `ahead`: and fetches what comes next.
  template <int R, int P, bool ahead>
  struct Block {
    template <Held held>
    static typename V::B Weights(const uint8_t* at) {
      if constexpr (held == Held::kBytes) return V::LoadBytes(at);
      typename V::B low, high;
      V::LoadNibbles(at, low, high);
      return held == Held::kLow ? low : high;
    }

    // Four inputs, whose weights lie `at` bytes into the panels.
    template <Held held>
    GEMMA_INLINE static inline void Step(typename V::Acc (&acc)[R * P], const int8_t* rows, const uint8_t* const (&panels)[P],
                                         const uint8_t* const (&next)[P], size_t at) {
      typename V::B w[P];
      Each<P>([&](auto p) GEMMA_INLINE { w[p] = Weights<held>(panels[p] + at); });
      Each<R>([&](auto r) GEMMA_INLINE {
        const auto x = V::Packed(rows + kGroupBytes * r);
        Each<P>([&](auto p) GEMMA_INLINE { V::Dot(acc[r * P + p], w[p], x); });
      });
      if constexpr (ahead) Each<P>([&](auto p) GEMMA_INLINE { V::Prefetch(next[p] + at); });
    }

    // Adds to `inner` [R][P] the sums of the inputs first..last of a span, times scales [P] where there are such.
    template <bool bytes, bool scaled>
    static __attribute__((noinline)) void Sum(const int8_t* rows, const uint8_t* const* all, int first, int last,
                                              const int32_t* less, const F* scales, F* inner) {
      const uint8_t *panels[P], *next[P];
      typename V::Acc acc[R * P];
      Each<P>([&](auto p) GEMMA_INLINE { panels[p] = all[p], next[p] = all[P + p]; });
      Each<R>([&](auto r) GEMMA_INLINE {
        const int32_t low = less[r];
        Each<P>([&](auto p) GEMMA_INLINE { acc[r * P + p] = V::Begin(low); });
      });
      rows += static_cast<size_t>(first) / 4 * R * kGroupBytes;
      if constexpr (bytes) {
        for (size_t at = static_cast<size_t>(first) * kLanes; at < static_cast<size_t>(last) * kLanes; at += 4 * kLanes) {
          Step<Held::kBytes>(acc, rows, panels, next, at);
          rows += R * kGroupBytes;
        }
      } else {
        for (int k = first; k < last;) {  // of blocks of 128 the lower nibbles, then the higher ones
          const bool high = k / kBlock % 2 != 0;
          const int end = (k / kBlock + 1) * kBlock < last ? (k / kBlock + 1) * kBlock : last;
          size_t at = static_cast<size_t>(k) / (2 * kBlock) * kBlock * kLanes + static_cast<size_t>(k % kBlock) * kLanes;
          for (; k < end && !high; k += 4, at += 4 * kLanes, rows += R * kGroupBytes)
            Step<Held::kLow>(acc, rows, panels, next, at);
          for (; k < end; k += 4, at += 4 * kLanes, rows += R * kGroupBytes)
            Step<Held::kHigh>(acc, rows, panels, next, at);
        }
      }
      Each<P>([&](auto p) GEMMA_INLINE {
        const F scale = scaled ? scales[p] : F();
        Each<R>([&](auto r) GEMMA_INLINE {
          const F sum = V::Float(V::Total(acc[r * P + p]));
          inner[r * P + p] = scaled ? V::Fma(sum, scale, inner[r * P + p]) : V::Add(inner[r * P + p], sum);
        });
      });
    }

    // Inputs first..last of the span, which share scales.
    static void Piece(const Packed& x, int panel, const uint8_t* const* panels, int first, int last, F* inner) {
      const Matrix& m = *x.work.matrix;
      const int32_t* less = x.less + first / x.piece * R;
      if (m.group == 0)
        return (m.form == kInt8 ? Sum<true, false> : Sum<false, false>)(x.codes, panels, first, last, less, nullptr, inner);
      F scales[P];
      for (int p = 0; p < P; p++) scales[p] = Products<V>::GroupScale(m, panel + p, (x.span * kSpan + first) / m.group);
      (m.form == kInt8 ? Sum<true, true> : Sum<false, true>)(x.codes, panels, first, last, less, scales, inner);
    }

    static void Run(const Packed& x, int panel) {
      const Matrix& m = *x.work.matrix;
      const uint8_t* panels[2 * P];  // and what is fetched meanwhile
      const size_t bytes = PanelBytes(m.form, m.columns);
      for (int p = 0; p < P; p++) {
        panels[p] = m.panels + (panel + p) * bytes + PanelBytes(m.form, x.span * kSpan);
        panels[P + p] = panels[p] + (x.ahead >> p % 2 & 1 ? P * bytes : 0);
      }
      F inner[R * P];
      for (int i = 0; i < R * P; i++) inner[i] = V::Set(0.0f);
      if (m.form == kInt4 && x.piece < 2 * kBlock) {  // in the order of Products<V>
        for (int k = 0; k < x.inputs; k += 2 * kBlock)
          for (int sub = k; sub < k + kBlock; sub += x.piece) {
            Piece(x, panel, panels, sub, sub + x.piece, inner);
            Piece(x, panel, panels, sub + kBlock, sub + kBlock + x.piece, inner);
          }
      } else {
        for (int k = 0; k < x.inputs; k += x.piece)
          Piece(x, panel, panels, k, k + x.piece < x.inputs ? k + x.piece : x.inputs, inner);
      }
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
          Products<V>::Finish(x.work, x.row + r, panel + p, x.span, inner[r * P + p], *x.RowSpan(r).scale);
    }
  };

  template <int R>
  static void Pack(const Packed& x) {
    const int offset = V::kCentred ? 0 : x.work.matrix->form == kInt8 ? -128 : -8;
    for (int r = 0; r < R; r += 8) {
      const int8_t* rows[8];
      for (int i = 0; i < 8; i++) rows[i] = x.RowSpan(r + i < R ? r + i : R - 1).codes;
      V::Pack(rows, R - r < 8 ? R - r : 8, x.inputs, x.codes + kGroupBytes * r, R * kGroupBytes);
    }
    for (int r = 0; r < R; r++) {
      const Span& row = x.RowSpan(r);
      for (int k = 0; k < x.inputs; k += x.piece) {
        const int last = k + x.piece < x.inputs ? k + x.piece : x.inputs;
        x.less[k / x.piece * R + r] = offset * (row.sums[last / kSums] - row.sums[k / kSums]);
      }
    }
  }

  template <int R>
  static void Panels(const Packed& x, int begin, int end) {
    constexpr int kPanels = R <= V::kFewRows ? 4 : R <= V::kPackedRows ? 2 : 1;
    int panel = begin;
    for (; panel + kPanels <= end; panel += kPanels)
      x.ahead != 0 ? Block<R, kPanels, true>::Run(x, panel) : Block<R, kPanels, false>::Run(x, panel);
    if constexpr (kPanels > 1)
      for (; panel < end; panel++) Block<R, 1, false>::Run(x, panel);
  }

  struct Size {  // what is done with so many rows
    void (*pack)(const Packed&);
    void (*panels)(const Packed&, int begin, int end);
  };

  template <int R = kMost>
  static Size Of(int rows) {
    if constexpr (R > 1) {
      if (rows < R) return Of<R - 1>(rows);
    }
    return Size{Pack<R>, Panels<R>};
  }

  // In passes of nearly the same number of rows. Where there are two each block of panels is read by both before the next,
  // where there are more as many as stay in a cache.
  static void Run(const Product& work) {
    if (work.exact || work.count == 1 || work.matrix->form < kInt8) return Products<V>::Run(work);
    const Matrix& m = *work.matrix;
    alignas(64) int8_t codes[2][kMost * kSpan / 4 * kGroupBytes];
    int32_t less[2][kMost * kSpan / kSums];
    const size_t bytes = PanelBytes(m.form, m.columns < kSpan ? m.columns : kSpan);
    const int most = work.count <= kMost ? kMost : V::kPackedRows;
    const int passes = (work.count + most - 1) / most, each = work.count / passes, more = work.count % passes;
    const int together = passes < 3 ? passes : 1, piece = m.group != 0 && m.group < kExact ? m.group : kExact;
    const int chunk = passes < 3 ? work.end - work.begin : static_cast<int>(kChunk / bytes) / 4 * 4;
    const int step = passes == 2 ? 2 : chunk;
    for (int span = work.first; span < work.last; span++) {
      const int left = m.columns - span * kSpan, inputs = left < kSpan ? left : kSpan;
      for (int begin = work.begin; begin < work.end; begin += chunk) {
        const int end = begin + chunk < work.end ? begin + chunk : work.end;
        for (int pass = 0; pass < passes; pass += together) {
          const auto packed = [&](int i) {
            const int row = (pass + i) * each + (pass + i < more ? pass + i : more);
            return Packed{work, row, span, inputs, piece, codes[i], less[i], passes == 1 ? 3 : passes == 2 ? 1 << i : 0};
          };
          const auto size = [&](int i) { return Of(each + (pass + i < more)); };
          for (int i = 0; i < together; i++) size(i).pack(packed(i));
          for (int panel = begin; panel < end; panel += step)
            for (int i = 0; i < together; i++) size(i).panels(packed(i), panel, panel + step < end ? panel + step : end);
        }
      }
    }
  }
};

}  // namespace
}  // namespace gemma
