// Products of rows and panels, for any vector type V of sixteen lanes (vector_*.h).
#pragma once

#include "kernels.h"

namespace gemma {
namespace {

template <class V>
struct Products {
  using F = typename V::F;
  using I = typename V::I;

  static F LoadScale(const uint8_t* scales, size_t index, int32_t form) {
    if (form == kFloat32) return V::Load(reinterpret_cast<const float*>(scales) + index);
    return form == kFloat16 ? V::LoadHalf(scales + 2 * index) : V::LoadBfloat(scales + 2 * index);
  }

  static F GroupScale(const Matrix& m, int panel, int group) {
    const size_t groups = m.columns / m.group;
    return LoadScale(m.scales, (panel * groups + group) * kLanes, m.scale_form);
  }

  // Puts what a row and a panel of a span gave into y.
  static void Finish(const Product& work, int row, int panel, int span, F inner, float row_scale) {
    const Matrix& m = *work.matrix;
    float* y = work.y + row * work.stride + static_cast<size_t>(panel) * kLanes;
    const F before = span == 0 && !work.added ? V::Set(0.0f) : V::Load(y);
    F sum = V::Fma(inner, V::Set(row_scale), before);
    if (m.form >= kInt8 && m.group == 0 && span == Spans(m.columns) - 1)
      sum = V::Mul(sum, LoadScale(m.scales, static_cast<size_t>(panel) * kLanes, m.scale_form));
    V::Store(y, sum);
  }

  // One block: R rows times P panels, over the inputs of one span.
  template <int R, int P>
  struct Block {
    const Matrix& m;
    const Span* rows[R];
    const uint8_t* panels[P];
    int start;      // the span's first input, of all
    F inner[R][P];  // sums of the span

    void Clear() {
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) inner[r][p] = V::Set(0.0f);
    }

    // Adds sums of the inputs begin..end to `inner`, less what codes that are not centred are too high, times the scales
    // of the group. Never called: sums would go through memory, which groups of 32 inputs feel.
    template <class Accs>
    __attribute__((always_inline)) inline void Flush(const Accs& acc, int begin, int end, int panel, int offset) {
      for (int r = 0; r < R; r++) {
        const int32_t low = V::kCentred ? 0 : offset * (rows[r]->sums[(end - start) / kSums] - rows[r]->sums[(begin - start) / kSums]);
        const I less = V::SetInt(low);
        for (int p = 0; p < P; p++) {
          const F sum = V::Float(V::Sub(V::Total(acc[r][p]), less));
          inner[r][p] = m.group == 0 ? V::Add(inner[r][p], sum)
                                     : V::Fma(sum, GroupScale(m, panel + p, begin / m.group), inner[r][p]);
        }
      }
    }

    // What of a byte is a weight.
    enum Part { kWhole, kLow, kHigh };

    template <Part part>
    static typename V::B Weights(const uint8_t* at) {
      if constexpr (part == kWhole) {
        return V::LoadBytes(at);
      } else {
        typename V::B low, high;
        V::LoadNibbles(at, low, high);
        return part == kLow ? low : high;
      }
    }

    // Adds the products of the inputs k..k + 4, whose weights lie `at` bytes into the panels.
    template <Part part, class Accs>
    void Step(Accs& acc, size_t at, int k) {
      if constexpr (V::kHalves) {
        Half<part, 0>(acc, at, k);
        Half<part, 1>(acc, at, k);
      } else {
        typename V::B w[P];
        for (int p = 0; p < P; p++) w[p] = Weights<part>(panels[p] + at);
        for (int r = 0; r < R; r++) {
          const auto x = V::Codes(rows[r]->codes, k - start);
          for (int p = 0; p < P; p++) V::Dot(acc[r][p], w[p], x);
        }
      }
    }

    // The same for two of these inputs: where registers are few.
    template <Part part, int half, class Accs>
    void Half(Accs& acc, size_t at, int k) {
      typename V::H w[P];
      for (int p = 0; p < P; p++) w[p] = V::template HalfOf<part, half>(panels[p] + at);
      for (int r = 0; r < R; r++) {
        const auto x = V::template HalfCodes<half>(rows[r]->codes, k - start);
        for (int p = 0; p < P; p++) V::template DotHalf<R>(acc[r][p], w[p], x);
      }
    }

