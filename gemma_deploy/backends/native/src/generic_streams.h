// Work of Gemma 3n, for any vector type V of sixteen lanes (vector_*.h): streams that are carried along, sparse gates.
#pragma once

#include "kernels.h"

namespace gemma {
namespace {

template <class V>
struct Streams {
  using F = typename V::F;

  static void Mix(float* x, size_t stride, int count, const float* coefs, int n) {
    for (int i = 0; i < n; i += 16) {
      F old[kMostStreams];
      for (int j = 0; j < count; j++) old[j] = V::Load(x + j * stride + i);
      for (int j = 0; j < count; j++) {
        F sum = old[j];
        for (int k = 0; k < count; k++) sum = V::Fma(V::Set(coefs[j * count + k]), old[k], sum);
        V::Store(x + j * stride + i, sum);
      }
    }
  }

  static void Correct(float* x, size_t stride, int count, int active, const float* y, const float* coefs, int n) {
    for (int i = 0; i < n; i += 16) {
      const F news = V::Sub(V::Load(y + i), V::Load(x + active * stride + i));
      for (int j = 0; j < count; j++) {
        float* at = x + j * stride + i;
        V::Store(at, V::Fma(news, V::Set(coefs[j]), V::Load(at)));
      }
    }
  }

  static float Cutoff(const float* x, int n, float quantile) {
    F sum = V::Set(0.0f);
    for (int i = 0; i < n; i += 16) sum = V::Add(sum, V::Load(x + i));
    const float mean = V::Sum(sum) / static_cast<float>(n);
    const F middle = V::Set(mean);
    F squares = V::Set(0.0f);
    for (int i = 0; i < n; i += 16) {
      const F off = V::Sub(V::Load(x + i), middle);
      squares = V::Fma(off, off, squares);
    }
    return mean + quantile * __builtin_sqrtf(V::Sum(squares) / static_cast<float>(n));
  }

  static void Cut(float* x, int n, float cutoff) {
    const F c = V::Set(cutoff), zero = V::Set(0.0f);
    for (int i = 0; i < n; i += 16) V::Store(x + i, V::Max(V::Sub(V::Load(x + i), c), zero));
  }
};

}  // namespace
}  // namespace gemma
