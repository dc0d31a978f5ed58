// Attention to one page of a cache, for any vector type V of sixteen lanes (vector_*.h).
#pragma once

#include "each.h"
#include "generic_rows.h"

namespace gemma {
namespace {

constexpr float kNone = -__builtin_inff();

// Pages of floats hold pairs, of channels or of positions: the first of sixteen pairs, and the second.
template <class V>
struct BfloatPairs {
  static constexpr size_t kBytes = 64;  // of sixteen pairs
  static typename V::F First(const uint8_t* p) { return V::First(p); }
  static typename V::F Second(const uint8_t* p) { return V::Second(p); }
};

template <class V>
struct FloatPairs {
  static constexpr size_t kBytes = 128;
  static typename V::F First(const uint8_t* p) { return V::Load(reinterpret_cast<const float*>(p)); }
  static typename V::F Second(const uint8_t* p) { return V::Load(reinterpret_cast<const float*>(p) + 16); }
};

template <class V>
struct Attentions {
  using F = typename V::F;
  static constexpr int C = V::kColumns;  // of a page at a time: blocks of positions, or of channels

  // R queries that see something of the page, from `first` to `last` in all.
  template <int R>
  struct Group {
    const Attention& work;
    const Query* queries;
    int first, last;
    alignas(64) float weights[R][kPage];  // scores at first

    // Scores of blocks of 16 positions, C at a time.
    template <class Pairs>
    void FloatScores() {
      int block = first / 16;
      for (; block + C <= last / 16 + 1; block += C) BlockScores<Pairs, C>(block);
      for (; block <= last / 16; block++) BlockScores<Pairs, 1>(block);
    }

    template <class Pairs, int n>
    __attribute__((noinline)) void BlockScores(int block) {
      const int half = work.head_dim / 2;
      const size_t size = static_cast<size_t>(half) * Pairs::kBytes;
      F even[R * n], odd[R * n];
      const float* q[R];
      Each<R>([&](auto r) GEMMA_INLINE { q[r] = queries[r].q; });
      Each<R * n>([&](auto i) GEMMA_INLINE { even[i] = odd[i] = V::Set(0.0f); });
      const uint8_t* keys = work.page.keys + block * size;
      for (int i = 0; i < half; i++, keys += Pairs::kBytes) {
        F a[n];
        Each<n>([&](auto c) GEMMA_INLINE { a[c] = Pairs::First(keys + c * size); });
        Each<R>([&](auto r) GEMMA_INLINE {
          const F x = V::Set(q[r][2 * i]);
          Each<n>([&](auto c) GEMMA_INLINE { even[r * n + c] = V::Fma(x, a[c], even[r * n + c]); });
        });
        Each<n>([&](auto c) GEMMA_INLINE { a[c] = Pairs::Second(keys + c * size); });
        Each<R>([&](auto r) GEMMA_INLINE {
          const F x = V::Set(q[r][2 * i + 1]);
          Each<n>([&](auto c) GEMMA_INLINE { odd[r * n + c] = V::Fma(x, a[c], odd[r * n + c]); });
        });
      }
      Each<R>([&](auto r) GEMMA_INLINE {
        Each<n>([&](auto c) GEMMA_INLINE { Score(r, block + c, V::Add(even[r * n + c], odd[r * n + c])); });
      });
    }

    void CodeScores() {
      for (int block = first / 16; block <= last / 16; block++) {
        const uint8_t* keys = work.page.keys + static_cast<size_t>(block) * work.head_dim * 16;
        const F scales = V::Load(work.page.key_scales + block * 16);
        typename V::Acc acc[R];
        for (int r = 0; r < R; r++) acc[r] = V::Begin();
        for (int k = 0; k < work.head_dim; k += 4) {
          const auto w = V::LoadBytes(keys + static_cast<size_t>(k) * 16);
          for (int r = 0; r < R; r++) V::Dot(acc[r], w, V::Codes(queries[r].rounded->codes, k));
        }
        for (int r = 0; r < R; r++) {
          const Span& q = *queries[r].rounded;
          const F sum = V::Float(Centred(V::Total(acc[r]), q.sums[work.head_dim / kSums]));
          Score(r, block, V::Mul(V::Mul(sum, V::Set(*q.scale)), scales));
        }
      }
    }

    static typename V::I Centred(typename V::I total, int32_t sum) {
      return V::kCentred ? total : V::Sub(total, V::SetInt(128 * sum));
    }

    void Score(int r, int block, F score) {
      if (work.cap > 0) score = V::Mul(V::Set(work.cap), Tanh<V>(V::Mul(score, V::Set(1 / work.cap))));
      score = V::Within(queries[r].first - block * 16, queries[r].last - block * 16, score, V::Set(kNone));
      V::Store(weights[r] + block * 16, score);
    }