    void Ahead(size_t at) {
      for (int p = 0; p < P; p++) V::Prefetch(panels[p] + at + 2048);
    }

    void Bytes(int begin, int end, int panel) {
      const int piece = m.group != 0 && m.group < kExact ? m.group : kExact;
      for (int k0 = begin; k0 < end; k0 += piece) {
        const int k1 = k0 + piece < end ? k0 + piece : end;
        typename V::Acc acc[R][P];
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) acc[r][p] = V::Begin();
        for (int k = k0; k < k1; k += 4) {
          const size_t at = static_cast<size_t>(k) * kLanes;
          Ahead(at);
          Step<kWhole>(acc, at, k);
        }
        Flush(acc, k0, k1, panel, 128);
      }
    }

    // A block of 128 inputs lies as 64 low nibbles and 64 high ones, which belong to different groups where these are
    // small.
    void Nibbles(int begin, int end, int panel) {
      const int piece = m.group == 0 || m.group > kExact ? kExact : m.group;
      if (piece < 2 * kBlock) {
        for (int k0 = begin; k0 < end; k0 += 2 * kBlock)
          for (int sub = 0; sub < kBlock; sub += piece) {
            NibblePiece<true, false>(k0, k0 + kBlock, sub, sub + piece, panel);
            NibblePiece<false, true>(k0, k0 + kBlock, sub, sub + piece, panel);
          }
        return;
      }
      for (int k0 = begin; k0 < end; k0 += piece)
        NibblePiece<true, true>(k0, k0 + piece < end ? k0 + piece : end, 0, kBlock, panel);
    }

    // Low nibbles, high ones or both of the blocks k0..k1, of each those of the inputs from..to and from + 64..to + 64.
    template <bool low, bool high>
    void NibblePiece(int k0, int k1, int from, int to, int panel) {
      typename V::Acc acc[R][P];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[r][p] = V::Begin();
      for (int block = k0; block < k1; block += 2 * kBlock) {
        for (int k = block + from; k < block + to; k += 4) {
          const size_t at = static_cast<size_t>(block) * (kLanes / 2) + static_cast<size_t>(k - block) * kLanes;
          if constexpr (low) Ahead(at);
          if constexpr (low) Step<kLow>(acc, at, k);
          if constexpr (high) Step<kHigh>(acc, at, k + kBlock);
        }
      }
      if constexpr (low && high) {
        Flush(acc, k0, k1, panel, 8);
      } else {
        const int shift = low ? 0 : kBlock;
        Flush(acc, k0 + shift + from, k0 + shift + to, panel, 8);
      }
    }

