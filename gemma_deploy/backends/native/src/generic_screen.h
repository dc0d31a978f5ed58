// Products of planes (layout.h) in two passes, for any vector type V of sixteen lanes (vector_*.h).
#pragma once

#include "generic_product.h"

namespace gemma {
namespace {

template <class V>
struct Screens {
  using F = typename V::F;
  using I = typename V::I;
  using Of = Products<V>;

  static constexpr int kMostRows = V::kRows < 4 ? V::kRows : 4;

  // Scales of a panel's rows in groups, those of a group beside each other, and their squares.
  struct Scales {
    alignas(64) float plain[kSpan / kSums][kLanes], squared[kSpan / kSums][kLanes];

    void Read(const Matrix& m, int panel, int first, int count) {
      const size_t groups = static_cast<size_t>(m.columns / m.group);
      const size_t at = static_cast<size_t>(panel) * kLanes * groups + static_cast<size_t>(first);
      for (size_t lane = 0; lane < kLanes; lane++)
        for (int g = 0; g < count; g++) plain[g][lane] = Of::RowScale(m, at + lane * groups + static_cast<size_t>(g));
      for (int g = 0; g < count; g++) V::Store(squared[g], V::Mul(V::Load(plain[g]), V::Load(plain[g])));
    }
  };

  // R rows times a panel, over all inputs. One panel at a time: two beside each other are read at a third of the speed.
  template <int R>
  struct Block {
    const Screen& work;
    const Matrix& m;
    const int row, panel;
    const uint8_t* const halves;
    const int8_t *high[R], *low[R];
    Scales& scales;  // of a span's groups; of those of the first span they are there
    F inner[R], rough[R], spread[R], above[R];
    struct Sums {  // with the high and the low bytes of codes
      typename V::ByteAcc high[R], low[R];
    };

    Block(const Screen& work, int row, int panel, Scales& scales)
        : work(work), m(*work.matrix), row(row), panel(panel), halves(m.panels + panel * PanelBytes(m.form, m.columns)),
          scales(scales) {
      for (int r = 0; r < R; r++) {
        high[r] = work.rows[row + r].high;
        low[r] = work.rows[row + r].low;
        inner[r] = rough[r] = spread[r] = above[r] = V::Set(0.0f);
      }
    }

    void Run() {
      for (int start = 0; start < m.columns; start += kSpan) OneSpan(start, start + kSpan < m.columns ? start + kSpan : m.columns);
      const size_t output = static_cast<size_t>(panel) * kLanes;
      for (int r = 0; r < R; r++) {
        if (m.group == 0) {
          const F scale = Of::LoadScale(m.scales, output, m.scale_form);
          Join(r, 0, V::Add(inner[r], V::Set(work.rows[row + r].middle[0])), scale, V::Mul(scale, scale));
        }
        const size_t at = (row + r) * work.stride + output;
        V::Store(work.y + at, V::Sub(rough[r], V::Min(spread[r], V::Set(kMostSpread))));
        V::Store(work.ceilings + at, V::Add(rough[r], above[r]));
      }
    }

    void OneSpan(int begin, int end) {
      if (m.group != 0 && m.columns > kSpan) scales.Read(m, panel, begin / m.group, (end - begin) / m.group);
      const int piece = m.group == 0 ? kSpan : m.group;
      for (int k0 = begin; k0 < end;) {
        const int k1 = piece < 2 * kBlock ? k0 + 2 * kBlock : k0 + piece < end ? k0 + piece : end;
        if (piece < 2 * kBlock) {
          for (int from = 0; from < kBlock; from += piece) Apart(k0, from, from + piece, begin);
        } else {
          Together(k0, k1, begin);
        }
        k0 = k1;
      }
    }

    // Adds what halves of codes give of a block of 128: low ones, of the inputs from..to, and high ones, of those 64 behind.
    template <bool kLow, bool kHigh>
    __attribute__((always_inline)) void Add(Sums& first, Sums& second, int block, int from, int to) const {
      Sums a = first, b = second;
      for (int k = from; k < to; k += 4) {
        const uint8_t* at = halves + static_cast<size_t>(block) * (kLanes / 2) + static_cast<size_t>(k) * kLanes;
        const size_t code = static_cast<size_t>(block) + static_cast<size_t>(k);
        typename V::Halves lower, higher;
        V::LoadHalves(at, lower, higher);
        if (kLow) V::Prefetch(at + 4096);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          if (kLow) {
            V::DotBytes(a.high[r], lower, V::FourBytes(high[r] + code));
            V::DotBytes(a.low[r], lower, V::FourBytes(low[r] + code));
          }
          if (kHigh) {
            V::DotBytes(b.high[r], higher, V::FourBytes(high[r] + code + kBlock));
            V::DotBytes(b.low[r], higher, V::FourBytes(low[r] + code + kBlock));
          }
        }
      }
      first = a;
      second = b;
    }

    // Inputs from..to of a block of 128 and those 64 behind them, which have other scales.
    void Apart(int block, int from, int to, int start) {
      Sums sums, behind;
      Begin(sums);
      Begin(behind);
      Add<true, true>(sums, behind, block, from, to);
      Flush(sums, block + from, block + to, start);
      Flush(behind, block + kBlock + from, block + kBlock + to, start);
    }

    // Whole blocks that share a scale. No sum overflows: 15 * kCodeMax * kSpan is less than 2^31.
    void Together(int begin, int end, int start) {
      Sums sums, none;
      Begin(sums);
      Begin(none);
      for (int block = begin; block < end; block += 2 * kBlock) {
        Add<true, false>(sums, none, block, 0, kBlock);
        Add<false, true>(none, sums, block, 0, kBlock);
      }
      Flush(sums, begin, end, start);
    }

