// Work on single rows, for any vector type V of sixteen lanes (vector_*.h).
#pragma once

#include "kernels.h"

namespace gemma {
namespace {

// exp(x), relative error below 3e-7; x is held to -87 .. 88. Cephes' polynomial.
template <class V>
typename V::F Exp(typename V::F x) {
  x = V::Min(V::Max(x, V::Set(-87.0f)), V::Set(88.0f));
  const auto n = V::Nearest(V::Mul(x, V::Set(1.44269504f)));
  auto r = V::Fma(n, V::Set(-0.693359375f), x);
  r = V::Fma(n, V::Set(2.12194440e-4f), r);
  auto p = V::Set(1.9875691500e-4f);
  p = V::Fma(p, r, V::Set(1.3981999507e-3f));
  p = V::Fma(p, r, V::Set(8.3334519073e-3f));
  p = V::Fma(p, r, V::Set(4.1665795894e-2f));
  p = V::Fma(p, r, V::Set(1.6666665459e-1f));
  p = V::Fma(p, r, V::Set(5.0000001201e-1f));
  p = V::Fma(V::Mul(p, r), r, V::Add(r, V::Set(1.0f)));
  return V::Scale(p, n);
}

// tanh(x) = 1 - 2 / (exp(2x) + 1); absolute error below 2e-7.
template <class V>
typename V::F Tanh(typename V::F x) {
  const auto one = V::Set(1.0f);
  return V::Sub(one, V::Div(V::Set(2.0f), V::Add(Exp<V>(V::Add(x, x)), one)));
}

// x * sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3): gelu's tanh form.
template <class V>
typename V::F GeluTanh(typename V::F x) {
  const auto cubic = V::Fma(V::Mul(V::Mul(x, x), x), V::Set(0.044715f), x);
  const auto e = Exp<V>(V::Mul(cubic, V::Set(-1.5957691216f)));
  return V::Div(x, V::Add(e, V::Set(1.0f)));
}

// x * (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
template <class V>
typename V::F Gelu(typename V::F x) {
  const auto one = V::Set(1.0f);
  const auto z = V::Mul(V::Abs(x), V::Set(0.70710678f));
  const auto t = V::Div(one, V::Fma(z, V::Set(0.3275911f), one));
  auto p = V::Set(1.061405429f);
  p = V::Fma(p, t, V::Set(-1.453152027f));
  p = V::Fma(p, t, V::Set(1.421413741f));
  p = V::Fma(p, t, V::Set(-0.284496736f));
  p = V::Fma(p, t, V::Set(0.254829592f));
  const auto rest = V::Mul(V::Mul(p, t), Exp<V>(V::Sub(V::Set(0.0f), V::Mul(z, z))));  // 1 - erf(z)
  // x (2 - rest) / 2 where x >= 0, x rest / 2 where not.
  const auto positive = V::Max(x, V::Set(0.0f));
  return V::Sub(positive, V::Mul(V::Mul(V::Abs(x), rest), V::Set(0.5f)));
}

template <class V>
struct Rows {
  static void Round(const Span& span, int inputs) {
    auto largest = V::Set(0.0f);
    for (int k = 0; k < inputs; k += 16) largest = V::Max(largest, V::Abs(V::Load(span.values + k)));
    const float scale = V::Largest(largest) / kCodeMax;
    const auto inverse = V::Set(scale > 0 ? 1 / scale : 0);
    const auto top = V::Set(static_cast<float>(kCodeMax)), bottom = V::Set(-static_cast<float>(kCodeMax));
    *span.scale = scale;
    span.sums[0] = 0;
    for (int k = 0; k < inputs; k += kSums) {
      int32_t sum = 0;
      for (int j = k; j < k + kSums; j += 16) {
        auto q = V::Nearest(V::Mul(V::Load(span.values + j), inverse));
        q = V::Min(V::Max(q, bottom), top);
        V::StoreCodes(span.codes, j, q);
        sum += V::SumInt(q);
      }
      span.sums[k / kSums + 1] = span.sums[k / kSums] + sum;
    }
  }

  static float Inverse(const float* x, int n, float eps) {
    auto a = V::Set(0.0f), b = a;
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      const auto u = V::Load(x + i), v = V::Load(x + i + 16);
      a = V::Fma(u, u, a);
      b = V::Fma(v, v, b);
    }
    if (i < n) {
      const auto u = V::Load(x + i);
      a = V::Fma(u, u, a);
    }
    return 1 / __builtin_sqrtf(V::Sum(V::Add(a, b)) / static_cast<float>(n) + eps);
  }

  static void RmsNorm(const float* x, const float* weight, float* y, int n, float eps) {
    const auto r = V::Set(Inverse(x, n, eps));
    if (weight == nullptr) {
      for (int i = 0; i < n; i += 16) V::Store(y + i, V::Mul(V::Load(x + i), r));
      return;
    }
    for (int i = 0; i < n; i += 16) V::Store(y + i, V::Mul(V::Mul(V::Load(x + i), r), V::Load(weight + i)));
  }

  static void AddRmsNorm(float* x, const float* y, const float* weight, int n, float eps) {
    const auto r = V::Set(Inverse(y, n, eps));
    for (int i = 0; i < n; i += 16)
      V::Store(x + i, V::Fma(V::Mul(V::Load(y + i), r), V::Load(weight + i), V::Load(x + i)));
  }

  static void Gated(const float* gate, const float* up, float* y, int n, int32_t activation) {
    if (activation == kGelu) {
      for (int i = 0; i < n; i += 16) V::Store(y + i, V::Mul(Gelu<V>(V::Load(gate + i)), V::Load(up + i)));
      return;
    }
    for (int i = 0; i < n; i += 16) V::Store(y + i, V::Mul(GeluTanh<V>(V::Load(gate + i)), V::Load(up + i)));
  }

  static void Rotate(float* x, const float* cosines, const float* sines, int n, float factor) {
    const int half = n / 2;
    const auto f = V::Set(factor);
    for (int i = 0; i < half; i += 16) {
      const auto a = V::Mul(V::Load(x + i), f), b = V::Mul(V::Load(x + half + i), f);
      const auto c = V::Load(cosines + i), s = V::Load(sines + i);
      V::Store(x + i, V::Sub(V::Mul(a, c), V::Mul(b, s)));
      V::Store(x + half + i, V::Fma(b, c, V::Mul(a, s)));
    }
  }

  static float Largest(const float* x, int n) {
    auto most = V::Set(-__builtin_inff());
    for (int i = 0; i < n; i += 16) most = V::Max(most, V::Load(x + i));
    return V::Largest(most);
  }

  static float SumExp(const float* x, int n, float best) {
    const auto zero = V::Set(0.0f), from = V::Set(best);
    auto a = zero, b = zero, odd = zero;
    const auto exp = [&](const float* at) {
      const auto less = V::Sub(V::Load(at), from);
      odd = V::Fma(less, zero, odd);  // Exp makes a number of what is none
      return Exp<V>(less);
    };
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      a = V::Add(a, exp(x + i));
      b = V::Add(b, exp(x + i + 16));
    }
    if (i < n) a = V::Add(a, exp(x + i));
    return V::Sum(V::Add(V::Add(a, b), odd));
  }

  static void SoftCap(float* x, int n, float cap) {
    const auto c = V::Set(cap), inverse = V::Set(1 / cap);
    for (int i = 0; i < n; i += 16) V::Store(x + i, V::Mul(c, Tanh<V>(V::Mul(V::Load(x + i), inverse))));
  }
};

}  // namespace
}  // namespace gemma