    // Floats: even and odd inputs are summed apart.
    template <class Even, class Odd>
    void Floats(int begin, int end, Even even, Odd odd) {
      F other[R][P];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) other[r][p] = V::Set(0.0f);
      for (int k = begin; k < end; k += 2) {
        for (int p = 0; p < P; p++) {
          const F a = even(panels[p], k), b = odd(panels[p], k);
          for (int r = 0; r < R; r++) {
            inner[r][p] = V::Fma(V::Set(rows[r]->values[k - start]), a, inner[r][p]);
            other[r][p] = V::Fma(V::Set(rows[r]->values[k + 1 - start]), b, other[r][p]);
          }
        }
      }
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) inner[r][p] = V::Add(inner[r][p], other[r][p]);
    }

    void Run(int begin, int end, int panel) {
      Clear();
      switch (m.form) {
        case kInt8:
          return Bytes(begin, end, panel);
        case kInt4:
          return Nibbles(begin, end, panel);
        case kFloat32:
          return Floats(
              begin, end,
              [](const uint8_t* w, int k) {
                return V::Load(reinterpret_cast<const float*>(w) + static_cast<size_t>(k) * kLanes);
              },
              [](const uint8_t* w, int k) {
                return V::Load(reinterpret_cast<const float*>(w) + static_cast<size_t>(k + 1) * kLanes);
              });
        case kFloat16:
          return Floats(
              begin, end,
              [](const uint8_t* w, int k) { return V::LoadHalf(w + static_cast<size_t>(k) * 2 * kLanes); },
              [](const uint8_t* w, int k) { return V::LoadHalf(w + static_cast<size_t>(k + 1) * 2 * kLanes); });
        default:
          return Floats(
              begin, end, [](const uint8_t* w, int k) { return V::First(w + static_cast<size_t>(k) * 2 * kLanes); },
              [](const uint8_t* w, int k) { return V::Second(w + static_cast<size_t>(k) * 2 * kLanes); });
      }
    }
  };

  template <int R, int P>
  static void Piece(const Product& work, int row, int panel, int span) {
    const Matrix& m = *work.matrix;
    const int begin = span * kSpan, end = begin + kSpan < m.columns ? begin + kSpan : m.columns;
    const size_t bytes = PanelBytes(m.form, m.columns);
    Block<R, P> block{m, {}, {}, begin, {}};
    for (int r = 0; r < R; r++)
      block.rows[r] = work.rows + static_cast<size_t>(row + r) * work.row_spans + (span - work.first);
    for (int p = 0; p < P; p++) block.panels[p] = m.panels + (panel + p) * bytes;
    block.Run(begin, end, panel);
    for (int r = 0; r < R; r++) {
      const float scale = m.form >= kInt8 ? *block.rows[r]->scale : 1.0f;
      for (int p = 0; p < P; p++) Finish(work, row + r, panel + p, span, block.inner[r][p], scale);
    }
  }

  // At most kRows rows, of which there are `rows`.
  template <int R, int P>
  static void SomeRows(const Product& work, int row, int rows, int panel, int span) {
    if constexpr (R > 1) {
      if (rows < R) return SomeRows<R - 1, P>(work, row, rows, panel, span);
    }
    Piece<R, P>(work, row, panel, span);
  }

  // In passes of nearly the same number of rows: each reads the panels once, only the first one from memory.
  template <int P>
  static void AllRows(const Product& work, int panel, int span) {
    const int passes = (work.count + V::kRows - 1) / V::kRows, each = work.count / passes, more = work.count % passes;
    for (int pass = 0, row = 0; pass < passes; pass++) {
      const int rows = each + (pass < more);
      SomeRows<V::kRows, P>(work, row, rows, panel, span);
      row += rows;
    }
  }

  static void Run(const Product& work) {
    if (work.exact && work.matrix->form >= kInt8) return Exact(work);
    for (int span = work.first; span < work.last; span++) {
      int panel = work.begin;
      for (; panel + V::kPanels <= work.end; panel += V::kPanels) AllRows<V::kPanels>(work, panel, span);
      for (; panel < work.end; panel++) AllRows<1>(work, panel, span);
    }
  }

  // As float32 panels of one span would give, made one at a time.
  static void Exact(const Product& work) {
    const Matrix& m = *work.matrix;
    alignas(64) float panel[kSpan * kLanes];
    for (int span = work.first; span < work.last; span++) {
      const int begin = span * kSpan, end = begin + kSpan < m.columns ? begin + kSpan : m.columns;
      for (int p = work.begin; p < work.end; p++) {
        Expand(m, p, begin, end, panel);
        const Matrix floats{reinterpret_cast<const uint8_t*>(panel), nullptr, kFloat32, 0, kLanes, end - begin, 0, 0};
        for (int row = 0; row < work.count; row++) {
          const Span* x = work.rows + static_cast<size_t>(row) * work.row_spans + (span - work.first);
          F sum = V::Set(0.0f);
          for (int k = 0; k < end - begin; k += kBlock) {  // sums of few, and of these: a long one would lose more
            Block<1, 1> block{floats, {x}, {floats.panels}, 0, {}};
            block.Run(k, k + kBlock, 0);
            sum = V::Add(sum, block.inner[0][0]);
          }
          float* y = work.y + row * work.stride + static_cast<size_t>(p) * kLanes;
          V::Store(y, span == 0 ? sum : V::Add(V::Load(y), sum));
        }
      }
    }
  }

  // Inputs begin..end of a panel of codes as floats, [end - begin][16].
  static void Expand(const Matrix& m, int panel, int begin, int end, float* floats) {
    const size_t groups = m.group == 0 ? 1 : m.columns / m.group;
    for (int k = begin; k < end; k++) {
      const size_t group = panel * groups + (m.group == 0 ? 0 : k / m.group);
      alignas(64) float scales[kLanes];
      if (m.form == kPlanes) {
        for (int n = 0; n < kLanes; n++) scales[n] = ScaleOf(m, panel * kLanes + n, m.group == 0 ? 0 : k / m.group);
      } else {
        V::Store(scales, LoadScale(m.scales, group * kLanes, m.scale_form));
      }
      for (int n = 0; n < kLanes; n++) floats[(k - begin) * kLanes + n] = Element(m, panel * kLanes + n, k) * scales[n];
    }
  }

  static float Element(const Matrix& m, int row, int k) {
    const int lane = row % kLanes;
    const uint8_t* panel = m.panels + row / kLanes * PanelBytes(m.form, m.columns);
    switch (m.form) {
      case kInt8:
        return static_cast<float>(static_cast<int>(panel[static_cast<size_t>(k / 4) * 64 + lane * 4 + k % 4]) - 128);
      case kInt4:
      case kPlanes: {
        const size_t at = static_cast<size_t>(k / 128) * 1024 + static_cast<size_t>(k % 64 / 4) * 64 + lane * 4 + k % 4;
        const int code = (k % 128 < 64 ? panel[at] & 15 : panel[at] >> 4) - 8;
        if (m.form == kInt4) return static_cast<float>(code);
        const uint8_t low = LowHalves(m, row)[k / 64 * 32 + k % 32];
        return static_cast<float>(16 * code + (k % 64 < 32 ? low & 15 : low >> 4));
      }
      default:
        return 0.0f;
    }
  }

  static float LaneOf(F x, int lane) {
    float all[kLanes];
    V::Store(all, x);
    return all[lane];
  }

  // The scale of a group of a row.
  static float ScaleOf(const Matrix& m, int row, int group) {
    const size_t groups = m.group == 0 ? 1 : static_cast<size_t>(m.columns / m.group), lane = static_cast<size_t>(row % kLanes);
    const size_t in_panels = (row / kLanes * groups + static_cast<size_t>(group)) * kLanes + lane;
    return RowScale(m, m.form == kPlanes ? static_cast<size_t>(row) * groups + static_cast<size_t>(group) : in_panels);
  }

  static float RowScale(const Matrix& m, size_t at) {
    if (m.scale_form == kFloat32) return reinterpret_cast<const float*>(m.scales)[at];
    uint8_t all[2 * kLanes] = {m.scales[2 * at], m.scales[2 * at + 1]};
    return LaneOf(LoadScale(all, 0, m.scale_form), 0);
  }

  static void ReadRow(const Matrix& m, int row, float factor, float* y) {
    const int panel = row / kLanes, lane = row % kLanes;
    const uint8_t* codes = m.panels + panel * PanelBytes(m.form, m.columns);
    if (m.form >= kInt8) {
      const int group = m.group == 0 ? m.columns : m.group;
      for (int k0 = 0; k0 < m.columns; k0 += group) {
        const float scale = ScaleOf(m, row, k0 / group);
        for (int k = k0; k < k0 + group; k++) y[k] = Element(m, row, k) * scale * factor;
      }
      return;
    }
    for (int k = 0; k < m.columns; k++) {
      F w;
      if (m.form == kFloat32) {
        w = V::Load(reinterpret_cast<const float*>(codes) + static_cast<size_t>(k) * kLanes);
      } else if (m.form == kFloat16) {
        w = V::LoadHalf(codes + static_cast<size_t>(k) * 2 * kLanes);
      } else {
        const uint8_t* pair = codes + static_cast<size_t>(k / 2) * 4 * kLanes;
        w = k % 2 ? V::Second(pair) : V::First(pair);
      }
      y[k] = LaneOf(w, lane) * factor;
    }
  }
};

}  // namespace
}  // namespace gemma