    void Weights() {
      for (int r = 0; r < R; r++) {
        F largest = V::Set(kNone), sum = V::Set(0.0f);
        for (int b = first / 16; b <= last / 16; b++) largest = V::Max(largest, V::Load(weights[r] + b * 16));
        const float best = V::Largest(largest);
        for (int b = first / 16; b <= last / 16; b++) {
          float* at = weights[r] + b * 16;
          const F e = V::Within(queries[r].first - b * 16, queries[r].last - b * 16,
                                Exp<V>(V::Sub(V::Load(at), V::Set(best))), V::Set(0.0f));
          sum = V::Add(sum, e);
          V::Store(at, e);
        }
        *queries[r].best = best;
        *queries[r].sum = V::Sum(sum);
      }
    }

    // 16 channels at a time, or C times as many.
    template <class Pairs>
    void FloatValues() {
      int d = 0;
      for (; d + 16 * C <= work.head_dim; d += 16 * C) ChannelValues<Pairs, C>(d);
      for (; d < work.head_dim; d += 16) ChannelValues<Pairs, 1>(d);
    }

    template <class Pairs, int n>
    __attribute__((noinline)) void ChannelValues(int d) {
      constexpr size_t kSize = kPage / 2 * Pairs::kBytes;
      F even[R * n], odd[R * n];
      Each<R * n>([&](auto i) GEMMA_INLINE { even[i] = odd[i] = V::Set(0.0f); });
      const uint8_t* values = work.page.values + static_cast<size_t>(d) / 16 * kSize;
      const float* at = weights[0];
      for (int i = first / 2; i <= last / 2; i++) {
        F a[n];
        Each<n>([&](auto c) GEMMA_INLINE { a[c] = Pairs::First(values + i * Pairs::kBytes + c * kSize); });
        Each<R>([&](auto r) GEMMA_INLINE {
          const F x = V::Set(at[r * kPage + 2 * i]);
          Each<n>([&](auto c) GEMMA_INLINE { even[r * n + c] = V::Fma(x, a[c], even[r * n + c]); });
        });
        Each<n>([&](auto c) GEMMA_INLINE { a[c] = Pairs::Second(values + i * Pairs::kBytes + c * kSize); });
        Each<R>([&](auto r) GEMMA_INLINE {
          const F x = V::Set(at[r * kPage + 2 * i + 1]);
          Each<n>([&](auto c) GEMMA_INLINE { odd[r * n + c] = V::Fma(x, a[c], odd[r * n + c]); });
        });
      }
      Each<R>([&](auto r) GEMMA_INLINE {
        Each<n>([&](auto c) GEMMA_INLINE {
          V::Store(queries[r].values + d + 16 * c, V::Add(even[r * n + c], odd[r * n + c]));
        });
      });
    }

    // Weights take the scales of the values, and are rounded as activations are.
    void CodeValues() {
      alignas(64) int8_t codes[R][2 * kPage];
      float scales[R];
      int32_t sums[R][kPage / kSums + 1];
      for (int r = 0; r < R; r++) {
        for (int i = 0; i < kPage; i += 16) {
          const bool seen = first / 16 <= i / 16 && i / 16 <= last / 16;
          const F w = seen ? V::Load(weights[r] + i) : V::Set(0.0f);
          V::Store(weights[r] + i, V::Mul(w, V::Load(work.page.value_scales + i)));
        }
        Rows<V>::Round(Span{weights[r], codes[r], &scales[r], sums[r]}, kPage);
      }
      for (int d = 0; d < work.head_dim; d += 16) {
        const uint8_t* values = work.page.values + static_cast<size_t>(d) * kPage;
        typename V::Acc acc[R];
        for (int r = 0; r < R; r++) acc[r] = V::Begin();
        for (int i = 0; i < kPage; i += 4) {
          const auto w = V::LoadBytes(values + static_cast<size_t>(i) * 16);
          for (int r = 0; r < R; r++) V::Dot(acc[r], w, V::Codes(codes[r], i));
        }
        for (int r = 0; r < R; r++) {
          const F sum = V::Float(Centred(V::Total(acc[r]), sums[r][kPage / kSums]));
          V::Store(queries[r].values + d, V::Mul(sum, V::Set(scales[r])));
        }
      }
    }
  };

  template <int R>
  static void Together(const Attention& work, const Query* queries) {
    int first = kPage, last = -1;
    for (int r = 0; r < R; r++) {
      if (queries[r].first > queries[r].last) continue;
      first = queries[r].first < first ? queries[r].first : first;
      last = queries[r].last > last ? queries[r].last : last;
    }
    if (first > last) return Nothing(work, queries, R);
    Group<R> group{work, queries, first, last, {}};
    if (work.page.form == kInt8) {
      group.CodeScores();
      group.Weights();
      group.CodeValues();
    } else if (work.page.form == kFloat32) {
      group.template FloatScores<FloatPairs<V>>();
      group.Weights();
      group.template FloatValues<FloatPairs<V>>();
    } else {
      group.template FloatScores<BfloatPairs<V>>();
      group.Weights();
      group.template FloatValues<BfloatPairs<V>>();
    }
  }

