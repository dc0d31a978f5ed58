// Attention to one page of a cache, for any vector type V of sixteen lanes (vector_*.h).
#pragma once

#include "generic_rows.h"

namespace gemma {
namespace {

template <class V>
struct Attentions {
  using F = typename V::F;
  static constexpr int kTogether = 4;  // queries
  static constexpr float kNone = -__builtin_inff();

  template <int R>
  static void Together(const Attention& work, const Query* queries) {
    alignas(64) float weights[R][kPage];
    int first = kPage, last = -1;
    for (int r = 0; r < R; r++) {
      if (queries[r].first > queries[r].last) continue;
      first = queries[r].first < first ? queries[r].first : first;
      last = queries[r].last > last ? queries[r].last : last;
    }
    if (first > last) {
      for (int r = 0; r < R; r++) {
        *queries[r].best = kNone;
        *queries[r].sum = 0;
        for (int d = 0; d < work.head_dim; d += 16) V::Store(queries[r].values + d, V::Set(0.0f));
      }
      return;
    }
    Scores<R>(work, queries, weights, first / 16, last / 16);
    Weights<R>(queries, weights, first / 16, last / 16);
    Values<R>(work, queries, weights, first / 2, last / 2);
  }

  template <int R>
  static void Scores(const Attention& work, const Query* queries, float (*scores)[kPage], int from, int to) {
    const int half = work.head_dim / 2;
    for (int block = from; block <= to; block++) {
      const uint8_t* keys = reinterpret_cast<const uint8_t*>(work.page.keys) + static_cast<size_t>(block) * half * 64;
      F even[R], odd[R];
      for (int r = 0; r < R; r++) even[r] = odd[r] = V::Set(0.0f);
      for (int i = 0; i < half; i++) {
        const F a = V::First(keys + static_cast<size_t>(i) * 64), b = V::Second(keys + static_cast<size_t>(i) * 64);
        for (int r = 0; r < R; r++) {
          even[r] = V::Fma(V::Set(queries[r].q[2 * i]), a, even[r]);
          odd[r] = V::Fma(V::Set(queries[r].q[2 * i + 1]), b, odd[r]);
        }
      }
      for (int r = 0; r < R; r++) {
        F score = V::Add(even[r], odd[r]);
        if (work.cap > 0) score = V::Mul(V::Set(work.cap), Tanh<V>(V::Mul(score, V::Set(1 / work.cap))));
        score = V::Within(queries[r].first - block * 16, queries[r].last - block * 16, score, V::Set(kNone));
        V::Store(scores[r] + block * 16, score);
      }
    }
  }

  template <int R>
  static void Weights(const Query* queries, float (*scores)[kPage], int from, int to) {
    for (int r = 0; r < R; r++) {
      F largest = V::Set(kNone), sum = V::Set(0.0f);
      for (int block = from; block <= to; block++) largest = V::Max(largest, V::Load(scores[r] + block * 16));
      const float best = V::Largest(largest);
      for (int block = from; block <= to; block++) {
        float* at = scores[r] + block * 16;
        const F e = V::Within(queries[r].first - block * 16, queries[r].last - block * 16,
                              Exp<V>(V::Sub(V::Load(at), V::Set(best))), V::Set(0.0f));
        sum = V::Add(sum, e);
        V::Store(at, e);
      }
      *queries[r].best = best;
      *queries[r].sum = V::Sum(sum);
    }
  }

  template <int R>
  static void Values(const Attention& work, const Query* queries, float (*weights)[kPage], int from, int to) {
    for (int d = 0; d < work.head_dim; d += 16) {
      const uint8_t* values = reinterpret_cast<const uint8_t*>(work.page.values) + static_cast<size_t>(d) * kPage * 2;
      F even[R], odd[R];
      for (int r = 0; r < R; r++) even[r] = odd[r] = V::Set(0.0f);
      for (int i = from; i <= to; i++) {
        const F a = V::First(values + static_cast<size_t>(i) * 64), b = V::Second(values + static_cast<size_t>(i) * 64);
        for (int r = 0; r < R; r++) {
          even[r] = V::Fma(V::Set(weights[r][2 * i]), a, even[r]);
          odd[r] = V::Fma(V::Set(weights[r][2 * i + 1]), b, odd[r]);
        }
      }
      for (int r = 0; r < R; r++) V::Store(queries[r].values + d, V::Add(even[r], odd[r]));
    }
  }

  static void Attend(const Attention& work) {
    int i = 0;
    for (; i + kTogether <= work.count; i += kTogether) Together<kTogether>(work, work.queries + i);
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

  static void StoreKey(uint16_t* keys, int position, const float* x, int head_dim) {
    alignas(64) uint16_t all[kLanes];
    uint16_t* at = keys + static_cast<size_t>(position / 16) * 16 * head_dim + position % 16 * 2;
    for (int d = 0; d < head_dim; d += 16) {
      V::StoreBfloat(all, V::Load(x + d));
      for (int i = 0; i < 16; i += 2) {
        uint16_t* pair = at + static_cast<size_t>(d + i) * 16;
        pair[0] = all[i];
        pair[1] = all[i + 1];
      }
    }
  }

  static void StoreValue(uint16_t* values, int position, const float* x, int head_dim) {
    alignas(64) uint16_t all[kLanes];
    for (int d = 0; d < head_dim; d += 16) {
      V::StoreBfloat(all, V::Load(x + d));
      uint16_t* at = values + static_cast<size_t>(d) * kPage + static_cast<size_t>(position / 2) * 32 + position % 2;
      for (int i = 0; i < 16; i++) at[2 * i] = all[i];
    }
  }
};

}  // namespace
}  // namespace gemma