    static void Begin(Sums& sums) {
      for (int r = 0; r < R; r++) sums.high[r] = sums.low[r] = V::BeginBytes();
    }

    void Flush(const Sums& sums, int begin, int end, int start) {
      for (int r = 0; r < R; r++) {
        const Span& span = work.rows[row + r].spans[start / kSpan];
        const I less = V::SetInt(8 * (span.sums[(end - start) / kSums] - span.sums[(begin - start) / kSums]));
        const F sum = V::Float(V::Sub(V::TotalBytes(sums.high[r], sums.low[r]), less)), step = V::Set(16 * *span.scale);
        if (m.group == 0) {
          inner[r] = V::Fma(sum, step, inner[r]);
          continue;
        }
        const int group = begin / m.group, local = (begin - start) / m.group;
        const F part = V::Fma(sum, step, V::Set(work.rows[row + r].middle[group]));
        Join(r, group, part, V::Load(scales.plain[local]), V::Load(scales.squared[local]));
      }
    }

    void Join(int r, int group, F part, F scale, F squared) {
      const Screened& x = work.rows[row + r];
      rough[r] = V::Fma(scale, part, rough[r]);
      spread[r] = V::Fma(squared, V::Set(x.spread[group]), spread[r]);
      above[r] = V::Fma(scale, V::Set(x.most[group]), above[r]);
    }
  };

  // At most kMostRows rows, of which there are `rows`.
  template <int R>
  static void SomeRows(const Screen& work, int row, int rows, int panel, Scales& scales) {
    if constexpr (R > 1) {
      if (rows < R) return SomeRows<R - 1>(work, row, rows, panel, scales);
    }
    Block<R>(work, row, panel, scales).Run();
  }

  static void Run(const Screen& work) {
    const int passes = (work.count + kMostRows - 1) / kMostRows, each = work.count / passes, more = work.count % passes;
    const Matrix& m = *work.matrix;
    Scales scales;
    for (int panel = work.begin; panel < work.end; panel++) {
      if (m.group != 0 && m.columns <= kSpan) scales.Read(m, panel, 0, m.columns / m.group);
      for (int pass = 0, row = 0; pass < passes; pass++) {
        const int rows = each + (pass < more);
        SomeRows<kMostRows>(work, row, rows, panel, scales);
        row += rows;
      }
    }
  }

  // Low halves of an output feature, less what `Join` has put in their place.
  static float Rest(const Matrix& m, const Screened& x, int output) {
    const uint8_t* halves = LowHalves(m, output);
    F sum = V::Set(0.0f);
    float middle = 0, spread = 0;
    const auto join = [&](int group, float scale) {
      middle += scale * x.middle[group];
      spread += scale * scale * x.spread[group];
    };
    const auto rest = [&](float low) { return low - middle + (spread < kMostSpread ? spread : kMostSpread); };
    if (m.group == 0) {
      for (int k = 0; k < m.columns; k += kSpan) {
        const int end = k + kSpan < m.columns ? k + kSpan : m.columns;
        I part = V::SetInt(0);
        for (int j = k; j < end; j += kBlock) V::LowDots(halves + j / 2, x.codes + j, part, part);
        sum = V::Fma(V::Float(part), V::Set(*x.spans[k / kSpan].scale), sum);
      }
      const float scale = Of::ScaleOf(m, output, 0);
      join(0, scale);
      return rest(V::Sum(sum) * scale);
    }
    for (int k = 0; k < m.columns;) {
      const float step = *x.spans[k / kSpan].scale;
      I first = V::SetInt(0), second = first;
      if (m.group < kBlock) {
        V::LowDots(halves + k / 2, x.codes + k, first, second);
        const float one = Of::ScaleOf(m, output, k / m.group), other = Of::ScaleOf(m, output, k / m.group + 1);
        join(k / m.group, one);
        join(k / m.group + 1, other);
        sum = V::Fma(V::Float(first), V::Set(one * step), sum);
        sum = V::Fma(V::Float(second), V::Set(other * step), sum);
        k += kBlock;
        continue;
      }
      const float scale = Of::ScaleOf(m, output, k / m.group);
      join(k / m.group, scale);
      for (const int end = k + m.group; k < end; k += kBlock) V::LowDots(halves + k / 2, x.codes + k, first, first);
      sum = V::Fma(V::Float(first), V::Set(scale * step), sum);
    }
    return rest(V::Sum(sum));
  }

  static void Refine(const Matrix& m, const Screened& x, const int32_t* outputs, int count, float* y) {
    constexpr int kAhead = 8;
    const size_t half = static_cast<size_t>(m.columns) / 2;
    const size_t scales = (m.group == 0 ? 1 : static_cast<size_t>(m.columns / m.group)) * (m.scale_form == kFloat32 ? 4 : 2);
    for (int i = 0; i < count; i++) {
      if (i + kAhead < count) {
        const int next = outputs[i + kAhead];
        for (size_t at = 0; at < half; at += 64) V::Prefetch(LowHalves(m, next) + at);
        for (size_t at = 0; at < scales; at += 64) V::Prefetch(m.scales + static_cast<size_t>(next) * scales + at);
      }
      y[outputs[i]] += Rest(m, x, outputs[i]);
    }
  }
};

}  // namespace
}  // namespace gemma