  static void Nothing(const Attention& work, const Query* queries, int count) {
    for (int r = 0; r < count; r++) {
      *queries[r].best = kNone;
      *queries[r].sum = 0;
      for (int d = 0; d < work.head_dim; d += 16) V::Store(queries[r].values + d, V::Set(0.0f));
    }
  }

  static void Attend(const Attention& work) {
    int i = 0;
    for (; i + V::kQueries <= work.count; i += V::kQueries) Together<V::kQueries>(work, work.queries + i);
    for (; i + 4 <= work.count; i += 4) Together<4>(work, work.queries + i);
    for (; i < work.count; i++) Together<1>(work, work.queries + i);
  }

  static void Combine(const float* best, const float* sums, const float* values, int count, int head_dim, float* y) {
    float most = kNone, total = 0;
    for (int i = 0; i < count; i++) most = best[i] > most ? best[i] : most;
    for (int d = 0; d < head_dim; d += 16) V::Store(y + d, V::Set(0.0f));
    for (int i = 0; i < count; i++) {
      if (best[i] == kNone) continue;
      alignas(64) float all[kLanes];
      V::Store(all, Exp<V>(V::Set(best[i] - most)));
      total += all[0] * sums[i];
      const F factor = V::Set(all[0]);
      const float* at = values + static_cast<size_t>(i) * head_dim;
      for (int d = 0; d < head_dim; d += 16) V::Store(y + d, V::Fma(factor, V::Load(at + d), V::Load(y + d)));
    }
    const F inverse = V::Set(1 / total);
    for (int d = 0; d < head_dim; d += 16) V::Store(y + d, V::Mul(V::Load(y + d), inverse));
  }

  // One position's numbers: where channel d of it lies, in elements of the form. `together` are in a group of neighbours:
  // channels of keys, positions of values.
  static void Store(int32_t form, uint8_t* at, float* scale, const float* x, int head_dim, size_t step, size_t group,
                    int together) {
    if (form == kInt8) return StoreRounded(at, scale, x, head_dim, step, group, together);
    alignas(64) uint16_t half[kLanes];
    for (int d = 0; d < head_dim; d += 16) {
      V::StoreBfloat(half, V::Load(x + d));
      for (int i = 0; i < 16; i++) {
        const size_t to = static_cast<size_t>((d + i) / together) * group + static_cast<size_t>((d + i) % together) * step;
        if (form == kFloat32) {
          reinterpret_cast<float*>(at)[to] = x[d + i];
        } else {
          reinterpret_cast<uint16_t*>(at)[to] = half[i];
        }
      }
    }
  }

  static void StoreRounded(uint8_t* at, float* scale, const float* x, int head_dim, size_t step, size_t group,
                           int together) {
    F largest = V::Set(0.0f);
    for (int d = 0; d < head_dim; d += 16) largest = V::Max(largest, V::Abs(V::Load(x + d)));
    *scale = V::Largest(largest) / 127;
    const F inverse = V::Set(*scale > 0 ? 1 / *scale : 0), top = V::Set(127.0f), bottom = V::Set(-127.0f);
    alignas(64) float codes[kLanes];
    for (int d = 0; d < head_dim; d += 16) {
      V::Store(codes, V::Min(V::Max(V::Nearest(V::Mul(V::Load(x + d), inverse)), bottom), top));
      for (int i = 0; i < 16; i++)
        at[static_cast<size_t>((d + i) / together) * group + static_cast<size_t>((d + i) % together) * step] =
            static_cast<uint8_t>(static_cast<int>(codes[i]) + 128);
    }
  }

  static size_t Width(int32_t form) { return form == kInt8 ? 1 : form == kFloat32 ? 4 : 2; }
  static int Neighbours(int32_t form) { return form == kInt8 ? 4 : form == kFloat32 ? 1 : 2; }

  static void StoreKey(const Page& page, int position, const float* x, int head_dim) {
    const int n = Neighbours(page.form);
    const size_t start = static_cast<size_t>(position / 16) * 16 * head_dim + static_cast<size_t>(position % 16) * n;
    Store(page.form, page.keys + start * Width(page.form), page.key_scales + position, x, head_dim, 1,
          static_cast<size_t>(16) * n, n);
  }

  static void StoreValue(const Page& page, int position, const float* x, int head_dim) {
    const int n = Neighbours(page.form);
    const size_t start = static_cast<size_t>(position / n) * 16 * n + position % n;
    Store(page.form, page.values + start * Width(page.form), page.value_scales + position, x, head_dim, n,
          static_cast<size_t>(16) * kPage, 16);
  }
};

}  // namespace
}  // namespace gemma
