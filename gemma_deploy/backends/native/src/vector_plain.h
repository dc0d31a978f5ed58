// Sixteen lanes in plain C++, for any processor.
#pragma once

#include <cmath>
#include <cstring>

#include "half.h"
#include "layout.h"

namespace gemma {
namespace {

struct Plain {
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  struct B {
    uint8_t v[64];
  };
  // Four inputs' codes, as `dot` wants them.
  struct X {
    int16_t v[4];
  };
  static constexpr bool kCentred = false, kHalves = false;
  static constexpr int kRows = 2, kPanels = 1;
  static constexpr int kQueries = 4, kColumns = 1;

  template <class Op>
  static F Each(Op op) {
    F r;
    for (int i = 0; i < 16; i++) r.v[i] = op(i);
    return r;
  }
  static F Set(float x) {
    return Each([&](int) { return x; });
  }
  static F Load(const float* p) {
    F r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void Store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
  static F Add(F a, F b) {
    return Each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F Sub(F a, F b) {
    return Each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F Mul(F a, F b) {
    return Each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F Div(F a, F b) {
    return Each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F Fma(F a, F b, F c) {
    return Each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F Max(F a, F b) {
    return Each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F Min(F a, F b) {
    return Each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F Abs(F a) {
    return Each([&](int i) { return std::fabs(a.v[i]); });
  }
  static F Nearest(F a) {
    return Each([&](int i) { return std::nearbyint(a.v[i]); });
  }
  // x * 2^n, n whole and from -126 to 127.
  static F Scale(F x, F n) {
    return Each([&](int i) { return std::ldexp(x.v[i], static_cast<int>(n.v[i])); });
  }
  static float Sum(F a) {
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
    return a.v[0];
  }
  static float Largest(F a) {
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
  }
  // a where first <= lane <= last, else b.
  static F Within(int first, int last, F a, F b) {
    return Each([&](int i) { return first <= i && i <= last ? a.v[i] : b.v[i]; });
  }
  static F Float(I a) {
    return Each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static I SetInt(int32_t x) {
    I r;
    for (int i = 0; i < 16; i++) r.v[i] = x;
    return r;
  }
  static I Sub(I a, I b) {
    for (int i = 0; i < 16; i++) a.v[i] -= b.v[i];
    return a;
  }

  // Sixteen whole numbers from -kCodeMax to kCodeMax, of inputs k..k+15, into the row's codes.
  static void StoreCodes(int8_t* codes, int k, F x) {
    int16_t q[16];
    for (int i = 0; i < 16; i++) q[i] = static_cast<int16_t>(x.v[i]);
    std::memcpy(codes + 2 * static_cast<size_t>(k), q, sizeof q);
  }
  static int32_t SumInt(F x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += static_cast<int32_t>(x.v[i]);
    return sum;
  }
  static X Codes(const int8_t* codes, int k) {
    X x;
    std::memcpy(x.v, codes + 2 * static_cast<size_t>(k), sizeof x.v);
    return x;
  }

  static B LoadBytes(const uint8_t* p) {
    B b;
    std::memcpy(b.v, p, sizeof b.v);
    return b;
  }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    for (int i = 0; i < 64; i++) {
      low.v[i] = p[i] & 15;
      high.v[i] = p[i] >> 4;
    }
  }
  // Sums of products under way: of kExact inputs at most.
  struct Acc {
    I sum;
  };
  static Acc Begin() { return Acc{I{}}; }
  static void Dot(Acc& acc, const B& w, const X& x) {
    for (int i = 0; i < 16; i++) {
      int32_t sum = 0;
      for (int j = 0; j < 4; j++) sum += static_cast<int32_t>(w.v[4 * i + j]) * x.v[j];
      acc.sum.v[i] += sum;
    }
  }
  static I Total(const Acc& acc) { return acc.sum; }
  // Four inputs of a panel's rows: halves of codes, of the inputs k..k + 3 and of those 64 behind them, and bytes.
  using Halves = B;
  struct ByteCodes {
    int8_t v[4];
  };
  using ByteAcc = I;
  static void LoadHalves(const uint8_t* p, Halves& low, Halves& high) { LoadNibbles(p, low, high); }
  static ByteCodes FourBytes(const int8_t* p) {
    ByteCodes x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
  }
  static ByteAcc BeginBytes() { return SetInt(0); }
  static void DotBytes(ByteAcc& acc, const Halves& w, const ByteCodes& x) {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 4; j++) acc.v[i] += w.v[4 * i + j] * x.v[j];
  }
  static I TotalBytes(ByteAcc high, const ByteAcc& low) {
    for (int i = 0; i < 16; i++) high.v[i] = high.v[i] * 128 + low.v[i];
    return high;
  }
  // Adds products of 64 inputs with halves of codes (planes of layout.h): of the first 32, and of the others.
  static void LowDots(const uint8_t* p, const int16_t* x, I& first, I& second) {
    for (int i = 0; i < 32; i++) first.v[i % 16] += (p[i] & 15) * x[i];
    for (int i = 0; i < 32; i++) second.v[i % 16] += (p[i] >> 4) * x[i + 32];
  }

  static float FromBits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static uint16_t Half(const uint8_t* p, int i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    return h;
  }
  // Sixteen float16, or bfloat16, in a row.
  static F LoadHalf(const uint8_t* p) {
    return Each([&](int i) { return gemma::FromHalf(Half(p, i)); });
  }
  static F LoadBfloat(const uint8_t* p) {
    return Each([&](int i) { return FromBits(static_cast<uint32_t>(Half(p, i)) << 16); });
  }
  // Sixteen pairs of bfloat16: the first, or the second, of each.
  static F First(const uint8_t* p) {
    return Each([&](int i) { return FromBits(static_cast<uint32_t>(Half(p, 2 * i)) << 16); });
  }
  static F Second(const uint8_t* p) {
    return Each([&](int i) { return FromBits(static_cast<uint32_t>(Half(p, 2 * i + 1)) << 16); });
  }
  static uint16_t ToBfloat(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static void StoreBfloat(uint16_t* p, F a) {
    for (int i = 0; i < 16; i++) p[i] = ToBfloat(a.v[i]);
  }
  static void Prefetch(const void*) {}
};

// For activations of 8 bits, which lie as those of 15.
struct PlainEight : Plain {
  static Acc Begin(int32_t from) { return Acc{SetInt(from)}; }
};

}  // namespace
}  // namespace gemma
